"""The part of a session manager that opens, reloads and closes its session."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TypeVar, Unpack
from weakref import WeakValueDictionary

from strands.session import RepositorySessionManager
from strands.types.agent import LocalAgent
from strands.types.session import SessionMessage

from .._format.documents import Document
from .._format.ids import checked_id
from .._format.sizes import is_large_session
from .._io.loop import ExitOrder, close_at_exit
from .._io.portal import running_loop
from .._notifications.notify import DRAIN_TIMEOUT, drain
from .._storage.session_storage import OfManager, SessionStorage
from .._storage.storage import MongoDBStorage
from .._store.lease_queue import Caller
from ..errors import (
    EventLoopError,
    MongoDBSessionError,
    SessionClosedError,
    SessionConflictError,
    SessionNotFoundError,
)
from .flusher import Flusher
from .multi_agents import OrchestratorSessionManager
from .open_session import OpenSession
from .options import Configuration, ManagerOptions
from .turns import Turns
from .unit_of_work import UnitOfWork

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SessionLifecycle(OrchestratorSessionManager):
    """Loads the session, and restores the agents and orchestrators in use when it is reloaded."""

    def __init__(
        self,
        session_id: str,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str | None = "agent_sessions",
        *,
        _shared: Configuration | None = None,
        **options: Unpack[ManagerOptions],
    ) -> None:
        self.session_id = checked_id(session_id, "session_id")
        configuration = _shared or Configuration.of(connection_string, database_name, collection_name, options)
        self._options = configuration.options
        self._connection = configuration.connection
        self._owns_connection = configuration.owns_connection
        self._repository = configuration.repository()
        self._work: UnitOfWork | None = None
        self._closed = False
        self._closing: asyncio.Event | None = None
        self._synced: set[str] = set()
        self._agents: WeakValueDictionary[str, LocalAgent] = WeakValueDictionary()
        self._orchestrators = WeakValueDictionary()
        self._session_storage = SessionStorage(self._repository._store, OfManager(self.session_id))
        self._lease = configuration.lease(self._repository, self.session_id)
        self._flusher = Flusher(self.session_id, self._connection, self._repository, self._lease)
        self._turns = Turns("agent", self._lease, self._connection, self._flusher)
        self._orchestrator_turns = Turns("multi_agent", self._lease, self._connection, self._flusher)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "new" if self._work is None else "open"
        return f"<{type(self).__name__} session_id={self.session_id!r}, {state}>"

    @property
    def storage(self) -> MongoDBStorage:
        """A Strands `Storage` whose values belong to the session, for `Agent(storage=manager.storage)`.

        The values are deleted, exported, forked and rewound with the session, and expire with it. The content that
        Strands' context manager stores of a message is removed when the message is redacted. A write raises
        `SessionNotFoundError` if the session does not exist. After `close`, every operation raises
        `SessionClosedError`.
        """
        return self._session_storage

    @property
    def _unit(self) -> UnitOfWork:
        if self._work is None:
            raise SessionClosedError(
                f"session {self.session_id!r} is not open: use `async with manager:` or "
                "`await create_mongodb_session_manager_async(...)`"
            )
        return self._work

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError(f"session {self.session_id!r} is closed: open it with a new manager")
        _ = self._unit

    # Opening.

    async def _open(self, caller: Caller) -> None:
        """Load the session. Runs on the loop of the client."""
        async with self._flusher.lock():
            if self._work is not None:
                return
            try:
                options = self._options
                document = await self._repository._open(
                    self.session_id,
                    self._lease,
                    caller,
                    creates=not options.must_exist,
                    title=options.title,
                    tags=options.tags,
                )
                work = await self._loaded(document)
                close_at_exit(self._aclose_at_exit, asyncio.get_running_loop(), ExitOrder.SESSIONS)
                self._session = OpenSession(work, self._repository, self._connection.portal, self._flusher)
                RepositorySessionManager.__init__(self, self.session_id, self._session)
                caller.check(self.session_id)
            except BaseException:
                await self._give_up()
                raise
            self._work = work
            self._session_storage.session.incarnation = work.incarnation

    async def _loaded(self, document: Document) -> UnitOfWork:
        inline = self._options.max_inline_attachment_bytes
        make = partial(UnitOfWork, self.session_id, document, inline, self._fetch_messages)
        return await asyncio.to_thread(make) if is_large_session(document) else make()

    def _fetch_messages(self, agent_id: str, begin: int, end: int) -> list[SessionMessage]:
        """Read messages, and block Strands' synchronous constructor of an agent until they are read."""
        if running_loop() is self._connection.portal.loop:
            raise EventLoopError(
                f"the conversation manager of agent {agent_id!r} needs {end - begin} older messages, which were not "
                "loaded with the session and cannot be read on the event loop of the client: construct the agent in a "
                "thread, as in `await asyncio.to_thread(Agent, ...)`"
            )
        read = self._repository.list_messages
        return self._connection.portal.call(read, self.session_id, agent_id, end - begin, begin)

    async def _give_up(self) -> None:
        """Release the lease, unless an invocation runs."""
        if self._lease is not None and not self._lease.has_turns:
            await self._lease.release()

    def _stop_opening(self, caller: Caller) -> None:
        """End an opening that was cancelled or has failed."""
        if self._lease is not None:
            with suppress(EventLoopError):
                self._connection.portal.submit(self._cancel_opening, caller)

    async def _cancel_opening(self, caller: Caller) -> None:
        caller.cancel()
        if self._work is not None:  # opened at the same moment
            await self._give_up()

    # Reloading.

    def _check_reloadable(self) -> None:
        self._check_open()
        if running := sorted(self._turns.running | self._orchestrator_turns.running):
            raise SessionConflictError(f"{running[0]!r} is in the middle of a turn: reload before or after it")

    async def _read_again(self, caller: Caller) -> UnitOfWork:
        """Flush, load the session again, and take its lease for the next turn. Runs on the loop of the client."""
        work = self._unit
        await self._flusher.flush_here(work)
        work.raise_pending_refusal()
        document = await self._repository._open(self.session_id, self._lease, caller, creates=False)
        try:
            if document["incarnation"] != work.incarnation:
                raise SessionNotFoundError(
                    f"session {self.session_id!r} was deleted and created again: open it with a new manager"
                )
            return await self._loaded(document)
        except BaseException:
            await self._give_up()
            raise

    def _continue_with(self, work: UnitOfWork) -> None:
        """Restore the agents and orchestrators in use from the reloaded session."""
        self._check_reloadable()
        try:
            self._unit.raise_unreported_refusal()
        except MongoDBSessionError as error:
            logger.warning("session_id=<%r>, error=<%s> | reload drops refused changes", self.session_id, error)
        if self._lease is not None:
            self._lease.pause()
        self._unit.close()
        self._synced.clear()
        self._work = self._session.work = work
        # Strands' constructor resets its records of initialized agents and synchronized state.
        RepositorySessionManager.__init__(self, self.session_id, self._session)
        failures = list(_failures(self._agents, self.initialize))
        failures += _failures(self._orchestrators, self.initialize_multi_agent)
        for failure in failures:
            raise failure

    # Closing.

    async def _aclose(self, notification_timeout: float = DRAIN_TIMEOUT) -> None:
        """Flush, deliver pending notifications, and close an owned connection. Runs on the loop of the client."""
        if self._closing is not None:
            await self._closing.wait()
            return
        self._closing = asyncio.Event()
        try:
            await self._close_work()
        finally:
            try:
                await drain(self._connection, notification_timeout, self.session_id)
            finally:
                try:
                    if self._owns_connection:
                        await self._connection.aclose()
                finally:
                    self._closing.set()

    async def _aclose_at_exit(self, seconds: float) -> None:
        """Flush when the interpreter exits; notifications and connections are closed later."""
        if self._closing is None:
            self._closing = asyncio.Event()
            try:
                await self._close_work()
            finally:
                self._closing.set()

    async def _close_work(self) -> None:
        self._closed = self._session_storage.session.is_closed = True
        if self._work is not None:
            self._work.close()
            if self._lease is not None:
                self._lease.end_all()
            if self._flusher.is_due(self._work):
                await self._flusher.flush_here(self._work)
            self._work.raise_unreported_refusal()


def _failures(sources: WeakValueDictionary[str, T], restore: Callable[[T], None]) -> Iterator[Exception]:
    """Restore agents or orchestrators; yield the errors of those that cannot be restored."""
    for source in list(sources.values()):
        try:
            restore(source)
        except Exception as error:
            yield error
