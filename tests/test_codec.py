"""Values come back as they went in: the codec alone, through the bytes of BSON."""

from __future__ import annotations

import array
import copy
import dataclasses
import enum
import inspect
import math
import re
import sys
import traceback
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any
from unittest.mock import MagicMock
from uuid import UUID
from zoneinfo import ZoneInfo

import bson
import numpy as np
import pytest
from bson import Binary, Code, DBRef, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.datetime_ms import DatetimeMS
from hypothesis import given, settings
from hypothesis import strategies as st

from fix_codec import hashables, keys, scalars, through_bson, values
from mongodb_session_manager._format.codec import MARKER, MAX_LEVELS, MAX_NESTING, decode, encode
from mongodb_session_manager.errors import EncodingError
from support import alternating

MESSAGE_DEPTH = 6

more = settings(max_examples=2 * settings.default.max_examples)


def round_trip(value: Any, depth: int = MESSAGE_DEPTH) -> Any:
    return decode(through_bson(encode(value, depth=depth)))


def tokens(value: Any) -> list[Any]:
    """A flat description in which equal means equal in value, type and order, at any nesting."""
    flat: list[Any] = []

    def walk(part: Any) -> None:
        kind = type(part)
        flat.append(kind)
        if kind is dict:
            flat.append(len(part))
            for key, item in part.items():
                walk(key)
                walk(item)
        elif kind is list or kind is tuple:
            flat.append(len(part))
            for item in part:
                walk(item)
        elif kind is set or kind is frozenset:
            flat.append(sorted(map(repr, map(tokens, part))))
        elif kind is datetime or kind is time:
            flat.append((part.isoformat(), part.utcoffset()))
        elif kind is float or kind is Decimal:
            flat.append(repr(part))
        else:
            flat.append(part)

    walk(value)
    return flat


def levels(stored: Any) -> int:
    """Levels of containers that the server would count."""
    if not isinstance(stored, (dict, list)):
        return 0
    return 1 + max(map(levels, stored.values() if isinstance(stored, dict) else stored), default=0)


def nested(wrappers: list[str], core: Any = 1) -> Any:
    value = core
    for wrapper in wrappers:
        value = WRAPPERS[wrapper](value)
    return value


WRAPPERS = {
    "list": lambda inner: [inner],
    "dict": lambda inner: {"a": inner},
    "tuple": lambda inner: (0, inner),
    "pairs": lambda inner: {1: inner, "a": None},
    "wide": lambda inner: {"text": "x", "list": [1, {"b": b"x"}], "inner": inner},
}


class Colour(str, enum.Enum):  # noqa: UP042  unlike StrEnum's, its `str()` is not the text
    RED = "red"


class Label(str):
    """A text that is equal to itself only."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class Number(enum.IntEnum):
    ONE = 1


Point = namedtuple("Point", "x y")


class AnyInstant(datetime):
    pass


def holding_itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["a"] = [value]
    return value


class Tags(list):  # type: ignore[type-arg]
    pass


class Nanoseconds(datetime):
    """Like `pandas.Timestamp`."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nanoseconds)

    __hash__ = datetime.__hash__


class HashlessMeta(type):
    def __hash__(cls) -> int:
        raise ZeroDivisionError("secret")


class Hostile:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name: str) -> Any:
        raise ZeroDivisionError("secret")

    def _raise(self, *args: object) -> Any:
        raise ZeroDivisionError("secret")

    __eq__ = __hash__ = __repr__ = __str__ = __len__ = __iter__ = __bool__ = __index__ = _raise


class HostileDict(Hostile, dict):  # type: ignore[type-arg]
    keys = items = values = __getitem__ = Hostile._raise


class HostileList(Hostile, list):  # type: ignore[type-arg]
    pass


class HostileText(Hostile, str):
    __str__ = encode = isascii = Hostile._raise


class HostileInt(Hostile, int):
    __int__ = bit_length = Hostile._raise


class HostileDate(Hostile, datetime):
    isoformat = utcoffset = timetz = Hostile._raise


class HostileBytes(Hostile, bytearray):
    __bytes__ = Hostile._raise


class Nowhere(tzinfo):
    def utcoffset(self, moment: datetime | None) -> timedelta:
        raise ZeroDivisionError("secret")


