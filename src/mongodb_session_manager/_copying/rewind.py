"""Rewinding a session: removing the messages of agents after a given one, in place.

One statement rewinds all agents, see `rewind_statement`. It gives each of them a new `rewound`, which the writes of
managers match, so an agent that was loaded before can no longer write, even when its next message id is reached again.
The buckets and attachments of removed messages are removed afterwards. Until then the document lists them, in
`stale_below` and `removed_attachments`, and the next opening removes them.

A copy of the whole session is made before the statement, which matches the agents as they were before the copy. So the
copy has every message that the statement removes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from bson import ObjectId

from .._format.attachment_refs import references_of
from .._format.buckets import Head
from .._format.content import HAS_CONTENT, all_block_ids, without_removed_content
from .._format.documents import Document, number
from .._format.expressions import ALL
from .._format.ids import agent_id_of, agent_key, checked_count, checked_id, stored_id
from .._format.keys import block_id_of
from .._format.layout import LIVE, Place
from .._format.lease import StoredLease
from .._format.statements import REMOVED, Update
from .._io.drivers import AsyncCollection, find_and_modify
from .._store.sessions import ROUNDS, ReadAgainError
from .._store.store import SessionStore
from ..errors import (
    DatabaseError,
    InvalidArgumentError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionBusyError,
    SessionConflictError,
    SessionNotFoundError,
)
from .fork_document import ends_of, no_message, usage_of
from .forks import Forker
from .rewind_statement import Cut, compile_rewind
from .source import Source, is_rewound, read_copyable

logger = logging.getLogger(__name__)

_CALLS = ("message.content.toolUse.toolUseId", "message.content.toolResult.toolUseId")
_REMOVED_MESSAGE = (
    "attachments",
    "usage",
    "event_loop_metrics.message_usage",
    "message.role",
    "message.tracking_id",
    *_CALLS,
)
_REMOVED_BUCKET: Document = {"revision": 1, REMOVED: 1, **{f"messages.{name}": 1 for name in _REMOVED_MESSAGE}}
"""The fields of a bucket that `usage_of`, `references_of` and `block_ids_of` read."""


def checked_ends(at_message: object) -> int | dict[str, int]:
    """Return a valid `at_message`, or raise `InvalidArgumentError`."""
    if not isinstance(at_message, Mapping):
        return _checked_last(at_message)
    if not at_message:
        raise InvalidArgumentError("at_message must name at least one agent")
    return {checked_id(agent_id, "agent_id"): _checked_last(last) for agent_id, last in at_message.items()}


def _checked_last(value: object) -> int:
    return -1 if type(value) is int and value == -1 else checked_count(value, "at_message")


class Rewinder:
    """Rewinds sessions."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store

    async def rewind(self, session_id: str, at_message: object, keep_as: str | None, owner: str | None = None) -> None:
        """Rewind a session, as `AsyncMongoDBSessionRepository.rewind_session` describes."""
        checked_id(session_id, "session_id")
        rewind = _Rewind(self._store, session_id, checked_ends(at_message), owner)
        if keep_as is not None:
            checked_id(keep_as, "keep_as")
        async with self._store.connection.operation():
            await rewind.read()
            source = rewind.source
            if keep_as is None:
                await rewind.store()
                return
            copy = await Forker(self._store).fork(session_id, keep_as, None, owner)
            try:
                await rewind.store(is_copied=True)
            except MongoDBSessionError as error:
                if not error.outcome_unknown:
                    await self._remove_copy(copy, source)
                raise

    async def _remove_copy(self, copy: Place, source: Source) -> None:
        """Remove the copy, if the session still exists and was not rewound since it was read; log a failure."""
        place, removed = source.place, {"incarnation": copy.incarnation, **LIVE}
        try:
            life = await self._store.expiry.read_life(place.session_id)
            is_there = life.incarnation == place.incarnation
            if is_there and not await is_rewound(self._store, place.session_id, source.loaded):
                await self._store.deletion.delete_matching(copy.session_id, removed)
        except MongoDBSessionError as error:
            logger.warning(
                "session_id=<%r>, error=<%s> | the session was not rewound, and its copy was not removed",
                copy.session_id,
                error,
            )


