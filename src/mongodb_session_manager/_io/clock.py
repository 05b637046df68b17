"""An estimate of the server's clock, for dates that processes on different machines compare."""

from __future__ import annotations

import asyncio
import time
import weakref
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from pymongo import monitoring

from .._format.dates import to_milliseconds

_SHORT_STEP = timedelta(seconds=1)
"""After a correction of the estimate that is shorter than this, `now` repeats its last value instead of going back."""

_PRECISE = 1.0
"""A measurement with a longer round trip, in seconds, does not replace an earlier one."""

_WALL_STEP = 1.0
"""The estimate is void if the local clock has moved by more seconds against the monotonic clock.

The monotonic clock does not advance while a machine sleeps.
"""

_FRESH = 3600.0
"""Seconds after which the server's clock is read again."""


class _Measurement(NamedTuple):
    """One reading of a server's clock: by how many seconds it and the local clock differ from the monotonic clock."""

    offset: float
    taken: float
    wall: float


class ServerClock(monitoring.ServerHeartbeatListener):
    """Estimates the clock of the server that takes the writes, from its replies to `hello`.

    The clock receives the heartbeats of an owned client. The driver publishes no heartbeats of a borrowed client, so
    the clock sends commands instead.
    """

    def __init__(self) -> None:
        self._readings: dict[tuple[str, int | None] | None, _Measurement] = {}
        self._writable: tuple[str, int | None] | None = None
        self._latest = datetime.min.replace(tzinfo=UTC)
        self.command: asyncio.Task[None] | None = None

    def is_known(self) -> bool:
        reading = self._reading
        return reading is not None and abs(_wall() - reading.wall) < _WALL_STEP

    def is_due(self) -> bool:
        """Return whether the server's clock must be read: there is no valid estimate, or an old one."""
        reading = self._reading
        return reading is None or not self.is_known() or time.monotonic() - reading.taken > _FRESH

    def now(self) -> datetime:
        """Return the server's time in whole milliseconds; the local time if the server's is unknown."""
        reading = self._reading
        seconds = time.time() if reading is None else time.monotonic() + reading.offset
        moment = to_milliseconds(datetime.fromtimestamp(seconds, UTC))
        if moment < self._latest < moment + _SHORT_STEP:
            return self._latest
        self._latest = moment
        return moment

    def learn(self, local_time: object, duration: float) -> None:
        """Take a reading from the reply to a `hello` that has just arrived, `duration` seconds after it was sent."""
        self._learn(self._writable, local_time, duration)

    def postpone(self) -> None:
        """Use the estimate, or the local clock without one, until the next reading is due."""
        reading = self._reading
        offset = _wall() if reading is None else reading.offset
        self._readings[self._writable] = _Measurement(offset, time.monotonic(), _wall())

    def command_done(self, command: asyncio.Task[None]) -> None:
        self.command = None
        if not command.cancelled():
            command.exception()  # marked as retrieved: all callers might have been cancelled

    @property
    def _reading(self) -> _Measurement | None:
        return self._readings.get(self._writable)

    def _learn(self, address: tuple[str, int | None] | None, local_time: object, duration: float) -> None:
        if not isinstance(local_time, datetime):
            return
        if duration > _PRECISE and address in self._readings and not self.is_due():
            return
        server = local_time.replace(tzinfo=local_time.tzinfo or UTC).timestamp()
        taken = time.monotonic()
        self._readings[address] = _Measurement(server + duration / 2 - taken, taken, _wall())

    def started(self, event: monitoring.ServerHeartbeatStartedEvent) -> None: ...
    def failed(self, event: monitoring.ServerHeartbeatFailedEvent) -> None: ...

    def succeeded(self, event: monitoring.ServerHeartbeatSucceededEvent) -> None:
        """Take a reading from a heartbeat; the driver publishes it before it selects the server."""
        reply: dict[str, Any] = event.reply.document
        if not event.awaited:  # the round trip of an awaited reply is unknown
            self._learn(event.connection_id, reply.get("localTime"), event.duration)
        if reply.get("isWritablePrimary") or reply.get("ismaster"):
            self._writable = event.connection_id


_of_borrowed: dict[int, ServerClock] = {}
"""The clocks of borrowed clients by the ids of the clients, each for as long as its client lives."""


def clock_of(client: object | None) -> ServerClock:
    """Return the clock that all connections with a borrowed client share; a new clock without a client."""
    if client is None:
        return ServerClock()
    if id(client) not in _of_borrowed:
        _of_borrowed[id(client)] = ServerClock()
        weakref.finalize(client, _of_borrowed.pop, id(client), None).atexit = False
    return _of_borrowed[id(client)]


def _wall() -> float:
    return time.time() - time.monotonic()
