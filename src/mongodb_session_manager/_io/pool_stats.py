"""How many connections a client has, counted from the driver's pool events."""

from __future__ import annotations

from typing import Any, TypedDict

from pymongo import monitoring
from pymongo.client_options import ClientOptions

from .loop import Lock


class PoolStats(TypedDict):
    """A client's pool at this moment; `None` where the client is borrowed and its events were not recorded."""

    pool_config: dict[str, Any]
    connections_open: int | None
    connections_in_use: int | None
    wait_queue: int | None


NO_POOL: PoolStats = {"pool_config": {}, "connections_open": None, "connections_in_use": None, "wait_queue": None}


class PoolCounter(monitoring.ConnectionPoolListener):
    def __init__(self) -> None:
        self.open = self.in_use = self.waiting = 0
        self._lock = Lock()

    def _count(self, *, open: int = 0, in_use: int = 0, waiting: int = 0) -> None:
        with self._lock:
            self.open += open
            self.in_use += in_use
            self.waiting += waiting

    def connection_created(self, event: monitoring.ConnectionCreatedEvent) -> None:
        self._count(open=1)

    def connection_closed(self, event: monitoring.ConnectionClosedEvent) -> None:
        self._count(open=-1)

    def connection_check_out_started(self, event: monitoring.ConnectionCheckOutStartedEvent) -> None:
        self._count(waiting=1)

    def connection_check_out_failed(self, event: monitoring.ConnectionCheckOutFailedEvent) -> None:
        self._count(waiting=-1)

    def connection_checked_out(self, event: monitoring.ConnectionCheckedOutEvent) -> None:
        self._count(waiting=-1, in_use=1)

    def connection_checked_in(self, event: monitoring.ConnectionCheckedInEvent) -> None:
        self._count(in_use=-1)

    def pool_created(self, event: monitoring.PoolCreatedEvent) -> None: ...
    def pool_ready(self, event: monitoring.PoolReadyEvent) -> None: ...
    def pool_cleared(self, event: monitoring.PoolClearedEvent) -> None: ...
    def pool_closed(self, event: monitoring.PoolClosedEvent) -> None: ...
    def connection_ready(self, event: monitoring.ConnectionReadyEvent) -> None: ...


def pool_config(options: ClientOptions) -> dict[str, Any]:
    """Return the pool's options by their names in the connection string; times are milliseconds."""
    pool = options.pool_options
    return {
        "maxPoolSize": pool.max_pool_size,
        "minPoolSize": pool.min_pool_size,
        "maxIdleTimeMS": _milliseconds(pool.max_idle_time_seconds),
        "waitQueueTimeoutMS": _milliseconds(pool.wait_queue_timeout),
    }


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
