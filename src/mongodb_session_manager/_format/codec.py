r"""Python values to what MongoDB can store, and back: equal, and of the same types.

What BSON holds is stored as it is, so that a conversation reads naturally in the database. The rest is stored as
`{"__msm__": <tag>, "v": <value>}`:

    tag                          v
    "int"                        text: an integer beyond 64 bits, hexadecimal beyond 1024
    "str"                        text: lone surrogates as `\udxxx`, a backslash as two
    "decimal"                    text: a `decimal.Decimal`
    "datetime", "date", "time"   text, ISO 8601: what a BSON date (UTC, whole milliseconds) does not hold
    "timedelta"                  text: a `timedelta` in microseconds
    "bytearray"                  the bytes of a `bytearray`
    "binary"                     subtype and data of a `Binary` that BSON decoding would turn into something else
    "tuple", "set", "frozenset"  list of the members
    "dict"                       list of [key, value] pairs: a dict that BSON cannot hold or would not give back
    "attachment"                 text: never seen here, because `_references` exchanges it for bytes before decoding
    "bson"                       BSON of `{"v": <value>}`: what lies deeper than MongoDB can hold

Subclasses of what is stored (an `Enum` of strings, `OrderedDict`, a named tuple) come back as their base, NumPy scalars
as the equal number or date, a `memoryview` as bytes.
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from itertools import repeat
from typing import Any, Final
from uuid import UUID

import bson
from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.binary import UUID_SUBTYPE, UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError, InvalidBSON

from ..errors import EncodingError, raise_alone

MARKER: Final = "__msm__"

CODEC_OPTIONS: Final[CodecOptions[dict[str, Any]]] = CodecOptions(
    tz_aware=True,
    tzinfo=UTC,
    # With STANDARD, one stored UUID that has not 16 bytes makes the whole reply unreadable.
    uuid_representation=UuidRepresentation.UNSPECIFIED,
    # Other programs can have stored strings that are not UTF-8.
    unicode_decode_error_handler="replace",
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,  # a date beyond the year 9999 is a `DatetimeMS`
)

# Levels of a stored document, its root included. MongoDB documents 100. Measured on 6.0: 180 in an insert, `$set`,
# `$push` with `$each` and a pipeline update with `$literal` (what wraps the value in the command does not count), and
# 179 in findAndModify, whose reply wraps the document.
MAX_LEVELS: Final = 100

# Levels of dicts, lists, ... of one value, packed or not. Python's stack allows 1000 frames by default and the codec
# takes two for a level, so a value that was encoded can be decoded in the depth of another stack too.
MAX_NESTING: Final = 256

# The most times that `encode` packs parts of a value of `MAX_NESTING` levels, rounded up.
_MAX_PACKED: Final = 16

_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
_NO_TIME: Final = timedelta(0)
_MICROSECOND: Final = timedelta(microseconds=1)
_LEGACY_MARKER: Final = "__bytes_encoded__"
_SHOWN_SEGMENTS: Final = 12
_PLAIN_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_ESCAPE: Final = re.compile(r"\\(?:\\|u(d[89a-f][0-9a-f]{2}))")


def encode(value: Any, *, depth: int = 0, name: str = "value") -> Any:
    """Copy a value into a form that MongoDB stores and `decode` turns back.

    Args:
        value: What to store. It is copied: what happens to it afterwards does not reach the result.
        depth: Levels from the document's root to where the value goes; 1 for the value of a top-level field.
        name: The name of the value in errors, like `message`.

    Returns:
        The copy, made of what `bson` encodes.

    Raises:
        EncodingError: The value holds an unsupported type, is nested deeper than `MAX_NESTING` or the stack, or raises
            an error when it is read.
    """
    try:
        return _encode(value, MAX_LEVELS - depth, MAX_NESTING)
    except _RefusedError as refused:
        raise_alone(EncodingError(f"cannot store {refused.reason}, at {name}{refused.path_to()}{refused.advice}"))
    except RecursionError:
        raise_alone(EncodingError("cannot store a value nested deeper than Python's stack allows here"))
    except Exception as error:  # a metaclass, or a dict that another thread changes
        raise_alone(EncodingError(f"cannot store a value that cannot be read: {type(error).__name__}"))


def decode(stored: Any, *, nesting: int = MAX_NESTING) -> Any:
    """Turn a stored value back into what was given to `encode`.

    Strands' own form of bytes, `{"__bytes_encoded__": True, "data": <base64>}`, becomes bytes. A marked form that
    `encode` would not have written is data of somebody else: it comes back as the dict it is.

    Args:
        stored: A value read with `CODEC_OPTIONS`.
        nesting: The most levels of the value; `encode` does not write packed forms that are deeper.

    Returns:
        A new value; nothing of it is shared with `stored` but what cannot change.

    Raises:
        EncodingError: The nesting of the stored value is deeper than Python's stack allows here.
    """
    try:
        return _decode(stored, nesting)
    except (RecursionError, _TooDeepError):
        raise_alone(EncodingError("cannot read a value nested deeper than Python's stack allows here"))


def decode_own(stored: Any) -> Any:
    """Turn a stored value back into a Python value, like `decode`; refuse marked forms that `encode` does not write.

    Raises:
        EncodingError: The value holds a marker that is not part of a marked form that `encode` writes, or it is nested
            deeper than `MAX_NESTING`.
    """
    _check_nesting(stored)
    found: list[Any] = []
    token = _foreign.set(found)
    try:
        value = decode(stored)
    finally:
        _foreign.reset(token)
    if found:
        raise EncodingError("cannot read a marked form that this library does not write")
    return value


_foreign: ContextVar[list[Any] | None] = ContextVar("mongodb_session_manager_foreign", default=None)
"""Collects, during `decode_own`, the markers that are not part of a marked form."""


def _check_nesting(stored: Any) -> None:
    waiting = [(stored, 0)]
    while waiting:
        value, level = waiting.pop()
        if level > MAX_NESTING + _MAX_PACKED:
            raise EncodingError(f"cannot read a value nested deeper than {MAX_NESTING} levels")
        if type(value) is dict:
            packed = value.get("v")
            tag = value[MARKER] if type(value.get(MARKER)) is str else None
            if tag == "bson" and type(packed) is bytes:
                try:
                    waiting.append((_load(packed), level + 1))
                except RecursionError:
                    raise_alone(EncodingError("cannot read a value nested deeper than Python's stack allows here"))
                except (BSONError, ValueError, ArithmeticError, LookupError):
                    continue  # `decode` reports it
            elif tag in _COLLECTIONS and type(packed) is list:
                is_pair = tag == "dict"
                waiting.extend((item, level if is_pair and type(item) is list else level + 1) for item in packed)
            else:
                waiting.extend((item, level + 1) for item in value.values())
        elif type(value) is list:
            waiting.extend((item, level + 1) for item in value)


class _RefusedError(Exception):
    """A value that cannot be stored; collects the way to it while the stack unwinds, innermost segment first."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
        self.path: list[str] = []

    def path_to(self) -> str:
        """Return the subscripts of the value; keys that can hold content are not shown."""
        more = "..." if len(self.path) > _SHOWN_SEGMENTS else ""
        return "".join(self.path[: -_SHOWN_SEGMENTS - 1 : -1]) + more


