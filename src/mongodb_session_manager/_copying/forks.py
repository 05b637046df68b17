"""Copying a session, or its beginning, on the server.

One aggregation copies the session document into the staged one: a snapshot. Later changes of the session do not disturb
the fork. It continues with its own document, which no other process changes: it copies the buckets below the heads, and
the attachments that the messages refer to. The update that makes the fork live also cuts it.

Two kinds of parts can be missing when the fork copies them. A message whose attachments were removed was replaced: the
fork takes the new content. Archived messages are missing if the session was written back: the fork takes another
snapshot.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from bson import ObjectId

from .._format.attachment_refs import Reference, references_of
from .._format.buckets import Head, holding_message, holding_positions
from .._format.documents import USAGE, Document
from .._format.ids import agent_id_of, agent_key, checked_id, is_numbered
from .._format.layout import CHUNKS, Place
from .._format.malformed import unusable_agents
from .._format.retention import Life
from .._store.attachments import CHUNK_BYTES
from .._store.store import SessionStore
from ..errors import (
    AttachmentError,
    DatabaseError,
    MessageNotFoundError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionNotFoundError,
)
from .fork_document import Branch, checked_ends, ends_of, facts, fork_of, snapshot_of, usage_of
from .staging import Staging
from .write_back import is_left_out

_ROUNDS = 16
"""A fork gives up after this many rounds: the session was written back, or a message replaced."""

_AT_ONCE = 64
"""The number of buckets, or of files, that one command reads."""


class _MissingPartsError(Exception):
    """Archived messages that the snapshot counts are missing.

    Attributes:
        snapshot: Identifies the state of the agent in the snapshot; a write-back changes it.
        error: The error to raise if the next snapshot has the same state.
    """

    def __init__(self, snapshot: tuple[Any, ...], error: MongoDBSessionError) -> None:
        super().__init__()
        self.snapshot = snapshot
        self.error = error


class _Referrer(NamedTuple):
    """A message of a fork that has attachments, and its location.

    Attributes:
        agent_id: The id of its agent.
        bucket: The `_id` of its bucket, `None` for a message of the head.
        path: The path of the message in its document.
        references: The references to its attachments.
    """

    agent_id: str
    bucket: Document | None
    path: str
    references: list[Reference]


class Forker:
    """Forks sessions."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._connection = store.connection
        self._sessions = store.collection
        self._archive = store.archive.collection
        self._chunks = store.collection.part(CHUNKS)

    async def fork(self, session_id: str, new_id: str, at_message: object) -> None:
        """Fork a session, as `AsyncMongoDBSessionRepository.fork_session` describes."""
        checked_id(session_id, "session_id")
        staging, ends = Staging(self._store, checked_id(new_id, "new_id")), checked_ends(at_message)
        async with self._connection.operation():
            try:
                await self._make_current(session_id)
                await staging.begin()
                await self._fork_in_rounds(session_id, staging, ends)
            except BaseException:
                await staging.abandon()
                raise

    async def _make_current(self, session_id: str) -> None:
        """Migrate a session of an earlier version to the current form, as opening it does.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        for _ in range(_ROUNDS):
            document = await self._store.sessions.get(session_id, facts(None))
            agents = _heads(session_id, document)
            if not isinstance(document.get("incarnation"), ObjectId):
                await self._store.migration.migrate(session_id)
            elif unnumbered := [key for key, head in agents.items() if not is_numbered(head)]:
                await self._store.migration.migrate_agents(session_id, agents, unnumbered)
            else:
                return
        raise _changed_too_often(session_id)

    async def _fork_in_rounds(self, session_id: str, staging: Staging, ends: int | dict[str, int] | None) -> None:
        before: tuple[Any, ...] | None = None
        error = None
        for number in range(_ROUNDS):
            if number:
                await staging.clear()
            source, document = await self._snapshot(session_id, staging, ends, number)
            if source is None:
                await self._make_current(session_id)
                continue
            try:
                await self._fork_once(source, staging, ends, document)
                return
            except _MissingPartsError as gone:
                if gone.snapshot == before:
                    error = gone.error
                    break
                before = gone.snapshot
        raise error or _changed_too_often(session_id)

    async def _snapshot(
        self, session_id: str, staging: Staging, ends: int | dict[str, int] | None, number: int
    ) -> tuple[Place | None, Document]:
        """Copy the session document; return the place of the session, and the `facts` of the copy.

        The place is `None` if an earlier version has written to the session meanwhile.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        moment, name = self._connection.now(), self._sessions.name
        pipeline = snapshot_of(session_id, staging.own, staging.lease(), number, moment, name)
        while True:
            try:
                await self._sessions.aggregate(pipeline)
                break
            except MessageTooLargeError as error:
                if not await self._store.mover.make_room(session_id, error):
                    raise
        by_key = {agent_key(agent_id): n for agent_id, n in ends.items()} if isinstance(ends, dict) else ends
        document = await staging.read(facts(by_key))
        origin = document.get("copy_of") or {}
        if origin.get("round") != number:
            raise SessionNotFoundError(f"session {session_id!r} does not exist")
        incarnation = origin.get("incarnation")
        is_current = isinstance(incarnation, ObjectId) and all(map(is_numbered, _heads(session_id, document).values()))
        return (Place(session_id, incarnation) if is_current else None), document

    async def _fork_once(
        self, source: Place, staging: Staging, ends: int | dict[str, int] | None, document: Document
    ) -> None:
        agents = {agent_id_of(key): head for key, head in _heads(source.session_id, document).items()}
        lasts = ends_of(source.session_id, ends, agents)
        branches = [
            await self._branch(source, agent_id, head, lasts.get(agent_id)) for agent_id, head in agents.items()
        ]
        for branch in branches:
            await self._copy_archive(source, staging.place, branch)
        replaced: list[Reference] = []
        async for held in self._with_attachments(staging.place, branches):
            replaced += await self._copy_attachments(source, staging, held)
        await self._store.attachments.remove_unnamed(staging.place, replaced)
        expiry = await staging.date(self._store.expiry.session_ttl or Life.of(document).time_to_live)
        stages = fork_of(source.session_id, self._connection.now(), branches, expiry)
        await staging.go_live(stages)

    # Where the fork ends.

    async def _branch(self, source: Place, agent_id: str, head: Document, last: int | None) -> Branch:
        if last is None:
            return Branch(head, None, int(head["next_message_id"]), {})
        archived = int(head["archived"])
        if last in head["ids"]:
            return Branch(head, archived + head["ids"].index(last) + 1, last + 1, head["cut_usage"])
        missing = MessageNotFoundError(f"agent {agent_id!r} holds no message {last}")
        if not archived or not 0 <= last < int(head["next_message_id"]):
            raise missing
        position = await self._archived_position(source, head, last)
        if position is None:
            raise _missing_parts(source, head, missing)
        older = await self._archived_usage(source, head, position + 1)
        summed = {name: amount + older.get(name, 0) for name, amount in head["cut_usage"].items()}
        return Branch(head, position + 1, last + 1, summed)

    async def _archived_position(self, source: Place, head: Document, message_id: int) -> int | None:
        since, is_regular = head.get("created_at"), Head.of(head).is_regular
        at = {"at": {"$indexOfArray": ["$messages.message_id", message_id]}}
        while True:
            for condition in holding_message(source, head["key"], message_id, since, is_regular):
                bucket = await self._archive.find_one(condition, at)
                if bucket is not None:
                    position = int(bucket["_id"]["first"]) + int(bucket["at"])
                    return position if position < int(head["archived"]) else None
            if not await self._store.migration.move_late_buckets(source):
                return None

    async def _archived_usage(self, source: Place, head: Document, begin: int) -> Document:
        """Return the usage of the archived messages from a position on."""
        archived = int(head["archived"])
        if begin >= archived:
            return {}
        condition = holding_positions(source, head["key"], None, begin, archived)
        skipped = {"$max": [0, {"$subtract": [begin, "$_id.first"]}]}
        later = {"$slice": ["$messages", skipped, {"$size": "$messages"}]}
        usage = {"$let": {"vars": {"later": later}, "in": {**usage_of("$$later"), "count": {"$size": "$$later"}}}}
        pipeline = [
            {"$match": condition},
            {"$replaceWith": usage},
            {"$group": {"_id": None, **{name: {"$sum": f"${name}"} for name in (*USAGE, "count")}}},
        ]
        totals = await self._archive.aggregate(pipeline)
        if not totals or totals[0]["count"] < archived - begin:
            raise _missing_parts(source, head, _missing_message(source.session_id))
        return totals[0]

    # Copying the archive and the attachments.

    async def _copy_archive(self, source: Place, place: Place, branch: Branch) -> None:
        """Copy the buckets below the head of the fork.

        Raises:
            _MissingPartsError: A message is missing.
        """
        key, end = branch.agent["key"], branch.archived
        if not end:
            return
        kept = {"$min": [{"$add": ["$last", 1]}, end]}
        bucket = {
            "_id": {"incarnation": place.incarnation, "agent": {"$literal": key}, "first": "$_id.first"},
            "session_id": {"$literal": place.session_id},
            "revision": "$revision",
            "last": {"$subtract": [kept, 1]},
            "messages": {"$slice": ["$messages", {"$subtract": [kept, "$_id.first"]}]},
        }
        into = {"into": self._archive.name, "on": "_id", "whenMatched": "replace", "whenNotMatched": "insert"}
        condition = holding_positions(source, key, None, 0, end)
        pipeline = [{"$match": condition}, {"$replaceWith": bucket}, {"$merge": into}]
        while True:
            await self._archive.aggregate(pipeline)
            if await self._copied(place, key, end) == end:
                return
            if not await self._store.migration.move_late_buckets(source):
                raise _missing_parts(source, branch.agent, _missing_message(source.session_id))

    async def _copied(self, place: Place, key: str, end: int) -> int:
        """Return the position up to which the buckets of a fork hold all messages."""
        condition = holding_positions(place, key, None, 0, end)
        buckets = await self._archive.find(condition, {"last": 1}, sort=[("_id", 1)])
        position = 0
        for bucket in buckets:
            if bucket["_id"]["first"] <= position:
                position = max(position, int(bucket["last"]) + 1)
        return position

    async def _with_attachments(self, place: Place, branches: Sequence[Branch]) -> AsyncIterator[list[_Referrer]]:
        """Yield the messages of a fork that have attachments, a few at a time."""
        held = []
        for branch in branches:
            path = f"agents.{branch.agent['key']}.messages"
            for n, listed in enumerate(branch.agent["attachments"][: branch.kept]):
                if references := references_of({"attachments": listed}):
                    held.append(_Referrer(branch.agent_id, None, f"{path}.{n}", references))
        for begin in range(0, len(held), _AT_ONCE):
            yield held[begin : begin + _AT_ONCE]
        if not any(branch.archived for branch in branches):
            return
        after: Document = {}
        while found := await self._buckets_with_attachments(place, after):
            after = {"$gt": found[-1]["_id"]}
            for bucket in found:
                agent_id = agent_id_of(bucket["_id"]["agent"])
                yield [
                    _Referrer(agent_id, bucket["_id"], f"messages.{n}", references)
                    for n, listed in enumerate(bucket["attachments"])
                    if (references := references_of({"attachments": listed}))
                ]

    async def _buckets_with_attachments(self, place: Place, after: Document) -> list[Document]:
        condition = {"_id": {**place.buckets(), **after}, "messages.attachments.0": {"$exists": True}}
        fields = {"attachments": {"$map": {"input": "$messages", "in": "$$this.attachments"}}}
        return await self._archive.find(condition, fields, sort=[("_id", 1)], limit=_AT_ONCE)

    async def _copy_attachments(self, source: Place, staging: Staging, held: Sequence[_Referrer]) -> list[Reference]:
        """Copy the attachments of messages of a fork; update messages that were replaced in the session meanwhile.

        Returns:
            The former references of the updated messages.

        Raises:
            AttachmentError: An attachment is missing.
        """
        replaced: list[Reference] = []
        missing = await self._copy_files(source, staging.place, {each for one in held for each in one.references})
        for one in held:
            references = one.references
            for _ in range(_ROUNDS):
                if missing.isdisjoint(references):
                    break
                replaced += references
                references = await self._update_replaced(source, staging, one, references)
                missing = missing | await self._copy_files(source, staging.place, set(references))
            else:
                raise _changed_too_often(source.session_id)
        return replaced

    async def _copy_files(self, source: Place, place: Place, references: set[Reference]) -> set[Reference]:
        """Copy attachments on the server; return those that are missing, or were removed during the copy."""
        wanted = sorted(references)
        missing = set(await self._store.attachments.copy(source, wanted, place))
        for begin in range(0, len(wanted), _AT_ONCE):
            batch = wanted[begin : begin + _AT_ONCE]
            ranges = [{"_id": place.chunks_of(reference)} for reference in batch]
            count: list[Document] = [
                {"$match": {"$or": ranges}},
                {"$project": {"_id": 1}},
                {"$group": {"_id": "$_id.file", "count": {"$sum": 1}}},
            ]
            found = await self._chunks.aggregate(count)
            counts = {(file["_id"]["sha256"], file["_id"]["token"]): file["count"] for file in found}
            for reference in batch:
                if counts.get((reference.sha256, reference.token), 0) * CHUNK_BYTES < reference.length:
                    missing.add(reference)
        return missing

    async def _update_replaced(
        self, source: Place, staging: Staging, held: _Referrer, references: Sequence[Reference]
    ) -> list[Reference]:
        """Replace a message of a fork by its new content in the session; return the new references.

        Raises:
            SessionNotFoundError: The session does not exist any more.
            SessionConflictError: Another process has removed the fork, because its lease was over.
            AttachmentError: The message was not replaced, but an attachment is missing.
        """
        session_id, key = source.session_id, agent_key(held.agent_id)
        n = int(held.path.rpartition(".")[2])
        if held.bucket is None:
            document = await staging.read({f"agents.{key}.messages": {"$slice": [n, 1]}})
            stored = document["agents"][key]["messages"][0]
        else:
            bucket = await self._archive.find_one({"_id": held.bucket}, {"messages": {"$slice": [n, 1]}})
            if bucket is None:
                raise staging.lost()
            stored = bucket["messages"][0]
        current = await self._store.archive.find_message(
            session_id, held.agent_id, stored.get("message_id"), stored.get("created_at")
        )
        if (await self._store.sessions.get(session_id, {"incarnation": 1})).get("incarnation") != source.incarnation:
            raise SessionNotFoundError(f"session {session_id!r} does not exist any more")
        new = references_of(current)
        if current is None or new == references:
            raise AttachmentError(f"session {session_id!r} holds attachments that are missing, so it was not forked")
        change = {"$set": {held.path: current}}
        if held.bucket is None:
            await staging.update(change)
        else:
            await self._archive.update_one({"_id": held.bucket}, change)
        return new


def _heads(session_id: str, document: Document) -> dict[str, Document]:
    """Return the agents of a session, by key, from a document that was read with `facts`.

    Raises:
        DatabaseError: A field of an agent has a type that cannot be used.
    """
    agents = {head["key"]: head for head in document["heads"] if head["key"] and "." not in head["key"]}
    for key in [key for key, head in agents.items() if is_left_out(key, head, agents)]:
        del agents[key]
    for odd in unusable_agents({**document, "agents": agents}).values():
        raise odd.error(session_id)
    return agents


def _missing_parts(source: Place, head: Document, error: MongoDBSessionError) -> _MissingPartsError:
    return _MissingPartsError((source, head["key"], head["archived"], head["revision"]), error)


def _missing_message(session_id: str) -> DatabaseError:
    return DatabaseError(f"session {session_id!r}: a message is missing in its archive, so it was not forked")


def _changed_too_often(session_id: str) -> DatabaseError:
    return DatabaseError(f"session {session_id!r} was changed again and again while it was forked")
