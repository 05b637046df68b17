"""Copying a session, or its beginning, on the server.

Buckets and attachments are copied first; then one aggregation makes the new document out of the old one, if that is
still the one the rest was copied for. Only what has to say something else in the copy comes to the client: messages
that refer to attachments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ._attachments import Attachments
from ._beside import kept_from
from ._buckets import bucket_of, holding_message, holding_positions
from ._connection import run_pipeline
from ._copies import Copy, SessionCopies
from ._cutting import Branch, checked_ends, document_of, ends_of, facts, unchanged, usage_of
from ._documents import USAGE, Document, agent_id_of, agent_key, checked_id, unusable_agents
from ._odd_fields import usable_agents
from ._references import Reference, in_generation, references_of
from ._writes import SessionWrites
from .errors import (
    AttachmentError,
    DatabaseError,
    MessageNotFoundError,
    MongoDBSessionError,
    SessionExistsError,
    SessionNotFoundError,
)

_ATTACHMENT = "messages.attachments.0"

_ROUNDS = 16
"""How often a session may be written to while it is forked, before that is given up."""


@dataclass
class _Progress:
    """What was copied already, as long as no attachment of the session is removed."""

    generation: Any = None
    copied: dict[str, int] = field(default_factory=dict)
    used: dict[Reference, None] = field(default_factory=dict)

    def begin(self, generation: Any) -> None:
        if generation != self.generation:
            self.generation, self.copied, self.used = generation, {}, {}

    def use(self, messages: Iterable[Document]) -> None:
        self.used |= {reference: None for message in messages for reference in references_of(message)}


class SessionForks(SessionCopies, SessionWrites):
    """The part of the repository that forks."""

    _attachments: Attachments

    async def _fork(self, session_id: str, new_id: str, at_message: object) -> None:
        checked_id(session_id, "session_id")
        copy, ends = self._copy(checked_id(new_id, "new_id")), checked_ends(at_message)
        progress = _Progress()
        async with self._connection.operation():
            try:
                for _ in range(_ROUNDS):
                    if await self._fork_once(session_id, copy, ends, progress):
                        self._ensure_indexes()
                        await copy.finish()
                        return
                raise DatabaseError(f"session {session_id!r} was changed again and again while it was forked")
            except BaseException:
                await copy.abandon()
                raise

    async def _fork_once(
        self, session_id: str, copy: Copy, ends: int | dict[str, int] | None, progress: _Progress
    ) -> bool:
        """Copy a session; return `False` if it changed meanwhile."""
        document = await self._facts(session_id, copy.session_id, ends)
        if not copy.has_begun:
            await copy.begin(self._session_ttl or document.get("session_ttl"))
        agents = {agent_id_of(head["key"]): head for head in document["heads"]}
        lasts = ends_of(session_id, ends, agents)
        branches = [
            await self._branch(session_id, agent_id, head, lasts.get(agent_id)) for agent_id, head in agents.items()
        ]
        progress.begin(document.get("attachments_generation"))
        for branch in branches:
            at = {message.get("message_id"): n for n, message in enumerate(branch.agent["messages"])}
            with_attachments = [one for one in branch.agent["with_attachments"] if references_of(one)]
            messages = {at[one.get("message_id")]: one for one in with_attachments}
            branch.replaced = {n: one for n, one in messages.items() if n < branch.kept}
            progress.use(branch.replaced.values())
        for branch in branches:
            branch.replaced = {n: in_generation(one, copy.generation) for n, one in branch.replaced.items()}
            await self._copy_archive(session_id, copy, branch, progress)
        used = tuple(progress.used)
        if used and not await self._attachments.copy(
            session_id, used, copy.session_id, copy.generation, copy.expires_from
        ):
            await self._refuse_existing(copy.session_id)
            current = await self._found(session_id, {"attachments_generation": 1})
            if current.get("attachments_generation") != progress.generation:
                return False
            raise AttachmentError(f"session {session_id!r} holds attachments that are missing, so it was not forked")
        own = {
            "attachments_generation": copy.generation,
            "copy_of": {"$literal": copy.origin(session_id)},
            **copy.expiry,
        }
        stages = document_of(copy.session_id, copy.moment, own, branches)
        into = {"into": self._collection_name, "on": "_id", "whenMatched": "fail", "whenNotMatched": "insert"}
        pipeline = [{"$match": unchanged(session_id, document)}, *stages, {"$merge": into}]
        await copy.commit(lambda sessions: run_pipeline(sessions, pipeline))
        try:
            return await copy.is_there()
        except MongoDBSessionError as error:
            raise type(error)(f"{error}; it is unknown whether the fork is there") from error

    async def _facts(self, session_id: str, new_id: str, ends: int | dict[str, int] | None) -> Document:
        by_key = {agent_key(agent_id): n for agent_id, n in ends.items()} if isinstance(ends, dict) else ends
        condition = {"_id": {"$in": [session_id, new_id]}}
        projection = facts(by_key)
        for _ in range(_ROUNDS):
            found = {
                document["_id"]: document
                for document in await self._send(lambda sessions: sessions.find(condition, projection).to_list())
            }
            if session_id not in found:
                raise SessionNotFoundError(f"session {session_id!r} does not exist")
            if new_id in found:
                raise SessionExistsError(f"session {new_id!r} exists already")
            heads = found[session_id]["heads"]
            for odd in unusable_agents({**found[session_id], "agents": {head["key"]: head for head in heads}}).values():
                raise odd.error(session_id)
            unnumbered = [head["key"] for head in heads if head.get("next_message_id") is None]
            if not unnumbered:
                return found[session_id]
            agents = usable_agents(session_id, await self._found(session_id, {"agents": 1}))
            await self._adopt(session_id, agents, [key for key in unnumbered if key in agents])
        raise DatabaseError(f"session {session_id!r} was changed again and again while it was forked")

    async def _branch(self, session_id: str, agent_id: str, head: Document, last: int | None) -> Branch:
        if last is None:
            return Branch(head, None, int(head["next_message_id"]), {}, {})
        archived = int(head["archived"])
        cut_usage = head["cut_usage"]
        ids = [message.get("message_id") for message in head["messages"]]
        if last in ids:
            return Branch(head, archived + ids.index(last) + 1, last + 1, cut_usage, {})
        position = None
        if archived and 0 <= last < int(head["next_message_id"]):
            position = await self._archived_position(session_id, head, last)
        if position is None:
            raise MessageNotFoundError(f"agent {agent_id!r} holds no message {last}")
        older = await self._archived_usage(session_id, head, position + 1)
        summed = {name: amount + older.get(name, 0) for name, amount in cut_usage.items()}
        return Branch(head, position + 1, last + 1, summed, {})

    async def _archived_position(self, session_id: str, head: Document, message_id: int) -> int | None:
        known = self._head(session_id, head["key"])
        known.learn(head)
        at = {"at": {"$indexOfArray": ["$messages.message_id", message_id]}}
        for condition in holding_message(session_id, head["key"], message_id, known):
            bucket = await self._find_bucket(condition, at)
            if bucket is not None:
                position = int(bucket["_id"]["first"]) + int(bucket["at"])
                return position if position < int(head["archived"]) else None
        return None

    async def _archived_usage(self, session_id: str, head: Document, begin: int) -> Document:
        """Return what archived messages from a position on have added to the totals."""
        archived = int(head["archived"])
        if begin >= archived:
            return {}
        condition = holding_positions(session_id, head["key"], head.get("created_at"), begin, archived)
        skipped = {"$max": [0, {"$subtract": [begin, "$_id.first"]}]}
        later = {"$slice": ["$messages", skipped, {"$size": "$messages"}]}
        pipeline = [
            {"$match": condition},
            {"$replaceWith": {"$let": {"vars": {"later": later}, "in": usage_of("$$later")}}},
            {"$group": {"_id": None, **{name: {"$sum": f"${name}"} for name in USAGE}}},
        ]
        totals = await self._send(lambda archive: run_pipeline(archive, pipeline), self._archive_name)
        return totals[0] if totals else {}

    async def _copy_archive(self, session_id: str, copy: Copy, branch: Branch, progress: _Progress) -> None:
        """Copy the buckets below the head of the fork.

        Raises:
            DatabaseError: A message is missing.
        """
        key, since, end = branch.agent["key"], branch.agent.get("created_at"), branch.archived
        position = progress.copied.get(key, 0)
        if position == end:
            return
        plain = {**holding_positions(session_id, key, since, position, end), _ATTACHMENT: {"$exists": False}}
        kept = {"$min": [{"$add": ["$last", 1]}, end]}
        new_id = {"session_id": {"$literal": copy.session_id}, "agent": {"$literal": key}, "since": copy.moment}
        bucket = {
            "_id": {**new_id, "first": "$_id.first"},
            "session_id": {"$literal": copy.session_id},
            "revision": "$revision",
            "last": {"$subtract": [kept, 1]},
            "messages": {"$slice": ["$messages", {"$subtract": [kept, "$_id.first"]}]},
            "generation": {"$literal": copy.generation},
            **kept_from(copy.expires_from),
        }
        into = {"into": self._archive_name, "on": "_id", "whenMatched": "replace", "whenNotMatched": "insert"}
        pipeline = [{"$match": plain}, {"$replaceWith": bucket}, {"$merge": into}]
        await self._send(lambda archive: run_pipeline(archive, pipeline), self._archive_name)
        while found := await self._with_attachments(session_id, key, since, position, end):
            first = int(found["_id"]["first"])
            messages = found["messages"][: end - first]
            progress.use(messages)
            messages = [in_generation(one, copy.generation) if references_of(one) else one for one in messages]
            await copy.put_bucket(bucket_of(copy.session_id, key, copy.moment, first, messages))
            position = int(found["last"]) + 1
        if await self._copied(copy, key, end) != end:
            await self._refuse_existing(copy.session_id)
            await self._found(session_id, {"_id": 1})  # or it was deleted meanwhile, which is another error
            raise DatabaseError(f"session {session_id!r}: a message is missing in its archive, so it was not forked")
        progress.copied[key] = end

    async def _refuse_existing(self, new_id: str) -> None:
        # Another copy into it, which came to its end, may have removed what this one had stored.
        if await self._find(new_id, {"_id": 1}) is not None:
            raise SessionExistsError(f"session {new_id!r} exists already")

    async def _with_attachments(self, session_id: str, key: str, since: Any, begin: int, end: int) -> Document | None:
        if begin >= end:
            return None
        condition = {**holding_positions(session_id, key, since, begin, end), _ATTACHMENT: {"$exists": True}}
        found = await self._send(
            lambda archive: archive.find(condition, sort=[("_id", 1)], limit=1).to_list(), self._archive_name
        )
        return found[0] if found else None

    async def _copied(self, copy: Copy, key: str, end: int) -> int:
        """Return how many messages the buckets of the copy hold."""
        condition = holding_positions(copy.session_id, key, copy.moment, 0, end)
        count = {"$sum": {"$subtract": [{"$add": ["$last", 1]}, "$_id.first"]}}
        pipeline = [{"$match": condition}, {"$group": {"_id": None, "messages": count}}]
        counted = await self._send(lambda archive: run_pipeline(archive, pipeline), self._archive_name)
        return int(counted[0]["messages"]) if counted else 0
