"""Sessions that expire: one date, `expires_at`, on the session's document and on each of its parts outside it.

A session whose `expires_at` has passed can no longer be read or written to, and opening its id creates a new one. The
server removes its documents within about a minute. No statement moves a date back. After each write, the date of the
session is at least its time to live ahead. It moves in steps of an eighth of that, so that most statements leave it
unchanged. The parts of a session never expire before it:

- The first date of a session is set on its document, and then on its parts. A part without a date never expires.
- A later step sets the date of all parts first, and then the date of the session.
- A new part gets a date that is a whole time to live later than the date that a step would set now. The statement that
  adds it to the session matches only if the time to live is unchanged and the session does not expire later.

So a step that runs at the same time, and has dated the parts already, cannot leave the new part behind.

`time_to_live` is the time to live of the session in seconds. It changes when a repository with another `session_ttl`
writes to the session. That write takes a step of the shorter value, and a second one of the new value. A part that was
dated by the former value is either added before the first step, so that the second one dates it, or refused.

All dates come from the server's clock, see `Connection.now`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from bson import ObjectId

from .._format.changes import Update
from .._format.documents import Document
from .._format.layout import LIVE, OF_V1, OUTSIDE, Place, live_at
from .._format.retention import LIFE, NO_TIME_TO_LIVE, Dates, Life, next_date
from .._io.collection import SessionCollection, ensure_indexes
from .._io.drivers import AsyncCollection
from ..errors import SessionNotFoundError

T = TypeVar("T")

_KNOWN_LIVES = 4096


class SessionRetention(SessionCollection):
    """The base class of the repository that keeps expiring sessions alive: it moves `expires_at` with writes."""

    _session_ttl: int | None
    _lives: dict[str, Life]

    def _learn(self, session_id: str, document: Mapping[str, Any]) -> Life:
        """Remember the `Life` of a session document, and ensure the TTL indexes if the session expires."""
        self._lives.pop(session_id, None)
        self._lives[session_id] = life = Life.of(document)
        if len(self._lives) > _KNOWN_LIVES:
            del self._lives[next(iter(self._lives))]
        if life.time_to_live is not None:
            self._ensure_expiry()
        return life

    def _dates(self, life: Life) -> Dates:
        """Return the dates of a part that is stored now."""
        return life.dates(self._connection.now(), self._session_ttl)

    async def _life(self, session_id: str) -> Life:
        """Return the `Life` of a session, from memory or from the server. A session of 1.0.0 is migrated first.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        life = self._lives.get(session_id)
        return life if life is not None and life.incarnation is not None else await self._read_life(session_id)

    async def _read_life(self, session_id: str) -> Life:
        document = await self._find(session_id, {**LIFE, **dict.fromkeys(OF_V1, 1)})
        if document is None:
            self._lives.pop(session_id, None)
            raise SessionNotFoundError(f"session {session_id!r} does not exist")
        if not isinstance(document.get("incarnation"), ObjectId) or document.keys() & OF_V1:
            return await self._migrate(session_id)
        return self._learn(session_id, document)

    async def _migrate(self, session_id: str) -> Life:
        raise NotImplementedError

    async def _update_with(
        self, update: Update, command: Callable[[AsyncCollection, Update], Awaitable[T]]
    ) -> T | None:
        session_id, moment = update.filter["_id"], self._connection.now()
        update = update._replace(filter={**update.filter, **live_at(moment)})
        if not _touches(update):
            return await super()._update_with(update, command)
        known = self._lives.get(session_id)
        if known is None and self._session_ttl is not None:
            try:
                known = await self._life(session_id)
            except SessionNotFoundError:
                return None
        life = known or Life()
        while True:
            result = await self._touch(update, command, life, moment)
            if result:
                return result
            try:
                current = await self._read_life(session_id)
            except SessionNotFoundError:
                return result
            if current == life:
                return result
            life = current

    async def _touch(
        self, update: Update, command: Callable[[AsyncCollection, Update], Awaitable[T]], life: Life, moment: datetime
    ) -> T | None:
        """Send a statement that sets `updated_at`, and move `expires_at` if it is too early."""
        session_id, seconds = update.filter["_id"], self._session_ttl or life.time_to_live
        if seconds is None:
            condition: Document = {"time_to_live": NO_TIME_TO_LIVE, "session_ttl": None}
            return await super()._update_with(_touching(update, moment, condition), command)
        late_enough = moment + timedelta(seconds=seconds)
        if life.expires_at is not None and life.expires_at >= late_enough:
            condition = {"expires_at": {"$gte": late_enough}}
            return await super()._update_with(_touching(update, moment, condition), command)
        place, before = Place(session_id, life.incarnation), life.time_to_live
        until = next_date(moment, seconds)
        step = until if before is None else min(until, next_date(moment, before))  # a part can have a date for `before`
        if before is None:
            await self._date_session(place, seconds, late_enough)  # so that the next write dates the parts in any case
        await self._date_parts(place, step)
        statement = _touching(update, moment, {"incarnation": life.incarnation}, (seconds, step))
        result = await super()._update_with(statement, command)
        if result:
            if before != seconds:
                await self._date_parts(place, until)
                own = {"_id": session_id, "incarnation": life.incarnation}
                await super()._update_with(Update(own, {"$max": {"expires_at": until}}, None), _updated)
            self._learn(session_id, {"incarnation": life.incarnation, "time_to_live": seconds, "expires_at": until})
        return result

    async def _date_session(self, place: Place, seconds: int, until: datetime) -> None:
        """Set the first date of a session, before that of its parts: parts must not expire without their session."""
        session = {"_id": place.session_id, "incarnation": place.incarnation, "expires_at": None, **LIVE}
        date = {"$set": {"time_to_live": seconds, "expires_at": until}}
        await self._send(partial(_update_many, session, date))

    async def _date_parts(self, place: Place, until: datetime) -> None:
        """Set `expires_at` of all parts of a session to a date, unless it is later already."""
        later = {"$max": {"expires_at": until}}

        for suffix, condition in place.outside():
            await self._send(partial(_update_many, condition, later), f"{self._collection_name}{suffix}")

    def _ensure_indexes(self) -> None:
        super()._ensure_indexes()
        if self._session_ttl is not None:
            self._ensure_expiry()

    def _ensure_expiry(self) -> None:
        """Build the TTL indexes of the session documents and of their parts, in the background."""
        for suffix in ("", *OUTSIDE):
            # An application may have stored an `expires_at` of its own in session documents.
            field = "expires_at" if suffix else "time_to_live"
            dated = {field: {"$exists": True}}
            name = f"{self._collection_name}{suffix}"
            expiry = [("expires_at",)]
            ensure_indexes(self._connection, self._database_name, name, expiry, partialFilterExpression=dated)


