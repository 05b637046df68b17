"""Decoding stored values, see `codec`. Pure."""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import repeat
from typing import Any, Final

from bson import Binary, Int64
from bson.binary import UUID_SUBTYPE
from bson.errors import BSONError

from ..errors import EncodingError, raise_alone
from .marked import LEGACY_MARKER, MARKER, load, marked

_ESCAPE: Final = re.compile(r"\\(?:\\|u(d[89a-f][0-9a-f]{2}))")
_MALFORMED: Final = (BSONError, ValueError, TypeError, ArithmeticError, LookupError)
"""The errors that reading a malformed form raises."""


class TooDeepError(Exception):
    """A stored value has more levels than are allowed."""


def decoded(stored: Any, nesting: int, strict: bool) -> Any:
    """Return a decoded value with at most `nesting` levels; a packed form counts as one.

    With `strict`, a marker that is not part of a form that `encode` writes is refused, else read as a dict.

    Raises:
        TooDeepError: The value has more levels.
        EncodingError: A marker is refused.
    """
    kind = type(stored)
    if kind is dict or kind is list:
        if nesting <= 0:
            raise TooDeepError
        nesting -= 1
    if kind is dict:
        if len(stored) == 2:
            if MARKER in stored and type(stored[MARKER]) is str and "v" in stored:
                return _decode_marked(stored[MARKER], stored["v"], nesting, strict)
            if stored.get(LEGACY_MARKER) is True and type(stored.get("data")) is str:
                with suppress(ValueError):
                    return base64.b64decode(stored["data"], validate=True)
        if strict and MARKER in stored:
            raise _unknown_form()
        value = {}
        for key, item in stored.items():
            value[key] = decoded(item, nesting, strict)
        return value
    if kind is list:
        return list(map(decoded, stored, repeat(nesting), repeat(strict)))
    if kind is Binary and stored.subtype == UUID_SUBTYPE and len(stored) == 16:
        return stored.as_uuid()
    return int(stored) if kind is Int64 else stored


def _unknown_form() -> EncodingError:
    return EncodingError("cannot read a marked form that this library does not write")


def _decode_marked(tag: str, value: Any, nesting: int, strict: bool) -> Any:
    if tag in _COLLECTIONS and type(value) is list:
        # Members are decoded before the form is checked, and only once: forms within forms take linear time.
        members: list[Any] = []
        for member in value:
            if tag == "dict" and type(member) is list:
                members.append(list(map(decoded, member, repeat(nesting), repeat(strict))))
            else:
                members.append(decoded(member, nesting, strict))
        value = members
        with suppress(*_MALFORMED):
            return _collect(tag, value)
    elif tag == "bson" and type(value) is bytes:
        try:
            return decoded(_unpacked(value), nesting, strict)
        except TooDeepError:
            if strict:
                raise
        except _MALFORMED:
            pass
    else:
        with suppress(*_MALFORMED):
            return _SCALARS[tag, type(value)](value)
        value = decoded(value, nesting, strict)
    if strict:
        raise _unknown_form()
    return marked(tag, value)


def _unpacked(data: bytes) -> Any:
    """Return the value of a packed form, which must take at most half of the stack, as `encode` writes it."""
    try:
        return load(data)
    except RecursionError:
        frame, depth = sys._getframe(), 0
        while frame.f_back is not None:
            frame, depth = frame.f_back, depth + 1
        if depth >= sys.getrecursionlimit() // 2:
            raise
        raise_alone(TooDeepError())


def _collect(tag: str, members: list[Any]) -> Any:
    if tag == "dict" and not all(type(member) is list and len(member) == 2 for member in members):
        raise ValueError("no list of pairs")
    collection = _COLLECTIONS[tag](members)
    if len(collection) != len(members):
        raise ValueError("equal members")
    return collection


_COLLECTIONS: Final[dict[str, Callable[[list[Any]], Any]]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
}

_SCALARS: Final[dict[tuple[str, type], Callable[[Any], Any]]] = {
    ("int", str): lambda text: int(text, 0),
    ("str", str): lambda text: _ESCAPE.sub(lambda match: chr(int(match[1], 16)) if match[1] else "\\", text),
    ("decimal", str): Decimal,
    ("datetime", str): datetime.fromisoformat,
    ("date", str): date.fromisoformat,
    ("time", str): time.fromisoformat,
    ("timedelta", str): lambda text: timedelta(microseconds=int(text)),
    ("bytearray", bytes): bytearray,
    ("binary", bytes): lambda data: Binary(data[1:], data[0]),
}
"""The readers of scalar forms, by tag and type of the stored value."""
