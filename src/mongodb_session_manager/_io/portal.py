"""Calling coroutine functions on an event loop from other threads and other event loops.

An asynchronous MongoDB client works on the event loop it was first used on and on no other. Strands runs every
synchronous `agent(...)` on a new loop, and a web server has its own loops. So a client lives on one loop, and callers
elsewhere reach it through a `Portal`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from threading import get_ident
from typing import Any, ParamSpec, TypeVar

from ..errors import EventLoopError, raise_alone

P = ParamSpec("P")
T = TypeVar("T")

_STOPPED = "the event loop that the MongoDB client belongs to was stopped"

_GONE = (
    "the event loop that the MongoDB client belongs to does not run: create the client on a loop that lives as long "
    "as its sessions, or pass connection_string and let the library run its own loop"
)

_BLOCKED = (
    "the event loop that the MongoDB client belongs to takes no calls: something blocks it, perhaps a synchronous "
    'call on it that waits for this one, like agent("..."); on that loop await the asynchronous twin '
    "(agent.invoke_async, agent.stream_async), or pass connection_string and let the library run its own loop"
)

START_TIMEOUT = 10.0
"""Seconds within which an event loop must start a call."""

_BLOCKED_START_TIMEOUT = 0.5
"""The same for a loop that is known to be blocked."""

_POLL = 0.005  # seconds


def running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def running_thread() -> int:
    """Return the identity of the calling thread."""
    return get_ident()


class Portal:
    """Runs coroutine functions on one event loop, for callers on any thread and any loop.

    Work that has started runs to its end even if the caller is cancelled: a cancelled request does not cancel its
    write. Context variables of the caller are visible to the coroutine. Every exception of the coroutine, including
    `SystemExit`, reaches the caller and not the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, is_alive: Callable[[], bool] | None = None) -> None:
        self.loop = loop
        self.is_alive = is_alive or loop.is_running
        self._under_way: set[Future[Any] | asyncio.Task[Any]] = set()
        self._blocked = False

    def submit(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start `function(*args, **kwargs)` on the loop and return at once; calls start in the order of submission."""
        if not self.is_alive():
            raise EventLoopError(_GONE)
        future: Future[T] = Future()
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        try:
            self.loop.call_soon_threadsafe(self._begin, future, partial(function, *args, **kwargs))
        except RuntimeError:  # closed since
            future.cancel()
            raise_alone(EventLoopError(_GONE))
        return future

    def _begin(self, future: Future[T], work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._blocked = False
        if future.set_running_or_notify_cancel():
            self._register(self.loop.create_task(_carry_out(work, future)))
            self._under_way.discard(future)  # it counts once

    def _register(self, task: asyncio.Task[Any]) -> None:
        self._under_way.add(task)  # the loop itself has only a weak reference
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, because the caller might have been cancelled

    @property
    def _start_timeout(self) -> float:
        return _BLOCKED_START_TIMEOUT if self._blocked else START_TIMEOUT

    def _cancel_unstarted(self, future: Future[Any]) -> None:
        if future.cancel():
            self._blocked = True

    def call(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function(*args, **kwargs)` on the loop and block the calling thread until it is done.

        Raises:
            EventLoopError: The calling thread is the one that runs the loop, so that waiting would never end, or
                something else blocks the loop.
        """
        if running_loop() is self.loop:
            raise EventLoopError(
                "a synchronous call would wait for the very event loop it blocks: use the asynchronous twin "
                "(AsyncMongoDBSessionManager, create_session_manager_async, ..._async) on this loop"
            )
        future = self.submit(function, *args, **kwargs)
        try:
            future.exception(self._start_timeout)
        except TimeoutError:
            self._cancel_unstarted(future)
        except CancelledError:
            pass
        if future.cancelled():
            raise EventLoopError(_BLOCKED)
        return future.result()

    async def run(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function(*args, **kwargs)` on the loop; the caller's own loop is not blocked."""
        caller = asyncio.get_running_loop()
        if caller is self.loop:  # a client that the caller owns
            task = caller.create_task(function(*args, **kwargs))
            self._register(task)
            return await asyncio.shield(task)
        outcome: asyncio.Future[T] = caller.create_future()

        def hand_over(finished: Future[T]) -> None:
            with suppress(RuntimeError):  # the caller's loop is closed
                caller.call_soon_threadsafe(_copy_outcome, finished, outcome)

        future = self.submit(function, *args, **kwargs)
        future.add_done_callback(hand_over)
        timeout = caller.call_later(self._start_timeout, self._cancel_unstarted, future)
        try:
            return await outcome
        finally:
            timeout.cancel()

    def drain(self, timeout: float) -> int:
        """Block until all submitted calls are done, at most `timeout` seconds; return the number of unfinished ones."""
        end = time.monotonic() + timeout
        while self._under_way and time.monotonic() < end:
            time.sleep(_POLL)
        return len(self._under_way)


async def _carry_out(work: Callable[[], Coroutine[Any, Any, T]], future: Future[T]) -> None:
    """Await `work()` and settle `future`. Raises nothing: a loop ends with a task that raises `SystemExit`."""
    try:
        result = await work()
    except BaseException as error:
        task = asyncio.current_task()
        is_stopped = isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling()
        future.set_exception(EventLoopError(_STOPPED) if is_stopped else error)
    else:
        future.set_result(result)
    finally:
        del future  # breaks a cycle: its error's traceback can hold this frame


def _copy_outcome(finished: Future[T], outcome: asyncio.Future[T]) -> None:
    if outcome.done():
        return
    if finished.cancelled():
        outcome.set_exception(EventLoopError(_BLOCKED))
    elif (error := finished.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(finished.result())
