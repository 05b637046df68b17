"""Factories: one client, many managers; the process-wide ones; and the indexes they build once."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pymongo
import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, IndexModel

from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    ConfigurationError,
    DatabaseUnavailableError,
    FactoryNotInitializedError,
    InvalidArgumentError,
    MongoDBConnectionPool,
    MongoDBSessionError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    PendingSession,
    SessionClosedError,
    close_global_factory,
    create_mongodb_session_manager,
    create_mongodb_session_manager_async,
    get_global_factory,
    initialize_global_factory,
)
from mongodb_session_manager._io import indexes
from mongodb_session_manager._io.collection import Collection
from mongodb_session_manager._io.indexes import _forget, see_again, unseen
from support import CommandLog, agent, eventually, fail_point, texts

Documents = pymongo.collection.Collection[dict[str, Any]]

DRIVERS = pytest.mark.parametrize("driver_class", [AsyncIOMotorClient, AsyncMongoClient])

USUAL = {
    "_id_",
    "session_id_1",
    "state_1",
    *("tags_1", "owner_1_created_at_1__id_1", "owner_1_updated_at_1__id_1"),
    *("created_at_1", "created_at_1__id_1"),
    *("updated_at_1", "updated_at_1__id_1"),
    *("application_name_1", "application_name_1_created_at_1__id_1", "application_name_1_updated_at_1__id_1"),
}


@pytest.fixture
def cold(server: str, database: str, commands: CommandLog) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory that has not sent anything yet."""
    with MongoDBSessionManagerFactory(server, database, event_listeners=[commands]) as factory:
        yield factory


@pytest.fixture
def global_factory_closed() -> Iterator[None]:
    close_global_factory()
    yield
    close_global_factory()


@pytest.fixture
def pool_closed() -> Iterator[None]:
    MongoDBConnectionPool.close()
    yield
    MongoDBConnectionPool.close()


def conversation(documents: Documents, session_id: str = "s") -> list[str]:
    document = documents.find_one({"_id": session_id})
    assert document is not None
    return texts(document["agents"]["agent"]["messages"])