class Hashless(metaclass=HashlessMeta):
    pass


@dataclasses.dataclass
class Place:
    name: str = "secret"


def without_addresses(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+| id='\d+'", "", repr(value))[:50]


def released() -> memoryview:
    view = memoryview(b"secret")
    view.release()
    return view


HOSTILE: list[Callable[[], Any]] = [
    Hostile,
    HostileDict,
    lambda: HostileDict(a=1),
    lambda: HostileList([1]),
    lambda: HostileText("secret"),
    lambda: HostileText("\ud83d"),
    lambda: HostileInt(5),
    lambda: HostileInt(2**70),
    lambda: HostileDate(2026, 1, 2),
    lambda: HostileBytes(b"x"),
    lambda: datetime(2026, 1, 2, tzinfo=Nowhere()),
    lambda: time(1, 2, tzinfo=Nowhere()),
    lambda: Hashless(),
    Place,
    released,
    lambda: memoryview(array.array("i", [1])),
    lambda: MagicMock(spec=dict),
    lambda: MagicMock(spec=str),
    lambda: (number for number in [1]),
    lambda: np.array([1.5]),
    lambda: np.longdouble(1) / 3,
    lambda: np.datetime64("2026-01-02T03:04:05.000000001"),
    lambda: np.timedelta64("NaT", "s"),
    lambda: np.complex64(1),
    lambda: Ellipsis,
    lambda: Nanoseconds(2026, 1, 2),
    lambda: type("Any", (), {"__slots__": ()}),
    holding_itself,
]


nestings = st.tuples(
    st.integers(1, 200), st.lists(st.sampled_from(sorted(WRAPPERS)), min_size=1, max_size=7), scalars
).map(lambda drawn: nested((drawn[1] * drawn[0])[: drawn[0]], drawn[2]))


NATIVE = [
    {"role": "user", "content": [{"text": "¿Qué tal? 😀"}, {"image": {"format": "png", "source": {"bytes": b"\x89"}}}]},
    {"": {"": 1}, "a.b": 1, ".": 2, "$set": {"$x": 1}, "$id": 3, "$db": "d", "_id": 4, "v": 5, "data": 6},
    {"__bytes_encoded__": True, "data": "aGk=", "more": 1},
    "a\0b",
    b"",
    None,
    True,
    1,
    2**63 - 1,
    -(2**63),
    1.0,
    -0.0,
    math.inf,
    ObjectId("0123456789abcdef01234567"),
    Decimal128("1.10"),
    Regex("^a", "im"),
    Code("f()"),
    Timestamp(1, 2),
    MinKey(),
    MaxKey(),
    Binary(b"x", 5),
    Binary(b"x" * 16, 3),
    datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC),
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999000, tzinfo=UTC),
]

MARKED = [
    (2**64, {"__msm__": "int", "v": "18446744073709551616"}),
    (-(2**2000), {"__msm__": "int", "v": "-0x1" + "0" * 500}),
    ("half an emoji: \ud83d\\", {"__msm__": "str", "v": "half an emoji: \\ud83d\\\\"}),
    ((1, [2]), {"__msm__": "tuple", "v": [1, [2]]}),
    ({1}, {"__msm__": "set", "v": [1]}),
    (frozenset({(1,)}), {"__msm__": "frozenset", "v": [{"__msm__": "tuple", "v": [1]}]}),
    ({"a\0": 1, "b": 2}, {"__msm__": "dict", "v": [["a\0", 1], ["b", 2]]}),
    ({"\ud83d": 1}, {"__msm__": "dict", "v": [[{"__msm__": "str", "v": "\\ud83d"}, 1]]}),
    ({1: "a", None: "b", 1.5: "c"}, {"__msm__": "dict", "v": [[1, "a"], [None, "b"], [1.5, "c"]]}),
    ({True: 1}, {"__msm__": "dict", "v": [[True, 1]]}),
    ({"$ref": "users", "$id": 1}, {"__msm__": "dict", "v": [["$ref", "users"], ["$id", 1]]}),
    ({"__msm__": "int", "v": "1"}, {"__msm__": "dict", "v": [["__msm__", "int"], ["v", "1"]]}),
    (
        {"__bytes_encoded__": True, "data": "aGk="},
        {"__msm__": "dict", "v": [["__bytes_encoded__", True], ["data", "aGk="]]},
    ),
    (datetime(2026, 1, 2, 3, 4, 5), {"__msm__": "datetime", "v": "2026-01-02T03:04:05"}),
    (datetime(2026, 1, 2, 3, 4, 5, 6, UTC), {"__msm__": "datetime", "v": "2026-01-02T03:04:05.000006+00:00"}),
    (
        datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=-5))),
        {"__msm__": "datetime", "v": "2026-01-02T03:00:00-05:00"},
    ),
    (date(2026, 1, 2), {"__msm__": "date", "v": "2026-01-02"}),
    (time(3, 4), {"__msm__": "time", "v": "03:04:00"}),
    (Decimal("1.10"), {"__msm__": "decimal", "v": "1.10"}),
    (Binary(b"x", 4), {"__msm__": "binary", "v": b"\x04x"}),
    (bytearray(b"x"), {"__msm__": "bytearray", "v": b"x"}),
    (timedelta(1, 2, 3), {"__msm__": "timedelta", "v": "86402000003"}),
    (timedelta.min, {"__msm__": "timedelta", "v": "-86399999913600000000"}),
    (timedelta.max, {"__msm__": "timedelta", "v": "86399999999999999999"}),
    ({timedelta(0): 1}, {"__msm__": "dict", "v": [[{"__msm__": "timedelta", "v": "0"}, 1]]}),
]


