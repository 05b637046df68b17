"""What agents use: of each message, of each invocation, and in total."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo.collection import Collection
from strands import Agent
from strands.bidi import BidiAgent
from strands.bidi.types.events import BidiResponseStopEvent
from strands.types.exceptions import EventLoopException

import interpreter
from fix_usage import ADD, CALL, METADATA, add, metered
from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
)
from scripted_bidi import ScriptedBidiModel, said
from scripted_bidi import calls as call_of
from support import CommandLog, Session, agent, alternating, client_of, fail_point, message_ids, texts

Stored = Collection[dict[str, Any]]

ROOT = Path(__file__).parents[1]


def used(calls: int, invocations: int, tool_calls: int = 0) -> dict[str, int]:
    """Return the totals of so many calls to the metered model."""
    totals = {name: value * calls for name, value in CALL.items()}
    return {**totals, "invocations": invocations, "toolCalls": tool_calls}


NOTHING = used(0, 0)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=alternating(False, True), ids=["manager", "async manager"])
def session(request: pytest.FixtureRequest, factory: MongoDBSessionManagerFactory, runner: asyncio.Runner) -> Session:
    return Session(factory, runner, request.param)


SAVE_ON = pytest.mark.parametrize("save_on", alternating("message", "invocation"))


def stored_messages(stored: Stored, key: str = "agent") -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = stored.find_one({"_id": "s"})["agents"][key]["messages"]
    return messages


def own_usage(message: dict[str, Any]) -> dict[str, Any] | None:
    """Return the usage of a stored message, `None` if it has none."""
    usage: dict[str, Any] | None = message.get("event_loop_metrics", {}).get("message_usage")
    return usage


def without_first_byte(usage: dict[str, Any]) -> dict[str, Any]:
    """Return a usage without the one value that is measured."""
    return {name: value for name, value in usage.items() if name != "timeToFirstByteMs"}


# Of each message.


@SAVE_ON
def test_each_assistant_message_has_its_own_usage(session: Session, stored: Stored, save_on: str) -> None:
    session.open(save_on=save_on)
    live = agent(session.manager, "It rains.", "Sunny.", system_prompt="Be brief.")
    live("How is Oslo?")
    live("And Rome?")
    session.flush()
    usages = [own_usage(message) for message in stored_messages(stored)]
    assert [usages[0], usages[2]] == [None, None]
    assert [without_first_byte(usages[1]), without_first_byte(usages[3])] == [
        {"inputTokens": 5, "outputTokens": 2, "totalTokens": 7, "latencyMs": 30},
        {"inputTokens": 9, "outputTokens": 1, "totalTokens": 10, "latencyMs": 25},
    ]


@SAVE_ON
def test_a_message_that_calls_a_tool_has_its_own_usage_too(session: Session, stored: Stored, save_on: str) -> None:
    session.open(save_on=save_on)
    metered(session.manager, ADD, "three")("1 + 2?")
    session.flush()
    usages = [without_first_byte(own_usage(message) or {}) for message in stored_messages(stored)]
    assert usages == [{}, CALL, {}, CALL]


def test_the_usage_of_a_message_is_restored_with_it_and_not_counted_again(session: Session) -> None:
    metered(session.open().manager, "one")("a")
    session.close()
    resumed = metered(session.open().manager)
    assert without_first_byte(resumed.messages[1]["metadata"]["usage"]) == METADATA["usage"]
    assert session.get_usage()["total"] == used(1, 1)


# Totals.


@SAVE_ON
def test_totals_after_several_turns(session: Session, stored: Stored, save_on: str) -> None:
    session.open(save_on=save_on)
    live = metered(session.manager, "one", ADD, "two", [ADD, ADD], ADD, "three")
    live("a")
    live("b")
    live("c")
    session.flush()
    expected = used(6, 3, 4)
    assert stored.find_one({"_id": "s"})["agents"]["agent"]["usage"] == expected
    assert expected == {
        "inputTokens": 60,
        "outputTokens": 30,
        "totalTokens": 90,
        "cacheReadInputTokens": 18,
        "cacheWriteInputTokens": 12,
        "latencyMs": 42,
        "invocations": 3,
        "toolCalls": 4,
    }
    assert session.get_usage() == {"agents": {"agent": expected}, "total": expected}


def test_totals_per_agent_and_of_all(session: Session) -> None:
    session.open()
    metered(session.manager, "one", agent_id="a.b")("a")
    metered(session.manager, ADD, "two", agent_id="$x")("b")
    metered(session.manager, agent_id="silent")
    assert session.get_usage() == {
        "agents": {"a.b": used(1, 1), "$x": used(2, 1, 1), "silent": NOTHING},
        "total": used(3, 2, 1),
    }


def test_a_session_without_agents_has_used_nothing(session: Session) -> None:
    session.open()
    assert session.get_usage() == {"agents": {}, "total": NOTHING}


def test_an_agent_of_old_has_used_nothing_so_far(session: Session, stored: Stored) -> None:
    metered(session.open().manager, "one")("a")
    session.close()
    newer = ["usage", "next_message_id", "messages.1.event_loop_metrics"]
    stored.update_one({"_id": "s"}, {"$unset": {f"agents.agent.{name}": "" for name in newer}})
    session.open()
    assert session.get_usage() == {"agents": {"agent": NOTHING}, "total": NOTHING}
    metered(session.manager, "two")("b")
    assert session.get_usage()["total"] == used(1, 1)


@pytest.mark.parametrize("kind", [MongoDBSessionRepository, AsyncMongoDBSessionRepository])
def test_the_repositories_tell_it_too(
    factory: MongoDBSessionManagerFactory, server: str, database: str, runner: asyncio.Runner, kind: Any
) -> None:
    metered(factory.create_session_manager("s"), ADD, "two")("a")

    async def asynchronously() -> Any:
        async with AsyncMongoDBSessionRepository(server, database) as repository:
            return await repository.get_usage("s")

    if kind is AsyncMongoDBSessionRepository:
        report = runner.run(asynchronously())
    else:
        with MongoDBSessionRepository(server, database) as repository:
            report = repository.get_usage("s")
    assert report == {"agents": {"agent": used(2, 1, 1)}, "total": used(2, 1, 1)}


def test_totals_go_on_in_the_next_manager(session: Session) -> None:
    for number in range(1, 3):
        metered(session.open().manager, ADD, "done")("a")
        session.close()
        session.open()
        assert session.get_usage()["total"] == used(2 * number, number, number)
        session.close()


def test_messages_an_agent_is_built_with_are_not_counted(session: Session) -> None:
    earlier = [
        {"role": "user", "content": [{"text": "hi"}]},
        {"role": "assistant", "content": [{"text": "Hello."}], "metadata": METADATA},
        {"role": "user", "content": [{"text": "more"}]},
        {
            "role": "assistant",
            "content": [{"toolUse": {"toolUseId": "t", "name": "add", "input": {}}}],
            "metadata": METADATA,
        },
        {"role": "user", "content": [{"toolResult": {"toolUseId": "t", "status": "success", "content": []}}]},
        {"role": "assistant", "content": [{"text": "Done."}], "metadata": METADATA},
    ]
    live = metered(session.open().manager, "one", "two", messages=earlier)
    assert session.get_usage()["total"] == NOTHING
    live("a")
    assert session.get_usage()["total"] == used(1, 1)
    live("b")
    assert session.get_usage()["total"] == used(2, 2)


def test_a_failed_invocation_counts_for_what_it_used(session: Session) -> None:
    live = metered(session.open().manager, RuntimeError("no capacity"), ADD, RuntimeError("none"), "done")
    for text in ("a", "b"):
        with pytest.raises((RuntimeError, EventLoopException)):
            live(text)
    assert session.get_usage()["total"] == used(1, 2, 1)
    live("c")
    assert session.get_usage()["total"] == used(2, 3, 1)


def test_synchronising_an_agent_counts_nothing(session: Session) -> None:
    live = metered(session.open().manager, "one")
    live("a")
    for value in range(3):
        live.state.set("value", value)
        session.manager.sync_agent(live)
    session.flush()
    assert session.get_usage()["total"] == used(1, 1)


# What it costs.


@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
def test_counting_costs_no_command(session: Session, commands: CommandLog, save_on: str) -> None:
    writes = 4 if save_on == "message" else 1
    session.open(save_on=save_on)
    live = metered(session.manager, "one", ADD, "two")
    live("a")
    commands.clear()
    live("b")
    session.manager.sync_agent(live)
    session.flush()
    assert commands.names == ["update"] * writes
    session.get_usage()
    assert commands.names == [*["update"] * writes, "find"]


# Many at once.


@pytest.mark.anyio
@SAVE_ON
async def test_many_agents_of_a_session_at_once(factory: MongoDBSessionManagerFactory, save_on: str) -> None:
    manager = await factory.create_session_manager_async("s", save_on=save_on)
    agents = [metered(manager, "one", ADD, "two", agent_id=f"agent{number}") for number in range(6)]

    async def talk(live: Agent) -> None:
        await live.invoke_async("a")
        await live.invoke_async("b")

    await asyncio.gather(*(talk(live) for live in agents))
    report = await manager.get_usage()
    assert report["agents"] == {f"agent{number}": used(3, 2, 1) for number in range(6)}
    assert report["total"] == used(18, 12, 6)


@pytest.mark.anyio
async def test_many_managers_of_a_session_at_once(factory: MongoDBSessionManagerFactory) -> None:
    async def talk(number: int) -> None:
        async with await factory.create_session_manager_async("s") as manager:
            live = metered(manager, "one", ADD, "two", agent_id=f"agent{number}")
            await live.invoke_async("a")
            await live.invoke_async("b")

    await asyncio.gather(*(talk(number) for number in range(6)))
    report = await (await factory.create_session_manager_async("s")).get_usage()
    assert report["agents"] == {f"agent{number}": used(3, 2, 1) for number in range(6)}
    assert report["total"] == used(18, 12, 6)


PROCESS = """
import sys
from mongodb_session_manager import MongoDBSessionManagerFactory
import interpreter
from fix_usage import ADD, metered

