"""Metadata: partial updates from many writers at once, any value, and nothing but metadata."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from bson import Decimal128, ObjectId
from pymongo.collection import Collection
from strands import tool

from fix_kinds import KINDS, Blocking, repositories_of_kinds, session_of_kind
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    AsyncMongoDBSessionRepository,
    EncodingError,
    InvalidArgumentError,
    MongoDBSessionError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionNotFoundError,
)
from support import CommandLog, agent, alternating, message_ids, texts

Stored = Collection[dict[str, Any]]


@pytest.fixture(scope="module")
def repository_of_kind(
    server: str, shared_database: str, shared_factory: Callable[[], tuple[Any, CommandLog]]
) -> Iterator[Callable[[str], Blocking]]:
    with repositories_of_kinds(server, shared_database, shared_factory()[1]) as repository_of_kind:
        yield repository_of_kind


@pytest.fixture(params=KINDS)
def session(
    request: pytest.FixtureRequest,
    factory: MongoDBSessionManagerFactory,
    commands: CommandLog,
    repository_of_kind: Callable[[str], Blocking],
) -> Iterator[Blocking]:
    with session_of_kind(request.param, factory, repository_of_kind) as session:
        commands.clear()
        yield session


def metadata_of(stored: Stored) -> Any:
    return stored.find_one({"_id": "s"})["metadata"]


def test_update_sets_the_given_keys_and_keeps_the_others(session: Blocking, stored: Stored) -> None:
    assert session.get_metadata() == {"metadata": {}}
    session.update_metadata({"topic": "travel", "step": 1})
    session.update_metadata({"step": 2, "city": {"name": "Oslo"}})
    assert session.get_metadata() == {"metadata": {"topic": "travel", "step": 2, "city": {"name": "Oslo"}}}
    assert metadata_of(stored) == {"topic": "travel", "step": 2, "city": {"name": "Oslo"}}


def test_a_dot_sets_and_deletes_a_nested_key(session: Blocking) -> None:
    session.update_metadata({"city": {"name": "Oslo", "rain": True}, "topic": "travel"})
    session.update_metadata({"city.name": "Bergen", "user.address.zip": "5003"})
    session.delete_metadata(["city.rain"])
    assert session.get_metadata() == {
        "metadata": {"city": {"name": "Bergen"}, "topic": "travel", "user": {"address": {"zip": "5003"}}}
    }


def test_a_dict_as_value_replaces_the_one_before(session: Blocking) -> None:
    session.update_metadata({"city": {"name": "Oslo", "rain": True}})
    session.update_metadata({"city": {"name": "Rome"}})
    assert session.get_metadata() == {"metadata": {"city": {"name": "Rome"}}}


def test_delete_removes_the_given_keys_and_minds_no_unknown_ones(session: Blocking) -> None:
    session.update_metadata({"a": 1, "b": 2, "c": 3})
    session.delete_metadata(["a", "unknown", "c.unknown", "x.y"])
    assert session.get_metadata() == {"metadata": {"b": 2, "c": 3}}
    session.delete_metadata([])
    assert session.get_metadata() == {"metadata": {"b": 2, "c": 3}}


def test_delete_takes_a_key_twice(session: Blocking) -> None:
    session.update_metadata({"a": 1, "b": 2})
    session.delete_metadata(["a", "a"])
    assert session.get_metadata() == {"metadata": {"b": 2}}


def test_each_call_is_one_command(session: Blocking, commands: CommandLog) -> None:
    session.update_metadata({"a": 1, "b.c": 2})
    session.get_metadata()
    session.delete_metadata(["a", "b"])
    session.update_metadata({})
    assert commands.names == ["update", "find", "update", "update"]


def test_a_change_moves_updated_at_and_nothing_else(session: Blocking, stored: Stored) -> None:
    before = stored.find_one({"_id": "s"})
    session.update_metadata({"a": 1})
    after = stored.find_one({"_id": "s"})
    # Each client reads the clock of the server for itself, to within a round trip.
    assert after.pop("updated_at") >= before.pop("updated_at") - timedelta(seconds=1)
    assert (before.pop("metadata"), after.pop("metadata")) == ({}, {"a": 1})
    assert after == before


def test_a_document_of_old_without_metadata_has_none(session: Blocking, stored: Stored) -> None:
    stored.update_one({"_id": "s"}, {"$unset": {"metadata": ""}})
    assert session.get_metadata() == {"metadata": {}}
    session.update_metadata({"a.b": 1})
    assert session.get_metadata() == {"metadata": {"a": {"b": 1}}}


def test_without_the_session(session: Blocking, stored: Stored) -> None:
    stored.delete_one({"_id": "s"})
    assert session.get_metadata() == {}
    with pytest.raises(SessionNotFoundError, match="session 's' does not exist"):
        session.update_metadata({"a": 1})
    with pytest.raises(SessionNotFoundError, match="session 's' does not exist"):
        session.delete_metadata(["a"])
    assert stored.find_one({"_id": "s"}) is None


@pytest.mark.anyio
async def test_many_tasks_change_different_keys(factory: MongoDBSessionManagerFactory) -> None:
    managers = [await factory.create_session_manager_async("s") for _ in range(3)]
    await managers[0].update_metadata({f"old{number}": number for number in range(20)})

    async def change(number: int) -> None:
        manager = managers[number % 3]
        await manager.update_metadata({f"key{number}": number, f"shared.key{number}": number})
        await manager.delete_metadata([f"old{number}"])

    await asyncio.gather(*(change(number) for number in range(20)))
    expected = {f"key{number}": number for number in range(20)}
    assert await managers[0].get_metadata() == {"metadata": {**expected, "shared": expected}}


def test_many_threads_change_different_keys(factory: MongoDBSessionManagerFactory) -> None:
    manager = factory.create_session_manager("s")
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda number: manager.update_metadata({f"key{number}": number}), range(20)))
    assert manager.get_metadata() == {"metadata": {f"key{number}": number for number in range(20)}}


# Values.

VALUES = {
    "text": "Zürich \N{EARTH GLOBE EUROPE-AFRICA} \0",
    "empty": "",
    "bytes": b"\x00\xff",
    "int": 2**63 - 1,
    "huge": 2**63,
    "negative": -(2**200),
    "float": 1.5,
    "infinite": float("inf"),
    "flag": True,
    "nothing": None,
    "object_id": ObjectId("65b2f0c2a1b2c3d4e5f60718"),
    "decimal128": Decimal128("1.10"),
    "decimal": Decimal("1.10"),
    "uuid": UUID("12345678-1234-5678-1234-567812345678"),
    "surrogate": "half \ud83d",
    "day": date(2026, 5, 14),
    "keys": {"$set": {"a.b": 1, "": 2}, ".": {"$ref": "x", "$id": 1}, "\0": 3, 7: "seven", (1, 2): None},
    "marked": {"__msm__": "int", "v": "7"},
    "bytes of Strands": {"__bytes_encoded__": True, "data": "AAAA"},
    "list": [[], {}, [{"x": [None]}]],
}


def typed(value: Any) -> Any:
    """Return a value together with the types in it, because `1 == True`."""
    if isinstance(value, dict):
        return {repr(key): typed(item) for key, item in value.items()}
    return (type(value), [typed(item) for item in value] if isinstance(value, list | tuple) else value)


def test_values_come_back_as_they_went_in(session: Blocking) -> None:
    session.update_metadata({**VALUES, "deep.er": {**VALUES}})
    metadata = session.get_metadata()["metadata"]
    deeper = metadata.pop("deep")
    assert typed(metadata) == typed(VALUES)
    assert typed(deeper) == typed({"er": VALUES})


class Point(NamedTuple):
    x: int
    y: int


COLLECTIONS: dict[str, tuple[Any, Any]] = {
    "tuple": ((1, ("a", b"b")), [1, ["a", b"b"]]),
    "named tuple": (Point(1, 2), [1, 2]),
    "set": ({"c", "a", "b"}, ["a", "b", "c"]),
    "frozenset": (frozenset({3, 1, 2.5}), [1, 2.5, 3]),
    "of different types": ({"a", None, 2, (1,)}, [2, None, "a", [1]]),
    "deep": ({"list": [(1,), {"x": {2}}]}, {"list": [[1], {"x": [2]}]}),
    "empty": ([(), set()], [[], []]),
}


def test_tuples_and_sets_are_arrays_that_come_back_as_lists(session: Blocking, stored: Stored) -> None:
    given = {name: value for name, (value, _) in COLLECTIONS.items()}
    expected = {name: value for name, (_, value) in COLLECTIONS.items()}
    session.update_metadata({**given, "more.nested": given})
    expected["more"] = {"nested": dict(expected)}
    assert typed(session.get_metadata()["metadata"]) == typed(expected)
    assert stored.find_one({"_id": "s"})["metadata"] == expected


def test_a_tuple_that_an_earlier_version_stored_comes_back_as_one(session: Blocking, stored: Stored) -> None:
    stored.update_one({"_id": "s"}, {"$set": {"metadata.tags": {"__msm__": "tuple", "v": ["a", "b"]}}})
    assert session.get_metadata() == {"metadata": {"tags": ("a", "b")}}


def test_values_that_bson_holds_are_stored_as_such(session: Blocking, stored: Stored) -> None:
    session.update_metadata(VALUES)
    types = {
        "bytes": "binData",
        "int": "long",
        "object_id": "objectId",
        "decimal128": "decimal",
        "uuid": "binData",
        "flag": "bool",
        "nothing": "null",
    }
    for key, name in types.items():
        assert stored.count_documents({f"metadata.{key}": {"$type": name}}) == 1, key


def test_dates_are_bson_dates(session: Blocking, stored: Stored) -> None:
    zone = timezone(timedelta(hours=2))
    session.update_metadata(
        {
            "utc": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
            "zoned": datetime(2026, 1, 2, 3, 4, 5, tzinfo=zone),
            "naive": datetime(2026, 1, 2, 3, 4, 5),
            "within": {"list": [datetime(2026, 1, 2, tzinfo=zone)]},
        }
    )
    expected = {
        "utc": datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC),
        "zoned": datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC),
        "naive": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "within": {"list": [datetime(2026, 1, 1, 22, tzinfo=UTC)]},
    }
    assert session.get_metadata() == {"metadata": expected}
    assert metadata_of(stored) == expected
    for key in ("utc", "zoned", "naive", "within.list"):
        assert stored.count_documents({f"metadata.{key}": {"$type": "date"}}) == 1, key
    assert session.get_metadata()["metadata"]["zoned"].tzinfo is UTC


def test_a_date_beyond_the_calendar_in_utc_is_stored_or_refused(session: Blocking, stored: Stored) -> None:
    last = datetime(9999, 12, 31, 23, 30, tzinfo=timezone(timedelta(hours=-5)))
    try:
        session.update_metadata({"last": last})
    except MongoDBSessionError:
        assert metadata_of(stored) == {}
    else:
        assert session.get_metadata() == {"metadata": {"last": last}}


def test_what_has_no_stored_form_is_refused(session: Blocking, stored: Stored, commands: CommandLog) -> None:
    for value in (object(), [1, {"x": object()}], {1, 1j}):
        with pytest.raises(EncodingError, match="cannot store"):
            session.update_metadata({"fine": 1, "value": value})
    assert commands.names == []
    assert metadata_of(stored) == {}


def test_a_key_and_its_value_share_the_levels_that_an_import_takes(
    factory: MongoDBSessionManagerFactory,
) -> None:
    factory.create_session_manager("s").close()
    key = ".".join("k" * 60)
    with pytest.raises(EncodingError, match="nested deeper"):
        factory.update_metadata("s", {key: nested(200)})
    factory.update_metadata("s", {key: nested(190)})
    factory.import_session(list(factory.export_session("s")), "t")
    assert factory.get_metadata("t") == factory.get_metadata("s")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_what_has_no_end_is_refused(session: Blocking, commands: CommandLog) -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with pytest.raises(EncodingError, match="cannot store"):
        session.update_metadata({"value": endless})
    assert commands.names == []


# What is refused before a command is sent.

BAD_KEYS = {
    "": "metadata contains the key ''",
    "a..b": "metadata contains the key 'a..b'",
    ".a": "metadata contains the key '.a'",
    "a.": "metadata contains the key 'a.'",
    "$x": r"metadata contains the key '\$x'",
    "a.$b": r"metadata contains the key 'a\.\$b'",
    "$": r"metadata contains the key '\$'",
    "a\0b": r"metadata contains the key 'a\\x00b'",
    "a.\ud83d": "metadata contains a key with a lone surrogate",
    "a" + ".b" * 90: "metadata contains a key of 91 segments between dots; at most 90 are allowed",
    5: "every key of metadata must be a str, not int",
    None: "every key of metadata must be a str, not NoneType",
    ("a",): "every key of metadata must be a str, not tuple",
}


def test_bad_keys_are_refused(session: Blocking, stored: Stored, commands: CommandLog) -> None:
    for key, message in BAD_KEYS.items():
        with pytest.raises(InvalidArgumentError, match=message):
            session.update_metadata({"fine": 1, key: 2})
        with pytest.raises(InvalidArgumentError, match=message.replace("metadata", "keys")):
            session.delete_metadata(["fine", key])
    assert commands.names == []
    assert metadata_of(stored) == {}


def test_bad_metadata_is_refused(session: Blocking, commands: CommandLog) -> None:
    for metadata, message in (
        ({"a": 1, "a.b": 2}, "metadata contains both 'a' and 'a.b'"),
        ({"a.b.c": 1, "a!": 0, "a": 2}, "metadata contains both 'a' and 'a.b.c'"),
        ([("a", 1)], "metadata must be a dict, not list"),
        ("a", "metadata must be a dict, not str"),
        (None, "metadata must be a dict, not NoneType"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            session.update_metadata(metadata)
    assert commands.names == []


def test_bad_lists_of_keys_are_refused(session: Blocking, commands: CommandLog) -> None:
    for keys, message in (
        ("topic", "keys must be a list of str, not str"),
        (b"topic", "keys must be a list of str, not bytes"),
        ({"topic": 1}, "keys must be a list of str, not dict"),
        (None, "keys must be a list of str, not NoneType"),
        (5, "keys must be a list of str, not int"),
        (["a", "a.b"], "keys contains both 'a' and 'a.b'"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            session.delete_metadata(keys)
    assert commands.names == []


# A way through what is no dict.

NATIVE = ["text", 5, True, None, b"bytes", [1], datetime(2026, 1, 2, tzinfo=UTC)]
MARKED = [2**70, "half \ud83d", Decimal("1.10"), date(2026, 1, 2)]


def test_a_dot_does_not_lead_through_a_scalar(session: Blocking, stored: Stored) -> None:
    scalars = {f"a{number}": scalar for number, scalar in enumerate(NATIVE + MARKED)}
    keys = [f"{name}.{below}" for name in scalars for below in ("b", "v", "b.c")]
    session.update_metadata({**scalars, "other": 1, "gone": 1})
    before = metadata_of(stored)
    for key in keys:
        with pytest.raises(InvalidArgumentError):
            session.update_metadata({key: 2, "other": 2})
    assert metadata_of(stored) == before
    for below in ("b", "v", "b.c"):
        session.delete_metadata([*(f"{name}.{below}" for name in scalars), "gone"])
    del before["gone"]
    assert metadata_of(stored) == before
    assert session.get_metadata() == {"metadata": {**scalars, "other": 1}}


def test_a_dot_into_a_dict_that_bson_cannot_hold_loses_nothing(session: Blocking) -> None:
    session.update_metadata({"a": {7: "seven"}})
    try:
        session.update_metadata({"a.b": 1})
    except InvalidArgumentError:
        assert session.get_metadata() == {"metadata": {"a": {7: "seven"}}}
    else:
        assert session.get_metadata() == {"metadata": {"a": {7: "seven", "b": 1}}}


def test_keys_of_the_codec_itself_stay_keys(session: Blocking, stored: Stored) -> None:
    for nested in ({"__msm__": "int", "v": "7"}, {"__bytes_encoded__": True, "data": "AAAA"}):
        for metadata, expected in ((nested, nested), ({f"a.{key}": nested[key] for key in nested}, {"a": nested})):
            stored.update_one({"_id": "s"}, {"$set": {"metadata": {}}})
            try:
                session.update_metadata(metadata)
            except InvalidArgumentError:
                expected = {}
            assert session.get_metadata() == {"metadata": expected}


# Beside the conversation.


@pytest.mark.own_database
@pytest.mark.parametrize(
    "kind", alternating(MongoDBSessionManager, AsyncMongoDBSessionManager, "async repository", "repository"), ids=str
)
def test_metadata_fields_get_an_index(server: str, database: str, stored: Stored, kind: Any) -> None:
    fields = ["customer", "city.name"]
    with asyncio.Runner() as runner:
        if isinstance(kind, str):
            classes = {"repository": MongoDBSessionRepository, "async repository": AsyncMongoDBSessionRepository}
            opened = Blocking(classes[kind](server, database, metadata_fields=fields), runner)
            opened.open_session("s")
        else:
            opened = Blocking(kind("s", server, database, metadata_fields=fields), runner)
            if kind is AsyncMongoDBSessionManager:
                opened.open()
        opened.close()
    assert {name for name in stored.index_information() if name.endswith(("customer_1", "name_1"))} == {
        "application_name_1",
        "metadata.customer_1",
        "metadata.city.name_1",
    }


def test_side_writers_neither_conflict_with_a_turn_nor_add_a_command_to_it(
    factory: MongoDBSessionManagerFactory, server: str, database: str, stored: Stored, commands: CommandLog
) -> None:
    with MongoDBSessionManagerFactory(server, database) as others:
        aside = others.create_session_manager("s")

        @tool
        def note(key: str) -> str:
            """Change the metadata in the middle of a turn."""
            aside.update_metadata({key: True, "last": key})
            return "noted"

        call = {"tool": "note", "input": {"key": "one"}}, {"tool": "note", "input": {"key": "two"}}
        live = agent(factory.create_session_manager("s"), "first", call[0], "second", call[1], "third", tools=[note])
        commands.clear()
        for text in ("a", "b", "c"):
            live(text)
            aside.update_metadata({"after": text})
    assert commands.names == ["update"] * (2 + 4 + 4)
    document = stored.find_one({"_id": "s"})
    assert message_ids(document) == list(range(10))
    assert document["metadata"] == {"one": True, "two": True, "last": "two", "after": "c"}


@pytest.mark.anyio
async def test_side_writers_during_concurrent_turns(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    aside = await factory.create_session_manager_async("s")
    manager = await factory.create_session_manager_async("s")
    agents = [agent(manager, agent_id=f"agent{number}") for number in range(3)]
    await manager.flush()

    async def talk(one: Any) -> None:
        for number in range(3):
            await one.invoke_async(f"text {number}")

    await asyncio.gather(
        *(talk(one) for one in agents),
        *(aside.update_metadata({f"key{number}": number}) for number in range(20)),
        *(manager.update_metadata({f"own{number}": number}) for number in range(20)),
    )
    document = await asyncio.to_thread(stored.find_one, {"_id": "s"})
    assert document["metadata"] == {f"key{n}": n for n in range(20)} | {f"own{n}": n for n in range(20)}
    for number in range(3):
        assert message_ids(document, f"agent{number}") == list(range(6))
        assert texts(document["agents"][f"agent{number}"]["messages"])[::2] == [f"text {n}" for n in range(3)]
