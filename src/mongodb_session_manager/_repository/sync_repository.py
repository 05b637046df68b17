"""The synchronous repository: each method calls its asynchronous twin on the I/O loop, and waits."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, Self, Unpack

from pymongo.collection import Collection
from pymongo.database import Database
from strands.session.session_repository import SessionRepository
from strands.types.session import Session, SessionAgent, SessionMessage

from .._format.labels import checked_owner
from .._io.drivers import SyncClient
from .._io.options import RepositoryOptions
from .._io.portal import Portal
from .._io.twins import blocking, finish_twins
from .._store.erasure import Erasure, ErasureProgress, ErasureReceipt, erase_blocking
from .async_repository import AsyncMongoDBSessionRepository as Async

if TYPE_CHECKING:
    from strands.multiagent import MultiAgentBase


class MongoDBSessionRepository(SessionRepository):
    """The synchronous twin of `AsyncMongoDBSessionRepository`, with the same arguments, methods and errors.

    Its methods can be called from any thread, and block it. On a thread that runs an event loop, use the twin.
    """

    def __init__(
        self,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str | None = "agent_sessions",
        **options: Unpack[RepositoryOptions],
    ) -> None:
        self._async = Async(connection_string, database_name, collection_name, **options)

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

    ping = blocking(Async.ping)
    open_session = blocking(Async.open_session)
    update_metadata = blocking(Async.update_metadata)
    get_metadata = blocking(Async.get_metadata)
    delete_metadata = blocking(Async.delete_metadata)
    add_feedback = blocking(Async.add_feedback)
    get_application_name = blocking(Async.get_application_name)
    get_feedbacks = blocking(Async.get_feedbacks)
    get_agent_config = blocking(Async.get_agent_config)
    list_agents = blocking(Async.list_agents)
    update_agent_config = blocking(Async.update_agent_config)
    get_message_count = blocking(Async.get_message_count)
    get_usage = blocking(Async.get_usage)
    list_sessions = blocking(Async.list_sessions)
    count_sessions = blocking(Async.count_sessions)
    session_exists = blocking(Async.session_exists)
    get_session_summary = blocking(Async.get_session_summary)
    update_session = blocking(Async.update_session)
    claim_session = blocking(Async.claim_session)
    fork_session = blocking(Async.fork_session)
    rewind_session = blocking(Async.rewind_session)
    write_back = blocking(Async.write_back)

    # The methods of Strands' `SessionRepository`.

    def create_session(self, session: Session, *, owner: str | None = None, **kwargs: Any) -> Session:
        return self._portal.call(self._async.create_session, session, owner=owner, **kwargs)

    def read_session(self, session_id: str, *, owner: str | None = None, **kwargs: Any) -> Session | None:
        return self._portal.call(self._async.read_session, session_id, owner=owner, **kwargs)

    def delete_session(self, session_id: str, *, owner: str | None = None, **kwargs: Any) -> bool:
        return self._portal.call(self._async.delete_session, session_id, owner=owner, **kwargs)

    def create_agent(
        self, session_id: str, session_agent: SessionAgent, *, owner: str | None = None, **kwargs: Any
    ) -> None:
        self._portal.call(self._async.create_agent, session_id, session_agent, owner=owner, **kwargs)

    def read_agent(
        self, session_id: str, agent_id: str, *, owner: str | None = None, **kwargs: Any
    ) -> SessionAgent | None:
        return self._portal.call(self._async.read_agent, session_id, agent_id, owner=owner, **kwargs)

    def update_agent(
        self, session_id: str, session_agent: SessionAgent, *, owner: str | None = None, **kwargs: Any
    ) -> None:
        self._portal.call(self._async.update_agent, session_id, session_agent, owner=owner, **kwargs)

    def create_message(
        self,
        session_id: str,
        agent_id: str,
        session_message: SessionMessage,
        *,
        owner: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._portal.call(self._async.create_message, session_id, agent_id, session_message, owner=owner, **kwargs)

    def read_message(
        self, session_id: str, agent_id: str, message_id: int, *, owner: str | None = None, **kwargs: Any
    ) -> SessionMessage | None:
        return self._portal.call(self._async.read_message, session_id, agent_id, message_id, owner=owner, **kwargs)

    def update_message(
        self,
        session_id: str,
        agent_id: str,
        session_message: SessionMessage,
        *,
        owner: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._portal.call(self._async.update_message, session_id, agent_id, session_message, owner=owner, **kwargs)

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
        kwargs |= {"newest_first": newest_first, "before": before, "owner": owner}
        return self._portal.call(self._async.list_messages, session_id, agent_id, limit, offset, **kwargs)

    def create_multi_agent(
        self, session_id: str, multi_agent: MultiAgentBase, *, owner: str | None = None, **kwargs: Any
    ) -> None:
        self._portal.call(self._async.create_multi_agent, session_id, multi_agent, owner=owner, **kwargs)

    def read_multi_agent(
        self, session_id: str, multi_agent_id: str, *, owner: str | None = None, **kwargs: Any
    ) -> dict[str, Any] | None:
        return self._portal.call(self._async.read_multi_agent, session_id, multi_agent_id, owner=owner, **kwargs)

    def update_multi_agent(
        self, session_id: str, multi_agent: MultiAgentBase, *, owner: str | None = None, **kwargs: Any
    ) -> None:
        self._portal.call(self._async.update_multi_agent, session_id, multi_agent, owner=owner, **kwargs)

    def export_session(self, session_id: str, *, owner: str | None = None) -> Generator[str, None, None]:
        export = self._async._copier_blocking().export(session_id, self._async._owner(owner))
        while lines := self._portal.call(export.pull):
            yield from lines

    def import_session(
        self, stream: Iterable[str | bytes], session_id: str | None = None, *, owner: str | None = None
    ) -> str:
        copier = self._async._copier_blocking()
        return copier.import_blocking(self._portal, stream, session_id, self._async._owner(owner))

    def export_owner(self, owner: str) -> Generator[str, None, None]:
        export = self._async._copier_blocking().export_owner(checked_owner(owner))
        while lines := self._portal.call(export.pull):
            yield from lines

    def erase_owner(self, owner: str, *, progress: Callable[[ErasureProgress], object] | None = None) -> ErasureReceipt:
        return erase_blocking(self._portal, Erasure(self._async._store, checked_owner(owner), progress))


finish_twins(MongoDBSessionRepository, Async)
