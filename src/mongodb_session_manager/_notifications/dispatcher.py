"""What hooks leave behind to be delivered: in the background, in order, again after a failure, and never unbounded."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, deque
from contextlib import suppress
from contextvars import Context

from .._io.loop import Lock
from .._io.portal import Portal
from ..errors import NotificationError
from .notification import Notification, Source, give_up, names_of

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000
"""Notifications that may wait in a process."""

MAX_WAITING_BYTES = 64 * 1024 * 1024
"""Bytes of messages that may wait in a process."""

_WORKERS = 16
_SHARE = 6  # of the workers, for notifications of one name: what hangs for one receiver leaves room for the others
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0


def _is_worth_retrying(notification: Notification, error: BaseException) -> bool:
    try:
        return isinstance(error, Exception) and bool(notification.policy.is_worth_retrying(error))
    except BaseException as failure:  # also SystemExit, which would end the event loop
        logger.error("event=<%r>, error=<%s> | retry_on failed", notification.name, type(failure).__name__)
        return False


def _give_up_on_loop(notification: Notification, error: BaseException) -> None:
    try:
        give_up(notification, error)
    except BaseException as failure:  # SystemExit of a user's on_error would end the event loop
        logger.error("event=<%r>, error=<%s> | on_error failed", notification.name, type(failure).__name__)


class Dispatcher:
    """Delivers notifications on the event loop of `portal`, those of one session one after the other.

    `submit` may be called from any thread. The rest runs on the loop, by a few workers that one task owns: `serve`,
    which ends when `aclose` says so. A worker takes a session whose turn it is, tries its oldest notification once,
    and lets go; a session that waits before the next try keeps no worker, and those of one name never keep all.
    """

    def __init__(
        self,
        portal: Portal,
        *,
        max_waiting: int = MAX_WAITING,
        max_bytes: int = MAX_WAITING_BYTES,
        workers: int = _WORKERS,
    ) -> None:
        self.portal = portal
        self._max_waiting, self._max_bytes, self._workers = max_waiting, max_bytes, workers
        self._lock = Lock()  # over everything that submit touches
        self._lanes: dict[str, deque[Notification]] = {}
        self._waiting = self._bytes = self._submitted = 0
        self._warn_at = self._first_warning = max(1, max_waiting // 10)
        self._closing = False
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        self._pausing: dict[str, asyncio.TimerHandle] = {}
        self._busy: Counter[str] = Counter()
        self._queueing: dict[str, deque[str]] = {}
        self._settled, self._stop, self._ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def start(self) -> None:
        """Begin to deliver, in a context of nobody's: no delivery sees the request of whoever happened to be first."""
        Context().run(self.portal.submit, self.serve)

    def submit(self, notification: Notification) -> None:
        """Take a notification and return at once; one that cannot be kept is given up at once."""
        source, warning = notification.source, False
        with self._lock:
            source.submitted += 1
            refusal = self._refusal(notification)
            if refusal is None:
                self._submitted += 1
                notification.number = self._submitted
                source.waiting += 1
                self._waiting += 1
                self._bytes += notification.size
                lane = self._lanes.setdefault(notification.session_id, deque())
                lane.append(notification)
                if len(lane) == 1:
                    self.portal.loop.call_soon_threadsafe(self._ready.put_nowait, notification.session_id)
                if self._waiting >= self._warn_at:
                    self._warn_at *= 2
                    warning = True
            else:
                source.failed += 1
        if warning:
            logger.warning(
                "waiting=<%d>, oldest_wait=<%.1f s> | notifications come faster than they are delivered",
                self._waiting,
                self.oldest_wait(),
            )
        if refusal is not None:
            give_up(notification, NotificationError(refusal))

    def _refusal(self, notification: Notification) -> str | None:
        if self._closing:
            return "the process ends"
        if self._waiting >= self._max_waiting or self._bytes + notification.size > self._max_bytes:
            return f"{self._waiting} notifications wait already, {self._bytes} bytes"
        return None

    def oldest_wait(self, source: Source | None = None) -> float:
        """Return for how many seconds the oldest notification has been waiting."""
        with self._lock:
            waiting = (lane[0] for lane in self._lanes.values() if source is None or lane[0].source is source)
            oldest = min((notification.submitted_at for notification in waiting), default=None)
        return 0.0 if oldest is None else max(0.0, time.time() - oldest)

    def waiting(self, session_id: str | None = None, source: Source | None = None) -> list[Notification]:
        """Return what is neither delivered nor given up, of a session and a source or of all."""
        with self._lock:
            lanes = self._lanes.values() if session_id is None else [self._lanes.get(session_id, ())]
            return [entry for lane in lanes for entry in lane if source is None or entry.source is source]

    async def serve(self) -> None:
        """Deliver until closed."""
        try:
            # asyncio's own, because AnyIO's imports its backend on first use: on this loop, perhaps while forking.
            async with asyncio.TaskGroup() as group:
                workers = [group.create_task(self._work()) for _ in range(self._workers)]
                await self._stop.wait()
                for worker in workers:
                    worker.cancel()
        finally:
            self._ended.set()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            session_id = await self._ready.get()
            notification = self._lanes[session_id][0]
            if self._busy[notification.name] >= _SHARE:
                self._queueing.setdefault(notification.name, deque()).append(session_id)
                continue
            self._busy[notification.name] += 1
            try:
                pause = await self._try(notification)
            finally:
                self._free(notification.name)
            if pause is not None:
                self._pausing[session_id] = loop.call_later(pause, self._resume, session_id)
            elif self._take_out(notification):
                self._ready.put_nowait(session_id)
            del notification  # it may hold the last reference to a hook

    def _free(self, name: str) -> None:
        """Let the next session have the worker that notifications of one name have free now."""
        self._busy[name] -= 1
        if queueing := self._queueing.get(name):
            self._ready.put_nowait(queueing.popleft())
        else:
            self._queueing.pop(name, None)
        if not self._busy[name]:
            del self._busy[name]

    def _resume(self, session_id: str) -> None:
        del self._pausing[session_id]
        self._ready.put_nowait(session_id)

    async def _try(self, notification: Notification) -> float | None:
        """Try a delivery once; return after how many seconds it is to be tried again, if it is."""
        notification.tries += 1
        policy, source = notification.policy, notification.source
        try:
            async with asyncio.timeout(policy.time_limit):
                await notification.deliver()
        except BaseException as error:  # whatever a delivery raises, it ends no worker
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            if notification.tries < policy.max_tries and _is_worth_retrying(notification, error):
                with self._lock:
                    source.retried += 1
                longest: float = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (notification.tries - 1))
                pause = longest * random.uniform(0.5, 1.0)
                logger.debug(
                    "event=<%r>, tries=<%d>, error=<%s>, pause=<%.2f s> | trying again",
                    notification.name,
                    notification.tries,
                    type(error).__name__,
                    pause,
                )
                return pause
            with self._lock:
                source.failed += 1
            _give_up_on_loop(notification, error)
        else:
            with self._lock:
                source.delivered += 1
        return None

    def _take_out(self, notification: Notification) -> bool:
        """Remove the oldest notification of a session; return whether there is a next one."""
        with self._lock:
            lane = self._lanes[notification.session_id]
            lane.popleft()
            if not lane:
                del self._lanes[notification.session_id]
            self._waiting -= 1
            self._bytes -= notification.size
            notification.source.waiting -= 1
            if self._waiting < self._first_warning // 2:
                self._warn_at = self._first_warning
        self._settled.set()
        return bool(lane)

    async def drain(self, seconds: float, session_id: str | None = None, source: Source | None = None) -> None:
        """Wait until what was submitted before is settled, of a session, of a source, or all; so long at most.

        What pauses before its next try has it now.
        """
        last = self._submitted

        def is_pending() -> bool:
            if session_id is not None:
                lane = self._lanes.get(session_id)
                return lane is not None and lane[0].number <= last
            return bool(source.waiting if source is not None else self._waiting)

        for paused in list(self._pausing) if session_id is None else [session_id] * (session_id in self._pausing):
            self._pausing[paused].cancel()
            self._resume(paused)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while is_pending():
                    self._settled.clear()
                    await self._settled.wait()

    async def aclose(self, seconds: float) -> None:
        """Take no more, deliver what waits within so many seconds, give up the rest, and end the workers."""
        with self._lock:
            self._closing = True
        if seconds > 0:
            await self.drain(seconds)
        self._stop.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await self._ended.wait()
        for pausing in self._pausing.values():
            pausing.cancel()
        for notification in (left := self.waiting()):
            self._take_out(notification)
            with self._lock:
                notification.source.failed += 1
            _give_up_on_loop(notification, NotificationError("the process ended before it was delivered"))
        if left:
            logger.error("undelivered=<%r> | notifications were lost at the end of the process", names_of(left))


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
