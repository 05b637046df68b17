"""Flushes the recorded changes of a session: in order, one flush at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .._io.connection import Connection
from .._io.portal import running_loop
from .._repository.async_repository import SharedRepository
from .._store.lease import Lease
from .unit_of_work import UnitOfWork

logger = logging.getLogger(__name__)


class Flusher:
    """Sends the changes that a unit of work has recorded.

    A flush raises the error of a failed write. Changes that were refused are raised by the unit of work. The last flush
    of a turn releases the lease.
    """

    def __init__(
        self, session_id: str, connection: Connection, repository: SharedRepository, lease: Lease | None
    ) -> None:
        self._session_id = session_id
        self._connection = connection
        self._repository = repository
        self._lease = lease
        self._lock: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None
        self._recording: set[int] = set()

    def lock(self) -> asyncio.Lock:
        """Return the lock of the running loop: a forked child has another loop than its parent."""
        loop = asyncio.get_running_loop()
        if self._lock is None or self._lock[0] is not loop:
            self._lock = (loop, asyncio.Lock())
        return self._lock[1]

    async def flush(self, work: UnitOfWork) -> None:
        """Wait until every recorded change is stored or refused."""
        if self.is_due(work):
            await self._connection.portal.run(self.flush_here, work)

    def flush_blocking(self, work: UnitOfWork) -> None:
        """Block the calling thread until every recorded change is stored or refused."""
        if self.is_due(work):
            self._connection.portal.call(self.flush_here, work)

    def is_due(self, work: UnitOfWork) -> bool:
        """Return whether there is something to send."""
        return not work.is_settled or (self._lease is not None and self._lease.is_to_be_released)

    def start(self, work: UnitOfWork) -> None:
        """Start a flush without waiting for it; the next flush raises its errors.

        Raises:
            EventLoopError: The loop of the client is closed or stopped.
        """
        if not work.is_closed and self.is_due(work):
            self._connection.portal.submit(self.flush_here, work)

    async def flush_here(self, work: UnitOfWork) -> None:
        """Flush on the loop of the client, also while the interpreter ends."""
        async with self._connection.operation(), self.lock():
            # Before the changes are read: if the turn is over, all of its changes are recorded.
            releases = self._lease is not None and self._lease.is_over
            try:
                await self._send(work, releases)
            except BaseException:
                if self._lease is not None and releases:
                    self._lease.let_expire()
                raise
            if self._lease is not None and releases:
                await self._lease.release()

    async def take_lease(self, lease: Lease) -> None:
        """Take the lease before an invocation that stores nothing first. Runs on the loop of the client."""
        async with self._connection.operation(), self.lock():
            if not lease.is_held:
                await lease.take()
            if not lease.has_turns:  # cancelled meanwhile
                await lease.release()

    async def _send(self, work: UnitOfWork, releases: bool) -> None:
        """Send the pending changes; the last statement releases the lease."""
        if changes := work.pending():
            is_last = releases and work.multi_agents.is_settled
            refused = await self._repository._apply(
                self._session_id, changes, work.incarnation, self._lease, is_last, work.loaded
            )
            work.settle(len(changes), refused)
            for agent_id, error in refused.items():
                logger.debug("session_id=<%r>, agent_id=<%r>, error=<%s> | refused", self._session_id, agent_id, error)
        writes = work.multi_agents.pending()
        for number, write in enumerate(writes, 1):
            is_last = releases and number == len(writes)
            refusal = await self._repository._apply_multi_agent(
                self._session_id, write, work.incarnation, self._lease, is_last
            )
            work.multi_agents.settle(write, refusal)

    # Strands' synchronous methods record and then flush, except within a callback, which records more and then flushes
    # once. Subclasses override these methods without a parameter that could say so.

    @contextmanager
    def recording(self, source: object) -> Iterator[None]:
        """Only record the changes of an agent or orchestrator: the caller flushes."""
        self._recording.add(id(source))
        try:
            yield
        finally:
            self._recording.discard(id(source))

    def recorded(self, source: object, work: UnitOfWork, raise_refusal: Callable[[str], None], source_id: str) -> None:
        """Flush the changes of an agent or orchestrator, unless the caller does.

        On a thread whose event loop runs, the flush is only started.
        """
        if id(source) in self._recording:
            return
        if running_loop() is None:
            self.flush_blocking(work)
            raise_refusal(source_id)
        else:
            self.start(work)
