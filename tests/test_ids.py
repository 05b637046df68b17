"""Any text is an agent's id; what is no id never reaches the database."""

from __future__ import annotations

import inspect
import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from pymongo.collection import Collection
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    AsyncMongoDBSessionRepository,
    InvalidArgumentError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    create_mongodb_session_manager,
    create_mongodb_session_manager_async,
)
from mongodb_session_manager._format.changes import AppendMessage
from mongodb_session_manager._format.documents import stored_message
from mongodb_session_manager._format.ids import is_numbered
from mongodb_session_manager._format.multi_agents import first_write
from orchestrators import node, pipeline
from support import CommandLog, agent, message_ids, texts

AGENTS = {"a.b": "a%2Eb", "$x": "%24x", "50%": "50%25", "日本": "日本", "x" * 200: "x" * 200}

NO_IDS: list[Any] = [{"$ne": None}, {}, "", "a\0b", None, 7, ["s"], "\ud83d"]


# Agent ids.


def test_agents_of_any_id_resume_with_their_own_messages(
    factory: MongoDBSessionManagerFactory, stored: Collection[Any]
) -> None:
    with factory.create_session_manager("s") as manager:
        for agent_id in AGENTS:
            agent(manager, f"hello {agent_id}", agent_id=agent_id)(f"I am {agent_id}")
    with factory.create_session_manager("s") as manager:
        for agent_id in reversed(AGENTS):
            resumed = agent(manager, "still here", agent_id=agent_id, state=None)
            assert texts(resumed.messages) == [f"I am {agent_id}", f"hello {agent_id}"]
            resumed("still there?")
    document = stored.find_one({"_id": "s"})
    assert document is not None
    assert set(document["agents"]) == set(AGENTS.values())
    for agent_id, key in AGENTS.items():
        assert document["agents"][key]["agent_data"]["agent_id"] == agent_id
        assert message_ids(document, key) == [0, 1, 2, 3]
        assert texts(document["agents"][key]["messages"]) == [
            f"I am {agent_id}",
            f"hello {agent_id}",
            "still there?",
            "still here",
        ]


@pytest.mark.anyio
async def test_agents_of_any_id_resume_asynchronously(factory: MongoDBSessionManagerFactory) -> None:
    async with await factory.create_session_manager_async("s") as manager:
        for agent_id in AGENTS:
            await agent(manager, f"hello {agent_id}", agent_id=agent_id).invoke_async(f"I am {agent_id}")
    async with await factory.create_session_manager_async("s") as manager:
        for agent_id in AGENTS:
            resumed = agent(manager, agent_id=agent_id)
            assert texts(resumed.messages) == [f"I am {agent_id}", f"hello {agent_id}"]


def test_agents_of_any_id_through_the_repository(server: str, database: str) -> None:
    with MongoDBSessionRepository(server, database) as repository:
        repository.create_session(Session("s", SessionType.AGENT))
        for agent_id in AGENTS:
            repository.create_agent("s", SessionAgent(agent_id, {"id": agent_id}, {}))
            repository.create_message("s", agent_id, message(agent_id))
        for agent_id in AGENTS:
            read = repository.read_agent("s", agent_id)
            assert read is not None
            assert (read.agent_id, read.state) == (agent_id, {"id": agent_id})
            assert texts([found.message for found in repository.list_messages("s", agent_id)]) == [agent_id]
            found = repository.read_message("s", agent_id, 0)
            assert found is not None
            assert texts([found.message]) == [agent_id]


@pytest.mark.parametrize("agent_id", ["a\0b", "\ud83d"])
def test_an_agent_whose_id_cannot_be_stored_is_refused_when_it_is_made(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, agent_id: str
) -> None:
    manager = factory.create_session_manager("s")
    commands.clear()
    with pytest.raises(InvalidArgumentError, match=r"^agent_id must"):
        agent(manager, agent_id=agent_id)
    manager.close()
    assert commands.names == []


# What is no session id.


def test_managers_refuse_what_is_no_session_id(server: str, database: str, commands: CommandLog) -> None:
    for make in (MongoDBSessionManager, create_mongodb_session_manager, AsyncMongoDBSessionManager):
        for bad in NO_IDS:
            with pytest.raises(InvalidArgumentError, match=r"^session_id must"):
                make(bad, server, database, event_listeners=[commands])
    assert commands.names == []


@pytest.mark.anyio
async def test_the_async_constructor_refuses_what_is_no_session_id(
    server: str, database: str, commands: CommandLog
) -> None:
    for bad in NO_IDS:
        with pytest.raises(InvalidArgumentError, match=r"^session_id must"):
            await create_mongodb_session_manager_async(bad, server, database, event_listeners=[commands])
    assert commands.names == []


