"""The asynchronous repository."""

from __future__ import annotations

from typing import Any, Self, Unpack

from .._io.connection import Connection
from .._io.options import ContentOptions, RepositoryOptions
from .._io.portal import Portal
from .._io.settings import Settings
from .._store.store import SessionStore
from .conversation import ConversationMethods
from .copying import CopyingMethods
from .erasure import ErasureMethods
from .labels import LabelMethods
from .listing import ListingMethods
from .metadata import MetadataMethods
from .multi_agents import MultiAgentMethods

_OPTIONS = ("connection_string", "database_name", "collection_name", "client", *ContentOptions.__annotations__)


class SharedRepository(
    ConversationMethods,
    MultiAgentMethods,
    MetadataMethods,
    LabelMethods,
    ListingMethods,
    CopyingMethods,
    ErasureMethods,
):
    """The methods of `AsyncMongoDBSessionRepository`, on a store whose connection can have another owner."""

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

    Every method is a coroutine on the event loop on which the repository was first used. Methods that share a name with
    one of `strands.session.SessionRepository` behave as Strands documents.

    Args:
        connection_string: The server; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` uses the database named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        **options: `RepositoryOptions` documents them.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    def __init__(
        self,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str | None = "agent_sessions",
        **options: Unpack[RepositoryOptions],
    ) -> None:
        of_client: dict[str, Any] = dict(options)
        client = of_client.pop("client", None)
        of_content = {name: of_client.pop(name) for name in ContentOptions.__annotations__ if name in of_client}
        connection = Connection(Settings.checked(connection_string, client, of_client, _OPTIONS))
        super().__init__(SessionStore(connection, database_name, collection_name, **of_content))