class _Rewind:
    """One rewind of a session; `ends` are the last message ids that stay."""

    def __init__(
        self, store: SessionStore, session_id: str, ends: int | dict[str, int], owner: str | None = None
    ) -> None:
        self._store = store
        self._session_id = session_id
        self._owner = owner
        self._ends = ends
        self._id = ObjectId()
        self.source: Source
        self._cuts: list[Cut] = []
        self._content: set[str | None] = set()  # the block ids in the keys of the storage

    async def read(self) -> bool:
        """Read the session and compute its cuts.

        Returns:
            `False` if the session is already rewound, by a statement whose acknowledgement was lost.

        Raises:
            SessionBusyError: A manager holds the lease.
        """
        for _ in range(ROUNDS):
            self.source = source = await read_copyable(self._store, self._session_id, self._owner)
            if any(agent.get("rewound") == self._id for agent in source.agents.values()):
                return False
            self._store.expiry.learn(self._session_id, source.document)
            lease = StoredLease.of(source.document)
            if lease.until is not None and lease.until > self._store.connection.now():
                raise SessionBusyError(f"session {self._session_id!r} is busy: a manager has its turn")
            ends = ends_of(self._session_id, self._ends, map(agent_id_of, source.agents))
            if source.document.get(HAS_CONTENT) is True:
                self._content = set(map(block_id_of, await self._store.content.keys(source.place, "")))
            try:
                self._cuts = [await self._cut(agent_key(agent_id), last) for agent_id, last in ends.items()]
            except ReadAgainError:
                continue
            return True
        raise self._changed_too_often()

    async def store(self, *, is_copied: bool = False) -> None:
        """Rewind the session if no message was appended since it was read or, with `is_copied`, changed.

        Raises:
            SessionConflictError: Another writer has appended a message, or rewound the session.
        """
        for _ in range(ROUNDS):
            before, place = self._cuts, self.source.place
            update = compile_rewind(place, self.source.document, before, self._id, self._store.connection.now())
            try:
                stored = await self._store.expiry.update(update, _with_removed)
            except MessageTooLargeError as error:
                if not await self._store.mover.make_room(self._session_id, error):
                    raise
                stored = None
            if stored is not None:
                await self._remove(stored.get(REMOVED))
                return
            if not await self.read():
                await self._remove(self.source.document.get(REMOVED))
                return
            self._check_unchanged(place, before, is_copied)
        raise self._changed_too_often()

    def _check_unchanged(self, place: Place, before: list[Cut], is_copied: bool) -> None:
        if self.source.place != place:
            raise SessionNotFoundError(f"session {self._session_id!r} no longer exists")
        for old, new in zip(before, self._cuts, strict=True):
            if old.identity != new.identity or (is_copied and old.content != new.content):
                raise SessionConflictError(
                    f"agent {agent_id_of(old.key)!r}: another writer changed its conversation during the call, so "
                    f"session {self._session_id!r} was not rewound; read it again and repeat the request"
                )

    async def _cut(self, key: str, last: int) -> Cut:
        """Return the cut of an agent.

        Raises:
            MessageNotFoundError: The agent has no message with the id `last`.
            ReadAgainError: The archived messages were moved elsewhere after the session was read.
        """
        stored = self.source.agents[key]
        head, archived = stored.get("messages") or [], number(stored, "archived")
        ids, following = list(map(stored_id, head)), stored["next_message_id"]
        is_regular = following == archived + len(head)
        if last in ids:
            kept = archived + ids.index(last) + 1
        elif not -1 <= last < following:
            raise no_message(agent_id_of(key), last)
        elif archived and not (is_regular and last == archived - 1):
            return await self._cut_archive(key, last)
        elif last == -1 or archived:
            kept = archived
        else:
            raise no_message(agent_id_of(key), last)
        removed = head[kept - archived :]
        usage = await asyncio.to_thread(usage_of, removed)
        block_ids = self._content_of(removed, head[: kept - archived])
        return Cut(key, stored, last, kept, usage, _references(removed), block_ids)

    def _content_of(self, removed: list[Any], kept: list[Any]) -> list[str]:
        return sorted((all_block_ids(removed) - all_block_ids(kept)) & self._content)

    async def _cut_archive(self, key: str, last: int) -> Cut:
        stored, place, archive = self.source.agents[key], self.source.place, self._store.archive
        since, archived = stored.get("created_at"), number(stored, "archived")
        kept, returned, first, removed = 0, [], 0, list(stored.get("messages") or [])
        listed: list[Any] = []
        revision = number(stored, "revision")
        if last != -1:
            bucket = await archive.find_bucket(place, key, last, since, archived)
            if bucket is None:
                await archive.raise_if_moved(place, {key: (since, 0, archived)})
                raise no_message(agent_id_of(key), last)
            position = list(map(stored_id, bucket["messages"])).index(last) + 1
            first, returned = int(bucket["_id"]["first"]), bucket["messages"][:position]
            kept = first + position
            removed += bucket["messages"][position:]
            listed += bucket.get(REMOVED) or []
            revision = max(revision, number(bucket, "revision"))
        begin, end = (place.bucket_id(key, at, since) for at in (first + bool(returned), ALL))
        for bucket in await archive.collection.find({"_id": {"$gte": begin, "$lte": end}}, _REMOVED_BUCKET):
            if bucket["_id"]["first"] < archived:
                removed += bucket["messages"]
            listed += bucket.get(REMOVED) or []
            revision = max(revision, number(bucket, "revision"))
        usage = await asyncio.to_thread(usage_of, removed)
        references = [*_references(removed), *map(str, references_of({"attachments": listed}))]
        block_ids = self._content_of(removed, returned)
        return Cut(key, stored, last, kept, usage, references, block_ids, returned, revision)

    async def _remove(self, listed: Any) -> None:
        """Remove the buckets, attachments and content of removed messages; log a failure."""
        place, mover = self.source.place, self._store.mover
        for cut in self._cuts:
            mover.forget(self._session_id, cut.key)
        try:
            for cut in self._cuts:
                if cut.stale_below:
                    since = cut.stored.get("created_at")
                    head = Head(since=since, archived=cut.archived, stale_below=cut.stale_below)
                    await mover.remove_stale(place, cut.key, head)
            if isinstance(listed, list) and listed:
                await self._store.attachments.remove_removed(place, listed)
            if block_ids := {each for cut in self._cuts for each in cut.block_ids}:
                await self._store.content.remove(place, block_ids)
                own = {"_id": place.session_id, "incarnation": place.incarnation}
                await self._store.sessions.update(Update(own, without_removed_content(sorted(block_ids)), None))
        except MongoDBSessionError as error:
            logger.warning(
                "session_id=<%r>, error=<%s> | removed messages and attachments were not deleted after a rewind; the "
                "next opening tries again",
                self._session_id,
                error,
            )

    def _changed_too_often(self) -> DatabaseError:
        return DatabaseError(f"session {self._session_id!r} kept changing while it was rewound: try again later")


def _references(messages: list[Any]) -> list[str]:
    return [str(reference) for message in messages for reference in references_of(message)]


async def _with_removed(collection: AsyncCollection, update: Update) -> Document | None:
    return await find_and_modify(collection, update.filter, update.update, {REMOVED: 1})
