"""The state of a connection, and the original's process-wide pool."""

from __future__ import annotations

from typing import Any, ClassVar, TypedDict

from ._connection import Client, Connection, Settings
from ._loop import Lock
from .errors import FactoryNotInitializedError, MongoDBSessionError


class ConnectionStats(TypedDict):
    """The state of a connection at this moment.

    Attributes:
        status: `"connected"`, or `"disconnected"` if the server does not answer, or `"closed"`.
        error: Why it is not connected.
        server_version: Like `"7.0.14"`; `None` if the server refuses to say.
        pool_config: `maxPoolSize`, `minPoolSize`, `maxIdleTimeMS`, `waitQueueTimeoutMS` (milliseconds).
        connections_open: Connections to the server; `None` for a borrowed client, whose pool only its owner sees.
        connections_in_use: Those of them a command is using.
        wait_queue: Commands that wait for a connection.
    """

    status: str
    error: str | None
    server_version: str | None
    pool_config: dict[str, Any]
    connections_open: int | None
    connections_in_use: int | None
    wait_queue: int | None


async def connection_stats(connection: Connection) -> ConnectionStats:
    """Ask the server for its version and return it with the state of the pool."""
    pool = connection.pool_stats()  # before the question, which may have to wait for a connection itself
    version, status, error = None, "connected", None
    try:
        version = await connection.server_version()
    except MongoDBSessionError as failure:
        status, error = "closed" if connection.closed else "disconnected", str(failure)
    if not pool["pool_config"]:
        pool = connection.pool_stats()
    return {"status": status, "error": error, "server_version": version, **pool}


class MongoDBConnectionPool:
    """One asynchronous client for the whole process, kept on the library's own event loop.

    What the original offered beside the factory. The client is to be passed on as `client=`; asynchronous code of the
    caller's own cannot await it, because it belongs to the library's loop.
    """

    _lock: ClassVar[Any] = Lock()
    _connection: ClassVar[Connection | None] = None

    @classmethod
    def initialize(cls, connection_string: str | None = None, **client_options: Any) -> Client:
        """Return the process's client; the first call, and one with other arguments, makes it.

        Raises:
            ConfigurationError: An argument cannot be used.
        """
        settings = Settings.checked(connection_string, None, client_options)
        with cls._lock:
            earlier = current = cls._connection
            if current is None or current.settings != settings:
                cls._connection = current = Connection(settings)
        if earlier is not None and earlier is not current:
            earlier.close_blocking()
        try:
            return cls._client_of(current)
        except MongoDBSessionError:
            cls._connection = None
            raise

    @classmethod
    def get_client(cls) -> Client | None:
        """Return the process's client, `None` before `initialize`."""
        return None if cls._connection is None else cls._client_of(cls._connection)

    @classmethod
    def get_pool_stats(cls) -> ConnectionStats:
        """Ask the server for its version and return it with the state of the pool.

        Raises:
            FactoryNotInitializedError: The pool was not initialised.
        """
        if cls._connection is None:
            raise FactoryNotInitializedError("there is no pool: call MongoDBConnectionPool.initialize(...) first")
        return cls._connection.portal.call(connection_stats, cls._connection)

    @classmethod
    def close(cls) -> None:
        """Close the process's client, if there is one."""
        with cls._lock:
            connection, cls._connection = cls._connection, None
        if connection is not None:
            connection.close_blocking()

    @staticmethod
    def _client_of(connection: Connection) -> Client:
        return connection.portal.call(connection.client)
