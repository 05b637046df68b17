"""A synchronous `MongoClient` of the application's as `client=`, and the one that a repository shows."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pymongo
import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient

import interpreter
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    AsyncMongoDBSessionRepository,
    ConfigurationError,
    EventLoopError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    MongoDBStorage,
    SessionClosedError,
    create_mongodb_session_manager_async,
)
from support import agent, texts

Documents = pymongo.collection.Collection[dict[str, Any]]

IMAGE = {"image": {"format": "png", "source": {"bytes": b"\x89" * 300_000}}}


@pytest.fixture(scope="module")
def applications_client(server: str) -> Iterator[pymongo.MongoClient[dict[str, Any]]]:
    with pymongo.MongoClient(server) as client:
        yield client


@pytest.fixture
def client(applications_client: pymongo.MongoClient[dict[str, Any]]) -> Iterator[pymongo.MongoClient[dict[str, Any]]]:
    yield applications_client
    assert applications_client.admin.command("ping")["ok"] == 1  # it is never closed but by its owner


def conversation(stored: Documents, session_id: str = "s") -> list[str]:
    document = stored.find_one({"_id": session_id})
    assert document is not None
    return texts(document["agents"]["agent"]["messages"])


def test_a_synchronous_manager_over_it(client: Any, database: str, stored: Documents) -> None:
    with MongoDBSessionManager("s", client=client, database_name=database) as manager:
        agent(manager, "hello")("hi")
    with MongoDBSessionManager("s", client=client, database_name=database) as manager:
        agent(manager, "bye")("I am off")
        manager.update_metadata({"a": 1})
        assert manager.get_metadata() == {"metadata": {"a": 1}}
    assert conversation(stored) == ["hi", "hello", "I am off", "bye"]


@pytest.mark.anyio
async def test_an_asynchronous_manager_over_it(client: Any, database: str, stored: Documents) -> None:
    async with await create_mongodb_session_manager_async("s", client=client, database_name=database) as manager:
        await agent(manager, "hello").invoke_async("hi")
    async with AsyncMongoDBSessionManager("s", client=client, database_name=database) as manager:
        async for _ in agent(manager, "bye").stream_async("I am off"):
            pass
    assert conversation(stored) == ["hi", "hello", "I am off", "bye"]


@pytest.mark.anyio
@pytest.mark.may_block
async def test_a_synchronous_agent_may_run_on_any_loop(client: Any, database: str, stored: Documents) -> None:
    with MongoDBSessionManagerFactory(client=client, database_name=database) as factory:
        agent(factory.create_session_manager("s"), "hello")("hi")
        await agent(await factory.create_session_manager_async("t"), "hello").invoke_async("hi")
    assert conversation(stored) == conversation(stored, "t") == ["hi", "hello"]


def test_one_factory_over_it_serves_several_loops_and_threads(client: Any, database: str, stored: Documents) -> None:
    factory = MongoDBSessionManagerFactory(client=client, database_name=database)

    async def turn(session_id: str) -> None:
        async with await factory.create_session_manager_async(session_id) as manager:
            await agent(manager, "hello").invoke_async("hi")

    for number in range(2):
        asyncio.run(turn(f"s{number}"))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: asyncio.run(turn(f"t{number}")), range(4)))
    assert factory.count_sessions() == 6
    factory.check()
    assert factory.get_connection_stats()["status"] == "connected"
    factory.close()
    assert stored.count_documents({}) == 6


@pytest.mark.anyio
async def test_a_repository_over_it_on_the_applications_loop(client: Any, database: str) -> None:
    async with AsyncMongoDBSessionRepository(client=client, database_name=database) as repository:
        await repository.open_session("s")
        assert [each.session_id for each in (await repository.list_sessions()).sessions] == ["s"]
        assert [line async for line in repository.export_session("s")]
        assert await repository.delete_session("s")


def test_cursors_gridfs_and_archives_over_it(client: Any, database: str, stored: Documents) -> None:
    options = {"client": client, "database_name": database, "max_embedded_messages": 4}
    with MongoDBSessionManager("s", **options) as manager:
        live = agent(manager, *map(str, range(4)))
        for number in range(3):
            live(f"question {number}")
        live([{"text": "look"}, IMAGE])
    with MongoDBSessionManager("s", **options) as manager:
        restored = agent(manager)
        assert restored.messages == live.messages
    assert stored.database["agent_sessions_archive"].count_documents({}) >= 1
    assert stored.database["agent_sessions_attachments.files"].count_documents({}) == 1
    with MongoDBSessionRepository(client=client, database_name=database) as repository:
        lines = list(repository.export_session("s"))
        repository.import_session(lines, "copy")
        repository.fork_session("s", "fork")
        assert len(repository.list_messages("copy", "agent")) == 8
        assert repository.delete_session("s")


@pytest.mark.anyio
async def test_a_storage_over_it(client: Any, database: str) -> None:
    async with MongoDBSessionManagerFactory(client=client, database_name=database) as factory:
        storage = factory.create_storage()
        await storage.write("a", b"x" * 5_000_000)
        assert await storage.read("a") == b"x" * 5_000_000
    async with MongoDBStorage(client=client, database_name=database) as own:
        assert await own.read("a") == b"x" * 5_000_000


def test_its_database_is_the_default(server: str, database: str) -> None:
    host = server.partition("://")[2].partition("/")[0]
    with pymongo.MongoClient(f"mongodb://{host}/named") as client:
        assert "named." in repr(MongoDBSessionRepository(client=client))


def test_unacknowledged_writes_are_refused(server: str) -> None:
    with pymongo.MongoClient(server, w=0) as client, pytest.raises(ConfigurationError, match="w=0"):
        MongoDBSessionManagerFactory(client=client)


def test_it_cannot_be_combined_with_a_connection_string(server: str, client: Any) -> None:
    with pytest.raises(ConfigurationError, match="client cannot be combined"):
        MongoDBSessionManager("s", server, client=client)


def test_one_that_its_owner_closed(server: str, database: str) -> None:
    with pymongo.MongoClient(server) as client:
        manager = MongoDBSessionManager("s", client=client, database_name=database)
    with pytest.raises(SessionClosedError):
        agent(manager, "hello")("hi")


def test_it_is_not_kept_by_a_factory_that_is_gone(server: str, database: str) -> None:
    client: pymongo.MongoClient[Any] = pymongo.MongoClient(server)
    gone = weakref.ref(client)
    with MongoDBSessionManagerFactory(client=client, database_name=database) as factory:
        factory.create_session_manager("s").close()
    client.close()
    del client, factory
    gc.collect()
    assert gone() is None


FORK = """
import os, sys, pymongo
from mongodb_session_manager import EventLoopError, MongoDBSessionManager, MongoDBSessionManagerFactory
uri, database = sys.argv[1:]
client = pymongo.MongoClient(uri)
factory = MongoDBSessionManagerFactory(client=client, database_name=database)
factory.create_session_manager("parent").close()
child = os.fork()
if child == 0:
    try:
        factory.create_session_manager("child")
    except EventLoopError as error:
        assert "fork" in str(error), error
    else:
        os._exit(1)
    with pymongo.MongoClient(uri) as own, MongoDBSessionManager("child", client=own, database_name=database):
        pass
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
factory.create_session_manager("parent again").close()
client.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_a_fork_the_child_is_told_to_make_its_own(server: str, database: str, stored: Documents) -> None:
    assert interpreter.run(FORK, server, database, warnings=(interpreter.FORK_WARNING,)) == ("", "")
    assert {each["_id"] for each in stored.find({}, {"_id": 1})} == {"parent", "child", "parent again"}


