"""`Lease`: one manager at a time has its turn in a session. `_format.lease` describes the stored fields.

Opening takes the lease, each write renews it, and the last write of a turn releases it, without further commands. A
manager without the lease waits in a queue of its connection, in memory. The first waiter of the queue polls the server
and keeps the place of the connection in the stored line. A release on the same connection wakes the first waiter.
Everything here runs on the event loop of the connection, unless a docstring says otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import weakref
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from typing import Any, Literal

from .._format.documents import Document
from .._format.labels import guard
from .._format.layout import live_at
from .._format.lease import Claim, StoredLease
from .._format.malformed import MalformedField
from .._io.driver_errors import DuplicateKeyError
from .._io.drivers import find_and_modify
from ..errors import MongoDBSessionError, SessionBusyError, SessionClosedError, SessionConflictError
from .lease_queue import Caller, Holding, Queue, Waiter, leases_of, of_connections, release_collected
from .store import SessionStore

logger = logging.getLogger(__name__)

_PAUSES = (0.02, 0.2)
"""The first and the longest pause between two polls, in seconds; jitter shortens each by up to half."""

_CHECK = 0.5
"""Seconds after which the first waiter checks whether a manager of its connection still renews the lease, in memory."""

Mode = Literal["holds", "takes", "passes"]
"""The condition of a statement: its manager holds the lease, it takes the lease, or no other manager holds it."""


class Lease:
    """The lease of a manager.

    Args:
        store: The sessions.
        session_id: The session.
        waits: Whether the manager waits for a busy session; if not, it raises `SessionBusyError`.
        busy_timeout: The longest wait, in seconds.
        seconds: The time after which the lease expires if it is not renewed.
        owner: The owner of the session. The lease of another owner's session is neither taken nor awaited.
    """

    def __init__(
        self,
        store: SessionStore,
        session_id: str,
        waits: bool,
        busy_timeout: float,
        seconds: float,
        owner: str | None = None,
    ) -> None:
        self._store = store
        self._connection = store.connection
        self._session_id = session_id
        self._owner = owner
        # Each owner has a queue of its own: waiting in a shared one would show that the session exists.
        self._key = store.collection.database, store.collection.name, session_id, owner
        self._waits = waits
        self._timeout = busy_timeout
        self._seconds = seconds
        self._holding: Holding | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._claim: tuple[int, Claim] | None = None
        self._turns: set[Hashable] = set()
        self._writer = Caller()
        self._is_over = False

    # Turns. Any thread can call these methods.

    def begin(self, turn: Hashable) -> None:
        """Begin an invocation: its first write takes the lease, unless the manager holds it."""
        if not self._turns and self._holding is not None and self._holding.state == "lost":
            self._holding = None
        if self._holding is not None and self._holding.is_paused:
            self._holding.resume()
        if not self._turns or self._writer.is_cancelled:
            self._writer = Caller()
        self._turns.add(turn)
        self._is_over = False

    def end(self, turn: Hashable) -> None:
        """End an invocation whose changes are all recorded: the next flush releases the lease."""
        self._turns.discard(turn)
        self._is_over = not self._turns

    def pause(self) -> None:
        """Stop the heartbeat if no invocation runs or the only one is ending; the next invocation resumes it."""
        if len(self._turns) <= 1 and self._holding is not None:
            self._holding.is_paused = True

    def stop_waiting(self) -> None:
        """Refuse the waiting writes of the only invocation, which was cancelled."""
        leases = of_connections.get(self._connection)
        if len(self._turns) == 1 and leases is not None:
            with suppress(RuntimeError):  # the loop is closed
                leases.loop.call_soon_threadsafe(self._writer.cancel)

    def end_all(self) -> None:
        """End all invocations: the manager is closing."""
        self._turns.clear()
        self._is_over = True

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lease, according to its own state; the lease can have expired."""
        return self._held is not None

    @property
    def _held(self) -> Holding | None:
        holding = self._holding
        return holding if holding is not None and holding.state == "held" and self._is_of_this_process else None

    @property
    def is_certain(self) -> bool:
        """Whether no other manager can have taken the lease."""
        return (held := self._held) is not None and not held.has_expired

    @property
    def is_cancelled(self) -> bool:
        """Whether the invocation was cancelled while its writes waited."""
        return self._writer.is_cancelled

    @property
    def has_turns(self) -> bool:
        """Whether an invocation runs."""
        return bool(self._turns)

    @property
    def is_over(self) -> bool:
        """Whether the last invocation has ended."""
        return self._is_over

    @property
    def is_to_be_released(self) -> bool:
        """Whether the next flush releases the lease."""
        return self._is_over and self.is_held

    @property
    def _is_of_this_process(self) -> bool:
        return self._claim is not None and self._claim[0] == os.getpid()

    # Taking and releasing.

    @property
    def claim(self) -> Claim:
        """The claim of this manager; a forked child gets a new one."""
        if self._claim is None or not self._is_of_this_process:
            by = leases_of(self._connection).id
            self._claim = os.getpid(), Claim.of(by, self._seconds)
            self._holding = None
        return self._claim[1]

    def taken(self, document: Document) -> None:
        """Record that a statement has taken the lease; `document` contains the new `lease`."""
        claim, leases = self.claim, leases_of(self._connection)
        if self._holding is None or self._holding.state != "held":
            self._holding = Holding(self._store, self._key, self._session_id, claim, leases)
            if self._finalizer is not None:
                self._finalizer.detach()
            self._finalizer = weakref.finalize(self, release_collected, self._holding, os.getpid(), leases.loop)
            self._finalizer.atexit = False
        self._holding.fence = StoredLease.of(document).fence
        self._holding.renewed()

    async def release(self) -> None:
        """Release the lease with a separate command, if this manager holds it."""
        if (held := self._held) is not None:
            await held.release()

    def give_up(self) -> None:
        """Start to release the lease, even if the reply to the statement that took it was lost.

        The manager then gets a new claim, so that a late release cannot release a lease that it takes later.
        """
        if not self._turns and not self._connection.closed:
            claim, held = self.claim, self._held
            self._claim = self._holding = None
            self._connection.start(self._release_if_taken(claim) if held is None else held.release())

    async def _release_if_taken(self, claim: Claim) -> None:
        end = asyncio.get_running_loop().time() + self._seconds
        while not self._connection.closed and asyncio.get_running_loop().time() < end:
            try:
                async with self._connection.operation():
                    await self._store.sessions.update(claim.release(self._session_id))
                return
            except MongoDBSessionError as error:
                logger.debug("session_id=<%r>, error=<%s> | lease not released", self._session_id, error)
            await asyncio.sleep(_CHECK)

    def let_expire(self) -> None:
        """Stop the heartbeat, because the writes of the turn failed."""
        if self._holding is not None:
            self._holding.let_expire()

    async def wait(
        self, attempt: Callable[[], Awaitable[Document | None]] | None = None, caller: Caller | None = None
    ) -> Document | None:
        """Wait until this manager has taken the lease, or the session does not exist.

        Args:
            attempt: Opens the session and takes its lease, or raises `DuplicateKeyError`. It is called when this
                manager is the next one.
            caller: The caller that waits.

        Returns:
            The result of `attempt` if it has succeeded.

        Raises:
            SessionBusyError: The session is busy, and the manager does not wait, or `busy_timeout` has passed.
            SessionClosedError: The connection was closed, or the caller was cancelled.
        """
        if not self._waits:
            if attempt is not None:
                with suppress(DuplicateKeyError):
                    return await attempt()
            await self._check_free()
            return None
        leases, waiter = leases_of(self._connection), Waiter()
        queue, begin = leases.queue(self._key), leases.loop.time()
        queue.waiters.append(waiter)
        if caller is not None:
            caller.waiter = waiter
        try:
            return await self._wait(queue, waiter, attempt, caller)
        finally:
            if waiter.has_slept:
                leases.waits += 1
                leases.wait_seconds += leases.loop.time() - begin
            queue.waiters.remove(waiter)
            queue.wake()
            self._end_wait(queue)

    async def take(self) -> None:
        """Take the lease with a separate command, if the session exists.

        Raises:
            SessionBusyError: The session is busy, and the manager does not wait, or `busy_timeout` has passed.
            SessionClosedError: The connection was closed, or the invocation was cancelled.
        """
        if self._waits:
            if (busy := await self.wait_to_write()) is not None:
                raise busy
            return
        queue = leases_of(self._connection).queue(self._key)
        try:
            if not await self._poll(queue):
                raise self._busy()
        finally:
            self._end_wait(queue)

    async def wait_to_write(self) -> SessionBusyError | None:
        """Wait for the lease; return the error for the writes if the wait fails or the invocation is cancelled."""
        writer = self._writer
        try:
            await self.wait(caller=writer)
        except SessionBusyError as error:
            return error
        except SessionClosedError:
            if not writer.is_cancelled:
                raise
            return SessionBusyError(f"session {self._session_id!r} was busy until the invocation was cancelled")
        return None

    async def _wait(
        self,
        queue: Queue,
        waiter: Waiter,
        attempt: Callable[[], Awaitable[Document | None]] | None,
        caller: Caller | None,
    ) -> Document | None:
        loop, pause = asyncio.get_running_loop(), _PAUSES[0]
        end = loop.time() + self._timeout
        while True:
            self._check_wait(caller)
            is_first = queue.waiters[0] is waiter
            is_next = is_first and not queue.is_held_here
            if is_next and attempt is not None and not queue.is_in_line:
                with suppress(DuplicateKeyError):
                    return await attempt()
            if is_next and await self._poll(queue):
                return None
            left = end - loop.time()
            if left <= 0:
                raise SessionBusyError(
                    f"session {self._session_id!r} is still busy after {self._timeout:g} s (busy_timeout): another "
                    "manager has its turn"
                )
            if is_next:
                await waiter.sleep(min(left, pause * random.uniform(0.5, 1.0)))
                pause = min(2 * pause, _PAUSES[1])
            else:
                await waiter.sleep(min(left, _CHECK) if is_first else left)

    def _check_wait(self, caller: Caller | None) -> None:
        if caller is not None:
            caller.check(self._session_id)
        if self._connection.closed:
            raise SessionClosedError(
                f"session {self._session_id!r} is still busy, and the connection was closed during the wait"
            )

    async def _check_free(self) -> None:
        document = await self._store.sessions.find(self._session_id, {"lease": 1}, self._owner)
        if document is not None and self.is_busy(document):
            raise self._busy()

    def _busy(self) -> SessionBusyError:
        return SessionBusyError(f"session {self._session_id!r} is busy: another manager has its turn")

    async def repair(self) -> None:
        """Replace a stored `lease` that is `null`, and take the lease if it is free.

        Raises:
            DatabaseError: `lease` is a value of an application.
        """
        await self._poll(leases_of(self._connection).queue(self._key))

    async def _poll(self, queue: Queue) -> bool:
        """Take the lease if it is free; return `True` if this manager holds it now, or the session does not exist."""
        moment, claim = self._connection.now(), self.claim
        update = claim.poll(self._session_id, moment)
        queue.is_in_line = True
        condition = {"$and": [update.filter, guard(self._owner), live_at(moment)]}
        document = await self._store.collection.send(
            lambda sessions: find_and_modify(sessions, condition, update.update, {"lease": 1})
        )
        if document is None:
            found = await self._store.sessions.find(self._session_id, {"lease": 1}, self._owner)
            if found is not None:
                raise MalformedField("lease", found.get("lease"), dict).error(self._session_id)
            queue.is_in_line = False
            return True
        if StoredLease.of(document).token != claim.token:
            return False
        queue.is_in_line = False
        self.taken(document)
        return True

    def _end_wait(self, queue: Queue) -> None:
        """End a wait; after the last one, the connection leaves the stored line."""
        if queue.is_in_line and not queue.waiters and not self._connection.closed:
            queue.is_in_line = False
            self._connection.start(self._leave_line())
        leases_of(self._connection).tidy(self._key)

    async def _leave_line(self) -> None:
        with suppress(MongoDBSessionError):
            async with self._connection.operation():
                update = self.claim.leave_line(self._session_id)
                await self._store.sessions.update(update._replace(filter={**update.filter, **guard(self._owner)}))

    # Writing.

    def mode(self) -> Mode:
        """Return the condition of the next statement."""
        _ = self.claim
        if self._holding is not None and self._holding.state != "free":
            return "holds"
        return "takes" if self._turns else "passes"

    def releasing(self, is_in_flight: bool) -> None:
        """Record whether a statement that releases the lease is in flight."""
        if self._holding is not None:
            self._holding.is_releasing = is_in_flight

    def confirm(self, releases: bool) -> None:
        """Record that a statement has renewed the lease or, with `releases`, released it."""
        if self._holding is not None and releases:
            self._holding.end("free")
        elif self._holding is not None:
            self._holding.renewed()

    def check_lost(self, document: Document) -> SessionConflictError | None:
        """Compare the lease that this manager holds with the stored one, after a statement matched nothing.

        Returns:
            The error for the writes of the statement if the lease is lost.
        """
        stored, holding = StoredLease.of(document), self._holding
        if holding is None or holding.state == "free":
            return None
        if holding.state == "held":
            if stored.token == self.claim.token:
                return None
            if stored.token is None and stored.fence is not None and stored.fence == holding.fence:
                holding.end("free")  # an earlier attempt has released it, and it was not taken since
                return None
            holding.end("lost")
        return SessionConflictError(
            f"session {self._session_id!r}: this manager has lost its turn, because it has not renewed its lease for "
            f"{self._seconds:g} s (lease) and another manager has taken it; open the session with a new manager and a "
            "new agent, and repeat the request"
        )

    def is_busy(self, document: Document, *, in_line: bool = True) -> bool:
        """Return whether another manager holds the lease of a session or, with `in_line`, waits for it."""
        stored, moment = StoredLease.of(document), self._connection.now()
        return stored.is_held_by_another(self.claim, moment) or (in_line and stored.has_line(moment))