def turn(manager: MongoDBSessionManager) -> None:
    agent(manager, "hello")("hi")


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run `work(0)`, `work(1)`, ... on threads that start at the same moment; raise what the first of them raised."""
    together = threading.Barrier(count)
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        together.wait()
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# Overrides.


def test_a_manager_may_differ_in_where_it_stores(
    factory: MongoDBSessionManagerFactory, driver: pymongo.MongoClient[dict[str, Any]], database: str
) -> None:
    other = f"{database}_other"
    try:
        turn(factory.create_session_manager("s", collection_name="elsewhere"))
        turn(factory.create_session_manager("s", database_name=other))
        assert conversation(driver[database]["elsewhere"]) == ["hi", "hello"]
        assert conversation(driver[other]["agent_sessions"]) == ["hi", "hello"]
        assert driver[database]["agent_sessions"].find_one({"_id": "s"}) is None
        turn(factory.create_session_manager("s"))
        assert conversation(driver[database]["agent_sessions"]) == ["hi", "hello"]
    finally:
        factory.close()  # with the index builds under way
        driver.drop_database(other)


def test_a_manager_may_differ_in_when_it_stores(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    turn(factory.create_session_manager("s", save_on="invocation"))
    assert commands.names == ["findAndModify", "update"]
    commands.clear()
    turn(factory.create_session_manager("t"))
    assert commands.names == ["findAndModify", "update", "update"]


def test_overrides_do_not_change_the_factory(server: str, database: str, stored: Documents) -> None:
    with MongoDBSessionManagerFactory(server, database, application_name="ours") as factory:
        factory.create_session_manager("s", application_name="theirs")
        factory.create_session_manager("t")
        factory.create_session_manager("u", application_name=None)
    assert {each["_id"]: each["application_name"] for each in stored.find()} == {
        "s": "theirs",
        "t": "ours",
        "u": "ours",
    }


def test_what_cannot_be_overridden_is_named(factory: MongoDBSessionManagerFactory) -> None:
    for name, value in {"no_such": 1, "connection_string": "mongodb://host", "client": 5, "maxPoolSize": 5}.items():
        override: dict[str, Any] = {name: value}
        with pytest.raises(ConfigurationError, match=name):
            factory.create_session_manager("s", **override)
        with pytest.raises(ConfigurationError, match=name):
            asyncio.run(factory.create_session_manager_async("s", **override))


def test_save_on_is_checked(server: str, factory: MongoDBSessionManagerFactory) -> None:
    values: list[Any] = ["", "never", "Message", True, ["message"]]
    for save_on in values:
        with pytest.raises(ConfigurationError, match="save_on"):
            factory.create_session_manager("s", save_on=save_on)
        with pytest.raises(ConfigurationError, match="save_on"):
            MongoDBSessionManagerFactory(server, save_on=save_on)
        with pytest.raises(ConfigurationError, match="save_on"):
            MongoDBSessionManager("s", server, save_on=save_on)
        with pytest.raises(ConfigurationError, match="save_on"):
            AsyncMongoDBSessionManager("s", server, save_on=save_on)


def test_metadata_fields_are_checked(server: str, factory: MongoDBSessionManagerFactory) -> None:
    values: list[Any] = ["priority", 5, [5], b"priority", {"a": 1}, [None]]
    values += [["a..b"], ["$x"], [""], ["a\0b"], ["a.$b"], ["\ud800"]]
    for fields in values:
        with pytest.raises(ConfigurationError, match="metadata_fields"):
            MongoDBSessionManagerFactory(server, metadata_fields=fields)
        with pytest.raises(ConfigurationError, match="metadata_fields"):
            factory.create_session_manager("s", metadata_fields=fields)


def test_an_application_name_is_text(server: str, factory: MongoDBSessionManagerFactory) -> None:
    values: list[Any] = [5, b"name", ["name"], {"$ne": None}]
    for name in values:
        with pytest.raises(ConfigurationError, match="application_name"):
            MongoDBSessionManagerFactory(server, application_name=name)
        with pytest.raises(ConfigurationError, match="application_name"):
            factory.create_session_manager("s", application_name=name)


def test_a_bad_session_id_sends_nothing(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    values: list[Any] = [None, "", 5, {"$ne": None}, b"s", "a\0b", ["s"]]
    for session_id in values:
        with pytest.raises(InvalidArgumentError, match="session_id"):
            factory.create_session_manager(session_id)
        with pytest.raises(InvalidArgumentError, match="session_id"):
            asyncio.run(factory.create_session_manager_async(session_id))
    assert commands.names == []


# One client.


def test_managers_share_the_connections(factory: MongoDBSessionManagerFactory, server: str) -> None:
    eventually(lambda: factory.get_connection_stats()["connections_in_use"] == 0)
    before = factory.get_connection_stats()["connections_open"]
    managers = [factory.create_session_manager(f"s{number}") for number in range(10)]
    assert factory.get_connection_stats()["connections_open"] == before
    for manager in managers:
        manager.close()
    assert factory.get_connection_stats()["connections_open"] == before


def test_connections_stay_within_the_pool(server: str, database: str) -> None:
    with MongoDBSessionManagerFactory(server, database, maxPoolSize=3) as factory:
        in_threads(10, lambda number: factory.create_session_manager(f"s{number}").update_metadata({"a": 1}))
        assert 1 <= (factory.get_connection_stats()["connections_open"] or 0) <= 3


def test_closing_a_manager_does_not_close_the_factory(factory: MongoDBSessionManagerFactory, stored: Documents) -> None:
    with factory.create_session_manager("s") as manager:
        turn(manager)
    other = factory.create_session_manager("t")
    manager.close()
    turn(other)
    asyncio.run(close_an_async_manager(factory))
    factory.ping()
    assert factory.get_connection_stats()["status"] == "connected"
    assert conversation(stored) == conversation(stored, "t") == ["hi", "hello"]


async def close_an_async_manager(factory: MongoDBSessionManagerFactory) -> None:
    manager = await factory.create_session_manager_async("u")
    await agent(manager, "hello").invoke_async("hi")
    await manager.close()


def test_a_factory_closes_with_its_context(server: str, database: str) -> None:
    with MongoDBSessionManagerFactory(server, database) as factory:
        factory.ping()
    with pytest.raises(SessionClosedError):
        factory.ping()
    assert factory.get_connection_stats()["status"] == "closed"


@pytest.mark.anyio
async def test_a_factory_closes_with_its_async_context(server: str, database: str) -> None:
    async with MongoDBSessionManagerFactory(server, database) as factory:
        await factory.ping_async()
    with pytest.raises(SessionClosedError):
        await factory.ping_async()
    assert (await factory.get_connection_stats_async())["status"] == "closed"


def test_a_factory_closes_when_its_context_fails(server: str, database: str) -> None:
    with pytest.raises(LookupError), MongoDBSessionManagerFactory(server, database) as factory:
        raise LookupError
    with pytest.raises(SessionClosedError):
        factory.create_session_manager("s")


def test_making_a_factory_sends_nothing(cold: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    assert cold.get_connection_stats()["status"] == "connected"
    cold.ping()
    assert commands.names == []


def test_many_open_the_same_new_session_at_once(cold: MongoDBSessionManagerFactory, stored: Documents) -> None:
    in_threads(20, lambda _: cold.create_session_manager("s").close())
    assert stored.count_documents({"_id": "s"}) == 1


@DRIVERS
@pytest.mark.anyio
async def test_a_factory_over_a_borrowed_client(
    server: str, database: str, stored: Documents, driver_class: Any
) -> None:
    client = driver_class(server)
    await client.admin.command("ping")
    async with (
        MongoDBSessionManagerFactory(client=client, database_name=database) as factory,
        await factory.create_session_manager_async("s", save_on="invocation") as manager,
    ):
        await agent(manager, "hello").invoke_async("hi")
    assert (await client[database]["agent_sessions"].find_one({"_id": "s"}))["_id"] == "s"
    if inspect.isawaitable(closing := client.close()):
        await closing
    assert conversation(stored) == ["hi", "hello"]


# The process-wide factory.


@pytest.mark.usefixtures("global_factory_closed")
def test_the_global_factory(server: str, database: str, stored: Documents) -> None:
    factory = initialize_global_factory(server, database, application_name="ours")
    assert isinstance(factory, MongoDBSessionManagerFactory)
    assert get_global_factory() is factory
    turn(get_global_factory().create_session_manager("s"))
    assert conversation(stored) == ["hi", "hello"]
    close_global_factory()
    close_global_factory()
    with pytest.raises(FactoryNotInitializedError):
        get_global_factory()
    with pytest.raises(SessionClosedError):
        factory.create_session_manager("s")


@pytest.mark.usefixtures("global_factory_closed")
def test_no_global_factory() -> None:
    with pytest.raises(RuntimeError, match="initialize_global_factory") as raised:
        get_global_factory()
    assert isinstance(raised.value, FactoryNotInitializedError)
    assert isinstance(raised.value, MongoDBSessionError)
    close_global_factory()


@pytest.mark.usefixtures("global_factory_closed")
def test_initialising_again_closes_the_earlier_global_factory(server: str, database: str) -> None:
    earlier = initialize_global_factory(server, database)
    earlier.ping()
    later = initialize_global_factory(server, database)
    assert get_global_factory() is later
    with pytest.raises(SessionClosedError):
        earlier.ping()
    later.ping()


@pytest.mark.usefixtures("global_factory_closed")
def test_a_failed_initialisation_keeps_the_earlier_global_factory(server: str, database: str) -> None:
    earlier = initialize_global_factory(server, database)
    with pytest.raises(ConfigurationError):
        initialize_global_factory("mongodb://host:port")
    assert get_global_factory() is earlier
    earlier.ping()


@pytest.mark.usefixtures("global_factory_closed")
def test_initialising_the_global_factory_from_many_threads(server: str, database: str) -> None:
    made: list[MongoDBSessionManagerFactory] = []

    def initialise(_: int) -> None:
        factory = initialize_global_factory(server, database)
        made.append(factory)

    in_threads(16, initialise)
    last = get_global_factory()
    assert len(made) == 16
    last.ping()
    assert [each for each in made if each is not last and each.get_connection_stats()["status"] != "closed"] == []


@pytest.mark.usefixtures("global_factory_closed")
@pytest.mark.anyio
async def test_the_global_factory_on_an_event_loop(server: str, database: str, stored: Documents) -> None:
    factory = initialize_global_factory(server, database)
    async with await get_global_factory().create_session_manager_async("s") as manager:
        await agent(manager, "hello").invoke_async("hi")
    await factory.close_async()
    assert conversation(stored) == ["hi", "hello"]


# The original's pool.


@pytest.mark.usefixtures("pool_closed")
def test_the_pool_and_its_client(server: str, database: str, stored: Documents) -> None:
    assert MongoDBConnectionPool.get_client() is None
    client = MongoDBConnectionPool.initialize(server, maxPoolSize=7)
    assert MongoDBConnectionPool.get_client() is client
    assert MongoDBConnectionPool.initialize(server, maxPoolSize=7) is client
    with MongoDBSessionManager("s", client=client, database_name=database) as manager:
        turn(manager)

    async def main() -> None:
        async with await create_mongodb_session_manager_async("s", client=client, database_name=database) as manager:
            await agent(manager, "bye").invoke_async("I am off")

    asyncio.run(main())
    stats = MongoDBConnectionPool.get_pool_stats()
    assert stats["status"] == "connected"
    assert stats["pool_config"]["maxPoolSize"] == 7
    assert (stats["connections_open"] or 0) >= 1
    assert conversation(stored) == ["hi", "hello", "I am off", "bye"]


@pytest.mark.usefixtures("pool_closed")
def test_the_pool_closes(server: str, database: str) -> None:
    client = MongoDBConnectionPool.initialize(server)
    manager = MongoDBSessionManager("s", client=client, database_name=database)
    live = agent(manager, "hello")
    MongoDBConnectionPool.close()
    MongoDBConnectionPool.close()
    assert MongoDBConnectionPool.get_client() is None
    with pytest.raises(SessionClosedError):
        live("hi")
    assert MongoDBConnectionPool.get_pool_stats()["status"] == "not_initialized"
    assert MongoDBConnectionPool.initialize(server) is not client


@pytest.mark.usefixtures("pool_closed")
def test_other_arguments_replace_the_pool(server: str) -> None:
    earlier = MongoDBConnectionPool.initialize(server, maxPoolSize=7)
    later = MongoDBConnectionPool.initialize(server, maxPoolSize=8)
    assert later is not earlier
    assert MongoDBConnectionPool.get_client() is later
    assert MongoDBConnectionPool.get_pool_stats()["pool_config"]["maxPoolSize"] == 8


@pytest.mark.usefixtures("pool_closed")
def test_the_clients_of_the_pool_do_what_those_of_pymongo_do(server: str, database: str) -> None:
    assert MongoDBConnectionPool() is MongoDBConnectionPool()
    client = MongoDBConnectionPool.initialize(server)
    assert isinstance(client, pymongo.MongoClient)
    assert client.admin.command("ping")["ok"] == 1
    client[database]["c"].insert_one({"_id": 1})
    assert MongoDBConnectionPool().get_client()[database]["c"].find_one({"_id": 1}) == {"_id": 1}  # type: ignore[index]


@pytest.mark.usefixtures("pool_closed")
def test_the_stats_of_a_pool_without_a_server() -> None:
    assert MongoDBConnectionPool.get_pool_stats()["status"] == "not_initialized"
    MongoDBConnectionPool.initialize("mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=100")
    stats = MongoDBConnectionPool.get_pool_stats()
    assert stats["status"] == "error"
    assert "127.0.0.1:1" in str(stats["error"])


@pytest.mark.usefixtures("pool_closed", "global_factory_closed")
def test_the_pool_is_that_of_the_global_factory(
    server: str, database: str, stored: Documents, commands: CommandLog
) -> None:
    options: Any = {"maxPoolSize": 7, "event_listeners": [commands]}
    factory = initialize_global_factory(server, database, **options)
    turn(factory.create_session_manager("s"))
    commands.clear()
    client = MongoDBConnectionPool.get_client()
    assert client is not None
    assert client[database]["agent_sessions"].find_one({"_id": "s"}, {"_id": 1}) == {"_id": "s"}
    assert "find" in commands.names  # by the factory's own client
    stats = MongoDBConnectionPool.get_pool_stats()
    assert stats["status"] == "connected"
    assert stats["pool_config"] == factory.get_connection_stats()["pool_config"]
    assert (stats["connections_open"] or 0) >= 1
    assert MongoDBConnectionPool.initialize(server, **options) is client
    with MongoDBSessionManager("t", client=client, database_name=database) as manager:
        turn(manager)
    assert conversation(stored, "t") == ["hi", "hello"]
    close_global_factory()
    assert MongoDBConnectionPool.get_client() is None
    assert MongoDBConnectionPool.get_pool_stats()["status"] == "not_initialized"


@pytest.mark.usefixtures("pool_closed", "global_factory_closed")
def test_a_global_factory_takes_the_pool_that_is_there(server: str, database: str) -> None:
    client = MongoDBConnectionPool.initialize(server, maxPoolSize=7)
    client.admin.command("ping")
    factory = initialize_global_factory(server, database, maxPoolSize=7)
    turn(factory.create_session_manager("s"))
    assert MongoDBConnectionPool.get_client() is client
    assert factory.count_sessions() == 1
    # Another one with the same settings does not lose its connections when the earlier one is closed.
    later = initialize_global_factory(server, database, maxPoolSize=7)
    assert later.count_sessions() == 1
    with pytest.raises(pymongo.errors.InvalidOperation):
        client.admin.command("ping")
    assert factory.get_connection_stats()["status"] == "closed"
    assert MongoDBConnectionPool.get_client() is not client


@pytest.mark.usefixtures("pool_closed", "global_factory_closed")
def test_closing_the_pool_closes_the_global_factory_that_took_it(server: str, database: str) -> None:
    MongoDBConnectionPool.initialize(server)
    factory = initialize_global_factory(server, database)
    factory.ping()
    MongoDBConnectionPool.close()
    with pytest.raises(SessionClosedError):
        factory.ping()


@pytest.mark.usefixtures("pool_closed", "global_factory_closed")
def test_a_global_factory_with_other_settings_replaces_the_pool(server: str, database: str) -> None:
    client = MongoDBConnectionPool.initialize(server, maxPoolSize=7)
    factory = initialize_global_factory(server, database, maxPoolSize=8)
    assert MongoDBConnectionPool.get_client() is not client
    assert MongoDBConnectionPool.get_pool_stats()["pool_config"]["maxPoolSize"] == 8
    # A pool with settings of its own leaves the factory open.
    assert MongoDBConnectionPool.initialize(server, maxPoolSize=9) is not client
    assert factory.count_sessions() == 0


@pytest.mark.usefixtures("pool_closed", "global_factory_closed")
def test_a_factory_of_its_own_is_not_the_pool(server: str, database: str) -> None:
    with MongoDBSessionManagerFactory(server, database) as factory:
        factory.ping()
        assert MongoDBConnectionPool.get_client() is None
        with pytest.raises(FactoryNotInitializedError):
            get_global_factory()
        initialize_global_factory(server, database)
        close_global_factory()
        factory.ping()


@pytest.mark.anyio
@pytest.mark.usefixtures("pool_closed", "global_factory_closed")
async def test_the_pool_of_a_global_factory_over_a_borrowed_client(server: str, database: str) -> None:
    motor: Any = AsyncIOMotorClient(server)
    await initialize_global_factory(client=motor, database_name=database).ping_async()
    assert MongoDBConnectionPool.get_client() is motor.delegate
    await get_global_factory().close_async()
    assert (await motor.admin.command("ping"))["ok"] == 1
    motor.close()
    theirs: Any = AsyncMongoClient(server)
    factory = initialize_global_factory(client=theirs, database_name=database)
    with pytest.raises(ConfigurationError, match="AsyncMongoClient"):
        MongoDBConnectionPool.get_client()
    await factory.close_async()
    await theirs.close()


@pytest.mark.usefixtures("pool_closed")
def test_the_pool_asked_by_many_at_once_makes_one_client(server: str) -> None:
    clients: list[Any] = []
    in_threads(16, lambda _: clients.append(MongoDBConnectionPool.initialize(server)))
    assert len({id(client) for client in clients}) == 1


@pytest.mark.usefixtures("pool_closed")
def test_a_pool_that_cannot_be_leaves_no_trace() -> None:
    with pytest.raises(ConfigurationError):
        MongoDBConnectionPool.initialize("mongodb://host:port")
    assert MongoDBConnectionPool.get_client() is None


@pytest.mark.usefixtures("pool_closed")
def test_a_pool_with_an_option_that_cannot_be_leaves_no_trace(server: str) -> None:
    with pytest.raises(ConfigurationError):
        MongoDBConnectionPool.initialize(server, no_such_option=1)
    assert MongoDBConnectionPool.get_client() is None


# One-call constructors.


def test_create_mongodb_session_manager(server: str, database: str, driver: Any) -> None:
    with create_mongodb_session_manager("s", server, database, "elsewhere", application_name="ours") as manager:
        assert isinstance(manager, MongoDBSessionManager)
        assert manager.get_application_name() == "ours"
        turn(manager)
    assert conversation(driver[database]["elsewhere"]) == ["hi", "hello"]


@pytest.mark.anyio
async def test_create_mongodb_session_manager_async(server: str, database: str, driver: Any) -> None:
    async with await create_mongodb_session_manager_async(
        "s", server, database, "elsewhere", application_name="ours"
    ) as manager:
        assert isinstance(manager, AsyncMongoDBSessionManager)
        assert await manager.get_application_name() == "ours"
        await agent(manager, "hello").invoke_async("hi")
    assert conversation(driver[database]["elsewhere"]) == ["hi", "hello"]


@pytest.mark.anyio
@pytest.mark.parametrize("entrance", ["one call", "factory"])
async def test_async_with_opens_and_closes_a_session(
    factory: MongoDBSessionManagerFactory, server: str, database: str, stored: Documents, entrance: str
) -> None:
    def pending() -> PendingSession:
        if entrance == "factory":
            return factory.create_session_manager_async("s")
        return create_mongodb_session_manager_async("s", server, database)

    async with pending() as manager:
        await agent(manager, "hello").invoke_async("hi")
    with pytest.raises(SessionClosedError):
        await manager.get_metadata()
    with pytest.raises(ZeroDivisionError):
        async with pending() as manager:
            _ = 1 / 0
    with pytest.raises(SessionClosedError):
        await manager.get_metadata()
    assert conversation(stored) == ["hi", "hello"]


@pytest.mark.anyio
async def test_a_pending_session_is_a_coroutine(factory: MongoDBSessionManagerFactory) -> None:
    def pending(session_id: str) -> PendingSession:
        return factory.create_session_manager_async(session_id)

    managers = [
        *await asyncio.gather(pending("a"), pending("b")),
        await asyncio.wait_for(pending("c"), 60),
        await asyncio.create_task(pending("d")),
        await asyncio.to_thread(asyncio.run, pending("e")),
    ]
    assert [manager.session_id for manager in managers] == ["a", "b", "c", "d", "e"]


@pytest.mark.anyio
async def test_a_session_that_is_never_awaited_is_not_opened_and_warned_of(
    factory: MongoDBSessionManagerFactory, server: str, database: str, commands: CommandLog
) -> None:
    with pytest.warns(RuntimeWarning, match=r"'create_session_manager_async' was never awaited"):
        factory.create_session_manager_async("s")
    with pytest.warns(RuntimeWarning, match=r"'create_mongodb_session_manager_async' was never awaited"):
        create_mongodb_session_manager_async("s", server, database)
    factory.create_session_manager_async("s").close()
    assert not await factory.session_exists_async("s")
    assert "findAndModify" not in commands.names


@pytest.mark.anyio
async def test_a_failed_open_may_be_tried_again_with_the_same_factory(server: str, database: str) -> None:
    async with MongoDBSessionManagerFactory(server, database, heartbeatFrequencyMS=500) as factory:
        with (
            fail_point(server, failCommands=["findAndModify"], times=1000, closeConnection=True),
            pytest.raises(DatabaseUnavailableError),
        ):
            await factory.create_session_manager_async("s")
        async with await factory.create_session_manager_async("s") as manager:
            await agent(manager, "hello").invoke_async("hi")


# Indexes.


def index_names(documents: Documents) -> set[str]:
    return set(documents.index_information())


def metadata_indexes(*fields: str) -> set[str]:
    ends = ("_1", "_1_created_at_1__id_1", "_1_updated_at_1__id_1")
    return {f"metadata.{field}{end}" for field in fields for end in ends}


@pytest.mark.own_database
def test_more_metadata_fields_than_indexes_may_be(server: str, database: str, stored: Documents) -> None:
    fields = ["priority", "customer.id", *(f"f{number}" for number in range(28))]
    with MongoDBSessionManagerFactory(server, database, metadata_fields=[*fields, "priority"]) as factory:
        factory.create_session_manager("s")
    # Closing has waited for them.
    names = index_names(stored)
    assert len(names) == 64
    assert names > {"created_at_1", "updated_at_1", "session_id_1", "application_name_1"}
    assert names > {f"metadata.{field}_1" for field in fields}
    assert names > {f"metadata.{field}_1_updated_at_1__id_1" for field in fields[:23]}


@pytest.mark.own_database
def test_indexes_are_built_once_for_many_managers_and_factories(
    server: str, database: str, commands: CommandLog, stored: Documents
) -> None:
    for _ in range(2):
        with MongoDBSessionManagerFactory(server, database, event_listeners=[commands]) as factory:
            in_threads(20, lambda number, factory=factory: factory.create_session_manager(f"s{number}"))
    assert stored.count_documents({}) == 20
    with create_mongodb_session_manager("s", server, database, event_listeners=[commands]) as manager:
        turn(manager)
    assert commands.names.count("createIndexes") == 1
    assert index_names(stored) == USUAL


def test_every_collection_gets_its_indexes_and_a_new_metadata_field_its_own_alone(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, driver: Any, database: str
) -> None:
    for _ in range(2):
        factory.create_session_manager("s", collection_name="indexed")
    eventually(lambda: index_names(driver[database]["indexed"]) == USUAL)
    assert commands.names.count("createIndexes") == 1
    for _ in range(2):
        factory.create_session_manager("s", collection_name="indexed", metadata_fields=["priority"])
    eventually(lambda: index_names(driver[database]["indexed"]) == USUAL | metadata_indexes("priority"))
    assert commands.names.count("createIndexes") == 2
    driver[database].drop_collection("indexed")


@pytest.mark.own_database
@DRIVERS
@pytest.mark.anyio
async def test_indexes_over_a_borrowed_client(
    server: str, database: str, commands: CommandLog, stored: Documents, driver_class: Any
) -> None:
    client = driver_class(server, event_listeners=[commands])
    await client.admin.command("ping")
    for _ in range(2):
        async with MongoDBSessionManagerFactory(client=client, database_name=database) as factory:
            await factory.create_session_manager_async("s")
    if inspect.isawaitable(closing := client.close()):
        await closing
    assert commands.names.count("createIndexes") == 1
    assert index_names(stored) == USUAL


def refusals(caplog: pytest.LogCaptureFixture, database: str) -> list[str]:
    """What was logged of the indexes of a database: builds of others may end while a test runs."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("mongodb_session_manager")
        and record.levelno >= logging.WARNING
        and f"'{database}." in record.getMessage()
    ]