uri, database, number = sys.argv[1:]
with MongoDBSessionManagerFactory(uri, database) as factory:
    with factory.create_session_manager("s") as manager:
        live = metered(manager, "one", ADD, "two", agent_id=f"agent{number}")
        live("a")
        live("b")
"""


def test_several_processes_at_once(factory: MongoDBSessionManagerFactory, server: str, database: str) -> None:
    processes = [interpreter.start(PROCESS, server, database, number) for number in range(3)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    report = factory.create_session_manager("s").get_usage()
    assert report["agents"] == {f"agent{number}": used(3, 2, 1) for number in range(3)}
    assert report["total"] == used(9, 6, 3)


LOST = {
    "failCommands": ["update"],
    "errorLabels": ["RetryableWriteError"],
    "writeConcernError": {"code": 6, "errmsg": "the write is done, its acknowledgement is lost"},
}


@SAVE_ON
@pytest.mark.parametrize("server_kind", ["embedded", "standalone"])
def test_a_lost_acknowledgement_counts_once(
    request: pytest.FixtureRequest, database: str, commands: CommandLog, save_on: str, server_kind: str
) -> None:
    """The driver itself retries nothing here, so that every retry is the library's."""
    uri = request.getfixturevalue(server_kind)
    with (
        client_of(uri) as driver,
        MongoDBSessionManagerFactory(
            uri, database, retryWrites=False, appname=database, event_listeners=[commands]
        ) as factory,
    ):
        driver[database]["agent_sessions"].delete_one({"_id": "s"})  # of an earlier test
        manager = factory.create_session_manager("s", save_on=save_on)
        failing = fail_point(uri, appName=database, **LOST)

        def now_failing(reply: Any) -> Callable[[Any], Any]:
            def give(_: Any) -> Any:
                failing.__enter__()  # from here on, the next write
                return reply

            return give

        live = metered(manager, now_failing(ADD), "one", ADD, now_failing("two"))
        live("a")
        failing.__exit__(None, None, None)
        assert manager.get_usage()["total"] == used(2, 1, 1)
        assert "find" in commands.names[:-1]
        failing = fail_point(uri, appName=database, **LOST)
        live("b")
        failing.__exit__(None, None, None)
        assert manager.get_usage()["total"] == used(4, 2, 2)
        document = driver[database]["agent_sessions"].find_one({"_id": "s"})
        assert message_ids(document) == list(range(8))
        assert "event_loop_metrics" in document["agents"]["agent"]["messages"][7]


