"""Storing recorded changes: exactly once, whatever gets lost, and wherever the messages are by now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ._archive import SessionArchive
from ._attachments import Attachments, StaleAttachments
from ._beside import KEEPING, is_current
from ._changes import AgentWrite, Change, StoredView, Update, compile_update, fold, in_parts, reconcile
from ._documents import Document, agent_key, checked_id, next_message_id, now, with_ids
from ._odd_fields import usable_agents
from .errors import (
    AgentNotFoundError,
    DatabaseError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionNotFoundError,
)

ROUNDS = 8
"""How often a write may find the session changed under its hands before it gives up."""


class SessionWrites(SessionArchive):
    """The part of the repository that stores what a unit of work has recorded."""

    _attachments: Attachments

    async def apply(
        self, session_id: str, changes: Iterable[Change], created_at: Any = None
    ) -> dict[str, MongoDBSessionError]:
        """Store recorded changes, in one command unless another writer was there; exactly once, whatever gets lost.

        Args:
            session_id: The session.
            changes: What was recorded, oldest first.
            created_at: The date of creation of the session that was opened, if it may not be another one of its id.

        Returns:
            By agent id, why that agent's changes could not be stored: `SessionConflictError`, `AgentNotFoundError`,
            `MessageNotFoundError`, `SessionNotFoundError` or `MessageTooLargeError`. The changes of all other agents
            are stored.

        Raises:
            MongoDBSessionError: It is unknown whether the changes are stored. The same changes may be applied again.
        """
        checked_id(session_id, "session_id")
        refused: dict[str, MongoDBSessionError] = {}
        async with self._connection.operation():
            for part in in_parts(changes):
                if refused:
                    part = [change for change in part if change.agent_id not in refused]
                refused |= await self._apply_part(session_id, part, created_at)
        return refused

    async def _apply_part(
        self, session_id: str, changes: Sequence[Change], created_at: Any
    ) -> dict[str, MongoDBSessionError]:
        for _ in range(ROUNDS):
            refused: dict[str, MongoDBSessionError] = {}
            writes = fold(changes)
            for write in writes.values():
                write.session_created_at = created_at
            try:
                await self._attachments.store(session_id, writes.values())
            except SessionNotFoundError as error:
                return dict.fromkeys(writes, error)
            try:
                await self._write(session_id, writes, refused)
            except StaleAttachments as stale:
                self._attachments.learn(session_id, stale.document)
                continue
            await self._remove_refused(session_id, writes, refused)
            if any(write.frees for agent_id, write in writes.items() if agent_id not in refused):
                await self._attachments.remove_unreferenced(session_id)
            return refused
        raise DatabaseError(f"attachments of session {session_id!r} were removed again and again while it was written")

    async def _remove_refused(
        self, session_id: str, writes: Mapping[str, AgentWrite], refused: Mapping[str, MongoDBSessionError]
    ) -> None:
        """Remove the attachments of writes that were refused because the session was deleted meanwhile."""
        for agent_id, reason in refused.items():
            generation = writes[agent_id].generation
            if generation is not None and isinstance(reason, SessionNotFoundError | AgentNotFoundError):
                await self._attachments.remove_refused(session_id, generation)
                break

    async def _write(
        self, session_id: str, writes: dict[str, AgentWrite], refused: dict[str, MongoDBSessionError]
    ) -> None:
        archived: dict[str, dict[int, Document]] = {}
        for _ in range(ROUNDS):
            if not writes:
                break
            await self._let_move(session_id, writes.values())
            try:
                if await self._update_with_room(session_id, compile_update(session_id, writes.values())):
                    for agent_id, write in writes.items():
                        archived.setdefault(agent_id, {}).update(self._copies(session_id, write))
                    self._written(session_id, writes.values())
                    break
            except MessageTooLargeError as error:
                if len(writes) == 1:
                    refused.update(dict.fromkeys(writes, error))
                else:  # let nobody suffer for another agent's message
                    for agent_id, write in writes.items():
                        await self._write(session_id, {agent_id: write}, refused)
                break
            writes = await self._remaining(session_id, writes, refused, archived)
        else:
            await self._raise_odd(session_id)
            raise DatabaseError(f"session {session_id!r} was changed again and again while it was written")
        for agent_id in archived.keys() - refused.keys():
            for message_id, fields in archived[agent_id].items():
                await self._change_archived(session_id, agent_key(agent_id), message_id, fields)

    async def _remaining(
        self,
        session_id: str,
        writes: Mapping[str, AgentWrite],
        refused: dict[str, MongoDBSessionError],
        archived: dict[str, dict[int, Document]],
    ) -> dict[str, AgentWrite]:
        """Compare writes that matched nothing with what is stored; return those to send, note those refused.

        What has to change in the archive goes to `archived`.
        """
        names = (
            "created_at",
            "next_message_id",
            "archived",
            "messages.message_id",
            "messages.message",
            "messages.created_at",
        )
        fields = [f"agents.{agent_key(agent_id)}.{field}" for agent_id in writes for field in names]
        document = await self._find(
            session_id, dict.fromkeys([*fields, "created_at", "attachments_generation", *KEEPING], 1)
        )
        if document is not None and _is_another(document, writes.values()):
            document = None
        agents = {} if document is None else usable_agents(session_id, document)
        unnumbered = [key for key, agent in agents.items() if agent.get("next_message_id") is None]
        if unnumbered and not await self._adopt(session_id, agents, unnumbered):
            return dict(writes)
        remaining: dict[str, AgentWrite] = {}
        for key, agent in agents.items():
            head = self._head(session_id, key)
            head.since, head.next_id = agent.get("created_at"), agent["next_message_id"]
        for agent_id, write in writes.items():
            if document is None:
                refused[agent_id] = SessionNotFoundError(f"session {session_id!r} does not exist any more")
                continue
            stored = agents.get(agent_key(agent_id))
            newer = _messages_by_id(stored)
            older = {} if stored is None else await self._sought(session_id, agent_id, write, stored, newer)
            try:
                view = None if stored is None else StoredView(stored["next_message_id"], {**older, **newer})
                rest = reconcile(write, view)
            except MongoDBSessionError as error:
                refused[agent_id] = error
                continue
            if rest is not None:
                if rest.generation is not None and not (
                    rest.generation == (document.get("attachments_generation") or 0)
                    and is_current(document, rest.expires_from, now())
                ):
                    raise StaleAttachments(document)
                changes = archived.setdefault(agent_id, {})
                for message_id in rest.replaced.keys() & older.keys():
                    changes.setdefault(message_id, {}).update(rest.replaced[message_id])
                rest = replace(rest, replaced={n: rest.replaced[n] for n in rest.replaced if n not in older})
                if not rest.is_empty:
                    remaining[agent_id] = rest
        return remaining

    async def _sought(
        self, session_id: str, agent_id: str, write: AgentWrite, stored: Document, newer: Mapping[int, Document]
    ) -> dict[int, Document]:
        """Return those messages of a write that are archived, by id."""
        if not stored.get("archived"):
            return {}
        ids = {*write.replaced, *write.recorded} - newer.keys()
        found = {}
        for message_id in ids:
            if message_id < stored["next_message_id"]:
                since = stored.get("created_at")
                message = await self._archived_message(session_id, agent_key(agent_id), message_id, since)
                if message is not None:
                    found[message_id] = message
        return found

    async def _adopt(self, session_id: str, agents: dict[str, Document], keys: Iterable[str]) -> bool:
        """Give agents of versions before 1.0 their `next_message_id`, unless somebody writes to them meanwhile.

        Those versions did not encode ids, so an agent whose id holds `%` or `$` moves to its key.
        """
        condition: Document = {"_id": session_id}
        adopted: Document = {}
        moved = []
        for old in keys:
            agent, new = agents[old], agent_key(old)
            messages, archived = agent.get("messages") or [], agent.get("archived") or 0
            agent["next_message_id"] = next_message_id(messages, archived)
            condition[f"agents.{old}"] = {"$exists": True}
            condition[f"agents.{old}.next_message_id"] = None
            condition[f"agents.{old}.archived"] = archived or {"$in": [None, 0]}
            condition[f"agents.{old}.messages"] = {"$size": len(messages)} if messages else {"$in": [None, []]}
            gained = {"next_message_id": agent["next_message_id"]}
            if any("message_id" not in message for message in messages if isinstance(message, dict)):
                gained["messages"] = with_ids(f"$agents.{old}.messages", archived)
                agent["messages"] = [
                    {"message_id": n, **message} if isinstance(message, dict) else message
                    for n, message in enumerate(messages, archived)
                ]
            adopted[f"agents.{new}"] = {"$mergeObjects": [f"$agents.{old}", gained]}
            if new != old:
                condition[f"agents.{new}"] = {"$exists": False}
                moved.append(old)
        stages: list[Document] = [{"$set": adopted}]
        if moved:
            stages.append({"$unset": [f"agents.{old}" for old in moved]})
        for old in moved:
            agents[agent_key(old)] = agents.pop(old)
        return await self._update_with_room(session_id, Update(condition, stages, None))


def _is_another(document: Document, writes: Iterable[AgentWrite]) -> bool:
    """Tell whether a session is not the one that writes are for: that was deleted, and this has its id."""
    return any(write.session_created_at not in (None, document.get("created_at")) for write in writes)


def _messages_by_id(stored: Mapping[str, Any] | None) -> dict[int, Document]:
    messages = (stored or {}).get("messages")
    return {
        message.get("message_id", position): message
        for position, message in enumerate(messages if isinstance(messages, list) else ())
        if isinstance(message, dict)
    }
