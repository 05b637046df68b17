"""Staging: an import or a fork fills a session that stays invisible until it is complete.

A copy begins with its session document, which has a new `incarnation` and the state "copying", see `_store.deletion`.
While the document exists, no other copy into the same id can begin. The archive and the attachments of the incarnation
follow. One update then makes the session live, and matches only the state that the copy itself has stored. So a copy is
either live or has a document in the state "copying". A copy that fails removes that document and its parts; after the
end of the lease, any process can remove them.

The parts of a copy have no dates until immediately before it becomes live.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import datetime, timedelta

from bson import ObjectId

from .._format.documents import Document
from .._format.labels import labels_of
from .._format.layout import LIVE, Place
from .._format.retention import next_date
from .._io.driver_errors import DuplicateKeyError
from .._store.deletion import LEASE
from .._store.store import SessionStore
from ..errors import DatabaseError, MongoDBSessionError, SessionConflictError, SessionExistsError, raise_alone

logger = logging.getLogger(__name__)

_ROUNDS = 16
"""The number of attempts of a copy while a session with the same id is created and deleted."""

_not_removed: set[Place] = set()
"""The copies of this process that could not be removed; a new copy into the same id removes them at once."""


class Staging:
    """The copy of one import or fork, until it is live; `place` is that of its archive and attachments."""

    def __init__(self, store: SessionStore, session_id: str) -> None:
        self.place = Place(session_id, ObjectId())
        self._store = store
        self._sessions = store.collection
        self._has_begun = False
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def session_id(self) -> str:
        return self.place.session_id

    @property
    def own(self) -> Document:
        return _own(self.place)

    def lease(self) -> datetime:
        return self._store.connection.now() + LEASE

    # Begin, and end.

    async def begin(self, owner: str | None = None) -> None:
        """Insert the document of the copy, and start to renew its lease; raise `SessionExistsError` if it cannot."""
        document = {**self.own, "session_id": self.session_id, **labels_of(owner), "state_until": self.lease()}
        for _ in range(_ROUNDS):
            try:
                self._has_begun = True
                await self._sessions.insert_one(document)
                break
            except DuplicateKeyError:  # this document can already exist: an acknowledgement was lost
                if await self._find(self.own) is not None:
                    break
            self._has_begun = False
            try:
                for left in [place for place in _not_removed if place.session_id == self.session_id]:
                    await self._store.deletion.delete_matching(self.session_id, _own(left))
                    _not_removed.discard(left)
                await self._store.deletion.free_id(self.session_id)
            except SessionConflictError:
                raise_alone(SessionExistsError(f"session {self.session_id!r} is being imported or forked already"))
        else:
            raise DatabaseError(f"session {self.session_id!r} was repeatedly created and deleted")
        self._heartbeat = asyncio.get_running_loop().create_task(self._renew())

    async def _renew(self) -> None:
        renewed = True
        while renewed:
            await asyncio.sleep(LEASE.total_seconds() / 2)
            with suppress(MongoDBSessionError):  # the next time is before the end of the lease, or soon after
                renewed = await self.update({"$set": {"state_until": self.lease()}})

    async def update(self, update: Document | list[Document]) -> bool:
        return await self._sessions.update_one(self.own, update)

    async def fill(self, update: Document | list[Document]) -> None:
        """Store fields of the session; raise `SessionConflictError` if another process has removed the copy."""
        if not await self.update(update):
            raise self.lost()

    async def _find(self, condition: Document, projection: Document | None = None) -> Document | None:
        return await self._sessions.find_one(condition, projection or {"_id": 1})

    async def date(self, seconds: int | None) -> Document:
        """Set `expires_at` of all parts; return the fields `time_to_live` and `expires_at` of the session.

        When this returns, the session expires no earlier than after its time to live. If setting the dates takes longer
        than the margin of `next_date`, they are set again.
        """
        if seconds is None:
            return {}
        self._store.expiry.ensure_indexes()
        clock, more = self._store.connection.now, timedelta()
        while True:
            begin = clock()
            until = next_date(begin, seconds) + more
            await self._store.expiry.date_parts(self.place, until)
            end = clock()
            if end + timedelta(seconds=seconds) <= until:
                return {"time_to_live": seconds, "expires_at": until}
            more = 2 * (end - begin)

    async def go_live(self, fields: Document) -> None:
        """Make the session live, and set fields of its document; raise `SessionConflictError` as `fill` does."""
        update: Document = {"$unset": dict.fromkeys({"state", "state_by", "state_until"} - fields.keys(), "")}
        if fields:
            update["$set"] = fields
        if not await self.update(update) and not await self._is_live():  # otherwise, an acknowledgement was lost
            raise self.lost()
        self._stop()
        self._store.ensure_indexes()

    async def _is_live(self) -> bool:
        live = {"_id": self.session_id, "incarnation": self.place.incarnation, **LIVE}
        return await self._find(live) is not None

    async def clear(self) -> None:
        await self._store.deletion.remove_parts(self.place)

    async def abandon(self) -> None:
        """Remove the copy unless it is live; log a failure."""
        if not self._stop():
            return
        try:
            if await self._store.deletion.delete_matching(self.session_id, self.own):
                return
            # Another process has removed it, or it is live, and the acknowledgement was lost.
            if not await self._is_live():
                await self.clear()
        except MongoDBSessionError as error:
            _not_removed.add(self.place)
            logger.warning(
                "session_id=<%r>, error=<%s> | an incomplete copy was not removed, another process removes it later",
                self.session_id,
                error,
            )

    def _stop(self) -> bool:
        """Stop renewing the lease; return whether a copy was begun that is not live."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        has_begun, self._heartbeat, self._has_begun = self._has_begun, None, False
        return has_begun

    def lost(self) -> SessionConflictError:
        return SessionConflictError(f"session {self.session_id!r} was removed by another process while it was copied")


def _own(place: Place) -> Document:
    return {"_id": place.session_id, "incarnation": place.incarnation, "state": "copying"}
