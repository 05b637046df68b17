"""Moving the old messages of a long conversation into the archive, and reading and changing them there.

`_buckets` describes the layout and the order of the statements. A move runs in the background. A turn waits for one
bucket only if the session document has no room for the next message, or a head is at twice its limits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from .._format.attachment_refs import references_of
from .._format.buckets import (
    MERGE_REFUSED,
    NUMBERS_OF_ALL,
    Head,
    Limits,
    Step,
    change_in_bucket,
    cut,
    everything,
    holding_message,
    holding_positions,
    merge,
    numbers_of,
    outrun,
    stale_buckets,
)
from .._format.changes import REMOVED, AgentWrite, Update
from .._format.documents import Document, removed_messages
from .._format.ids import agent_key
from .._format.layout import ARCHIVE, Place
from .._format.retention import LIFE, Life
from .._format.sizes import MAX_DOCUMENT_BYTES, PART_SIZES, size_of, stored_size, too_large
from .._io.connection import AsyncCollection, find_and_modify, run_pipeline
from .._io.driver_errors import DuplicateKeyError
from ..errors import DatabaseError, MessageTooLargeError, MongoDBSessionError, StateTooLargeError, raise_alone
from .attachments import Attachments, parsed
from .migration import SessionMigration

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TRIES = 8
"""A move is left to the next append after another writer has changed the head this often."""

_KNOWN_HEADS = 4096


class WrittenBackError(Exception):
    """Archived messages are in the session document again since that was read."""


class SessionArchive(SessionMigration):
    """The base class of the repository that keeps the session documents small."""

    _attachments: Attachments
    _limits: Limits
    _archive_name: str
    _heads: dict[tuple[str, str], Head]

    # Starting a move.

    def _head(self, session_id: str, key: str) -> Head:
        """Return the known state of a head, from a cache that evicts the least recently used."""
        head = self._heads.pop((session_id, key), None) or Head()
        self._heads[session_id, key] = head
        if len(self._heads) > _KNOWN_HEADS:
            del self._heads[next(iter(self._heads))]
        return head

    def _written(self, session_id: str, writes: Iterable[AgentWrite]) -> None:
        """Update the known heads after a write, and start moves for those that exceed their limits."""
        for write in writes:
            key = agent_key(write.agent_id)
            head = self._head(session_id, key)
            if write.created is not None:
                empty = dict.fromkeys(("archived", "revision", "next_message_id", "count", "bytes", "removed"), 0)
                head.learn({**empty, "created_at": write.created["created_at"]})
                head.life = self._lives.get(session_id, Life())
                head.certain = head.life.incarnation is not None
            if "conversation_manager_state" in write.data:
                head.removed = removed_messages({"agent_data": write.data})
            if write.replaced:
                head.revision += 1
                head.certain = False
            if write.appended:
                head.next_id = max(head.next_id, write.appended[-1]["message_id"] + 1)
                head.size += sum(stored_size(message) for message in write.appended)
                if not head.learned or self._limits.exceeded(head):
                    self._start_move(session_id, key, head)

    def _start_move(self, session_id: str, key: str, head: Head) -> None:
        loop = asyncio.get_running_loop()
        if not self._is_moving(head):
            head.moving = loop.create_future()
            self._connection.start(self._move_old(session_id, key, head))

    @staticmethod
    def _is_moving(head: Head) -> bool:
        # After a fork of the process, the moves of the parent do not run in the child.
        return head.moving is not None and head.moving.get_loop() is asyncio.get_running_loop()

    async def _let_move(self, session_id: str, writes: Iterable[AgentWrite]) -> None:
        """Wait for the bucket that is being moved if a head is at twice its limits: the writer is too fast."""
        for write in writes:
            head = self._heads.get((session_id, agent_key(write.agent_id)))
            if head is not None and write.appended and self._is_moving(head) and self._limits.exceeded(head, 2):
                await asyncio.wait({head.moving})

    # Moving.

    async def _move_old(self, session_id: str, key: str, head: Head) -> None:
        """Move messages until the head is within its limits; after a failure, the next append tries again."""
        tries = 0
        try:
            while tries < _TRIES:
                if not head.certain and not await self._ask_head(session_id, key, head):
                    return
                if head.life.incarnation is None:
                    await self._migrate(session_id)
                    head.certain = False
                    continue
                if not self._limits.exceeded(head):
                    return
                if not await self._move(session_id, key, head, self._limits.step(head)):
                    tries += 1
                head.moving.set_result(None)
                head.moving = asyncio.get_running_loop().create_future()
        except MongoDBSessionError as error:
            head.certain = False
            logger.warning(
                "session_id=<%r>, error=<%s> | old messages not moved, the next append tries again", session_id, error
            )
        finally:
            head.moving.set_result(None)
            head.moving = None

    async def _move(self, session_id: str, key: str, head: Head, step: Step) -> bool:
        """Move one bucket; return `False`, with nothing moved, if the head has changed.

        If the document of a session of 1.0.0 has no room for its migration, the bucket gets an id of 1.0.0.
        """
        place = Place(session_id, head.life.incarnation)
        if head.stale_below:
            await self._remove_stale(place, key, head.since, head.stale_below)
            head.certain = False
            return False
        as_known = replace(head)  # an append during the move must not change the second statement
        dates = self._dates(head.life)
        pipeline = merge(session_id, key, as_known, step, self._archive_name, dates)
        try:
            await self._send(lambda collection: run_pipeline(collection, pipeline))
        except DuplicateKeyError:
            head.certain = False  # another process made the same bucket at the same time
            return False
        except DatabaseError as error:
            if error.code != MERGE_REFUSED:
                raise
            await self._outrun(session_id, key, as_known)
            head.certain = False
            return False
        update = cut(session_id, key, as_known, step, dates)
        numbers = await self._send(
            lambda collection: find_and_modify(collection, update.filter, update.update, numbers_of(key))
        )
        if numbers is None:
            head.certain = False
            await self._remove_orphan(place, key, as_known)
            return False
        newest = head.next_id
        head.learn(numbers["head"])
        head.next_id = max(head.next_id, newest)  # an append that came later may have been acknowledged earlier
        return True

    async def _remove_orphan(self, place: Place, key: str, head: Head) -> None:
        """Remove a bucket if its session was deleted or written back before the bucket became a part of it."""
        fields = {"incarnation": 1, f"agents.{key}.archived": 1}
        document = await self._find(place.session_id, fields) or {}
        agent = (document.get("agents") or {}).get(key) or {}
        is_there = document.get("incarnation") == place.incarnation
        if not is_there or (agent.get("archived") or 0) < head.archived:
            bucket = {"_id": place.bucket_id(key, head.archived, head.since)}
            await self._remove_some(ARCHIVE, {**bucket, "revision": {"$lte": head.revision}} if is_there else bucket)

    async def _remove_stale(self, place: Place, key: str, since: Any, below: int) -> None:
        """Remove the buckets that a write-back has left behind, and then let messages move again."""
        for each in {place, Place(place.session_id, None)}:  # 1.0.0 may have begun the write-back
            await self._remove_some(ARCHIVE, stale_buckets(each, key, since, below))
        path = f"agents.{key}"
        condition = {"_id": place.session_id, f"{path}.created_at": since, f"{path}.stale_below": below}
        await self._update(Update(condition, {"$unset": {f"{path}.stale_below": ""}}, None))

    async def _ask_head(self, session_id: str, key: str, head: Head) -> bool:
        """Read the numbers of a head; return `False` if it is gone."""
        document = await self._send(lambda collection: collection.find_one({"_id": session_id}, numbers_of(key)))
        if document is None or document["head"] is None:
            return False
        head.learn(document["head"])
        return True

    async def _outrun(self, session_id: str, key: str, head: Head) -> None:
        """Raise the head's revision, so that the next `merge` can replace a bucket that this one must not replace."""
        place = Place(session_id, head.life.incarnation)
        bucket = await self._find_bucket({"_id": place.bucket_id(key, head.archived, head.since)}, {"revision": 1})
        await self._update(outrun(session_id, key, head, 0 if bucket is None else int(bucket["revision"])))

    async def _update_with_room(self, session_id: str, update: Update) -> bool:
        """Send an update of a session; make room if its document has none."""
        return await self._with_room(session_id, lambda: self._update(update))

    async def _store_part(self, session_id: str, part: str, value: Any, send: Callable[[], Awaitable[T]]) -> T:
        """Send an update that stores a part of a session other than a message; make room for it if necessary.

        Args:
            session_id: The session.
            part: The name of the part in errors.
            value: The encoded part.
            send: Sends the update.

        Raises:
            StateTooLargeError: There is no room.
        """
        try:
            return await self._with_room(session_id, send)
        except MessageTooLargeError as error:
            refusal = error
        raise await self._too_large(session_id, part, value, refusal)

    async def _too_large(
        self, session_id: str, part: str, value: Any, refusal: MessageTooLargeError
    ) -> StateTooLargeError:
        """Return the error for a refused part; query the server for the sizes of the parts that are stored."""
        size = size_of(value)
        document = None
        if size < MAX_DOCUMENT_BYTES:
            document = await self._send(lambda collection: collection.find_one({"_id": session_id}, PART_SIZES))
        error = too_large(session_id, part, size, document or {})
        error.code, error.code_name, error.operation = refusal.code, refusal.code_name, refusal.operation
        return error

    async def _with_room(self, session_id: str, send: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await send()
            except MessageTooLargeError as error:
                if error.code is None or not await self._make_room(session_id):
                    raise

    async def _make_room(self, session_id: str) -> bool:
        """Move messages of the agent with the largest head in the session document; return `False` if all are empty."""
        for _ in range(_TRIES):
            document = await self._send(lambda collection: collection.find_one({"_id": session_id}, NUMBERS_OF_ALL))
            heads: list[Document] = [] if document is None else document["heads"]
            numbers = max((head for head in heads if head["count"]), key=lambda head: head["bytes"], default=None)
            if numbers is None:
                return False
            head = self._head(session_id, numbers["key"])
            if self._is_moving(head):
                await asyncio.wait({head.moving})
                return True
            head.learn(numbers)
            if await self._move(session_id, numbers["key"], head, everything(head)):
                return True
        return False

    # Reading and changing archived messages.

    async def _archived(self, place: Place, wanted: Mapping[str, tuple[Any, int, int]]) -> dict[str, list[Document]]:
        """Return archived messages without their metrics, oldest first, from one query.

        Args:
            place: The session.
            wanted: By agent key: the agent's `created_at`, the first position, and the position after the last.

        Raises:
            DatabaseError: A message is missing.
            WrittenBackError: The session was written back meanwhile.
        """
        found = await self._buckets(place, wanted)
        try:
            return {key: _joined(place.session_id, found[key], begin, end) for key, (_, begin, end) in wanted.items()}
        except DatabaseError:
            await self._raise_if_written_back(place, wanted)
            raise

    async def _buckets(self, place: Place, wanted: Mapping[str, tuple[Any, int, int]]) -> dict[str, list[Document]]:
        """Return the buckets that hold archived messages, oldest first, from one query; `wanted` as for `_archived`."""
        found: dict[str, dict[int, Document]] = {key: {} for key in wanted}
        condition = {"$or": [holding_positions(place, key, *which) for key, which in wanted.items()]}

        async def read(archive: AsyncCollection) -> None:
            async for bucket in archive.find(condition, {"messages.event_loop_metrics": 0}):
                found[bucket["_id"]["agent"]][bucket["_id"]["first"]] = bucket

        await self._send(read, self._archive_name)
        return {key: [buckets[first] for first in sorted(buckets)] for key, buckets in found.items()}

    async def _raise_if_written_back(self, place: Place, wanted: Mapping[str, tuple[Any, int, int]]) -> None:
        """Raise `WrittenBackError` if archived messages were moved elsewhere after the session was read."""
        if await self._has_moved(place):
            raise_alone(WrittenBackError())
        for key, (since, _, end) in wanted.items():
            if await self._is_back(place.session_id, key, since, end):
                raise_alone(WrittenBackError())

    async def _has_moved(self, place: Place) -> bool:
        """Return whether missing buckets can be found if the session is read again.

        The session was migrated, deleted or created again, or 1.0.0 stored the buckets.
        """
        session = await self._find(place.session_id, LIFE)
        if session is None or Life.of(session).incarnation != place.incarnation:
            return True
        return place.incarnation is not None and await self._copy_late_buckets(place)

    async def _is_back(self, session_id: str, key: str, since: Any, archived: int) -> bool:
        """Return whether messages below a position are in the session document again; `False` without the agent."""
        path = f"agents.{key}"
        lower = {f"{path}.created_at": since, f"{path}.archived": {"$not": {"$gte": archived}}}
        condition = {"_id": session_id, path: {"$exists": True}, **lower}
        return await self._send(lambda collection: collection.find_one(condition, {"_id": 1})) is not None

    async def _stored_message(
        self, session_id: str, agent_id: str, message_id: Any, created_at: Any = None
    ) -> Document | None:
        """Return a message of the head or the archive, `None` if the agent has no message with that id.

        `created_at` is the message's, if it is known.
        """
        key = agent_key(agent_id)
        path = f"agents.{key}.messages"
        wanted = {name: f"$agents.{key}.{name}" for name in ("archived", "created_at")} | {
            "incarnation": "$incarnation"
        }
        meant = {"message_id": message_id} | ({} if created_at is None else {"created_at": created_at})
        condition = {"_id": session_id, path: {"$elemMatch": meant}}
        while True:
            document = await self._send(lambda collection: collection.find_one(condition, {f"{path}.$": 1}))
            if document is not None:
                message: Document = document["agents"][key]["messages"][0]
                return message
            stored = await self._stored_agent(session_id, agent_id, wanted)
            if not (archived := stored.get("archived")):
                return None
            since, place = stored.get("created_at"), Place(session_id, Life.of(stored).incarnation)
            found = await self._archived_message(place, key, message_id, since, created_at)
            if found is not None:
                return found
            if not await self._has_moved(place) and not await self._is_back(session_id, key, since, archived):
                return None

    async def _place_of(self, session_id: str, message: Document) -> Place:
        """Return the place of the attachments of a message; without attachments, no command is sent."""
        if not references_of(message):
            return Place(session_id, None)
        return Place(session_id, Life.of(await self._found(session_id, LIFE)).incarnation)

    async def _bucket_at(self, place: Place, key: str, since: Any, begin: int, end: int) -> list[Document]:
        """Return the messages from position `begin` to the end of the bucket that holds it, or to below `end`.

        Raises:
            DatabaseError: No bucket holds it.
        """
        condition = holding_positions(place, key, since, begin, end)
        buckets = await self._send(
            lambda archive: archive.find(condition, sort=[("_id", 1)], limit=1).to_list(), self._archive_name
        )
        reach = min(end, begin + 1 if not buckets else int(buckets[0]["last"]) + 1)
        return _joined(place.session_id, buckets, begin, reach)

    async def _archived_message(
        self, place: Place, key: str, message_id: int, since: Any, created_at: Any = None
    ) -> Document | None:
        """Return a message of an agent that was created at `since`, `None` if no bucket holds it.

        `created_at` is the message's, if it is known.
        """
        head = replace(self._head(place.session_id, key), since=since)
        for condition in holding_message(place, key, message_id, head, created_at):
            bucket = await self._find_bucket(condition, {"messages.$": 1})
            if bucket is not None:
                message: Document = bucket["messages"][0]
                return message
        return None

    async def _change_archived(
        self, place: Place, key: str, message_id: int, fields: Document, created_at: Any = None
    ) -> None:
        """Set fields of a message in the bucket that holds it, if one does; remove its old attachments."""
        head = self._head(place.session_id, key)
        if not head.learned and not await self._ask_head(place.session_id, key, head):
            return
        for condition in holding_message(place, key, message_id, head, created_at):
            changed = await self._send(
                partial(_change_bucket, change_in_bucket(condition, message_id, fields, created_at)), self._archive_name
            )
            if changed is not None:
                if listed := changed.get(REMOVED):
                    await self._attachments.remove_unnamed(place, parsed(listed))
                    taken = ({"_id": changed["_id"]}, {"$pullAll": {REMOVED: listed}})
                    await self._send(partial(_update_one, *taken), self._archive_name)
                return

    async def _find_bucket(self, condition: Document, projection: Document) -> Document | None:
        return await self._send(lambda archive: archive.find_one(condition, projection), self._archive_name)

    def _copies(self, session_id: str, write: AgentWrite) -> dict[tuple[int, Any], Document]:
        """Return the replacements in a head whose old content a left-over bucket can hold.

        No bucket holds the newest message, unless it alone exceeds the limits and made room for the next one. So only a
        replacement of such a message, or of an older one, must check the archive.
        """
        head = self._heads.get((session_id, agent_key(write.agent_id)))
        following = write.expected_id if write.expected_id is not None else head and head.next_id
        created = {n: identity.created_at for n, identity in write.identities.items() if not write.by_id}
        return {
            (message_id, created.get(message_id)): fields
            for message_id, fields in write.replaced.items()
            if "message" in fields and (message_id + 1 != following or head is None or head.size > self._limits.size)
        }


async def _change_bucket(change: Update, archive: AsyncCollection) -> Document | None:
    return await find_and_modify(archive, change.filter, change.update, {REMOVED: 1})


async def _update_one(condition: Document, update: Document, archive: AsyncCollection) -> None:
    await archive.update_one(condition, update)


def _joined(session_id: str, buckets: Iterable[Document], begin: int, end: int) -> list[Document]:
    """Return the messages at positions from `begin` to below `end`, of which none may be missing."""
    messages: list[Any] = []
    for bucket in buckets:
        first = bucket["_id"]["first"]
        if first > begin + len(messages):
            break
        messages += bucket["messages"][begin + len(messages) - first : end - first]
    if len(messages) < end - begin:
        raise DatabaseError(f"session {session_id!r}: message {begin + len(messages)} is missing in its archive")
    return messages


def present(buckets: Iterable[Document], begin: int, end: int) -> list[Document]:
    """Return the messages at positions from `begin` to below `end`, without those that are missing."""
    messages: list[Document] = []
    for bucket in buckets:
        first = bucket["_id"]["first"]
        messages += bucket["messages"][max(begin - first, 0) : max(end - first, 0)]
        begin = max(begin, first + len(bucket["messages"]))
    return messages
