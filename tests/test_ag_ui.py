"""AG-UI's adapter for Strands with sessions of this package: results of frontend tools, and several workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any

import pytest
from strands import Agent, tool
from strands.agent.conversation_manager import SlidingWindowConversationManager

from fix_archive import Stored
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    MongoDBSessionManagerFactory,
    SessionConflictError,
)
from mongodb_session_manager.demo import ScriptedModel
from support import Paused

core = pytest.importorskip("ag_ui.core", reason="needs ag-ui-strands, of the extra test")
adapter = pytest.importorskip("ag_ui_strands", reason="needs ag-ui-strands, of the extra test")

pytestmark = pytest.mark.anyio

PICK = core.Tool(
    name="pick_colour",
    description="Ask the user to pick a colour.",
    parameters={"type": "object", "properties": {"of": {"type": "string"}}},
)
PICK_COLOUR = {"tool": "pick_colour", "input": {"of": "car"}}


@tool
def paint(colour: str) -> str:
    """Paint the car."""
    return f"painted {colour}"


class Worker(adapter.StrandsAgent):
    """A worker process of an application; the adapter keeps the agent of each thread in memory."""

    def __init__(self, factory: MongoDBSessionManagerFactory, *replies: Any, reloads: bool = True, **behaviors: Any):
        self.factory, self.model, self.reloads = factory, Paused(replies), reloads
        self.model.go.set()
        self.managers: dict[str, AsyncMongoDBSessionManager] = {}
        template = Agent(
            model=self.model,
            agent_id="assistant",
            tools=[paint],
            callback_handler=None,
            conversation_manager=SlidingWindowConversationManager(window_size=6),
        )
        config = adapter.StrandsAgentConfig(session_manager_provider=self.open_session, tool_behaviors=behaviors)
        super().__init__(template, "assistant", config=config)

    async def open_session(self, input_data: Any) -> AsyncMongoDBSessionManager:
        manager = await self.factory.create_session_manager_async(input_data.thread_id)
        self.managers[input_data.thread_id] = manager
        return manager

    async def run(self, input_data: Any, **kwargs: Any) -> AsyncIterator[Any]:
        if self.reloads and (manager := self.managers.get(input_data.thread_id)) is not None:
            with suppress(SessionConflictError):  # a run is in progress: the adapter refuses a second one
                await manager.reload()
        async with aclosing(super().run(input_data, **kwargs)) as events:
            async for event in events:
                yield event

    async def events(self, *messages: Any, **given: Any) -> list[Any]:
        run = {"thread_id": "t", "run_id": "r", "state": {}, "context": [], "forwarded_props": {}, "tools": [PICK]}
        return [event async for event in self.run(core.RunAgentInput(messages=list(messages), **{**run, **given}))]

    @property
    def live(self) -> list[Any]:
        return self._agents_by_thread["t"].messages


def user(text: str) -> Any:
    return core.UserMessage(id=text, role="user", content=text)


def answer(call: str, text: str) -> Any:
    return core.ToolMessage(id=f"{call} {text}", role="tool", tool_call_id=call, content=text)


def call_of(events: list[Any], name: str = "pick_colour") -> str:
    starts = [event for event in events if event.type == core.EventType.TOOL_CALL_START]
    return next(event.tool_call_id for event in starts if event.tool_call_name == name)


def errors(events: list[Any]) -> list[Any]:
    return [event for event in events if event.type == core.EventType.RUN_ERROR]


def spoken(events: list[Any]) -> str:
    return "".join(event.delta for event in events if event.type == core.EventType.TEXT_MESSAGE_CONTENT)


def results(messages: list[Any]) -> list[str]:
    """Return the text of each tool result."""
    blocks = [block["toolResult"] for message in messages for block in message["content"] if "toolResult" in block]
    return [result["content"][0]["text"] for result in blocks]


async def stored_results(stored: Stored) -> list[str]:
    document = await asyncio.to_thread(stored.find_one, {"_id": "t"})
    assert document is not None
    return results([message["message"] for message in document["agents"]["assistant"]["messages"]])


RESTART = pytest.mark.parametrize("restarts", [False, True], ids=["same worker", "after a restart"])
Next = Callable[..., Worker]


@RESTART
async def test_the_answer_of_a_frontend_tool_replaces_its_placeholder(
    factory: MongoDBSessionManagerFactory, stored: Stored, restarts: bool
) -> None:
    first = Worker(factory, PICK_COLOUR, "A green car.")
    call = call_of(await first.events(user("Paint my car")))
    assert await stored_results(stored) == ["Forwarded to client"]
    worker = Worker(factory, "A green car.") if restarts else first
    events = await worker.events(answer(call, "green"))
    assert (errors(events), spoken(events)) == ([], "A green car.")
    assert results(worker.model.calls[-1]) == results(worker.live) == ["green"]
    assert await stored_results(stored) == ["green"]
    fresh = await factory.create_session_manager_async("t")
    assert results(Agent(agent_id="assistant", model=ScriptedModel(), session_manager=fresh).messages) == ["green"]


@RESTART
async def test_the_answer_replaces_its_placeholder_while_an_interrupt_is_pending(
    factory: MongoDBSessionManagerFactory, stored: Stored, restarts: bool
) -> None:
    approved = {"paint": adapter.ToolBehavior(interrupt_on_call=True)}
    both = [PICK_COLOUR, {"tool": "paint", "input": {"colour": "green"}}]
    first = Worker(factory, both, "Done.", **approved)
    events = await first.events(user("Paint my car"))
    assert errors(events) == []
    (interrupt,) = events[-1].outcome.interrupts
    worker = Worker(factory, "Done.", **approved) if restarts else first
    resumed = core.ResumeEntry(interrupt_id=interrupt.id, status="resolved", payload={"approved": True})
    events = await worker.events(answer(call_of(events), "green"), resume=[resumed])
    assert (errors(events), spoken(events)) == ([], "Done.")
    assert sorted(results(worker.model.calls[-1])) == sorted(await stored_results(stored)) == ["green", "painted green"]


@RESTART
async def test_a_frontend_tool_that_the_agent_waits_for_gets_its_answer(
    factory: MongoDBSessionManagerFactory, stored: Stored, restarts: bool
) -> None:
    waits = {"pick_colour": adapter.ToolBehavior(continue_after_frontend_call=False)}
    first = Worker(factory, PICK_COLOUR, "A green car.", **waits)
    call = call_of(await first.events(user("Paint my car")))
    worker = Worker(factory, "A green car.", **waits) if restarts else first
    events = await worker.events(answer(call, "green"))
    assert (errors(events), spoken(events)) == ([], "A green car.")
    assert results(worker.model.calls[-1]) == await stored_results(stored) == ["green"]


@pytest.mark.may_block  # the adapter reads removed messages from the server on the running loop
async def test_the_answer_replaces_its_placeholder_after_messages_left_the_window(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    worker = Worker(factory, "one", "two", "three", PICK_COLOUR, "A green car.")
    for text in ("a", "b", "c"):
        await worker.events(user(text))
    call = call_of(await worker.events(user("Paint my car")))
    events = await worker.events(answer(call, "green"))
    assert (errors(events), spoken(events)) == ([], "A green car.")
    assert results(worker.model.calls[-1]) == await stored_results(stored) == ["green"]


async def test_an_agent_in_memory_continues_what_another_worker_answered(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    first, second = Worker(factory, PICK_COLOUR, "Yes, it is."), Worker(factory, "A green car.")
    call = call_of(await first.events(user("Paint my car")))
    await second.events(answer(call, "green"))
    events = await first.events(user("Is it green?"))
    assert (errors(events), spoken(events)) == ([], "Yes, it is.")
    assert results(first.model.calls[-1]) == results(first.live) == await stored_results(stored) == ["green"]


async def test_an_agent_in_memory_gets_the_answer_to_a_call_of_another_worker(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    first, second = Worker(factory, "Hello.", "A green car."), Worker(factory, PICK_COLOUR)
    await first.events(user("Hi"))
    call = call_of(await second.events(user("Paint my car")))
    events = await first.events(answer(call, "green"))
    assert (errors(events), spoken(events)) == ([], "A green car.")
    assert results(first.model.calls[-1]) == await stored_results(stored) == ["green"]


async def test_without_reloading_the_second_worker_is_not_overwritten(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    first = Worker(factory, PICK_COLOUR, "Is it?", reloads=False)
    call = call_of(await first.events(user("Paint my car")))
    await Worker(factory, "A green car.").events(answer(call, "green"))
    (error,) = errors(await first.events(user("Is it green?")))
    assert "another writer" in error.message
    assert await stored_results(stored) == ["green"]


async def test_a_second_run_of_a_thread_is_refused_by_the_adapter(factory: MongoDBSessionManagerFactory) -> None:
    worker = Worker(factory, "Hello.", "Fine.", "Bye.")
    await worker.events(user("Hi"))
    worker.model.asked.clear()
    worker.model.go.clear()
    begun = asyncio.create_task(worker.events(user("How are you?")))
    await worker.model.asked.wait()
    (error,) = errors(await worker.events(user("Bye")))
    assert error.code == "THREAD_BUSY"
    worker.model.go.set()
    assert errors(await begun) == []
