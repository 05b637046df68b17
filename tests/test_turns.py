"""What was shown in a turn is stored, whatever else happens in the turn; what is sent twice is stored twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

import pymongo
import pytest
from strands import Agent, tool
from strands.agent.conversation_manager import (
    NullConversationManager,
    SlidingWindowConversationManager,
)
from strands.hooks import (
    AfterInvocationEvent,
    AfterModelCallEvent,
    AfterMultiAgentInvocationEvent,
    AfterNodeCallEvent,
    BeforeInvocationEvent,
    BeforeModelCallEvent,
    HookOrder,
    MessageAddedEvent,
)
from strands.middleware._agent_stream import AgentStreamStage
from strands.multiagent import GraphBuilder

from mongodb_session_manager import (
    AgentNotFoundError,
    DatabaseError,
    EncodingError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    SessionConflictError,
)
from mongodb_session_manager.demo import ScriptedModel
from support import CommandLog, agent, alternating, eventually, fail_point, texts

pytestmark = pytest.mark.anyio

Stored = pymongo.collection.Collection[dict[str, Any]]

SAVE_ON = pytest.mark.parametrize("save_on", alternating("message", "invocation"))


def question(text: str, tracking_id: str | None = None) -> list[Any]:
    """What a front end passes to an agent: a list of messages."""
    message: dict[str, Any] = {"role": "user", "content": [{"text": text}]}
    return [message if tracking_id is None else {**message, "tracking_id": tracking_id}]


def stored_texts(stored: Stored, session_id: str = "s") -> list[str]:
    document = stored.find_one({"_id": session_id}) or {"agents": {}}
    return [text for each in document["agents"].values() for text in texts(each["messages"])]


def restored(factory: MongoDBSessionManagerFactory, **options: Any) -> Agent:
    return agent(factory.create_session_manager("s"), **options)


def converse(factory: MongoDBSessionManagerFactory, conversation: str, window_size: int = 40, **options: Any) -> None:
    """Store a conversation of messages of one character, of which the conversation manager removes the first ones."""
    window = SlidingWindowConversationManager(window_size=window_size)
    with factory.create_session_manager("s", **options) as manager:
        live = agent(manager, conversation_manager=window)
        for text in conversation:
            message: Any = {"role": "user" if text.isalpha() else "assistant", "content": [{"text": text}]}
            live.messages.append(message)
            manager.append_message(message, live)
        window.apply_management(live)
        manager.sync_agent(live)
    assert window.removed_message_count == max(0, len(conversation) - window_size)


# A message that is passed again.


@SAVE_ON
def test_the_same_list_of_messages_in_two_turns(
    factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str
) -> None:
    prompt = question("again")
    with factory.create_session_manager("s", save_on=save_on) as manager:
        live = agent(manager, "one", "two")
        live(prompt)
        live(prompt)
    assert stored_texts(stored) == ["again", "one", "again", "two"]
    assert restored(factory).messages == live.messages


def test_a_front_end_that_keeps_its_ids(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    with factory.create_session_manager("s") as manager:
        live = agent(manager, "one", "two", "three")
        live(question("a", "id-1"))
        live(question("b", "id-1"))
        live(question("c and more", "id-1"))
    assert stored_texts(stored) == ["a", "one", "b", "two", "c and more", "three"]


def test_a_front_end_that_keeps_its_ids_across_restarts(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    for number in range(3):
        with factory.create_session_manager("s") as manager:
            agent(manager, f"answer {number}")(question(f"question {number}", "id-1"))
    assert stored_texts(stored) == [f"{kind} {number}" for number in range(3) for kind in ("question", "answer")]


@pytest.mark.parametrize("restart", alternating(False, True))
def test_a_retry_with_the_same_list_after_the_model_failed(
    factory: MongoDBSessionManagerFactory, stored: Stored, restart: bool
) -> None:
    prompt = question("again")
    manager = factory.create_session_manager("s")
    live = agent(manager, OSError("the model is away"), "one")
    with pytest.raises(Exception, match="the model is away"):
        live(prompt)
    if restart:
        manager.close()
        manager = factory.create_session_manager("s")
        live = agent(manager, "one")
    live(prompt)
    manager.close()
    assert stored_texts(stored) == texts(live.messages) == ["again", "again", "one"]


@pytest.mark.parametrize("restart", alternating(False, True))
@pytest.mark.parametrize("change", alternating("the same message", "another message"))
def test_a_retry_with_a_longer_message_of_the_same_id_is_a_message_of_its_own(
    factory: MongoDBSessionManagerFactory, stored: Stored, change: str, restart: bool
) -> None:
    prompt = question("why", "id-1")
    manager = factory.create_session_manager("s")
    live = agent(manager, OSError("the model is away"), "one")
    with pytest.raises(Exception, match="the model is away"):
        live(prompt)
    if restart:
        manager.close()
        manager = factory.create_session_manager("s")
        live = agent(manager, "one")
    if change == "another message":
        prompt = question("why", "id-1")
    prompt[0]["content"].append({"text": " though"})
    live(prompt)
    manager.close()
    assert stored_texts(stored) == ["why", "why though", "one"]


async def test_a_constant_that_a_hook_resumes_with(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    nudge = question("go on")
    turns = iter(range(3))

    def resume(event: AfterInvocationEvent) -> None:
        if next(turns) < 2:
            event.resume = nudge

    async with await factory.create_session_manager_async("s") as manager:
        live = agent(manager, "one", "two", "three")
        live.hooks.add_callback(AfterInvocationEvent, resume)
        await live.invoke_async("start")
    assert stored_texts(stored) == ["start", "one", "go on", "two", "go on", "three"]


def test_turns_with_the_same_list_behind_a_window(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    prompt = question("again")
    with factory.create_session_manager("s") as manager:
        live = agent(manager, *"1234", conversation_manager=SlidingWindowConversationManager(window_size=4))
        for _ in range(4):
            live(prompt)
    assert stored_texts(stored) == ["again", "1", "again", "2", "again", "3", "again", "4"]
    resumed = restored(factory, conversation_manager=SlidingWindowConversationManager(window_size=4))
    assert resumed.messages == live.messages
    assert len(resumed.messages) == 4


def test_two_workers_that_get_the_same_message_do_not_take_it_for_one(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    first, second = factory.create_session_manager("s"), factory.create_session_manager("s")
    one, two = agent(first, "one"), agent(second, "two")
    one.messages.clear()
    first.append_message(question("from one", "id-1")[0], one)
    with pytest.raises(SessionConflictError):
        two(question("from two", "id-1"))
    assert stored_texts(stored) == ["from one"]


async def test_an_input_that_is_merged_into_the_last_message_replaces_it(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    """As Strands does it, when the last message has the same role as the input that follows."""
    async with await factory.create_session_manager_async("s") as manager:
        live = agent(manager)
        await live._append_messages(*question("a"))
        last = live.messages[-1]
        live.messages[-1] = {**last, "content": [*last["content"], {"text": "b"}]}
        await live.hooks.invoke_callbacks_async(MessageAddedEvent(agent=live, message=live.messages[-1]))
    assert stored_texts(stored) == ["ab"]


# A count that does not fit.


def broken(stored: Stored, **fields: Any) -> None:
    stored.update_one({"_id": "s"}, {"$set": {f"agents.agent.{path}": value for path, value in fields.items()}})


@pytest.mark.parametrize("removed", alternating(3, 2**31 - 1))
def test_more_messages_removed_than_stored(
    factory: MongoDBSessionManagerFactory, stored: Stored, caplog: pytest.LogCaptureFixture, removed: int
) -> None:
    window = SlidingWindowConversationManager
    with factory.create_session_manager("s") as manager:
        live = agent(manager, "one", conversation_manager=window(window_size=4))
        live("a")
    stored.update_one(
        {"_id": "s"}, {"$set": {"agents.agent.agent_data.conversation_manager_state.removed_message_count": removed}}
    )
    with factory.create_session_manager("s") as manager, caplog.at_level(logging.WARNING):
        resumed = agent(manager, "two", "three", conversation_manager=window(window_size=4))
        assert texts(resumed.messages) == ["a", "one"]
        assert "removed more messages than are stored" in caplog.text
        resumed("b")
        resumed("c")
    caplog.clear()
    assert restored(factory, conversation_manager=window(window_size=4)).messages == resumed.messages
    assert caplog.text == ""


def test_more_messages_removed_than_archived_and_stored(
    factory: MongoDBSessionManagerFactory, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    converse(factory, "a1b2c3d4e5", max_embedded_messages=2)
    eventually(lambda: len(stored.find_one({"_id": "s"})["agents"]["agent"]["messages"]) < 4)
    stored.update_one(
        {"_id": "s"}, {"$set": {"agents.agent.agent_data.conversation_manager_state.removed_message_count": 11}}
    )
    with factory.create_session_manager("s") as manager, caplog.at_level(logging.WARNING):
        resumed = agent(manager, conversation_manager=SlidingWindowConversationManager(window_size=40))
    assert texts(resumed.messages) == list("a1b2c3d4e5")
    assert "removed more messages than are stored" in caplog.text


def test_fewer_messages_archived_than_counted(
    factory: MongoDBSessionManagerFactory,
    driver: pymongo.MongoClient[dict[str, Any]],
    database: str,
    stored: Stored,
    caplog: pytest.LogCaptureFixture,
) -> None:
    converse(factory, "a1b2c3d4e5", max_embedded_messages=2)
    archive = driver[database]["agent_sessions_archive"]
    eventually(lambda: archive.count_documents({}) > 2)
    lost = archive.find({}, sort=[("_id", 1)])[1]
    archive.delete_one({"_id": lost["_id"]})
    gone = texts(lost["messages"])
    left = [text for text in "a1b2c3d4e5" if text not in gone]
    with factory.create_session_manager("s") as manager, caplog.at_level(logging.WARNING):
        resumed = agent(manager, "6")
        assert texts(resumed.messages) == left
        assert f"missing=<{len(gone)}>" in caplog.text
        resumed("f")
    assert texts(restored(factory).messages) == [*left, "f", "6"]


class Forgetful(NullConversationManager):
    """A conversation manager that does not restore what it has removed."""

    def restore_from_session(self, state: dict[str, Any]) -> list[Any] | None:
        return None


@pytest.mark.parametrize("archived", alternating(False, True))
@pytest.mark.parametrize("count", alternating(0, 1, 4, 5))
def test_a_conversation_manager_gets_the_messages_it_asks_for(
    factory: MongoDBSessionManagerFactory, archived: bool, count: int
) -> None:
    converse(factory, "a1b2c3", 2, **({"max_embedded_messages": 2} if archived else {}))
    asking = Forgetful()
    asking.removed_message_count = count
    with factory.create_session_manager("s") as manager:
        resumed = agent(manager, "6", conversation_manager=asking)
        assert texts(resumed.messages) == list("a1b2c3")[count:]
        resumed("f")
    assert texts(manager_messages(factory)) == list("a1b2c3f6")


def manager_messages(factory: MongoDBSessionManagerFactory) -> list[Any]:
    with factory.create_session_manager("s") as manager:
        return [message.to_message() for message in manager.list_messages("agent")]


@pytest.mark.may_block
async def test_an_agent_built_on_an_event_loop_gets_the_messages_it_asks_for(
    factory: MongoDBSessionManagerFactory,
) -> None:
    await asyncio.to_thread(converse, factory, "a1b2c3", 2)
    async with await factory.create_session_manager_async("s") as manager:
        resumed = agent(manager, conversation_manager=Forgetful())
        assert texts(resumed.messages) == list("a1b2c3")


@pytest.mark.may_block  # PyMongo's client, when it connects
async def test_on_the_loop_of_a_borrowed_client_the_agent_is_to_be_built_in_a_thread(
    factory: MongoDBSessionManagerFactory, server: str, database: str
) -> None:
    await asyncio.to_thread(converse, factory, "a1b2c3", 2)
    async with (
        pymongo.AsyncMongoClient(server) as client,
        MongoDBSessionManagerFactory(client=client, database_name=database) as borrowing,
    ):
        manager = await borrowing.create_session_manager_async("s")
        with pytest.raises(MongoDBSessionError, match="to_thread"):
            agent(manager, conversation_manager=Forgetful())
        other = await borrowing.create_session_manager_async("s")
        resumed = await asyncio.to_thread(agent, other, conversation_manager=Forgetful())
        assert texts(resumed.messages) == list("a1b2c3")


# Other callbacks.


@SAVE_ON
@pytest.mark.parametrize("order", [HookOrder.SDK_FIRST, HookOrder.DEFAULT])
async def test_the_answer_is_stored_before_any_other_callback_runs(
    factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str, order: int
) -> None:
    seen: list[list[str]] = []
    async with await factory.create_session_manager_async("s", save_on=save_on) as manager:
        live = agent(manager, "answer")
        live.hooks.add_callback(AfterInvocationEvent, lambda _: seen.append(stored_texts(stored)), order=order)
        await live.invoke_async("question")
    assert seen == [["question", "answer"]]


@SAVE_ON
def test_a_callback_that_raises_loses_nothing(
    factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str
) -> None:
    def fail(event: AfterInvocationEvent) -> None:
        raise LookupError("no such customer")

    manager = factory.create_session_manager("s", save_on=save_on)
    live = agent(manager, "answer")
    live.hooks.add_callback(AfterInvocationEvent, fail)
    with pytest.raises(LookupError):
        live("question")
    assert stored_texts(stored) == ["question", "answer"]
    last = stored.find_one({"_id": "s"})["agents"]["agent"]["messages"][-1]
    assert last["event_loop_metrics"]["cycle_metrics"]["cycle_count"] == 1
    assert manager.get_usage()["total"]["invocations"] == 1


async def test_a_user_who_answers_while_a_callback_is_slow_goes_on_from_the_answer(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    slow, shown = asyncio.Event(), asyncio.Event()

    async def remember(event: AfterInvocationEvent) -> None:
        shown.set()
        await slow.wait()

    async with await factory.create_session_manager_async("s") as first:
        one = agent(first, "one")
        one.hooks.add_callback(AfterInvocationEvent, remember)
        turn = asyncio.create_task(one.invoke_async("a"))
        await shown.wait()
        async with await factory.create_session_manager_async("s") as second:
            await agent(second, "two").invoke_async("b")
        slow.set()
        await turn
    assert stored_texts(stored) == ["a", "one", "b", "two"]


def test_state_that_another_callback_sets_is_stored(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    def remember(event: AfterInvocationEvent) -> None:
        event.agent.state.set("topic", "boats")

    with factory.create_session_manager("s") as manager:
        live = agent(manager, "one")
        live.hooks.add_callback(AfterInvocationEvent, remember)
        live("a")
        assert commands.names == ["findAndModify", "update", "update", "update"]
    assert restored(factory).state.get("topic") == "boats"


def test_a_turn_that_is_not_stored_raises_after_the_other_callbacks(
    factory: MongoDBSessionManagerFactory, server: str
) -> None:
    ran: list[str] = []
    with factory.create_session_manager("s") as manager:
        live = agent(manager, "one")
        live.hooks.add_callback(AfterInvocationEvent, lambda _: ran.append("released"))
        point = fail_point(server, failCommands=["update"], errorCode=2, times=2)

        def begin(event: MessageAddedEvent) -> None:
            if event.message["role"] == "assistant":
                point.__enter__()

        live.hooks.add_callback(MessageAddedEvent, begin)
        with pytest.raises(DatabaseError):
            live("a")
        point.__exit__(None, None, None)
        assert ran == ["released"]
    assert texts(restored(factory).messages) == ["a", "one"]


@SAVE_ON
@pytest.mark.parametrize("where", ["message", "middleware", "client"])
async def test_something_slow_before_the_end_of_the_invocation_does_not_hold_up_the_answer(
    factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str, where: str
) -> None:
    shown, slow = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        shown.set()
        await slow.wait()

    async def on_message(event: MessageAddedEvent) -> None:
        if event.message["role"] == "assistant":
            await wait()

    async def middleware(context: Any, next_fn: Any) -> AsyncGenerator[Any, None]:
        async for event in next_fn(context):
            yield event
        await wait()

    async def turn() -> None:
        async for event in live.stream_async("a"):
            if where == "client" and "message" in event and event["message"]["role"] == "assistant":
                await wait()

    async with await factory.create_session_manager_async("s", save_on=save_on) as manager:
        live = agent(manager, "one")
        live.hooks.add_callback(BeforeModelCallEvent, lambda event: event.agent.state.set("topic", "boats"))
        if where == "message":
            live.hooks.add_callback(MessageAddedEvent, on_message)
        elif where == "middleware":
            live.add_middleware(AgentStreamStage, middleware)
        running = asyncio.create_task(turn())
        await shown.wait()
        await asyncio.to_thread(eventually, lambda: stored_texts(stored) == ["a", "one"])
        assert stored.find_one({"_id": "s"})["agents"]["agent"]["agent_data"]["state"] == {"topic": "boats"}
        slow.set()
        await running
    last = stored.find_one({"_id": "s"})["agents"]["agent"]["messages"][-1]
    assert last["event_loop_metrics"]["cycle_metrics"]["cycle_count"] == 1


async def test_a_later_turn_is_not_sent_before_its_end(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, stored: Stored
) -> None:
    async def wait(_: object) -> None:
        await asyncio.sleep(0.3)

    async with await factory.create_session_manager_async("s", save_on="invocation") as manager:
        live = agent(manager, "one", "two")
        await live.invoke_async("a")
        live.hooks.add_callback(BeforeModelCallEvent, wait)
        live.hooks.add_callback(BeforeModelCallEvent, lambda _: seen.append(stored_texts(stored)))
        seen: list[list[str]] = []
        await live.invoke_async("b")
        assert seen == [["a", "one"]]
        assert commands.names == ["findAndModify", "update", "update"]


class Failing(SlidingWindowConversationManager):
    """A conversation manager that fails at the end of a turn, so that no event tells of the end."""

    def apply_management(self, agent: Agent, **kwargs: Any) -> None:
        raise LookupError("cannot manage")


async def test_a_conversation_manager_that_raises_at_the_end_loses_nothing(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = await factory.create_session_manager_async("s")
    live = agent(manager, "one", conversation_manager=Failing())
    with pytest.raises(LookupError):
        await live.invoke_async("a")
    await asyncio.to_thread(eventually, lambda: stored_texts(stored) == ["a", "one"])
    await manager.close()


# Before the invocation.


@tool
def ping() -> str:
    """Answer."""
    return "pong"


def refuse(event: BeforeInvocationEvent) -> None:
    raise PermissionError("not today")


@SAVE_ON
@pytest.mark.parametrize("order", [HookOrder.SDK_FIRST, HookOrder.DEFAULT, HookOrder.SDK_LAST])
def test_a_callback_that_refuses_an_invocation_leaves_the_next_tool_call_stored(
    factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str, order: int
) -> None:
    manager = factory.create_session_manager("s", save_on=save_on)
    live = agent(manager, tools=[ping])
    live.hooks.add_callback(BeforeInvocationEvent, refuse, order=order)
    with pytest.raises(PermissionError):
        live("a")
    live.tool.ping()
    assert len(live.messages) == 4
    assert stored_texts(stored) == texts(live.messages)


def test_only_invocations_are_counted_as_such(factory: MongoDBSessionManagerFactory) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, "one", "two", tools=[ping])
    refused = iter([True])

    def refuse_once(event: BeforeInvocationEvent) -> None:
        if next(refused, False):
            refuse(event)

    live.hooks.add_callback(BeforeInvocationEvent, refuse_once)
    with pytest.raises(PermissionError):
        live("a")
    live.tool.ping()
    live("a")
    live.tool.ping()
    live("b")
    live.tool.ping()
    assert manager.get_usage()["total"]["invocations"] == 2


def test_a_cancelled_invocation_stores_what_was_answered(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    def cancel(event: BeforeInvocationEvent) -> None:
        event.cancel = "closed on Sundays"

    manager = factory.create_session_manager("s")
    live = agent(manager)
    live.hooks.add_callback(BeforeInvocationEvent, cancel)
    live("a")
    assert stored_texts(stored) == ["closed on Sundays"]


# Graphs.


@pytest.mark.parametrize("event", [AfterNodeCallEvent, AfterMultiAgentInvocationEvent])
async def test_a_callback_of_a_graph_that_raises_loses_no_result(
    factory: MongoDBSessionManagerFactory, stored: Stored, event: type
) -> None:
    def fail(event: Any) -> None:
        raise LookupError("no such customer")

    async with await factory.create_session_manager_async("s") as manager:
        builder = GraphBuilder()
        builder.add_node(Agent(model=ScriptedModel(["done"]), agent_id="worker", callback_handler=None), "work")
        builder.set_session_manager(manager)
        builder.set_max_node_executions(5)
        graph = builder.build()
        graph.hooks.add_callback(event, fail)
        with pytest.raises(Exception, match="no such customer"):
            await graph.invoke_async("go")
        (state,) = stored.find_one({"_id": "s"})["multi_agents"].values()
        assert "done" in str(state)


# Messages that cannot be stored.


class Odd:
    """A value that has no stored form."""


@tool
def odd() -> Any:
    """Return something odd."""
    return {"status": "success", "content": [{"json": {"value": Odd()}}]}


CALL_ODD = {"tool": "odd", "input": {}}


@pytest.fixture
def unstorable() -> dict[str, Any]:
    return {"role": "user", "content": [{"text": "a"}], "metadata": {"custom": {"value": Odd()}}}


async def test_an_agent_goes_on_after_a_message_that_cannot_be_stored(
    factory: MongoDBSessionManagerFactory, stored: Stored, unstorable: dict[str, Any]
) -> None:
    async with await factory.create_session_manager_async("s") as manager:
        live = agent(manager, "one", "two")
        await live.invoke_async("a")
        with pytest.raises(EncodingError):
            await live.invoke_async([unstorable])
        assert texts(live.messages) == ["a", "one"]
        await live.invoke_async("b")
    assert stored_texts(stored) == texts(live.messages) == ["a", "one", "b", "two"]


def test_an_agent_goes_on_after_a_tool_result_that_cannot_be_stored(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with factory.create_session_manager("s") as manager:
        live = agent(manager, CALL_ODD, "two", tools=[odd])
        with pytest.raises(Exception, match="Odd"):
            live("a")
        assert len(live.messages) == 2
        live("b")
    resumed = restored(factory, tools=[odd])
    assert texts(resumed.messages) == texts(live.messages)
    assert texts(resumed.messages)[-1] == "two"


async def test_a_message_among_several_that_cannot_be_stored_is_taken_out(
    factory: MongoDBSessionManagerFactory, unstorable: dict[str, Any]
) -> None:
    async with await factory.create_session_manager_async("s") as manager:
        live = agent(manager)
        live.messages.extend([unstorable, *question("later")])
        with pytest.raises(EncodingError):
            await live.hooks.invoke_callbacks_async(MessageAddedEvent(agent=live, message=unstorable))
        assert texts(live.messages) == ["later"]


# Agents that were built without the manager.


@pytest.fixture
def stranger() -> Agent:
    live = agent(None, "hello")
    live("hi")
    live.state.set("kept", True)
    return live


def test_syncing_an_agent_of_another_manager_stores_it(factory: MongoDBSessionManagerFactory, stranger: Agent) -> None:
    with factory.create_session_manager("s") as manager:
        manager.sync_agent(stranger)
        stranger.state.set("kept", "later")
        manager.sync_agent(stranger)
    resumed = restored(factory)
    assert texts(resumed.messages) == ["hi", "hello"]
    assert resumed.state.get("kept") == "later"


def test_syncing_an_agent_that_is_stored_stores_its_state_alone(
    factory: MongoDBSessionManagerFactory, stranger: Agent
) -> None:
    with factory.create_session_manager("s") as manager:
        agent(manager, "one")("a")
    with factory.create_session_manager("s") as manager:
        manager.sync_agent(stranger)
    resumed = restored(factory)
    assert texts(resumed.messages) == ["a", "one"]
    assert resumed.state.get("kept") is True


@pytest.mark.parametrize(
    "use",
    [
        lambda manager, live: manager.append_message(question("b")[0], live),
        lambda manager, live: manager.redact_latest_message(question("b")[0], live),
    ],
    ids=["append", "redact"],
)
def test_messages_of_an_agent_of_another_manager_are_refused_by_name(
    factory: MongoDBSessionManagerFactory, stranger: Agent, use: Callable[..., None]
) -> None:
    with (
        factory.create_session_manager("s") as manager,
        pytest.raises(AgentNotFoundError, match=r"'agent'.*initialize"),
    ):
        use(manager, stranger)


async def test_state_of_a_turn_whose_stream_is_not_read_to_its_end(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    async with await factory.create_session_manager_async("s") as manager:
        live = agent(manager, "one")
        live.hooks.add_callback(AfterModelCallEvent, lambda event: event.agent.state.set("calls", 1))
        stream = live.stream_async("a")
        async for event in stream:
            if event.get("message", {}).get("role") == "assistant":
                break
    assert stored_texts(stored) == ["a", "one"]
    assert stored.find_one({"_id": "s"})["agents"]["agent"]["agent_data"]["state"] == {"calls": 1}
    with suppress(MongoDBSessionError):  # the manager is closed
        await stream.aclose()
