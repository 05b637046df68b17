"""`ChangeLog`: the pending changes of a session, and the refusals of changes that cannot be stored."""

from __future__ import annotations

from collections.abc import Mapping

from .._format.changes import Change, Loaded
from .._format.multi_agents import MultiAgents
from ..errors import AgentNotFoundError, MongoDBSessionError, SessionClosedError, StateTooLargeError
from .recorded_agent import RecordedAgent


class ChangeLog:
    """The pending changes of agents, in order. `multi_agents` keeps those of the orchestrators.

    Recorded changes stay pending until `settle` reports their outcome. The log is only appended to and cut at its head,
    which is atomic in Python, so recording needs no lock. Two threads must not record changes of one agent at the same
    time; Strands does not.

    Args:
        session_id: The session.
        agents: Its agents by id.
        multi_agents: Its graphs and swarms.
    """

    def __init__(self, session_id: str, agents: dict[str, RecordedAgent], multi_agents: MultiAgents) -> None:
        self.session_id = session_id
        self.multi_agents = multi_agents
        self._agents = agents
        self._log: list[Change] = []
        self._closed = False

    def agent(self, agent_id: str) -> RecordedAgent:
        """Return an agent of the session.

        Raises:
            AgentNotFoundError: The session had no such agent when it was opened, and none was recorded.
        """
        agent = self._agents.get(agent_id)
        if agent is None:
            raise AgentNotFoundError(f"session {self.session_id!r} has no agent {agent_id!r}")
        return agent

    @property
    def is_closed(self) -> bool:
        """Whether recording is refused."""
        return self._closed

    @property
    def is_settled(self) -> bool:
        """Whether no change is pending."""
        return not self._log and self.multi_agents.is_settled

    @property
    def loaded(self) -> dict[str, Loaded]:
        """The agents as they were loaded, by id."""
        return {agent_id: self._agents[agent_id].loaded_as for agent_id in tuple(self._agents)}

    def pending(self) -> tuple[Change, ...]:
        """Return the pending changes, oldest first. At most one flush at a time can call this method.

        Changes that an agent recorded while the refused flush was in flight are dropped here: they must not be stored
        after the changes of another writer.
        """
        for position in reversed(range(len(self._log))):
            if self._agents[self._log[position].agent_id].refusal is not None:
                del self._log[position]
        return tuple(self._log)

    def settle(self, count: int, refused: Mapping[str, MongoDBSessionError]) -> None:
        """Drop the `count` oldest changes: they are stored, except those of `refused` agents.

        All later changes of a refused agent are refused for the same reason. `StateTooLargeError` is an exception: the
        next state can be smaller, and pending messages stay recorded.
        """
        for agent_id, error in refused.items():
            self._agents[agent_id].refuse(error)
        kept = {id_ for id_, error in refused.items() if isinstance(error, StateTooLargeError) and error.pending}
        for agent_id in {change.agent_id for change in self._log[:count]} - refused.keys():
            agent = self._agents[agent_id]
            if agent.too_large is not None and agent.too_large.pending:
                agent.too_large = None
        self._log[:count] = [change for change in self._log[:count] if change.agent_id in kept]

    def is_refused(self, agent_id: str) -> bool:
        """Return whether the changes of an agent are refused."""
        return any(agent.refusal is not None for agent in self._chosen(agent_id))

    def raise_refused(self, agent_id: str | None = None) -> None:
        """Raise the refusal of an agent's changes, or of any agent or orchestrator."""
        self.raise_refusal(agent_id)
        for agent in self._chosen(agent_id):
            agent.raise_too_large(unreported=agent_id is not None)

    def raise_refusal(self, agent_id: str | None = None) -> None:
        """Raise the final refusal of an agent's changes, or of any agent or orchestrator."""
        for agent in self._chosen(agent_id):
            agent.raise_refusal()
        if agent_id is None:
            self.multi_agents.raise_refusal()

    def raise_pending_refusal(self) -> None:
        """Raise the refusal of an agent's state if messages of the agent are pending because of it."""
        for agent in self._chosen(None):
            if agent.too_large is not None and agent.too_large.pending:
                agent.raise_too_large(unreported=False)

    def raise_unreported_refusal(self) -> None:
        """Raise the refusals of changes that have not been raised before."""
        for agent in self._chosen(None):
            agent.raise_refusal(unreported=True)
            agent.raise_too_large(unreported=True)
        self.multi_agents.raise_refusal(unreported=True)

    def _chosen(self, agent_id: str | None) -> list[RecordedAgent]:
        # Other threads can add agents concurrently: copying the keys is atomic, copying the items is not.
        chosen = tuple(self._agents) if agent_id is None else (agent_id,)
        return [self._agents[each] for each in chosen if each in self._agents]

    def close(self) -> None:
        """Refuse all further changes."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError(f"session {self.session_id!r} is closed: open it with a new manager")

    def _record(self, change: Change) -> None:
        self._check_open()
        self.raise_refusal(change.agent_id)
        self._log.append(change)
