"""The I/O loop: one event loop on one daemon thread, and the ways to reach it. The only module that knows threads.

An asynchronous MongoDB client works on the event loop it was first used on and on no other. Strands runs every
synchronous `agent(...)` on a new loop, and a web server has loops of its own. So the client lives on one loop, and
whoever is elsewhere hops to it through a `Portal`.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from enum import IntEnum
from typing import Any, ParamSpec, TypeVar

from .errors import EventLoopError, MongoDBSessionError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_STOPPED = "the event loop that the MongoDB client belongs to was stopped"

EXIT_TIMEOUT = 5.0
"""Seconds that the end of the interpreter may wait for writes under way."""

_EXIT_GRACE = 1.0
"""Seconds on top of it for whoever finds no time left: to say so, and to let go of its sockets."""

_POLL = 0.005  # seconds

Lock = threading.Lock


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs on the calling thread, if any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Portal:
    """Runs coroutine functions on one event loop, for callers on any thread and any loop.

    What was handed in runs to its end, whatever becomes of the caller: a cancelled request does not cancel the write
    it had begun. Context variables of the caller are visible to the coroutine.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, is_alive: Callable[[], bool] | None = None) -> None:
        self.loop = loop
        self._is_alive = is_alive or loop.is_running
        self._under_way: set[Future[Any] | asyncio.Task[Any]] = set()

    def submit(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start `function(*args, **kwargs)` on the loop and return at once; calls start in the order of submission.

        Raises:
            EventLoopError: The loop is closed or stopped.
        """
        if not self._is_alive():
            raise EventLoopError(
                "the event loop that the MongoDB client belongs to does not run: create the client on a loop that "
                "lives as long as its sessions, or pass connection_string and let the library keep a loop of its own"
            )
        future = asyncio.run_coroutine_threadsafe(function(*args, **kwargs), self.loop)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def call(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function(*args, **kwargs)` on the loop and block the calling thread until it is done.

        Raises:
            EventLoopError: The calling thread is the one that runs the loop, so that waiting would never end.
        """
        if running_loop() is self.loop:
            raise EventLoopError(
                "a synchronous call would wait for the very event loop it blocks: use the asynchronous twin "
                "(AsyncMongoDBSessionManager, create_session_manager_async, ..._async) on this loop"
            )
        future = self.submit(function, *args, **kwargs)
        try:
            return future.result()
        except CancelledError:
            raise EventLoopError(_STOPPED) from None

    async def run(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function(*args, **kwargs)` on the loop while the caller's own loop goes on."""
        caller = asyncio.get_running_loop()
        if caller is self.loop:  # as with a client of the caller's own: nowhere to go
            task = caller.create_task(function(*args, **kwargs))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            return await asyncio.shield(task)
        outcome: asyncio.Future[T] = caller.create_future()

        def hand_over(finished: Future[T]) -> None:
            with suppress(RuntimeError):  # the caller's loop is closed: nobody waits any more
                caller.call_soon_threadsafe(_copy_outcome, finished, outcome)

        self.submit(function, *args, **kwargs).add_done_callback(hand_over)
        return await outcome

    async def reach(self, patience: float) -> None:
        """Return once the loop takes calls.

        Raises:
            EventLoopError: It took none for `patience` seconds.
        """
        try:
            await asyncio.wait_for(asyncio.wrap_future(self.submit(_nothing)), patience)
        except TimeoutError:
            raise EventLoopError(
                f"the event loop that the MongoDB client belongs to has taken no call for {patience:g} s: something "
                "blocks it, maybe the very call that waits for this one; pass connection_string and let the library "
                "keep a loop of its own"
            ) from None

    def drain(self, timeout: float) -> int:
        """Block until what was submitted is done, at most `timeout` seconds; return how many calls are not."""
        end = time.monotonic() + timeout
        while self._under_way and time.monotonic() < end:
            time.sleep(_POLL)
        return len(self._under_way)


async def _nothing() -> None: ...


def _copy_outcome(finished: Future[T], outcome: asyncio.Future[T]) -> None:
    if outcome.done():
        return
    if finished.cancelled():
        outcome.set_exception(EventLoopError(_STOPPED))
    elif (error := finished.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(finished.result())


class ExitOrder(IntEnum):
    """What the end of the interpreter closes first: the conversation, then what is told of it, then the ways out."""

    SESSIONS = 0
    NOTIFICATIONS = 1
    CONNECTIONS = 2


CloseAtExit = Callable[[float], Coroutine[Any, Any, None]]
"""Finishes what is pending within so many seconds; what is closed after it is still open."""


class _IOThread:
    """The process's event-loop thread: started by its first user, ended with the interpreter."""

    def __init__(self) -> None:
        loop = asyncio.new_event_loop()
        name = "mongodb-session-manager-io"
        self._thread = threading.Thread(target=self._serve, args=(loop,), name=name, daemon=True)
        # The loop takes calls before it runs, so nobody has to wait for the thread.
        self.portal = Portal(loop, self._thread.is_alive)
        self._thread.start()

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def stop(self, timeout: float) -> None:
        self.portal.loop.call_soon_threadsafe(self.portal.loop.stop)
        self._thread.join(timeout)


# Reentrant, because the garbage collector may close something while its thread holds the lock.
_lock = threading.RLock()
_thread: _IOThread | None = None
_exiting = False
_exit_registered = False
_serial = itertools.count()
_open_at_exit: dict[tuple[ExitOrder, int], weakref.WeakMethod[CloseAtExit]] = {}


def io_portal() -> Portal:
    """Return the portal to the library's own event loop, whose thread the first call starts.

    Raises:
        EventLoopError: The interpreter is shutting down.
    """
    global _thread, _exit_registered, _exiting
    with _lock:
        if not _exit_registered and not _exiting:
            # Executors refuse work as soon as the threading module begins to shut down, before `atexit` runs. Motor
            # needs its executor to write, so the last flush has to come earlier still.
            try:
                getattr(threading, "_register_atexit", atexit.register)(_finish)
            except RuntimeError:
                _exiting = True
            _exit_registered = True
        if _exiting:
            raise EventLoopError("the interpreter is shutting down: close sessions before the main thread ends")
        if _thread is None:
            _thread = _IOThread()
        return _thread.portal


def portal_to(loop: asyncio.AbstractEventLoop) -> Portal:
    """Return a portal to `loop`, which may be the library's own or anybody's."""
    with _lock:
        return _thread.portal if _thread is not None and _thread.portal.loop is loop else Portal(loop)


def close_at_exit(close: CloseAtExit, loop: asyncio.AbstractEventLoop, order: ExitOrder) -> None:
    """Have a method called, in its turn, when the interpreter ends, unless its object was collected before.

    Only what lives on the library's own loop is closed: nobody else's loop runs as late.
    """
    if _thread is not None and _thread.portal.loop is loop:
        key = order, -next(_serial)
        _open_at_exit[key] = weakref.WeakMethod(close, lambda _: _open_at_exit.pop(key, None))


def _finish() -> None:
    global _exiting
    with _lock:
        _exiting = True
        thread = _thread
    if thread is None:
        return
    end = time.monotonic() + EXIT_TIMEOUT
    with suppress(BaseException):
        thread.portal.submit(_close_all).result(EXIT_TIMEOUT + _EXIT_GRACE)
    if unfinished := thread.portal.drain(max(0.0, end - time.monotonic())):
        logger.warning("unfinished=<%d> | the interpreter ends before these calls to MongoDB did", unfinished)
    thread.stop(max(0.1, end - time.monotonic()))
    _open_at_exit.clear()


async def _close_all() -> None:
    """Close what is open in its order, the youngest first; what finds no time left still hears of the end."""
    end = time.monotonic() + EXIT_TIMEOUT
    for order in ExitOrder:  # one after the other, because closing the earlier may open what is later
        for key in sorted(key for key in list(_open_at_exit) if key[0] == order):
            reference = _open_at_exit.pop(key, None)
            close = None if reference is None else reference()
            if close is None:
                continue
            left = max(0.0, end - time.monotonic())
            try:
                async with asyncio.timeout(left + _EXIT_GRACE / 2):
                    await close(left)
            except Exception as error:
                # The text of another error can quote content.
                reason = str(error) if isinstance(error, MongoDBSessionError) else type(error).__name__
                logger.warning("close=<%r>, error=<%s> | not closed properly at exit", close, reason)


def _forget_parent() -> None:
    """Start afresh in a forked child: threads do not survive a fork, and the parent's sessions are the parent's."""
    global _lock, _thread
    _lock = threading.RLock()
    _thread = None
    _open_at_exit.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