@pytest.mark.anyio
@pytest.mark.may_block
async def test_a_factory_refuses_what_is_no_session_id(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    for bad in NO_IDS:
        with pytest.raises(InvalidArgumentError, match=r"^session_id must"):
            factory.create_session_manager(bad)
        with pytest.raises(InvalidArgumentError, match=r"^session_id must"):
            await factory.create_session_manager_async(bad)
    assert commands.names == []


# Every method of the repositories that takes an id.


def message(text: str) -> SessionMessage:
    return SessionMessage({"role": "user", "content": [{"text": text}]}, 0)


def arguments(**ids: Any) -> dict[str, Any]:
    """A good argument for every parameter of a repository's method, but for the ids given."""
    session_id, agent_id = ids.get("session_id", "s"), ids.get("agent_id", "agent")
    return {
        "session_id": session_id,
        "session": Session(session_id, SessionType.AGENT),
        "agent_id": agent_id,
        "session_agent": SessionAgent(agent_id, {}, {}),
        "session_message": message("hi"),
        "message_id": 0,
        "changes": [AppendMessage(agent_id, stored_message(message("hi"), 0))],
        "limit": None,
        "offset": 0,
        "metadata": {"n": 1},
        "keys": ["n"],
        "feedback": {"rating": "up"},
        "model": "model",
        "system_prompt": "Be brief.",
        "prompt_metadata": {"version": 1},
        "multi_agent": pipeline(None, node("one")),
        "multi_agent_id": "pipeline",
        "write": first_write("pipeline", {}, "writer"),
        "new_id": "t",
        "at_message": None,
        "incarnation": None,
        "lease": None,
        "releases": False,
        "loaded": None,
        "owner": "alice",
    }


def methods_taking(*names: str) -> list[str]:
    return [
        name
        for name, method in inspect.getmembers(AsyncMongoDBSessionRepository, inspect.isfunction)
        if not name.startswith("_") and set(names) & {*inspect.signature(method).parameters}
    ]


def called(repository: Any, name: str, **ids: Any) -> Callable[[], Any]:
    method = getattr(repository, name)
    given = arguments(**ids)
    names = [
        parameter.name
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return lambda: method(**{name: given[name] for name in names})


# Of the others one returns an iterator and one takes no id too: see test_copying.
SESSION_METHODS = [
    name for name in methods_taking("session_id", "session") if name not in ("export_session", "import_session")
]
AGENT_METHODS = methods_taking("agent_id", "session_agent", "changes")


def test_these_are_the_methods() -> None:
    assert set(SESSION_METHODS) >= {
        "open_session",
        "create_session",
        "read_session",
        "create_agent",
        "read_agent",
        "update_agent",
        "create_message",
        "read_message",
        "update_message",
        "list_messages",
    }
    assert set(SESSION_METHODS) - set(AGENT_METHODS) >= {"open_session", "create_session", "read_session"}


def test_every_method_refuses_what_is_no_session_or_agent_id(server: str, database: str, commands: CommandLog) -> None:
    calls = [("session_id", name) for name in SESSION_METHODS] + [("agent_id", name) for name in AGENT_METHODS]
    with MongoDBSessionRepository(server, database, event_listeners=[commands]) as repository:
        for argument, name in calls:
            with pytest.raises(InvalidArgumentError, match=rf"^{argument} must"):
                called(repository, name, **{argument: {"$ne": None}})()
            assert commands.names == [], name


@pytest.mark.anyio
async def test_the_async_repository_refuses_whatever_is_no_id(server: str, database: str, commands: CommandLog) -> None:
    calls = [("session_id", "open_session"), ("agent_id", "_apply"), ("agent_id", "read_agent")]
    async with AsyncMongoDBSessionRepository(server, database, event_listeners=[commands]) as repository:
        for bad, (argument, name) in itertools.product(NO_IDS, calls):
            with pytest.raises(InvalidArgumentError, match=rf"^{argument} must"):
                await called(repository, name, **{argument: bad})()
    assert commands.names == []


def test_a_message_id_that_is_no_number_never_reaches_a_query(server: str, database: str, commands: CommandLog) -> None:
    bad_ids: list[Any] = [{"$gte": 0}, None, "0", [0]]
    with MongoDBSessionRepository(server, database, event_listeners=[commands]) as repository:
        for bad in bad_ids:
            with pytest.raises(InvalidArgumentError, match=r"^message_id must"):
                repository.read_message("s", "agent", bad)
    assert commands.names == []


def test_large_ids_need_no_memory() -> None:
    tracemalloc.start()
    try:
        assert is_numbered({"ids": [10**6], "next_message_id": 10**6 + 1, "archived": 0})
        assert not is_numbered({"ids": [0], "next_message_id": 10**6, "archived": 0})
        assert tracemalloc.get_traced_memory()[1] < 10**5
    finally:
        tracemalloc.stop()
