"""What stands beside the document of a session, and how long. Pure.

<collection>_archive               buckets of old messages, see `_buckets`
<collection>_attachments.files     large attachments, see `_attachments`
<collection>_attachments.chunks

Each of them says in which generation of its session it was made: the session's `attachments_generation`, in `_id` or
as `generation` of a bucket. A new session begins with the microseconds since 1970, so whatever stands beside a session
that was deleted has a lower generation than all of a later session of the same id, and each deletion removes its own.
(That compares clocks of machines only where two of them create a session of the same id: the second one's clock must
not be behind by more than the time between.) Sessions of versions before 1.0, and what stands beside them, begin at 0.

A session that expires has in its document

    session_ttl   seconds; TTL indexes take the value of their collection, this is what it was for the session
    kept_until    a date that no `expires_from` beside the session is before
    keep_until    a date that no `expires_from` of anything added from now on may be before

and everything beside it has `expires_from`. TTL indexes with the same seconds remove the document by `updated_at`, and
the rest by `expires_from`. Nothing may be removed before its session, so every statement that sets `updated_at`
matches only if `kept_until` is not before it. If it is, which can happen once in an eighth of `session_ttl`, the writer
first renews: sets `keep_until` to an eighth ahead, then every `expires_from`, then `kept_until`. What is added
meanwhile, by somebody who read the session before, is refused by the statement that would make it a part of the
session, because that compares `keep_until`. A session without anything beside it has none of the two dates, and
whoever adds the first thing sets them, unless its own date has passed by then.

`session_ttl` comes first where a session gets it later: if the writer ends there, what has no `expires_from` stays.

The server removes what is overdue about once a minute, and collection by collection. If it has not for longer than an
eighth of `session_ttl`, a document may for that moment outlive what stands beside it; reading the session is an error
then, as it is about to go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Self

from bson import MaxKey

from ._documents import Document
from .errors import ConfigurationError

ARCHIVE = "_archive"
FILES = "_attachments.files"
CHUNKS = "_attachments.chunks"

BESIDE = (ARCHIVE, CHUNKS, FILES)
"""Suffixes of the collections, in the order in which a session's part of them is removed."""

_MOST_SECONDS = 2**31 - 1
"""What a TTL index takes."""

COPYING_TIME = timedelta(days=1)
"""How long a session may take to be copied; what a copy of that age has left is no copy's any more."""

SLACK = 8
"""What is beside a session may outlive it by this part of its `session_ttl`, and is renewed as often."""


def checked_ttl(value: object) -> int | None:
    """Return the seconds of a `session_ttl`, whole and rounded up.

    Raises:
        ConfigurationError: It cannot be one.
    """
    if value is None:
        return None
    if not isinstance(value, timedelta):
        raise ConfigurationError(f"session_ttl must be a datetime.timedelta, got {value!r}")
    seconds = -(value // timedelta(seconds=-1))
    if value < timedelta(seconds=1) or seconds > _MOST_SECONDS:
        raise ConfigurationError(f"session_ttl must be from 1 to {_MOST_SECONDS} seconds, got {value!r}")
    return seconds


# Which part of a collection belongs to a session.


def within(session_id: str, following: str) -> Document:
    """Return the range of all ids that begin with a session's, and go on with the field `following`."""
    return {"$gte": {"session_id": session_id}, "$lte": {"session_id": session_id, following: MaxKey()}}


def within_chunks(session_id: str) -> Document:
    """Return the range of the ids of all chunks of a session's files."""
    return {operator: {"file": bound} for operator, bound in within(session_id, "sha256").items()}


def notes(session_id: str) -> Document:
    """Return the range of the ids of the notes that copies into a session leave in its archive, see `_copies`."""
    return {
        "$gte": {"session_id": session_id, "copy": datetime.min},
        "$lte": {"session_id": session_id, "copy": datetime.max.replace(microsecond=999000)},
    }


def beside(session_id: str, generation: int, excepted: Sequence[int] = ()) -> list[tuple[str, Document]]:
    """Return where something may stand beside a session, with the filter for what is not of a later generation.

    Args:
        session_id: The session.
        generation: Its generation.
        excepted: Lower generations that are not meant either.
    """
    meant = {"$not": {"$gt": generation}, "$nin": excepted}
    return [
        (ARCHIVE, {"_id": within(session_id, "agent"), "generation": meant}),
        (CHUNKS, {"_id": within_chunks(session_id), "files_id.generation": meant}),
        (FILES, {"_id": within(session_id, "sha256"), "_id.generation": meant}),
    ]


# How long.


class Keeping(NamedTuple):
    """What is known of how long that which stands beside a session is kept.

    Attributes:
        ttl: The session's `session_ttl`, `None` if it does not expire.
        updated_at: The session's.
        keep_until: The session's.
    """

    ttl: timedelta | None = None
    updated_at: datetime | None = None
    keep_until: datetime | None = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Return what the fields of `KEEPING`, read from a session document, say."""
        ttl = document.get("session_ttl")
        updated_at, keep_until = (
            value if isinstance(value, datetime) else None
            for value in (document.get("updated_at"), document.get("keep_until"))
        )
        return cls(timedelta(seconds=ttl) if isinstance(ttl, int | float) else None, updated_at, keep_until)

    def expires_from(self, moment: datetime) -> datetime | None:
        """Return the date for what is added at `moment`; `None` if it is to stay."""
        if self.ttl is None:
            return None
        until = max(moment, self.updated_at or moment) + self.ttl / SLACK
        return max(until, self.keep_until or until)


def kept_from(expires_from: datetime | None) -> Document:
    """Return the field that says so of what stands beside a session."""
    return {} if expires_from is None else {"expires_from": expires_from}


FOREVER = Keeping()
"""What is known before anything is."""

KEEPING: Document = {name: f"${name}" for name in ("session_ttl", "updated_at", "keep_until")}
"""The projection that brings what `Keeping` is made of."""


KEPT = {"kept_until": "$min", "keep_until": "$max"}
"""How the statement that adds something changes the dates of the session: with the date of what it adds."""


def may_add(expires_from: datetime | None) -> Document:
    """Return the condition under which what was stored with a date, or without, may become a part of a session."""
    if expires_from is None:
        return {"session_ttl": None, "keep_until": None}
    return {"keep_until": {"$not": {"$gt": expires_from}}}


def is_current(document: Mapping[str, Any], expires_from: datetime | None, moment: datetime) -> bool:
    """Tell whether what was stored with a date, or without, may become a part of a session at a moment.

    The session document has the fields of `KEEPING`.
    """
    keeping = Keeping.of(document)
    if expires_from is None:
        return keeping.ttl is None and keeping.keep_until is None
    return moment <= expires_from and (keeping.keep_until is None or keeping.keep_until <= expires_from)
