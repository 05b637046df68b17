"""The leases that the managers of a connection hold, their heartbeats, and the queues of waiting managers."""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections import deque
from collections.abc import Hashable
from contextlib import suppress
from typing import Literal, TypedDict

from bson import ObjectId

from .._format.lease import Claim
from .._io.connection import Connection
from .._io.loop import portal_to
from ..errors import EventLoopError, MongoDBSessionError, SessionClosedError
from .store import SessionStore

logger = logging.getLogger(__name__)

_RELEASE_TIMEOUT = 2.0
"""The time limit of a separate command that releases a lease, in seconds; after that, the lease expires."""

_HEARTBEATS = 3
"""The number of heartbeats in the duration of a lease: a heartbeat renews a lease that no write has renewed."""

_RETRIES = 10
"""The number of retries of a failed heartbeat in the duration of a lease."""


class LeaseStats(TypedDict):
    """Counters of the leases of a connection since it was opened.

    Attributes:
        lease_waits: The number of times that a manager has waited for a lease.
        lease_wait_seconds: The total of the waiting times.
        leases_lost: The number of leases that managers have lost while they held them.
    """

    lease_waits: int
    lease_wait_seconds: float
    leases_lost: int


NO_LEASES: LeaseStats = {"lease_waits": 0, "lease_wait_seconds": 0.0, "leases_lost": 0}


class Caller:
    """The caller of an operation that can wait for a lease, and can be cancelled while it waits."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self.waiter: Waiter | None = None

    def cancel(self) -> None:
        """End the wait of the caller."""
        self.is_cancelled = True
        if self.waiter is not None:
            self.waiter.wake()

    def check(self, session_id: str) -> None:
        """Raise an error if the caller was cancelled; it ends the operation and reaches no caller."""
        if self.is_cancelled:
            raise SessionClosedError(f"session {session_id!r} was not opened: the caller was cancelled")


class Waiter:
    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.has_slept = False

    def wake(self) -> None:
        self._event.set()

    async def sleep(self, seconds: float) -> None:
        """Wait until `wake` is called, at most a number of seconds."""
        self.has_slept = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()


class Queue:
    """The waiting managers, oldest first, and the held leases of one session on one connection."""

    def __init__(self) -> None:
        self.waiters: deque[Waiter] = deque()
        self.held: set[Holding] = set()
        self.is_in_line = False

    def wake(self) -> None:
        """Wake the first waiter."""
        if self.waiters:
            self.waiters[0].wake()

    @property
    def is_held_here(self) -> bool:
        """Whether a manager of this connection holds the lease; its release wakes the first waiter."""
        return any(not holding.is_paused for holding in self.held)

    @property
    def is_empty(self) -> bool:
        return not self.waiters and not self.held


class Leases:
    """The leases of a connection in one process and on one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.id = ObjectId()
        self.pid = os.getpid()
        self.loop = loop
        self.queues: dict[Hashable, Queue] = {}
        self.waits, self.wait_seconds, self.lost = 0, 0.0, 0

    def queue(self, key: Hashable) -> Queue:
        return self.queues.setdefault(key, Queue())

    def tidy(self, key: Hashable) -> None:
        if (queue := self.queues.get(key)) is not None and queue.is_empty:
            del self.queues[key]

    async def close(self) -> None:
        """End all waits, and release the leases that are still held."""
        for queue in tuple(self.queues.values()):
            for waiter in queue.waiters:
                waiter.wake()
            for holding in tuple(queue.held):
                await holding.release()


of_connections: weakref.WeakKeyDictionary[Connection, Leases] = weakref.WeakKeyDictionary()


def leases_of(connection: Connection) -> Leases:
    """Return the leases of a connection; a forked child and a new event loop start without any."""
    leases, loop = of_connections.get(connection), asyncio.get_running_loop()
    if leases is None or leases.pid != os.getpid() or leases.loop is not loop:
        leases = of_connections[connection] = Leases(loop)
        connection.before_close = leases.close
    return leases


def lease_stats(connection: Connection) -> LeaseStats:
    """Return the counters of a connection. Any thread can call this function."""
    leases = of_connections.get(connection)
    if leases is None or leases.pid != os.getpid():
        return NO_LEASES.copy()
    return {
        "lease_waits": leases.waits,
        "lease_wait_seconds": leases.wait_seconds,
        "leases_lost": leases.lost,
    }