# Of an invocation.


@SAVE_ON
def test_event_loop_metrics(session: Session, stored: Stored, save_on: str) -> None:
    session.open(save_on=save_on)
    live = metered(session.manager, ADD, "three", "bye")
    live("1 + 2?")
    live("bye")
    session.flush()
    messages = stored_messages(stored)
    assert [sorted(message.get("event_loop_metrics", ())) for message in messages[:3]] == [[], ["message_usage"], []]
    for position, calls in ((3, 2), (5, 3)):
        metrics = messages[position]["event_loop_metrics"]
        assert without_first_byte(metrics.pop("message_usage")) == CALL
        assert sorted(metrics) == ["accumulated_metrics", "accumulated_usage", "cycle_metrics", "tool_usage"]
        assert metrics["accumulated_usage"] == {
            "inputTokens": 10 * calls,
            "outputTokens": 5 * calls,
            "totalTokens": 15 * calls,
            "cacheReadInputTokens": 3 * calls,
            "cacheWriteInputTokens": 2 * calls,
        }
        latency = metrics["accumulated_metrics"]
        assert sorted(latency) == ["latencyMs", "timeToFirstByteMs"]
        assert latency["latencyMs"] == 7 * calls
        assert isinstance(latency["timeToFirstByteMs"], int)
        cycles = metrics["cycle_metrics"]
        assert sorted(cycles) == ["average_cycle_time", "cycle_count", "total_duration"]
        assert cycles["cycle_count"] == calls
        assert cycles["total_duration"] >= cycles["average_cycle_time"] > 0
        usage = metrics["tool_usage"]["add"]
        total_time, average_time = usage.pop("total_time"), usage.pop("average_time")
        assert total_time == average_time > 0
        assert metrics["tool_usage"] == {
            "add": {"call_count": 1, "success_count": 1, "error_count": 0, "success_rate": 1.0}
        }


