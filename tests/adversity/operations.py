"""The operations on a session during which a fault occurs, with both managers."""

from __future__ import annotations

import asyncio
import inspect
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import pymongo
from strands import Agent
from strands.types.content import Message
from strands.types.session import SessionMessage

from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
)
from support import agent, eventually, message_ids, texts

T = TypeVar("T")
Document = dict[str, Any]
Stored = pymongo.collection.Collection[Document]


class Interrupted(BaseException):
    """A signal, like that of Ctrl-C, has interrupted the waiting thread."""


class Api(Protocol):
    """Runs operations with one kind of manager."""

    name: str

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run an operation to its end."""

    def interrupt(
        self, work: Coroutine[Any, Any, Any], begun: Callable[[], bool], lift: Callable[[], None], *, lingers: bool
    ) -> None:
        """Run an operation, and cancel its caller as soon as `begun()` returns true.

        Args:
            work: The operation.
            begun: Returns whether its command is in flight.
            lift: Lets the command continue; called after the caller has returned, or before with `lingers`.
            lingers: Whether the caller returns only after the command.
        """

    def tasks(self) -> set[asyncio.Task[Any]]:
        """Return the tasks that are left on the caller's loop."""

    def close(self) -> None:
        """Close the caller's loop."""


class Sync:
    """The synchronous manager on the main thread, which runs no event loop."""

    name = "sync"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            work.send(None)  # it awaits nothing
        except StopIteration as ended:
            result: T = ended.value
            return result
        raise AssertionError("a synchronous call was suspended")

    def interrupt(
        self, work: Coroutine[Any, Any, Any], begun: Callable[[], bool], lift: Callable[[], None], *, lingers: bool
    ) -> None:
        interrupted, released = threading.Event(), threading.Event()

        def interrupt() -> None:
            eventually(begun)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            assert (interrupted if lingers else released).wait(30)
            lift()

        def raise_interrupted(*_: object) -> None:
            interrupted.set()
            raise Interrupted

        before = signal.signal(signal.SIGUSR1, raise_interrupted)
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            self.run(work)
            raise AssertionError("it was not interrupted")
        except Interrupted:
            released.set()
        finally:
            thread.join(60)
            signal.signal(signal.SIGUSR1, before)

    def tasks(self) -> set[asyncio.Task[Any]]:
        return set()

    def close(self) -> None: ...


class Async:
    """The asynchronous manager on an event loop of the caller."""

    name = "async"

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def interrupt(
        self, work: Coroutine[Any, Any, Any], begun: Callable[[], bool], lift: Callable[[], None], *, lingers: bool
    ) -> None:
        async def cancel() -> None:
            task = asyncio.create_task(work)
            await asyncio.to_thread(eventually, begun)
            task.cancel()
            if not lingers:
                await asyncio.wait({task}, timeout=30)
                assert task.done()
            await asyncio.to_thread(lift)
            await asyncio.wait({task})
            assert task.cancelled()

        self._runner.run(cancel())

    def tasks(self) -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks(self._runner.get_loop())

    def close(self) -> None:
        self._runner.close()


async def result_of(value: Any) -> Any:
    """Return the result of a method of either manager."""
    return await value if inspect.isawaitable(value) else value


@dataclass
class Session:
    """A session under test: its manager, its agent and its collection."""

    session_id: str
    api: Api
    factory: MongoDBSessionManagerFactory
    own: Callable[[type[Any]], Any]
    collection: Stored
    manager: Any = None
    agent: Agent | None = None
    options: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = field(default=None, repr=False)

    async def open(self) -> None:
        """Open the session with a new manager of the factory, without an agent."""
        if self.api.name == "sync":
            self.manager = self.factory.create_session_manager(self.session_id, **self.options)
        else:
            self.manager = await self.factory.create_session_manager_async(self.session_id, **self.options)

    async def open_owning(self) -> None:
        """Open the session with a new manager and a new connection."""
        if self.api.name == "sync":
            self.manager = self.own(MongoDBSessionManager)
        else:
            self.manager = await self.own(AsyncMongoDBSessionManager).open()

    async def ask(self, text: str, reply: str) -> None:
        """Run a turn, with a new agent if there is none."""
        if self.agent is None:
            self.agent = agent(self.manager)
        model: Any = self.agent.model
        model.replies.clear()
        model.replies.append(reply)
        await result_of(self.agent(text) if self.api.name == "sync" else self.agent.invoke_async(text))

    async def flush(self) -> None:
        await result_of(self.manager.flush())

    async def close(self) -> None:
        await result_of(self.manager.close())

    @property
    def document(self) -> Document | None:
        """The stored session document."""
        return self.collection.find_one({"_id": self.session_id})

    @property
    def conversation(self) -> list[str]:
        """The stored texts; checks that the ids are 0..n-1 and the next id is n."""
        document = self.document
        assert document is not None
        stored = document["agents"]["agent"]
        assert message_ids(document) == list(range(len(stored["messages"])))
        assert stored["next_message_id"] == len(stored["messages"])
        return texts(stored["messages"])


