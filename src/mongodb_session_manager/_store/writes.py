"""Storing recorded changes exactly once, in the document and in the archive."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self, TypeAlias

from bson import ObjectId

from .._format.attachment_refs import references_of
from .._format.changes import (
    REMOVED,
    AgentWrite,
    Change,
    Identity,
    StoredView,
    Update,
    compile_update,
    fold,
    in_parts,
    reconcile,
    without_removed,
)
from .._format.dates import as_date
from .._format.documents import Document, config_set, has_old_config_set
from .._format.expressions import stored_config_set, with_ids
from .._format.ids import agent_key, checked_id, is_message_id, is_numbered, numbered, stored_id
from .._format.layout import Place
from .._format.malformed import usable_agents
from .._format.retention import LIFE
from .._format.sizes import MAX_DOCUMENT_BYTES, of_agent, size_of
from .._io.connection import AsyncCollection, find_and_modify
from ..errors import (
    DatabaseError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionNotFoundError,
    StateTooLargeError,
)
from .archive import SessionArchive, WrittenBackError
from .attachments import parsed

logger = logging.getLogger(__name__)

Changed: TypeAlias = MutableMapping[tuple[int, Any], Document]
"""Fields of archived messages that change, by message id and `created_at`, which is `None` if it is not known."""

ROUNDS = 8
"""A write gives up after it has found the session changed this often."""


class SessionWrites(SessionArchive):
    """The base class of the repository that stores the changes of a unit of work."""

    async def apply(
        self, session_id: str, changes: Iterable[Change], incarnation: ObjectId | None = None
    ) -> dict[str, MongoDBSessionError]:
        """Store recorded changes exactly once; in one command, unless another writer interferes.

        Args:
            session_id: The session.
            changes: The recorded changes, oldest first.
            incarnation: The incarnation of the session that was opened; `None` writes to the session that has the id
                now.

        Returns:
            By agent id, why that agent's changes could not be stored: `SessionConflictError`, `AgentNotFoundError`,
            `MessageNotFoundError`, `SessionNotFoundError` or `MessageTooLargeError`. The changes of all other agents
            are stored. With `StateTooLargeError` the agent's messages are stored too, unless the error is `pending`.

        Raises:
            MongoDBSessionError: It is unknown whether the changes are stored. The same changes can be applied again.
        """
        checked_id(session_id, "session_id")
        refused: dict[str, MongoDBSessionError] = {}
        async with self._connection.operation():
            for part in in_parts(changes):
                if refused:
                    part = [change for change in part if _are_messages_stored(refused.get(change.agent_id))]
                refused |= await self._apply_part(session_id, part, incarnation)
        return refused

    async def _apply_part(
        self, session_id: str, changes: Sequence[Change], opened: ObjectId | None
    ) -> dict[str, MongoDBSessionError]:
        for _ in range(ROUNDS):
            refused: dict[str, MongoDBSessionError] = {}
            writes = fold(changes)
            try:
                life = await self._life(session_id)
            except SessionNotFoundError as error:
                return dict.fromkeys(writes, error)
            place = Place(session_id, opened or life.incarnation)
            for write in writes.values():
                write.incarnation = place.incarnation
                if write.moment is not None:
                    write.moment = self._connection.now()
            await self._attachments.store(place, writes.values(), self._dates(life))
            stored = [reference for write in writes.values() for reference in write.stored]
            try:
                await self._write(place, writes, refused)
            except _DatedTooEarlyError:
                self._lives.pop(session_id, None)
                continue
            if stored and any(not _are_messages_stored(error) for error in refused.values()):
                await self._attachments.remove_unnamed(place, stored)
            gone = any(type(error) is SessionNotFoundError for error in refused.values())
            if opened is None and gone and await self._find(session_id, {"_id": 1}) is not None:
                self._lives.pop(session_id, None)
                continue  # it was deleted and created again
            return refused
        raise DatabaseError(f"session {session_id!r} was changed again and again while it was written")

    async def _write(
        self, place: Place, writes: dict[str, AgentWrite], refused: dict[str, MongoDBSessionError]
    ) -> None:
        session_id = place.session_id
        archived: dict[str, Changed] = {}
        found_in: dict[str, InArchive] = {}
        for _ in range(ROUNDS):
            if not writes:
                break
            await self._let_move(session_id, writes.values())
            too_large: MessageTooLargeError | None = None
            try:
                if await self._send_writes(place, writes.values()):
                    for agent_id, write in writes.items():
                        archived.setdefault(agent_id, {}).update(self._copies(session_id, write))
                    self._written(session_id, writes.values())
                    break
            except MessageTooLargeError as error:
                too_large = error
            if too_large is not None:
                for agent_id, write in writes.items():
                    if len(writes) > 1:  # a write that is too large must not prevent those of other agents
                        await self._write(place, {agent_id: write}, refused)
                    else:
                        await self._write_what_fits(place, write, refused, too_large)
                break
            writes = await self._remaining(place, writes, refused, archived, found_in)
        else:
            await self._raise_odd(session_id)
            raise DatabaseError(f"session {session_id!r} was changed again and again while it was written")
        for agent_id in archived:
            if not _are_messages_stored(refused.get(agent_id)):
                continue
            for (message_id, created_at), fields in archived[agent_id].items():
                await self._change_archived(place, agent_key(agent_id), message_id, fields, created_at)
            if agent_id in found_in and not await self._note_change(session_id, agent_id, found_in[agent_id]):
                # Written back meanwhile, from buckets that did not hold the change yet; or deleted.
                await self._write(place, {agent_id: found_in[agent_id].write}, refused)

    async def _send_writes(self, place: Place, writes: Iterable[AgentWrite]) -> bool:
        """Send the statement of writes; return whether it matched. Remove the attachments of replaced content."""
        update = compile_update(place.session_id, writes)
        if not any(write.replaces_content for write in writes):
            return await self._update_with_room(place.session_id, update)
        document = await self._with_room(place.session_id, lambda: self._update_with(update, _returning_removed))
        if document is not None and document.get(REMOVED):
            await self._remove_removed(place, document[REMOVED])
        return document is not None

    async def _remove_removed(self, place: Place, listed: list[Any]) -> None:
        """Remove the files that a session's `removed_attachments` lists, unless a message refers to them."""
        await self._attachments.remove_unnamed(place, parsed(listed))
        await self._update(without_removed(place.session_id, place.incarnation, listed))

    async def _note_change(self, session_id: str, agent_id: str, found_in: InArchive) -> bool:
        """Increment `archive_revision`, which a write-back matches; return `False` if the write-back came first.

        The old attachments are removed by then, so they leave the session's `removed_attachments`.
        """
        path = f"agents.{agent_key(agent_id)}"
        condition = {
            "_id": session_id,
            f"{path}.created_at": found_in.since,
            f"{path}.archived": {"$gte": found_in.archived},
        }
        update: Document = {"$inc": {f"{path}.archive_revision": 1}}
        if outdated := found_in.write.outdated:
            update["$pullAll"] = {REMOVED: outdated}
        return await self._update(Update(condition, update, None))

    async def _write_what_fits(
        self,
        place: Place,
        write: AgentWrite,
        refused: dict[str, MongoDBSessionError],
        too_large: MessageTooLargeError,
    ) -> None:
        """Store the messages of a write that is too large, then the fields of the agent's state that fit."""
        session_id, agent_id, states = place.session_id, write.agent_id, write.states
        if not states:
            contents = write.contents()
            refused[agent_id] = too_large
            if size_of(contents) < MAX_DOCUMENT_BYTES:  # each message fits, but other parts fill the document
                full = await self._too_large(session_id, of_agent("a message", agent_id), contents, too_large)
                full.pending = True
                refused[agent_id] = full
            return
        if write.has_more_than_states:
            await self._write(place, {agent_id: write.without_states(states)}, refused)
            if agent_id not in refused:
                await self._write(place, {agent_id: write.states_alone()}, refused)
            return
        largest = max(states, key=lambda name: size_of(states[name]))
        rest = write.without_states([largest])
        if rest.states:
            await self._write(place, {agent_id: rest}, refused)
        if _are_messages_stored(refused.get(agent_id)):
            part = of_agent(largest, agent_id)
            refused[agent_id] = await self._too_large(session_id, part, states[largest], too_large)

    async def _remaining(
        self,
        place: Place,
        writes: Mapping[str, AgentWrite],
        refused: dict[str, MongoDBSessionError],
        archived: dict[str, Changed],
        found_in: dict[str, InArchive],
    ) -> dict[str, AgentWrite]:
        """Compare writes that matched nothing with the stored session; return those to send, note the refused ones.

        Changes of archived messages are added to `archived`, and as a write of their own to `found_in`.
        """
        names = (
            "created_at",
            "next_message_id",
            "archived",
            "revision",
            "messages.message_id",
            "messages.message",
            "messages.created_at",
        )
        session_id = place.session_id
        fields = [f"agents.{agent_key(agent_id)}.{field}" for agent_id in writes for field in names]
        document = await self._find(session_id, dict.fromkeys([*fields, *LIFE], 1))
        if document is not None and document.get("incarnation") != place.incarnation:
            document = None
        agents = {} if document is None else usable_agents(session_id, document)
        by_id = {agent_key(agent_id) for agent_id, write in writes.items() if write.by_id}
        for agent in agents.values():
            messages = agent["messages"] if type(agent.get("messages")) is list else []
            agent["ids"] = list(map(stored_id, messages))
            agent["messages"] = [message if type(message) is dict else {} for message in messages]
            for name in ("archived", "revision"):
                agent[name] = agent[name] if type(agent.get(name)) is int else 0
        # A manager continues even if an old process has also written; the next opening renumbers the messages.
        unnumbered = [
            key
            for key, agent in agents.items()
            if not is_message_id(agent.get("next_message_id")) or (key in by_id and not is_numbered(agent))
        ]
        if unnumbered:
            meant = {agent_id: _positions(write, agents.get(agent_key(agent_id))) for agent_id, write in writes.items()}
            if not await self._adopt(session_id, agents, unnumbered):
                return dict(writes)
            writes = {
                agent_id: _moved(write, agents[agent_key(agent_id)]["ids"], meant[agent_id])
                if agent_key(agent_id) in agents
                else write
                for agent_id, write in writes.items()
            }
        remaining: dict[str, AgentWrite] = {}
        for key, agent in agents.items():
            head = self._head(session_id, key)
            head.since, head.next_id = agent.get("created_at"), agent["next_message_id"]
        for agent_id, write in writes.items():
            if document is None:
                refused[agent_id] = SessionNotFoundError(f"session {session_id!r} does not exist any more")
                continue
            stored = agents.get(agent_key(agent_id))
            newer = {} if stored is None else _known_messages(write, stored["messages"])
            try:
                older = {} if stored is None else await self._sought(place, agent_id, write, stored, newer)
            except WrittenBackError:
                remaining[agent_id] = write
                continue
            try:
                view = None if stored is None else StoredView(stored["next_message_id"], {**older, **newer})
                rest = reconcile(write, view)
            except MongoDBSessionError as error:
                refused[agent_id] = error
                continue
            if rest is not None:
                if rest.stored and self._learn(session_id, document).outlives(rest.dates):
                    raise _DatedTooEarlyError
                changes = archived.setdefault(agent_id, {})
                outdated = []
                for message_id in rest.replaced.keys() & older.keys():
                    which = (message_id, older[message_id].get("created_at"))
                    changes.setdefault(which, {}).update(rest.replaced[message_id])
                    if "message" in rest.replaced[message_id]:
                        outdated += list(map(str, references_of(older[message_id])))
                    if stored is not None:
                        known = found_in.setdefault(agent_id, InArchive.of(write, stored))
                        known.add(message_id, rest.replaced[message_id], _identity(write, message_id))
                        known.write.outdated = sorted({*known.write.outdated, *outdated})
                found = {n: newer[n] for n in rest.replaced if n not in older}
                rest = replace(
                    rest,
                    replaced={int(found[n]["message_id"]): rest.replaced[n] for n in found},
                    identities={int(message["message_id"]): Identity.of(message) for message in found.values()},
                    outdated=[*rest.outdated, *outdated],
                )
                if not rest.is_empty:
                    remaining[agent_id] = rest
        return remaining

    async def _sought(
        self, place: Place, agent_id: str, write: AgentWrite, stored: Document, newer: Mapping[int, Document]
    ) -> dict[int, Document]:
        """Return those messages of a write that are archived, by id.

        Raises:
            WrittenBackError: The session was written back, or deleted, meanwhile.
        """
        if not stored.get("archived"):
            return {}
        ids = {*write.replaced, *write.recorded} - newer.keys()
        found = {}
        for message_id in ids:
            if message_id < stored["next_message_id"]:
                since = stored.get("created_at")
                ours = _identity(write, message_id)
                created_at = None if ours is None else ours.created_at
                key = agent_key(agent_id)
                message = await self._archived_message(place, key, message_id, since, created_at)
                if message is None and created_at is not None and write.by_id:
                    message = await self._archived_message(place, key, message_id, since)
                if message is not None:
                    found[message_id] = message
                elif await self._is_back(place.session_id, key, since, stored["archived"]) or (
                    await self._has_moved(place)
                ):
                    raise WrittenBackError
        return found

    async def _adopt(
        self, session_id: str, agents: dict[str, Document], keys: Iterable[str], gained: Document | None = None
    ) -> bool:
        """Migrate agents to the current form in one command; return `False` if another writer changes them meanwhile.

        Their messages get increasing ids, and each agent gets the `next_message_id` that follows: versions before 1.0
        store none, and keep their own counter. Those versions did not encode agent ids either, so an agent without
        `next_message_id` whose id holds `%` or `$` moves to its key.

        Args:
            session_id: The session.
            agents: By key, the result of `head_numbers`; messages and numbers are updated in place.
            keys: The agents to migrate.
            gained: The field `incarnation` for a session that has none.
        """
        condition: Document = {"_id": session_id}
        if gained:
            condition["incarnation"] = {"$not": {"$type": "objectId"}}
        sets: Document = dict(gained or {})
        unsets: list[str] = []
        moved = []
        for old in keys:
            agent, new = agents[old], old
            ids, following, archived = agent["ids"], agent.get("next_message_id"), int(agent["archived"])
            if following is None and (new := agent_key(old)) != old:
                if new in agents:  # the original did not find the agent under its key and created another one
                    logger.warning(
                        "session_id=<%r>, agent=<%r> | left out: this agent has another key", session_id, old
                    )
                    del agents[old]
                    continue
                condition[f"agents.{new}"] = {"$exists": False}
                moved.append(old)
            path = f"agents.{old}"
            condition[path] = {"$exists": True}
            condition[f"{path}.next_message_id"] = following
            condition[f"{path}.messages"] = {"$size": len(ids)} if ids else {"$in": [None, []]}
            for name in ("archived", "revision"):
                condition[f"{path}.{name}"] = agent[name] or {"$not": {"$gt": 0}}
            sequence, agent["next_message_id"] = numbered(ids, archived, following)
            new_fields: Document = {"next_message_id": agent["next_message_id"]}
            if sequence != ids:
                agent["ids"], agent["revision"] = sequence, agent["revision"] + 1
                new_fields |= {"messages": with_ids(f"${path}.messages", sequence), "revision": agent["revision"]}
                loaded = agent.get("messages") or []
                for message, message_id in zip(loaded, sequence[len(ids) - len(loaded) :], strict=True):
                    if type(message) is dict:
                        message["message_id"] = message_id
            if has_old_config_set(agent):
                agent["config_set"] = sorted(config_set(agent))
                del agent["agent_data"]["config_set"]
                new_fields["config_set"] = stored_config_set(f"${path}")
                unsets.append(f"agents.{new}.agent_data.config_set")
            sets[f"agents.{new}"] = {"$mergeObjects": [f"${path}", new_fields]}
        unsets += [f"agents.{old}" for old in moved]
        for old in moved:
            agents[agent_key(old)] = agents.pop(old)
        if not sets:
            return True
        stages: list[Document] = [{"$set": sets}, *([{"$unset": unsets}] if unsets else [])]
        return await self._update_with_room(session_id, Update(condition, stages, None))