@pytest.mark.parametrize("value", NATIVE, ids=repr)
def test_what_bson_holds_is_stored_as_it_is(value: Any) -> None:
    assert tokens(encode(value)) == tokens(value)
    assert tokens(round_trip(value)) == tokens(value)


@pytest.mark.parametrize(("value", "stored"), MARKED, ids=lambda value: repr(value)[:60])
def test_the_rest_is_stored_in_a_marked_form(value: Any, stored: Any) -> None:
    assert tokens(encode(value)) == tokens(stored)
    assert tokens(round_trip(value)) == tokens(value)


def test_uuid_is_stored_natively_whatever_the_representation_of_the_writer() -> None:
    value = UUID("12345678-1234-5678-1234-567812345678")
    assert encode(value) == Binary(value.bytes, 4)
    assert round_trip(value) == value


@pytest.mark.parametrize(
    ("value", "base"),
    [
        (Colour.RED, "red"),
        (Number.ONE, 1),
        (Int64(5), 5),
        (Binary(b"x"), b"x"),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(list, a=[1]), {"a": [1]}),
        ({Colour.RED: 1}, {"red": 1}),
        ({Number.ONE: 1}, {1: 1}),
        (Point(1, [2]), (1, [2])),
        (Tags([1]), [1]),
        (AnyInstant(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)),
        (AnyInstant(2026, 1, 2, 3, 4, 5, 6), datetime(2026, 1, 2, 3, 4, 5, 6)),
    ],
    ids=repr,
)
def test_subclasses_come_back_as_their_base(value: Any, base: Any) -> None:
    assert tokens(round_trip(value)) == tokens(base)


@pytest.mark.parametrize(
    ("value", "equal"),
    [
        (np.float64(1.5), 1.5),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float16(-0.0), -0.0),
        (np.float32("inf"), math.inf),
        (np.int8(-1), -1),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.str_("text \ud83d"), "text \ud83d"),
        (np.bytes_(b"x"), b"x"),
        (np.datetime64("2026-01-02"), date(2026, 1, 2)),
        (np.datetime64("2026-01-02T03:04:05.000006"), datetime(2026, 1, 2, 3, 4, 5, 6)),
        (np.timedelta64(90, "s"), timedelta(seconds=90)),
        ({np.int64(1): np.int64(2)}, {1: 2}),
        ({np.float32(0.5)}, {0.5}),
        (memoryview(b"x\0"), b"x\0"),
        (memoryview(bytearray(b"abcd"))[::2], b"ac"),
        ({memoryview(b"x")}, {b"x"}),
    ],
    ids=without_addresses,
)
def test_scalars_of_numpy_and_views_of_bytes_come_back_as_what_they_equal(value: Any, equal: Any) -> None:
    back = round_trip(value)
    assert tokens(back) == tokens(equal)
    assert back == value