def message(text: str, role: str = "user") -> Message:
    return {"role": role, "content": [{"text": text}], "tracking_id": f"id of {text}"}  # type: ignore[typeddict-item]


@dataclass(frozen=True)
class Operation:
    """An operation on a session with the messages `hi`, `hello`.

    Attributes:
        act: Executes it.
        command: The command that it sends.
        count: Returns how often its effect is in the stored document.
        conversation: The conversation after it.
        recorded: Whether its change stays pending after a failure, to be stored by a flush.
        repeatable: Whether repeating it is safe if its outcome is unknown.
        lingers: Whether a cancelled caller returns only after the command.
        options: The options of the session's managers.
    """

    act: Callable[[Session], Awaitable[None]]
    command: str
    count: Callable[[Document], int]
    conversation: list[str] = field(default_factory=lambda: ["hi", "hello"])
    recorded: bool = True
    repeatable: bool = True
    lingers: bool = False
    options: dict[str, Any] = field(default_factory=dict)


async def open_session(session: Session) -> None:
    await session.open()


async def append(session: Session) -> None:
    session.manager.append_message(message("op"), session.agent)
    await session.flush()


async def turn(session: Session) -> None:
    await session.ask("op", "answer")


async def sync(session: Session) -> None:
    assert session.agent is not None
    session.agent.state.set("colour", "green")
    session.manager.sync_agent(session.agent)
    await session.flush()


async def metadata(session: Session) -> None:
    await result_of(session.manager.update_metadata({"n": 1}))


async def feedback(session: Session) -> None:
    await result_of(session.manager.add_feedback({"rating": "up"}))


async def redaction(session: Session) -> None:
    session.manager.redact_latest_message(message("[redacted]", "assistant"), session.agent)
    await session.flush()


async def close(session: Session) -> None:
    """Close with a pending message."""
    recorded = SessionMessage.from_message(message("op"), 2)
    session.manager._unit.create_message(session.session_id, "agent", recorded)
    await session.close()


def redactions(document: Document) -> int:
    """Count the guardrail events; check that there is one if and only if the message is redacted."""
    events, redacted = document["guardrail_events"], "hello" not in str(document)
    assert bool(events) == redacted
    return len(events)


def op(document: Document) -> int:
    return texts(document["agents"]["agent"]["messages"]).count("op")


def state(document: Document) -> int:
    return int(document["agents"]["agent"]["agent_data"]["state"] == {"colour": "green"})


AND_OP = ["hi", "hello", "op"]

WAITS = {"on_busy": "wait", "lease": 1.0}
"""Options with a short lease: one that was taken by a command whose reply was lost soon expires."""

OPERATIONS = {
    "open": Operation(open_session, "findAndModify", lambda document: 1, [], recorded=False),
    "append": Operation(append, "update", op, AND_OP),
    # A cancelled turn ends with a hook that stores its recorded changes.
    "turn": Operation(turn, "update", op, [*AND_OP, "answer"], lingers=True),
    "sync": Operation(sync, "update", state),
    "metadata": Operation(metadata, "update", lambda document: document["metadata"].get("n", 0), recorded=False),
    "feedback": Operation(
        feedback, "update", lambda document: len(document["feedbacks"]), recorded=False, repeatable=False
    ),
    "redaction": Operation(redaction, "findAndModify", redactions, ["hi", "[redacted]"]),
    "close": Operation(close, "update", op, AND_OP),
    "close-own": Operation(close, "update", op, AND_OP, recorded=False, repeatable=False),
    "lease-open": Operation(open_session, "findAndModify", lambda document: 1, [], recorded=False, options=WAITS),
    "lease-turn": Operation(turn, "update", op, [*AND_OP, "answer"], lingers=True, options=WAITS),
    "lease-close": Operation(close, "update", op, AND_OP, options=WAITS),
    "overlap": Operation(turn, "update", op, [*AND_OP, "answer"], options={"save_on": "overlap"}),
}
