"""`Mover`: moves the old messages of a long conversation into the archive, and frees space in session documents.

`_format.buckets` describes the layout and the order of the statements. A move runs in the background. A turn waits for
one bucket only if the session document has no room for the next message, or a head is at twice its limits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .._format import buckets
from .._format.bounded import Bounded
from .._format.buckets import Head, Limits, Step
from .._format.changes import AgentWrite
from .._format.documents import Document, number, removed_messages
from .._format.ids import agent_key
from .._format.layout import ARCHIVE, Place
from .._format.retention import Life
from .._format.statements import Update
from .._io.driver_errors import DuplicateKeyError
from .._io.drivers import find_and_modify
from ..errors import DatabaseError, MessageTooLargeError, MongoDBSessionError
from .expiry import Expiry
from .sessions import Sessions

logger = logging.getLogger(__name__)

_TRIES = 8
"""A move is left to the next append after another writer has changed the head this often."""

_KNOWN_HEADS = 4096


class Mover:
    """The heads of the agents, and one task for each head that is above its limits."""

    def __init__(self, sessions: Sessions, expiry: Expiry, limits: Limits) -> None:
        self.limits = limits
        self._sessions = sessions
        self._collection = sessions.collection
        self._archive = sessions.collection.part(ARCHIVE)
        self._connection = sessions.connection
        self._expiry = expiry
        self._heads: Bounded[tuple[str, str], Head] = Bounded(_KNOWN_HEADS)
        self._moves: dict[tuple[str, str], asyncio.Future[None]] = {}
        """By head, a future that is done when the bucket that is being moved is."""
        self._appended: set[tuple[str, str]] = set()
        """The heads that are being moved, and that a later append has made too large."""

    # Known heads.

    def head(self, session_id: str, key: str) -> Head | None:
        return self._heads.get((session_id, key))

    def learn(self, session_id: str, key: str, numbers: Mapping[str, Any]) -> Head:
        self._heads[session_id, key] = head = Head.of(numbers)
        return head

    def change(self, session_id: str, key: str, **changes: Any) -> None:
        if (head := self.head(session_id, key)) is not None:
            self._heads[session_id, key] = replace(head, **changes)

    def forget(self, session_id: str, key: str) -> None:
        self._heads.pop((session_id, key), None)

    async def read_head(self, session_id: str, key: str) -> Head | None:
        document = await self._collection.find_one({"_id": session_id}, buckets.numbers_of(key))
        return None if document is None or document["head"] is None else self.learn(session_id, key, document["head"])

    # Starting a move.

    def written(self, session_id: str, writes: Iterable[AgentWrite]) -> None:
        """Update the known heads after a write, and start moves for those that exceed their limits."""
        for write in writes:
            key, appended = agent_key(write.agent_id), write.appended
            head = self.head(session_id, key)
            if head is not None and head.life.incarnation not in (None, write.incarnation):
                self.forget(session_id, key)  # of an earlier session with the same id
                head = None
            if write.created is not None:
                life = self._expiry.known(session_id) or Life()
                certain = life.incarnation is not None
                head = Head(since=write.created["created_at"], life=life, certain=certain)
            if head is not None:
                head = replace(head, **_changes(head, write, appended))
                self._heads[session_id, key] = head
            if appended and (head is None or self.limits.exceeded(head)):
                self._start(session_id, key)

    def _start(self, session_id: str, key: str) -> None:
        if self._current(session_id, key) is not None:
            self._appended.add((session_id, key))
        else:
            self._moves[session_id, key] = asyncio.get_running_loop().create_future()
            self._connection.start(self._move_all(session_id, key))

    def _current(self, session_id: str, key: str) -> asyncio.Future[None] | None:
        move = self._moves.get((session_id, key))
        # After a fork of the process, the moves of the parent do not run in the child.
        return move if move is not None and move.get_loop() is asyncio.get_running_loop() else None

    async def slow_down(self, session_id: str, writes: Iterable[AgentWrite]) -> None:
        """Wait for the bucket that is being moved if a head is at twice its limits: the writer is too fast."""
        for write in writes if self._moves else ():
            key = agent_key(write.agent_id)
            head, move = self.head(session_id, key), self._current(session_id, key)
            if head is not None and move is not None and write.appended and self.limits.exceeded(head, 2):
                await asyncio.wait({move})

    # Moving.

    async def _move_all(self, session_id: str, key: str) -> None:
        """Move messages until the head is within its limits; after a failure, the next append tries again."""
        which, tries = (session_id, key), 0
        try:
            while tries < _TRIES:
                self._appended.discard(which)
                head = self.head(*which)
                if head is None or not head.certain:
                    head = await self.read_head(*which)
                if head is None:
                    return
                if head.life.incarnation is None:
                    await self._expiry.read_life(session_id)  # migrates the session
                    self.change(*which, certain=False)
                    continue
                if not self.limits.exceeded(head):
                    if which not in self._appended:
                        return
                    self.change(*which, certain=False)  # it can have been read before the append
                    continue
                if not await self._move(session_id, key, head, self.limits.step(head)):
                    tries += 1
                self._moves[which].set_result(None)
                self._moves[which] = asyncio.get_running_loop().create_future()
        except MongoDBSessionError as error:
            self.change(*which, certain=False)
            logger.warning(
                "session_id=<%r>, error=<%s> | old messages not moved, the next append tries again", session_id, error
            )
        finally:
            self._appended.discard(which)
            self._moves.pop(which).set_result(None)

    async def _move(self, session_id: str, key: str, head: Head, step: Step) -> bool:
        """Move one bucket; return `False`, with nothing moved, if the head has changed.

        If the document of a session of 1.0.0 has no room for its migration, the bucket still gets an id of 1.0.0.
        """
        place = Place(session_id, head.life.incarnation)
        if await self._move_bucket(place, key, head, step):
            return True
        self.change(session_id, key, certain=False)
        return False

    async def _move_bucket(self, place: Place, key: str, head: Head, step: Step) -> bool:
        session_id = place.session_id
        if head.stale_below:
            await self.remove_stale(place, key, head)
            return False
        dates = self._expiry.dates(head.life)
        try:
            await self._collection.aggregate(buckets.merge(session_id, key, head, step, self._archive.name, dates))
        except DuplicateKeyError:
            return False  # another process created the same bucket concurrently
        except DatabaseError as error:
            if error.code != buckets.MERGE_REFUSED:
                raise
            await self._outrun(place, key, head)
            return False
        update = buckets.cut(session_id, key, head, step, dates)
        numbers = await self._collection.send(
            lambda sessions: find_and_modify(sessions, update.filter, update.update, buckets.numbers_of(key))
        )
        if numbers is None:
            await self.remove_orphan(place, key, head)
            return False
        known = self.head(session_id, key) or head
        new = self.learn(session_id, key, numbers["head"])
        # A later append might have been acknowledged earlier.
        self.change(session_id, key, next_id=max(new.next_id, known.next_id))
        return True

    async def remove_orphan(self, place: Place, key: str, head: Head) -> None:
        """Remove a bucket if its session was deleted, written back or rewound before the bucket became a part of it.

        No later `cut` uses it: the head has a higher revision, or `archived` is lower.
        """
        fields = {"incarnation": 1, **{f"agents.{key}.{name}": 1 for name in ("archived", "revision")}}
        document = await self._sessions.find(place.session_id, fields) or {}
        agent = (document.get("agents") or {}).get(key) or {}
        archived, revision = number(agent, "archived"), number(agent, "revision")
        is_there = document.get("incarnation") == place.incarnation
        if not is_there or archived < head.archived or (archived == head.archived and revision > head.revision):
            bucket = {"_id": place.bucket_id(key, head.archived, head.since)}
            await self._archive.delete_many({**bucket, "revision": {"$lte": head.revision}} if is_there else bucket)

    async def remove_stale(self, place: Place, key: str, head: Head) -> None:
        """Remove the buckets that a write-back or a rewind has left behind, and re-enable moves."""
        since, below = head.since, head.stale_below
        for each in {place, Place(place.session_id, None)}:  # 1.0.0 might have begun the write-back
            await self._archive.delete_many(buckets.stale_buckets(each, key, since, head.archived, below))
        path = f"agents.{key}"
        condition = {"_id": place.session_id, f"{path}.created_at": since, f"{path}.stale_below": below}
        await self._sessions.update(Update(condition, {"$unset": {f"{path}.stale_below": ""}}, None))

    async def _outrun(self, place: Place, key: str, head: Head) -> None:
        """Raise the head's revision, so that the next `merge` can replace a bucket that this one must not replace."""
        bucket = await self._archive.find_one({"_id": place.bucket_id(key, head.archived, head.since)}, {"revision": 1})
        revision = 0 if bucket is None else int(bucket["revision"])
        await self._sessions.update(buckets.outrun(place.session_id, key, head, revision))

    # Making room.

    async def update_with_room(self, update: Update) -> bool:
        while True:
            try:
                return await self._sessions.update(update)
            except MessageTooLargeError as error:
                if not await self.make_room(update.filter["_id"], error):
                    raise

    async def make_room(self, session_id: str, refusal: MessageTooLargeError) -> bool:
        """Move messages of the agent with the largest head in the session document.

        Return whether the statement that was refused can be sent again: the server refused it, and a message moved.
        """
        if refusal.code is None:
            return False
        for _ in range(_TRIES):
            document = await self._collection.find_one({"_id": session_id}, buckets.NUMBERS_OF_ALL)
            heads: list[Document] = [] if document is None else document["heads"]
            numbers = max((head for head in heads if head["count"]), key=lambda head: head["bytes"], default=None)
            if numbers is None:
                return False
            key = numbers["key"]
            if (move := self._current(session_id, key)) is not None:
                await asyncio.wait({move})
                return True
            head = self.learn(session_id, key, numbers)
            if await self._move(session_id, key, head, buckets.everything(head)):
                return True
        return False


def _changes(head: Head, write: AgentWrite, appended: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of a head that a write has changed; `appended` are its new messages."""
    changes: dict[str, Any] = {}
    if "conversation_manager_state" in write.data:
        changes["removed"] = removed_messages({"agent_data": write.data})
    if write.view:
        changes["removed"] = write.view["after"]
    if write.replaced:
        changes |= {"revision": head.revision + 1, "certain": False}
    if appended:
        next_id = max(head.next_id, appended[-1]["message_id"] + 1)
        changes |= {"next_id": next_id, "size": head.size + write.appended_size}
    return changes