def test_a_numpy_float_that_is_no_number_comes_back_as_one() -> None:
    assert math.isnan(round_trip(np.float32("nan")))


def test_an_integer_beyond_the_digits_python_reads_comes_back() -> None:
    value = -(10**5000)
    assert round_trip(value) == value


def test_a_named_zone_comes_back_as_its_offset() -> None:
    back = round_trip(datetime(2026, 7, 1, 12, tzinfo=ZoneInfo("Europe/Madrid")))
    assert back == datetime(2026, 7, 1, 10, tzinfo=UTC)
    assert back.utcoffset() == timedelta(hours=2)


@pytest.mark.parametrize(
    ("stored", "value"),
    [
        ({"__bytes_encoded__": True, "data": "aGk="}, b"hi"),
        ({"bytes": {"__bytes_encoded__": True, "data": ""}}, {"bytes": b""}),
        ([{"__bytes_encoded__": True, "data": "a"}], [{"__bytes_encoded__": True, "data": "a"}]),
        ({"__bytes_encoded__": True, "data": "é==="}, {"__bytes_encoded__": True, "data": "é==="}),
        ({"__bytes_encoded__": 1, "data": "aGk="}, {"__bytes_encoded__": 1, "data": "aGk="}),
        ({"__bytes_encoded__": True, "data": b"aGk="}, {"__bytes_encoded__": True, "data": b"aGk="}),
    ],
)
def test_bytes_of_the_original_library_are_read(stored: Any, value: Any) -> None:
    assert tokens(decode(through_bson(stored))) == tokens(value)


@pytest.mark.parametrize(
    "stored",
    [
        {"__msm__": "unknown", "v": 1},
        {"__msm__": ["tuple"], "v": [1]},
        {"__msm__": None, "v": [1]},
        {"__msm__": "tuple"},
        {"__msm__": "tuple", "v": 5},
        {"__msm__": "tuple", "v": [1], "more": 1},
        {"__msm__": "set", "v": [[1]]},
        {"__msm__": "set", "v": [1, 1]},
        {"__msm__": "dict", "v": [[1]]},
        {"__msm__": "dict", "v": ["ab"]},
        {"__msm__": "dict", "v": [[[], 1]]},
        {"__msm__": "dict", "v": [[1, 1], [1, 2]]},
        {"__msm__": "int", "v": "many"},
        {"__msm__": "int", "v": 5},
        {"__msm__": "decimal", "v": "x"},
        {"__msm__": "datetime", "v": "yesterday"},
        {"__msm__": "time", "v": "25:00"},
        {"__msm__": "binary", "v": b""},
        {"__msm__": "bytearray", "v": "text"},
        {"__msm__": "timedelta", "v": "an hour"},
        {"__msm__": "timedelta", "v": "9" * 30},
        {"__msm__": "bson", "v": b"x"},
        {"__msm__": "bson", "v": bson.encode({"other": 1})},
    ],
    ids=repr,
)
def test_a_marked_form_of_somebody_else_is_read_as_the_dict_it_is(stored: Any) -> None:
    assert tokens(decode(through_bson(stored))) == tokens(stored)
    assert tokens(round_trip(stored)) == tokens(stored)


def test_the_values_of_an_unknown_form_are_decoded() -> None:
    stored = {"__msm__": "later", "v": [{"__msm__": "tuple", "v": [1]}, {"__bytes_encoded__": True, "data": "aGk="}]}
    assert decode(stored) == {"__msm__": "later", "v": [(1,), b"hi"]}


def test_malformed_forms_within_each_other_take_linear_time() -> None:
    stored: Any = 1
    for _ in range(80):
        stored = {"__msm__": "set", "v": [[stored]]}
    assert decode(stored) == stored


@given(values)
@more
def test_every_value_comes_back_equal_and_of_the_same_types_and_shares_nothing_that_changes(value: Any) -> None:
    wanted = tokens(value)
    stored = encode(value)
    through = through_bson(stored)
    before, through_before = bson.encode({"v": stored}), tokens(copy.deepcopy(through))
    back = decode(through)
    assert tokens(back) == wanted
    assert tokens(round_trip(value)) == wanted  # also at the depth of a message
    scramble(back)
    assert tokens(through) == through_before
    scramble(value)
    assert bson.encode({"v": stored}) == before