def _encode(value: Any, room: int, nesting: int) -> Any:
    """Encode a value that may take `room` levels of the document and `nesting` levels of its own."""
    kind = type(value)
    if kind is str:
        return value if value.isascii() else _encode_text(value)
    if kind in _NATIVE:
        return value
    if kind is int:
        return value if _INT64_MIN <= value <= _INT64_MAX else _encode_big_int(value)
    encode_scalar = _SCALARS.get(kind)
    if encode_scalar is not None:
        return _read(encode_scalar, value)
    levels = 1
    if kind is dict:
        if not _is_plain(value):
            value = dict(zip(_distinct_bases(value), value.values(), strict=True))
            levels = 1 if _is_plain(value) else 3
    elif kind is tuple or kind is set or kind is frozenset:
        levels = 2
    elif kind is not list:
        return _encode(_read(_base_of, value), room, nesting)
    if nesting <= 0:
        raise _RefusedError(f"a value nested deeper than {MAX_NESTING} levels (or one that holds itself)")
    # A marked or packed form takes one level, which must be left for every member.
    if room <= levels:
        return _marked("bson", _dump(_encode(value, MAX_LEVELS - 1, nesting)))
    if levels == 1:
        encode_members = _encode_plain_dict if kind is dict else _encode_members
        return encode_members(value, room - 1, nesting - 1)
    if kind is dict:
        return _marked("dict", _encode_pairs(value, room - 3, nesting - 1))
    members = value if kind is tuple else _distinct_bases(value)
    return _marked(kind.__name__, _encode_members(members, room - 2, nesting - 1))


