"""Encoding values, see `codec`. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError

from .marked import LEGACY_MARKER, MARKER, MAX_LEVELS, MAX_NESTING, dump, load, marked

_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
_NO_TIME: Final = timedelta(0)
_MICROSECOND: Final = timedelta(microseconds=1)
_SHOWN_SEGMENTS: Final = 12
_PLAIN_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")


class RefusedError(Exception):
    """A value cannot be stored; its path is collected while the stack unwinds, innermost segment first."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
        self.path: list[str] = []

    def path_to(self) -> str:
        """Return the subscripts of the value; keys that can contain content are hidden."""
        more = "..." if len(self.path) > _SHOWN_SEGMENTS else ""
        return "".join(self.path[: -_SHOWN_SEGMENTS - 1 : -1]) + more


def encoded(value: Any, room: int, nesting: int) -> Any:
    """Return an encoded value that takes at most `room` levels of the document, and `nesting` of its own.

    Raises:
        RefusedError: The value cannot be stored.
    """
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
        return encoded(_read(_base_of, value), room, nesting)
    if nesting <= 0:
        raise RefusedError(f"a value nested deeper than {MAX_NESTING} levels (or one that contains itself)")
    # A marked or packed form takes one level, which must be left for every member.
    if room <= levels:
        return marked("bson", dump(encoded(value, MAX_LEVELS - 1, nesting)))
    if levels == 1:
        encode_members = _encode_plain_dict if kind is dict else _encode_members
        return encode_members(value, room - 1, nesting - 1)
    if kind is dict:
        return marked("dict", _encode_pairs(value, room - 3, nesting - 1))
    members = value if kind is tuple else _distinct_bases(value)
    return marked(kind.__name__, _encode_members(members, room - 2, nesting - 1))


def _encode_plain_dict(value: dict[str, Any], room: int, nesting: int) -> dict[str, Any]:
    stored = {}
    key = ""
    try:
        for key, item in value.items():
            stored[key] = encoded(item, room, nesting)
    except RefusedError as refused:
        refused.path.append(subscript(key))
        raise
    return stored


def _encode_pairs(value: dict[Any, Any], room: int, nesting: int) -> list[Any]:
    pairs = []
    segment = ""
    try:
        for key, item in value.items():
            segment = "[<key>]"
            encoded_key = encoded(key, room, nesting)
            segment = subscript(key)
            pairs.append([encoded_key, encoded(item, room, nesting)])
    except RefusedError as refused:
        refused.path.append(segment)
        raise
    return pairs


def _encode_members(value: Iterable[Any], room: int, nesting: int) -> list[Any]:
    stored: list[Any] = []
    try:
        for item in value:
            stored.append(encoded(item, room, nesting))  # noqa: PERF401  a comprehension is a frame more per level
    except RefusedError as refused:
        refused.path.append(f"[{len(stored)}]")
        raise
    return stored


def _is_plain(value: dict[Any, Any]) -> bool:
    for key in value:
        if type(key) is not str or "\0" in key or not (key.isascii() or _is_unicode(key)):
            return False
    # "$ref" (with "$id") decodes to a DBRef.
    return not ("$ref" in value or MARKER in value or (LEGACY_MARKER in value and len(value) == 2))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encode_text(text: str) -> Any:
    if _is_unicode(text):
        return text
    return marked("str", text.replace("\\", "\\\\").encode(errors="backslashreplace").decode())


def _encode_big_int(number: int) -> dict[str, Any]:
    # Python can refuse to write or read more than 640 decimal digits (`sys.set_int_max_str_digits`).
    return marked("int", str(number) if number.bit_length() <= 1024 else hex(number))


def _encode_datetime(value: datetime) -> Any:
    if value.microsecond % 1000 == 0 and value.utcoffset() == _NO_TIME:
        return value.replace(tzinfo=UTC)
    return _encode_iso(value)


def _encode_iso(value: date | time) -> dict[str, Any]:
    kind = type(value)
    text = value.isoformat()
    # Python reads an offset of less than a second as none.
    if kind.fromisoformat(text).isoformat() != text:
        raise RefusedError(f"a {_type_name(value)} with an offset of less than a second")
    return marked(kind.__name__, text)