class _DatedTooEarlyError(Exception):
    """The session expires later than the attachments that were stored for it."""


async def _returning_removed(collection: AsyncCollection, update: Update) -> Document | None:
    return await find_and_modify(collection, update.filter, update.update, {REMOVED: 1})


class InArchive(NamedTuple):
    """A write of archived messages, and the state of the archive in which they were found."""

    since: Any
    archived: int
    write: AgentWrite

    @classmethod
    def of(cls, write: AgentWrite, stored: Mapping[str, Any]) -> Self:
        """Return an empty write for the changes of archived messages."""
        part = AgentWrite(
            write.agent_id,
            by_id=write.by_id,
            stored=write.stored,
            dates=write.dates,
            incarnation=write.incarnation,
        )
        return cls(stored.get("created_at"), int(stored["archived"]), part)

    def add(self, message_id: int, fields: Document, identity: Identity | None) -> None:
        """Add the new fields of a message."""
        self.write.replaced.setdefault(message_id, {}).update(fields)
        if identity is not None:
            self.write.identities[message_id] = identity


def _are_messages_stored(refusal: MongoDBSessionError | None) -> bool:
    """Return whether an agent's messages are stored, even if its state was refused."""
    return refusal is None or (isinstance(refusal, StateTooLargeError) and not refusal.pending)