# A kind of agent without metrics.


@pytest.mark.anyio
@pytest.mark.may_block
@pytest.mark.parametrize("is_async", alternating(False, True), ids=["manager", "async manager"])
@SAVE_ON
async def test_a_bidirectional_agent_has_no_metrics_and_does_not_fail(
    factory: MongoDBSessionManagerFactory, stored: Stored, is_async: bool, save_on: str
) -> None:
    if is_async:
        manager: Any = await factory.create_session_manager_async("s", save_on=save_on)
    else:
        manager = await asyncio.to_thread(factory.create_session_manager, "s", save_on=save_on)
    model = ScriptedBidiModel(said("Hello.", "c1"), call_of("add", "t1", a=1, b=2), said("Three.", "c2"))
    async with BidiAgent(model, tools=[add], agent_id="bidi", session_manager=manager) as live:
        for text in ("hi", "1 + 2?"):
            await live.send(text)
            async for event in live.receive():
                if isinstance(event, BidiResponseStopEvent):
                    break
    if is_async:
        await manager.flush()
    else:
        await asyncio.to_thread(manager.flush)

    document = await asyncio.to_thread(stored.find_one, {"_id": "s"})
    messages = document["agents"]["bidi"]["messages"]
    assert [message["message"]["role"] for message in messages] == [message["role"] for message in live.messages]
    assert len(messages) == 8
    assert texts(messages)[0] == "hi"
    assert texts(messages)[2] == "1 + 2?"
    assert all("event_loop_metrics" not in message for message in messages)
    usage = document["agents"]["bidi"]["usage"]
    assert usage["toolCalls"] >= 1
    assert "inputTokens" not in usage
    report = await manager.get_usage() if is_async else await asyncio.to_thread(manager.get_usage)
    assert report["agents"]["bidi"]["totalTokens"] == 0
    assert report["agents"]["bidi"].keys() == NOTHING.keys()
