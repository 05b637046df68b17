"""The dispatcher: a bounded queue of notifications, delivered in order per session, with retries."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from .._io.loop import Lock
from .._io.portal import Portal
from ..errors import NotificationError
from .notification import Notification, Source, give_up, names_of

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_WAITING = 10_000
"""The maximum number of notifications in the queue."""

MAX_WAITING_BYTES = 64 * 1024 * 1024
"""The maximum number of bytes of messages in the queue."""

_WORKERS = 16
"""The maximum number of concurrent deliveries."""

_WORKERS_PER_NAME = 6
"""The maximum number of concurrent deliveries with the same name, so that a slow receiver leaves workers for others."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0  # seconds between two tries
_CANCELLATION = 0.5  # seconds that cancelled deliveries have to end


class Dispatcher:
    """Delivers notifications on the event loop of `portal`, in the order of submission per session.

    `submit` can be called from any thread; everything else runs on the loop. Each session with pending notifications
    has a task, which delivers them one after the other. A task that pauses before a retry occupies no worker.
    """

    def __init__(self, portal: Portal, *, max_waiting: int = MAX_WAITING, max_bytes: int = MAX_WAITING_BYTES) -> None:
        self.portal = portal
        self._max_waiting, self._max_bytes = max_waiting, max_bytes
        self._lock = Lock()  # guards the queue and the counters, which `submit` changes on other threads
        self._queue: dict[str, deque[Notification]] = {}
        self._waiting = self._bytes = self._submitted = 0
        self._warn_at = self._first_warning = max(1, max_waiting // 10)
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._pausing: dict[str, asyncio.Event] = {}
        self._workers = asyncio.Semaphore(_WORKERS)
        self._workers_of_name: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._settled = asyncio.Event()

    def submit(self, notification: Notification) -> None:
        """Queue a notification and return at once. If the queue is full or closed, drop the notification."""
        source, warning = notification.source, False
        with self._lock:
            source.submitted += 1
            if (refusal := self._refusal(notification)) is None:
                self._enqueue(notification)
                if warning := self._waiting >= self._warn_at:
                    self._warn_at *= 2
            else:
                source.failed += 1
        if warning:
            logger.warning(
                "waiting=<%d>, oldest_wait=<%.1f s> | the notification queue is filling up",
                self._waiting,
                self.oldest_wait(),
            )
        if refusal is not None:
            give_up(notification, NotificationError(refusal))

    def _refusal(self, notification: Notification) -> str | None:
        if self._closing:
            return "the process is exiting"
        if self._waiting >= self._max_waiting or self._bytes + notification.size > self._max_bytes:
            return f"the notification queue is full: {self._waiting} notifications, {self._bytes} bytes"
        return None

    def _enqueue(self, notification: Notification) -> None:
        self._submitted += 1
        notification.number = self._submitted
        notification.source.waiting += 1
        self._waiting += 1
        self._bytes += notification.size
        session_id = notification.session_id
        if session_id in self._queue:
            self._queue[session_id].append(notification)
        else:
            self._queue[session_id] = deque([notification])
            self.portal.loop.call_soon_threadsafe(self._start, session_id)

    def oldest_wait(self, source: Source | None = None) -> float:
        with self._lock:
            first = [pending[0] for pending in self._queue.values()]
        now = time.time()
        return max([0.0, *(now - each.submitted_at for each in first if source in (None, each.source))])

    def waiting(self, session_id: str | None = None, source: Source | None = None) -> list[Notification]:
        with self._lock:
            queues = self._queue.values() if session_id is None else [self._queue.get(session_id, ())]
            return [entry for pending in queues for entry in pending if source is None or entry.source is source]

    def _start(self, session_id: str) -> None:
        # An empty context: a delivery must not see the context variables of the request that submitted it.
        task = self.portal.loop.create_task(self._deliver_all(session_id), context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver_all(self, session_id: str) -> None:
        pending = self._queue[session_id]
        while pending:
            notification = pending[0]
            workers = self._workers_of_name.setdefault(notification.name, asyncio.Semaphore(_WORKERS_PER_NAME))
            async with workers, self._workers:
                pause = await self._try(notification)
            if pause is None:
                self._remove_oldest(session_id)
            else:
                await self._pause(session_id, pause)
            del notification, workers  # the notification can hold the last reference to a hook

    async def _try(self, notification: Notification) -> float | None:
        """Try to deliver a notification; return the pause in seconds before the next try, `None` if it is settled."""
        notification.tries += 1
        policy, source = notification.policy, notification.source
        try:
            async with asyncio.timeout(policy.time_limit):
                await notification.deliver()
        except BaseException as error:  # also SystemExit, which would end the event loop
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            if notification.tries < policy.max_tries and _is_worth_retrying(notification, error):
                with self._lock:
                    source.retried += 1
                return _pause_before_retry(notification, error)
            with self._lock:
                source.failed += 1
            _guarded(notification.name, "on_error", give_up, notification, error)
        else:
            with self._lock:
                source.delivered += 1
        return None

    async def _pause(self, session_id: str, seconds: float) -> None:
        ended = self._pausing[session_id] = asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await ended.wait()
        del self._pausing[session_id]

    def _remove_oldest(self, session_id: str) -> None:
        with self._lock:
            pending = self._queue[session_id]
            notification = pending.popleft()
            if not pending:
                del self._queue[session_id]
            self._waiting -= 1
            self._bytes -= notification.size
            notification.source.waiting -= 1
            if self._waiting < self._first_warning // 2:
                self._warn_at = self._first_warning
        self._settled.set()

    async def drain(self, seconds: float, session_id: str | None = None, source: Source | None = None) -> None:
        """Wait until the pending notifications of a session, a source or all are settled, at most `seconds`.

        Pauses before a retry are cut short.
        """
        last = self._submitted

        def is_pending() -> bool:
            if session_id is not None:
                pending = self._queue.get(session_id)
                return pending is not None and pending[0].number <= last
            return bool(source.waiting if source is not None else self._waiting)

        for paused, ended in self._pausing.items():
            if session_id in (None, paused):
                ended.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while is_pending():
                    self._settled.clear()
                    await self._settled.wait()

    async def aclose(self, seconds: float) -> None:
        """Refuse new notifications, deliver the pending ones within `seconds`, and drop the rest."""
        with self._lock:
            self._closing = True
        if seconds > 0:
            await self.drain(seconds)
        if tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_CANCELLATION)
        for notification in (left := self.waiting()):
            self._remove_oldest(notification.session_id)
            with self._lock:
                notification.source.failed += 1
            error = NotificationError("the process exited before the notification was delivered")
            _guarded(notification.name, "on_error", give_up, notification, error)
        if left:
            logger.error("undelivered=<%r> | notifications were lost at process exit", names_of(left))


def _is_worth_retrying(notification: Notification, error: BaseException) -> bool:
    if not isinstance(error, Exception):
        return False
    return bool(_guarded(notification.name, "retry_on", notification.policy.is_worth_retrying, error))


def _guarded(event_name: str, callback: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Call a user's callback, which can raise any exception: SystemExit would end the event loop."""
    try:
        return call(*args, **kwargs)
    except BaseException as failure:
        logger.error("event=<%r>, error=<%s> | %s failed", event_name, type(failure).__name__, callback)
        return None


def _pause_before_retry(notification: Notification, error: BaseException) -> float:
    """Return the back-off in seconds: exponential, with jitter."""
    longest: float = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (notification.tries - 1))
    pause = longest * random.uniform(0.5, 1.0)
    logger.debug(
        "event=<%r>, tries=<%d>, error=<%s>, pause=<%.2f s> | retrying after a pause",
        notification.name,
        notification.tries,
        type(error).__name__,
        pause,
    )
    return pause


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
