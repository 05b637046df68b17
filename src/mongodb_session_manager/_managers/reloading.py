"""The part of a session manager that reads its session again, for agents that stay in memory."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeVar
from weakref import WeakValueDictionary

from strands.session import RepositorySessionManager
from strands.types.agent import LocalAgent

from .._format.documents import Document
from .._repository.async_repository import SharedRepository
from .._store.lease_queue import Caller
from ..errors import MongoDBSessionError, SessionConflictError, SessionNotFoundError
from .multi_agents import OrchestratorSessionManager
from .unit_of_work import UnitOfWork

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ReloadableSessionManager(OrchestratorSessionManager):
    """Restores the agents and orchestrators in use from a session that was read again."""

    _repository: SharedRepository
    _work: UnitOfWork | None
    _agents: WeakValueDictionary[str, LocalAgent]
    _invoked: set[str]
    _synced: set[str]

    @abstractmethod
    async def _loaded(self, document: Document) -> UnitOfWork: ...

    @abstractmethod
    async def _give_up(self) -> None: ...

    @abstractmethod
    def _check_open(self) -> None: ...

    def _check_reloadable(self) -> None:
        self._check_open()
        if running := sorted(self._invoked | self._invoked_multi_agents):
            raise SessionConflictError(f"{running[0]!r} is in the middle of a turn: reload before or after it")

    async def _read_again(self, caller: Caller) -> UnitOfWork:
        """Flush, and load the session again; take its lease for the next turn. Runs on the loop of the client."""
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
        """Restore the agents and orchestrators in use from a session that was loaded again."""
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
        # Strands' constructor: no agent is initialized, and nothing is known to be synchronized.
        RepositorySessionManager.__init__(self, self.session_id, self._session)
        failures = list(_failures(self._agents, self.initialize))
        failures += _failures(self._orchestrators, self.initialize_multi_agent)
        for failure in failures:
            raise failure


def _failures(sources: WeakValueDictionary[str, T], restore: Callable[[T], None]) -> Iterator[Exception]:
    """Restore agents or orchestrators; yield the errors of those that cannot be restored."""
    for source in list(sources.values()):
        try:
            restore(source)
        except Exception as error:
            yield error
