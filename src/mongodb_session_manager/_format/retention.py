"""`Life`: what this process last read of the incarnation, expiry and owner of a session; `Dates` of its parts. Pure.

`_store.expiry` explains the dates.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Self

from bson import ObjectId

from ..errors import ConfigurationError
from .documents import Document
from .labels import owner_of

MAX_SECONDS = 2**31 - 1

_STEPS = 8
"""The date of a session moves at most this often within its time to live."""


def checked_ttl(value: object) -> int | None:
    """Return the seconds of a `session_ttl`, rounded up, or raise `ConfigurationError`."""
    if value is None:
        return None
    if not isinstance(value, timedelta):
        raise ConfigurationError(f"session_ttl must be a datetime.timedelta, got {value!r}")
    seconds = -(value // timedelta(seconds=-1))
    if value < timedelta(seconds=1) or seconds > MAX_SECONDS:
        raise ConfigurationError(f"session_ttl must be from 1 to {MAX_SECONDS} seconds, got {value!r}")
    return seconds


def next_date(moment: datetime, seconds: int) -> datetime:
    """Return the `expires_at` that a step sets: nine eighths of the time to live after `moment`."""
    return moment + timedelta(seconds=seconds) * (_STEPS + 1) / _STEPS


NO_TIME_TO_LIVE: Document = {"$not": {"$type": "int", "$gt": 0, "$not": {"$type": "array"}}}
"""The condition for a missing `time_to_live`; an application might have stored another value."""


class Dates(NamedTuple):
    """The expiry of a part that is stored before its session refers to it, and the time to live at that moment."""

    time_to_live: int | None
    expires_at: datetime | None

    @property
    def may_be_added(self) -> Document:
        """The condition on the session: `time_to_live` is unchanged, and the session does not outlive the part."""
        same: Document = {"time_to_live": NO_TIME_TO_LIVE if self.time_to_live is None else self.time_to_live}
        return same if self.expires_at is None else {**same, "expires_at": {"$not": {"$gt": self.expires_at}}}


UNDATED = Dates(None, None)


class Life(NamedTuple):
    """The incarnation, `None` in 1.0.0, the expiry and the owner of a session.

    The values can be older than the stored ones.
    """

    incarnation: ObjectId | None = None
    time_to_live: int | None = None  # in seconds; `None` if it does not expire
    expires_at: datetime | None = None  # a lower bound of the stored date, which never moves back
    owner: str | None = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        incarnation, ttl, date = (document.get(name) for name in ("incarnation", "time_to_live", "expires_at"))
        return cls(
            incarnation if isinstance(incarnation, ObjectId) else None,
            ttl if type(ttl) is int and 0 < ttl <= MAX_SECONDS else None,
            date if isinstance(date, datetime) else None,
            owner_of(document),
        )

    def dates(self, moment: datetime, own: int | None) -> Dates:
        """Return the dates of a part that is stored at `moment`; `own` is the `session_ttl` of the repository."""
        if self.time_to_live is None:
            return UNDATED
        seconds = max(own or 0, self.time_to_live)
        until = next_date(moment, seconds)
        return Dates(self.time_to_live, max(until, self.expires_at or until) + timedelta(seconds=seconds))

    def outlives(self, part: Dates) -> bool:
        if self.time_to_live != part.time_to_live:
            return True
        return self.expires_at is not None and part.expires_at is not None and self.expires_at > part.expires_at


LIFE: Document = {name: f"${name}" for name in ("incarnation", "time_to_live", "expires_at", "owner")}
"""The projection of the fields that `Life.of` needs; also usable as an aggregation expression."""
