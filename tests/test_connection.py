"""How MongoDB is reached: owned and borrowed clients, settings, what fails and how it is told."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import socket
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pymongo
import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient
from pymongo.server_api import ServerApi

from mongodb_session_manager import (
    AccessDeniedError,
    AsyncMongoDBSessionManager,
    AsyncMongoDBSessionRepository,
    ClientTypeError,
    ConfigurationError,
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    EventLoopError,
    MessageTooLargeError,
    MongoDBSessionError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionClosedError,
    SessionConflictError,
    create_mongodb_session_manager_async,
)
from mongodb_session_manager._io.loop import io_portal
from support import (
    CLIENTS,
    CommandLog,
    agent,
    alternating,
    assert_no_driver_error,
    chained,
    client_of,
    eventually,
    fail_point,
    sampled,
    texts,
)

Documents = pymongo.collection.Collection[dict[str, Any]]

may_block = pytest.mark.may_block  # PyMongo looks at files when an AsyncMongoClient is first used

DRIVERS = pytest.mark.parametrize("driver_class", [AsyncIOMotorClient, AsyncMongoClient])
FRESH_DRIVERS = pytest.mark.parametrize(
    "driver_class", [AsyncIOMotorClient, pytest.param(AsyncMongoClient, marks=may_block)]
)
FRESH_AND_USED_DRIVERS = pytest.mark.parametrize(
    ("driver_class", "used"),
    [
        *alternating((AsyncIOMotorClient, False), (AsyncIOMotorClient, True), (AsyncMongoClient, True)),
        pytest.param(AsyncMongoClient, False, marks=[may_block, pytest.mark.half(1)]),
    ],
)

# So the driver looks for a server that it lost at once.
HURRY: dict[str, Any] = {"serverMonitoringMode": "poll"}

SECRET = "hunter2secret"


@asynccontextmanager
async def borrowed(driver_class: Any, uri: str, *, used: bool = False, **options: Any) -> AsyncIterator[Any]:
    """A client of the application's, on the loop of the application."""
    client = driver_class(uri, **options)
    try:
        if used:
            await client.admin.command("ping")
        yield client
    finally:
        if inspect.isawaitable(closing := client.close()):
            await closing


def close_from_thread(client: Any) -> None:
    """Close a client that belongs to the library's event loop."""
    if isinstance(client, AsyncIOMotorClient):
        client.close()
    else:
        io_portal().call(client.close)


@contextmanager
def borrowed_by_threads(driver_class: Any, uri: str) -> Iterator[Any]:
    """A client made where no event loop runs, so that the library's own becomes its loop."""
    client = driver_class(uri)
    try:
        yield client
    finally:
        close_from_thread(client)


def conversation(stored: Documents, session_id: str = "s", agent_key: str = "agent") -> list[str]:
    document = stored.find_one({"_id": session_id})
    assert document is not None
    return texts(document["agents"][agent_key]["messages"])


def all_text(error: BaseException) -> str:
    """All that may end up in a log: the error, its causes and its traceback."""
    parts = traceback.format_exception(error)
    for seen in chained(error):
        parts += [str(seen), repr(seen)]
    return "\n".join(parts)


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# Borrowed clients.


@FRESH_AND_USED_DRIVERS
@pytest.mark.anyio
async def test_a_borrowed_client_serves_its_own_loop(
    server: str, database: str, stored: Documents, driver_class: Any, used: bool
) -> None:
    async with borrowed(driver_class, server, used=used) as client:
        async with await create_mongodb_session_manager_async("s", client=client, database_name=database) as manager:
            await agent(manager, "hello").invoke_async("hi")
        async with AsyncMongoDBSessionManager("s", client=client, database_name=database) as manager:
            live = agent(manager, "bye")
            assert texts(live.messages) == ["hi", "hello"]
            async for _ in live.stream_async("I am off"):
                pass
        assert (await client.admin.command("ping"))["ok"] == 1
        assert (await client[database]["agent_sessions"].find_one({"_id": "s"}))["_id"] == "s"
    assert conversation(stored) == ["hi", "hello", "I am off", "bye"]


@FRESH_AND_USED_DRIVERS
@pytest.mark.anyio
async def test_a_factory_over_a_borrowed_client_leaves_it_open(
    server: str, database: str, stored: Documents, driver_class: Any, used: bool
) -> None:
    async with borrowed(driver_class, server, used=used) as client:
        async with MongoDBSessionManagerFactory(client=client, database_name=database) as factory:
            managers = await asyncio.gather(*(factory.create_session_manager_async(f"s{n}") for n in range(3)))
            await asyncio.gather(*(agent(manager, "hello").invoke_async("hi") for manager in managers))
            await factory.ping_async()
            assert (await factory.get_connection_stats_async())["status"] == "connected"
            await asyncio.gather(*(manager.close() for manager in managers))
        await factory.close_async()
        assert (await client.admin.command("ping"))["ok"] == 1
        with pytest.raises(SessionClosedError):
            await factory.create_session_manager_async("s0")
    for number in range(3):
        assert conversation(stored, f"s{number}") == ["hi", "hello"]


@FRESH_AND_USED_DRIVERS
@pytest.mark.anyio
async def test_synchronous_agents_in_worker_threads_over_the_applications_client(
    server: str, database: str, stored: Documents, driver_class: Any, used: bool
) -> None:
    async with borrowed(driver_class, server, used=used) as client:
        factory = MongoDBSessionManagerFactory(client=client, database_name=database)
        manager = await factory.create_session_manager_async("s")
        await asyncio.to_thread(agent(manager, "hello"), "hi")

        def synchronously() -> None:
            with factory.create_session_manager("t") as other:
                agent(other, "hello")("hi")
                other.flush()

        await asyncio.to_thread(synchronously)
        await manager.close()
        await factory.close_async()
        assert (await client.admin.command("ping"))["ok"] == 1
    assert conversation(stored) == ["hi", "hello"]
    assert conversation(stored, "t") == ["hi", "hello"]


@FRESH_DRIVERS
def test_a_client_made_where_no_loop_runs_serves_threads_and_loops(
    server: str, database: str, stored: Documents, driver_class: Any
) -> None:
    with borrowed_by_threads(driver_class, server) as client:
        with MongoDBSessionManager("s", client=client, database_name=database) as manager:
            agent(manager, "hello")("hi")

        async def main() -> None:
            factory = MongoDBSessionManagerFactory(client=client, database_name=database)
            async with await factory.create_session_manager_async("s") as manager:
                await agent(manager, "bye").invoke_async("I am off")
            await factory.close_async()

        asyncio.run(main())
        asyncio.run(main())
        with MongoDBSessionRepository(client=client, database_name=database) as repository:
            repository.ping()
        with MongoDBSessionRepository(client=client, database_name=database) as repository:
            repository.ping()  # closing the repository before it did not close the client
    assert conversation(stored) == ["hi", "hello"] + ["I am off", "bye"] * 2


