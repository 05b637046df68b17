"""Expiring sessions: one date, `expires_at`, in the session document and in each part of the session outside it.

A session whose `expires_at` has passed can no longer be read or written to, and opening its id creates a new one. The
server removes its documents within about a minute. No statement moves a date back. After a write, the session lives for
at least its time to live. The date moves in steps of an eighth of that, so that most statements leave it unchanged. The
parts of a session never expire before it:

- The first date of a session is set on its document, and then on its parts. A part without a date never expires.
- A later step sets the date of all parts first, and then the date of the session.
- A new part gets a date that is a whole time to live later than the date of a step at that moment. The statement that
  adds it to the session matches only if the time to live is unchanged and the session does not expire later.

So a step that runs at the same time, and has dated the parts already, cannot leave the new part behind.

`time_to_live` is the time to live of the session in seconds. It changes when a repository with another `session_ttl`
writes to the session. That write takes a step of the shorter value, and a second one of the new value. A part that was
dated by the former value is either added before the first step, so that the second one dates it, or refused.

All dates come from the server's clock: `Connection.now`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from bson import ObjectId

from .._format.bounded import Bounded
from .._format.documents import Document
from .._format.layout import LIVE, OF_V1, OUTSIDE, Place, live_at
from .._format.retention import LIFE, NO_TIME_TO_LIVE, UNDATED, Dates, Life, next_date
from .._format.statements import Update
from .._io.drivers import AsyncCollection
from .._io.indexes import ensure_indexes
from ..errors import DatabaseError, InvalidArgumentError, SessionNotFoundError
from .sessions import Sessions, missing_session

T = TypeVar("T")

_KNOWN_LIVES = 4096


async def matched(collection: AsyncCollection, update: Update) -> bool:
    result = await collection.update_one(update.filter, update.update, array_filters=update.array_filters)
    return bool(result.matched_count)


class Expiry:
    """Sends the statements of writers, and moves `expires_at` of the session and its parts with them.

    The `session_ttl`, in seconds, is the time to live that writes set; `None` keeps that of the session.
    """

    def __init__(self, sessions: Sessions, session_ttl: int | None, migrate: Callable[[str], Awaitable[Life]]) -> None:
        self.session_ttl = session_ttl
        self._sessions = sessions
        self._connection = sessions.connection
        self._migrate = migrate
        self._lives: Bounded[str, Life] = Bounded(_KNOWN_LIVES)

    # Known lives.

    def known(self, session_id: str) -> Life | None:
        return self._lives.get(session_id)

    def learn(self, session_id: str, document: Mapping[str, Any]) -> Life:
        """Remember the `Life` of a session document, and ensure the TTL indexes if the session expires."""
        self._lives[session_id] = life = Life.of(document)
        if life.time_to_live is not None:
            self.ensure_indexes()
        return life

    def forget(self, session_id: str, owner: str | None = None) -> None:
        if self._known_to(owner, session_id) is not None:
            self._lives.pop(session_id, None)

    def _known_to(self, owner: str | None, session_id: str) -> Life | None:
        """Return the known `Life` of a session, unless it belongs to another owner."""
        life = self._lives.get(session_id)
        return life if owner is None or life is None or life.owner == owner else None

    async def life(self, session_id: str, owner: str | None = None) -> Life:
        life = self._known_to(owner, session_id)
        return life if life is not None and life.incarnation is not None else await self.read_life(session_id, owner)

    async def read_life(self, session_id: str, owner: str | None = None) -> Life:
        """Return the `Life` of a session from the server; migrate one of 1.0.0 first. Raises `SessionNotFoundError`."""
        document = await self._sessions.find(session_id, {**LIFE, **dict.fromkeys(OF_V1, 1)}, owner)
        if document is None:
            self.forget(session_id, owner)
            raise missing_session(session_id)
        if not isinstance(document.get("incarnation"), ObjectId) or document.keys() & OF_V1:
            return await self._migrate(session_id)
        return self.learn(session_id, document)

    def dates(self, life: Life) -> Dates:
        return UNDATED if life.time_to_live is None else life.dates(self._connection.now(), self.session_ttl)

    # Writing.

    async def update(self, update: Update, command: Callable[[AsyncCollection, Update], Awaitable[T]]) -> T | None:
        """Send a statement of a writer. One that sets `updated_at` moves `expires_at` of the session and its parts.

        A `null` in a field that the statement writes into is removed. The result of `command` must be false if the
        statement matched nothing. If its filter contains an `owner`, no command changes a session of another owner, nor
        its parts.
        """
        session_id, owner, moment = update.filter["_id"], update.filter.get("owner"), self._connection.now()
        statement = update._replace(filter={**update.filter, **live_at(moment)})
        touches, life, has_nulls = _touches(update), self._known_to(owner, session_id), True
        if touches and life is None and self.session_ttl is not None:
            try:
                life = await self.life(session_id, owner)
            except SessionNotFoundError:
                return None
        life = life or Life()
        while True:
            step = await self._begin_step(session_id, life, moment) if touches else None
            sent = statement if step is None else _touching(statement, step)
            try:
                result = await self._sessions.collection.send(lambda sessions: command(sessions, sent))  # noqa: B023
            except (DatabaseError, InvalidArgumentError):
                if not has_nulls or not await self._sessions.clear_nulls(sent):
                    raise
                has_nulls = False
                continue
            if not touches:
                return result
            if result:
                if step is not None and step.seconds is not None:
                    await self._end_step(session_id, life, step.moment, step.seconds)
                return result
            try:
                current = await self.read_life(session_id, owner)
            except SessionNotFoundError:
                return result
            if current == life:
                return result
            life, has_nulls = current, True

    async def _begin_step(self, session_id: str, life: Life, moment: datetime) -> _Step:
        """Date the parts of a session if a statement that is sent at `moment` must move its date."""
        seconds, before = self.session_ttl or life.time_to_live, life.time_to_live
        if seconds is None:
            return _Step(moment, {"time_to_live": NO_TIME_TO_LIVE, "session_ttl": None})
        late_enough = moment + timedelta(seconds=seconds)
        if life.expires_at is not None and life.expires_at >= late_enough:
            return _Step(moment, {"expires_at": {"$gte": late_enough}})
        place, date = Place(session_id, life.incarnation), next_date(moment, seconds)
        if before is None:
            # The session gets its first date before its parts, so that the next write dates the parts in any case.
            session = {"_id": session_id, "incarnation": life.incarnation, "expires_at": None, **LIVE}
            first = {"$set": {"time_to_live": seconds, "expires_at": late_enough}}
            await self._sessions.collection.update_many(session, first)
        else:
            date = min(date, next_date(moment, before))  # a part can have a date for `before`
        await self.date_parts(place, date)
        return _Step(moment, {"incarnation": life.incarnation}, seconds, date)

    async def _end_step(self, session_id: str, life: Life, moment: datetime, seconds: int) -> None:
        """Give the parts and the session the date of a new time to live, and remember it."""
        until = next_date(moment, seconds)
        if life.time_to_live != seconds:
            await self.date_parts(Place(session_id, life.incarnation), until)
            own = {"_id": session_id, "incarnation": life.incarnation}
            await self._sessions.update(Update(own, {"$max": {"expires_at": until}}, None))
        fields = {"incarnation": life.incarnation, "owner": life.owner}
        self.learn(session_id, {**fields, "time_to_live": seconds, "expires_at": until})

    async def date_parts(self, place: Place, until: datetime) -> None:
        """Set `expires_at` of all parts of a session to a date, unless it is later already."""
        for suffix, condition in place.outside():
            await self._sessions.collection.part(suffix).update_many(condition, {"$max": {"expires_at": until}})

    def ensure_indexes(self) -> None:
        for suffix in ("", *OUTSIDE):
            # An application might have stored its own `expires_at` in session documents.
            dated = {"expires_at" if suffix else "time_to_live": {"$exists": True}}
            part = self._sessions.collection.part(suffix)
            ensure_indexes(part, [("expires_at",)], partialFilterExpression=dated)


class _Step(NamedTuple):
    """How a statement that sets `updated_at` moves the date of its session; no `seconds` leave it unchanged."""

    moment: datetime
    condition: Document
    seconds: int | None = None
    date: datetime | None = None


def _touches(update: Update) -> bool:
    stages = update.update if isinstance(update.update, list) else [update.update]
    return "updated_at" in stages[0].get("$set", {})


def _touching(update: Update, step: _Step) -> Update:
    first, *rest = update.update if isinstance(update.update, list) else [update.update]
    first = {**first, "$set": {**first["$set"], "updated_at": step.moment}}
    if step.seconds is not None:
        first["$set"]["time_to_live"] = step.seconds
        if isinstance(update.update, list):
            first["$set"]["expires_at"] = {"$max": ["$expires_at", step.date]}
        else:
            first["$max"] = {"expires_at": step.date}
    return update._replace(
        filter={**update.filter, "$and": [*update.filter.get("$and", []), step.condition]},
        update=[first, *rest] if isinstance(update.update, list) else first,
    )