def _encode_bson_type(value: Any) -> Any:
    if isinstance(value, Binary) and value.subtype in (0, 4):
        # Subtype 0 decodes to bytes, and 4 to a UUID where the length allows.
        return bytes(value) if value.subtype == 0 else marked("binary", bytes([4]) + value)
    try:
        same = not (isinstance(value, Code) and value.scope is not None) and load(dump(value)) == value
    except (BSONError, ValueError, TypeError, OverflowError):
        same = False
    if not same:
        raise RefusedError(f"a {_type_name(value)} that BSON does not preserve")
    return value


# Stored unchanged, whatever the value; `float` includes NaN and the infinities.
_NATIVE: Final = frozenset({bool, type(None), float, bytes, ObjectId, Decimal128, Timestamp, MinKey, MaxKey})

_SCALARS: Final[dict[type, Callable[[Any], Any]]] = {
    Int64: int,
    # Independent of the `uuid_representation` it is written with.
    UUID: Binary.from_uuid,
    Decimal: lambda value: marked("decimal", str(value)),
    datetime: _encode_datetime,
    date: _encode_iso,
    time: _encode_iso,
    timedelta: lambda value: marked("timedelta", str(value // _MICROSECOND)),
    bytearray: lambda value: marked("bytearray", bytes(value)),
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
    ("model_dump", ".modeldump()"),
    ("__dataclass_fields__", "dataclasses.asdict()"),
    ("__fspath__", "str()"),
    ("_value2member_map_", ".value"),
)
"""Attributes of types that can be converted to a storable value, and the conversion that an error suggests."""

_HASHABLE: Final = _NATIVE | _SCALARS.keys() | {str, int, tuple, frozenset}

_BASES: Final[tuple[tuple[type, Callable[[Any], Any]], ...]] = (
    # Conversions of the base types: an Enum of strings overrides `__str__`.
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
    except (RefusedError, RecursionError):
        raise
    except Exception as error:
        raise RefusedError(f"a {_type_name(value)} that cannot be read ({type(error).__name__})") from None


def _base_of(value: Any) -> Any:
    for base, convert in _BASES:
        if isinstance(value, base):
            converted = convert(value)
            # A pandas timestamp can have nanoseconds; a mock only pretends to be of this type.
            is_unsure = base in _MOMENTS or not issubclass(type(value), base)
            if is_unsure and not converted == value:
                raise RefusedError(f"a {_type_name(value)} that does not equal its {base.__name__}")
            return converted
    if type(value) is memoryview:
        if (data := value.tobytes()) == value:
            return data
        raise RefusedError("a memoryview of other items than bytes", ": convert it with .tolist()")
    if _is_numpy_scalar(value):
        if type(item := value.item()) in _NUMPY_ITEMS.get(value.dtype.kind, ()):
            return item
        raise RefusedError(f"a {_type_name(value)} that no number or date equals", ": convert it first")
    raise RefusedError(f"a value of the unsupported type {_type_name(value)}", _advice(value))


def _is_numpy_scalar(value: Any) -> bool:
    """Return whether a value is a NumPy scalar: by name, because NumPy is not a dependency."""
    return any(base.__name__ == "generic" and base.__module__ == "numpy" for base in type(value).__mro__)


def _advice(value: Any) -> str:
    kind = type(value)
    for method, call in _CONVERSIONS:
        if hasattr(kind, method):
            return f": convert it with {call}"
    return ": convert it to a dict, list, str, number or bytes"


def _distinct_bases(members: Iterable[Any]) -> list[Any]:
    """Return keys of a dict, or members of a set, as their base types, if they stay distinct."""
    bases = [member if type(member) in _HASHABLE else _read(_base_of, member) for member in members]
    try:
        distinct = len(set(bases)) == len(bases)
    except TypeError:
        distinct = False
    if not distinct:
        raise RefusedError("a dict or set with members of derived types that are not distinct as their base types")
    return bases


def subscript(key: Any) -> str:
    """Return the form of a key in errors; a key that is not a plain name can contain content and is hidden."""
    return f"[{key!r}]" if type(key) is str and _PLAIN_NAME.fullmatch(key) else "[<key>]"


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
