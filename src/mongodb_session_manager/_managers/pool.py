"""The state of a connection, and the process-wide connection pool."""

from __future__ import annotations

from typing import Any, ClassVar, Self, Unpack, cast

from .._io.connection import Connection
from .._io.drivers import SyncClient
from .._io.loop import Lock
from .._io.options import ClientOptions
from .._io.pool_stats import NO_POOL, PoolStats
from .._io.settings import Settings
from .._store.lease_queue import NO_LEASES, lease_stats
from ..errors import MongoDBSessionError


class ConnectionStats(PoolStats):
    """The current state of a connection.

    Attributes:
        status: `"connected"`; `"disconnected"` if the server does not answer; or `"closed"`.
        error: The reason if it is not connected.
        server_version: Like `"7.0.14"`; `None` if the server refuses the command.
        pool_config: `maxPoolSize`, `minPoolSize`, `maxIdleTimeMS`, `waitQueueTimeoutMS` (milliseconds).
        connections_open: The number of open connections; `None` for a borrowed client, whose pool only its owner sees.
        connections_in_use: The number of connections that run a command.
        wait_queue: The number of commands that wait for a connection.
        lease_waits: The number of times that a manager has waited for another manager's turn to end; see `on_busy`.
        lease_wait_seconds: The total of these waiting times.
        leases_lost: The number of managers that have lost their turn.
    """

    status: str
    error: str | None
    server_version: str | None
    lease_waits: int
    lease_wait_seconds: float
    leases_lost: int


async def connection_stats(connection: Connection) -> ConnectionStats:
    pool = connection.pool_stats()  # counted before the command, because the command can wait for a connection
    version, status, error = None, "connected", None
    try:
        version = await connection.server_version()
    except MongoDBSessionError as failure:
        status, error = "closed" if connection.closed else "disconnected", str(failure)
    if not pool["pool_config"]:
        pool = connection.pool_stats()
    return {"status": status, "error": error, "server_version": version, **pool, **lease_stats(connection)}


class MongoDBConnectionPool:
    """The process-wide connection pool: that of the global factory, or one that `initialize` creates.

    Its client is synchronous. It can be passed as `client=` and used for the application's own commands.
    `initialize_global_factory` with the same connection string and options uses this pool; with others it replaces the
    pool.
    """

    _lock: ClassVar[Any] = Lock()
    _instance: ClassVar[MongoDBConnectionPool | None] = None
    _connection: ClassVar[Connection | None] = None
    _is_taken: ClassVar[bool] = False

    def __new__(cls) -> Self:
        """Return the one instance; everything is a class method."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = super().__new__(cls)
            return cast(Self, cls._instance)

    @classmethod
    def initialize(cls, connection_string: str | None = None, **client_options: Unpack[ClientOptions]) -> SyncClient:
        """Return the process-wide client. The first call creates it, and so does a call with other arguments.

        If a global factory was initialized with the same arguments, its pool is used. An earlier pool with other
        arguments is closed, unless it belongs to a global factory.

        Raises:
            ConfigurationError: An argument is invalid or an option is unknown.
        """
        wanted = Connection(Settings.checked(connection_string, None, client_options, ("connection_string",)))
        current = cls._replace(wanted, taking=False)
        try:
            return current.synchronous_client()
        except MongoDBSessionError:
            cls._connection = None
            raise

    @classmethod
    def get_client(cls) -> SyncClient | None:
        """Return the process-wide client; `None` if there is no pool.

        Raises:
            ConfigurationError: The global factory was given a `pymongo.AsyncMongoClient`.
        """
        current = cls._current()
        return None if current is None else current.synchronous_client()

    @classmethod
    def get_pool_stats(cls) -> ConnectionStats:
        """Return the state of the pool, with the version of the server, which is asked for it.

        `status` is `"connected"`, `"error"` with the reason as `error`, or `"not_initialized"`.
        """
        current = cls._current()
        if current is None:
            return {"status": "not_initialized", "error": None, "server_version": None, **NO_POOL, **NO_LEASES}
        stats = current.portal.call(connection_stats, current)
        if stats["status"] != "connected":
            stats["status"] = "error"
        return stats

    @classmethod
    def close(cls) -> None:
        """Close the pool, if there is one. A global factory that uses it cannot be used afterwards."""
        with cls._lock:
            connection, cls._connection = cls._current(), None
        if connection is not None:
            connection.close_blocking()

    @classmethod
    def _current(cls) -> Connection | None:
        return None if cls._connection is None or cls._connection.closed else cls._connection

    @classmethod
    def _replace(cls, wanted: Connection, *, taking: bool) -> Connection:
        """Return the pool's connection if it has the wanted settings; else make `wanted` the pool's connection.

        The earlier connection is closed, unless a global factory has taken it, which closes it itself. A connection in
        use is not passed to another factory.
        """
        with cls._lock:
            current, is_taken = cls._current(), cls._is_taken
            if current is not None and current.settings == wanted.settings and not (taking and is_taken):
                cls._is_taken = is_taken or taking
                return current
            cls._connection, cls._is_taken = wanted, taking
        if current is not None and not is_taken:
            current.close_blocking()
        return wanted
