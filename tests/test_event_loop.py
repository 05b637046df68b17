"""Strands' agents on a session: nothing waits on a running event loop, and all of an agent comes back."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pymongo
import pytest
from bson.raw_bson import RawBSONDocument
from pymongo import monitoring
from strands import Agent, tool
from strands.agent.conversation_manager import SlidingWindowConversationManager, SummarizingConversationManager
from strands.hooks import BeforeToolCallEvent, MessageAddedEvent
from strands.types.exceptions import ContextWindowOverflowException, EventLoopException
from strands.types.tools import ToolContext

from mongodb_session_manager import AsyncMongoDBSessionManager, MongoDBSessionError, MongoDBSessionManagerFactory
from mongodb_session_manager.demo import Redaction, ScriptedModel
from proxy import Proxy
from support import CommandLog, agent, alternating, eventually, message_ids, texts

Stored = pymongo.collection.Collection[dict[str, Any]]


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


CALL_ADD = {"tool": "add", "input": {"a": 1, "b": 2}}


class Ticks(monitoring.CommandListener):
    """How often an event loop went round while a command was on its way to the server and back.

    Attributes:
        during: Ticks by command, oldest first.
        pushed: Per `update`, and per `findAndModify` that replaces a message, whether it appends messages.
    """

    def __init__(self) -> None:
        self.count = 0
        self.during: list[tuple[str, int]] = []
        self.pushed: list[bool] = []
        self._begun: dict[int, int] = {}

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            self.count += 1

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self._begun[event.request_id] = self.count
        if event.command_name == "update":
            self.pushed.append("$push" in event.command["updates"][0]["u"])
        elif event.command_name == "findAndModify" and isinstance(event.command["update"], list):
            self.pushed.append(False)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self.during.append((event.command_name, self.count - self._begun.pop(event.request_id)))

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


@pytest.fixture(scope="module")
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def connected(proxy: Proxy, shared_database: str) -> Iterator[tuple[MongoDBSessionManagerFactory, Ticks]]:
    """A factory behind the proxy, for the whole module."""
    ticks = Ticks()
    with MongoDBSessionManagerFactory(proxy.uri, shared_database, event_listeners=[ticks]) as factory:
        yield factory, ticks


@pytest.fixture
def ticks(connected: tuple[MongoDBSessionManagerFactory, Ticks]) -> Ticks:
    return connected[1]


@pytest.fixture
def remote(
    connected: tuple[MongoDBSessionManagerFactory, Ticks], proxy: Proxy, database: str
) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory behind the proxy, its client connected and its indexes built."""
    factory, ticks = connected
    factory.create_session_manager("warm-up").close()
    eventually(lambda: not factory._connection._tasks)
    ticks.during.clear()
    ticks.pushed.clear()
    yield factory
    proxy.delay = 0
    proxy.thaw()
    # before the next test empties the database
    eventually(lambda: not factory._connection._tasks and not factory._connection._operations)