def _touches(update: Update) -> bool:
    stages = update.update if isinstance(update.update, list) else [update.update]
    return "updated_at" in stages[0].get("$set", {})


def _touching(
    update: Update, moment: datetime, condition: Document, step: tuple[int, datetime] | None = None
) -> Update:
    """Return a statement that sets `updated_at` to a moment under a further condition.

    Args:
        update: The statement.
        moment: The new `updated_at`.
        condition: The further condition on the session document.
        step: The new `time_to_live` and `expires_at` of the session; `None` leaves both.
    """
    is_pipeline = isinstance(update.update, list)
    first, *rest = update.update if isinstance(update.update, list) else [update.update]
    first = {**first, "$set": {**first["$set"], "updated_at": moment}}
    if step is not None:
        seconds, until = step
        first["$set"]["time_to_live"] = seconds
        if is_pipeline:
            first["$set"]["expires_at"] = {"$max": ["$expires_at", until]}
        else:
            first["$max"] = {"expires_at": until}
    return update._replace(
        filter={**update.filter, "$and": [*update.filter.get("$and", []), condition]},
        update=[first, *rest] if is_pipeline else first,
    )


async def _updated(collection: AsyncCollection, update: Update) -> bool:
    return bool((await collection.update_one(update.filter, update.update)).matched_count)


async def _update_many(condition: Document, update: Document, collection: AsyncCollection) -> None:
    await collection.update_many(condition, update)