def _encode_plain_dict(value: dict[str, Any], room: int, nesting: int) -> dict[str, Any]:
    encoded = {}
    key = ""
    try:
        for key, item in value.items():
            encoded[key] = _encode(item, room, nesting)
    except _RefusedError as refused:
        refused.path.append(subscript(key))
        raise
    return encoded


def _encode_pairs(value: dict[Any, Any], room: int, nesting: int) -> list[Any]:
    pairs = []
    segment = ""
    try:
        for key, item in value.items():
            segment = "[<key>]"
            encoded_key = _encode(key, room, nesting)
            segment = subscript(key)
            pairs.append([encoded_key, _encode(item, room, nesting)])
    except _RefusedError as refused:
        refused.path.append(segment)
        raise
    return pairs


def _encode_members(value: Iterable[Any], room: int, nesting: int) -> list[Any]:
    encoded: list[Any] = []
    try:
        for item in value:
            encoded.append(_encode(item, room, nesting))  # noqa: PERF401  a comprehension is a frame more per level
    except _RefusedError as refused:
        refused.path.append(f"[{len(encoded)}]")
        raise
    return encoded


def _is_plain(value: dict[Any, Any]) -> bool:
    """Tell whether BSON holds a dict with these keys and gives it back as the same dict."""
    for key in value:
        if type(key) is not str or "\0" in key or not (key.isascii() or _is_unicode(key)):
            return False
    # "$ref" (with "$id") decodes to a DBRef.
    return not ("$ref" in value or MARKER in value or (_LEGACY_MARKER in value and len(value) == 2))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _marked(tag: str, value: Any) -> dict[str, Any]:
    return {MARKER: tag, "v": value}


def _encode_text(text: str) -> Any:
    if _is_unicode(text):
        return text
    return _marked("str", text.replace("\\", "\\\\").encode(errors="backslashreplace").decode())


def _encode_big_int(number: int) -> dict[str, Any]:
    # Python may refuse to write or read more than 640 decimal digits (`sys.set_int_max_str_digits`).
    return _marked("int", str(number) if number.bit_length() <= 1024 else hex(number))


def _encode_datetime(value: datetime) -> Any:
    if value.microsecond % 1000 == 0 and value.utcoffset() == _NO_TIME:
        return value.replace(tzinfo=UTC)
    return _encode_iso(value)


def _encode_iso(value: date | time) -> dict[str, Any]:
    kind = type(value)
    text = value.isoformat()
    # Python reads an offset of less than a second as none.
    if kind.fromisoformat(text).isoformat() != text:
        raise _RefusedError(f"a {_type_name(value)} with an offset of less than a second")
    return _marked(kind.__name__, text)


def _encode_bson_type(value: Any) -> Any:
    """Let `bson` say whether it takes this value and gives it back."""
    if isinstance(value, Binary) and value.subtype in (0, 4):
        # Subtype 0 decodes to bytes, and 4 to a UUID where the length allows.
        return bytes(value) if value.subtype == 0 else _marked("binary", bytes([4]) + value)
    try:
        same = not (isinstance(value, Code) and value.scope is not None) and _load(_dump(value)) == value
    except (BSONError, ValueError, TypeError, OverflowError):
        same = False
    if not same:
        raise _RefusedError(f"a {_type_name(value)} that BSON does not give back as it is")
    return value


# Stored as they are, whatever their value. (`float`: NaN and the infinities too.)
_NATIVE: Final = frozenset({bool, type(None), float, bytes, ObjectId, Decimal128, Timestamp, MinKey, MaxKey})

