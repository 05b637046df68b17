"""Agents that listen while they talk: their messages are stored when they begin and again when they are complete."""

from __future__ import annotations

import asyncio
from typing import Any

import pymongo
import pytest
from strands import ToolContext, tool
from strands.bidi import BidiAgent
from strands.bidi.types.events import (
    BidiResponseStartEvent,
    BidiResponseStopEvent,
    BidiTranscriptDeltaEvent,
    BidiTranscriptStartEvent,
)
from strands.hooks import MessageUpdatedEvent

from mongodb_session_manager import (
    MessageNotFoundError,
    MongoDBSessionManagerFactory,
    SessionConflictError,
)
from scripted_bidi import ScriptedBidiModel, calls, said, spoken
from support import CommandLog, eventually, message_ids, texts

Stored = pymongo.collection.Collection[dict[str, Any]]

# Strands reads files on the event loop when it makes an agent with tools.
pytestmark = [pytest.mark.anyio, pytest.mark.may_block]

OPEN, WRITE = "findAndModify", "update"


@tool(context=True)
def note(text: str, tool_context: ToolContext) -> str:
    """Remember something."""
    tool_context.agent.state.set("note", text)
    return f"noted: {text}"


@pytest.fixture(params=[False, True], ids=["manager", "async manager"])
def kind(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def open_(factory: MongoDBSessionManagerFactory, is_async: bool = True, **options: Any) -> Any:
    if is_async:
        return await factory.create_session_manager_async("s", **options)
    return await asyncio.to_thread(factory.create_session_manager, "s", **options)


def talker(manager: Any, *turns: list[Any], agent_id: str = "bidi", **options: Any) -> BidiAgent:
    return BidiAgent(ScriptedBidiModel(*turns), tools=[note], agent_id=agent_id, session_manager=manager, **options)


async def ask(agent: BidiAgent, text: str) -> None:
    await agent.send(text)
    await hear(agent)


async def hear(agent: BidiAgent) -> None:
    """Receive until the response is over."""
    async for event in agent.receive():
        if isinstance(event, BidiResponseStopEvent):
            return


async def document_of(stored: Stored) -> dict[str, Any]:
    return await asyncio.to_thread(stored.find_one, {"_id": "s"})


async def test_a_conversation_is_restored_as_it_was(
    factory: MongoDBSessionManagerFactory, stored: Stored, kind: bool
) -> None:
    manager = await open_(factory, kind)
    first = talker(
        manager, spoken("Good day!", "Be kind.", ["Good ", "evening", "."], "1"), calls("note", "t1", text="tea"),
        said("Done.", "2"),
    )  # fmt: skip
    async with first:
        await ask(first, "hello")
        await ask(first, "note tea")
    assert len(first.messages) == 10
    assert [texts([message])[0] for message in first.messages[:4]] == ["hello", "Good day!", "", "Good evening."]

    again = talker(await open_(factory, kind))
    assert again.messages == first.messages
    assert again.state.get("note") == "tea"
    async with again:
        assert again.model.history == first.messages

    messages = (await document_of(stored))["agents"]["bidi"]["messages"]
    assert [message["message"] for message in messages] == first.messages
    assert message_ids(await document_of(stored), "bidi") == list(range(10))
    kinds = [message["message"]["metadata"]["custom"]["bidi"] for message in messages[1:4]]
    assert [(each["kind"], each["status"]) for each in kinds] == [
        ("transcript", "complete"),
        ("reasoning", "complete"),
        ("transcript", "complete"),
    ]


async def test_each_message_and_each_update_is_one_command(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, kind: bool
) -> None:
    live = talker(await open_(factory, kind), said("Hello.", "1"))
    assert commands.names == [OPEN]
    async with live:
        await ask(live, "hi")
        # What was asked, the answer as it begins, and the answer as it is.
        assert commands.names == [OPEN] + [WRITE] * 3
    assert commands.names == [OPEN] + [WRITE] * 4  # the state at the end, which no message carries


async def test_an_update_replaces_by_its_tracking_id(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    live = talker(await open_(factory))
    async with live:
        live.model.emit(BidiTranscriptStartEvent("user", "u"), BidiTranscriptDeltaEvent("half a", "user", "u"))
        await until(lambda: len(live.messages) == 1)
        await live.hooks.invoke_callbacks_async(_updated(live, 0, "half a sentence"))
        before = (await document_of(stored))["agents"]["bidi"]["messages"]
        assert texts(before) == ["half a sentence"]
        await live.hooks.invoke_callbacks_async(_updated(live, 0, "another"))
        after = (await document_of(stored))["agents"]["bidi"]["messages"]
        assert texts(after) == ["another"]
        assert after[0]["created_at"] == before[0]["created_at"]
        assert after[0]["updated_at"] >= before[0]["updated_at"]


def _updated(agent: BidiAgent, position: int, text: str) -> Any:
    message = {**agent.messages[position], "content": [{"text": text}]}
    return MessageUpdatedEvent(agent, message["tracking_id"], message)


async def until(condition: Any) -> None:
    await asyncio.to_thread(eventually, condition)


async def test_a_restored_message_can_be_updated(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    async with talker(await open_(factory), said("Hello.", "1")) as live:
        await ask(live, "hi")
    again = talker(await open_(factory), said("Fine.", "2"))
    await again.hooks.invoke_callbacks_async(_updated(again, 1, "Good day."))
    async with again:
        await ask(again, "how are you?")
    document = await document_of(stored)
    assert texts(document["agents"]["bidi"]["messages"]) == ["hi", "Good day.", "how are you?", "Fine."]
    assert message_ids(document, "bidi") == [0, 1, 2, 3]


async def test_an_update_of_a_message_that_is_not_there(factory: MongoDBSessionManagerFactory) -> None:
    live = talker(await open_(factory))
    with pytest.raises(MessageNotFoundError, match="unknown"):
        await live.hooks.invoke_callbacks_async(MessageUpdatedEvent(live, "unknown", {"role": "user", "content": []}))


async def test_what_was_being_said_is_stored_as_incomplete(
    factory: MongoDBSessionManagerFactory, stored: Stored, kind: bool
) -> None:
    live = talker(await open_(factory, kind))
    async with live:
        live.model.emit(
            BidiResponseStartEvent("r"),
            BidiTranscriptStartEvent("assistant", "a"),
            BidiTranscriptDeltaEvent("Once upon a", "assistant", "a"),
        )
        async for event in live.receive():
            if isinstance(event, BidiTranscriptDeltaEvent):
                break
        # A process killed here leaves what the model was about to say.
        pending = talker(await open_(factory)).messages
        assert [message["metadata"]["custom"]["bidi"]["status"] for message in pending] == ["pending"]
        assert pending[0]["content"] == []
    messages = (await document_of(stored))["agents"]["bidi"]["messages"]
    assert [message["message"] for message in messages] == live.messages
    assert messages[0]["message"]["metadata"]["custom"]["bidi"]["status"] == "incomplete"
    assert texts(messages) == ["[Transcript unavailable.]"]


async def test_state_changed_after_the_last_message_is_stored_at_the_end(
    factory: MongoDBSessionManagerFactory, kind: bool
) -> None:
    async with talker(await open_(factory, kind), said("Hello.", "1")) as live:
        await ask(live, "hi")
        live.state.set("mood", "good")
    assert talker(await open_(factory, kind)).state.get("mood") == "good"


@pytest.mark.parametrize("save_on", ["message", "invocation"])
async def test_it_has_no_invocations_so_each_message_is_stored_at_once(
    factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str
) -> None:
    async with talker(await open_(factory, save_on=save_on), said("Hello.", "1")) as live:
        await ask(live, "hi")
        assert texts((await document_of(stored))["agents"]["bidi"]["messages"]) == ["hi", "Hello."]
        assert all(
            "event_loop_metrics" not in message for message in (await document_of(stored))["agents"]["bidi"]["messages"]
        )


async def test_of_two_that_talk_the_second_is_refused(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    first, second = (
        talker(await open_(factory), said("Hello.", "1"), said("Fine.", "2")),
        talker(await open_(factory), said("Hello.", "1")),
    )
    async with first:
        await ask(first, "hi")
        await second.start()
        with pytest.raises(SessionConflictError):
            await second.send("hi")
        await second.model.send("whatever")  # the model says something all the same
        with pytest.raises(SessionConflictError):
            await hear(second)
        with pytest.raises(SessionConflictError):
            await second.stop()
        await ask(first, "how are you?")
    assert texts((await document_of(stored))["agents"]["bidi"]["messages"]) == ["hi", "Hello.", "how are you?", "Fine."]


async def test_two_of_a_session_at_the_same_time(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    manager = await open_(factory)
    left = talker(manager, *(said(f"left {turn}", str(turn)) for turn in range(5)), agent_id="left")
    right = talker(manager, *(said(f"right {turn}", str(turn)) for turn in range(5)), agent_id="right")

    async def talk(agent: BidiAgent) -> None:
        async with agent:
            for turn in range(5):
                await ask(agent, f"question {turn}")

    await asyncio.gather(talk(left), talk(right))
    agents = (await document_of(stored))["agents"]
    for name in ("left", "right"):
        expected = [text for turn in range(5) for text in (f"question {turn}", f"{name} {turn}")]
        assert texts(agents[name]["messages"]) == expected
