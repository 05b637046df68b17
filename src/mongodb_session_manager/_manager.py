"""The session managers: Strands' logic over a unit of work, and when what it recorded is sent.

A callback per event runs Strands' own methods, which record, and then awaits one flush on the loop that holds the
client. Nothing of it does I/O on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Self

from strands import Agent
from strands.hooks import (
    AfterInvocationEvent,
    AfterMultiAgentInvocationEvent,
    AfterNodeCallEvent,
    AgentInitializedEvent,
    HookRegistry,
    MessageAddedEvent,
    MultiAgentInitializedEvent,
)
from strands.session import RepositorySessionManager
from strands.types.agent import LocalAgent
from strands.types.content import Message

from ._capture import capture_config, capture_metrics
from ._connection import Client, Connection, Settings
from ._documents import checked_id
from ._loop import close_at_exit, running_loop
from ._repository import AsyncMongoDBSessionRepository
from ._unit_of_work import UnitOfWork
from .errors import ConfigurationError, MongoDBSessionError, SessionClosedError

logger = logging.getLogger(__name__)

SaveOn = Literal["message", "invocation"]

_only_recording: ContextVar[bool] = ContextVar("mongodb_session_manager_only_recording", default=False)


@contextmanager
def _recording_only() -> Iterator[None]:
    """Have Strands' synchronous methods record and leave the sending to their caller."""
    token = _only_recording.set(True)
    try:
        yield
    finally:
        _only_recording.reset(token)


@dataclass(frozen=True, kw_only=True)
class ManagerOptions:
    """What a manager is told beside the session and the connection; `MongoDBSessionManager` documents each."""

    database_name: str | None = None
    collection_name: str = "agent_sessions"
    application_name: str | None = None
    metadata_fields: Sequence[str] | None = None
    save_on: SaveOn = "message"

    def __post_init__(self) -> None:
        if self.save_on not in ("message", "invocation"):
            raise ConfigurationError(f'save_on must be "message" or "invocation", not {self.save_on!r}')

    def repository(self, connection: Connection) -> AsyncMongoDBSessionRepository:
        """Return the repository these options describe."""
        return AsyncMongoDBSessionRepository._over(
            connection, self.database_name, self.collection_name, self.application_name, self.metadata_fields
        )