@FRESH_DRIVERS
def test_a_factory_made_before_the_application_first_uses_its_client(
    server: str, database: str, stored: Documents, driver_class: Any
) -> None:
    client = driver_class(server)  # as at import time: no loop runs, nothing is connected
    factory = MongoDBSessionManagerFactory(client=client, database_name=database)

    async def main() -> None:
        try:
            await client.admin.command("ping")
            async with await factory.create_session_manager_async("s") as manager:
                await agent(manager, "hello").invoke_async("hi")
        finally:
            if inspect.isawaitable(closing := client.close()):
                await closing

    asyncio.run(main())
    assert conversation(stored) == ["hi", "hello"]


@FRESH_DRIVERS
def test_the_application_can_use_its_client_after_a_factory_made_before_its_loop(
    server: str, database: str, stored: Documents, driver_class: Any
) -> None:
    client = driver_class(server)
    factory = MongoDBSessionManagerFactory(client=client, database_name=database)
    closed = False

    async def main() -> None:
        nonlocal closed
        async with await factory.create_session_manager_async("s") as manager:
            await agent(manager, "hello").invoke_async("hi")
        assert (await client.admin.command("ping"))["ok"] == 1
        if inspect.isawaitable(closing := client.close()):
            await closing
        closed = True

    try:
        asyncio.run(main())
    finally:
        if not closed:
            close_from_thread(client)
    assert conversation(stored) == ["hi", "hello"]


@FRESH_AND_USED_DRIVERS
@pytest.mark.anyio
async def test_waiting_on_the_loop_of_the_borrowed_client_is_refused(
    server: str, database: str, driver_class: Any, used: bool
) -> None:
    async with borrowed(driver_class, server, used=used) as client:
        helpful = pytest.raises(EventLoopError, match=r"AsyncMongoDBSessionManager|create_session_manager_async")
        with helpful:
            MongoDBSessionManager("s", client=client, database_name=database)
        factory = MongoDBSessionManagerFactory(client=client, database_name=database)
        with helpful:
            factory.create_session_manager("s")
        with helpful:
            factory.ping()
        with helpful:
            factory.get_connection_stats()
        with helpful:
            MongoDBSessionRepository(client=client, database_name=database).read_session("s")
        async with await factory.create_session_manager_async("s") as manager:
            await agent(manager, "hello").invoke_async("hi")


