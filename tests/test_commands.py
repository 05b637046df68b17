"""What a turn costs: one command to open, one per durable message, nothing else."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from strands import tool

from mongodb_session_manager import MongoDBSessionManagerFactory
from support import CommandLog, agent, alternating

pytestmark = pytest.mark.anyio

OPEN, WRITE, TAKE = "findAndModify", "update", "findAndModify"

ON_BUSY = pytest.mark.parametrize("on_busy", ["conflict", "wait", "refuse"])

OWNED = {"owner": "ada", "title": "Trip", "tags": ["red"], "session_ttl": timedelta(hours=1)}
LABELS = pytest.mark.parametrize("labels", alternating({}, OWNED), ids=["", "owned"])
"""Whether the session has an owner, a title, tags and a time to live."""


def sent(commands: CommandLog) -> list[str]:
    """Return the commands without the index builds that the first expiring session of a process starts."""
    return [name for name in commands.names if name != "createIndexes"]


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


CALL_ADD = {"tool": "add", "input": {"a": 1, "b": 2}}

TURNS = pytest.mark.parametrize(
    ("save_on", "replies", "writes"),
    [
        ("message", ["hello"], 2),
        ("invocation", ["hello"], 1),
        ("message", [CALL_ADD, "three"], 4),
        ("invocation", [CALL_ADD, "three"], 1),
    ],
)


@TURNS
@ON_BUSY
@LABELS
def test_sync_turn(
    factory: MongoDBSessionManagerFactory,
    commands: CommandLog,
    on_busy: str,
    labels: dict[str, Any],
    save_on: str,
    replies: list,
    writes: int,
) -> None:
    for _ in ("created", "resumed"):
        commands.clear()
        with factory.create_session_manager("s", save_on=save_on, on_busy=on_busy, **labels) as manager:
            first = agent(manager, *replies, tools=[add])
            first("one")
            manager.sync_agent(first)
            assert sent(commands) == [OPEN] + [WRITE] * writes


@TURNS
@ON_BUSY
@LABELS
async def test_async_turn(
    factory: MongoDBSessionManagerFactory,
    commands: CommandLog,
    on_busy: str,
    labels: dict[str, Any],
    save_on: str,
    replies: list,
    writes: int,
) -> None:
    for _ in ("created", "resumed"):
        commands.clear()
        async with factory.create_session_manager_async("s", save_on=save_on, on_busy=on_busy, **labels) as manager:
            first = agent(manager, *replies, tools=[add])
            await first.invoke_async("one")
            manager.sync_agent(first)
            await manager.flush()
            assert sent(commands) == [OPEN] + [WRITE] * writes


@pytest.mark.parametrize(("save_on", "writes"), [("message", 2), ("invocation", 1)])
@ON_BUSY
@LABELS
def test_next_turn_of_a_live_agent(
    factory: MongoDBSessionManagerFactory,
    commands: CommandLog,
    on_busy: str,
    labels: dict[str, Any],
    save_on: str,
    writes: int,
) -> None:
    manager = factory.create_session_manager("s", save_on=save_on, on_busy=on_busy, **labels)
    live = agent(manager, "one", "two")
    live("1")
    commands.clear()
    live("2")
    manager.sync_agent(live)
    takes = on_busy != "conflict" and save_on == "message"
    assert sent(commands) == ([TAKE] if takes else [WRITE]) + [WRITE] * (writes - 1)


def test_a_manager_from_a_warm_factory_costs_one_command(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    factory.create_session_manager("s")
    assert commands.names == [OPEN]


async def test_constructing_an_agent_sends_nothing(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    async with await factory.create_session_manager_async("s") as earlier:
        await agent(earlier, "before").invoke_async("earlier")
    manager = await factory.create_session_manager_async("s")
    commands.clear()
    restored = agent(manager)
    assert len(restored.messages) == 2
    assert commands.names == []


@ON_BUSY
def test_closing_sends_nothing_when_all_is_stored(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, on_busy: str
) -> None:
    manager = factory.create_session_manager("s", on_busy=on_busy)
    agent(manager, "hello")("hi")
    commands.clear()
    manager.close()
    assert commands.names == []