class _SessionManager(RepositorySessionManager):
    """What both managers share: all but how the caller waits."""

    session_repository: UnitOfWork

    def _prepare(self, session_id: str, connection: Connection, options: ManagerOptions, *, owned: bool) -> None:
        self.session_id = checked_id(session_id, "session_id")
        self._connection = connection
        self._owns_connection = owned
        self._options = options
        self._repository = options.repository(connection)
        self._work: UnitOfWork | None = None
        self._closed = False
        self._stopped: dict[str, MongoDBSessionError] = {}
        self._turn: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "new" if self._work is None else "open"
        return f"<{type(self).__name__} session_id={self.session_id!r}, {state}>"

    @property
    def _unit(self) -> UnitOfWork:
        if self._work is None:
            raise SessionClosedError(
                f"session {self.session_id!r} is not open: use `async with manager:` or "
                "`await create_mongodb_session_manager_async(...)`"
            )
        return self._work

    async def _open(self) -> None:
        """Load the session. Runs on the loop of the client."""
        document = await self._repository.open_session(self.session_id)
        close_at_exit(self._aclose, asyncio.get_running_loop())
        work = UnitOfWork(self.session_id, document)
        super().__init__(self.session_id, work)
        self._work = work

    # Strands' contract: always synchronous, and never waiting for I/O on a thread whose event loop runs.

    def register_hooks(self, registry: HookRegistry, **kwargs: Any) -> None:
        """Register what keeps an agent or orchestrator stored."""
        registry.add_callback(AgentInitializedEvent, lambda event: self.initialize(event.agent))
        registry.add_callback(MessageAddedEvent, self._on_message_added)
        registry.add_callback(AfterInvocationEvent, self._on_after_invocation)
        registry.add_callback(MultiAgentInitializedEvent, lambda event: self.initialize_multi_agent(event.source))
        registry.add_callback(AfterNodeCallEvent, lambda event: self.sync_multi_agent(event.source))
        registry.add_callback(AfterMultiAgentInvocationEvent, lambda event: self.sync_multi_agent(event.source))

    def initialize(self, agent: LocalAgent, **kwargs: Any) -> None:
        """Restore an agent from what was loaded, or record it as new. Sends nothing.

        Raises:
            SessionException: An agent of that id was initialised by this manager before.
            InvalidArgumentError: The agent's id cannot be stored.
        """
        work = self._unit
        checked_id(agent.agent_id, "agent_id")
        super().initialize(agent, **kwargs)
        work.release(agent.agent_id)
        work.record_config(agent.agent_id, capture_config(agent))

    def append_message(self, message: Message, agent: LocalAgent, **kwargs: Any) -> None:
        """Append a message to the agent's stored conversation."""
        self._unit.raise_refusal(agent.agent_id)
        super().append_message(message, agent, **kwargs)
        self._settle(agent.agent_id)

    def redact_latest_message(self, redact_message: Message, agent: LocalAgent, **kwargs: Any) -> None:
        """Store `redact_message` in the place of the agent's latest message."""
        super().redact_latest_message(redact_message, agent, **kwargs)
        self._settle(agent.agent_id)

    def sync_agent(self, agent: LocalAgent, **kwargs: Any) -> None:
        """Store the agent's state, if it changed since it was stored last."""
        self._unit.record_config(agent.agent_id, capture_config(agent))
        super().sync_agent(agent, **kwargs)
        self._settle(agent.agent_id)

    async def _on_message_added(self, event: MessageAddedEvent[LocalAgent]) -> None:
        agent = event.agent
        with _recording_only():
            self.append_message(event.message, agent)
            self.sync_agent(agent)
        if self._is_due(event.message, agent):
            try:
                await self._flush(agent.agent_id)
            except MongoDBSessionError as error:
                self._stopped[agent.agent_id] = error
                raise

    async def _on_after_invocation(self, event: AfterInvocationEvent) -> None:
        agent = event.agent
        stopped = self._stopped.pop(agent.agent_id, None)
        try:
            with _recording_only():
                self.sync_agent(agent)
            self._unit.record_metrics(agent.agent_id, capture_metrics(agent))
        finally:
            await self._flush(agent.agent_id)
        if stopped is not None:
            # What could not be stored is by now, but the turn did stop; Strands may have wrapped the reason.
            raise stopped

    def _is_due(self, message: Message, agent: LocalAgent) -> bool:
        """Tell whether a message is sent at once, or with the end of the invocation that follows immediately."""
        if not isinstance(agent, Agent):
            return True  # no event tells the end of its invocations
        if self._options.save_on == "invocation":
            return False
        return message["role"] == "user" or any("toolUse" in block for block in message["content"])

    # Flushing.

    async def _store(self) -> None:
        """Send what is recorded, in order, one command at a time. Runs on the loop of the client."""
        async with self._connection.operation(), self._lock():
            work = self._unit
            if changes := work.pending():
                refused = await self._repository.apply(self.session_id, changes)
                work.settle(len(changes), refused)
                for agent_id, error in refused.items():
                    logger.debug(
                        "session_id=<%s>, agent_id=<%s>, error=<%s> | refused", self.session_id, agent_id, error
                    )

    def _lock(self) -> asyncio.Lock:
        loop = asyncio.get_running_loop()
        if self._turn is None or self._turn[0] is not loop:  # the first flush, or the first in a forked child
            self._turn = (loop, asyncio.Lock())
        return self._turn[1]

    async def _flush(self, agent_id: str | None = None) -> None:
        """Await that everything recorded is stored; raise what failed."""
        work = self._unit
        if not work.is_settled:
            await self._connection.portal.run(self._store)
        work.raise_refusal(agent_id)

    def _flush_blocking(self, agent_id: str | None = None) -> None:
        """Wait until everything recorded is stored; raise what failed."""
        work = self._unit
        if not work.is_settled:
            self._connection.portal.call(self._store)
        work.raise_refusal(agent_id)

    def _settle(self, agent_id: str) -> None:
        """Store what is recorded: wait for it, but on a thread whose loop runs leave that to the next flush."""
        if _only_recording.get():
            return
        if running_loop() is None:
            self._flush_blocking(agent_id)
        elif not self._unit.is_settled:
            self._connection.portal.submit(self._store)

    async def _aclose(self) -> None:
        """Store what is recorded and close what the manager owns. Runs on the loop of the client."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._work is not None:
                self._work.close()
                if not self._work.is_settled:
                    await self._store()
                self._work.raise_untold_refusal()
        finally:
            if self._owns_connection:
                await self._connection.aclose()


class MongoDBSessionManager(_SessionManager):
    """Keeps the agents of a session in MongoDB; for synchronous code, and for agents that run asynchronously.

    Constructing it opens the session: reads it, or creates it if it is new. One manager may serve several agents of
    its session, on any thread and any event loop. While an agent runs asynchronously nothing waits on its event loop;
    the manager's own methods, and constructing it, block the calling thread: in asynchronous code use
    `AsyncMongoDBSessionManager`.

    Args:
        session_id: The session; any non-empty text without NUL.
        connection_string: Where MongoDB is; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` takes the one named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        client: An `AsyncIOMotorClient` or `AsyncMongoClient` that the caller owns; it is never closed.
        application_name: Stored in the session if this manager creates it; never changed afterwards.
        metadata_fields: Fields of `metadata` that get an index each.
        save_on: `"message"` stores each message before the agent goes on, `"invocation"` all of a turn at its end.
        **client_options: Options of PyMongo's `MongoClient`, like `maxPoolSize`.

    Raises:
        ConfigurationError: An argument cannot be used.
        InvalidArgumentError: `session_id` cannot be one.
        DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
    """

    def __init__(
        self,
        session_id: str,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str = "agent_sessions",
        *,
        client: Client | None = None,
        application_name: str | None = None,
        metadata_fields: Sequence[str] | None = None,
        save_on: SaveOn = "message",
        **client_options: Any,
    ) -> None:
        checked_id(session_id, "session_id")
        options = ManagerOptions(
            database_name=database_name,
            collection_name=collection_name,
            application_name=application_name,
            metadata_fields=metadata_fields,
            save_on=save_on,
        )
        connection = Connection(Settings.checked(connection_string, client, client_options))
        self._prepare(session_id, connection, options, owned=True)
        self._open_blocking()

    @classmethod
    def _over(cls, connection: Connection, session_id: str, options: ManagerOptions) -> Self:
        """Return a manager over a connection that somebody else closes."""
        manager = cls.__new__(cls)
        manager._prepare(session_id, connection, options, owned=False)
        manager._open_blocking()
        return manager

    def _open_blocking(self) -> None:
        portal = self._connection.portal
        try:
            portal.call(self._open)
        except BaseException:
            if self._owns_connection:
                portal.call(self._connection.aclose)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def flush(self) -> None:
        """Return when everything recorded so far is stored.

        Raises:
            MongoDBSessionError: What failed. After a lost connection the next flush tries again.
        """
        self._flush_blocking()

    def get_application_name(self) -> str | None:
        """Return the name the session got at its creation."""
        return self._unit.application_name

    def close(self) -> None:
        """Store what is recorded, then close what the manager owns. Idempotent.

        Raises:
            MongoDBSessionError: What could not be stored, and was not raised before.
        """
        if not self._closed:
            self._connection.portal.call(self._aclose)


class AsyncMongoDBSessionManager(_SessionManager):
    """Keeps the agents of a session in MongoDB, without blocking an event loop.

    Open it with `async with` or `await create_mongodb_session_manager_async(...)`; then `Agent(session_manager=...)`
    restores from what was loaded and sends nothing. One manager may serve several agents of its session,
    asynchronous ones and synchronous ones, on any thread and any event loop.

    Args:
        session_id: The session; any non-empty text without NUL.
        connection_string: Where MongoDB is; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` takes the one named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        client: An `AsyncIOMotorClient` or `AsyncMongoClient` that the caller owns; it is never closed.
        application_name: Stored in the session if this manager creates it; never changed afterwards.
        metadata_fields: Fields of `metadata` that get an index each.
        save_on: `"message"` stores each message before the agent goes on, `"invocation"` all of a turn at its end.
        **client_options: Options of PyMongo's `MongoClient`, like `maxPoolSize`.

    Raises:
        ConfigurationError: An argument cannot be used.
        InvalidArgumentError: `session_id` cannot be one.
    """

    def __init__(
        self,
        session_id: str,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str = "agent_sessions",
        *,
        client: Client | None = None,
        application_name: str | None = None,
        metadata_fields: Sequence[str] | None = None,
        save_on: SaveOn = "message",
        **client_options: Any,
    ) -> None:
        checked_id(session_id, "session_id")
        options = ManagerOptions(
            database_name=database_name,
            collection_name=collection_name,
            application_name=application_name,
            metadata_fields=metadata_fields,
            save_on=save_on,
        )
        connection = Connection(Settings.checked(connection_string, client, client_options))
        self._prepare(session_id, connection, options, owned=True)

    @classmethod
    def _over(cls, connection: Connection, session_id: str, options: ManagerOptions) -> Self:
        """Return a manager, not open yet, over a connection that somebody else closes."""
        manager = cls.__new__(cls)
        manager._prepare(session_id, connection, options, owned=False)
        return manager

    async def open(self) -> Self:
        """Read the session, or create it if it is new; once it is open, do nothing.

        Raises:
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        if self._closed:
            raise SessionClosedError(f"session {self.session_id!r} is closed: open it with a new manager")
        if self._work is None:
            portal = self._connection.portal
            try:
                await portal.run(self._open)
            except BaseException:
                if self._owns_connection:
                    portal.submit(self._connection.aclose)
                raise
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def flush(self) -> None:
        """Return when everything recorded so far is stored.

        Raises:
            MongoDBSessionError: What failed. After a lost connection the next flush tries again.
        """
        await self._flush()

    async def get_application_name(self) -> str | None:
        """Return the name the session got at its creation."""
        return self._unit.application_name

    async def close(self) -> None:
        """Store what is recorded, then close what the manager owns. Idempotent.

        Raises:
            MongoDBSessionError: What could not be stored, and was not raised before.
        """
        if not self._closed:
            await self._connection.portal.run(self._aclose)
