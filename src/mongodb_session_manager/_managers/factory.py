"""One client for many sessions: factory, process-wide factory, and one-call constructors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Self

from .._copying.imports import feed, feed_blocking
from .._format.attachment_refs import MAX_INLINE_ATTACHMENT_BYTES
from .._format.buckets import MAX_EMBEDDED_BYTES, MAX_EMBEDDED_MESSAGES
from .._format.ids import checked_id
from .._io.connection import Connection
from .._io.drivers import Client
from .._io.loop import Lock
from .._io.settings import Settings
from .._notifications.notify import DRAIN_TIMEOUT, NotificationStats, drain, stats_of
from .._repository.listing import Order, SessionPage
from .._storage.storage import MongoDBStorage, SharedStorage
from ..errors import ConfigurationError, FactoryNotInitializedError
from .async_manager import AsyncMongoDBSessionManager
from .base import OPTIONS, ManagerOptions, SaveOn, take_hooks
from .pool import ConnectionStats, MongoDBConnectionPool, connection_stats
from .sync_manager import MongoDBSessionManager
from .user_hooks import Hook, hold, let_go


class MongoDBSessionManagerFactory:
    """Makes session managers that share one client, and so one pool of connections.

    Making a manager costs one command: it opens no connection and builds no index. The factory may be made before the
    process forks; the child opens a client of its own.

    Args:
        connection_string: Where MongoDB is; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` takes the one named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        client: An `AsyncIOMotorClient`, `AsyncMongoClient` or `MongoClient` that the caller owns; it is never closed.
        application_name: Stored in sessions that the factory's managers create.
        metadata_fields: Fields of `metadata` that get an index each.
        metadata_hook: Called around every use of metadata, `def` or `async def`; `metadataHook` is the same.
        feedback_hook: Called around every new feedback, `def` or `async def`; `feedbackHook` is the same.
        save_on: `"message"` stores each message before the agent goes on, `"invocation"` all of a turn at its end.
        max_inline_attachment_bytes: Images, documents and videos of a message that together hold more bytes are kept
            in GridFS, in the bucket `<collection_name>_attachments`.
        max_embedded_messages: How many messages of an agent the session's document holds; older ones are archived.
        max_embedded_bytes: How many bytes of them it holds.
        session_ttl: Sessions expire, with archive and attachments, when nobody has written to them for this time. Each
            session has its own value; another one applies from the next write on. With `None`, expiring sessions keep
            their values, and all others do not expire.
        **client_options: Options of PyMongo's `MongoClient`, like `maxPoolSize`.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    def __init__(
        self,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str | None = "agent_sessions",
        *,
        client: Client | None = None,
        application_name: str | None = None,
        metadata_fields: Sequence[str] | None = None,
        metadata_hook: Hook | None = None,
        feedback_hook: Hook | None = None,
        save_on: SaveOn | None = "message",
        max_inline_attachment_bytes: int | None = MAX_INLINE_ATTACHMENT_BYTES,
        max_embedded_messages: int | None = MAX_EMBEDDED_MESSAGES,
        max_embedded_bytes: int | None = MAX_EMBEDDED_BYTES,
        session_ttl: timedelta | None = None,
        **client_options: Any,
    ) -> None:
        self._options = ManagerOptions.checked(
            database_name=database_name,
            collection_name=collection_name,
            application_name=application_name,
            metadata_fields=metadata_fields,
            metadata_hook=metadata_hook,
            feedback_hook=feedback_hook,
            save_on=save_on,
            max_inline_attachment_bytes=max_inline_attachment_bytes,
            max_embedded_messages=max_embedded_messages,
            max_embedded_bytes=max_embedded_bytes,
            session_ttl=session_ttl,
            **take_hooks(client_options),
        )
        self._connection = Connection(Settings.checked(connection_string, client, client_options, OPTIONS))
        self._repository = self._options.repository(self._connection)  # refuses now what it cannot use
        hold(self, self._options.metadata_hook, self._options.feedback_hook)

    def _share(self, connection: Connection) -> None:
        """Use another connection with the same settings; only before the first use."""
        if connection is not self._connection:
            self._connection = connection
            self._repository = self._options.repository(connection)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._connection!r}>"

    def create_session_manager(self, session_id: str, **overrides: Any) -> MongoDBSessionManager:
        """Open a session, with one command.

        Args:
            session_id: The session; it is created if it is new.
            **overrides: `database_name`, `collection_name`, `application_name`, `metadata_fields`, `metadata_hook`,
                `feedback_hook`, `save_on`, `max_inline_attachment_bytes`, `max_embedded_messages`,
                `max_embedded_bytes`, `session_ttl` in place of the factory's.

        Raises:
            ConfigurationError: An override cannot be used.
            InvalidArgumentError: `session_id` cannot be one.
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        checked_id(session_id, "session_id")
        return MongoDBSessionManager._over(self._connection, session_id, self._options.overridden(overrides))

    async def create_session_manager_async(self, session_id: str, **overrides: Any) -> AsyncMongoDBSessionManager:
        """Open a session, with one command, without blocking the event loop.

        Args:
            session_id: The session; it is created if it is new.
            **overrides: As for `create_session_manager`.

        Raises:
            ConfigurationError: An override cannot be used.
            InvalidArgumentError: `session_id` cannot be one.
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        checked_id(session_id, "session_id")
        manager = AsyncMongoDBSessionManager._over(self._connection, session_id, self._options.overridden(overrides))
        return await manager.open()

    def create_storage(
        self, collection_name: str | None = "agent_storage", *, database_name: str | None = None
    ) -> MongoDBStorage:
        """Return a Strands `Storage` on the factory's client; sends nothing.

        Args:
            collection_name: The collection of the values, another than that of the sessions.
            database_name: `None` takes the factory's.

        Raises:
            ConfigurationError: An argument cannot be used.
        """
        if collection_name == self._options.collection_name:
            raise ConfigurationError(f"collection_name {collection_name!r} is where the factory keeps its sessions")
        return SharedStorage(self._connection, database_name or self._options.database_name, collection_name)

    def list_sessions(
        self,
        application_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        created_after: datetime | None = None,
        updated_after: datetime | None = None,
        order: Order = "-updated_at",
        limit: int = 50,
        cursor: str | None = None,
    ) -> SessionPage:
        """Return a page of the sessions that meet every criterion; see `MongoDBSessionRepository.list_sessions`."""
        return self._connection.portal.call(
            self._repository.list_sessions,
            application_name,
            metadata,
            created_after,
            updated_after,
            order,
            limit,
            cursor,
        )

    async def list_sessions_async(
        self,
        application_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        created_after: datetime | None = None,
        updated_after: datetime | None = None,
        order: Order = "-updated_at",
        limit: int = 50,
        cursor: str | None = None,
    ) -> SessionPage:
        """Return a page of the sessions that meet every criterion; see `MongoDBSessionRepository.list_sessions`."""
        return await self._connection.portal.run(
            self._repository.list_sessions,
            application_name,
            metadata,
            created_after,
            updated_after,
            order,
            limit,
            cursor,
        )

    def count_sessions(
        self,
        application_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        created_after: datetime | None = None,
        updated_after: datetime | None = None,
    ) -> int:
        """Return how many sessions meet every criterion; see `MongoDBSessionRepository.count_sessions`."""
        return self._connection.portal.call(
            self._repository.count_sessions, application_name, metadata, created_after, updated_after
        )

    async def count_sessions_async(
        self,
        application_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        created_after: datetime | None = None,
        updated_after: datetime | None = None,
    ) -> int:
        """Return how many sessions meet every criterion; see `MongoDBSessionRepository.count_sessions`."""
        return await self._connection.portal.run(
            self._repository.count_sessions, application_name, metadata, created_after, updated_after
        )

    def session_exists(self, session_id: str) -> bool:
        """Tell whether there is a session of that id.

        Raises:
            InvalidArgumentError: `session_id` cannot be one.
        """
        return self._connection.portal.call(self._repository.session_exists, session_id)

    async def session_exists_async(self, session_id: str) -> bool:
        """Tell whether there is a session of that id.

        Raises:
            InvalidArgumentError: `session_id` cannot be one.
        """
        return await self._connection.portal.run(self._repository.session_exists, session_id)

    def export_session(self, session_id: str) -> Generator[str, None, None]:
        """Yield a session as lines of JSON; see `MongoDBSessionRepository.export_session`."""
        export = self._repository._export(session_id)
        while lines := self._connection.portal.call(export.pull):
            yield from lines

    async def export_session_async(self, session_id: str) -> AsyncGenerator[str, None]:
        """Yield a session as lines of JSON; see `MongoDBSessionRepository.export_session`."""
        export = self._repository._export(session_id)
        while lines := await self._connection.portal.run(export.pull):
            for line in lines:
                yield line

    def import_session(self, stream: Iterable[str | bytes], session_id: str | None = None) -> str:
        """Store an exported session and return its id; see `MongoDBSessionRepository.import_session`."""
        return feed_blocking(self._connection.portal, self._repository._import(session_id), stream)

    async def import_session_async(
        self, stream: Iterable[str | bytes] | AsyncIterable[str | bytes], session_id: str | None = None
    ) -> str:
        """Store an exported session and return its id; see `MongoDBSessionRepository.import_session`."""
        return await feed(self._connection.portal, self._repository._import(session_id), stream)

    def fork_session(self, session_id: str, new_id: str, at_message: int | Mapping[str, int] | None = None) -> None:
        """Make another session with the same content, or its beginning; see `MongoDBSessionRepository.fork_session`."""
        self._connection.portal.call(self._repository.fork_session, session_id, new_id, at_message)

    async def fork_session_async(
        self, session_id: str, new_id: str, at_message: int | Mapping[str, int] | None = None
    ) -> None:
        """Make another session with the same content, or its beginning; see `MongoDBSessionRepository.fork_session`."""
        await self._connection.portal.run(self._repository.fork_session, session_id, new_id, at_message)

    def delete_session(self, session_id: str, **kwargs: Any) -> bool:
        """Delete a session with all that belongs to it; see `MongoDBSessionRepository.delete_session`."""
        return self._connection.portal.call(self._repository.delete_session, session_id, **kwargs)

    async def delete_session_async(self, session_id: str, **kwargs: Any) -> bool:
        """Delete a session with all that belongs to it; see `MongoDBSessionRepository.delete_session`."""
        return await self._connection.portal.run(self._repository.delete_session, session_id, **kwargs)

    def write_back(self, session_id: str) -> None:
        """Write a session back into one document; see `MongoDBSessionRepository.write_back`."""
        self._connection.portal.call(self._repository.write_back, session_id)

    async def write_back_async(self, session_id: str) -> None:
        """Write a session back into one document; see `MongoDBSessionRepository.write_back`."""
        await self._connection.portal.run(self._repository.write_back, session_id)

    def get_connection_stats(self) -> ConnectionStats:
        """Ask the server for its version and return it with the state of the pool."""
        return self._connection.portal.call(connection_stats, self._connection)

    async def get_connection_stats_async(self) -> ConnectionStats:
        """Ask the server for its version and return it with the state of the pool."""
        return await self._connection.portal.run(connection_stats, self._connection)

    def get_notification_stats(self) -> NotificationStats:
        """Return what became of the notifications that hooks of the factory's sessions submitted in this process."""
        return stats_of(self._connection)

    def ping(self) -> None:
        """Raise unless the server answers.

        Raises:
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        self._connection.portal.call(self._connection.ping)

    async def ping_async(self) -> None:
        """Raise unless the server answers.

        Raises:
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        await self._connection.portal.run(self._connection.ping)

    def check(self, timeout: float = 5.0) -> None:
        """Raise unless the factory can reach its collection of sessions: for the start of an application.

        Args:
            timeout: Seconds within which the server must answer.

        Raises:
            AccessDeniedError: The server refused the credentials, or does not let the user read the collection.
            ConfigurationError: The client options cannot be used, or TLS does not fit the server.
            DatabaseUnavailableError: No server could be reached in time.
            DatabaseTimeoutError: A server was reached and did not answer in time.
        """
        self._connection.portal.call(self._check, timeout)

    async def check_async(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - the twin of check
        """Raise unless the factory can reach its collection of sessions: for the start of an application.

        Args:
            timeout: Seconds within which the server must answer.

        Raises:
            AccessDeniedError: The server refused the credentials, or does not let the user read the collection.
            ConfigurationError: The client options cannot be used, or TLS does not fit the server.
            DatabaseUnavailableError: No server could be reached in time.
            DatabaseTimeoutError: A server was reached and did not answer in time.
        """
        await self._connection.portal.run(self._check, timeout)

    async def _check(self, seconds: float) -> None:
        collection = self._repository._store.collection
        await self._connection.check(collection.database, collection.name, seconds)

    def close(self, *, notification_timeout: float = DRAIN_TIMEOUT) -> None:
        """Deliver what hooks left behind, wait for writes under way, and close the client if it is the factory's own.

        Idempotent. Managers of the factory cannot be used any more.

        Args:
            notification_timeout: Seconds to wait for the notifications of all sessions. What is not delivered by then
                is logged by its name, and tried on as long as the process runs.
        """
        if not self._connection.closed:
            self._connection.portal.call(self._aclose, notification_timeout)

    async def close_async(self, *, notification_timeout: float = DRAIN_TIMEOUT) -> None:
        """Deliver what hooks left behind, wait for writes under way, and close the client if it is the factory's own.

        Idempotent. Managers of the factory cannot be used any more.

        Args:
            notification_timeout: Seconds to wait for the notifications of all sessions. What is not delivered by then
                is logged by its name, and tried on as long as the process runs.
        """
        if not self._connection.closed:
            await self._connection.portal.run(self._aclose, notification_timeout)

    async def _aclose(self, notification_timeout: float) -> None:
        try:
            await drain(self._connection, notification_timeout)
            await let_go(self, self._options.metadata_hook, self._options.feedback_hook)
        finally:
            await self._connection.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close_async()


def create_mongodb_session_manager(session_id: str, *args: Any, **kwargs: Any) -> MongoDBSessionManager:
    """Open a session; the arguments are those of `MongoDBSessionManager`."""
    return MongoDBSessionManager(session_id, *args, **kwargs)


async def create_mongodb_session_manager_async(
    session_id: str, *args: Any, **kwargs: Any
) -> AsyncMongoDBSessionManager:
    """Open a session without blocking the event loop; the arguments are those of `AsyncMongoDBSessionManager`."""
    return await AsyncMongoDBSessionManager(session_id, *args, **kwargs).open()


_global_lock = Lock()
_global_factory: MongoDBSessionManagerFactory | None = None
_of_applications: list[MongoDBSessionManagerFactory] = []


def initialize_global_factory(*args: Any, **kwargs: Any) -> MongoDBSessionManagerFactory:
    """Make the process-wide factory, close an earlier one, and return it.

    The arguments are those of `MongoDBSessionManagerFactory`. Its connections are those of `MongoDBConnectionPool`.
    """
    factory = MongoDBSessionManagerFactory(*args, **kwargs)
    _exchange(factory)
    return factory


def get_global_factory() -> MongoDBSessionManagerFactory:
    """Return the process-wide factory, else the factory of the only application in the process.

    Raises:
        FactoryNotInitializedError: There is no factory, or several applications have one each.
    """
    factories = _of_applications if _global_factory is None else [_global_factory]
    if len(factories) > 1:
        raise FactoryNotInitializedError(
            f"{len(factories)} applications of this process have a factory each, and there is no global one: take the "
            "application's, with mongodb_session_manager.fastapi.Factory"
        )
    if not factories:
        raise FactoryNotInitializedError("there is no global factory: call initialize_global_factory(...) first")
    return factories[0]


def close_global_factory() -> None:
    """Close the process-wide factory, if there is one."""
    _exchange(None)


def _exchange(factory: MongoDBSessionManagerFactory | None) -> None:
    global _global_factory
    with _global_lock:
        if factory is not None:
            factory._share(MongoDBConnectionPool._replace(factory._connection, taking=True))
        earlier, _global_factory = _global_factory, factory
    if earlier is not None:
        earlier.close()


@contextmanager
def factory_of_application(factory: MongoDBSessionManagerFactory) -> Iterator[None]:
    """Register the factory of an application while the application runs."""
    with _global_lock:
        _of_applications.append(factory)
    try:
        yield
    finally:
        with _global_lock:
            _of_applications.remove(factory)
