"""Sessions that expire: every write keeps the whole session, and no part of one expires before it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
import pytest
from pymongo import monitoring
from pymongo.collection import Collection
from strands.multiagent import Swarm
from strands.types.session import Session, SessionAgent, SessionMessage

from fix_archive import documents_of, emptied, store_again
from fix_deletion import ID, PICTURE, SMALL, failing_after, said, traces
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    AsyncMongoDBSessionRepository,
    ConfigurationError,
    MessageTooLargeError,
    MongoDBSessionError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionConflictError,
    SessionNotFoundError,
    close_global_factory,
    create_mongodb_session_manager,
    create_mongodb_session_manager_async,
    initialize_global_factory,
)
from mongodb_session_manager._format.buckets import Head, Limits, cut, head_numbers, merge
from mongodb_session_manager._format.retention import UNDATED, Dates, Life
from support import CommandLog, agent, alternating, eventually, fail_point, run_random, sampled, texts

Driver = pymongo.MongoClient[dict[str, Any]]
Stored = Collection[dict[str, Any]]

Repositories = dict[timedelta | None, MongoDBSessionRepository]

TTL = timedelta(hours=8)
EIGHTH = TTL / 8
PARTS = ("archive", "attachments.files", "attachments.chunks", "content")
COLLECTIONS = ("agent_sessions", *(f"agent_sessions_{name}" for name in PARTS))


@pytest.fixture
def expiring_driver(expiring: str) -> Iterator[Driver]:
    with pymongo.MongoClient(expiring, tz_aware=True) as client:
        yield client


@pytest.fixture
def soon_removed(expiring_driver: Driver) -> Iterator[Stored]:
    """An empty collection on the server that removes expired documents every second."""
    database = expiring_driver["test_retention"]
    yield database["agent_sessions"]
    for name in COLLECTIONS:
        database[name].delete_many({})


@pytest.fixture(scope="module")
def repositories(server: str, shared_database: str) -> Iterator[Repositories]:
    """The repositories of the module, by `session_ttl`."""
    with ExitStack() as stack:
        ttls: list[timedelta | None] = [TTL, TTL / 10, None]
        yield {
            ttl: stack.enter_context(MongoDBSessionRepository(server, shared_database, session_ttl=ttl, **SMALL))
            for ttl in ttls
        }


def settled(repository: MongoDBSessionRepository) -> Iterator[MongoDBSessionRepository]:
    """Yield a repository that knows nothing of the session; then wait for what it does in the background."""
    repository._async._store.expiry.forget(ID)
    yield repository
    eventually(lambda: not repository._async._connection._tasks)


@pytest.fixture
def repository(database: str, repositories: Repositories) -> Iterator[MongoDBSessionRepository]:
    yield from settled(repositories[TTL])


@pytest.fixture
def brief(database: str, repositories: Repositories) -> Iterator[MongoDBSessionRepository]:
    """A repository with a tenth of the time to live."""
    yield from settled(repositories[TTL / 10])


@pytest.fixture
def lasting(database: str, repositories: Repositories) -> Iterator[MongoDBSessionRepository]:
    """A repository without `session_ttl`."""
    yield from settled(repositories[None])


def begin(repository: MongoDBSessionRepository, session_id: str = ID) -> None:
    repository.create_session(Session(session_id, "AGENT"))
    repository.create_agent(session_id, SessionAgent("agent", {}, {}))


def fill(repository: MongoDBSessionRepository, session_id: str = ID) -> None:
    """Make a session of which something is in the archive and something among the attachments."""
    begin(repository, session_id)
    for n in range(12):
        repository.create_message(session_id, "agent", said(n, PICTURE[n:] if n in (2, 11) else None))
    eventually(lambda: not repository._async._connection._tasks)


def parts_of(stored: Stored, session: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The parts of the session outside its document that readers use: archived buckets and attachments."""
    database = stored.database
    session = session or stored.find_one({"_id": ID}) or {"agents": {}}
    found, referred = [], set()
    for key, owner in session["agents"].items():
        first = {"_id.first": {"$lt": owner.get("archived", 0)}}
        of_agent = {"_id.incarnation": session["incarnation"], "_id.agent": key, **first}
        buckets = list(database["agent_sessions_archive"].find(of_agent))
        found += buckets
        for part in [*buckets, owner]:
            referred |= {text for message in part["messages"] for text in message.get("attachments", ())}
    files = {tuple(text.split(":")[::2]) for text in referred}
    for name, path in (("files", "_id"), ("chunks", "files_id")):
        for entry in database[f"agent_sessions_attachments.{name}"].find({}, {"data": 0}):
            if (entry[path]["sha256"], entry[path]["token"]) in files:
                found.append(entry)
    return found


