"""Values of every kind that agents and applications store."""

from __future__ import annotations

from datetime import UTC, timedelta, timezone
from typing import Any

import bson
from bson import Binary, Code, Decimal128, MinKey, ObjectId, Regex, Timestamp
from hypothesis import strategies as st

from mongodb_session_manager._format.codec import CODEC_OPTIONS, MARKER
from mongodb_session_manager._format.decoder import _COLLECTIONS, _SCALARS


def through_bson(stored: Any) -> Any:
    return bson.decode(bson.encode({"v": stored}), CODEC_OPTIONS)["v"]


keys = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["", "$ref", "$id", "$db", "a.b", ".", "$", "$set", "$literal", "$each", "_id", "a\0b", "\0", "\ud83d"]
    ),
    st.sampled_from([MARKER, "v", "__bytes_encoded__", "data"]),
    st.text(st.characters(), max_size=4),
)


any_text = st.text(st.characters(), max_size=20) | st.text("\\u\ud83d\ude00d0é\0", max_size=8)


numbers = (
    st.integers() | st.integers(-(2**65), 2**65) | st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**14000])
)


offsets = st.timedeltas(timedelta(seconds=1), timedelta(hours=23))


zones = st.none() | st.just(UTC) | (offsets | offsets.map(lambda offset: -offset)).map(timezone)


instants = st.datetimes(timezones=zones) | st.datetimes().map(
    lambda moment: moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=UTC)
)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.floats(),
    any_text,
    st.binary(max_size=12),
    instants,
    st.dates(),
    st.times(timezones=zones),
    st.decimals(),
    st.timedeltas(),
    st.binary(max_size=4).map(bytearray),
    st.uuids(),
    st.sampled_from([ObjectId("0" * 24), Decimal128("1.10"), Timestamp(1, 2), Regex("a", "i"), Code("f()"), MinKey()]),
    st.builds(Binary, st.binary(max_size=4), st.sampled_from([2, 3, 4, 5, 6, 128])),
)


hashables = st.recursive(
    st.one_of(st.none(), numbers, st.floats(allow_nan=False), any_text, st.binary(max_size=4), st.dates(), st.uuids())
    | st.timedeltas(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)


look_alikes = st.one_of(
    st.builds(
        lambda tag, value: {MARKER: tag, "v": value},
        st.sampled_from([*(tag for tag, _ in _SCALARS), *_COLLECTIONS, "bson", "unknown", 3, ["x"]]),
        st.one_of(any_text, st.just([]), st.just([[1, 2]]), st.just([[[], 1], [1, 1]]), st.binary(max_size=6)),
    ),
    st.builds(
        lambda flag, data: {"__bytes_encoded__": flag, "data": data},
        st.sampled_from([True, 1, None]),
        st.sampled_from(["aGk=", "", "?", "é", b"aGk="]),
    ),
    st.just({"$ref": "users", "$id": 1}),
)


values = st.recursive(
    scalars | look_alikes,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(hashables, inner, max_size=3),
        st.sets(hashables, max_size=3),
        st.builds(lambda tag, value: {MARKER: tag, "v": value}, keys, inner),
    ),
    max_leaves=20,
)
