"""Finding sessions: what a list shows, in which order, by which criteria, and what it costs."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import pymongo
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymongo import monitoring
from strands.types.session import Session, SessionType

from fix_finding import START, Stored, cost, idle, session
from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    InvalidArgumentError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionPage,
    SessionSummary,
)
from mongodb_session_manager._repository.listing import Position
from support import CommandLog, agent, fail_point

ORDERS = ["-updated_at", "updated_at", "-created_at", "created_at"]


def hours(number: float) -> datetime:
    return START + timedelta(hours=number)


def ids(page: SessionPage) -> list[str]:
    return [summary.session_id for summary in page.sessions]


def all_pages(repository: Any, **arguments: Any) -> list[str]:
    """Return the ids of all pages, each of which is full but the last."""
    found, cursor = [], None
    while True:
        page = repository.list_sessions(**arguments, cursor=cursor)
        assert not set(found) & set(ids(page))
        found += ids(page)
        if (cursor := page.next_cursor) is None:
            return found
        assert len(page.sessions) == arguments["limit"]


# What a list shows.


def test_a_summary(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionManagerFactory(server, database, application_name="shop") as factory:
        with factory.create_session_manager("s", owner="ada", title="Trip", tags=["red", "blue"]) as manager:
            manager.update_metadata({"customer": {"id": 7}, "since": START, "big": 2**70})
            for name in ("one", "two.x"):
                talker = agent(manager, "Hello!", "Bye!", agent_id=name)
                talker("Hi.")
            talker("Go.")
            usage = manager.get_usage()
            counts = {name: manager.get_message_count(name) for name in ("one", "two.x")}
        factory.create_session_manager("empty").close()
        (summary,) = [found for found in factory.list_sessions().sessions if found.session_id == "s"]
        factory_summary = factory.get_session_summary("s")
        (empty,) = [found for found in factory.list_sessions().sessions if found.session_id == "empty"]
        document = stored.find_one({"_id": "s"}) or {}
    assert summary == SessionSummary(
        session_id="s",
        application_name="shop",
        created_at=document["created_at"],
        updated_at=document["updated_at"],
        agents=("one", "two.x"),
        message_counts=counts,
        usage=usage["total"],
        metadata={"customer": {"id": 7}, "since": START, "big": 2**70},
        owner="ada",
        title="Trip",
        tags=("red", "blue"),
    )
    assert factory_summary == summary
    assert counts == {"one": 2, "two.x": 4}
    assert summary.usage["invocations"] == 3
    assert (empty.owner, empty.title, empty.tags) == (None, None, ())
    assert (empty.agents, empty.message_counts, empty.metadata, empty.usage["totalTokens"]) == ((), {}, {}, 0)
    with pytest.raises(FrozenInstanceError):
        summary.session_id = "t"  # type: ignore[misc]


def test_messages_that_were_moved_away_count(repository: MongoDBSessionRepository, stored: Stored) -> None:
    head = [{"message_id": number} for number in range(5, 8)]
    stored.insert_one(session("s", agents={"a": {"messages": head, "archived": 5}, "b": {}}))
    (summary,) = repository.list_sessions().sessions
    assert summary.message_counts == {"a": 8, "b": 0}


def test_a_session_of_a_version_before_1_0(repository: MongoDBSessionRepository, stored: Stored) -> None:
    old = {"_id": "old", "created_at": START, "updated_at": START, "agents": {"a": {"messages": [{}, {}]}}}
    stored.insert_one(old)
    (summary,) = repository.list_sessions().sessions
    assert (summary.application_name, summary.message_counts, summary.metadata) == (None, {"a": 2}, {})


def test_a_list_loads_no_message_and_is_one_command(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, stored: Stored
) -> None:
    stored.insert_one(session("s", agents={"a": {"messages": [{"message": {"content": [{"text": "secret"}]}}]}}))
    factory._connection.portal.call(idle, factory._connection)
    page = factory.list_sessions(limit=1)
    assert factory.count_sessions() == 1
    assert factory.session_exists("s")
    assert not factory.session_exists("t")
    assert commands.names == ["find", "aggregate", "aggregate", "find", "find"]
    assert "secret" not in repr(page)
    assert ids(page) == ["s"]


# In which order.


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("created_at", ["a", "b", "c", "d"]),
        ("-created_at", ["d", "c", "b", "a"]),
        ("updated_at", ["d", "b", "c", "a"]),
        ("-updated_at", ["a", "c", "b", "d"]),
    ],
)
def test_the_orders(repository: MongoDBSessionRepository, stored: Stored, order: Any, expected: list[str]) -> None:
    stored.insert_many(
        session(name, created_at=hours(created), updated_at=hours(updated))
        for name, created, updated in [("c", 3, 7), ("a", 1, 9), ("d", 4, 5), ("b", 2, 7)]
    )
    assert ids(repository.list_sessions(order=order)) == expected
    assert all_pages(repository, order=order, limit=1) == expected
    if order == "-updated_at":
        assert ids(repository.list_sessions()) == expected


DATES = st.sampled_from([hours(number) for number in range(3)])
NAMES = st.sampled_from(["one", "two", None])
TENANTS = st.sampled_from([1, 2, [1, 2], "1", None])
OWNERS = st.sampled_from(["ada", "bob", None])
TAGS = st.lists(st.sampled_from(["red", "blue"]), unique=True)


@dataclass
class Known:
    """A stored session, as a test knows it."""

    session_id: str
    created_at: datetime
    updated_at: datetime
    application_name: str | None
    tenant: Any
    owner: str | None
    tags: list[str]

    def meets(self, given: dict[str, Any]) -> bool:
        tenant = given.get("metadata", {}).get("tenant")
        wanted = tenant is None or tenant == self.tenant or (isinstance(self.tenant, list) and tenant in self.tenant)
        return (
            wanted
            and given.get("application_name") in (None, self.application_name)
            and given.get("owner") in (None, self.owner)
            and set(given.get("tags", ())) <= {*self.tags}
            and self.created_at > given.get("created_after", hours(-1))
            and self.updated_at > given.get("updated_after", hours(-1))
        )


def test_pages_hold_each_session_once_in_order(
    server: str, database: str, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    """Whatever the criteria and however many sessions share a date, with the indexes and without."""
    known = st.builds(Known, st.text("abé/", max_size=4), DATES, DATES, NAMES, TENANTS, OWNERS, TAGS)
    sessions = st.lists(known, max_size=25)
    criteria = st.fixed_dictionaries(
        {},
        optional={
            "application_name": st.sampled_from(["one", "two", "three"]),
            "metadata": st.sampled_from([{"tenant": 1}, {"tenant": "1"}, {}]),
            "created_after": DATES,
            "updated_after": DATES,
            "owner": st.sampled_from(["ada", "bob", "nobody"]),
            "tags": TAGS,
        },
    )

    @given(sessions, criteria, st.sampled_from(ORDERS), st.integers(1, 7), st.booleans())
    def run(known: list[Known], given: dict[str, Any], order: str, limit: int, indexed: bool) -> None:
        by_id = {each.session_id: each for each in known if each.session_id}
        stored.delete_many({})
        if by_id:
            stored.insert_many(
                session(
                    each.session_id,
                    created_at=each.created_at,
                    updated_at=each.updated_at,
                    application_name=each.application_name,
                    metadata={} if each.tenant is None else {"tenant": each.tenant},
                    **({} if each.owner is None else {"owner": each.owner}),
                    **({"tags": each.tags} if each.tags else {}),
                )
                for each in by_id.values()
            )
        asked = with_index if indexed else repository
        field = order.removeprefix("-")
        expected = sorted(
            (each for each in by_id.values() if each.meets(given)),
            key=lambda each: (getattr(each, field), each.session_id.encode()),
            reverse=order.startswith("-"),
        )
        found = all_pages(asked, **given, order=order, limit=limit)
        assert found == [each.session_id for each in expected]
        assert asked.count_sessions(**given) == len(expected)

    # One of them asks for an index that does not exist, because another process knows no such metadata field.
    with MongoDBSessionRepository(server, database, metadata_fields=["tenant"]) as with_index:
        with_index.create_session(Session("s", SessionType.AGENT))
        run()


@pytest.mark.own_database
def test_a_page_without_its_index(server: str, database: str, stored: Stored) -> None:
    """A user who may not build indexes gets a slow list, not none."""
    stored.insert_many(session(f"s{number}", updated_at=hours(number)) for number in range(5))
    with (
        fail_point(server, failCommands=["createIndexes"], errorCode=13, times=100),
        MongoDBSessionRepository(server, database, metadata_fields=["tenant"]) as repository,
    ):
        assert all_pages(repository, limit=2) == ["s4", "s3", "s2", "s1", "s0"]
        assert all_pages(repository, limit=2, metadata={"tenant": None}) == ["s4", "s3", "s2", "s1", "s0"]
    assert stored.index_information().keys() == {"_id_"}


def test_a_session_that_moves_is_seen_again_and_none_is_lost(
    repository: MongoDBSessionRepository, stored: Stored
) -> None:
    stored.insert_many(session(f"s{number}", updated_at=hours(number)) for number in range(6))
    first = repository.list_sessions(limit=2, order="updated_at")
    repository.update_metadata("s1", {"a": 1})
    stored.delete_one({"_id": "s2"})
    rest = repository.list_sessions(order="updated_at", cursor=first.next_cursor)
    assert (ids(first), ids(rest)) == (["s0", "s1"], ["s3", "s4", "s5", "s1"])


# By which criteria.


def test_the_criteria(repository: MongoDBSessionRepository, stored: Stored) -> None:
    stored.insert_many(
        [
            session("a", application_name="shop", created_at=hours(1), updated_at=hours(5), metadata={"n": 1}),
            session("b", application_name="shop", created_at=hours(2), metadata={"n": 1, "tags": ["x", "y"]}),
            session("c", application_name="help", created_at=hours(3), metadata={"c": {"id": "7"}, "big": START}),
        ]
    )
    repository.update_metadata("b", {"big": 2**80, "pair": (1, 2)})
    stored.update_many({}, {"$set": {"updated_at": START}})
    stored.update_one({"_id": "a"}, {"$set": {"updated_at": hours(5)}})

    def found(**criteria: Any) -> list[str]:
        assert repository.count_sessions(**criteria) == len(all_pages(repository, **criteria, limit=50))
        return ids(repository.list_sessions(**criteria, order="created_at"))

    assert found() == ["a", "b", "c"]
    assert found(application_name="shop") == ["a", "b"]
    assert found(application_name="") == []
    assert found(metadata={}) == ["a", "b", "c"]
    assert found(metadata={"n": 1}) == ["a", "b"]
    assert found(metadata={"n": 1, "tags": "y"}) == ["b"]
    assert found(metadata={"tags": ["x", "y"]}) == ["b"]
    assert found(metadata={"c.id": "7"}) == ["c"]
    assert found(metadata={"c": {"id": "7"}}) == ["c"]
    assert found(metadata={"c.id": 7}) == []
    assert found(metadata={"big": 2**80}) == ["b"]
    assert found(metadata={"pair": (1, 2)}) == ["b"]
    assert found(metadata={"big": START.astimezone(timezone(timedelta(hours=3)))}) == ["c"]
    assert found(metadata={"n": None}) == ["c"]
    assert found(metadata={"n": re.compile("1").pattern}) == []
    assert found(created_after=hours(1)) == ["b", "c"]
    assert found(created_after=hours(1).replace(tzinfo=None)) == ["b", "c"]
    assert found(updated_after=START) == ["a"]
    assert found(application_name="shop", created_after=hours(1), metadata={"n": 1}) == ["b"]


OPERATORS: list[tuple[str, dict[str, Any]]] = [
    ("application_name", {"application_name": {"$ne": None}}),
    ("application_name", {"application_name": ["shop"]}),
    ("application_name", {"application_name": "\ud83d"}),
    ("metadata", {"metadata": {"tenant": {"$gt": ""}}}),
    ("metadata", {"metadata": {"tenant": {"a": [{"b": {"$where": "1"}}]}}}),
    ("metadata", {"metadata": {"tenant": ({"$in": [1]},)}}),
    ("metadata", {"metadata": {"$where": "1"}}),
    ("metadata", {"metadata": {"tenant.$ne": 1}}),
    ("metadata", {"metadata": {"": 1}}),
    ("metadata", {"metadata": [("tenant", 1)]}),
    ("metadata", {"metadata": "tenant"}),
    ("created_after", {"created_after": {"$gt": START}}),
    ("created_after", {"created_after": "2026-01-01"}),
    ("created_after", {"created_after": 5}),
    ("owner", {"owner": {"$ne": None}}),
    ("owner", {"owner": ""}),
    ("tags", {"tags": {"$exists": True}}),
    ("tags", {"tags": "red"}),
    ("tags", {"tags": [{"$ne": ""}]}),
    ("updated_after", {"updated_after": {"$exists": True}}),
    ("updated_after", {"updated_after": datetime.min.replace(tzinfo=timezone(timedelta(hours=9)))}),
]
ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("order", {"order": "name"}),
    ("order", {"order": {"updated_at": 1}}),
    ("order", {"order": None}),
    ("limit", {"limit": 0}),
    ("limit", {"limit": -5}),
    ("limit", {"limit": 1001}),
    ("limit", {"limit": True}),
    ("limit", {"limit": "5"}),
    ("limit", {"limit": {"$gt": 1}}),
]


def test_what_cannot_be_used_is_named_and_nothing_is_sent(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    for name, arguments in OPERATORS + ARGUMENTS:
        with pytest.raises(InvalidArgumentError, match=name):
            factory.list_sessions(**arguments)
        if (name, arguments) in OPERATORS:
            with pytest.raises(InvalidArgumentError, match=name):
                factory.count_sessions(**arguments)
        assert commands.names == [], arguments


def encoded(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).rstrip(b"=").decode()


NO_CURSORS: list[Any] = [
    "",
    "nonsense",
    "é",
    5,
    {"$gt": ""},
    b"WyJ1cGRhdGVkX2F0IiwwLCJzIl0",
    encoded(["-updated_at", 0]),
    encoded({"order": "-updated_at"}),
    encoded(["-updated_at", {"$gt": 0}, "s"]),
    encoded(["-updated_at", 0, {"$gt": ""}]),
    encoded(["-updated_at", 0, ""]),
    encoded(["-updated_at", 0.5, "s"]),
    encoded(["-updated_at", True, "s"]),
    encoded(["-updated_at", 10**30, "s"]),
    encoded(["-updated_at", 0, "s", "more"]),
    encoded(["-updated_at", 0, "s"]) + "=",
    encoded(["updated_at", 0, "s"]),
    encoded(["name", 0, "s"]),
    encoded([{"$ne": 1}, 0, "s"]),
    encoded("[" * 5000),
    base64.urlsafe_b64encode(b"[" * 100_000).decode(),
]


def test_a_cursor_that_is_none_is_refused_and_nothing_is_sent(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    for cursor in NO_CURSORS:
        with pytest.raises(InvalidArgumentError, match="cursor"):
            factory.list_sessions(cursor=cursor)
        assert commands.names == [], cursor


@given(st.text(max_size=30))
def test_any_text_is_a_cursor_or_refused(text: str) -> None:
    try:
        position = Position.of(text, "-updated_at")
    except InvalidArgumentError:
        return
    assert position.cursor() == text


def test_whether_a_session_exists(repository: MongoDBSessionRepository, stored: Stored) -> None:
    stored.insert_one(session("s"))
    assert repository.session_exists("s") is True
    assert repository.session_exists("t") is False
    for session_id in ("", {"$ne": None}, None):
        with pytest.raises(InvalidArgumentError, match="session_id"):
            repository.session_exists(session_id)  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_the_async_twins(server: str, database: str, stored: Stored) -> None:
    stored.insert_many(session(f"s{number}", updated_at=hours(number)) for number in range(3))
    async with AsyncMongoDBSessionRepository(server, database) as repository:
        first = await repository.list_sessions(limit=2)
        second = await repository.list_sessions(limit=2, cursor=first.next_cursor)
        assert (ids(first), ids(second), second.next_cursor) == (["s2", "s1"], ["s0"], None)
        assert await repository.count_sessions(updated_after=START) == 2
        assert await repository.session_exists("s1")
    async with MongoDBSessionManagerFactory(server, database) as factory:
        pages = await asyncio.gather(*(factory.list_sessions_async(limit=2) for _ in range(3)))
        assert pages == [first] * 3
        assert await factory.count_sessions_async() == 3
        assert not await factory.session_exists_async("t")


# What it costs.

MANY = 100_000


class Sent(monitoring.CommandListener):
    """The commands that look for sessions, as they were sent, and whether the indexes are built."""

    def __init__(self) -> None:
        self.commands: list[dict[str, Any]] = []
        self.indexed = False

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name in ("find", "aggregate"):
            kept = ("find", "aggregate", "filter", "projection", "sort", "limit", "hint", "pipeline", "cursor")
            self.commands.append({name: value for name, value in event.command.items() if name in kept})

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self.indexed |= event.command_name == "createIndexes"

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


@pytest.fixture(scope="module")
def many(server: str) -> Iterator[tuple[MongoDBSessionManagerFactory, Sent, Any]]:
    """A factory over 100,000 sessions, of which each of 1,000 tenants and owners has 100, and `rare` has 20."""
    database = f"test_{uuid.uuid4().hex}"
    sent = Sent()
    with pymongo.MongoClient[dict[str, Any]](server, tz_aware=True) as client:
        collection = client[database].get_collection("agent_sessions", write_concern=pymongo.WriteConcern(w=1))
        for first in range(0, MANY, 10_000):
            collection.insert_many(
                (
                    {
                        "_id": f"s{number:06}",
                        "application_name": "rare" if number % 5_000 == 7 else "usual",
                        # Ten sessions share each date, and half of all the date of the last writing.
                        "created_at": START + timedelta(seconds=number // 10),
                        "updated_at": START + timedelta(seconds=0 if number % 2 else (number * 7_919) % MANY),
                        "metadata": {"tenant": number % 1_000},
                        "owner": f"user {number % 1_000}",
                        "tags": ["odd" if number % 2 else "even"],
                        "agents": {},
                    }
                    for number in range(first, first + 10_000)
                ),
                ordered=False,
            )
        with MongoDBSessionManagerFactory(
            server, database, metadata_fields=["tenant"], event_listeners=[sent]
        ) as factory:
            factory.create_session_manager("s000000").close()
            factory._connection.portal.call(idle, factory._connection)
            assert sent.indexed
            yield factory, sent, client[database]
        client.drop_database(database)


CRITERIA: list[dict[str, Any]] = [
    {},
    {"application_name": "usual"},
    {"application_name": "rare"},
    {"metadata": {"tenant": 7}},
    {"owner": "user 7"},
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("criteria", CRITERIA)
def test_a_page_of_100_000_sessions_reads_only_itself(many: Any, order: str, criteria: dict[str, Any]) -> None:
    factory, sent, database = many
    cursor = None
    for _ in range(4):
        sent.commands.clear()
        page = factory.list_sessions(**criteria, order=order, limit=10, cursor=cursor)
        (asked,) = sent.commands
        documents, keys = cost(database, asked)
        assert documents <= 11  # its own and one that tells that there are more
        assert keys <= 11 + 3  # and one beyond each stretch of the index
        assert "skip" not in asked
        assert len(page.sessions) == 10 or page.next_cursor is None
        if (cursor := page.next_cursor) is None:
            assert criteria == {"application_name": "rare"}
            break


def test_a_page_in_the_midst_of_50_000_sessions_of_one_date_reads_only_itself(many: Any) -> None:
    factory, sent, database = many
    cursor = Position("updated_at", START, "s050001").cursor()
    sent.commands.clear()
    page = factory.list_sessions(order="updated_at", limit=10, cursor=cursor)
    assert ids(page) == [f"s{number:06}" for number in range(50_003, 50_023, 2)]
    documents, keys = cost(database, sent.commands[0])
    assert documents <= 11
    assert keys <= 14


def test_a_range_of_the_orders_date_reads_only_its_page(many: Any) -> None:
    factory, sent, database = many
    sent.commands.clear()
    after = START + timedelta(seconds=5_000)
    page = factory.list_sessions(order="created_at", created_after=after, limit=10)
    following = factory.list_sessions(order="created_at", created_after=after, limit=10, cursor=page.next_cursor)
    assert ids(page) + ids(following) == [f"s{number:06}" for number in range(50_010, 50_030)]
    assert [cost(database, asked)[0] for asked in sent.commands] == [11, 11]


def test_of_several_indexes_the_server_chooses(many: Any) -> None:
    factory, sent, database = many
    sent.commands.clear()
    both = factory.list_sessions(application_name="usual", metadata={"tenant": 8}, order="created_at", limit=10)
    assert ids(both) == [f"s{number:06}" for number in range(8, 10_008, 1_000)]
    (asked,) = sent.commands
    assert "hint" not in asked
    assert cost(database, asked)[0] <= 100


def test_a_list_of_an_owner_reads_no_session_of_another(many: Any) -> None:
    factory, sent, database = many
    sent.commands.clear()
    assert ids(factory.list_sessions(owner="user 7", tags=["even"])) == []
    assert len(factory.list_sessions(owner="user 7", created_after=START, limit=1000).sessions) == 99
    assert [cost(database, asked)[0] for asked in sent.commands] == [100, 100]
    sent.commands.clear()
    first = factory.list_sessions(owner="user 7", application_name="usual", limit=10)
    factory.list_sessions(owner="user 7", application_name="usual", limit=10, cursor=first.next_cursor)
    assert max(cost(database, asked)[0] for asked in sent.commands) <= 30  # a fifth of the owner's sessions are rare


def test_all_pages_together_are_all_sessions(many: Any) -> None:
    factory, _, _ = many
    assert all_pages(factory, metadata={"tenant": 7}, order="created_at", limit=30) == [
        f"s{number:06}" for number in range(7, MANY, 1_000)
    ]


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ({}, MANY),
        ({"application_name": "rare"}, 20),
        ({"metadata": {"tenant": 7}}, 100),
        ({"owner": "user 7"}, 100),
        ({"tags": ["odd"]}, MANY // 2),
    ],
)
def test_counting_reads_no_document(many: Any, criteria: dict[str, Any], expected: int) -> None:
    factory, sent, database = many
    sent.commands.clear()
    assert factory.count_sessions(**criteria) == expected
    documents, keys = cost(database, sent.commands[0])
    assert documents == 0
    assert keys <= expected + 1


@pytest.mark.parametrize("order", ORDERS)
def test_a_list_that_an_application_has_stored_is_no_owner(
    factory: MongoDBSessionManagerFactory, stored: Stored, order: str
) -> None:
    owners = ["bob", ["bob", "alice"], "bob", ["bob"]]
    stored.insert_many(session(f"s{number}", owner=owner) for number, owner in enumerate(owners))
    assert sorted(all_pages(factory, owner="bob", order=order, limit=1)) == ["s0", "s2"]


def test_whether_one_of_100_000_exists_reads_no_other(many: Any) -> None:
    factory, sent, database = many
    sent.commands.clear()
    assert factory.session_exists("s099999")
    assert cost(database, sent.commands[0]) == (1, 1)


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_a_session_is_found_by_one_of_several_values(factory: MongoDBSessionManagerFactory, kind: Any) -> None:
    for session_id, tags in (("one", "ab"), ("two", "bc"), ("three", "d")):
        with factory.create_session_manager(session_id) as manager:
            manager.update_metadata({"tags": kind(tags), "deep": {"tags": [kind(tags)]}})
    assert sorted(ids(factory.list_sessions(metadata={"tags": "b"}))) == ["one", "two"]
    assert ids(factory.list_sessions(metadata={"tags": kind("bc")})) == ["two"]
    assert ids(factory.list_sessions(metadata={"tags": ["b", "c"]})) == ["two"]
    assert ids(factory.list_sessions(metadata={"deep.tags": kind("d")})) == ["three"]
    assert factory.count_sessions(metadata={"tags": "e"}) == 0