def _identity(write: AgentWrite, message_id: int) -> Identity | None:
    """Return the identity of a message that a write appends or replaces, `None` if it is not known."""
    if message_id in write.recorded:
        return Identity.of(write.recorded[message_id])
    return write.identities.get(message_id)


def _position(messages: Sequence[Document], message_id: int, ours: Identity | None, by_id: bool) -> int | None:
    """Return the position of the message that an id refers to, `None` if there is none.

    Among several messages with that id, the identity selects one. If none of them matches, the message may have been
    renumbered, because an old process has also written. A writer that knows only the id refers to the first one.
    """
    alike = [n for n, message in enumerate(messages) if message.get("message_id") == message_id]
    if ours is not None:
        same = [
            n
            for n, message in enumerate(messages)
            if is_message_id(message.get("message_id")) and _is_same(ours, Identity.of(message))
        ]
        for found in ([n for n in same if n in alike], [] if by_id else same):
            if found:
                return found[0]
        if not by_id and ours.created_at is not None:
            return None
    return alike[0] if alike else None


def _is_same(ours: Identity, theirs: Identity) -> bool:
    # A redaction can have removed the tracking id.
    known = ours.tracking_id is not None and theirs.tracking_id is not None
    return as_date(ours.created_at) == as_date(theirs.created_at) and not (
        known and ours.tracking_id != theirs.tracking_id
    )


def _positions(write: AgentWrite, stored: Mapping[str, Any] | None) -> dict[int, int]:
    """Return by id the positions, in the head, of the messages that a write replaces."""
    messages = (stored or {}).get("messages") or []
    found = {n: _position(messages, n, write.identities.get(n), write.by_id) for n in write.replaced}
    return {message_id: position for message_id, position in found.items() if position is not None}


def _moved(write: AgentWrite, ids: Sequence[int], meant: Mapping[int, int]) -> AgentWrite:
    """Return a write for messages at these positions, which have been renumbered."""
    new = {message_id: ids[position] for message_id, position in meant.items()}
    return replace(
        write,
        replaced={new.get(n, n): fields for n, fields in write.replaced.items()},
        identities={new.get(n, n): identity for n, identity in write.identities.items()},
    )


def _known_messages(write: AgentWrite, messages: Sequence[Document]) -> dict[int, Document]:
    """Return the messages of a head that a write refers to, by the ids in the write."""
    found = {}
    for message_id in (*write.replaced, *write.recorded):
        position = _position(messages, message_id, _identity(write, message_id), write.by_id)
        if position is not None:
            found[message_id] = messages[position]
    return found
