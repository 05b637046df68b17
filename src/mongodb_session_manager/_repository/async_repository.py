"""The asynchronous repository."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Self

from .._format.attachment_refs import MAX_INLINE_ATTACHMENT_BYTES
from .._format.buckets import MAX_EMBEDDED_BYTES, MAX_EMBEDDED_MESSAGES
from .._io.connection import Connection
from .._io.drivers import Client
from .._io.portal import Portal
from .._io.settings import Settings
from .._store.store import SessionStore
from .conversation import ConversationMethods
from .copying import CopyingMethods
from .listing import ListingMethods
from .metadata import MetadataMethods
from .multi_agents import MultiAgentMethods

_OPTIONS = (
    *("connection_string", "database_name", "collection_name", "client", "application_name", "metadata_fields"),
    *("max_inline_attachment_bytes", "max_embedded_messages", "max_embedded_bytes", "session_ttl"),
)


class SharedRepository(ConversationMethods, MultiAgentMethods, MetadataMethods, ListingMethods, CopyingMethods):
    """The methods of `AsyncMongoDBSessionRepository`, on a store whose connection somebody else can own."""

    @property
    def portal(self) -> Portal:
        """The way to the event loop of this repository for callers on other threads and loops."""
        return self._connection.portal

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._store.collection!r}, {self._connection!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Wait for pending operations, and close the client unless the caller owns it. Idempotent."""
        await self._connection.aclose()

    async def ping(self) -> None:
        """Raise unless the server answers.

        Raises:
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        await self._connection.ping()


class AsyncMongoDBSessionRepository(SharedRepository):
    """Sessions in a MongoDB collection, one document each.

    Every method is a coroutine on the event loop the repository was first used on. Methods named like those of
    `strands.session.SessionRepository` do what Strands says of them.

    Args:
        connection_string: Where MongoDB is; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` takes the one named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        client: An `AsyncIOMotorClient`, `AsyncMongoClient` or `MongoClient` that the caller owns; it is never closed.
        application_name: Stored in sessions that this repository creates.
        metadata_fields: Fields of `metadata` that get an index each.
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
        max_inline_attachment_bytes: int | None = MAX_INLINE_ATTACHMENT_BYTES,
        max_embedded_messages: int | None = MAX_EMBEDDED_MESSAGES,
        max_embedded_bytes: int | None = MAX_EMBEDDED_BYTES,
        session_ttl: timedelta | None = None,
        **client_options: Any,
    ) -> None:
        settings = Settings.checked(connection_string, client, client_options, _OPTIONS)
        super().__init__(
            SessionStore(
                Connection(settings),
                database_name,
                collection_name,
                application_name=application_name,
                metadata_fields=metadata_fields,
                max_inline_attachment_bytes=max_inline_attachment_bytes,
                max_embedded_messages=max_embedded_messages,
                max_embedded_bytes=max_embedded_bytes,
                session_ttl=session_ttl,
            )
        )
