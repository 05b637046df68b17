"""One client for many sessions: the factory, and the one-call constructors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable
from dataclasses import replace
from typing import Any, Self, Unpack

from strands.types.session import SessionMessage

from .._format.labels import checked_owner
from .._io.connection import Connection
from .._io.portal import Portal
from .._io.twins import awaitable, blocking, finish_twins
from .._notifications.notify import DRAIN_TIMEOUT, NotificationStats, drain, stats_of
from .._repository.async_repository import AsyncMongoDBSessionRepository as Repository
from .._storage.storage import MongoDBStorage, SharedStorage
from .._store.erasure import Erasure, ErasureProgress, ErasureReceipt, erase, erase_blocking
from ..errors import ConfigurationError
from .async_manager import AsyncMongoDBSessionManager
from .hooked_methods import HookedMethods
from .options import Configuration, ManagerOptions, SessionOptions
from .pending import PendingSession
from .pool import ConnectionStats, connection_stats
from .sync_manager import MongoDBSessionManager


class MongoDBSessionManagerFactory(HookedMethods):
    """Creates session managers that share one client, and with it one connection pool.

    Creating a manager costs one command: it opens no connection and builds no index. The factory can be created before
    the process forks; the child opens its own client.

    Args:
        connection_string: The connection string of MongoDB; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` uses the database named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        **options: `ManagerOptions` documents them.

    Raises:
        ConfigurationError: An argument is invalid or an option is unknown.
    """

    def __init__(
        self,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str | None = "agent_sessions",
        **options: Unpack[ManagerOptions],
    ) -> None:
        self._configuration = Configuration.of(connection_string, database_name, collection_name, options)
        self._options = self._configuration.options
        self._connection = self._configuration.connection
        self._async = self._configuration.repository()  # now, because it checks its options

    def _share(self, connection: Connection) -> None:
        """Use another connection with the same settings; only before the first use."""
        if connection is not self._connection:
            self._configuration = replace(self._configuration, connection=connection)
            self._connection = connection
            self._async = self._configuration.repository()

    @property
    def _portal(self) -> Portal:
        return self._connection.portal

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._connection!r}>"

    def create_session_manager(
        self,
        session_id: str,
        *,
        database_name: str | None = None,
        collection_name: str | None = None,
        **options: Unpack[SessionOptions],
    ) -> MongoDBSessionManager:
        """Open a session, with one command.

        Args:
            session_id: The session; it is created if it is new.
            database_name: `None` uses the factory's.
            collection_name: `None` uses the factory's.
            **options: They take the place of the factory's; `SessionOptions` documents them.

        Raises:
            ConfigurationError: An option is unknown or invalid.
            InvalidArgumentError: `session_id` is not a valid id.
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        names = {"database_name": database_name, "collection_name": collection_name}
        return MongoDBSessionManager(session_id, _shared=self._configuration.shared({**names, **options}))

    def create_session_manager_async(
        self,
        session_id: str,
        *,
        database_name: str | None = None,
        collection_name: str | None = None,
        **options: Unpack[SessionOptions],
    ) -> PendingSession:
        """Open a session with `await` or `async with`, with one command and without blocking the event loop.

        Arguments and errors are the same as for `create_session_manager`.
        """
        names = {"database_name": database_name, "collection_name": collection_name}

        def make() -> AsyncMongoDBSessionManager:
            return AsyncMongoDBSessionManager(session_id, _shared=self._configuration.shared({**names, **options}))

        return PendingSession("create_session_manager_async", make)

    def create_storage(
        self, collection_name: str | None = "agent_storage", *, database_name: str | None = None
    ) -> MongoDBStorage:
        """Return a Strands `Storage` on the factory's client; sends nothing.

        Args:
            collection_name: The collection of the values. It must not be that of the sessions.
            database_name: `None` uses the factory's.

        Raises:
            ConfigurationError: An argument is invalid.
        """
        if collection_name == self._options.collection_name:
            raise ConfigurationError(f"collection_name {collection_name!r} is where the factory keeps its sessions")
        return SharedStorage(self._connection, database_name or self._options.database_name, collection_name)

    list_sessions = blocking(Repository.list_sessions)
    list_sessions_async = awaitable(Repository.list_sessions)
    count_sessions = blocking(Repository.count_sessions)
    count_sessions_async = awaitable(Repository.count_sessions)
    session_exists = blocking(Repository.session_exists)
    session_exists_async = awaitable(Repository.session_exists)
    get_session_summary = blocking(Repository.get_session_summary)
    get_session_summary_async = awaitable(Repository.get_session_summary)
    get_usage = blocking(Repository.get_usage)
    get_usage_async = awaitable(Repository.get_usage)
    get_feedbacks = blocking(Repository.get_feedbacks)
    get_feedbacks_async = awaitable(Repository.get_feedbacks)
    update_session = blocking(Repository.update_session)
    update_session_async = awaitable(Repository.update_session)
    claim_session = blocking(Repository.claim_session)
    claim_session_async = awaitable(Repository.claim_session)
    fork_session = blocking(Repository.fork_session)
    fork_session_async = awaitable(Repository.fork_session)
    rewind_session = blocking(Repository.rewind_session)
    rewind_session_async = awaitable(Repository.rewind_session)
    ping = blocking(Repository.ping)
    ping_async = awaitable(Repository.ping)
    write_back = blocking(Repository.write_back)
    write_back_async = awaitable(Repository.write_back)

    def export_session(self, session_id: str, *, owner: str | None = None) -> Generator[str, None, None]:
        """Yield a session as lines of JSON; see `MongoDBSessionRepository.export_session`."""
        export = self._async._copier_blocking().export(session_id, self._async._owner(owner))
        while lines := self._portal.call(export.pull):
            yield from lines

    async def export_session_async(self, session_id: str, *, owner: str | None = None) -> AsyncGenerator[str, None]:
        export = (await self._portal.run(self._async._copier)).export(session_id, self._async._owner(owner))
        while lines := await self._portal.run(export.pull):
            for line in lines:
                yield line

    def import_session(
        self, stream: Iterable[str | bytes], session_id: str | None = None, *, owner: str | None = None
    ) -> str:
        """Store an exported session and return its id; see `MongoDBSessionRepository.import_session`."""
        copier = self._async._copier_blocking()
        return copier.import_blocking(self._portal, stream, session_id, self._async._owner(owner))

    async def import_session_async(
        self,
        stream: Iterable[str | bytes] | AsyncIterable[str | bytes],
        session_id: str | None = None,
        *,
        owner: str | None = None,
    ) -> str:
        copier = await self._portal.run(self._async._copier)
        return await copier.import_session(self._portal, stream, session_id, self._async._owner(owner))

    def export_owner(self, owner: str) -> Generator[str, None, None]:
        """Yield all sessions of an owner as lines of JSON; see `MongoDBSessionRepository.export_owner`."""
        export = self._async._copier_blocking().export_owner(checked_owner(owner))
        while lines := self._portal.call(export.pull):
            yield from lines

    async def export_owner_async(self, owner: str) -> AsyncGenerator[str, None]:
        export = (await self._portal.run(self._async._copier)).export_owner(checked_owner(owner))
        while lines := await self._portal.run(export.pull):
            for line in lines:
                yield line

    def erase_owner(self, owner: str, *, progress: Callable[[ErasureProgress], object] | None = None) -> ErasureReceipt:
        """Delete all sessions of an owner and return a receipt; see `MongoDBSessionRepository.erase_owner`."""
        return erase_blocking(self._portal, Erasure(self._async._store, checked_owner(owner), progress))

    async def erase_owner_async(
        self, owner: str, *, progress: Callable[[ErasureProgress], object] | None = None
    ) -> ErasureReceipt:
        return await erase(self._portal, Erasure(self._async._store, checked_owner(owner), progress))

    def list_messages(
        self,
        session_id: str,
        agent_id: str,
        limit: int | None = None,
        offset: int = 0,
        *,
        newest_first: bool = False,
        before: int | None = None,
        owner: str | None = None,
        **kwargs: Any,
    ) -> list[SessionMessage]:
        """Return messages of an agent, oldest first; see `MongoDBSessionRepository.list_messages`."""
        page = {"newest_first": newest_first, "before": before, "owner": owner, **kwargs}
        return self._portal.call(self._async.list_messages, session_id, agent_id, limit, offset, **page)

    async def list_messages_async(
        self,
        session_id: str,
        agent_id: str,
        limit: int | None = None,
        offset: int = 0,
        *,
        newest_first: bool = False,
        before: int | None = None,
        owner: str | None = None,
        **kwargs: Any,
    ) -> list[SessionMessage]:
        page = {"newest_first": newest_first, "before": before, "owner": owner, **kwargs}
        return await self._portal.run(self._async.list_messages, session_id, agent_id, limit, offset, **page)

    def delete_session(self, session_id: str, *, owner: str | None = None, **kwargs: Any) -> bool:
        """Delete a session with everything that belongs to it; see `MongoDBSessionRepository.delete_session`."""
        return self._portal.call(self._async.delete_session, session_id, owner=owner, **kwargs)

    async def delete_session_async(self, session_id: str, *, owner: str | None = None, **kwargs: Any) -> bool:
        return await self._portal.run(self._async.delete_session, session_id, owner=owner, **kwargs)

    def get_connection_stats(self) -> ConnectionStats:
        """Return the state of the pool, with the version of the server, which is asked for it."""
        return self._portal.call(connection_stats, self._connection)

    async def get_connection_stats_async(self) -> ConnectionStats:
        return await self._portal.run(connection_stats, self._connection)

    def get_notification_stats(self) -> NotificationStats:
        """Return the state of the notifications that hooks of the factory's sessions submitted in this process."""
        return stats_of(self._connection)

    def check(self, timeout: float = 5.0) -> None:
        """Raise unless the factory can read its collection of sessions: for the start of an application.

        Args:
            timeout: Seconds within which the server must answer.

        Raises:
            AccessDeniedError: The server refused the credentials, or the user may not read the collection.
            ConfigurationError: A client option is invalid, or the TLS settings do not match the server's.
            DatabaseUnavailableError: No server could be reached in time.
            DatabaseTimeoutError: A server was reached and did not answer in time.
        """
        self._portal.call(self._check, timeout)

    async def check_async(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - the twin of check
        await self._portal.run(self._check, timeout)

    def close(self, *, notification_timeout: float = DRAIN_TIMEOUT) -> None:
        """Deliver pending notifications, wait for writes in progress, and close the client if the factory owns it.

        Idempotent. The factory's managers cannot be used afterwards.

        Args:
            notification_timeout: Seconds to wait for the notifications of all sessions. Undelivered ones are logged by
                name; their delivery continues while the process runs.
        """
        if not self._connection.closed:
            self._portal.call(self._aclose, notification_timeout)

    async def close_async(self, *, notification_timeout: float = DRAIN_TIMEOUT) -> None:
        if not self._connection.closed:
            await self._portal.run(self._aclose, notification_timeout)

    async def _check(self, seconds: float) -> None:
        collection = self._async._store.collection
        await self._connection.check(collection.database, collection.name, seconds)

    async def _aclose(self, notification_timeout: float) -> None:
        try:
            await drain(self._connection, notification_timeout)
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


finish_twins(MongoDBSessionManagerFactory)


def create_mongodb_session_manager(
    session_id: str,
    connection_string: str | None = None,
    database_name: str | None = None,
    collection_name: str | None = "agent_sessions",
    **options: Unpack[ManagerOptions],
) -> MongoDBSessionManager:
    """Open a session; the arguments are the same as for `MongoDBSessionManager`."""
    return MongoDBSessionManager(session_id, connection_string, database_name, collection_name, **options)


def create_mongodb_session_manager_async(
    session_id: str,
    connection_string: str | None = None,
    database_name: str | None = None,
    collection_name: str | None = "agent_sessions",
    **options: Unpack[ManagerOptions],
) -> PendingSession:
    """Open a session with `await` or `async with`, without blocking the event loop.

    The arguments are the same as for `AsyncMongoDBSessionManager`.
    """

    def make() -> AsyncMongoDBSessionManager:
        return AsyncMongoDBSessionManager(session_id, connection_string, database_name, collection_name, **options)

    return PendingSession("create_mongodb_session_manager_async", make)
