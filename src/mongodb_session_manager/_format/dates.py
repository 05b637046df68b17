"""Dates: BSON dates in UTC with whole milliseconds, and the ISO strings of Strands' dataclasses. Pure."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from ..errors import InvalidArgumentError, raise_alone

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_SECONDS = 10**11  # the year 5138; a larger number is milliseconds


def now() -> datetime:
    return to_milliseconds(datetime.fromtimestamp(time.time(), UTC))


def to_date(value: object) -> datetime:
    """Return the BSON date of an ISO string or datetime, without a zone in UTC, or raise `InvalidArgumentError`."""
    if value is None:
        return now()
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        if not isinstance(moment, datetime):
            raise InvalidArgumentError(f"a date must be an ISO 8601 string or a datetime, not {type(value).__name__}")
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise_alone(InvalidArgumentError("a date must be within the years 1 to 9999 in UTC"))
    except ValueError as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise_alone(InvalidArgumentError("a date must be an ISO 8601 string or a datetime, not another text"))
    return to_milliseconds(moment)


def date_from(value: object) -> datetime:
    """Return a stored date. A number is the time since 1970 in seconds or milliseconds; no date is the current time.

    Versions before 1.0, and manual repairs of their documents, stored dates in several forms.
    """
    if type(value) is datetime and value.tzinfo is UTC:
        return value
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return to_milliseconds(_EPOCH + timedelta(seconds=value if abs(value) < _MAX_SECONDS else value / 1000))
        return to_date(value)
    except (ValueError, OverflowError):
        return now()


def as_date(value: object) -> object:
    try:
        return to_date(value) if isinstance(value, str | datetime) else value
    except InvalidArgumentError:
        return value


def to_milliseconds(moment: datetime) -> datetime:
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def to_iso(value: object) -> str:
    return date_from(value).isoformat()