@pytest.mark.own_database
def test_a_refused_index_build_is_logged_and_harmless(
    server: str, database: str, stored: Documents, commands: CommandLog, caplog: pytest.LogCaptureFixture
) -> None:
    with MongoDBSessionManagerFactory(server, database, event_listeners=[commands]) as factory:
        with fail_point(server, failCommands=["createIndexes"], errorCode=13, times=1000):
            for _ in range(2):
                turn(factory.create_session_manager("s"))
            eventually(lambda: refusals(caplog, database))
        factory.create_session_manager("s")
    (refusal,) = refusals(caplog, database)
    assert "index" in refusal
    assert "code 13" in refusal
    assert commands.names.count("createIndexes") == 1
    assert conversation(stored) == ["hi", "hello"] * 2


IN_THE_WAY: dict[str, tuple[list[IndexModel], set[str]]] = {
    "a TTL": ([IndexModel("created_at", expireAfterSeconds=3600)], {"created_at"}),
    "a TTL and a sparse one": (
        [IndexModel("updated_at", expireAfterSeconds=3600), IndexModel("application_name", sparse=True)],
        {"updated_at", "application_name"},
    ),
    "too many": (
        [IndexModel(f"f{number}") for number in range(60)],
        {"session_id", "tags", "application_name", "updated_at+_id", "created_at+_id"}
        | {f"{name}+{date}+_id" for name in ("application_name", "owner") for date in ("updated_at", "created_at")},
    ),
}


