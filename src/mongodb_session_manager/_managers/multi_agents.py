"""The part of a session manager that stores orchestrators: Strands' graphs and swarms."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from strands.hooks import (
    AfterMultiAgentInvocationEvent,
    AfterNodeCallEvent,
    BeforeMultiAgentInvocationEvent,
    HookRegistry,
    MultiAgentInitializedEvent,
)
from strands.session import RepositorySessionManager

from .._format.ids import checked_id
from .._format.multi_agents import path_of
from ..errors import DatabaseError, MongoDBSessionError
from .flusher import Flusher
from .open_session import OpenSession
from .turns import Turns
from .unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from strands.multiagent import MultiAgentBase


class OrchestratorSessionManager(RepositorySessionManager):
    """Restores and stores orchestrators."""

    _session: OpenSession
    _orchestrators: WeakValueDictionary[str, MultiAgentBase]
    _orchestrator_turns: Turns
    _flusher: Flusher

    @property
    @abstractmethod
    def _unit(self) -> UnitOfWork: ...

    def _register_multi_agent_hooks(self, registry: HookRegistry, *, each_node: bool) -> None:
        # First: another callback that is slow or raises must not prevent storing a node's result.
        registry.add_callback(MultiAgentInitializedEvent, lambda event: self.initialize_multi_agent(event.source))
        registry.add_callback(BeforeMultiAgentInvocationEvent, self._on_before_multi_agent_invocation, order=math.inf)
        if each_node:
            registry.add_callback(AfterNodeCallEvent, self._on_after_node_call, order=-math.inf)
        registry.add_callback(AfterMultiAgentInvocationEvent, self._on_after_multi_agent_invocation, order=-math.inf)

    def initialize_multi_agent(self, source: MultiAgentBase, **kwargs: Any) -> None:
        """Restore a graph or swarm from the loaded session, or record it as new. Sends nothing.

        Raises:
            InvalidArgumentError: Its id is not valid.
            DatabaseError: It cannot restore the stored state.
        """
        checked_id(source.id, "multi_agent_id")
        is_stored = self._unit.multi_agents.read(source.id) is not None
        try:
            self._session.for_strands(super().initialize_multi_agent, source, **kwargs)
            self._orchestrators[source.id] = source
            return
        except Exception as error:  # a graph restores itself and can raise any exception
            if isinstance(error, MongoDBSessionError) or not is_stored:
                raise
            reason = type(error).__name__
        raise DatabaseError(
            f"session {self.session_id!r}: the field '{path_of(source.id)}.state' cannot be restored ({reason})"
        )

    def sync_multi_agent(self, source: MultiAgentBase, **kwargs: Any) -> None:
        """Store the state of a graph or swarm, if it has changed."""
        work = self._unit
        self._session.for_strands(super().sync_multi_agent, source, **kwargs)
        self._flusher.recorded(source, work, work.multi_agents.raise_refusal, source.id)

    async def _flush_multi_agent(self, multi_agent_id: str) -> None:
        await self._flusher.flush(self._unit)
        self._unit.multi_agents.raise_refusal(multi_agent_id)

    async def _on_before_multi_agent_invocation(self, event: BeforeMultiAgentInvocationEvent) -> None:
        # The first node calls a model before anything is stored.
        await self._orchestrator_turns.begin(event.source.id, is_stored_first=False)

    async def _on_after_node_call(self, event: AfterNodeCallEvent) -> None:
        source = event.source
        try:
            with self._flusher.recording(source):
                self.sync_multi_agent(source)
            await self._flush_multi_agent(source.id)
        except MongoDBSessionError as error:
            self._orchestrator_turns.stop(source.id, error)
            raise

    async def _on_after_multi_agent_invocation(self, event: AfterMultiAgentInvocationEvent) -> None:
        source = event.source
        self._orchestrator_turns.end(source.id)
        stopped = self._orchestrator_turns.stopped_by(source.id)
        if stopped is None:
            with self._flusher.recording(source):
                self.sync_multi_agent(source)
        # Otherwise Strands reports the orchestrator as failed, with no node left to run. The state recorded at the node
        # that could not be stored is the one to resume from.
        self._orchestrator_turns.release_lease(source.id)
        await self._flush_multi_agent(source.id)
        if stopped is not None:
            raise stopped  # a swarm has only logged it
