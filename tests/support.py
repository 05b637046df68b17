"""Helpers of several test modules."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from json import JSONDecodeError
from typing import Any

import pymongo
import pytest
from bson.errors import BSONError
from pymongo import monitoring
from pymongo.collection import Collection
from pymongo.errors import PyMongoError
from strands import Agent
from strands.session import SessionManager
from strands.telemetry.metrics import MetricsClient

from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository
from mongodb_session_manager._format.changes import Change
from mongodb_session_manager.demo import ScriptedModel

MetricsClient()  # a thread that uses Strands' one instance while another thread makes it finds it incomplete


class Paused(ScriptedModel):
    """A model that answers when it is told to."""

    def __init__(self, replies: Iterable[Any]) -> None:
        super().__init__(replies)
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def stream(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.set()
        await self.go.wait()
        async for chunk in super().stream(*args, **kwargs):
            yield chunk


class CommandLog(monitoring.CommandListener):
    """The names of the commands that were sent, except the commands that open and close connections."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name not in ("endSessions", "ping", "buildInfo", "hello"):
            self.names.append(event.command_name)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...
    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...

    def clear(self) -> None:
        self.names.clear()

    def wait_for_start(self) -> None:
        """Wait for the commands that a process sends once for a collection, in the background."""
        self.wait_for("createIndexes")
        self.wait_for("find")  # unfinished sessions

    def wait_for(self, name: str) -> None:
        eventually(lambda: name in self.names)


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until `condition()` is true, and ask less often the longer that takes."""
    begun = time.monotonic()
    while not condition():
        waited = time.monotonic() - begun
        assert waited < seconds, "it never happened"
        time.sleep(min(0.1, max(0.01, waited / 10)))


def sampled(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return the cases of a parametrized test; all except the chosen ones run only with `--full-adversity`."""
    known = list(cases)
    assert all(case in known for case in chosen)
    return [
        case
        if case in chosen
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full_adversity)
        for case in known
    ]


def alternating(*values: Any) -> list[Any]:
    """Return the values of a parameter, marked alternately as half 0 and half 1; a tuple sets several parameters.

    Each run draws one half for each test and runs only that half; `--full-adversity` runs both.

        @pytest.mark.parametrize("save_on", alternating("message", "invocation"))
        @pytest.mark.parametrize("is_async", alternating(False, True))

    With several such parameters, a combination is in half 0 if the sum of its marks is even, in half 1 if it is odd. So
    each run has every value of every parameter and, of three or more parameters, every pair of values.
    """
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.half(number % 2))
        for number, value in enumerate(values)
    ]


def run_random() -> random.Random:
    """Return a random generator that has the same seed in all workers of a run, and another seed in each run.

    Workers must agree on the collected cases. `--testrunuid` sets the seed of a run with workers.
    """
    return random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID"))


def agent(manager: SessionManager | None, *replies: Any, agent_id: str = "agent", **options: Any) -> Agent:
    """Return an agent with a scripted model that prints nothing."""
    return Agent(
        model=ScriptedModel(replies),
        agent_id=agent_id,
        session_manager=manager,
        callback_handler=None,
        **options,
    )


def texts(messages: list[Any]) -> list[str]:
    """Return the text of each message, stored or an agent's."""
    return [
        "".join(block.get("text", "") for block in message.get("message", message)["content"]) for message in messages
    ]


def message_ids(document: dict[str, Any], agent_key: str = "agent") -> list[int]:
    return [message["message_id"] for message in document["agents"][agent_key]["messages"]]


def chained(error: BaseException) -> list[BaseException]:
    """Return an error and all its causes and contexts, as error trackers do, even those that a traceback hides."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and not any(each is known for known in found):
            found.append(each)
            waiting += [each.__cause__, each.__context__]
    return found


def assert_no_driver_error(error: BaseException) -> None:
    """Assert that no cause or context of an error is of a type whose message can quote user data."""
    quoting = (PyMongoError, BSONError, UnicodeError, JSONDecodeError, OverflowError)
    assert [each for each in chained(error) if isinstance(each, quoting)] == []


def bson_of(collection: Collection[dict[str, Any]], **options: Any) -> Iterator[bytes]:
    """The documents of a collection as bytes, batch by batch."""
    batches: Any = collection.find_raw_batches(**options)
    return iter(batches)


CLIENTS: dict[str, pymongo.MongoClient[dict[str, Any]]] = {}
"""The clients of the servers that run as long as the tests, by connection string."""


@contextmanager
def client_of(uri: str) -> Iterator[pymongo.MongoClient[dict[str, Any]]]:
    """Yield a client that is one of `CLIENTS`, or lives only within the context."""
    with ExitStack() as stack:
        yield CLIENTS.get(uri) or stack.enter_context(pymongo.MongoClient[dict[str, Any]](uri))


@contextmanager
def untraced() -> Iterator[None]:
    """Keep Strands from writing out messages for spans that nobody records: 17 MB take it a quarter of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strands.telemetry.tracer.serialize", lambda obj: "")
        yield


@contextmanager
def fail_point(uri: str, **data: Any) -> Iterator[None]:
    """Make the server fail commands, with `data` for the fail point `failCommand`, `times` times (default 1)."""
    mode: Any = {"times": data.pop("times", 1)}
    with client_of(uri) as client:
        client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})
        try:
            yield
        finally:
            client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


class Session:
    """The session "s" through one of the managers, called as if it were synchronous."""

    def __init__(self, factory: MongoDBSessionManagerFactory, runner: asyncio.Runner, is_async: bool) -> None:
        self._factory, self._runner, self.is_async = factory, runner, is_async

    def open(self, **options: Any) -> Session:
        create = self._factory.create_session_manager_async if self.is_async else self._factory.create_session_manager
        self.manager = self.run(create, "s", **options)
        return self

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return self._runner.run(result) if asyncio.iscoroutine(result) else result

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self.run, getattr(self.manager, name))


def with_managers(
    values: Iterable[Any],
    factory: MongoDBSessionManagerFactory,
    runner: asyncio.Runner,
    some: Callable[[Iterable[Any], int], list[Any]],
) -> Iterator[tuple[Any, Session]]:
    """Yield each value with a session through one of the managers, and the next value with one through the other.

    Each run draws anew which manager comes first; `--full-adversity` yields each value with both.
    """
    for first in some((0, 1), 1):
        for number, value in enumerate(values, first):
            yield value, Session(factory, runner, bool(number % 2))


def apply(repository: MongoDBSessionRepository, session_id: str, changes: Iterable[Change]) -> dict[str, Any]:
    """Store recorded changes, as a manager does; return the errors of refused agents."""
    return repository._portal.call(repository._async._apply, session_id, changes)
