"""`save_on="overlap"`: the model is called while a message is stored; everything else is unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pymongo
import pytest
from strands import tool
from strands.types.exceptions import EventLoopException

from mongodb_session_manager import DatabaseUnavailableError, MongoDBSessionManagerFactory, SessionConflictError
from proxy import Proxy, command
from support import CommandLog, Paused, agent, eventually, message_ids, texts

pytestmark = pytest.mark.anyio

Stored = pymongo.collection.Collection[dict[str, Any]]

CALL_ADD = {"tool": "add", "input": {"a": 1, "b": 2}}
OPEN, WRITE = "findAndModify", "update"


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def limit() -> int:
    """The milliseconds that `far` waits for a server."""
    return 30_000


@pytest.fixture
def far(proxy: Proxy, database: str, commands: CommandLog, limit: int) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory behind a proxy."""
    options: dict[str, Any] = {"serverSelectionTimeoutMS": limit, "event_listeners": [commands]}
    with MongoDBSessionManagerFactory(proxy.uri, database, save_on="overlap", **options) as factory:
        factory.list_sessions()
        eventually(lambda: not factory._connection._tasks)
        commands.clear()
        yield factory
        proxy.reset()


@pytest.mark.parametrize("on_busy", ["conflict", "wait"])
async def test_the_model_is_called_while_the_users_message_is_on_its_way(
    far: MongoDBSessionManagerFactory, proxy: Proxy, stored: Stored, commands: CommandLog, on_busy: Any
) -> None:
    manager = await far.create_session_manager_async("s", on_busy=on_busy)
    live = agent(manager)
    live.model = model = Paused(["hello"])
    proxy.freeze_before_request(command("update"))
    turn = asyncio.create_task(live.invoke_async("hi"))
    await asyncio.wait_for(model.asked.wait(), 30)
    assert stored.find_one({})["agents"] == {}
    await asyncio.to_thread(eventually, lambda: proxy.frozen)
    model.go.set()
    await asyncio.sleep(0.05)
    assert not turn.done()
    proxy.thaw()
    await turn
    assert message_ids(stored.find_one({})) == [0, 1]
    assert commands.names == [OPEN, WRITE, WRITE]


async def test_no_tool_runs_before_the_call_is_stored(
    far: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog
) -> None:
    seen = []

    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        seen.extend(message_ids(stored.find_one({})))
        return a + b

    manager = await far.create_session_manager_async("s")
    live = agent(manager, tools=[add])
    live.model = model = Paused([CALL_ADD, "three"])
    turn = asyncio.create_task(live.invoke_async("hi"))
    await model.asked.wait()
    await asyncio.to_thread(eventually, lambda: WRITE in commands.names)
    model.go.set()
    await turn
    assert seen == [0, 1]
    assert message_ids(stored.find_one({})) == [0, 1, 2, 3]
    assert 4 <= len(commands.names) <= 5  # one command can store both the tool result and the answer


def test_a_synchronous_agent(far: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog) -> None:
    with far.create_session_manager("s") as manager:
        live = agent(manager, "one", "two")
        live("1")
        assert texts(stored.find_one({})["agents"]["agent"]["messages"]) == ["1", "one"]
        live("2")
        assert texts(stored.find_one({})["agents"]["agent"]["messages"]) == ["1", "one", "2", "two"]
    assert len(commands.names) <= 5


@pytest.mark.parametrize("on_busy", ["conflict", "wait"])
@pytest.mark.parametrize(("calls", "writes"), [([], 2), ([CALL_ADD], 4)])
def test_commands_of_a_turn(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, on_busy: Any, calls: list[Any], writes: int
) -> None:
    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    def once_stored(count: int, reply: Any) -> Any:
        def answer(_: object) -> Any:
            eventually(lambda: commands.names.count(WRITE) == count)
            return reply

        return answer

    manager = factory.create_session_manager("s", save_on="overlap", on_busy=on_busy)
    replies = [once_stored(2 * number + 1, reply) for number, reply in enumerate([*calls, "hello"])]
    live = agent(manager, *replies, tools=[add])
    live("hi")
    manager.sync_agent(live)
    manager.close()
    assert commands.names == [OPEN] + [WRITE] * writes


@pytest.mark.parametrize("limit", [1000])
@pytest.mark.parametrize("replies", [["hello"], [CALL_ADD, "three"]])
async def test_a_failed_write_stops_the_turn(
    far: MongoDBSessionManagerFactory, proxy: Proxy, stored: Stored, replies: list[Any]
) -> None:
    ran = []

    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        ran.append(a)
        return a + b

    manager = await far.create_session_manager_async("s")
    live = agent(manager, tools=[add])
    live.model = model = Paused(replies)
    proxy.refuse()
    turn = asyncio.create_task(live.invoke_async("hi"))
    await model.asked.wait()
    model.go.set()
    with pytest.raises((DatabaseUnavailableError, EventLoopException)) as raised:
        await turn
    assert "MongoDB" in str(raised.value)
    assert ran == []
    proxy.accept()
    await manager.flush()
    assert message_ids(stored.find_one({}))[:1] == [0]
    await manager.close()


async def test_a_conflict_stops_the_turn(far: MongoDBSessionManagerFactory, stored: Stored) -> None:
    async with far.create_session_manager_async("s") as first, far.create_session_manager_async("s") as second:
        late = agent(second, "two")
        await agent(first, "one").invoke_async("first")
        with pytest.raises(SessionConflictError):
            await late.invoke_async("second")
    assert texts(stored.find_one({})["agents"]["agent"]["messages"]) == ["first", "one"]


async def test_a_direct_tool_call_is_stored_when_it_returns(far: MongoDBSessionManagerFactory, stored: Stored) -> None:
    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    manager = await far.create_session_manager_async("s")
    live = agent(manager, tools=[add])
    await asyncio.to_thread(live.tool.add, a=1, b=2)
    assert len(message_ids(stored.find_one({}))) == len(live.messages) == 4
    await manager.close()
