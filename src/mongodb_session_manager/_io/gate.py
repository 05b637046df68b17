"""Admission of Motor's commands to threads.

Motor runs every command of the process in one executor with 5 threads per core, and a command includes server
selection. Without a gate, slow commands would delay each other regardless of `maxPoolSize`, and without a server every
thread would wait for one while other callers get no error.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from typing import Any

import pymongo
from pymongo.errors import ServerSelectionTimeoutError, WaitQueueTimeoutError
from pymongo.topology_description import TopologyDescription

from .loop import ThreadPool

_UNLIMITED = 500
"""The limit of concurrent commands of a client whose `maxPoolSize` is 0."""

_SPARE_FROM = 4
"""The smallest pool that reserves one connection for health checks."""

_USUAL_COMMANDS = 5 * (os.cpu_count() or 1)
"""The limit of concurrent commands while none is slow: more threads would compete for the interpreter."""

_SLOW = 0.02
"""Seconds until one more command is admitted, while commands wait: the admitted ones are slow."""

_CHECK_INTERVAL = 0.5
"""Seconds after which a waiting command checks again for a server."""


_gates: weakref.WeakValueDictionary[tuple[int, int], Gate] = weakref.WeakValueDictionary()
"""Gates by the ids of client and loop; a gate keeps its client alive, so no other client can have the same id."""


def gate_of(client: pymongo.MongoClient[Any], loop: asyncio.AbstractEventLoop) -> Gate:
    """Return the gate of a client and a loop, which all connections that borrow the client share."""
    key = id(client), id(loop)
    gate = _gates.get(key)
    if gate is None:
        _gates[key] = gate = Gate(client)
    return gate


class Gate:
    """Admits commands to a client's threads while a server is known, and at most as many as the pool has connections.

    It belongs to one event loop. Entering raises the driver's errors, as the command would.
    """

    def __init__(self, client: pymongo.MongoClient[Any]) -> None:
        options = client.options
        pool = options.pool_options
        size = int(pool.max_pool_size or _UNLIMITED)
        self._max_commands = size - 1 if size >= _SPARE_FROM else size
        self._usual_commands = min(_USUAL_COMMANDS, self._max_commands)
        self._selection_timeout: float = options.server_selection_timeout
        if options.timeout is not None:
            self._selection_timeout = min(self._selection_timeout, options.timeout)
        self._queue_timeout: float | None = pool.wait_queue_timeout
        self._client = client
        self._topology: TopologyDescription | None = None
        self._selection: asyncio.Future[None] | None = None
        self._under_way = 0
        self._widening: asyncio.TimerHandle | None = None
        self._queue: deque[asyncio.Future[None]] = deque()
        # Two more threads: for a health check and a server selection. A cancelled command keeps its thread.
        self.executor = ThreadPool(size + 2)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def __aenter__(self) -> None:
        place = None
        if self._under_way < self._usual_commands and not self._queue:
            self._under_way += 1
        else:
            loop = asyncio.get_running_loop()
            place = loop.create_future()
            self._queue.append(place)
            if self._widening is None:
                self._widening = loop.call_later(_SLOW, self._widen, loop)
        try:
            await self.server()
            if place is not None:
                await self._turn(place)
        except BaseException:
            if place is not None and not place.done():
                self._queue.remove(place)
            else:
                self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._under_way -= 1
        if self._queue and self._under_way < self._usual_commands:
            self._admit()

    def _admit(self) -> None:
        self._under_way += 1
        self._queue.popleft().set_result(None)

    def _widen(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._queue and self._under_way < self._max_commands:
            self._admit()
        self._widening = loop.call_later(_SLOW, self._widen, loop) if self._queue else None

    async def _turn(self, place: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        end = None if self._queue_timeout is None else loop.time() + self._queue_timeout
        while not place.done():
            await asyncio.wait(
                {place}, timeout=_CHECK_INTERVAL if end is None else min(_CHECK_INTERVAL, max(0.0, end - loop.time()))
            )
            await self.server()
            if not place.done() and end is not None and loop.time() >= end:
                raise WaitQueueTimeoutError(
                    "Timed out while checking out a connection from connection pool. "
                    f"maxPoolSize: {self._client.options.pool_options.max_pool_size}, timeout: {self._queue_timeout}"
                )

    async def server(self) -> None:
        """Wait until a writable server is known, at most `serverSelectionTimeoutMS`, or raise the driver's error."""
        if self._selection_timeout <= 0 or self._has_writable_server():
            return  # with a timeout of 0, the driver selects a server itself
        loop = asyncio.get_running_loop()
        end = loop.time() + self._selection_timeout
        error: ServerSelectionTimeoutError | None = None
        while (left := end - loop.time()) > 0:
            selection = self._selection
            if selection is None:
                # One thread selects for all callers: during a selection the driver checks often, not every 10 s.
                selection = loop.run_in_executor(self.executor, self._select)
                selection.add_done_callback(self._selected)
                self._selection = selection
            await asyncio.wait({selection}, timeout=left)
            if not selection.done() or selection.cancelled():
                continue
            failure = selection.exception()
            if failure is None or self._has_writable_server():
                return
            if not isinstance(failure, ServerSelectionTimeoutError):
                raise failure
            error = failure
        raise ServerSelectionTimeoutError(str(error) if error is not None else self._reason())

    def _select(self) -> None:
        _ = self._client.is_primary

    def _selected(self, selection: asyncio.Future[None]) -> None:
        self._selection = None
        if not selection.cancelled():
            selection.exception()  # retrieved, because the callers might have been cancelled

    def _has_writable_server(self) -> bool:
        topology = self._client.topology_description
        if topology is not self._topology:
            if not topology.has_writable_server():
                return False
            self._topology = topology
        return True

    def _reason(self) -> str:
        servers = self._client.topology_description.server_descriptions().values()
        errors = ", ".join(str(server.error) for server in servers if server.error is not None)
        return f"{errors or 'no server takes writes'}, Timeout: {self._selection_timeout}s"