def check_dates(stored: Stored, session: dict[str, Any] | None = None) -> None:
    """No part of a session that expires has an earlier date; what is read after it can only have a later one."""
    session = session or stored.find_one({"_id": ID})
    parts = parts_of(stored, session)
    if "expires_at" not in session:
        return
    for part in parts:
        assert session["expires_at"] <= part.get("expires_at", session["expires_at"]), part["_id"]


def check_all_dated(stored: Stored) -> None:
    check_dates(stored)
    parts = parts_of(stored)
    assert len(parts) >= 3
    assert [part["_id"] for part in parts if "expires_at" not in part] == []


def age(stored: Stored, by: timedelta) -> None:
    """Let time pass for a session and its parts."""
    earlier = {"$subtract": ["$expires_at", by // timedelta(milliseconds=1)]}
    update = [{"$set": {"expires_at": {"$cond": ["$expires_at", earlier, "$$REMOVE"]}}}]
    for name in COLLECTIONS:
        stored.database[name].update_many({}, update)


Documents = dict[str, list[Any]]


@pytest.fixture(scope="module")
def prepared(repositories: Repositories, driver: Driver, shared_database: str) -> dict[timedelta | None, Documents]:
    """The documents of a filled session, by collection, for each time to live; `None`: it does not expire."""
    stored, found = emptied(driver[shared_database]["agent_sessions"]), {}
    for ttl, repository in repositories.items():
        fill(repository)
        found[ttl] = documents_of(stored)
        repository.delete_session(ID)
    return found


@pytest.fixture
def expires(prepared: dict[timedelta | None, Documents], stored: Stored) -> None:
    """A filled session that expires in eight hours."""
    store_again(stored, prepared[TTL])


@pytest.fixture
def lasts(prepared: dict[timedelta | None, Documents], stored: Stored) -> None:
    """A filled session that does not expire."""
    store_again(stored, prepared[None])


# Configuration.


NO_TTLS: list[Any] = [0, 3600, "1h", True, *(timedelta(days=days) for days in (0, -1, 36500)), timedelta(seconds=0.999)]


def test_what_cannot_be_a_ttl_is_refused(server: str, database: str, factory: MongoDBSessionManagerFactory) -> None:
    for bad in NO_TTLS:
        for make in (
            MongoDBSessionRepository,
            AsyncMongoDBSessionRepository,
            MongoDBSessionManagerFactory,
            initialize_global_factory,
        ):
            with pytest.raises(ConfigurationError, match="session_ttl"):
                make(server, database, session_ttl=bad)
        for open_one in (MongoDBSessionManager, AsyncMongoDBSessionManager, create_mongodb_session_manager):
            with pytest.raises(ConfigurationError, match="session_ttl"):
                open_one(ID, server, database, session_ttl=bad)
        with pytest.raises(ConfigurationError, match="session_ttl"):
            factory.create_session_manager(ID, session_ttl=bad)


def ttl_of(stored: Stored, session_id: str = ID) -> Any:
    return stored.find_one({"_id": session_id}).get("time_to_live")


@pytest.mark.anyio
async def test_everybody_takes_a_ttl(server: str, database: str, stored: Stored) -> None:
    manager = await create_mongodb_session_manager_async("a", server, database, session_ttl=timedelta(seconds=90))
    await manager.close()
    assert ttl_of(stored, "a") == 90
    async with AsyncMongoDBSessionRepository(server, database, session_ttl=timedelta(seconds=1.5)) as repository:
        await repository.create_session(Session("b", "AGENT"))
    assert ttl_of(stored, "b") == 2


def test_everybody_who_blocks_takes_a_ttl(server: str, database: str, stored: Stored) -> None:
    create_mongodb_session_manager("a", server, database, session_ttl=TTL).close()
    with MongoDBSessionManagerFactory(server, database, session_ttl=TTL) as factory:
        factory.create_session_manager("b")
        factory.create_session_manager("c", session_ttl=timedelta(days=1))
        factory.create_session_manager("d", session_ttl=None)
    initialize_global_factory(server, database, session_ttl=TTL).create_session_manager("e")
    close_global_factory()
    assert [ttl_of(stored, session_id) for session_id in "abcde"] == [28800, 28800, 86400, 28800, 28800]


# The server removes it.


def test_a_session_expires_with_all_that_belongs_to_it(
    expiring: str, expiring_driver: Driver, soon_removed: Stored
) -> None:
    stored, database, ttl = soon_removed, soon_removed.database.name, timedelta(seconds=4)
    with (
        MongoDBSessionRepository(expiring, database, session_ttl=ttl, **SMALL) as repository,
        MongoDBSessionRepository(expiring, database, **SMALL) as lasting,
    ):
        fill(lasting, "lasting")
        fill(repository)
        time.sleep(2 * ttl.total_seconds())  # without asking meanwhile
        eventually(lambda: not stored.count_documents({"_id": ID}))
        eventually(lambda: not traces(expiring_driver, database))
        # A session without a time to live stays, with all of it.
        assert len(lasting.list_messages("lasting", "agent")) == 12
        repository.create_session(Session(ID, "AGENT"))
        assert repository.session_exists(ID)


def test_a_manager_on_a_session_that_expired(expiring: str, expiring_driver: Driver, soon_removed: Stored) -> None:
    stored, database = soon_removed, soon_removed.database.name
    options: Any = {"session_ttl": TTL, **SMALL}
    with MongoDBSessionManager(ID, expiring, database, **options) as manager:
        live = agent(manager, "hello", "again")
        live([{"text": "look"}, {"image": {"format": "png", "source": {"bytes": PICTURE}}}])
        age(stored, TTL * 2)
        eventually(lambda: not stored.count_documents({"_id": ID}))
        with pytest.raises(MongoDBSessionError, match=r"no longer exists|does not exist"):
            live([{"text": "look"}, {"image": {"format": "png", "source": {"bytes": PICTURE[1:]}}}])
    age(stored, TTL * 2)
    eventually(lambda: not traces(expiring_driver, database))


def test_two_values_of_session_ttl_in_one_collection(expiring: str, soon_removed: Stored) -> None:
    stored, database = soon_removed, soon_removed.database.name
    with (
        MongoDBSessionRepository(expiring, database, session_ttl=timedelta(days=1), **SMALL) as long,
        MongoDBSessionRepository(expiring, database, session_ttl=TTL, **SMALL) as short,
    ):
        fill(short, "short")
        age(stored, TTL * 2)
        fill(long)
        eventually(lambda: not stored.count_documents({"_id": "short"}))
        assert texts([m.to_message() for m in long.list_messages(ID, "agent")]) == [f"text {n}" for n in range(12)]
        short.update_metadata(ID, {"a": 1})  # moves no date back
        check_all_dated(stored)
        assert stored.find_one({"_id": ID})["expires_at"] > datetime.now(UTC) + timedelta(hours=23)


def test_an_expired_session_that_the_server_has_not_removed_yet_is_gone(
    expires: None, repository: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    with MongoDBSessionManager(ID, server, database, session_ttl=TTL) as manager:
        live = agent(manager, "hello", agent_id="another")
        before = stored.find_one({"_id": ID})["incarnation"]
        age(stored, TTL * 2)
        assert repository.session_exists(ID) is False
        with pytest.raises(SessionNotFoundError):
            repository.list_messages(ID, "agent")
        for write in WRITES.values():
            with pytest.raises(SessionNotFoundError):
                write(repository)
        with pytest.raises(SessionNotFoundError):
            repository.fork_session(ID, "fork")
        with pytest.raises(SessionNotFoundError):
            live("hi")
        assert repository.open_session(ID)["agents"] == {}
        assert stored.find_one({"_id": ID})["incarnation"] != before
        assert parts_of(stored) == []
        assert stored.database["agent_sessions_archive"].count_documents({}) == 0
    assert repository.delete_session(ID) is True


def test_deleting_an_expired_session_removes_it(
    expires: None, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    age(stored, TTL * 2)
    assert repository.delete_session(ID) is False
    assert [stored.database[name].count_documents({}) for name in COLLECTIONS] == [0] * 5


# The indexes.


def expiries(stored: Stored) -> list[Any]:
    """What the indexes of `expires_at` say, in seconds."""
    return [
        index["expireAfterSeconds"]
        for name in ("", *(f"_{name}" for name in PARTS))
        for index in stored.database[f"agent_sessions{name}"].index_information().values()
        if index["key"] == [("expires_at", 1)] and "expireAfterSeconds" in index
    ]


class Indexed(monitoring.CommandListener):
    """The collections that got an index for expiry, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if any("expireAfterSeconds" in index for index in event.command.get("indexes", ())):
            self.names.append(event.command["createIndexes"])

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


def configure(server: str, database: str, ttl: timedelta, *listeners: Any) -> None:
    with MongoDBSessionRepository(server, database, session_ttl=ttl, event_listeners=list(listeners)) as repository:
        repository.open_session("any")


@pytest.mark.own_database
@pytest.mark.parametrize("ttl", alternating(timedelta(hours=1), timedelta(days=300)))
def test_the_indexes_do_not_depend_on_the_value(server: str, database: str, stored: Stored, ttl: timedelta) -> None:
    configure(server, database, ttl)
    assert expiries(stored) == [0] * 5


@pytest.mark.own_database
def test_a_repository_without_a_value_builds_the_indexes_of_a_session_that_has_one(
    server: str, database: str, stored: Stored
) -> None:
    configure(server, database, TTL)
    for name in ("", *(f"_{name}" for name in PARTS)):
        stored.database[f"agent_sessions{name}"].drop_indexes()
    with MongoDBSessionRepository(f"{server}&appName=other", database) as other:
        other.open_session("any")
    eventually(lambda: expiries(stored) == [0] * 5)


@pytest.mark.own_database
def test_the_indexes_are_built_once(server: str, database: str, stored: Stored) -> None:
    indexed, log = Indexed(), CommandLog()
    with MongoDBSessionManagerFactory(server, database, session_ttl=TTL, event_listeners=[indexed, log]) as factory:
        factory.create_session_manager("a")
        eventually(lambda: len(indexed.names) == 5)
        eventually(lambda: expiries(stored) == [0] * 5 and "find" in log.names)
        log.clear()
        factory.create_session_manager("b")
        factory.create_session_manager("c")
    assert log.names == ["findAndModify"] * 2


@pytest.mark.own_database
def test_an_index_on_expires_at_of_the_application_stays(server: str, database: str, stored: Stored) -> None:
    stored.create_index("expires_at", name="theirs")
    configure(server, database, TTL)
    assert "expireAfterSeconds" not in stored.index_information()["theirs"]
    assert expiries(stored) == [0] * 5


@pytest.mark.own_database
def test_a_server_that_builds_no_index_is_told_of_and_harmless(
    server: str, database: str, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    with fail_point(server, failCommands=["createIndexes"], errorCode=13, times=100):
        configure(server, database, TTL)
    assert "nothing expires" in caplog.text
    assert ttl_of(stored, "any") == 28800


def test_lists_use_their_own_indexes(repository: MongoDBSessionRepository, stored: Stored) -> None:
    for n in range(20):
        repository.create_session(Session(f"s{n}", "AGENT"))
    eventually(lambda: expiries(stored) == [0] * 5 and "updated_at_1__id_1" in stored.index_information())
    assert len(repository.list_sessions(limit=5).sessions) == 5

    def index() -> str | None:  # a listed index can still be under construction
        found = stored.find({"updated_at": {"$gte": datetime(2020, 1, 1, tzinfo=UTC)}}).sort("updated_at", -1)
        name: str | None = found.explain()["queryPlanner"]["winningPlan"]["inputStage"].get("indexName")
        return name

    eventually(lambda: index() in ("updated_at_1", "updated_at_1__id_1"))


# What a turn costs.


@pytest.mark.parametrize(("save_on", "writes"), [("message", 2), ("invocation", 1)])
def test_a_turn_costs_what_it_costs_without(
    server: str, database: str, stored: Stored, save_on: str, writes: int
) -> None:
    commands = CommandLog()
    with MongoDBSessionManagerFactory(server, database, event_listeners=[commands], session_ttl=TTL) as factory:
        factory.create_session_manager("warm-up").close()
        eventually(lambda: not factory._connection._tasks)
        agent(factory.create_session_manager(ID), "before")("earlier")
        commands.clear()
        manager = factory.create_session_manager(ID, save_on=save_on)
        live = agent(manager, "hello", "again")
        live("one")
        live("two")
        manager.update_metadata({"colour": "red"})
        manager.sync_agent(live)
        assert commands.names == ["findAndModify"] + ["update"] * (2 * writes + 1)
    assert ttl_of(stored) == 28800


def test_a_write_costs_no_more_until_a_step_is_due(
    expires: None, server: str, database: str, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    log = CommandLog()
    with MongoDBSessionRepository(server, database, event_listeners=[log]) as other:
        other.open_session(ID)
        eventually(lambda: not other._async._connection._tasks)
        age(stored, EIGHTH * 0.9)
        log.clear()
        other.update_metadata(ID, {"n": 1})
        assert log.names == ["update"]
        age(stored, EIGHTH * 0.2)
        log.clear()
        other.update_metadata(ID, {"n": 2})
        # It does not match; the session is read again; its parts get the new date, in four collections; it matches.
        assert log.names == ["update", "find", *["update"] * 4, "update"]
        log.clear()
        other.update_metadata(ID, {"n": 3})
        assert log.names == ["update"]
    check_all_dated(stored)


# Everything rolls.


def swarm(repository: MongoDBSessionRepository) -> Swarm:
    return Swarm([agent(None, "x", agent_id="one")], id="swarm")


WRITES: dict[str, Callable[[Any], Any]] = {
    "create_agent": lambda r: r.create_agent(ID, SessionAgent("another", {}, {})),
    "update_agent": lambda r: r.update_agent(ID, SessionAgent("agent", {"n": 1}, {})),
    "create_message": lambda r: r.create_message(ID, "agent", said(12)),
    "create_message with an attachment": lambda r: r.create_message(ID, "agent", said(12, PICTURE[7:])),
    "create_message with a known attachment": lambda r: r.create_message(ID, "agent", said(12, PICTURE[2:])),
    "update_message": lambda r: r.update_message(ID, "agent", said(11, text="new")),
    "update_message with an attachment": lambda r: r.update_message(ID, "agent", said(11, PICTURE[9:], "new")),
    "update_metadata": lambda r: r.update_metadata(ID, {"a": 1}),
    "delete_metadata": lambda r: r.delete_metadata(ID, ["a"]),
    "add_feedback": lambda r: r.add_feedback(ID, {"rating": "up"}),
    "update_agent_config": lambda r: r.update_agent_config(ID, "agent", model="m"),
    "create_multi_agent": lambda r: r.create_multi_agent(ID, swarm(r)),
}


@pytest.mark.parametrize(
    ("write", "who"),
    sampled(
        [(write, who) for write in WRITES for who in ("repository", "lasting")],
        *((write, "lasting") for write in WRITES),
        *((write, "repository") for write in ("create_message with an attachment", "update_metadata")),
    ),
)
def test_every_write_keeps_the_whole_session(
    request: pytest.FixtureRequest, expires: None, stored: Stored, write: str, who: str
) -> None:
    """Also by a writer that has no `session_ttl`, and did not open the session."""
    age(stored, TTL * 0.9)
    begin = datetime.now(UTC)
    WRITES[write](request.getfixturevalue(who))
    session = stored.find_one({"_id": ID})
    assert begin + TTL <= session["expires_at"] <= begin + TTL + EIGHTH + timedelta(minutes=1)
    assert ttl_of(stored) == 28800
    check_all_dated(stored)


def test_a_swarm_keeps_its_session(
    expires: None, repository: MongoDBSessionRepository, lasting: Any, stored: Stored
) -> None:
    made = swarm(lasting)
    lasting.create_multi_agent(ID, made)
    age(stored, TTL * 0.9)
    lasting.update_multi_agent(ID, made)
    assert stored.find_one({"_id": ID})["expires_at"] >= datetime.now(UTC) + TTL - timedelta(minutes=1)
    check_all_dated(stored)


def test_a_turn_keeps_its_session(
    expires: None, server: str, database: str, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    with MongoDBSessionManager(ID, server, database, **SMALL) as manager:
        live = agent(manager, "hello", "again", agent_id="another")
        live("one")
        age(stored, TTL * 0.9)
        live("two")
        assert stored.find_one({"_id": ID})["expires_at"] >= datetime.now(UTC) + TTL - timedelta(minutes=1)
    check_all_dated(stored)


def test_reading_does_not_keep_a_session(expires: None, repository: MongoDBSessionRepository, stored: Stored) -> None:
    before = stored.find_one({"_id": ID})
    repository.open_session(ID)
    repository.list_messages(ID, "agent")
    repository.list_sessions()
    assert stored.find_one({"_id": ID}) == before


def test_a_message_of_long_ago_is_written_now(repository: MongoDBSessionRepository, stored: Stored) -> None:
    begin(repository)
    repository.create_message(
        ID, "agent", SessionMessage(said(0).message, 0, None, "2001-01-01T00:00:00", "2001-01-01T00:00:00")
    )
    session = stored.find_one({"_id": ID})
    assert session["updated_at"] >= session["created_at"]


# Sessions that did not expire.


def test_a_session_without_a_ttl_has_nothing_of_it(
    lasts: None, repository: MongoDBSessionRepository, lasting: MongoDBSessionRepository, stored: Stored
) -> None:
    lasting.update_metadata(ID, {"a": 1})
    assert not {"time_to_live", "expires_at"} & stored.find_one({"_id": ID}).keys()
    assert [part for part in parts_of(stored) if "expires_at" in part] == []
    repository.open_session(ID)  # is no write
    assert ttl_of(stored) is None


def test_an_expires_at_of_the_application_is_left_alone(
    lasts: None, lasting: MongoDBSessionRepository, stored: Stored
) -> None:
    theirs = datetime(2031, 1, 1, tzinfo=UTC)
    stored.update_one({"_id": ID}, {"$set": {"expires_at": theirs}})
    lasting.create_message(ID, "agent", said(12, PICTURE))
    assert stored.find_one({"_id": ID})["expires_at"] == theirs
    assert len(lasting.list_messages(ID, "agent")) == 13


@pytest.mark.parametrize("write", WRITES)
def test_a_session_expires_from_the_first_write_of_a_repository_with_a_ttl(
    lasts: None, repository: MongoDBSessionRepository, stored: Stored, write: str
) -> None:
    WRITES[write](repository)
    assert ttl_of(stored) == 28800
    check_all_dated(stored)


def test_a_part_that_is_stored_while_its_session_gets_a_ttl_is_dated(
    lasts: None,
    lasting: MongoDBSessionRepository,
    repository: MongoDBSessionRepository,
    server: str,
    database: str,
    stored: Stored,
) -> None:

    class Meanwhile(monitoring.CommandListener):
        """Dates the session after the attachment is stored, before the message is."""

        def started(self, event: monitoring.CommandStartedEvent) -> None:
            if event.command.get("insert") == "agent_sessions_attachments.files":
                repository.update_metadata(ID, {"dated": True})

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
        def failed(self, event: monitoring.CommandFailedEvent) -> None: ...

    with MongoDBSessionRepository(server, database, event_listeners=[Meanwhile()], **SMALL) as slow:
        slow.create_message(ID, "agent", said(12, PICTURE[5:]))
    check_all_dated(stored)


def test_a_writer_that_ends_while_a_session_gets_a_ttl_loses_nothing(
    lasts: None, repository: MongoDBSessionRepository, lasting: MongoDBSessionRepository, server: str, stored: Stored
) -> None:
    """However far it got, no part has an earlier date than the session; the next write does the rest."""
    for done in range(8):
        with (
            failing_after(server, done, failCommands=["update", "findAndModify"], errorCode=8000),
            suppress(MongoDBSessionError),
        ):
            repository.update_metadata(ID, {"done": done})
        check_dates(stored)
        age(stored, EIGHTH / 2)
    repository.update_metadata(ID, {"done": True})
    check_all_dated(stored)


@pytest.mark.parametrize("done", sampled(range(9), *run_random().sample(range(9), 3)))
def test_a_part_that_is_stored_while_its_session_gets_a_longer_ttl_does_not_expire_before_it(
    server: str,
    stored: Stored,
    prepared: dict[timedelta | None, Documents],
    brief: MongoDBSessionRepository,
    repository: MongoDBSessionRepository,
    done: int,
) -> None:
    """Wherever the writer with the longer one ends; the other one has read the session before."""
    store_again(stored, prepared[TTL / 10])
    brief.session_exists(ID)
    with failing_after(server, done, failCommands=["update"], errorCode=8000), suppress(MongoDBSessionError):
        repository.update_metadata(ID, {"longer": True})
    brief.create_message(ID, "agent", said(12, PICTURE[5:]))
    check_dates(stored)
    repository.update_metadata(ID, {"longer": True})
    assert stored.find_one({"_id": ID})["expires_at"] >= datetime.now(UTC) + TTL - timedelta(minutes=1)
    check_all_dated(stored)


def test_a_part_that_is_stored_between_the_dates_of_a_longer_ttl_does_not_expire_before_its_session(
    server: str,
    database: str,
    stored: Stored,
    prepared: dict[timedelta | None, Documents],
    brief: MongoDBSessionRepository,
) -> None:
    """Even if the writer with the longer one ends at once: the other one has read the session before."""
    found: list[dict[str, Any]] = []

    class Meanwhile(monitoring.CommandListener):
        """Stores a message with an attachment after the parts are dated, and before the session is."""

        statement = 0

        def started(self, event: monitoring.CommandStartedEvent) -> None:
            if event.command.get("update") == "agent_sessions" and not self.statement:
                self.statement = event.request_id
                brief.create_message(ID, "agent", said(12, PICTURE[5:]))

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
            if event.request_id == self.statement:
                session = stored.find_one({"_id": ID})
                found.extend([session, *parts_of(stored, session)])

        def failed(self, event: monitoring.CommandFailedEvent) -> None: ...

    with MongoDBSessionRepository(server, database, session_ttl=TTL, event_listeners=[Meanwhile()], **SMALL) as later:
        store_again(stored, prepared[TTL / 10])
        brief.session_exists(ID)
        later.update_metadata(ID, {"longer": True})
        session, *parts = found
        assert session["metadata"] == {"longer": True}
        assert len(parts) >= 4
        assert [part["_id"] for part in parts if part["expires_at"] < session["expires_at"]] == []


def test_a_part_is_dated_again_if_its_session_can_expire_later() -> None:
    part = Dates(60, datetime(2030, 1, 1, tzinfo=UTC))
    second = timedelta(seconds=1)
    for life, outlives in (
        (Life(None, 60, part.expires_at + second), True),
        (Life(None, 60, part.expires_at), False),
        (Life(None, 60, part.expires_at - second), False),
        (Life(None, 120, part.expires_at - second), True),
        (Life(None, None, None), True),
    ):
        assert life.outlives(part) == outlives
    assert not Life().outlives(UNDATED)


def test_a_bucket_of_a_session_that_does_not_expire_stays(
    repository: MongoDBSessionRepository, lasting: MongoDBSessionRepository, stored: Stored
) -> None:
    """The repository with a `session_ttl` moves messages before it has written anything."""
    begin(lasting)
    for n in range(8):
        lasting.create_message(ID, "agent", said(n))
    repository.open_session(ID)
    core, refusal = repository._async, MessageTooLargeError("the document is full")
    refusal.code = 17419
    core.portal.call(core._store.mover.make_room, ID, refusal)
    assert stored.find_one({"_id": ID})["agents"]["agent"]["archived"]
    assert ttl_of(stored) is None
    assert all("expires_at" not in part for part in parts_of(stored))


# Never before its session.


def test_a_move_that_a_step_overtakes_begins_again(
    expires: None, repository: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    numbers = stored.aggregate([{"$match": {"_id": ID}}, {"$project": {"head": head_numbers("$agents.agent")}}])
    head = Head.of(next(iter(numbers))["head"])
    step = Limits(4, 2**20).step(head)
    age(stored, EIGHTH * 2)
    old = datetime.now(UTC) + TTL - EIGHTH
    seconds = round(TTL.total_seconds())
    stored.aggregate(merge(ID, "agent", head, step, "agent_sessions_archive", Dates(seconds, old)))
    repository.update_metadata(ID, {"renewed": True})
    late = cut(ID, "agent", head, step, Dates(seconds, old))
    assert stored.update_one(late.filter, late.update).matched_count == 0
    none = cut(ID, "agent", head, step, UNDATED)
    assert stored.update_one(none.filter, none.update).matched_count == 0
    check_all_dated(stored)


@pytest.mark.parametrize("before", [0, 1], ids=["the first", "another"])
def test_an_attachment_that_takes_longer_than_its_date_allows(
    server: str, database: str, stored: Stored, before: int
) -> None:
    class Slow(monitoring.CommandListener):
        def started(self, event: monitoring.CommandStartedEvent) -> None:
            if event.command.get("insert") == "agent_sessions_attachments.files":
                age(stored, TTL * 0.9)

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
        def failed(self, event: monitoring.CommandFailedEvent) -> None: ...

    with MongoDBSessionRepository(server, database, session_ttl=TTL, **SMALL) as repository:
        begin(repository)
        for n in range(before):
            repository.create_message(ID, "agent", said(n, PICTURE[n:]))
    with MongoDBSessionRepository(server, database, session_ttl=TTL, event_listeners=[Slow()], **SMALL) as slow:
        slow.create_message(ID, "agent", said(before, PICTURE[before:]))
        assert len(slow.list_messages(ID, "agent")) == before + 1
    check_dates(stored)
    assert stored.find_one({"_id": ID})["expires_at"] >= datetime.now(UTC) + TTL - timedelta(minutes=1)


@pytest.mark.parametrize("seed", sampled(range(6), run_random().randrange(6)))
def test_however_much_time_passes_between_writes_no_part_goes_before_its_session(
    server: str, database: str, stored: Stored, seed: int
) -> None:
    """Writers with two times to live, and without one."""
    chance = random.Random(seed)
    limits: Any = {"max_embedded_messages": 4, "max_inline_attachment_bytes": 1000}
    ttls: list[Any] = [{}, {"session_ttl": TTL}, {"session_ttl": 3 * TTL}]
    writers = [MongoDBSessionRepository(server, database, **limits, **ttl) for ttl in ttls]
    try:
        begin(chance.choice(writers))
        count = 0
        for _ in range(30):
            age(stored, EIGHTH * chance.uniform(0, 3))
            writer = chance.choice(writers)
            match chance.randrange(4):
                case 0:
                    writer.update_metadata(ID, {"n": chance.random()})
                case 1:
                    writer.add_feedback(ID, {"n": chance.random()})
                case 2:
                    writer.create_message(ID, "agent", said(count, PICTURE[chance.randrange(8) :]))
                    count += 1
                case _:
                    writer.create_message(ID, "agent", said(count))
                    count += 1
            check_dates(stored)
        assert texts([m.to_message() for m in writers[0].list_messages(ID, "agent")]) == [
            f"text {n}" for n in range(count)
        ]
    finally:
        for writer in writers:
            writer.close()
    check_dates(stored)


def test_many_writers_at_once(server: str, database: str, stored: Stored) -> None:
    """With so short a time to live that they take step after step."""
    ttl = timedelta(seconds=4)
    failures: list[BaseException] = []
    done = threading.Event()

    def talk() -> None:
        with MongoDBSessionRepository(
            server, database, session_ttl=ttl, max_embedded_messages=4, max_inline_attachment_bytes=1000
        ) as repository:
            for n in range(30):
                repository.create_message(ID, "agent", said(n, PICTURE[n % 8 :] if n % 5 == 0 else None))
                time.sleep(0.02)

    def annotate(options: dict[str, Any]) -> None:
        with MongoDBSessionRepository(server, database, **options) as repository:
            while not done.is_set():
                repository.update_metadata(ID, {"n": time.time()})
                time.sleep(0.01)

    def watch() -> None:
        try:
            while not done.is_set():
                if (session := stored.find_one({"_id": ID})) is not None:
                    check_dates(stored, session)
                time.sleep(0.02)
        except BaseException as error:
            failures.append(error)

    with MongoDBSessionRepository(server, database, session_ttl=ttl) as repository:
        begin(repository)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(annotate, {}), pool.submit(annotate, {}), pool.submit(watch)]
        try:
            pool.submit(talk).result(120)
        finally:
            done.set()
        for future in others:
            future.result(60)
    assert failures == []
    check_dates(stored)
    with MongoDBSessionRepository(server, database) as repository:
        assert len(repository.list_messages(ID, "agent")) == 30


def test_a_refused_write_of_somebody_with_a_ttl_has_no_part_of_a_session_expire_before_it(
    lasts: None, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    def opened(**options: Any) -> MongoDBSessionManager:
        return factory.create_session_manager(ID, **options)

    with opened() as manager:
        agent(manager, "before", agent_id="another")("earlier")
    with opened(session_ttl=TTL) as manager:
        late = agent(manager, "late", agent_id="another")
        with opened() as other:
            agent(other, "before", agent_id="another")("meanwhile")
        with pytest.raises(SessionConflictError):
            late("refused")
    found, parts = stored.find_one({"_id": ID}), parts_of(stored)
    assert len(parts) >= 3
    assert [part["_id"] for part in parts if "expires_at" in part and part["expires_at"] < found["expires_at"]] == []


def test_a_date_that_an_application_has_stored_removes_no_session(expiring: str, soon_removed: Stored) -> None:
    stored = soon_removed
    with MongoDBSessionRepository(expiring, stored.database.name, session_ttl=timedelta(seconds=1)) as repository:
        stored.insert_one({"_id": "theirs", "session_id": "theirs", "expires_at": datetime(2020, 1, 1, tzinfo=UTC)})
        moment = "2026-11-22T12:00:00+00:00"
        repository.create_session(Session("ours", "AGENT", moment, moment))
        eventually(lambda: stored.find_one({"_id": "ours"}) is None)
        assert stored.find_one({"_id": "theirs"}) is not None