_SCALARS: Final[dict[type, Callable[[Any], Any]]] = {
    Int64: int,
    # Independent of the `uuid_representation` it is written with.
    UUID: Binary.from_uuid,
    Decimal: lambda value: _marked("decimal", str(value)),
    datetime: _encode_datetime,
    date: _encode_iso,
    time: _encode_iso,
    timedelta: lambda value: _marked("timedelta", str(value // _MICROSECOND)),
    bytearray: lambda value: _marked("bytearray", bytes(value)),
    Binary: _encode_bson_type,
    DatetimeMS: _encode_bson_type,
    Regex: _encode_bson_type,
    Code: _encode_bson_type,
}

_MOMENTS: Final = frozenset({datetime, date, time, timedelta})
_NUMPY_ITEMS: Final[dict[str, tuple[type, ...]]] = {
    "b": (bool,),
    "i": (int,),
    "u": (int,),
    "f": (float,),
    "M": (datetime, date),
    "m": (timedelta,),
}
"""The accepted Python types by kind of NumPy scalar. A date with nanoseconds becomes a number and is refused."""

_CONVERSIONS: Final = (
    ("tolist", ".tolist()"),
    ("to_dict", ".to_dict()"),
    ("model_dump", ".model_dump()"),
    ("__dataclass_fields__", "dataclasses.asdict()"),
    ("__fspath__", "str()"),
    ("_value2member_map_", ".value"),
)
"""Attributes of types that can be converted to a storable value, and the conversion that an error suggests."""

_HASHABLE: Final = _NATIVE | _SCALARS.keys() | {str, int, tuple, frozenset}

_BASES: Final[tuple[tuple[type, Callable[[Any], Any]], ...]] = (
    # The types' own conversions: an Enum of strings overrides `__str__`.
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (bytes, bytes.__bytes__),
    (dict, dict),
    (list, list),
    (tuple, tuple),
    (set, set),
    (frozenset, frozenset),
    (datetime, lambda value: datetime.combine(datetime.date(value), datetime.timetz(value))),
    (date, lambda value: date(value.year, value.month, value.day)),
    (time, lambda value: time.fromisoformat(time.isoformat(value))),
    (timedelta, lambda value: timedelta(value.days, value.seconds, value.microseconds)),
    (bytearray, bytearray),
    (Decimal, Decimal),
    (UUID, lambda value: UUID(bytes=value.bytes)),
)


def _read(convert: Callable[[Any], Any], value: Any) -> Any:
    """Convert a value whose type can override methods, which can raise any exception."""
    try:
        return convert(value)
    except (_RefusedError, RecursionError):
        raise
    except Exception as error:
        raise _RefusedError(f"a {_type_name(value)} that cannot be read ({type(error).__name__})") from None


def _base_of(value: Any) -> Any:
    """Convert a value to its supported base type, or to an equal value of a supported type."""
    for base, convert in _BASES:
        if isinstance(value, base):
            converted = convert(value)
            # A pandas timestamp can have nanoseconds; a mock can only claim to be of this type.
            is_unsure = base in _MOMENTS or not issubclass(type(value), base)
            if is_unsure and not converted == value:
                raise _RefusedError(f"a {_type_name(value)} that does not equal its {base.__name__}")
            return converted
    if type(value) is memoryview:
        if (data := value.tobytes()) == value:
            return data
        raise _RefusedError("a memoryview of other items than bytes", ": convert it with .tolist()")
    if _is_numpy_scalar(value):
        item = value.item()
        if type(item) in _NUMPY_ITEMS.get(value.dtype.kind, ()) and (item == value or item != item):
            return item
        raise _RefusedError(f"a {_type_name(value)} that no number or date equals", ": convert it first")
    raise _RefusedError(f"a value of the unsupported type {_type_name(value)}", _advice(value))


def _is_numpy_scalar(value: Any) -> bool:
    """Return whether a value is a NumPy scalar: by name, because NumPy is not a dependency."""
    return any(base.__name__ == "generic" and base.__module__ == "numpy" for base in type(value).__mro__)


def _advice(value: Any) -> str:
    """Return the conversion that an error suggests for a value of an unsupported type."""
    kind = type(value)
    for method, call in _CONVERSIONS:
        if hasattr(kind, method):
            return f": convert it with {call}"
    return ": convert it to a dict, list, str, number or bytes"


def _distinct_bases(members: Iterable[Any]) -> list[Any]:
    """Return keys of a dict or members of a set as what they are when they come back."""
    bases = [member if type(member) in _HASHABLE else _read(_base_of, member) for member in members]
    try:
        distinct = len(set(bases)) == len(bases)
    except TypeError:
        distinct = False
    if not distinct:
        raise _RefusedError("a dict or set with members of derived types that are not distinct as their base types")
    return bases


def subscript(key: Any) -> str:
    """Return the form of a key in errors; a key that is not a plain name can hold content and is not shown."""
    return f"[{key!r}]" if type(key) is str and _PLAIN_NAME.fullmatch(key) else "[<key>]"


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _dump(value: Any) -> bytes:
    return bson.encode({"v": value}, codec_options=CODEC_OPTIONS)


def _load(data: bytes) -> Any:
    try:
        return bson.decode(data, CODEC_OPTIONS)["v"]
    except InvalidBSON as error:
        # PyMongo reports the end of the stack like malformed data; the words are CPython's, up to 3.13 and from 3.14.
        if str(error).startswith(("maximum recursion depth", "Stack overflow")):
            raise RecursionError(str(error)) from error
        raise


class _TooDeepError(Exception):
    """A stored value has more levels than `encode` writes."""


def _decode(stored: Any, nesting: int) -> Any:
    kind = type(stored)
    if kind is dict or kind is list:
        if nesting <= 0:
            raise _TooDeepError
        nesting -= 1
    if kind is dict:
        if len(stored) == 2:
            if MARKER in stored and type(stored[MARKER]) is str and "v" in stored:
                return _decode_marked(stored[MARKER], stored["v"], nesting)
            if stored.get(_LEGACY_MARKER) is True and type(stored.get("data")) is str:
                with suppress(ValueError):
                    return base64.b64decode(stored["data"], validate=True)
        if MARKER in stored:
            _note_foreign(stored[MARKER])
        decoded = {}
        for key, item in stored.items():
            decoded[key] = _decode(item, nesting)
        return decoded
    if kind is list:
        return list(map(_decode, stored, repeat(nesting)))
    if kind is Binary and stored.subtype == UUID_SUBTYPE and len(stored) == 16:
        return stored.as_uuid()
    return int(stored) if kind is Int64 else stored


def _decode_marked(tag: str, value: Any, nesting: int) -> Any:
    if tag in _COLLECTIONS and type(value) is list:
        # Decoded once, before it shows whether the form is well-formed: forms within forms stay linear.
        members: list[Any] = []
        for member in value:
            is_pair = tag == "dict" and type(member) is list
            members.append(list(map(_decode, member, repeat(nesting))) if is_pair else _decode(member, nesting))
        try:
            return _collect(tag, members)
        except (ValueError, TypeError):
            _note_foreign(tag)
            return _marked(tag, members)
    try:
        if tag in _FROM_TEXT and type(value) is str:
            return _FROM_TEXT[tag](value)
        if tag == "binary" and type(value) is bytes:
            return Binary(value[1:], value[0])
        if tag == "bytearray" and type(value) is bytes:
            return bytearray(value)
        packed = tag == "bson" and type(value) is bytes
        inner = _load(value) if packed else value
    except (BSONError, ValueError, ArithmeticError, LookupError):
        _note_foreign(tag)
        return _marked(tag, value)
    except RecursionError:
        if not _has_stack():
            raise
        _note_foreign(tag)
        return _marked(tag, value)
    if not packed:
        _note_foreign(tag)
        return _marked(tag, _decode(inner, nesting))
    try:
        return _decode(inner, nesting + 1)
    except _TooDeepError:
        _note_foreign(tag)
        return _marked(tag, value)


def _note_foreign(tag: Any) -> None:
    if (found := _foreign.get()) is not None:
        found.append(tag)


def _has_stack() -> bool:
    """Return whether half of the stack is left: decoding a packed form of `encode` needs less."""
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    return depth < sys.getrecursionlimit() // 2


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

_FROM_TEXT: Final[dict[str, Callable[[str], Any]]] = {
    "int": lambda text: int(text, 0),
    "str": lambda text: _ESCAPE.sub(lambda match: chr(int(match[1], 16)) if match[1] else "\\", text),
    "decimal": Decimal,
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timedelta": lambda text: timedelta(microseconds=int(text)),
}