@DRIVERS
@pytest.mark.may_block
@pytest.mark.anyio
async def test_a_synchronous_agent_on_the_loop_of_the_borrowed_client_is_refused(
    server: str, database: str, stored: Documents, driver_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mongodb_session_manager._io.portal.START_TIMEOUT", 1.0)
    async with borrowed(driver_class, server, used=True) as client:
        manager = await create_mongodb_session_manager_async("s", client=client, database_name=database)
        mine = agent(manager, "hello", "hello again")
        with pytest.raises(EventLoopError, match=r"blocks it.*agent\.invoke_async"):
            mine("hi")  # Strands runs it on another thread, for which this one waits
        await mine.invoke_async("hi again")
        await manager.close()
    assert conversation(stored)[-2:] == ["hi again", "hello"]


@DRIVERS
def test_a_borrowed_client_whose_loop_has_ended_is_refused(server: str, database: str, driver_class: Any) -> None:
    async def main() -> tuple[Any, MongoDBSessionManagerFactory]:
        async with borrowed(driver_class, server, used=True) as client:
            factory = MongoDBSessionManagerFactory(client=client, database_name=database)
            async with await factory.create_session_manager_async("s"):
                return client, factory

    client, factory = asyncio.run(main())
    helpful = pytest.raises(EventLoopError, match=r"does not run: .*connection_string")
    with helpful:
        factory.create_session_manager("s")
    with helpful:
        asyncio.run(factory.create_session_manager_async("s"))
    with helpful:
        MongoDBSessionManager("s", client=client, database_name=database)
    with helpful:
        asyncio.run(create_mongodb_session_manager_async("s", client=client, database_name=database))
    with helpful:
        factory.ping()


@FRESH_AND_USED_DRIVERS
@pytest.mark.anyio
async def test_statistics_of_a_borrowed_client(server: str, driver_class: Any, used: bool) -> None:
    async with borrowed(driver_class, server, used=used, maxPoolSize=7) as client:
        stats = await MongoDBSessionManagerFactory(client=client).get_connection_stats_async()
    assert stats["status"] == "connected"
    assert stats["server_version"]
    assert stats["pool_config"]["maxPoolSize"] == 7
    assert (stats["connections_open"], stats["connections_in_use"], stats["wait_queue"]) == (None, None, None)


@DRIVERS
@pytest.mark.anyio
async def test_the_database_named_by_a_borrowed_client(server: str, driver_class: Any) -> None:
    host = server.partition("://")[2].partition("/")[0]
    async with borrowed(driver_class, f"mongodb://{host}/named") as client:
        assert "named." in repr(AsyncMongoDBSessionRepository(client=client))
        assert "explicit." in repr(AsyncMongoDBSessionRepository(client=client, database_name="explicit"))
    async with borrowed(driver_class, f"mongodb://{host}/") as client:
        assert "(agent_sessions." in repr(AsyncMongoDBSessionRepository(client=client))


@DRIVERS
@pytest.mark.anyio
async def test_a_borrowed_client_with_unacknowledged_writes_is_refused(server: str, driver_class: Any) -> None:
    async with borrowed(driver_class, server, w=0) as client:
        with pytest.raises(ConfigurationError, match="w=0"):
            AsyncMongoDBSessionRepository(client=client)


@FRESH_DRIVERS
@pytest.mark.anyio
async def test_a_borrowed_client_that_its_owner_closed(server: str, database: str, driver_class: Any) -> None:
    async with borrowed(driver_class, server) as client:
        factory = MongoDBSessionManagerFactory(client=client, database_name=database)
        manager = await factory.create_session_manager_async("s")
    with pytest.raises(SessionClosedError):
        await agent(manager, "hello").invoke_async("hi")


# What to connect to.


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MONGODB_URI", raising=False)


ENTRANCES = pytest.mark.parametrize(
    "entrance",
    [
        MongoDBSessionManagerFactory,
        MongoDBSessionRepository,
        AsyncMongoDBSessionRepository,
        lambda *args, **kwargs: MongoDBSessionManager("s", *args, **kwargs),
        lambda *args, **kwargs: AsyncMongoDBSessionManager("s", *args, **kwargs),
    ],
    ids=["factory", "repository", "async repository", "manager", "async manager"],
)


@ENTRANCES
def test_something_else_than_a_client_is_refused_with_what_to_pass(entrance: Any) -> None:
    with pytest.raises(ClientTypeError) as refused:
        entrance(client={"host": "localhost"})
    assert isinstance(refused.value, TypeError)
    assert isinstance(refused.value, ConfigurationError)
    assert isinstance(refused.value, ValueError)
    for word in ("pymongo.MongoClient", "AsyncIOMotorClient", "AsyncMongoClient", "connection_string", "not a dict"):
        assert word in str(refused.value)


@pytest.mark.parametrize("client", ["mongodb://user:hunter2secret@host", object(), 27017, AsyncMongoClient])
def test_what_is_no_client_is_refused(client: Any) -> None:
    with pytest.raises(ClientTypeError, match="AsyncMongoClient") as refused:
        MongoDBSessionManagerFactory(client=client)
    assert SECRET not in all_text(refused.value)


@ENTRANCES
@pytest.mark.anyio
async def test_a_client_and_more_is_refused(server: str, entrance: Any) -> None:
    async with borrowed(AsyncMongoClient, server) as client:
        for more in ({"connection_string": "mongodb://localhost"}, {"maxPoolSize": 5}, {"connection_string": ""}):
            with pytest.raises(ConfigurationError, match="client cannot be combined"):
                entrance(client=client, **more)


@ENTRANCES
@pytest.mark.usefixtures("no_environment")
def test_nothing_to_connect_to_names_the_three_ways(entrance: Any) -> None:
    for arguments in ((), (None,), ("",)):
        with pytest.raises(ConfigurationError) as refused:
            entrance(*arguments)
        for way in ("connection_string", "MONGODB_URI", "client"):
            assert way in str(refused.value)


@ENTRANCES
def test_a_connection_string_that_is_none(entrance: Any) -> None:
    for connection_string in (27017, b"mongodb://localhost", {"host": "localhost"}, ["localhost"]):
        with pytest.raises(ConfigurationError, match="str"):
            entrance(connection_string)


def test_the_environment_names_the_server(
    server: str, database: str, stored: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MONGODB_URI", server)
    with MongoDBSessionManager("s", database_name=database) as manager:
        agent(manager, "hello")("hi")
    with MongoDBSessionManagerFactory(database_name=database) as factory:
        factory.ping()
    assert conversation(stored) == ["hi", "hello"]


def test_a_connection_string_goes_before_the_environment(
    server: str, database: str, stored: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MONGODB_URI", f"mongodb://127.0.0.1:{unused_port()}/?serverSelectionTimeoutMS=100")
    with MongoDBSessionManager("s", server, database):
        assert stored.count_documents({"_id": "s"}) == 1


def test_the_database_is_explicit_or_named_in_the_string_or_the_default(server: str, database: str) -> None:
    head, _, tail = server.partition("://")[2].partition("/")
    options = "?" + tail.partition("?")[2] if "?" in tail else ""
    named = f"mongodb://{head}/{database}{options}"
    for connection_string, wanted, expected in [
        (named, None, database),
        (named, "explicit", "explicit"),
        (f"mongodb://{head}/{options}", None, "agent_sessions"),
        (f"mongodb://{head}", None, "agent_sessions"),
        (f"mongodb://{head}/{options}", "explicit", "explicit"),
        (f"mongodb://u:p%40@{head}/a%2Db", None, "a-b"),
    ]:
        assert f"({expected}.agent_sessions," in repr(AsyncMongoDBSessionRepository(connection_string, wanted))


def test_sessions_go_where_the_connection_string_says(server: str, database: str, stored: Documents) -> None:
    head, _, tail = server.partition("://")[2].partition("/")
    options = "?" + tail.partition("?")[2] if "?" in tail else ""
    with MongoDBSessionManager("s", f"mongodb://{head}/{database}{options}") as manager:
        agent(manager, "hello")("hi")
    assert conversation(stored) == ["hi", "hello"]


@pytest.mark.parametrize("name", ["", "a\0b", 5, b"bytes"])
@pytest.mark.parametrize("which", ["database_name", "collection_name"])
def test_a_database_or_collection_that_cannot_be(server: str, which: str, name: Any) -> None:
    with pytest.raises(ConfigurationError, match=which):
        MongoDBSessionManagerFactory(server, **{which: name})


@pytest.mark.parametrize(
    ("database_name", "collection_name"),
    [("a.b", "c"), ("a$b", "c"), ("a", "$c"), ("a", "c.")],
)
def test_a_name_that_mongodb_refuses_is_a_configuration_error(
    server: str, database_name: str, collection_name: str
) -> None:
    with pytest.raises(ConfigurationError), MongoDBSessionManagerFactory(server) as factory:
        factory.create_session_manager("s", database_name=database_name, collection_name=collection_name)


@ENTRANCES
def test_unacknowledged_writes_are_refused_in_the_connection_string(server: str, entrance: Any) -> None:
    with pytest.raises(ConfigurationError, match="w=0"):
        entrance(server + ("&" if "?" in server else "?" if "/" in server.partition("://")[2] else "/?") + "w=0")


def test_unacknowledged_writes_are_refused_in_the_options(server: str, database: str) -> None:
    with pytest.raises(ConfigurationError, match="w=0"):
        MongoDBSessionManager("s", server, database, w=0)
    with (
        pytest.raises(ConfigurationError, match="w=0"),
        MongoDBSessionManagerFactory(server, database, w=0) as factory,
    ):
        factory.create_session_manager("s")
    with pytest.raises(ConfigurationError, match="w=0"):
        asyncio.run(create_mongodb_session_manager_async("s", server, database, w=0))


@pytest.mark.parametrize(
    "options",
    [
        {"maxPoolsize": 5, "no_such_option": 1},
        {"no_such_option": 1},
        {"maxPoolSize": -1},
        {"serverSelectionTimeoutMS": "soon"},
        {"tlsCAFile": "/no/such/file"},
        {"username": 5},
    ],
    ids=str,
)
def test_an_option_that_the_driver_refuses_is_a_configuration_error(
    server: str, database: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError):
        MongoDBSessionManager("s", server, database, **options)
    with pytest.raises(ConfigurationError):
        asyncio.run(create_mongodb_session_manager_async("s", server, database, **options))


BAD_URIS = [
    f"mongodb://user:{SECRET}@host:port/",
    f"mongodb://user:{SECRET}@host:99999/",
    f"mongodb://user:{SECRET}@host:/",
    f"mongodb://user:{SECRET}@/",
    f"mongodb://user:{SECRET}@",
    f"mongodb://user:{SECRET}@@host/",
    f"mongodb://user:x@{SECRET}@host/",
    f"mongodb://user:{SECRET}@x@host:27017/db",
    f"mongodb://us:er:{SECRET}@host/",
    f"mongodb://user:{SECRET}:more@host/",
    f"mongodb://user:{SECRET}/more@host/",
    f"mongodb://user:more/{SECRET}@host/",
    f"mongodb://user:{SECRET}?more@host/",
    f"mongodb://user:more?{SECRET}@host/",
    f"mongodb://user:{SECRET}#more@host/",
    f"mongodb://user:{SECRET}%@host/",
    f"mongodb://user:{SECRET}%zz@host/",
    f"mongodb://user:{SECRET}[@host/",
    f"mongodb://user:[{SECRET}]@host/",
    f"mongodb://user:{SECRET}@[::1/",
    f"mongodb://user:{SECRET}@[::1]:x/",
    f"mongodb://user:{SECRET}",
    f"mongodb://user:{SECRET}/",
    f"mongodb://:{SECRET}@host/",
    f"mongodb://{SECRET}@:27017/",
    f"mongodb://user:{SECRET}@host,/",
    f"mongodb://user:{SECRET}@host,host:x/",
    f"mongodb://user:{SECRET}@host?w=1",
    f"mongodb://user:{SECRET}@host/?w=0",
    f"mongodb://user:{SECRET}@host/?nothing",
    f"mongodb://user:{SECRET}@host/?authMechanism=NONSENSE",
    f"mongodb://user:{SECRET}@host/d b/?x=1",
    f"mongodb://user:{SECRET}@host/a.$b/",
    f"mongodb://user:{SECRET}@host/?tls=maybe",
    f"mongodb://host/?authMechanismProperties=AWS_SESSION_TOKEN:{SECRET},x",
    f"mongodb://user:{SECRET}@host1,host2/?directConnection=true",
    f"mongodb://user:{SECRET}@host1,host2/?loadBalanced=true",
    f"mongo://user:{SECRET}@host/",
    f"https://user:{SECRET}@host/",
    f"user:{SECRET}@host/",
    f"mongodb:/user:{SECRET}@host/",
    f"mongodb//user:{SECRET}@host/",
    f" mongodb://user:{SECRET}@host/",
    f"MONGODB://user:{SECRET}@host/",
    f"'mongodb://user:{SECRET}@host/'",
    f"mongodb+srv://user:{SECRET}@host/",
    f"mongodb+srv://user:{SECRET}@@host.example.invalid/",
    f"mongodb+srv://user:{SECRET}:more@host.example.invalid/",
    f"mongodb+srv://user:{SECRET}/more@host.example.invalid/",
    f"mongodb+srv://user:more/{SECRET}@host.example.invalid/",
    f"mongodb+srv://user:{SECRET}?more@host.example.invalid/",
    f"mongodb+srv://user:{SECRET}@host.example.invalid:27017/",
    f"mongodb+srv://user:{SECRET}@a.example.invalid,b.example.invalid/",
    f"mongodb+srv://user:{SECRET}",
    f"mongodb+srv://user:{SECRET}%zz@host.example.invalid/?x",
]


@pytest.mark.parametrize("uri", alternating(*BAD_URIS), ids=range(len(BAD_URIS)))
def test_a_bad_connection_string_shows_no_password(
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    some: Callable[[list[Callable[[], None]], int], list[Callable[[], None]]],
) -> None:
    caplog.set_level(logging.DEBUG)
    options = {"serverSelectionTimeoutMS": 50, "connectTimeoutMS": 500}

    def through_the_factory() -> None:
        monkeypatch.setenv("MONGODB_URI", uri)
        with MongoDBSessionManagerFactory(**options) as factory:
            factory.create_session_manager("s")

    ways: list[Callable[[], Any]] = [
        lambda: MongoDBSessionManager("s", uri, **options),
        lambda: asyncio.run(create_mongodb_session_manager_async("s", uri, **options)),
        through_the_factory,
    ]
    for way in some(ways, 1):
        with pytest.raises(MongoDBSessionError) as raised:
            way()
        assert SECRET not in all_text(raised.value)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "uri",
    [
        f"mongodb://user:{SECRET}@host:port/",
        f"mongodb://user:{SECRET}@x@host/",
        f"mongodb://user:{SECRET}:more@host/",
        f"mongo://user:{SECRET}@host/",
        f"mongodb+srv://user:{SECRET}@host/",
        f"mongodb+srv://user:{SECRET}@@host.example.invalid/",
    ],
)
def test_a_bad_connection_string_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigurationError):
        MongoDBSessionManager("s", uri, serverSelectionTimeoutMS=20_000)


def test_a_wrong_port_is_named(server: str) -> None:
    with pytest.raises(ConfigurationError, match="Port"):
        MongoDBSessionManagerFactory("mongodb://user:pw-of-mine@host:99999/")


def test_nothing_shows_the_password(database: str) -> None:
    uri = f"mongodb://user:{SECRET}@127.0.0.1:{unused_port()}/?serverSelectionTimeoutMS=50"
    shown = [MongoDBSessionManagerFactory(uri), AsyncMongoDBSessionRepository(uri), MongoDBSessionRepository(uri)]
    shown.append(AsyncMongoDBSessionManager("s", uri))
    shown.append(MongoDBSessionManagerFactory("mongodb://127.0.0.1", username="user", password=SECRET))
    for each in shown:
        assert SECRET not in repr(each)
        assert SECRET not in str(each)
        assert SECRET not in str(vars(each))


def test_reprs_say_what_a_thing_is(factory: MongoDBSessionManagerFactory, database: str) -> None:
    manager = factory.create_session_manager("s")
    assert repr(manager) == "<MongoDBSessionManager session_id='s', open>"
    manager.close()
    assert repr(manager) == "<MongoDBSessionManager session_id='s', closed>"
    assert repr(factory) == "<MongoDBSessionManagerFactory <Connection owned, open>>"
    factory.close()
    assert repr(factory) == "<MongoDBSessionManagerFactory <Connection owned, closed>>"
    assert repr(MongoDBSessionRepository("mongodb://u:p@h", "d", "c")).startswith("MongoDBSessionRepository(d.c, ")


# No server.


@pytest.fixture
def nowhere() -> str:
    """The address of nobody, and a connection string to it."""
    return f"127.0.0.1:{unused_port()}"


def check_unavailable(error: BaseException, address: str) -> None:
    assert isinstance(error, DatabaseUnavailableError)
    assert isinstance(error, ConnectionError)
    assert_no_driver_error(error)
    assert address in str(error)
    assert SECRET not in all_text(error)


def test_no_server_sync(nowhere: str) -> None:
    uri = f"mongodb://user:{SECRET}@{nowhere}/?serverSelectionTimeoutMS=300"
    with pytest.raises(DatabaseUnavailableError) as raised:
        MongoDBSessionManager("s", uri)
    check_unavailable(raised.value, nowhere)
    with MongoDBSessionManagerFactory(uri) as factory:
        with pytest.raises(DatabaseUnavailableError) as raised:
            factory.ping()
        check_unavailable(raised.value, nowhere)
        with pytest.raises(DatabaseUnavailableError) as raised:
            factory.create_session_manager("s")
        check_unavailable(raised.value, nowhere)
    with MongoDBSessionRepository(uri) as repository:
        with pytest.raises(DatabaseUnavailableError) as raised:
            repository.ping()
        check_unavailable(raised.value, nowhere)
        with pytest.raises(DatabaseUnavailableError) as raised:
            repository.read_session("s")
        check_unavailable(raised.value, nowhere)


@pytest.mark.anyio
async def test_no_server_async(nowhere: str) -> None:
    uri = f"mongodb://user:{SECRET}@{nowhere}/?serverSelectionTimeoutMS=300"
    with pytest.raises(DatabaseUnavailableError) as raised:
        await create_mongodb_session_manager_async("s", uri)
    check_unavailable(raised.value, nowhere)
    async with MongoDBSessionManagerFactory(uri) as factory:
        with pytest.raises(DatabaseUnavailableError) as raised:
            await factory.ping_async()
        check_unavailable(raised.value, nowhere)
        with pytest.raises(DatabaseUnavailableError) as raised:
            await factory.create_session_manager_async("s")
        check_unavailable(raised.value, nowhere)
    async with AsyncMongoDBSessionRepository(uri) as repository:
        with pytest.raises(DatabaseUnavailableError) as raised:
            await repository.ping()
        check_unavailable(raised.value, nowhere)


@FRESH_DRIVERS
@pytest.mark.anyio
async def test_no_server_borrowed(nowhere: str, driver_class: Any) -> None:
    uri = f"mongodb://user:{SECRET}@{nowhere}/?serverSelectionTimeoutMS=300"
    async with borrowed(driver_class, uri) as client:
        with pytest.raises(DatabaseUnavailableError) as raised:
            await create_mongodb_session_manager_async("s", client=client)
        check_unavailable(raised.value, nowhere)


def test_a_wrong_password_is_not_shown(server: str, database: str) -> None:
    with pytest.raises(AccessDeniedError) as raised:
        MongoDBSessionManager("s", server, database, username="nobody", password=SECRET)
    assert SECRET not in all_text(raised.value)
    assert_no_driver_error(raised.value)


# What the driver raises, as ours.


@pytest.fixture(scope="module")
def standalone_client(standalone: str) -> Iterator[str]:
    """The connection string of the standalone server, to which one client of the module is connected."""
    with pymongo.MongoClient[dict[str, Any]](standalone, tz_aware=True) as client:
        CLIENTS[standalone] = client
        yield standalone
        del CLIENTS[standalone]


@pytest.fixture(params=alternating("replica set", "standalone"))
def any_server(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("server" if request.param == "replica set" else "standalone_client"))


@pytest.fixture
def at(any_server: str, database: str) -> Iterator[Documents]:
    """The sessions of the test at `any_server`."""
    with client_of(any_server) as client:
        client[database]["agent_sessions"].delete_many({})
        yield client[database]["agent_sessions"]


@pytest.fixture(scope="module")
def hurried(shared_database: str) -> Iterator[Callable[..., Any]]:
    """Return the factory, or the repository, of the module at a server; its client finds a lost server at once."""
    with ExitStack() as stack:

        @functools.cache
        def hurried(uri: str, kind: Any = MongoDBSessionManagerFactory) -> Any:
            return stack.enter_context(kind(uri, shared_database, **HURRY))

        yield hurried


ALWAYS = 1_000_000

FAILURES: list[tuple[dict[str, Any], type[MongoDBSessionError]]] = [
    ({"errorCode": 13}, AccessDeniedError),
    ({"errorCode": 50}, DatabaseTimeoutError),
    ({"errorCode": 10107}, DatabaseUnavailableError),
    ({"closeConnection": True}, DatabaseUnavailableError),
]
PERSISTENT = pytest.mark.parametrize(
    ("failure", "expected"),
    alternating(*FAILURES),
    ids=["Unauthorized", "MaxTimeMSExpired", "NotWritablePrimary", "connection"],
)


def check_mapped(error: BaseException, expected: type[MongoDBSessionError]) -> None:
    assert type(error) is expected
    assert_no_driver_error(error)
    assert str(error)
    assert "\n" not in str(error)


@PERSISTENT
def test_opening_fails(
    any_server: str, at: Documents, hurried: Any, failure: dict[str, Any], expected: type[MongoDBSessionError]
) -> None:
    factory = hurried(any_server)
    with (
        fail_point(any_server, failCommands=["findAndModify"], times=ALWAYS, **failure),
        pytest.raises(MongoDBSessionError) as raised,
    ):
        factory.create_session_manager("s")
    check_mapped(raised.value, expected)
    factory.create_session_manager("s")
    assert at.count_documents({"_id": "s"}) == 1


@PERSISTENT
def test_reading_fails(
    server: str, database: str, hurried: Any, failure: dict[str, Any], expected: type[MongoDBSessionError]
) -> None:
    repository = hurried(server, MongoDBSessionRepository)
    repository.open_session("s")
    with (
        fail_point(server, failCommands=["find"], times=ALWAYS, **failure),
        pytest.raises(MongoDBSessionError) as raised,
    ):
        repository.read_session("s")
    check_mapped(raised.value, expected)
    session = repository.read_session("s")
    assert session is not None
    assert session.session_id == "s"


@PERSISTENT
def test_writing_fails(
    any_server: str, at: Documents, hurried: Any, failure: dict[str, Any], expected: type[MongoDBSessionError]
) -> None:
    manager = hurried(any_server).create_session_manager("s")
    live = agent(manager, "hello")
    with (
        fail_point(any_server, failCommands=["update"], times=ALWAYS, **failure),
        pytest.raises(MongoDBSessionError) as raised,
    ):
        live("hi")
    check_mapped(raised.value, expected)
    manager.flush()
    assert conversation(at) == ["hi"]


@PERSISTENT
@pytest.mark.anyio
async def test_writing_fails_async(
    server: str, stored: Documents, hurried: Any, failure: dict[str, Any], expected: type[MongoDBSessionError]
) -> None:
    manager = await hurried(server).create_session_manager_async("s")
    live = agent(manager, "hello")
    with (
        fail_point(server, failCommands=["update"], times=ALWAYS, **failure),
        pytest.raises(MongoDBSessionError) as raised,
    ):
        await live.invoke_async("hi")
    check_mapped(raised.value, expected)
    await manager.flush()
    assert conversation(stored) == ["hi"]


TRANSIENT: list[dict[str, Any]] = [
    {"errorCode": 10107},
    {"errorCode": 11600},
    {"errorCode": 189},
    {"closeConnection": True},
]


@pytest.mark.parametrize(
    ("failure", "times"),
    alternating(
        ({"errorCode": 10107}, 1),
        ({"errorCode": 11600}, 1),
        ({"closeConnection": True}, 1),
        ({"closeConnection": True}, 3),
    ),
    ids=["NotWritablePrimary", "InterruptedAtShutdown", "connection", "connection thrice"],
)
def test_what_passes_is_not_noticed(
    any_server: str, at: Documents, hurried: Any, failure: dict[str, Any], times: int
) -> None:
    with fail_point(any_server, failCommands=["findAndModify"], times=times, **failure):
        manager = hurried(any_server).create_session_manager("s")
    live = agent(manager, "hello", "bye")
    with fail_point(any_server, failCommands=["update"], times=times, **failure):
        live("hi")
    live("I am off")
    with fail_point(any_server, failCommands=["find"], times=times, **failure):
        assert hurried(any_server, MongoDBSessionRepository).read_session("s") is not None
    assert conversation(at) == ["hi", "hello", "I am off", "bye"]


@pytest.mark.parametrize(
    ("driver_class", "failure"),
    sampled(
        [(driver, failure) for driver in (AsyncIOMotorClient, AsyncMongoClient) for failure in TRANSIENT],
        *((AsyncIOMotorClient, TRANSIENT[n]) for n in (0, 3)),
        *((AsyncMongoClient, TRANSIENT[n]) for n in (1, 2)),
    ),
)
@pytest.mark.anyio
async def test_what_passes_is_not_noticed_by_who_borrows(
    server: str, database: str, stored: Documents, driver_class: Any, failure: dict[str, Any]
) -> None:
    async with borrowed(driver_class, server, used=True, **HURRY) as client:
        manager = await create_mongodb_session_manager_async("s", client=client, database_name=database)
        live = agent(manager, "hello", "bye")
        with fail_point(server, failCommands=["update"], **failure):
            await live.invoke_async("hi")
        await live.invoke_async("I am off")
        await manager.close()
    assert conversation(stored) == ["hi", "hello", "I am off", "bye"]


@pytest.mark.parametrize(
    ("driver_class", "failure", "expected"),
    sampled(
        [(driver, *case) for driver in (AsyncIOMotorClient, AsyncMongoClient) for case in FAILURES],
        *((AsyncIOMotorClient, *FAILURES[n]) for n in (0, 3)),
        *((AsyncMongoClient, *FAILURES[n]) for n in (1, 2)),
    ),
)
@pytest.mark.anyio
async def test_writing_fails_for_who_borrows(
    server: str,
    database: str,
    stored: Documents,
    driver_class: Any,
    failure: dict[str, Any],
    expected: type[MongoDBSessionError],
) -> None:
    async with borrowed(driver_class, server, used=True, **HURRY) as client:
        manager = await create_mongodb_session_manager_async("s", client=client, database_name=database)
        live = agent(manager, "hello")
        with (
            fail_point(server, failCommands=["update"], times=ALWAYS, **failure),
            pytest.raises(MongoDBSessionError) as raised,
        ):
            await live.invoke_async("hi")
        check_mapped(raised.value, expected)
        await manager.close()
    assert conversation(stored) == ["hi"]


TIMED_OUT = {"code": 64, "codeName": "WriteConcernTimeout", "errmsg": "timed out", "errInfo": {"wtimeout": True}}


def test_an_unconfirmed_write_is_a_timeout_and_is_stored_once(server: str, stored: Documents, hurried: Any) -> None:
    manager = hurried(server).create_session_manager("s")
    live = agent(manager, "hello", "bye")
    with (
        fail_point(server, failCommands=["update"], times=ALWAYS, writeConcernError=TIMED_OUT),
        pytest.raises(DatabaseTimeoutError) as raised,
    ):
        live("hi")
    check_mapped(raised.value, DatabaseTimeoutError)
    manager.flush()
    assert conversation(stored) == ["hi"]
    live("and on")
    assert conversation(stored) == ["hi", "and on", "hello"]


def test_an_opening_unconfirmed_is_a_timeout(server: str, stored: Documents, hurried: Any) -> None:
    factory = hurried(server)
    with (
        fail_point(server, failCommands=["findAndModify"], times=ALWAYS, writeConcernError=TIMED_OUT),
        pytest.raises(DatabaseTimeoutError),
    ):
        factory.create_session_manager("s")
    agent(factory.create_session_manager("s"), "hello")("hi")
    assert conversation(stored) == ["hi", "hello"]


def test_waiting_too_long_for_a_free_connection(server: str, database: str) -> None:
    log = CommandLog()
    options: dict[str, Any] = {"maxPoolSize": 1, "waitQueueTimeoutMS": 1000, "event_listeners": [log]}
    with MongoDBSessionRepository(server, database, **options) as repository:
        repository.open_session("s")
        eventually(lambda: repository.read_session("s"))
        log.clear()
        with fail_point(server, failCommands=["find"], blockConnection=True, blockTimeMS=3000):
            held = threading.Thread(target=repository.read_session, args=("s",))
            held.start()
            log.wait_for("find")
            with pytest.raises(DatabaseTimeoutError, match="pool") as raised:
                repository.read_session("s")
            check_mapped(raised.value, DatabaseTimeoutError)
            held.join()


def test_a_server_slower_than_the_socket_timeout(server: str, database: str) -> None:
    with MongoDBSessionRepository(server, database, socketTimeoutMS=100) as repository:
        repository.open_session("s")
        with (
            fail_point(server, failCommands=["find"], times=20, blockConnection=True, blockTimeMS=500),
            pytest.raises(DatabaseTimeoutError) as raised,
        ):
            repository.read_session("s")
        assert isinstance(raised.value, TimeoutError)


# Content.

CONTENT = "a7f3-content-of-a-conversation"
OURS = ("mongodb_session_manager", "asyncio")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged, with debug messages of the package and of asyncio; those of PyMongo are slow."""
    for name in OURS:
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


@pytest.mark.parametrize(
    "failure",
    alternating(
        {"errorCode": 13},
        {"errorCode": 50},
        {"errorCode": 10107},
        {"errorCode": 2},
        {"closeConnection": True},
        {"writeConcernError": TIMED_OUT},
        {"writeConcernError": {"code": 100, "errmsg": "not enough nodes"}},
    ),
    ids=str,
)
def test_content_is_in_no_error_and_no_log(
    server: str, database: str, hurried: Any, logged: pytest.LogCaptureFixture, failure: dict[str, Any]
) -> None:
    manager = hurried(server).create_session_manager("s")
    live = agent(manager, CONTENT, system_prompt=CONTENT, state={"key": CONTENT})
    errors: list[MongoDBSessionError] = []
    with fail_point(server, failCommands=["update"], times=ALWAYS, **failure):
        for call in (lambda: live(CONTENT), manager.close):
            with pytest.raises(MongoDBSessionError) as raised:
                call()
            errors.append(raised.value)
    check_content(logged, *errors)


def check_content(caplog: pytest.LogCaptureFixture, *errors: BaseException) -> None:
    for error in errors:
        assert CONTENT not in all_text(error)
    ours = [record for record in caplog.records if record.name.startswith(OURS)]
    assert [record for record in ours if CONTENT in record.getMessage() or CONTENT in str(record.exc_info)] == []


def test_content_is_in_no_conflict(factory: MongoDBSessionManagerFactory, logged: pytest.LogCaptureFixture) -> None:
    one, other = factory.create_session_manager("s"), factory.create_session_manager("s")
    first, second = agent(one, CONTENT), agent(other, CONTENT)
    first(CONTENT)
    with pytest.raises(SessionConflictError) as raised:
        second(CONTENT)
    check_content(logged, raised.value)


def test_content_too_large_is_in_no_error_and_taken_out(
    factory: MongoDBSessionManagerFactory, logged: pytest.LogCaptureFixture
) -> None:
    live = agent(factory.create_session_manager("s"), "hello")
    with pytest.raises(MessageTooLargeError) as raised:
        live(CONTENT + "x" * (17 << 20))
    check_content(logged, raised.value)
    live("hi")
    assert texts(live.messages) == ["hi", "hello"]


def test_content_refused_by_a_validator_is_in_no_message(
    factory: MongoDBSessionManagerFactory,
    database: str,
    driver: pymongo.MongoClient[dict[str, Any]],
    logged: pytest.LogCaptureFixture,
) -> None:
    live = agent(factory.create_session_manager("s"), "hello")
    refused = {"agents.agent.messages.message.content.text": {"$ne": CONTENT}}
    driver[database].command("collMod", "agent_sessions", validator=refused)
    try:
        with pytest.raises(DatabaseError) as raised:
            live(CONTENT)
    finally:
        driver[database].command("collMod", "agent_sessions", validator={})
    check_content(logged, raised.value)
    assert "121" in str(raised.value)


# Statistics.


def test_statistics_count_what_the_pool_does(server: str, database: str) -> None:
    log = CommandLog()
    with MongoDBSessionManagerFactory(server, database, maxPoolSize=2, event_listeners=[log]) as factory:
        factory.create_session_manager("s")
        eventually(lambda: factory.get_connection_stats()["connections_in_use"] == 0)
        log.clear()
        threads = [threading.Thread(target=factory.create_session_manager, args=(f"s{n}",)) for n in range(5)]
        with fail_point(server, failCommands=["findAndModify"], times=5, blockConnection=True, blockTimeMS=1200):
            for thread in threads:
                thread.start()
            eventually(lambda: log.names.count("findAndModify") == 2)
            time.sleep(0.2)  # the others queue meanwhile
            stats = factory.get_connection_stats()
            for thread in threads:
                thread.join()
        after = factory.get_connection_stats()
    assert (stats["connections_open"], stats["connections_in_use"]) == (2, 2)
    assert stats["wait_queue"] == 3
    assert (after["connections_open"], after["connections_in_use"], after["wait_queue"]) == (2, 0, 0)
    assert stats["status"] == "connected"
    assert stats["pool_config"]["maxPoolSize"] == 2


def test_statistics_of_a_pool_whose_connections_break(server: str, database: str) -> None:
    with MongoDBSessionManagerFactory(server, database, maxPoolSize=4) as factory:
        with fail_point(server, failCommands=["findAndModify"], times=3, closeConnection=True):
            factory.create_session_manager("s")
        eventually(lambda: factory.get_connection_stats()["connections_in_use"] == 0)
        stats = factory.get_connection_stats()
    assert stats["wait_queue"] == 0
    assert 1 <= (stats["connections_open"] or 0) <= 4


def test_statistics_name_configuration_and_version(
    server: str, database: str, driver: pymongo.MongoClient[dict[str, Any]]
) -> None:
    options = {"maxPoolSize": 9, "minPoolSize": 1, "maxIdleTimeMS": 60_000, "waitQueueTimeoutMS": 1500}
    with MongoDBSessionManagerFactory(server, database, **options) as factory:
        stats = factory.get_connection_stats()
    assert stats["status"] == "connected"
    assert stats["error"] is None
    assert stats["server_version"] == driver.server_info()["version"]
    assert stats["pool_config"] == options


def test_statistics_of_a_server_that_does_not_tell_its_version(
    server: str, factory: MongoDBSessionManagerFactory
) -> None:
    for code in (13, 59, 323):
        with fail_point(server, failCommands=["buildInfo"], errorCode=code):
            stats = factory.get_connection_stats()
        assert (stats["status"], stats["error"], stats["server_version"]) == ("connected", None, None)


def test_statistics_of_a_server_that_refuses_everything(server: str, factory: MongoDBSessionManagerFactory) -> None:
    with fail_point(server, failCommands=["buildInfo", "ping"], errorCode=18, times=2):
        stats = factory.get_connection_stats()
    assert stats["status"] == "disconnected"
    assert "18" in (stats["error"] or "")


def test_statistics_without_a_server(nowhere: str) -> None:
    with MongoDBSessionManagerFactory(f"mongodb://user:{SECRET}@{nowhere}/?serverSelectionTimeoutMS=300") as factory:
        stats = factory.get_connection_stats()
    assert stats["status"] == "disconnected"
    assert nowhere in (stats["error"] or "")
    assert SECRET not in str(stats)
    assert stats["server_version"] is None
    assert stats["connections_open"] == 0


def test_statistics_after_closing(server: str, database: str) -> None:
    factory = MongoDBSessionManagerFactory(server, database)
    factory.ping()
    factory.close()
    stats = factory.get_connection_stats()
    assert (stats["status"], stats["connections_open"], stats["connections_in_use"]) == ("closed", 0, 0)


# A server that does not know what is asked of it.

FEATURES: dict[str, tuple[Any, str]] = {
    "an expression": (lambda sessions: sessions.update_one({}, [{"$set": {"a": {"$noSuch": SECRET}}}]), "$noSuch"),
    "a stage": (lambda sessions: sessions.database.command(aggregated([{"$noSuch": SECRET}])), "$noSuch"),
    "a stage within a stage": (
        lambda sessions: sessions.database.command(aggregated([{"$project": {SECRET: {"$noSuch": 1}}}])),
        "$noSuch",
    ),
    "an accumulator": (
        lambda sessions: sessions.database.command(aggregated([{"$group": {"_id": 1, SECRET: {"$noSuch": 1}}}])),
        "$noSuch",
    ),
    "a modifier": (lambda sessions: sessions.update_one({}, {"$noSuch": {"a": SECRET}}), "$noSuch"),
    "a command": (lambda sessions: sessions.database.command("noSuch", SECRET), "noSuch"),
}


def aggregated(pipeline: list[Any]) -> dict[str, Any]:
    return {"aggregate": "agent_sessions", "pipeline": pipeline, "cursor": {}}


@pytest.mark.anyio
async def test_a_feature_that_the_server_does_not_know_is_named_with_its_version(
    server: str, database: str, driver: pymongo.MongoClient[dict[str, Any]]
) -> None:
    version = driver.server_info()["version"]
    driver[database]["agent_sessions"].insert_one({"_id": "s"})
    async with AsyncMongoDBSessionRepository(server, database) as repository:
        for feature, (command, name) in FEATURES.items():
            with pytest.raises(DatabaseError) as refused:
                await repository._store.collection.send(command)
            told = str(refused.value)
            assert told.startswith(f"the server, MongoDB {version}, does not support {name} (code "), feature
            assert SECRET not in told


@pytest.mark.anyio
async def test_what_the_strict_stable_api_refuses_is_named(
    server: str, database: str, driver: pymongo.MongoClient[dict[str, Any]]
) -> None:
    driver[database]["agent_sessions"].insert_one({"_id": "s"})
    client: Any = AsyncIOMotorClient(server, server_api=ServerApi("1", strict=True))
    repository = AsyncMongoDBSessionRepository(client=client, database_name=database)
    expression = {"$unsetField": {"field": "b", "input": "$$ROOT"}}
    with pytest.raises(DatabaseError, match=r"^the server, .*, does not support \$unsetField \(code 323\)$"):
        await repository._store.collection.send(lambda sessions: sessions.update_one({}, [{"$set": {"a": expression}}]))
    client.close()


# After closing, and on the wrong loop.


def test_nothing_is_sent_after_closing(server: str, database: str) -> None:
    factory = MongoDBSessionManagerFactory(server, database)
    manager = factory.create_session_manager("s")
    live = agent(manager, "hello")
    factory.close()
    for call in (
        factory.ping,
        lambda: factory.create_session_manager("s"),
        lambda: asyncio.run(factory.ping_async()),
        lambda: asyncio.run(factory.create_session_manager_async("s")),
        lambda: live("hi"),
    ):
        with pytest.raises(SessionClosedError):
            call()
    repository = MongoDBSessionRepository(server, database)
    repository.close()
    for call in (repository.ping, lambda: repository.read_session("s"), lambda: repository.open_session("s")):
        with pytest.raises(SessionClosedError):
            call()


@pytest.mark.anyio
async def test_nothing_is_sent_after_closing_async(server: str, database: str) -> None:
    repository = AsyncMongoDBSessionRepository(server, database)
    await repository.open_session("s")
    await repository.close()
    await repository.close()
    with pytest.raises(SessionClosedError):
        await repository.ping()
    with pytest.raises(SessionClosedError):
        await repository.read_session("s")
    manager = await create_mongodb_session_manager_async("s", server, database)
    live = agent(manager, "hello")
    await manager.close()
    with pytest.raises(SessionClosedError):
        await live.invoke_async("hi")


def test_a_repository_on_another_loop_is_refused(server: str, database: str) -> None:
    repository = AsyncMongoDBSessionRepository(server, database)

    async def first() -> None:
        await repository.open_session("s")
        with pytest.raises(EventLoopError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, repository.read_session("s"))
        assert await repository.read_session("s") is not None
        await repository.close()

    asyncio.run(first())


@DRIVERS
def test_a_repository_over_a_client_of_another_loop_is_refused(server: str, database: str, driver_class: Any) -> None:
    async def main() -> None:
        async with borrowed(driver_class, server, used=True) as client:

            async def elsewhere() -> None:
                await AsyncMongoDBSessionRepository(client=client, database_name=database).read_session("s")

            with pytest.raises(EventLoopError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, elsewhere())

    asyncio.run(main())


@FRESH_DRIVERS
@pytest.mark.anyio
async def test_a_repository_over_a_borrowed_client(server: str, database: str, driver_class: Any) -> None:
    async with borrowed(driver_class, server) as client:
        async with AsyncMongoDBSessionRepository(client=client, database_name=database) as repository:
            await repository.open_session("s")
            session = await repository.read_session("s")
            assert session is not None
            assert session.session_id == "s"
        assert (await client.admin.command("ping"))["ok"] == 1