def scramble(value: Any) -> None:
    if isinstance(value, dict):
        for item in list(value.values()):
            scramble(item)
        value["scrambled"] = True
    elif isinstance(value, (list, tuple)):
        for item in value:
            scramble(item)
        if isinstance(value, list):
            value.append("scrambled")
    elif isinstance(value, set):
        value.add("scrambled")
    elif isinstance(value, bytearray):
        value += b"scrambled"


def attempt(value: Any, depth: int = 0) -> tuple[Any, str | None]:
    """Return what is stored of a value, or the traceback of why it is not."""
    try:
        return encode(value, depth=depth), None
    except EncodingError as error:
        return None, "".join(traceback.format_exception_only(error))


def made(value: Any) -> Any:
    """Put what the makers in `HOSTILE` make in their place: Hypothesis looks at what it draws."""
    if type(value) in (list, tuple):
        return type(value)(map(made, value))
    if type(value) is dict:
        return {key: made(item) for key, item in value.items()}
    return value() if inspect.isfunction(value) or isinstance(value, type) else value


oddities = st.recursive(
    values | st.sampled_from(HOSTILE),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys | hashables, inner, max_size=3),
        st.builds(nested, st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=150), inner),
    ),
    max_leaves=8,
).map(lambda value: [made(value)])


@given(oddities, st.integers(1, 10))
@more
def test_whatever_is_encoded_is_stored_and_comes_back_or_is_refused(value: Any, depth: int) -> None:
    stored, refusal = attempt(value, depth)
    if refusal is not None:
        assert "secret" not in refusal
    else:
        assert depth + levels(stored) <= MAX_LEVELS
        back = decode(through_bson(stored))
        assert tokens(decode(through_bson(encode(back)))) == tokens(back)


@pytest.mark.parametrize("make", HOSTILE)
def test_a_value_that_resists_is_refused_or_comes_back(make: Callable[[], Any]) -> None:
    wraps: list[Callable[[Any], Any]] = [
        lambda value: value,
        lambda value: {"a": [value]},
        lambda value: (1, {2: value}),
    ]
    for wrap in wraps:
        stored, refusal = attempt(wrap(make()))
        if refusal is not None:
            assert "secret" not in refusal
        else:
            plain = ({}, [1], "secret", "\ud83d", bytearray(b"x"))
            assert decode(through_bson(stored)) in [wrap(each) for each in plain]


@given(nestings, st.integers(1, 10))
@more
def test_deep_nesting_comes_back_and_fits_the_server(value: Any, depth: int) -> None:
    stored = encode(value, depth=depth)
    assert depth + levels(stored) <= MAX_LEVELS
    assert tokens(decode(through_bson(stored))) == tokens(value)


@pytest.mark.parametrize("wrapper", ["list", "dict", "tuple", "pairs"])
def test_nesting_stays_readable_up_to_the_limit_of_a_document(wrapper: str) -> None:
    assert MARKER not in encode(nested(["list"] * (MAX_LEVELS - MESSAGE_DEPTH - 1)), depth=MESSAGE_DEPTH)
    value = nested([wrapper] * MAX_NESTING)
    stored = encode(value, depth=MESSAGE_DEPTH)
    assert MESSAGE_DEPTH + levels(stored) <= MAX_LEVELS
    assert tokens(decode(through_bson(stored))) == tokens(value)


@pytest.mark.parametrize("wrapper", alternating(*sorted(WRAPPERS)))
@pytest.mark.parametrize("count", alternating(MAX_NESTING + 1, 5000, 100_000))
def test_deeper_nesting_is_refused(wrapper: str, count: int) -> None:
    value = nested([wrapper] * count)
    with pytest.raises(EncodingError, match=f"nested deeper than {MAX_NESTING} levels"):
        encode(value, depth=MESSAGE_DEPTH)


@pytest.mark.parametrize("wrapper", ["list", "dict", "pairs"])
def test_a_value_that_holds_itself_is_refused(wrapper: str) -> None:
    inner: list[Any] = []
    value = nested([wrapper] * 3, inner)
    inner.append(value)
    with pytest.raises(EncodingError, match="contains itself"):
        encode(value)