class Holding:
    """A held lease and its heartbeat. It has no reference to its manager, which can be garbage-collected."""

    def __init__(self, store: SessionStore, key: Hashable, session_id: str, claim: Claim, leases: Leases) -> None:
        self._store = store
        self._key = key
        self._session_id = session_id
        self._leases = leases
        self.claim = claim
        self.fence: int | None = None
        self.state: Literal["held", "free", "lost"] = "held"
        self.is_releasing = False
        self.is_paused = False
        self._timer: asyncio.TimerHandle | None = None
        self.renewed()

    @property
    def _interval(self) -> float:
        return self.claim.lease.total_seconds() / _HEARTBEATS

    def renewed(self) -> None:
        """Record that a statement has renewed the lease."""
        self.renewed_at = self._leases.loop.time()
        self._due = self.renewed_at + self._interval
        if self.state != "held" or self.is_paused:
            return
        self._leases.queue(self._key).held.add(self)
        if self._timer is None:
            self._timer = self._leases.loop.call_later(self._interval, self._beat)

    @property
    def has_expired(self) -> bool:
        """Whether another manager can have taken the lease, because its time has passed. Any thread can read it."""
        return self._leases.loop.time() >= self.renewed_at + self.claim.lease.total_seconds()

    def resume(self) -> None:
        """Resume the heartbeat: a further invocation begins. Any thread can call this method."""
        self.is_paused = False
        with suppress(RuntimeError):  # the loop is closed
            self._leases.loop.call_soon_threadsafe(self._resume)

    def _resume(self) -> None:
        if self.state != "held" or self.is_paused:
            return
        self._leases.queue(self._key).held.add(self)
        if self._timer is None:  # not at once: the first write of the invocation can renew it
            left = self._due - self._leases.loop.time()
            self._timer = self._leases.loop.call_later(max(left, self._interval / _RETRIES), self._beat)

    def end(self, state: Literal["free", "lost"]) -> None:
        """End the lease: it was released or lost."""
        if self.state == "lost" or self.state == state:
            return
        self.state = state
        self._leases.lost += state == "lost"
        self.let_expire()

    def let_expire(self) -> None:
        """Stop the heartbeat, and wake the first waiter of this connection."""
        self.is_paused = True
        self._stop_timer()
        queue = self._leases.queue(self._key)
        queue.held.discard(self)
        queue.wake()
        self._leases.tidy(self._key)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self) -> None:
        loop, connection = self._leases.loop, self._store.connection
        self._timer = None
        if self.state != "held" or self.is_paused or connection.closed:
            return
        if (left := self._due - loop.time()) > 0 or self.is_releasing:
            self._timer = loop.call_later(max(left, self._interval / _RETRIES), self._beat)
            return
        connection.start(self._renew())

    async def _renew(self) -> None:
        loop, connection = self._leases.loop, self._store.connection
        try:
            async with connection.operation():
                is_held = await self._store.sessions.update(self.claim.renewal(self._session_id, connection.now()))
        except MongoDBSessionError as error:
            logger.debug("session_id=<%r>, error=<%s> | lease not renewed", self._session_id, error)
            if self.state == "held" and self._timer is None:
                self._timer = loop.call_later(self._interval * _HEARTBEATS / _RETRIES, self._beat)
            return
        if self.state != "held":
            return
        if is_held or self.is_releasing:
            self.renewed()
            return
        logger.warning(
            "session_id=<%r> | lease lost: another manager has taken it, or the session was deleted", self._session_id
        )
        self.end("lost")

    async def release(self) -> None:
        """Release the lease with a separate command; if that fails, the lease expires."""
        if self.state != "held":
            return
        self.is_releasing = True
        self._stop_timer()
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT), self._store.connection.operation():
                await self._store.sessions.update(self.claim.release(self._session_id))
        except (MongoDBSessionError, TimeoutError) as error:
            logger.debug("session_id=<%r>, error=<%s> | lease not released; it expires", self._session_id, error)
        self.end("free")


def release_collected(holding: Holding, pid: int, loop: asyncio.AbstractEventLoop) -> None:
    """Release the lease of a manager that was garbage-collected without being closed."""
    if pid == os.getpid() and holding.state == "held" and loop.is_running():
        with suppress(EventLoopError):
            portal_to(loop).submit(holding.release)
