"""The synchronous repository: each method calls its asynchronous twin on the I/O loop, and waits."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self, Unpack

from pymongo.collection import Collection
from pymongo.database import Database
from strands.session.session_repository import SessionRepository
from strands.types.session import Session, SessionAgent, SessionMessage

from .._copying.imports import feed_blocking
from .._format.documents import Document
from .._io.drivers import SyncClient
from .._io.options import RepositoryOptions
from .._io.portal import Portal
from .._io.twins import copy_docstrings
from .async_repository import AsyncMongoDBSessionRepository
from .listing import Order, SessionPage
from .metadata import AgentConfig, UsageReport

if TYPE_CHECKING:
    from strands.multiagent import MultiAgentBase


class MongoDBSessionRepository(SessionRepository):
    """The synchronous twin of `AsyncMongoDBSessionRepository`, with the same methods and errors.

    Its methods can be called from any thread, and block it. On a thread that runs an event loop, use the twin.

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
        self._async = AsyncMongoDBSessionRepository(connection_string, database_name, collection_name, **options)

    @property
    def client(self) -> SyncClient:
        """A synchronous client on the repository's connections, for the caller's own commands.

        Raises:
            ConfigurationError: `client` is a `pymongo.AsyncMongoClient`.
            SessionClosedError: The repository is closed.
        """
        return self._async._connection.synchronous_client()

    @property
    def database(self) -> Database[dict[str, Any]]:
        """The database of the sessions, on the synchronous client."""
        return self.client[self._async._store.collection.database]

    @property
    def collection(self) -> Collection[dict[str, Any]]:
        """The collection of the sessions, on the synchronous client."""
        return self.database[self._async._store.collection.name]

    @property
    def _portal(self) -> Portal:
        return self._async.portal

    def __repr__(self) -> str:
        return repr(self._async).replace("Async", "", 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._async._connection.close_blocking()

    def ping(self) -> None:
        self._portal.call(self._async.ping)

    def open_session(self, session_id: str) -> Document:
        return self._portal.call(self._async.open_session, session_id)

    def create_session(self, session: Session, **kwargs: Any) -> Session:
        return self._portal.call(self._async.create_session, session, **kwargs)

    def read_session(self, session_id: str, **kwargs: Any) -> Session | None:
        return self._portal.call(self._async.read_session, session_id, **kwargs)

    def delete_session(self, session_id: str, **kwargs: Any) -> bool:
        return self._portal.call(self._async.delete_session, session_id, **kwargs)

    def create_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        self._portal.call(self._async.create_agent, session_id, session_agent, **kwargs)

    def read_agent(self, session_id: str, agent_id: str, **kwargs: Any) -> SessionAgent | None:
        return self._portal.call(self._async.read_agent, session_id, agent_id, **kwargs)

    def update_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        self._portal.call(self._async.update_agent, session_id, session_agent, **kwargs)

    def create_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        self._portal.call(self._async.create_message, session_id, agent_id, session_message, **kwargs)

    def read_message(self, session_id: str, agent_id: str, message_id: int, **kwargs: Any) -> SessionMessage | None:
        return self._portal.call(self._async.read_message, session_id, agent_id, message_id, **kwargs)

    def update_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        self._portal.call(self._async.update_message, session_id, agent_id, session_message, **kwargs)

    def list_messages(
        self, session_id: str, agent_id: str, limit: int | None = None, offset: int = 0, **kwargs: Any
    ) -> list[SessionMessage]:
        return self._portal.call(self._async.list_messages, session_id, agent_id, limit, offset, **kwargs)

    def create_multi_agent(self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any) -> None:
        self._portal.call(self._async.create_multi_agent, session_id, multi_agent, **kwargs)

    def read_multi_agent(self, session_id: str, multi_agent_id: str, **kwargs: Any) -> dict[str, Any] | None:
        return self._portal.call(self._async.read_multi_agent, session_id, multi_agent_id, **kwargs)

    def update_multi_agent(self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any) -> None:
        self._portal.call(self._async.update_multi_agent, session_id, multi_agent, **kwargs)

    def update_metadata(self, session_id: str, metadata: dict[str, Any]) -> None:
        self._portal.call(self._async.update_metadata, session_id, metadata)

    def get_metadata(self, session_id: str) -> dict[str, Any]:
        return self._portal.call(self._async.get_metadata, session_id)

    def delete_metadata(self, session_id: str, keys: list[str]) -> None:
        self._portal.call(self._async.delete_metadata, session_id, keys)

    def add_feedback(self, session_id: str, feedback: dict[str, Any]) -> None:
        self._portal.call(self._async.add_feedback, session_id, feedback)

    def get_application_name(self, session_id: str) -> str | None:
        return self._portal.call(self._async.get_application_name, session_id)

    def get_feedbacks(self, session_id: str) -> list[dict[str, Any]]:
        return self._portal.call(self._async.get_feedbacks, session_id)

    def get_agent_config(self, session_id: str, agent_id: str) -> AgentConfig | None:
        return self._portal.call(self._async.get_agent_config, session_id, agent_id)

    def list_agents(self, session_id: str) -> list[AgentConfig]:
        return self._portal.call(self._async.list_agents, session_id)

    def update_agent_config(
        self,
        session_id: str,
        agent_id: str,
        model: str | None = None,
        system_prompt: str | None = None,
        prompt_metadata: dict[str, Any] | None = None,
    ) -> None:
        self._portal.call(self._async.update_agent_config, session_id, agent_id, model, system_prompt, prompt_metadata)

    def get_message_count(self, session_id: str, agent_id: str) -> int:
        return self._portal.call(self._async.get_message_count, session_id, agent_id)

    def get_usage(self, session_id: str) -> UsageReport:
        return self._portal.call(self._async.get_usage, session_id)

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
        return self._portal.call(
            self._async.list_sessions, application_name, metadata, created_after, updated_after, order, limit, cursor
        )

    def count_sessions(
        self,
        application_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        created_after: datetime | None = None,
        updated_after: datetime | None = None,
    ) -> int:
        return self._portal.call(self._async.count_sessions, application_name, metadata, created_after, updated_after)

    def session_exists(self, session_id: str) -> bool:
        return self._portal.call(self._async.session_exists, session_id)

    def export_session(self, session_id: str) -> Generator[str, None, None]:
        export = self._async._export(session_id)
        while lines := self._portal.call(export.pull):
            yield from lines

    def import_session(self, stream: Iterable[str | bytes], session_id: str | None = None) -> str:
        return feed_blocking(self._portal, self._async._import(session_id), stream)

    def fork_session(self, session_id: str, new_id: str, at_message: int | Mapping[str, int] | None = None) -> None:
        self._portal.call(self._async.fork_session, session_id, new_id, at_message)

    def write_back(self, session_id: str) -> None:
        self._portal.call(self._async.write_back, session_id)


copy_docstrings(MongoDBSessionRepository, AsyncMongoDBSessionRepository)
