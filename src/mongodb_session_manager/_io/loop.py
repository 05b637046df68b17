"""The library's own event loop on a daemon thread, and the cleanup at interpreter exit.

The only module that starts threads.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import IntEnum
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from ..errors import EventLoopError, MongoDBSessionError
from .portal import Portal

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_GREENLETS = (
    "gevent has patched the module {module!r}: the library needs real threads, but they were replaced by greenlets; "
    "use threaded or asynchronous workers (gunicorn -k gthread, uvicorn) instead of gevent's"
)

EXIT_TIMEOUT = 5.0
"""The maximum number of seconds that interpreter exit waits for writes in progress."""

_EXIT_GRACE = 1.0
"""Further seconds to log the remaining work and to close the sockets."""

_POLL = 0.005  # seconds

_THREAD_NAMES = "mongodb-session-manager"
"""The prefix of the names of the library's threads."""

_IDLE = concurrent.futures.thread._worker.__code__
"""The code object in which an idle executor thread waits."""

Lock = threading.Lock


class ThreadPool(ThreadPoolExecutor):
    def __init__(self, size: int) -> None:
        super().__init__(size, _THREAD_NAMES)


class ExitOrder(IntEnum):
    """The order in which objects are closed at interpreter exit."""

    SESSIONS = 0
    NOTIFICATIONS = 1
    CONNECTIONS = 2


CloseAtExit = Callable[[float], Coroutine[Any, Any, None]]
"""A method that finishes pending work within a number of seconds; objects later in `ExitOrder` are still open."""


class _IOThread:
    """The process's event-loop thread: started by its first user, ended with the interpreter."""

    def __init__(self) -> None:
        loop = asyncio.new_event_loop()
        self._is_ending = False
        self._thread = threading.Thread(target=self._serve, args=(loop,), name=f"{_THREAD_NAMES}-io", daemon=True)
        # The loop accepts calls before it runs, so callers need not wait for the thread.
        self.portal = Portal(loop, self._thread.is_alive)
        self._thread.start()

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            while not self._is_ending and not loop.is_closed():
                try:
                    loop.run_forever()
                except (SystemExit, KeyboardInterrupt) as error:
                    # A hook's task or callback raised it: the other sessions of the process must continue.
                    logger.error("error=<%s> | raised on the I/O loop, which continues", type(error).__name__)
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


# Reentrant, because the garbage collector can close an object while its thread holds the lock.
_lock = threading.RLock()
_thread: _IOThread | None = None
_exiting = False
_exit_registered = False
_serial = itertools.count()
_open_at_exit: dict[tuple[ExitOrder, int], weakref.WeakMethod[CloseAtExit]] = {}


def io_portal() -> Portal:
    """Return the portal to the library's own event loop, whose thread the first call starts.

    Raises:
        EventLoopError: The interpreter is shutting down, or gevent has replaced threads with greenlets.
    """
    global _thread, _exit_registered, _exiting
    with _lock:
        if not _exit_registered and not _exiting:
            # Executors refuse work as soon as the threading module begins to shut down, before `atexit` runs. Motor
            # needs its executor to write, so the last flush must come before that.
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
    with _lock:
        return _thread.portal if _thread is not None and _thread.portal.loop is loop else Portal(loop)


def close_at_exit(close: CloseAtExit, loop: asyncio.AbstractEventLoop, order: ExitOrder) -> None:
    """Register a method that is called at interpreter exit. Only the library's own loop runs that late."""
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
    need. Threads that wait for the main thread are left out, because waiting for them would be a deadlock.
    """
    idle = 0
    while idle < 2:  # a worker between two pieces of work looks idle
        idle = 0 if any(map(_is_working, threading.enumerate())) else idle + 1
        time.sleep(_POLL)


def _is_working(thread: threading.Thread) -> bool:
    if thread.daemon or thread in (threading.main_thread(), threading.current_thread()):
        return False
    if thread.name.startswith(_THREAD_NAMES) or type(thread).__name__ == "_ExecutorManagerThread":
        return False  # the library's threads and those of process pools end later
    frame = sys._current_frames().get(thread.ident or 0)
    # An idle worker is not working: its executor stops it later.
    return frame is not None and frame.f_code is not _IDLE and not any(map(_waits_for_main_thread, _stack(frame)))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _waits_for_main_thread(frame: FrameType) -> bool:
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
    """Close everything in order, the newest objects first; after the timeout, `close` is called with 0 seconds."""
    end = time.monotonic() + EXIT_TIMEOUT
    for order in ExitOrder:  # one after the other, because closing the first can open the next
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
                # The text of an error from outside the library can quote content.
                reason = str(error) if isinstance(error, MongoDBSessionError) else type(error).__name__
                logger.warning("close=<%r>, error=<%s> | not closed properly at exit", close, reason)


def _forget_parent() -> None:
    """Reset the state in a forked child: threads do not survive a fork, and the sessions belong to the parent."""
    global _lock, _thread
    _lock = threading.RLock()
    _thread = None
    _open_at_exit.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
