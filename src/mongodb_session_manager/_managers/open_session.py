"""`manager.session_repository`: the open session as a repository, for Strands' session logic and for integrations."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from strands.session.session_repository import SessionRepository
from strands.types.session import Session, SessionAgent, SessionMessage

from .._format.ids import checked_count, checked_id, checked_message_id
from .._format.labels import checked_owner
from .._io.portal import Portal, running_loop, running_thread
from .._repository.async_repository import SharedRepository
from .._store.sessions import missing_session
from ..errors import EventLoopError, InvalidArgumentError, MessageNotFoundError, SessionClosedError
from .flusher import Flusher
from .unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from strands.multiagent import MultiAgentBase

P = ParamSpec("P")
T = TypeVar("T")


class OpenSession(SessionRepository):
    """The repository of an open session.

    Strands' session logic, called through `for_strands`, reads the loaded data and only records its changes: the
    manager flushes them with the other changes of the turn. All other callers read the stored and pending data, and
    their changes are stored. On a thread without an event loop, they are stored when the method returns. On a thread
    with a running event loop, the flush is only started, and the next flush raises its errors.

    Messages in memory are read from there. Other reads flush, and then block the calling thread until the server has
    answered. With an `owner` other than that of the open session, each method raises `SessionNotFoundError`.

    Args:
        work: The unit of work of the session.
        repository: The repository that the session was opened with.
        portal: The way to the event loop of the client.
        flusher: Flushes the unit of work.
    """

    def __init__(self, work: UnitOfWork, repository: SharedRepository, portal: Portal, flusher: Flusher) -> None:
        self.work = work
        self._repository = repository
        self._portal = portal
        self._flusher = flusher
        self._strands: set[int] = set()  # threads; Strands' session logic is synchronous

    def for_strands(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of Strands' session logic, which reads the loaded data and only records its changes."""
        thread = running_thread()
        if thread in self._strands:
            return method(*args, **kwargs)
        self._strands.add(thread)
        try:
            return method(*args, **kwargs)
        finally:
            self._strands.discard(thread)

    def _is_strands(self, session_id: str, options: Mapping[str, Any]) -> bool:
        """Return whether the caller is Strands' session logic; check `session_id` and `owner` of all other callers."""
        if running_thread() in self._strands:
            return True
        if checked_id(session_id, "session_id") != self.work.session_id:
            raise InvalidArgumentError(
                f"session_id must be {self.work.session_id!r}, the session that this manager has open, got "
                f"{session_id!r}: read other sessions with MongoDBSessionRepository"
            )
        if self.work.is_closed:
            raise SessionClosedError(f"session {session_id!r} is closed: open it with a new manager")
        if (owner := options.get("owner")) is not None and checked_owner(owner) != self.work.owner:
            raise missing_session(session_id)
        return False

    # Sessions.

    def create_session(self, session: Session, **kwargs: Any) -> Session:
        """Return the session: opening has created it."""
        self._is_strands(session.session_id, kwargs)
        return session

    def read_session(self, session_id: str, **kwargs: Any) -> Session | None:
        """Return the session as it was opened."""
        if self._is_strands(session_id, kwargs):
            return self.work.read_session(session_id)
        session = self.work.read_session(session_id)
        return None if session is None else replace(session)

    # Agents.

    def create_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Create an agent without messages; an existing agent stays unchanged."""
        if self._is_strands(session_id, kwargs):
            self.work.create_agent(session_id, session_agent)
        elif not self.work.holds(checked_id(session_agent.agent_id, "agent_id")):
            self.work.create_agent(session_id, session_agent)
            self.work.agent(session_agent.agent_id).restore_from_recorded()
            self._store(session_agent.agent_id)

    def read_agent(self, session_id: str, agent_id: str, **kwargs: Any) -> SessionAgent | None:
        """Return an agent with its newest state, or `None` if the session has no such agent."""
        if self._is_strands(session_id, kwargs):
            return self.work.read_agent(session_id, agent_id)
        if self._is_known(agent_id) and self.work.agent(agent_id).too_large is None:
            return self.work.agent(agent_id).newest()
        return self._ask(agent_id, partial(self._repository.read_agent, session_id, agent_id))

    def update_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Store an agent's state. The state of a live agent is not changed, and replaces this one when it changes.

        Raises:
            AgentNotFoundError: The session has no such agent.
        """
        agent_id = session_agent.agent_id
        if self._is_strands(session_id, kwargs):
            self.work.update_agent(session_id, session_agent)
        elif not self.work.holds(checked_id(agent_id, "agent_id")):
            self._ask(agent_id, partial(self._repository.update_agent, session_id, session_agent))
        else:
            self.work.update_agent(session_id, session_agent)
            if not self.work.is_initialized(agent_id):
                self.work.agent(agent_id).restore_from_recorded()
            self._store(agent_id)

    # Messages.

    def create_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        """Append a message to the stored conversation. A live agent does not get the message; a restored agent does.

        The id is assigned here and written into `session_message`.

        Raises:
            AgentNotFoundError: The session has no such agent.
            MessageTooLargeError: The message is too large.
        """
        if self._is_strands(session_id, kwargs):
            self.work.create_message(session_id, agent_id, session_message)
        elif not self.work.holds(checked_id(agent_id, "agent_id")):
            self._ask(agent_id, partial(self._repository.create_message, session_id, agent_id, session_message))
        else:
            self.work.create_message(session_id, agent_id, session_message)
            self._store(agent_id)

    def read_message(self, session_id: str, agent_id: str, message_id: int, **kwargs: Any) -> SessionMessage | None:
        """Return a message, or `None` if the agent has no such message.

        Raises:
            AgentNotFoundError: The session has no such agent.
        """
        if self._is_strands(session_id, kwargs):
            return self.work.read_message(session_id, agent_id, message_id)
        message_id = checked_message_id(message_id)
        if self._is_known(agent_id) and (stored := self.work.agent(agent_id).stored).knows(message_id):
            return stored.find(session_id, agent_id, message_id)
        return self._ask(agent_id, partial(self._repository.read_message, session_id, agent_id, message_id))

    def update_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        """Replace the content of a stored message. The messages of a live agent are not changed.

        With `redact_message`, the original content is removed.

        Raises:
            AgentNotFoundError: The session has no such agent.
            MessageNotFoundError: The agent has no such message.
            MessageTooLargeError: The message is too large.
        """
        if self._is_strands(session_id, kwargs):
            self.work.update_message(session_id, agent_id, session_message)
        elif not self.work.holds(checked_id(agent_id, "agent_id")):
            self._ask(agent_id, partial(self._repository.update_message, session_id, agent_id, session_message))
        else:
            self.work.agent(agent_id).raise_refusal()
            message_id = session_message.message_id
            if self.read_message(session_id, agent_id, message_id) is None:
                raise MessageNotFoundError(f"agent {agent_id!r} has no message {message_id}")
            self.work.update_message(session_id, agent_id, session_message)
            self._store(agent_id)

    def list_messages(
        self,
        session_id: str,
        agent_id: str,
        limit: int | None = None,
        offset: int = 0,
        *,
        newest_first: bool = False,
        before: int | None = None,
        **kwargs: Any,
    ) -> list[SessionMessage]:
        """Return messages of an agent, as the method of the repository does.

        Messages that the agent's conversation manager has removed are included.

        Raises:
            AgentNotFoundError: The session has no such agent.
        """
        if self._is_strands(session_id, kwargs):
            return self.work.list_messages(session_id, agent_id, limit, offset)
        offset = checked_count(offset, "offset")
        limit = None if limit is None else checked_count(limit, "limit")
        if self._is_known(agent_id) and newest_first is False and before is None:
            found = self.work.agent(agent_id).stored.copies(session_id, agent_id, limit, offset)
            if found is not None:
                return found
        read = partial(self._repository.list_messages, newest_first=newest_first, before=before)
        return self._ask(agent_id, partial(read, session_id, agent_id, limit, offset))

    # Graphs and swarms.

    def create_multi_agent(self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any) -> None:
        """Store a new graph or swarm; an existing one stays unchanged."""
        if self._is_strands(session_id, kwargs):
            self.work.create_multi_agent(session_id, multi_agent)
        elif self.work.multi_agents.read(multi_agent.id) is None:
            self.work.create_multi_agent(session_id, multi_agent)
            self._store_multi_agent(multi_agent.id)

    def read_multi_agent(self, session_id: str, multi_agent_id: str, **kwargs: Any) -> dict[str, Any] | None:
        """Return the newest state of a graph or swarm, or `None` if the session has no such graph or swarm."""
        if self._is_strands(session_id, kwargs) or self.work.multi_agents.is_current(multi_agent_id):
            return self.work.read_multi_agent(session_id, multi_agent_id)
        return self._ask(multi_agent_id, partial(self._repository.read_multi_agent, session_id, multi_agent_id))

    def update_multi_agent(self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any) -> None:
        """Store the state of a graph or swarm, if it has changed."""
        if self._is_strands(session_id, kwargs):
            self.work.update_multi_agent(session_id, multi_agent)
        elif self.work.multi_agents.read(multi_agent.id) is None:
            self._ask(multi_agent.id, partial(self._repository.update_multi_agent, session_id, multi_agent))
        else:
            self.work.update_multi_agent(session_id, multi_agent)
            self._store_multi_agent(multi_agent.id)

    # Reading and storing.

    def _is_known(self, agent_id: str) -> bool:
        """Return whether the data in memory of an agent is stored or pending.

        It is neither after a conflict with another writer, nor for an agent that another manager has created.
        """
        return self.work.holds(checked_id(agent_id, "agent_id")) and self.work.agent(agent_id).refusal is None

    def _store(self, agent_id: str) -> None:
        self._flusher.recorded(self, self.work, self.work.raise_refused, agent_id)

    def _store_multi_agent(self, multi_agent_id: str) -> None:
        self._flusher.recorded(self, self.work, self.work.multi_agents.raise_refusal, multi_agent_id)

    def _ask(self, owner_id: str, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Flush, then block the calling thread until an operation of the repository has a result.

        Raises:
            EventLoopError: The calling thread runs the event loop of the client.
        """
        if running_loop() is self._portal.loop:
            raise EventLoopError(
                f"this call needs parts of {owner_id!r} that are not in memory, and they cannot be read on the event "
                "loop of the client: call it in a thread with `asyncio.to_thread(...)`, or pass connection_string "
                "and let the library run its own loop"
            )
        return self._portal.call(self._flush_and_ask, operation)

    async def _flush_and_ask(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        await self._flusher.flush_here(self.work)
        return await operation()