@pytest.mark.own_database
@pytest.mark.parametrize(("present", "missing"), IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_an_index_in_the_way_keeps_no_other_away(
    cold: MongoDBSessionManagerFactory,
    database: str,
    stored: Documents,
    caplog: pytest.LogCaptureFixture,
    present: list[IndexModel],
    missing: set[str],
) -> None:
    stored.create_indexes(present)
    turn(cold.create_session_manager("s"))
    eventually(lambda: refusals(caplog, database))
    (told,) = refusals(caplog, database)
    assert set(re.findall(r"([a-z_+]+): MongoDB refused", told)) == missing
    names = {"_".join(f"{field}_1" for field in fields.split("+")) for fields in missing}
    assert index_names(stored) >= USUAL - names
    for _ in range(3):
        cold.create_session_manager("s")
    assert refusals(caplog, database) == [told]
    assert conversation(stored) == ["hi", "hello"]


@pytest.mark.own_database
def test_a_refused_index_is_built_later(
    cold: MongoDBSessionManagerFactory,
    commands: CommandLog,
    database: str,
    stored: Documents,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = stored.create_index("updated_at", expireAfterSeconds=3600)
    monkeypatch.setattr(indexes, "_RETRY_REFUSED", 0.5)
    cold.create_session_manager("s")
    eventually(lambda: refusals(caplog, database))
    cold.create_session_manager("s")  # too early
    time.sleep(0.6)
    commands.clear()
    cold.create_session_manager("s")  # in vain
    commands.wait_for("createIndexes")
    assert len(refusals(caplog, database)) == 1
    stored.drop_index(name)
    time.sleep(0.6)
    cold.create_session_manager("s")
    eventually(lambda: index_names(stored) == USUAL)
    commands.clear()
    time.sleep(0.6)
    cold.create_session_manager("s")
    assert commands.names == ["findAndModify"]


@pytest.mark.own_database
def test_a_collection_dropped_under_its_index_build_is_no_refusal(
    server: str, database: str, stored: Documents, commands: CommandLog, caplog: pytest.LogCaptureFixture
) -> None:
    with MongoDBSessionManagerFactory(server, database, event_listeners=[commands]) as factory:
        with fail_point(server, failCommands=["createIndexes"], errorCode=276):
            factory.create_session_manager("s")
            commands.wait_for("createIndexes")
        eventually(lambda: factory.create_session_manager("s") and index_names(stored) == USUAL)
    assert refusals(caplog, database) == []


@pytest.mark.own_database
def test_an_index_build_lost_with_its_connection_is_made_up_for(server: str, database: str, stored: Documents) -> None:
    with (
        MongoDBSessionManagerFactory(server, database, heartbeatFrequencyMS=500) as factory,
        fail_point(server, failCommands=["createIndexes"], closeConnection=True, times=2),
    ):
        factory.create_session_manager("s")
        eventually(lambda: index_names(stored) == USUAL)


# The life of a manager.


def test_the_application_name_is_fixed_at_creation(server: str, database: str, stored: Documents) -> None:
    with MongoDBSessionManagerFactory(server, database, application_name="first") as factory:
        assert factory.create_session_manager("s").get_application_name() == "first"
        turn(factory.create_session_manager("s", application_name="second"))
        assert factory.create_session_manager("s", application_name="second").get_application_name() == "first"
        assert factory.create_session_manager("s", application_name=None).get_application_name() == "first"
    with MongoDBSessionManagerFactory(server, database) as factory:
        assert factory.create_session_manager("t").get_application_name() is None
        assert factory.create_session_manager("t", application_name="late").get_application_name() is None
    assert {each["_id"]: each["application_name"] for each in stored.find()} == {"s": "first", "t": None}


@pytest.mark.anyio
async def test_the_application_name_is_fixed_at_creation_async(server: str, database: str, stored: Documents) -> None:
    async with MongoDBSessionManagerFactory(server, database, application_name="first") as factory:
        await factory.create_session_manager_async("s")
        manager = await factory.create_session_manager_async("s", application_name="second")
        assert await manager.get_application_name() == "first"
        await agent(manager, "hello").invoke_async("hi")
        await manager.close()
    document = stored.find_one({"_id": "s"})
    assert document is not None
    assert document["application_name"] == "first"


@pytest.mark.anyio
async def test_a_manager_before_it_is_opened(server: str, database: str) -> None:
    manager = AsyncMongoDBSessionManager("s", server, database)
    with pytest.raises(SessionClosedError, match="async with"):
        agent(manager, "hello")
    with pytest.raises(SessionClosedError, match="async with"):
        await manager.flush()
    with pytest.raises(SessionClosedError, match="async with"):
        await manager.get_application_name()
    await manager.open()
    await manager.open()
    await agent(manager, "hello").invoke_async("hi")
    await manager.close()


@pytest.mark.anyio
async def test_a_manager_that_was_never_opened_closes(server: str, database: str, stored: Documents) -> None:
    manager = AsyncMongoDBSessionManager("s", server, database)
    await manager.close()
    await manager.close()
    with pytest.raises(SessionClosedError):
        await manager.open()
    assert stored.count_documents({}) == 0


@pytest.mark.anyio
async def test_opening_twice_at_once_is_opening_once(
    server: str, database: str, stored: Documents, commands: CommandLog
) -> None:
    manager = AsyncMongoDBSessionManager("s", server, database, event_listeners=[commands])
    with fail_point(server, failCommands=["findAndModify"], blockConnection=True, blockTimeMS=1000):
        slow = asyncio.create_task(manager.open())
        while "findAndModify" not in commands.names:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        await manager.open()
        live = agent(manager, "hello", "bye")
        await live.invoke_async("hi")
        await slow
    await live.invoke_async("I am off")
    await manager.close()
    assert conversation(stored) == ["hi", "hello", "I am off", "bye"]


def test_a_manager_after_it_was_closed(factory: MongoDBSessionManagerFactory, stored: Documents) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, "hello", "unheard")
    live("hi")
    manager.close()
    with pytest.raises(SessionClosedError):
        live("too late")
    with pytest.raises(SessionClosedError):
        agent(manager, agent_id="another")
    assert conversation(stored) == ["hi", "hello"]


@pytest.mark.anyio
async def test_an_async_manager_after_it_was_closed(factory: MongoDBSessionManagerFactory, stored: Documents) -> None:
    async with await factory.create_session_manager_async("s") as manager:
        live = agent(manager, "hello", "unheard")
        await live.invoke_async("hi")
    with pytest.raises(SessionClosedError):
        await live.invoke_async("too late")
    with pytest.raises(SessionClosedError):
        agent(manager, agent_id="another")
    with pytest.raises(SessionClosedError):
        await manager.open()
    with pytest.raises(SessionClosedError):
        async with manager:
            pass
    assert conversation(stored) == ["hi", "hello"]


def test_threads_see_to_indexes_at_the_same_time() -> None:
    """Clients of an application may live on event loops of several threads."""

    def see(thread: int) -> None:
        for number in range(300):
            connection: Any = SimpleNamespace(identity=(thread, number), when_client_is_collected=_ignore)
            collection = Collection(connection, "d", "c")
            try:
                assert unseen(collection, [("a",), ("b",)]) == [("a",), ("b",)]
                assert unseen(collection, [("a",), ("c",)]) == [("c",)]
                see_again(collection, [("a",)])
                assert unseen(collection, [("a",), ("c",)]) == [("a",)]
            finally:
                if number % 2:
                    _forget(connection.identity)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(see, range(4))) == [None] * 4
    finally:
        sys.setswitchinterval(interval)
        for identity in itertools.product(range(4), range(300)):
            _forget(identity)


def _ignore(function: object) -> None: ...