EXIT = """
import sys, pymongo
from mongodb_session_manager import MongoDBSessionManager
from support import agent
client = pymongo.MongoClient(sys.argv[1])
manager = MongoDBSessionManager("s", client=client, database_name=sys.argv[2])
agent(manager, "hello")("hi")
"""


def test_a_program_that_closes_nothing_ends_cleanly(server: str, database: str, stored: Documents) -> None:
    assert interpreter.run(EXIT, server, database, warnings=("ignore::ResourceWarning",)) == ("", "")
    assert conversation(stored) == ["hi", "hello"]


# What a repository shows.


def test_a_repository_shows_its_client_database_and_collection(server: str, database: str, stored: Documents) -> None:
    with MongoDBSessionRepository(server, database, "elsewhere") as repository:
        repository.open_session("s")
        assert isinstance(repository.client, pymongo.MongoClient)
        assert repository.client is repository.client
        assert repository.client.admin.command("ping")["ok"] == 1
        assert repository.database.name == database
        assert repository.collection.name == "elsewhere"
        document = repository.collection.find_one({"_id": "s"})
        assert document is not None
        assert document["session_type"] == "AGENT"
        repository.collection.update_one({"_id": "s"}, {"$set": {"metadata.a": 1}})
        assert repository.get_metadata("s") == {"metadata": {"a": 1}}
    with pytest.raises(SessionClosedError):
        _ = repository.collection


def test_a_repository_over_a_client_shows_that_one(client: Any, database: str) -> None:
    with MongoDBSessionRepository(client=client, database_name=database) as repository:
        assert repository.client is client


@pytest.mark.anyio
async def test_a_repository_over_motors_client_shows_its_connections(server: str, database: str) -> None:
    motor: Any = AsyncIOMotorClient(server)
    assert MongoDBSessionRepository(client=motor, database_name=database).client is motor.delegate
    motor.close()


def test_a_repository_over_pymongos_asynchronous_client_has_none_to_show(server: str, database: str) -> None:
    theirs: Any = AsyncMongoClient(server)
    repository = MongoDBSessionRepository(client=theirs, database_name=database)
    for name in ("client", "database", "collection"):
        with pytest.raises(ConfigurationError, match="AsyncMongoClient"):
            getattr(repository, name)


@pytest.mark.anyio
async def test_waiting_for_motors_own_loop_is_still_refused(server: str, database: str) -> None:
    motor: Any = AsyncIOMotorClient(server)
    await motor.admin.command("ping")
    with pytest.raises(EventLoopError):
        MongoDBSessionManager("s", client=motor, database_name=database)
    motor.close()
