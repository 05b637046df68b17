"""The I/O loop: one event loop on one daemon thread, and the ways to reach it. The only module that knows threads.

An asynchronous MongoDB client works on the event loop it was first used on and on no other. Strands runs every
synchronous `agent(...)` on a new loop, and a web server has loops of its own. So the client lives on one loop, and
whoever is elsewhere hops to it through a `Portal`.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from enum import IntEnum
from functools import partial
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from ..errors import EventLoopError, MongoDBSessionError, raise_alone

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_STOPPED = "the event loop that the MongoDB client belongs to was stopped"

_GONE = (
    "the event loop that the MongoDB client belongs to does not run: create the client on a loop that lives as long "
    "as its sessions, or pass connection_string and let the library keep a loop of its own"
)

_BLOCKED = (
    "the event loop that the MongoDB client belongs to takes no calls: something blocks it, perhaps a synchronous "
    'call on it that waits for this one, like agent("..."); on that loop await the asynchronous twin '
    "(agent.invoke_async, agent.stream_async), or pass connection_string and let the library keep a loop of its own"
)

_GREENLETS = (
    "gevent has patched the module {module!r}: the library needs real threads, and greenlets have taken their place; "
    "use threaded or asynchronous workers (gunicorn -k gthread, uvicorn) instead of gevent's"
)

PATIENCE = 10.0
"""Seconds within which an event loop must start a call."""

_NO_PATIENCE = 0.5
"""The same for a loop that is known to be blocked."""

EXIT_TIMEOUT = 5.0
"""Seconds that the end of the interpreter may wait for writes under way."""

_EXIT_GRACE = 1.0
"""Seconds on top of it for whoever finds no time left: to say so, and to let go of its sockets."""

_POLL = 0.005  # seconds

_NAME = "mongodb-session-manager"
"""The prefix of the names of the library's threads."""

_IDLE = concurrent.futures.thread._worker.__code__
"""The innermost code of an executor's thread that waits for work."""

Lock = threading.Lock


class ThreadPool(ThreadPoolExecutor):
    """Threads for the I/O of one client."""

    def __init__(self, size: int) -> None:
        super().__init__(size, _NAME)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs on the calling thread, if any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


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
        """Start `function(*args, **kwargs)` on the loop and return at once; calls start in the order of submission.

        Raises:
            EventLoopError: The loop is closed or stopped.
        """
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
            self._keep(self.loop.create_task(_carry_out(work, future)))
            self._under_way.discard(future)  # it counts once

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._under_way.add(task)  # the loop itself has only a weak reference
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, because the caller may have been cancelled

    @property
    def _patience(self) -> float:
        return _NO_PATIENCE if self._blocked else PATIENCE

    def _give_up(self, future: Future[Any]) -> None:
        """Cancel a call that the loop has not started."""
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
            future.exception(self._patience)
        except TimeoutError:
            self._give_up(future)
        except CancelledError:
            pass
        if future.cancelled():
            raise EventLoopError(_BLOCKED)
        return future.result()

    async def run(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function(*args, **kwargs)` on the loop while the caller's own loop goes on.

        Raises:
            EventLoopError: Something blocks the loop.
        """
        caller = asyncio.get_running_loop()
        if caller is self.loop:  # as with a client of the caller's own: nowhere to go
            task = caller.create_task(function(*args, **kwargs))
            self._keep(task)
            return await asyncio.shield(task)
        outcome: asyncio.Future[T] = caller.create_future()

        def hand_over(finished: Future[T]) -> None:
            with suppress(RuntimeError):  # the caller's loop is closed: nobody waits any more
                caller.call_soon_threadsafe(_copy_outcome, finished, outcome)

        future = self.submit(function, *args, **kwargs)
        future.add_done_callback(hand_over)
        patience = caller.call_later(self._patience, self._give_up, future)
        try:
            return await outcome
        finally:
            patience.cancel()

    def drain(self, timeout: float) -> int:
        """Block until what was submitted is done, at most `timeout` seconds; return how many calls are not."""
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
        self._is_ending = False
        self._thread = threading.Thread(target=self._serve, args=(loop,), name=f"{_NAME}-io", daemon=True)
        # The loop takes calls before it runs, so nobody has to wait for the thread.
        self.portal = Portal(loop, self._thread.is_alive)
        self._thread.start()

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            while not self._is_ending and not loop.is_closed():
                try:
                    loop.run_forever()
                except (SystemExit, KeyboardInterrupt) as error:
                    # A task or callback of a hook raised it; the other sessions of the process must not end.
                    logger.error("error=<%s> | raised on the I/O loop, which goes on", type(error).__name__)
            if not loop.is_closed():
                loop.run_until_complete(_cancel_the_rest())
        finally:
            loop.close()

    def stop(self, timeout: float) -> None:
        self._is_ending = True
        with suppress(RuntimeError):  # it has ended already
            self.portal.loop.call_soon_threadsafe(self.portal.loop.stop)
        self._thread.join(timeout)


async def _cancel_the_rest() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


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
        EventLoopError: The interpreter is shutting down, or gevent has replaced threads by greenlets.
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
        if _thread is None or not _thread.portal.is_alive():
            _refuse_greenlets()
            _thread = _IOThread()
        return _thread.portal


def _refuse_greenlets() -> None:
    patching = sys.modules.get("gevent.monkey")
    for module in ("threading", "select", "queue", "socket"):
        if patching is not None and patching.is_module_patched(module):
            raise EventLoopError(_GREENLETS.format(module=module))


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
    try:
        _await_other_threads()
    finally:  # also if the user interrupts
        _close_everything()


def _await_other_threads() -> None:
    """Wait for the threads that the interpreter waits for: their sessions must stay open until they end.

    The interpreter itself waits for them only after it has shut down the executors, which Motor and synchronous agents
    need. A thread that waits for the main thread is not waited for: neither would ever end.
    """
    idle = 0
    while idle < 2:  # a worker between two pieces of work looks idle
        idle = 0 if any(map(_is_working, threading.enumerate())) else idle + 1
        time.sleep(_POLL)


def _is_working(thread: threading.Thread) -> bool:
    if thread.daemon or thread in (threading.main_thread(), threading.current_thread()):
        return False
    if thread.name.startswith(_NAME) or type(thread).__name__ == "_ExecutorManagerThread":
        return False  # the library's threads and those of process pools end later
    frame = sys._current_frames().get(thread.ident or 0)
    # Executors end their workers later, too: an idle worker does not count.
    return frame is not None and frame.f_code is not _IDLE and not any(map(_waits_for_main_thread, _stack(frame)))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _waits_for_main_thread(frame: FrameType) -> bool:
    """Return whether a function waits for the end of the main thread, which comes only after `_finish`.

    It joins the main thread, or it asks for it and whether it lives.
    """
    if frame.f_code is threading.Thread.join.__code__:
        return frame.f_locals.get("self") is threading.main_thread()
    return {"main_thread", "is_alive"} <= set(frame.f_code.co_names)


def _close_everything() -> None:
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
                # The text of a foreign error can quote content.
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