def test_where_the_stack_ends_nothing_comes_back_wrong(some: Callable[[list[int], int], list[int]]) -> None:
    value = nested(["pairs"] * 200)
    stored = through_bson(encode(value))
    expected = tokens(value), tokens(encode(value))
    refusals: list[str] = []

    def with_room(room: int, act: Callable[[Any], Any], argument: Any) -> Any:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(len(inspect.stack(0)) + room)
        try:
            return act(argument)
        except EncodingError as error:
            refusals.append(str(error))
            return None
        finally:
            sys.setrecursionlimit(limit)

    for room in some([*range(40, 140, 3), *range(140, 700, 20)], 12):
        refusals.clear()
        results = with_room(room, decode, stored), with_room(room, encode, value)
        for result, right in zip(results, expected, strict=True):
            assert result is None or tokens(result) == right
        assert all("deeper than Python's stack" in refusal for refusal in refusals)
        assert len(refusals) == 2 or room > 100


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "unsupported type object, at value: convert it to a dict, list, str, number or bytes$"),
        (
            {"content": [1, {"json": test_deeper_nesting_is_refused}]},
            r"type function, at value\['content'\]\[1\]\['json'\]: ",
        ),
        ({"content": {"a secret": re.compile("")}}, r"type re.Pattern, at value\['content'\]\[<key>\]: "),
        ({"x" * 41: object()}, r"at value\[<key>\]: "),
        ({"clé": object()}, r"at value\[<key>\]: "),
        ({1: {2: object()}}, r"at value\[<key>\]\[<key>\]: "),
        ({1: 1, (object(),): 2}, r"at value\[<key>\]\[0\]: "),
        ({object(): 1}, "unsupported type object, at value: "),
        ((1, {object()}), r"at value\[1\]: "),
        (Ellipsis, "type ellipsis"),
        (re.compile("secret"), "type re.Pattern"),
        (enum.Enum("Plain", "A").A, "Plain, at value: convert it with .value$"),
        (Place(), r"Place, at value: convert it with dataclasses.asdict\(\)$"),
        (PurePosixPath("secret"), r"PurePosixPath, at value: convert it with str\(\)$"),
        ({"a": np.array(["secret"])}, r"type numpy.ndarray, at value\['a'\]: convert it with .tolist\(\)$"),
        ({"a": array.array("i", [1])}, r"type array.array, at value\['a'\]: convert it with .tolist\(\)$"),
        (memoryview(array.array("i", [1])), r"memoryview of other items than bytes, at value: .* .tolist\(\)$"),
        (np.longdouble(1) / 3, r"numpy.longdouble that no number or date equals, at value: convert it first$"),
        (np.datetime64(1, "ns"), r"numpy.datetime64 that no number or date equals, at value: convert it first$"),
        (np.timedelta64(1, "ns"), r"numpy.timedelta64 that no number or date equals, at value: convert it first$"),
        (Nanoseconds(2026, 1, 2), "Nanoseconds that does not equal its datetime, at value$"),
        ({"b": [released()]}, r"a memoryview that cannot be read \(ValueError\), at value\['b'\]\[0\]$"),
        (MagicMock(spec=dict), "unittest.mock.MagicMock that does not equal its dict, at value$"),
        (1j, "type complex"),
        (DBRef("secret", 1), "type bson.dbref.DBRef"),
        (DatetimeMS(1), "bson.datetime_ms.DatetimeMS that BSON does not preserve"),
        (Code("secret()", {"a": 1}), "bson.code.Code that BSON does not preserve"),
        (Regex(b"secret"), "bson.regex.Regex that BSON does not preserve"),
        (Regex("secret\0"), "bson.regex.Regex that BSON does not preserve"),
        (Code("secret\ud83d"), "bson.code.Code that BSON does not preserve"),
        ({Label("red"): 1, "red": 2}, "not distinct"),
        ({Label("red"), "red"}, "not distinct"),
        (datetime(2026, 1, 2, tzinfo=timezone(timedelta(microseconds=1))), "offset of less than a second"),
    ],
    ids=without_addresses,
)
def test_what_cannot_be_stored_is_refused_without_showing_it(value: Any, message: str) -> None:
    with pytest.raises(EncodingError, match=message) as raised:
        encode(value)
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_long_way_is_cut() -> None:
    with pytest.raises(EncodingError, match=r"at value(\['a'\]){12}\.\.\.: "):
        encode(nested(["dict"] * 50, object()))
