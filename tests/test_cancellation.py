"""A caller may go away at any moment: what was acknowledged stays, nothing has a gap, and the session goes on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import pymongo
import pytest
from strands import Agent, tool
from strands.hooks import AfterInvocationEvent, MessageAddedEvent
from strands.types.exceptions import ConcurrencyException
from strands.types.session import SessionAgent

from mongodb_session_manager import AsyncMongoDBSessionManager, MongoDBSessionManagerFactory
from proxy import Proxy
from support import agent, alternating, eventually, message_ids

pytestmark = pytest.mark.anyio

T = TypeVar("T")
Stored = pymongo.collection.Collection[dict[str, Any]]

QUESTION, CALL, RESULT, ANSWER = "user:1 + 2?", "assistant:call add", "user:result", "assistant:three"
TURN = [QUESTION, CALL, RESULT, ANSWER]
NEXT = ["user:go on", "assistant:done"]


CALL_ADD = {"tool": "add", "input": {"a": 1, "b": 2}}


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture(scope="module")
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        proxy.delay = 0.002
        yield proxy


@pytest.fixture(scope="module")
def connected(proxy: Proxy, shared_database: str) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory behind the proxy, for the whole module."""
    with MongoDBSessionManagerFactory(proxy.uri, shared_database) as factory:
        yield factory


@pytest.fixture
def factory(connected: MongoDBSessionManagerFactory, database: str) -> Iterator[MongoDBSessionManagerFactory]:
    connected.create_session_manager("warm-up").close()
    yield connected
    # before the next test empties the database
    eventually(lambda: not connected._connection._operations and not connected._connection._tasks)


def outline(messages: list[Any]) -> list[str]:
    """Return a line per message, stored or an agent's."""
    lines = []
    for element in messages:
        message = element.get("message", element)
        for block in message["content"]:
            match block:
                case {"toolUse": use}:
                    lines.append(f"{message['role']}:call {use['name']}")
                case {"toolResult": {"status": "success"}}:
                    lines.append(f"{message['role']}:result")
                case {"toolResult": _}:
                    lines.append(f"{message['role']}:no result")
                case {"text": text}:
                    lines.append(f"{message['role']}:{text.strip()}")
    return lines


class Acknowledged(list[str]):
    """The messages of an agent of which its caller could know that they are stored."""

    def __init__(self, watched: Agent) -> None:
        super().__init__()
        watched.hooks.add_callback(MessageAddedEvent, self._added)  # called after the session manager's

    def _added(self, event: MessageAddedEvent) -> None:
        (line,) = outline([event.message])
        if line != ANSWER:  # which is stored by the time the invocation is over
            self.append(line)