class Kind:
    """A manager and the way it is used: `"sync"`, `"async"`, or `"mixed"`, a sync manager of async agents."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def open(self, factory: MongoDBSessionManagerFactory, session_id: str = "s", **options: Any) -> Any:
        if self.name == "async":
            return await factory.create_session_manager_async(session_id, **options)
        return await asyncio.to_thread(factory.create_session_manager, session_id, **options)

    async def ask(self, asked: Agent, prompt: Any) -> Any:
        if self.name == "sync":
            return await asyncio.to_thread(asked, prompt)
        return await asked.invoke_async(prompt)

    async def flush(self, manager: Any) -> None:
        if isinstance(manager, AsyncMongoDBSessionManager):
            await manager.flush()
        else:
            await asyncio.to_thread(manager.flush)


@pytest.fixture(params=alternating("sync", "async", "mixed"))
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


ON_A_LOOP = pytest.mark.parametrize("kind", alternating("async", "mixed"), indirect=True)
SYNC_AND_ASYNC = pytest.mark.parametrize("kind", alternating("sync", "async"), indirect=True)


def stored_agent(stored: Stored, key: str = "agent") -> dict[str, Any]:
    """Return what is stored of an agent after checking that ids are 0..n-1 and that the next one is n."""
    document = stored.find_one({"_id": "s"})
    assert document is not None
    found = document["agents"][key]
    assert message_ids(document, key) == list(range(len(found["messages"])))
    assert found["next_message_id"] == len(found["messages"])
    return found


def conversation(stored: Stored, key: str = "agent") -> list[str]:
    return texts(stored_agent(stored, key)["messages"])


def count(stored: Stored) -> int:
    """Return how many messages of the agent are stored at this moment."""
    document = stored.find_one({"_id": "s"}) or {"agents": {}}
    return len(document["agents"].get("agent", {"messages": []})["messages"])


# The event loop stays free.


@pytest.mark.anyio
@ON_A_LOOP
@pytest.mark.parametrize("streaming", alternating(False, True))
async def test_the_loop_goes_round_while_a_turn_is_written(
    kind: Kind, remote: MongoDBSessionManagerFactory, proxy: Proxy, ticks: Ticks, stored: Stored, streaming: bool
) -> None:
    proxy.delay = 0.05
    heart = asyncio.create_task(ticks.tick())
    manager = await kind.open(remote)
    asked = agent(manager, CALL_ADD, "three", "bye", tools=[add])
    if streaming:
        async for _ in asked.stream_async("1 + 2?"):
            pass
    else:
        await asked.invoke_async("1 + 2?")
    asked.state.set("colour", "green")
    manager.sync_agent(asked)
    await kind.flush(manager)
    heart.cancel()
    assert [name for name, _ in ticks.during] == ["findAndModify"] + ["update"] * 5
    assert min(beats for _, beats in ticks.during) >= 5
    assert len(conversation(stored)) == 4


@pytest.mark.anyio
@ON_A_LOOP
async def test_others_work_while_the_server_does_not_answer(
    kind: Kind, remote: MongoDBSessionManagerFactory, proxy: Proxy, stored: Stored
) -> None:
    manager = await kind.open(remote)
    proxy.freeze()
    waiting = asyncio.create_task(agent(manager, "hello").invoke_async("hi"))
    for _ in range(3):
        await agent(None, CALL_ADD, "three", tools=[add]).invoke_async("1 + 2?")
    assert not waiting.done()
    proxy.thaw()
    await waiting
    assert conversation(stored) == ["hi", "hello"]


@pytest.mark.anyio
@ON_A_LOOP
async def test_a_redaction_is_stored_behind_the_back_of_the_stream(
    kind: Kind, remote: MongoDBSessionManagerFactory, proxy: Proxy, ticks: Ticks, stored: Stored
) -> None:
    def and_the_server_stops_answering(_: object) -> Redaction:
        proxy.freeze()
        ticks.pushed.clear()
        return Redaction("[redacted]", "I cannot.")

    asked = agent(await kind.open(remote), and_the_server_stops_answering)
    answered_while_frozen = False
    async for event in asked.stream_async("the secret"):
        if "redactContent" in event.get("event", {}):  # redact_latest_message has returned
            await asyncio.to_thread(eventually, lambda: ticks.pushed)
        if event.get("message", {}).get("role") == "assistant":
            assert conversation(stored) == ["the secret"]
            answered_while_frozen = True
            proxy.thaw()
    assert answered_while_frozen
    assert conversation(stored) == ["[redacted]", "I cannot."]
    assert ticks.pushed == [False, True]  # first the redaction, then the answer


@pytest.mark.anyio
@ON_A_LOOP
async def test_an_overflow_is_synced_behind_the_back_of_the_turn(
    kind: Kind, remote: MongoDBSessionManagerFactory, proxy: Proxy, stored: Stored
) -> None:
    def overflow(_: object) -> ContextWindowOverflowException:
        proxy.freeze()
        return ContextWindowOverflowException("too long")

    def answer(messages: list[Any]) -> str:  # the model is called again while the server does not answer
        proxy.thaw()
        return f"{len(messages)} messages"

    window = SlidingWindowConversationManager(window_size=10)
    asked = agent(await kind.open(remote), "1", "2", overflow, answer, conversation_manager=window)
    for text in ("one", "two"):
        await asked.invoke_async(text)
    assert str(await asked.invoke_async("three")).strip() == "3 messages"
    assert conversation(stored) == ["one", "1", "two", "2", "three", "3 messages"]
    resumed = agent(await kind.open(remote), conversation_manager=SlidingWindowConversationManager(window_size=10))
    assert texts(resumed.messages) == ["two", "2", "three", "3 messages"]
    assert resumed.conversation_manager.removed_message_count == 2


@pytest.mark.anyio
@ON_A_LOOP
async def test_calls_on_a_running_loop_return_at_once(
    kind: Kind, remote: MongoDBSessionManagerFactory, proxy: Proxy, stored: Stored
) -> None:
    manager = await kind.open(remote)
    asked = agent(manager, "hello")
    await asked.invoke_async("hi")
    proxy.freeze()
    asked.state.set("colour", "green")
    manager.sync_agent(asked)
    manager.append_message({"role": "user", "content": [{"text": "by hand"}]}, asked)
    manager.redact_latest_message({"role": "user", "content": [{"text": "[redacted]"}]}, asked)
    assert conversation(stored) == ["hi", "hello"]
    proxy.thaw()
    await kind.flush(manager)
    assert conversation(stored) == ["hi", "hello", "[redacted]"]
    assert stored_agent(stored)["agent_data"]["state"] == {"colour": "green"}


@pytest.mark.anyio
@ON_A_LOOP
async def test_what_failed_behind_the_back_is_raised_by_the_next_flush(
    kind: Kind, proxy: Proxy, database: str, stored: Stored
) -> None:
    factory = MongoDBSessionManagerFactory(proxy.uri, database, serverSelectionTimeoutMS=200)
    async with factory:
        manager = await kind.open(factory)
        asked = agent(manager, "hello")
        await asked.invoke_async("hi")
        proxy.refuse()
        manager.redact_latest_message({"role": "assistant", "content": [{"text": "[redacted]"}]}, asked)
        with pytest.raises(MongoDBSessionError):
            await kind.flush(manager)
        proxy.accept()
        await kind.flush(manager)
    assert conversation(stored) == ["hi", "[redacted]"]


# From anywhere.


@pytest.mark.parametrize("asynchronous", alternating(False, True))
def test_one_manager_serves_threads_and_loops(
    factory: MongoDBSessionManagerFactory, stored: Stored, asynchronous: bool
) -> None:
    if asynchronous:
        manager: Any = asyncio.run(factory.create_session_manager_async("s"))
    else:
        manager = factory.create_session_manager("s")
    lead = agent(manager, "1", "2", "3", "4", agent_id="lead")
    lead("one")
    lead("two")
    asyncio.run(lead.invoke_async("three"))

    def in_a_thread(number: int) -> None:
        worker = agent(manager, CALL_ADD, "three", "bye", agent_id=f"worker-{number}", tools=[add])
        worker("1 + 2?")
        asyncio.run(worker.invoke_async("thanks"))

    async def on_a_loop(name: str) -> None:
        members = [agent(manager, CALL_ADD, "three", agent_id=f"{name}-{n}", tools=[add]) for n in range(2)]
        await asyncio.gather(*(member.invoke_async("1 + 2?") for member in members))

    with ThreadPoolExecutor(12) as threads:
        work = [threads.submit(in_a_thread, number) for number in range(5)]
        work += [threads.submit(lambda name=name: asyncio.run(on_a_loop(name))) for name in ("left", "right")]
        for done in work:
            done.result()
    lead("four")
    assert conversation(stored, "lead") == ["one", "1", "two", "2", "three", "3", "four", "4"]
    for number in range(5):
        assert conversation(stored, f"worker-{number}") == ["1 + 2?", "", "", "three", "thanks", "bye"]
    for name in ("left", "right"):
        for number in range(2):
            assert conversation(stored, f"{name}-{number}") == ["1 + 2?", "", "", "three"]


def test_flushing_while_other_threads_create_agents(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    manager = factory.create_session_manager("s")
    created = threading.Event()

    def flush() -> None:
        while not created.is_set():
            manager.flush()

    def create(worker: int) -> None:
        for number in range(40):
            agent(manager, agent_id=f"agent-{worker}-{number}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(12) as threads:
            flushing = [threads.submit(flush) for _ in range(10)]
            try:
                list(threads.map(create, range(2)))
            finally:
                created.set()
            for done in flushing:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    manager.flush()
    assert len(stored.find_one({"_id": "s"})["agents"]) == 80


# What becomes of messages.


@pytest.mark.anyio
@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
async def test_a_tool_that_the_application_calls_is_stored_when_the_call_returns(
    kind: Kind,
    factory: MongoDBSessionManagerFactory,
    stored: Stored,
    commands: CommandLog,
    save_on: str,
) -> None:
    """It belongs to no invocation, so nothing tells its end."""
    asked = agent(await kind.open(factory, save_on=save_on), "hello", "fine", tools=[add])
    for count in (1, 2):
        commands.clear()
        await asyncio.to_thread(asked.tool.add, a=1, b=2)
        assert commands.names == ["update"] * (4 if save_on == "message" else 1)
        assert len(conversation(stored)) == 6 * count - 2
        assert conversation(stored)[-1] == "agent.tool.add was called."
        await kind.ask(asked, "hi")
    resumed = agent(await kind.open(factory))
    assert resumed.messages == asked.messages


@pytest.mark.anyio
@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
async def test_a_merged_continuation_replaces(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str
) -> None:
    manager = await kind.open(factory, save_on=save_on)
    asked = agent(manager, "hello", "fine")
    await kind.ask(asked, "hi")

    async def add_message(text: str) -> None:
        longer = {**asked.messages[-1], "content": [*asked.messages[-1]["content"], {"text": text}]}
        asked.messages[-1] = longer
        await asked.hooks.invoke_callbacks_async(MessageAddedEvent(agent=asked, message=longer))

    await add_message(" and")
    await add_message(" welcome")
    await kind.flush(manager)
    assert conversation(stored) == ["hi", "hello and welcome"]
    await kind.ask(asked, "how are you?")
    assert conversation(stored) == ["hi", "hello and welcome", "how are you?", "fine"]
    resumed = agent(await kind.open(factory))
    assert resumed.messages == asked.messages


@pytest.mark.anyio
async def test_a_merged_message_that_was_restored_is_replaced(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    await kind.ask(agent(await kind.open(factory), "hello"), "hi")
    manager = await kind.open(factory)
    resumed = agent(manager, "fine")
    longer = {**resumed.messages[-1], "content": [*resumed.messages[-1]["content"], {"text": " again"}]}
    resumed.messages[-1] = longer
    await resumed.hooks.invoke_callbacks_async(MessageAddedEvent(agent=resumed, message=longer))
    await kind.flush(manager)
    assert conversation(stored) == ["hi", "hello again"]
    await kind.ask(resumed, "how are you?")
    assert conversation(stored) == ["hi", "hello again", "how are you?", "fine"]


def raw_bytes(stored: Stored) -> bytes:
    """Return everything in the test's database, as it is stored."""
    database = stored.database
    options = stored.codec_options.with_options(document_class=RawBSONDocument)
    return b"".join(
        document.raw
        for name in database.list_collection_names()
        for document in database.get_collection(name, codec_options=options).find()
    )


