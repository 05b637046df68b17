"""A session's loaded state and its recorded changes, as the repository that Strands' session logic calls. No I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from bson import ObjectId
from strands.session.session_repository import SessionRepository
from strands.types.agent import LocalAgent
from strands.types.content import Message
from strands.types.session import Session, SessionAgent, SessionMessage

from .._format.attachment_refs import MAX_INLINE_ATTACHMENT_BYTES, replacement, set_aside
from .._format.changes import (
    AddGuardrailEvent,
    AppendMessage,
    CreateAgent,
    ObserveConfig,
    ReplaceMessage,
    SetMessageFields,
    UpdateAgent,
)
from .._format.codec import encode
from .._format.dates import now
from .._format.documents import (
    STATE_FIELDS,
    Document,
    agent_state,
    message_body,
    new_agent,
    session_from,
    stored_message,
)
from .._format.ids import agent_id_of, checked_count, checked_id
from .._format.labels import owner_of
from .._format.malformed import unusable_agents
from .._format.multi_agents import MultiAgents
from ..errors import (
    MessageNotFoundError,
    MongoDBSessionError,
)
from .capture import CapturedConfig
from .change_log import ChangeLog
from .recorded_agent import RecordedAgent

if TYPE_CHECKING:
    from strands import Agent
    from strands.multiagent import MultiAgentBase

logger = logging.getLogger(__name__)

FetchMessages = Callable[[str, int, int], list[SessionMessage]]
"""Returns the stored messages of an agent from one position to below another."""

_METRICS_DEPTH = 6  # document, agents, key, messages, element, event_loop_metrics


class UnitOfWork(ChangeLog, SessionRepository):
    """One open session.

    Strands reads the loaded state from it and writes changes to it. Values are encoded when they are recorded, so later
    changes to them do not reach the database.

    Args:
        session_id: The session.
        document: The document that `AsyncMongoDBSessionRepository.open_session` returned.
        max_inline: The number of bytes of attachments that stay in a message.
        fetch: Reads messages that were not loaded, for an agent whose conversation manager needs them.
    """

    def __init__(
        self,
        session_id: str,
        document: Mapping[str, Any],
        max_inline: int = MAX_INLINE_ATTACHMENT_BYTES,
        fetch: FetchMessages | None = None,
    ) -> None:
        name = document.get("application_name")
        self.application_name: str | None = name if isinstance(name, str) else None
        self.incarnation: ObjectId | None = document.get("incarnation")
        self.owner = owner_of(document)
        self._session = session_from(document)
        self._unusable = unusable_agents(document)
        agents = {
            agent_id: RecordedAgent(agent_id, stored, session_id)
            for key, stored in document["agents"].items()
            for agent_id in (agent_id_of(key),)
            if agent_id not in self._unusable
        }
        super().__init__(session_id, agents, MultiAgents(document.get("multi_agents"), session_id))
        self._max_inline = max_inline
        self._fetch = fetch

    # Restoring.

    def release(self, agent: LocalAgent) -> None:
        """Drop an agent's loaded messages: the restored agent holds them."""
        self._agents[agent.agent_id].release(agent)

    def restoring(self, agent: LocalAgent) -> AbstractContextManager[None]:
        """Return the context in which Strands restores an agent; at its end, the agent gets the live messages."""
        recorded = self._agents.get(agent.agent_id)
        return nullcontext() if recorded is None else recorded.restoring(agent)

    def holds(self, agent_id: str) -> bool:
        """Return whether the session has an agent with that id, stored or recorded."""
        return agent_id in self._agents

    def is_stored(self, agent_id: str) -> bool:
        """Return whether an agent was loaded."""
        return agent_id in self._agents and self._agents[agent_id].loaded is not None

    def is_initialized(self, agent_id: str) -> bool:
        """Return whether an agent was restored or created through this unit of work."""
        return agent_id in self._agents and self._agents[agent_id].messages is None

    def start_invocation(self, agent_id: str) -> None:
        """Count the next message of an agent as the first of an invocation."""
        agent = self.agent(agent_id)
        agent.last_appended, agent.counts_invocation = None, True

    def prepare(self, agent: LocalAgent) -> None:
        """Replace an unusable or absent state of an agent's conversation manager with the state of a new one."""
        stored = self._agents.get(agent.agent_id)
        if stored is None or stored.loaded is None:
            return
        state = stored.loaded.conversation_manager_state
        if state and "conversation_manager_state" not in stored.malformed_state:
            return
        if (manager := getattr(agent, "conversation_manager", None)) is not None:
            state = manager.get_state() if type(state.get("__name__")) is not str else state
            stored.loaded.conversation_manager_state = {**state, "removed_message_count": stored.removed}

    def keep_malformed_state(self, agent: LocalAgent) -> None:
        """Keep the unusable stored state of a restored agent until the agent's state changes."""
        stored = self._agents[agent.agent_id]
        if stored.malformed_state:
            state = agent_state(SessionAgent.from_agent(agent))
            stored.defaults = {name: state[name] for name in stored.malformed_state}

    def has_other_state(self, agent: Agent) -> bool:
        """Return whether the state of an agent differs from the loaded state; that of a new agent does.

        Fields that an earlier version has not stored are ignored.
        """
        loaded, current = self._agents[agent.agent_id].loaded, SessionAgent.from_agent(agent)
        if loaded is None:
            return True
        return loaded.state != current.state or any(
            getattr(current, part).get(name) != value
            for part in STATE_FIELDS[1:]
            for name, value in getattr(loaded, part).items()
        )

    # Changes that Strands does not record.

    def record_config(self, agent_id: str, config: CapturedConfig) -> None:
        """Record the model and system prompt an agent runs with, if they differ from the stored ones."""
        agent = self._agents[agent_id]
        known, agent.config = agent.config, config
        fields = {
            name: encode(value, name=name)
            for name, value in config._asdict().items()
            if value != getattr(known, name) and name not in agent.set_by_user
        }
        if fields:
            self._record(ObserveConfig(agent_id, agent.next_message_id, fields))

    def keep_config(self, agent_id: str, fields: Iterable[str]) -> None:
        """Keep fields of an agent's configuration that a user has set."""
        if agent_id in self._agents:
            self._agents[agent_id].set_by_user.update(fields)

    def record_guardrail(self, agent_id: str, event: Document) -> None:
        """Record a guardrail event, at the message that was redacted last and in the session's list."""
        message_id = self.agent(agent_id).last_redacted
        if message_id is None:
            raise MessageNotFoundError(f"agent {agent_id!r} has no redacted message")
        stored = encode(event, depth=_METRICS_DEPTH, name="guardrail_event")
        entry = {name: value for name, value in stored.items() if name != "trace"}
        identity = self.agent(agent_id).identities.get(message_id)
        self._record(SetMessageFields(agent_id, message_id, {"guardrail_event": stored}, identity))
        self._record(AddGuardrailEvent(agent_id, {**entry, "message_id": message_id, "agent_id": agent_id}))

    def record_view(self, agent: Agent, base: tuple[list[Any], int] | None) -> None:
        """Record the live messages of an agent if a restart would restore others.

        `base` describes a restore without a view, see `LiveMessages.change`.
        """
        recorded = self._agents[agent.agent_id]
        if (change := recorded.view_change(agent, base, self.session_id)) is not None:
            self._record(change)
            recorded.too_large = None

    def record_metrics(self, agent_id: str, metrics: Document | None) -> None:
        """Record the metrics of an invocation at the last message it appended, if it appended any."""
        agent = self._agents[agent_id]
        if metrics is not None and agent.last_appended is not None:
            encoded = encode(metrics, depth=_METRICS_DEPTH, name="event_loop_metrics")
            fields = {"event_loop_metrics": {**encoded, **agent.last_usage}}
            identity = agent.identities.get(agent.last_appended)
            self._record(SetMessageFields(agent_id, agent.last_appended, fields, identity))
        agent.last_appended = None

    def record_replacement(self, agent_id: str, tracking_id: str, message: Message) -> None:
        """Record new content of the message with that tracking id."""
        message_id = self.agent(agent_id).message_ids.get(tracking_id)
        if message_id is None:
            raise MessageNotFoundError(f"agent {agent_id!r} has no message with tracking id {tracking_id!r}")
        self.update_message(self.session_id, agent_id, SessionMessage.from_message(message, message_id))

    # Strands' repository.

    def create_session(self, session: Session, **kwargs: Any) -> Session:
        """Return the session: opening has created it."""
        return session

    def read_session(self, session_id: str, **kwargs: Any) -> Session | None:
        """Return the session as it was opened."""
        return self._session

    def create_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Record a new agent; it is stored together with its first message."""
        agent_id = checked_id(session_agent.agent_id, "agent_id")
        document = new_agent(session_agent)
        agent = self._agents[agent_id] = RecordedAgent(agent_id, None)
        agent.record_state(document["agent_data"])
        self._record(CreateAgent(agent_id, document))

    def read_agent(self, session_id: str, agent_id: str, **kwargs: Any) -> SessionAgent | None:
        """Return an agent as it was loaded.

        Raises:
            DatabaseError: The stored value can neither be restored nor written to.
        """
        agent = self._agents.get(checked_id(agent_id, "agent_id"))
        for candidate in (agent_id, None):
            if (odd := self._unusable.get(candidate)) is not None:
                raise odd.error(self.session_id)
        return None if agent is None else agent.loaded

    def update_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Record an agent's state."""
        agent = self.agent(session_agent.agent_id)
        fields = agent_state(session_agent)
        for name, default in tuple(agent.defaults.items()):
            if fields[name] == default:
                del fields[name]
            else:
                del agent.defaults[name]
        self._record(UpdateAgent(session_agent.agent_id, agent.next_message_id, fields, now()))
        agent.record_state(fields)
        agent.too_large = None

    def create_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        """Record a new message, or a longer version of the agent's last message.

        Strands appends a further input to the last message if both have the same role, and keeps its tracking id. Any
        other message is a new one, whatever its tracking id: applications pass the same message twice.

        The id is assigned here and written into `session_message`, because Strands would restart at 0 after a
        conversation manager has removed all messages.

        Raises:
            MessageTooLargeError: The message cannot be stored. Nothing is recorded; the next one gets the id.
        """
        agent = self.agent(agent_id)
        if self.is_continuation(agent_id, session_message.message):
            session_message.message_id = agent.next_message_id - 1
            self._replace(agent_id, session_message.message_id, session_message, continues=True)
            return
        session_message.message_id = agent.next_message_id
        stored = stored_message(session_message, session_message.message_id)
        message, size = set_aside(stored, self._max_inline)
        self._record(AppendMessage(agent_id, message, agent.count_usage(session_message.message), size=size))
        agent.append(session_message, stored, message)

    def read_message(self, session_id: str, agent_id: str, message_id: int, **kwargs: Any) -> SessionMessage | None:
        """Return a copy of a message; `None` if it is not in memory."""
        return self.agent(agent_id).stored.find(session_id, agent_id, message_id)

    def update_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        """Record new content of a message."""
        agent = self.agent(agent_id)
        if not 0 <= session_message.message_id < agent.next_message_id:
            raise MessageNotFoundError(f"agent {agent_id!r} has no message {session_message.message_id}")
        self._replace(agent_id, session_message.message_id, session_message)
        if session_message.redact_message is not None:
            agent.last_redacted = session_message.message_id

    def _replace(
        self, agent_id: str, message_id: int, session_message: SessionMessage, *, continues: bool = False
    ) -> None:
        agent = self._agents[agent_id]
        body = {**message_body(session_message), "updated_at": now()}
        is_newest = message_id == agent.next_message_id - 1
        is_plain = is_newest and agent.newest_is_plain and session_message.redact_message is None
        fields, size = (set_aside if is_plain else replacement)(body, self._max_inline)
        if is_newest:
            agent.newest_is_plain = is_plain and "attachments" not in fields
        self._record(ReplaceMessage(agent_id, message_id, fields, agent.identities.get(message_id), size=size))
        agent.replace(session_message, body, continues=continues)

    def is_continuation(self, agent_id: str, message: Mapping[str, Any]) -> bool:
        """Return whether a message is the agent's last one with further content blocks."""
        last = self.agent(agent_id).last
        return last is not None and last.is_start_of(message)

    def end_message(self, agent_id: str) -> None:
        """Treat the next message of an agent as a new one, even if it continues the last one."""
        self.agent(agent_id).last = None

    def list_messages(
        self, session_id: str, agent_id: str, limit: int | None = None, offset: int = 0, **kwargs: Any
    ) -> list[SessionMessage]:
        """Return messages, oldest first, without the `offset` oldest; elements that are not messages are left out.

        Messages that the conversation manager had removed are not loaded. They are fetched if they are requested:
        not every conversation manager restores its state. If there are fewer than `offset` messages, all are returned:
        the offset that Strands passes is wrong, and an empty conversation would hide that.
        """
        offset = checked_count(offset, "offset")
        limit = None if limit is None else checked_count(limit, "limit")
        messages, agent = self._loaded(agent_id), self.agent(agent_id)
        if agent.is_restoring and agent.view is not None:
            return agent.begin_view(agent.view, self.session_id)
        stored = agent.first + len(messages)
        if offset > stored:
            logger.warning(
                "session_id=<%r>, agent_id=<%r>, removed_message_count=<%d>, stored=<%d> | restoring all messages: "
                "the conversation manager has removed more messages than are stored",
                self.session_id,
                agent_id,
                offset,
                stored,
            )
            offset = agent.corrected_offset = 0
        if offset < agent.first:
            if self._fetch is None:
                raise MongoDBSessionError(
                    f"the {agent.first} oldest messages of agent {agent_id!r} were not loaded: read them with "
                    "MongoDBSessionRepository.list_messages"
                )
            messages = [*self._fetch(agent_id, offset, agent.first), *messages]
        else:
            messages = messages[offset - agent.first :]
        agent.restored_from(offset, messages)
        return [message for message in messages[:limit] if message is not None]

    def create_multi_agent(self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any) -> None:
        """Record a new graph or swarm; it is stored together with its first change."""
        self._check_open()
        self.multi_agents.create(multi_agent.id, multi_agent.serialize_state())

    def read_multi_agent(self, session_id: str, multi_agent_id: str, **kwargs: Any) -> dict[str, Any] | None:
        """Return the state of a graph or swarm as it was loaded or recorded last."""
        return self.multi_agents.read(multi_agent_id)

    def update_multi_agent(self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any) -> None:
        """Record the state of a graph or swarm, if it has changed."""
        self._check_open()
        self.multi_agents.update(multi_agent.id, multi_agent.serialize_state())

    def _loaded(self, agent_id: str) -> list[SessionMessage | None]:
        messages = self.agent(agent_id).messages
        if messages is None:
            raise MongoDBSessionError(
                f"the loaded messages of agent {agent_id!r} were handed to the restored agent: read agent.messages, or "
                "the stored ones with MongoDBSessionRepository.list_messages"
            )
        return messages