class Interrupted:
    """Awaits a coroutine and cancels the task at the `step`-th time it is suspended.

    Args:
        coroutine: What the task runs.
        step: Which suspension, from 0.
        when: `"at once"`, before what it waits for can happen; `"when done"`, once it has happened, but before the
            task hears of it; `"twice"`, at once and at the suspension that follows.

    Attributes:
        steps: How often it was suspended.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], step: int, when: str = "at once") -> None:
        self._coroutine = coroutine
        self._steps = {step, step + 1} if when == "twice" else {step}
        self._when_done = when == "when done"
        self.steps = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        resume: Callable[[], Any] = lambda: self._coroutine.send(None)  # noqa: E731
        while True:
            try:
                awaited = resume()
            except StopIteration as stop:
                return stop.value
            if self.steps in self._steps:
                if self._when_done and awaited is not None:
                    awaited.add_done_callback(lambda _: task.cancel())
                else:
                    task.cancel()
            self.steps += 1
            try:
                yield awaited
            except BaseException as error:
                resume = lambda error=error: self._coroutine.throw(error)  # noqa: E731
            else:
                resume = lambda: self._coroutine.send(None)  # noqa: E731


async def interrupted(coroutine: Coroutine[Any, Any, T], step: int, when: str) -> bool:
    """Run `coroutine` in a task that is cancelled at its `step`-th suspension; return whether it was."""

    async def run() -> T:
        return await Interrupted(coroutine, step, when)

    task = asyncio.create_task(run())
    await asyncio.wait([task])
    if task.cancelled():
        return True
    task.result()
    return False


class Kind:
    """Opens and uses one of the two managers from a running event loop."""

    def __init__(self, name: str, factory: MongoDBSessionManagerFactory) -> None:
        self.name = name
        self._factory = factory

    async def open(self, session_id: str, **options: Any) -> Any:
        if self.name == "async":
            return await self._factory.create_session_manager_async(session_id, **options)
        return await asyncio.to_thread(self._factory.create_session_manager, session_id, **options)

    async def flush(self, manager: Any) -> None:
        await self._call(manager, manager.flush)

    async def close(self, manager: Any) -> None:
        await self._call(manager, manager.close)

    async def _call(self, manager: Any, function: Callable[[], Any]) -> None:
        if isinstance(manager, AsyncMongoDBSessionManager):
            await function()
        else:
            await asyncio.to_thread(function)


@pytest.fixture(params=["async", "sync"])
def kind(request: pytest.FixtureRequest, factory: MongoDBSessionManagerFactory) -> Kind:
    return Kind(request.param, factory)


def stored_outline(stored: Stored, session_id: str) -> list[str]:
    """Return what is stored of a conversation after checking that ids are 0..n-1 and that the next one is n."""
    document = stored.find_one({"_id": session_id}) or {}
    kept = document.get("agents", {}).get("agent", {"messages": [], "next_message_id": 0})
    if kept["messages"]:
        assert message_ids(document) == list(range(len(kept["messages"])))
    assert kept["next_message_id"] == len(kept["messages"])
    return outline(kept["messages"])


def continued(conversation: list[str]) -> list[str]:
    """Return the conversation after the next turn: Strands answers a tool call that has no result first."""
    return [*conversation, *(["user:no result"] if conversation[-1:] == [CALL] else []), *NEXT]


async def ask(asked: Agent, text: str) -> None:
    """Have one turn, as soon as an abandoned one has ended."""
    for _ in range(500):
        try:
            await asked.invoke_async(text)
        except ConcurrencyException:
            await asyncio.sleep(0.01)
        else:
            return
    raise AssertionError("the abandoned turn never ended")


async def check_the_session_goes_on(
    kind: Kind, stored: Stored, session_id: str, abandoned: tuple[Any, Agent], acknowledged: list[str], heir: str
) -> None:
    """Check what an abandoned turn left behind, and have the next turn.

    Args:
        kind: The manager.
        stored: The sessions.
        session_id: The session.
        abandoned: The manager and its agent.
        acknowledged: Messages that have to be there.
        heir: Who has the next turn: the `"same manager"`, a `"new manager"` beside it once it is flushed, or a new
            manager `"after close"`; or `"nobody"`, and what was under way gets stored all the same.
    """
    manager, left = abandoned
    acknowledged = list(acknowledged)
    if heir == "nobody":
        before = outline(left.messages)
        await asyncio.to_thread(eventually, lambda: stored_outline(stored, session_id) == before)
    elif heir == "same manager":
        left.model.replies.clear()
        left.model.replies.append("done")
        await ask(left, "go on")
        conversation = stored_outline(stored, session_id)
        before = outline(left.messages)[: -len(NEXT)]
        assert conversation == [*before, *NEXT]
        before = [line for line in before if line != "user:no result"]
        assert conversation == continued(before)
    else:
        await (kind.close if heir == "after close" else kind.flush)(manager)
        successor = await kind.open(session_id)
        restored = agent(successor, "done", tools=[add])
        before = outline(restored.messages)
        assert before == stored_outline(stored, session_id)
        await restored.invoke_async("go on")
        assert stored_outline(stored, session_id) == continued(before)
        await kind.close(successor)
    assert before == TURN[: len(before)]
    assert before[: len(acknowledged)] == acknowledged
    await kind.close(manager)


HEIRS = ["same manager", "new manager", "after close", "nobody"]


def heirs() -> Callable[[int], str]:
    """Return who has the next turn after each step: all of them in turn, beginning with any."""
    first = random.randrange(len(HEIRS))
    return lambda step: HEIRS[(first + step) % len(HEIRS)]


@pytest.fixture
def stride(request: pytest.FixtureRequest) -> int:
    """One step of how many is taken, others in each run; `--full-adversity` takes all."""
    return 1 if request.config.getoption("full_adversity") else 4


async def at_every_step(life: Callable[[int], Awaitable[bool]], stride: int = 1) -> int:
    """Run `life(step)` for the steps, four at a time, until one is not interrupted; return that step.

    Args:
        life: Returns whether it was interrupted.
        stride: Of so many steps one is taken, beginning with any of them.
    """
    steps = iter(range(random.randrange(stride), 1000, stride))
    uninterrupted: list[int] = []

    async def lives() -> None:
        while not uninterrupted:
            step = next(steps)
            if not await life(step):
                uninterrupted.append(step)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(lives())
    return min(uninterrupted)


@pytest.mark.parametrize(
    ("kind", "save_on", "when"),
    [
        ("async", "message", "at once"),
        ("async", "message", "when done"),
        ("async", "message", "twice"),
        ("async", "invocation", "at once"),
        ("async", "invocation", "twice"),
        ("sync", "message", "at once"),
        ("sync", "message", "when done"),
    ],
    indirect=["kind"],
)
async def test_a_turn_cancelled_at_any_await(kind: Kind, stored: Stored, when: str, save_on: str, stride: int) -> None:
    heir = heirs()

    async def life(step: int) -> bool:
        session_id = f"session-{step}"
        manager = await kind.open(session_id, save_on=save_on)
        asked = agent(manager, CALL_ADD, "three", tools=[add])
        acknowledged = Acknowledged(asked)
        cancelled = await interrupted(asked.invoke_async("1 + 2?"), step, when)
        known = TURN if not cancelled else acknowledged if save_on == "message" else []
        await check_the_session_goes_on(kind, stored, session_id, (manager, asked), known, heir(step))
        return cancelled

    assert await at_every_step(life, stride) > 12


@pytest.mark.parametrize(
    ("kind", "how"), [("async", "closed"), ("async", "dropped"), ("sync", "closed")], indirect=["kind"]
)
async def test_a_stream_left_at_any_event(kind: Kind, stored: Stored, how: str, stride: int) -> None:
    heir = heirs()

    async def life(step: int) -> bool:
        session_id = f"session-{step}"
        manager = await kind.open(session_id)
        asked = agent(manager, CALL_ADD, "three", tools=[add])
        acknowledged = Acknowledged(asked)
        over = asyncio.Event()
        asked.hooks.add_callback(AfterInvocationEvent, lambda _: over.set())
        left = await leave(asked.stream_async("1 + 2?"), step, how)
        await over.wait()
        known = acknowledged if left else TURN
        await check_the_session_goes_on(kind, stored, session_id, (manager, asked), known, heir(step))
        return left

    assert await at_every_step(life, stride) > 12


async def leave(stream: AsyncGenerator[Any, None], step: int, how: str) -> bool:
    """Read a stream up to its `step`-th event, then close or drop it; return whether there was such an event."""
    read = 0
    async for _ in stream:
        if read == step:
            if how == "closed":
                await stream.aclose()
            return True
        read += 1
    return False


@pytest.mark.parametrize("kind", ["async"], indirect=True)
async def test_a_turn_that_runs_into_a_timeout(
    kind: Kind, stored: Stored, some: Callable[[Iterable[int], int], list[int]]
) -> None:
    heir = heirs()

    async def life(step: int) -> None:
        session_id = f"session-{step}"
        manager = await kind.open(session_id)
        asked = agent(manager, CALL_ADD, "three", tools=[add])
        acknowledged: list[str] = Acknowledged(asked)
        with suppress(TimeoutError):
            async with asyncio.timeout(step * 0.002):
                await asked.invoke_async("1 + 2?")
                acknowledged = TURN
        await check_the_session_goes_on(kind, stored, session_id, (manager, asked), acknowledged, heir(step))

    await asyncio.gather(*map(life, some(range(24), 8)))


async def test_a_timeout_while_the_server_does_not_answer(kind: Kind, proxy: Proxy, stored: Stored) -> None:
    manager = await kind.open("s")
    asked = agent(manager, "never said", "done")
    proxy.freeze()

    async def turn() -> None:
        async with asyncio.timeout(0.02):
            await asked.invoke_async("1 + 2?")

    caller = asyncio.create_task(turn())
    await asyncio.sleep(0.1)
    proxy.thaw()
    with pytest.raises(TimeoutError):
        await caller
    await kind.flush(manager)
    assert stored_outline(stored, "s") == [QUESTION]
    asked.model.replies.popleft()
    await asked.invoke_async("go on")
    assert stored_outline(stored, "s") == [QUESTION, *NEXT]


async def test_a_task_group_that_fails(
    kind: Kind, stored: Stored, some: Callable[[Iterable[int], int], list[int]]
) -> None:
    async def fail(delay: float) -> None:
        await asyncio.sleep(delay)
        raise ZeroDivisionError

    async def all_fail(agents: list[Agent], delay: float) -> None:
        async with asyncio.TaskGroup() as group:
            for asked in agents:
                group.create_task(ask(asked, "1 + 2?"))
            group.create_task(fail(delay))

    for attempt in some(range(6), 2):
        names = [f"session-{attempt}-{number}" for number in range(3)]
        managers = [await kind.open(name) for name in names]
        agents = [agent(manager, CALL_ADD, "three", tools=[add]) for manager in managers]
        known = [Acknowledged(asked) for asked in agents]
        with pytest.raises(ExceptionGroup):
            await all_fail(agents, attempt * 0.005)
        for name, manager, asked, acknowledged in zip(names, managers, agents, known, strict=True):
            await check_the_session_goes_on(kind, stored, name, (manager, asked), acknowledged, "new manager")


@pytest.mark.parametrize("when", ["at once", "when done"])
async def test_opening_a_session_cancelled_at_every_await(
    factory: MongoDBSessionManagerFactory, stored: Stored, when: str
) -> None:
    async def life(step: int) -> bool:
        session_id = f"session-{step}"
        cancelled = await interrupted(factory.create_session_manager_async(session_id), step, when)
        async with await factory.create_session_manager_async(session_id) as manager:
            await agent(manager, "done").invoke_async("go on")
        assert stored_outline(stored, session_id) == NEXT
        return cancelled

    assert await at_every_step(life) >= 1


@pytest.mark.parametrize("when", ["at once", "when done"])
async def test_a_manager_whose_opening_is_cancelled_leaves_no_connection(server: str, database: str, when: str) -> None:
    with Proxy(server) as proxy:
        proxy.delay = 0.002
        step, cancelled = 0, True
        while cancelled:
            manager = AsyncMongoDBSessionManager("s", proxy.uri, database)
            cancelled = await interrupted(manager.open(), step, when)
            step += 1
        await manager.close()
        assert step > 1
        await asyncio.to_thread(eventually, lambda: not proxy.open_connections)


@pytest.mark.parametrize("when", alternating("at once", "when done"))
@pytest.mark.parametrize("owned", alternating(False, True))
async def test_closing_cancelled_at_every_await(
    factory: MongoDBSessionManagerFactory, proxy: Proxy, database: str, stored: Stored, when: str, owned: bool
) -> None:
    async def life(step: int) -> bool:
        session_id = f"session-{step}"
        if owned:
            manager = await AsyncMongoDBSessionManager(session_id, proxy.uri, database).open()
        else:
            manager = await factory.create_session_manager_async(session_id)
        left = agent(manager)
        left.state.set("colour", "green")
        manager._unit.update_agent(session_id, SessionAgent.from_agent(left))
        cancelled = await interrupted(manager.close(), step, when)
        await asyncio.to_thread(eventually, lambda: state_of(session_id) == {"colour": "green"})
        await manager.close()
        return cancelled

    def state_of(session_id: str) -> dict[str, Any] | None:
        document = stored.find_one({"_id": session_id})
        return document["agents"].get("agent", {"agent_data": {"state": None}})["agent_data"]["state"]

    assert await at_every_step(life) >= 1