@pytest.mark.anyio
@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
async def test_a_redacted_question_is_nowhere(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str
) -> None:
    manager = await kind.open(factory, save_on=save_on)
    stages: list[bool] = []

    def guard(_: object) -> Redaction:
        stages.append(b"Xanadu" in raw_bytes(stored))
        return Redaction("[redacted]")

    asked = agent(manager, "hello", guard, "fine")
    await kind.ask(asked, "hi")
    await kind.ask(asked, "the way to Xanadu")
    await kind.ask(asked, "how are you?")
    assert stages == [save_on == "message"]
    assert b"Xanadu" not in raw_bytes(stored)
    assert conversation(stored) == [
        "hi", "hello", "[redacted]", "I cannot help with that.", "how are you?", "fine",
    ]  # fmt: skip
    resumed = agent(await kind.open(factory))
    assert texts(resumed.messages) == conversation(stored)


@pytest.mark.anyio
async def test_a_redacted_tool_result_is_nowhere(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    @tool
    def look_up() -> str:
        """Look something up."""
        return "the way to Xanadu"

    asked = agent(await kind.open(factory), {"tool": "look_up", "input": {}}, Redaction("[redacted]"), tools=[look_up])
    await kind.ask(asked, "where?")
    assert b"Xanadu" not in raw_bytes(stored)
    (result,) = stored_agent(stored)["messages"][2]["message"]["content"]
    assert result["toolResult"]["content"] == [{"text": "[redacted]"}]
    assert result["toolResult"]["status"] == "success"
    assert agent(await kind.open(factory)).messages == asked.messages


@pytest.mark.anyio
@SYNC_AND_ASYNC
async def test_what_was_restored_can_be_redacted(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    await kind.ask(agent(await kind.open(factory), "to Xanadu"), "hi")
    manager = await kind.open(factory)
    resumed = agent(manager)
    manager.redact_latest_message({"role": "assistant", "content": [{"text": "[redacted]"}]}, resumed)
    await kind.flush(manager)
    assert b"Xanadu" not in raw_bytes(stored)
    assert texts(agent(await kind.open(factory)).messages) == ["hi", "[redacted]"]


# When messages are stored.


@pytest.mark.anyio
async def test_each_message_is_stored_before_the_agent_goes_on(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    seen: list[tuple[str, int]] = []

    @tool
    def look() -> str:
        """Look."""
        seen.append(("tool", count(stored)))
        return "nothing"

    def call(_: object) -> dict[str, Any]:
        seen.append(("model", count(stored)))
        return {"tool": "look", "input": {}}

    def answer(_: object) -> str:
        seen.append(("model", count(stored)))
        return "nothing to see"

    asked = agent(await kind.open(factory), call, answer, tools=[look])
    await kind.ask(asked, "look!")
    assert seen == [("model", 1), ("tool", 2), ("model", 3)]
    assert count(stored) == 4


@pytest.mark.anyio
async def test_save_on_invocation_stores_all_at_the_end(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    seen: list[int] = []

    def answer(_: object) -> str:
        seen.append(count(stored))
        return "three"

    asked = agent(await kind.open(factory, save_on="invocation"), CALL_ADD, answer, answer, tools=[add])
    await kind.ask(asked, "1 + 2?")
    await kind.ask(asked, "really?")
    assert seen == [0, 4]
    assert conversation(stored) == ["1 + 2?", "", "", "three", "really?", "three"]


@pytest.mark.anyio
async def test_save_on_invocation_stores_a_turn_that_failed(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    broken = ArithmeticError("the model is broken")
    asked = agent(await kind.open(factory, save_on="invocation"), CALL_ADD, broken, "fine", tools=[add])
    with pytest.raises(EventLoopException, match="broken"):
        await kind.ask(asked, "1 + 2?")
    assert conversation(stored) == ["1 + 2?", "", ""]
    await kind.ask(asked, "again")
    assert conversation(stored) == ["1 + 2?", "", "", "again", "fine"]


# All of an agent comes back.


@pytest.mark.anyio
async def test_state_comes_back(kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    @tool(context=True)
    def remember(colour: str, tool_context: ToolContext) -> str:
        """Remember a colour."""
        tool_context.agent.state.set("colour", colour)
        return "ok"

    manager = await kind.open(factory)
    first = agent(manager, {"tool": "remember", "input": {"colour": "green"}}, "done", tools=[remember])
    first.state.set("nested", {"a.b": [1, None, {"$c": True}]})
    await kind.ask(first, "remember green")
    other = agent(manager, agent_id="other", state={"colour": "red"})
    manager.sync_agent(other)
    await kind.flush(manager)
    resumed = await kind.open(factory)
    assert agent(resumed).state.get() == {"nested": {"a.b": [1, None, {"$c": True}]}, "colour": "green"}
    assert agent(resumed, agent_id="other").state.get() == {"colour": "red"}
    again = agent(await kind.open(factory), "done")
    again.state.delete("nested")
    await kind.ask(again, "forget it")
    assert agent(await kind.open(factory)).state.get() == {"colour": "green"}


@pytest.mark.anyio
@pytest.mark.parametrize("size", [4, 0])
async def test_a_sliding_window_over_turns_and_resumes(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored, size: int
) -> None:
    expected: list[str] = []
    remembered: list[Any] = []
    for resume in range(2):
        window = SlidingWindowConversationManager(window_size=size)
        resumed = agent(await kind.open(factory), conversation_manager=window)
        assert resumed.messages == remembered
        for turn in range(2):
            resumed.model.replies.append(f"answer {resume}.{turn}")
            await kind.ask(resumed, f"question {resume}.{turn}")
            expected += [f"question {resume}.{turn}", f"answer {resume}.{turn}"]
            assert texts(resumed.messages) == (expected[-size:] if size else [])
            assert conversation(stored) == expected
            assert window.removed_message_count == len(expected) - len(resumed.messages)
        remembered = list(resumed.messages)


@pytest.mark.anyio
async def test_a_summary_comes_back(kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    def manager_of_the_conversation() -> SummarizingConversationManager:
        return SummarizingConversationManager(summary_ratio=0.5, preserve_recent_messages=2)

    too_long = ContextWindowOverflowException("too long")
    asked = agent(
        await kind.open(factory), "1", "2", too_long, "the summary", "3",
        conversation_manager=manager_of_the_conversation(),
    )  # fmt: skip
    for text in ("one", "two", "three"):
        await kind.ask(asked, text)
    assert texts(asked.messages) == ["the summary", "two", "2", "three", "3"]
    assert conversation(stored) == ["one", "1", "two", "2", "three", "3"]
    resumed = agent(await kind.open(factory), "4", conversation_manager=manager_of_the_conversation())
    assert resumed.messages == asked.messages
    await kind.ask(resumed, "four")
    assert conversation(stored) == ["one", "1", "two", "2", "three", "3", "four", "4"]


@pytest.mark.anyio
async def test_an_interrupt_is_answered_in_another_manager(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    answers: list[Any] = []

    def approve(event: BeforeToolCallEvent) -> None:
        answers.append(event.interrupt("approval", reason={"why": "to be sure"}))

    asking = agent(await kind.open(factory), CALL_ADD, tools=[add], hooks=[approve])
    result = await kind.ask(asking, "1 + 2?")
    assert result.stop_reason == "interrupt"
    (interrupt,) = result.interrupts
    assert interrupt.reason == {"why": "to be sure"}

    resumed = agent(await kind.open(factory), "three", tools=[add], hooks=[approve])
    response = {"interruptResponse": {"interruptId": interrupt.id, "response": "yes"}}
    result = await kind.ask(resumed, [response])
    assert result.stop_reason == "end_turn"
    assert answers == ["yes"]
    assert conversation(stored) == ["1 + 2?", "", "", "three"]
    assert stored_agent(stored)["messages"][2]["message"]["content"][0]["toolResult"]["content"] == [{"text": "3"}]

    later = agent(await kind.open(factory), "bye", tools=[add], hooks=[approve])
    assert (await kind.ask(later, "thanks")).stop_reason == "end_turn"


@pytest.mark.anyio
async def test_model_and_system_prompt_are_those_of_the_last_run(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    def configuration() -> tuple[Any, Any]:
        data = stored_agent(stored)["agent_data"]
        return data["model"], data["system_prompt"]

    def running(manager: Any, model_id: str, prompt: Any) -> Agent:
        model = ScriptedModel(model_id=model_id)
        return Agent(
            model=model, agent_id="agent", session_manager=manager, callback_handler=None, system_prompt=prompt
        )

    await kind.ask(running(await kind.open(factory), "small", "Be kind."), "hi")
    assert configuration() == ("small", "Be kind.")
    resumed = running(await kind.open(factory), "large", [{"text": "Be brief."}])
    await kind.ask(resumed, "hi")
    assert configuration() == ("large", "Be brief.")
    resumed.system_prompt = "Be quick."
    resumed.model.update_config(model_id="huge")
    await kind.ask(resumed, "hi")
    assert configuration() == ("huge", "Be quick.")
    await kind.ask(running(await kind.open(factory), "huge", None), "hi")
    assert configuration() == ("huge", None)


def with_metrics(messages: list[dict[str, Any]]) -> list[int]:
    """Return the positions of the messages that hold the metrics of an invocation."""
    return [n for n, message in enumerate(messages) if "cycle_metrics" in message.get("event_loop_metrics", {})]


@pytest.mark.anyio
@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
async def test_metrics_are_on_the_last_message_of_each_invocation(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str
) -> None:
    asked = agent(await kind.open(factory, save_on=save_on), "well hello", CALL_ADD, "three", tools=[add])
    await kind.ask(asked, "hi")
    await kind.ask(asked, "1 + 2?")
    messages = stored_agent(stored)["messages"]
    assert with_metrics(messages) == [1, 5]
    first, second = messages[1]["event_loop_metrics"], messages[5]["event_loop_metrics"]

    assert first.pop("message_usage")["totalTokens"] == 3
    total = first["cycle_metrics"].pop("total_duration")
    assert total > 0
    assert first["accumulated_metrics"].pop("timeToFirstByteMs") >= 0
    assert first == {
        "accumulated_usage": {
            "inputTokens": 1, "outputTokens": 2, "totalTokens": 3, "cacheReadInputTokens": 0,
            "cacheWriteInputTokens": 0,
        },
        "accumulated_metrics": {"latencyMs": 30},
        "cycle_metrics": {"cycle_count": 1, "average_cycle_time": total},
        "tool_usage": {},
    }  # fmt: skip

    assert set(second["accumulated_usage"]) == set(first["accumulated_usage"])
    assert second["cycle_metrics"]["cycle_count"] == 3
    usage = second["tool_usage"]["add"]
    assert usage.pop("average_time") == usage.pop("total_time") > 0
    assert second["tool_usage"] == {"add": {"call_count": 1, "success_count": 1, "error_count": 0, "success_rate": 1.0}}


@pytest.mark.anyio
async def test_metrics_of_a_turn_that_failed_are_on_its_last_message(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    asked = agent(await kind.open(factory), CALL_ADD, ArithmeticError("broken"), "fine", tools=[add])
    with pytest.raises(EventLoopException, match="broken"):
        await kind.ask(asked, "1 + 2?")
    await kind.ask(asked, "again")
    messages = stored_agent(stored)["messages"]
    assert with_metrics(messages) == [2, 4]


@pytest.mark.anyio
async def test_several_agents_come_back_each_with_its_own(
    kind: Kind, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = await kind.open(factory)
    names = ["planner", "writer.v1", "50% $critic"]
    for name in names:
        one = agent(manager, f"I am {name}", agent_id=name, system_prompt=name)
        one.state.set("name", name)
        await kind.ask(one, "who are you?")
    resumed = await kind.open(factory)
    for name in names:
        one = agent(resumed, agent_id=name)
        assert texts(one.messages) == ["who are you?", f"I am {name}"]
        assert one.state.get() == {"name": name}
    assert list(stored.find_one({"_id": "s"})["agents"]) == ["planner", "writer%2Ev1", "50%25 %24critic"]
