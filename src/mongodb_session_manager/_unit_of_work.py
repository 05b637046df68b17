"""A session's loaded state and its recorded changes, as the repository that Strands' session logic calls. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from strands.session.session_repository import SessionRepository
from strands.types.agent import LocalAgent
from strands.types.content import Message
from strands.types.session import Session, SessionAgent, SessionMessage

from ._capture import AgentConfig, count_tool_calls
from ._changes import (
    AddGuardrailEvent,
    AppendMessage,
    Change,
    CreateAgent,
    ObserveConfig,
    ReplaceMessage,
    SetMessageFields,
    UpdateAgent,
)
from ._codec import decode, encode
from ._documents import (
    STATE_FIELDS,
    USAGE,
    Document,
    agent_from,
    agent_id_of,
    agent_key,
    agent_state,
    checked_count,
    checked_id,
    message_body,
    message_usage,
    new_agent,
    now,
    removed_messages,
    session_from,
    stored_message,
    unusable_agents,
    usable_internal_state,
    usable_numbers,
)
from ._multi_agents import MultiAgents
from ._odd_fields import messages_from, tell_odd, usable
from ._references import MAX_INLINE_ATTACHMENT_BYTES, set_aside
from .errors import AgentNotFoundError, MessageNotFoundError, MongoDBSessionError, SessionClosedError

if TYPE_CHECKING:
    from strands.multiagent import MultiAgentBase

_REMEMBERED = 1024
"""Of how many messages, beside those that were loaded, it is known that the same tracking id is no new message."""

_METRICS_DEPTH = 6  # document, agents, key, messages, element, event_loop_metrics


class _Agent:
    """What is known of one agent: what was loaded until it is handed over, then where its next message goes."""

    def __init__(self, agent_id: str, stored: Mapping[str, Any] | None, session_id: str = "") -> None:
        self.loaded = None if stored is None else agent_from(agent_id, stored)
        path = f"agents.{agent_key(agent_id)}"
        documents = [] if stored is None else stored.get("messages") or []
        self.first: int = 0 if stored is None else stored.get("first", 0)
        # By position: `None` stands for an element that is no message, which is kept but not restored.
        found = list(messages_from(documents, self.first, session_id, agent_id, restoring=True))
        self.messages: list[SessionMessage | None] | None = [message for message, _ in found]
        known = [(message, document) for message, document in found if message is not None]
        self.with_attachments = {message.message_id for message, document in known if document.get("attachments")}
        self.next_message_id: int = 0 if stored is None else stored["next_message_id"]
        self.first_loaded = known[0][0].message_id if known else self.next_message_id
        self.message_ids = {
            tracking_id: message.message_id
            for message, _ in known
            if (tracking_id := message.message.get("tracking_id")) is not None
        }
        self.remembered = max(_REMEMBERED, len(self.message_ids))
        data: Document = usable(
            dict, None if stored is None else stored.get("agent_data"), session_id, f"{path}.agent_data"
        )
        self.config = AgentConfig(data.get("model"), decode(data.get("system_prompt")))
        config_set: list[Any] = usable(list, data.get("config_set"), session_id, f"{path}.agent_data.config_set")
        self.set_by_user = {name for name in config_set if isinstance(name, str)}
        usage = None if stored is None else stored.get("usage")
        self.counts_usage = usage is None or (type(usage) is dict and usable_numbers(usage) == usage)
        if not self.counts_usage:
            tell_odd(session_id, f"{path}.usage", usage)
        # What is stored in the place of these cannot be used. It stays until the agent has another value for them.
        self.odd_state = [name for name in STATE_FIELDS if _is_odd(name, data.get(name))]
        for name in self.odd_state:
            tell_odd(session_id, f"{path}.agent_data.{name}", data[name])
        self.defaults: Document = {}
        self.removed = 0 if stored is None else removed_messages(stored)
        self.exists = stored is not None
        self.last_appended: int | None = None
        self.last_redacted: int | None = None
        self.refusal: MongoDBSessionError | None = None
        self.refusal_told = False


def _is_odd(name: str, stored: Any) -> bool:
    """Return whether a stored part of an agent's state is not what the agent is restored from."""
    state = decode(stored)
    if type(state) is not dict:
        return state is not None
    if name == "conversation_manager_state":
        removed = state.get("removed_message_count")
        return type(state.get("__name__")) is not str or type(removed) is not int or removed < 0
    return name == "_internal_state" and usable_internal_state(state) != state


class UnitOfWork(SessionRepository):
    """One open session.

    Strands reads what was loaded and writes what is recorded. Values are encoded when they are recorded, so that
    nothing that happens to them later reaches the database. Recorded changes stay until `settle` says what became of
    them. The log is only ever appended to and cut at its head, which Python does atomically, so recording needs no
    lock; two threads must not record for one agent at a time, which Strands sees to.

    Args:
        session_id: The session.
        document: What `AsyncMongoDBSessionRepository.open_session` returned.
        max_inline: How many bytes of attachments of a message stay in the document.
    """

    def __init__(
        self, session_id: str, document: Mapping[str, Any], max_inline: int = MAX_INLINE_ATTACHMENT_BYTES
    ) -> None:
        self.session_id = session_id
        name, created_at = document.get("application_name"), document.get("created_at")
        self.application_name: str | None = name if isinstance(name, str) else None
        # Tells the session from a later one of its id, unless it is something that a query would not take literally.
        self.created_at = created_at if isinstance(created_at, str | datetime) else None
        self._session = session_from(document)
        self._unusable = unusable_agents(document)
        self._agents = {
            agent_id: _Agent(agent_id, stored, session_id)
            for key, stored in document["agents"].items()
            for agent_id in (agent_id_of(key),)
            if agent_id not in self._unusable
        }
        self.multi_agents = MultiAgents(document.get("multi_agents"), session_id)
        self._max_inline = max_inline
        self._log: list[Change] = []
        self._closed = False

    # What flushing needs.

    @property
    def is_settled(self) -> bool:
        """Whether nothing is recorded that is not settled."""
        return not self._log and self.multi_agents.is_settled

    def pending(self) -> tuple[Change, ...]:
        """Return what is recorded and not settled, oldest first; one flush at a time may ask.

        What a refused agent recorded while its refusal was on the way is dropped here: it must not be stored behind
        what another writer has stored.
        """
        for position in reversed(range(len(self._log))):
            if self._agents[self._log[position].agent_id].refusal is not None:
                del self._log[position]
        return tuple(self._log)

    def settle(self, count: int, refused: Mapping[str, MongoDBSessionError]) -> None:
        """Let go of the `count` oldest changes: they are stored but for those of `refused` agents.

        Whatever a refused agent records from then on is refused for the same reason.
        """
        for agent_id, error in refused.items():
            self._agents[agent_id].refusal = error
        del self._log[:count]

    def raise_refusal(self, agent_id: str | None = None) -> None:
        """Raise why changes of the agent, or of anything, were refused."""
        for candidate in tuple(self._agents) if agent_id is None else (agent_id,):
            agent = self._agents.get(candidate)
            if agent is not None and agent.refusal is not None:
                agent.refusal_told = True
                raise type(agent.refusal)(*agent.refusal.args)
        if agent_id is None:
            self.multi_agents.raise_refusal()

    def raise_untold_refusal(self) -> None:
        """Raise why changes were refused if nobody was told yet."""
        for agent_id, agent in tuple(self._agents.items()):
            if not agent.refusal_told:
                self.raise_refusal(agent_id)
        self.multi_agents.raise_refusal(untold=True)

    def close(self) -> None:
        """Refuse to record any more."""
        self._closed = True

    def release(self, agent_id: str) -> None:
        """Let go of an agent's loaded messages, which the restored agent holds now."""
        agent = self._agents[agent_id]
        agent.messages = agent.last_appended = None

    def is_stored(self, agent_id: str) -> bool:
        """Return whether an agent was loaded."""
        return agent_id in self._agents and self._agents[agent_id].loaded is not None

    def prepare(self, agent: LocalAgent) -> None:
        """Have what cannot be used of an agent's conversation manager's state be that of a new one."""
        stored = self._agents.get(agent.agent_id)
        if stored is None or stored.loaded is None or "conversation_manager_state" not in stored.odd_state:
            return
        state = stored.loaded.conversation_manager_state
        if (manager := getattr(agent, "conversation_manager", None)) is not None:
            state = manager.get_state() if type(state.get("__name__")) is not str else state
            stored.loaded.conversation_manager_state = {**state, "removed_message_count": stored.removed}

    def keep_odd(self, agent: LocalAgent) -> None:
        """Keep what cannot be used of a restored agent's state until the agent has another than now."""
        stored = self._agents[agent.agent_id]
        if stored.odd_state:
            state = agent_state(SessionAgent.from_agent(agent))
            stored.defaults = {name: state[name] for name in stored.odd_state}

    # What is recorded beside Strands' own calls.

    def record_config(self, agent_id: str, config: AgentConfig) -> None:
        """Record the model and system prompt an agent runs with, if they are not those that are stored."""
        agent = self._agents[agent_id]
        known, agent.config = agent.config, config
        fields = {
            name: encode(value)
            for name, value in config._asdict().items()
            if value != getattr(known, name) and name not in agent.set_by_user
        }
        if fields:
            self._record(ObserveConfig(agent_id, agent.next_message_id, fields))

    def keep_config(self, agent_id: str, fields: Iterable[str]) -> None:
        """Leave fields of an agent's configuration alone from now on, because a user has set them."""
        if agent_id in self._agents:
            self._agents[agent_id].set_by_user.update(fields)

    def record_guardrail(self, agent_id: str, event: Document) -> None:
        """Record that a guardrail stepped in, at the message redacted last and in the session's list."""
        message_id = self._agent(agent_id).last_redacted
        if message_id is None:
            raise MessageNotFoundError(f"agent {agent_id!r} has no redacted message")
        stored = encode(event, depth=_METRICS_DEPTH)
        entry = {name: value for name, value in stored.items() if name != "trace"}
        self._record(SetMessageFields(agent_id, message_id, {"guardrail_event": stored}))
        self._record(AddGuardrailEvent(agent_id, {**entry, "message_id": message_id, "agent_id": agent_id}))

    def record_metrics(self, agent_id: str, metrics: Document | None) -> None:
        """Record the metrics of an invocation at the last message it appended, if it appended any."""
        agent = self._agents[agent_id]
        if metrics is not None and agent.last_appended is not None:
            fields = {"event_loop_metrics": encode(metrics, depth=_METRICS_DEPTH)}
            self._record(SetMessageFields(agent_id, agent.last_appended, fields))
        agent.last_appended = None

    def record_replacement(self, agent_id: str, tracking_id: str, message: Message) -> None:
        """Record another content of the message with that tracking id."""
        message_id = self._agent(agent_id).message_ids.get(tracking_id)
        if message_id is None:
            raise MessageNotFoundError(f"agent {agent_id!r} holds no message with tracking id {tracking_id!r}")
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
        self._agents[agent_id] = agent = _Agent(agent_id, None)
        agent.exists = True
        self._record(CreateAgent(agent_id, document))

    def read_agent(self, session_id: str, agent_id: str, **kwargs: Any) -> SessionAgent | None:
        """Return an agent as it was loaded.

        Raises:
            DatabaseError: What is stored in its place can neither be restored nor written to.
        """
        agent = self._agents.get(checked_id(agent_id, "agent_id"))
        for candidate in (agent_id, None):
            if (odd := self._unusable.get(candidate)) is not None:
                raise odd.error(self.session_id)
        return None if agent is None else agent.loaded

    def update_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Record an agent's state."""
        agent = self._agent(session_agent.agent_id)
        fields = agent_state(session_agent)
        for name, default in tuple(agent.defaults.items()):
            if fields[name] == default:
                del fields[name]
            else:
                del agent.defaults[name]
        self._record(UpdateAgent(session_agent.agent_id, agent.next_message_id, fields, now()))

    def create_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        """Record a message: a new one, or another content of the one with the same tracking id.

        The id is given here and written into `session_message`, because behind a conversation manager that has
        removed all messages Strands would begin again at 0.

        Raises:
            MessageTooLargeError: The message cannot be stored. Nothing is recorded; the next one gets the id.
        """
        agent = self._agent(agent_id)
        tracking_id = session_message.message.get("tracking_id")
        known = agent.message_ids.get(tracking_id) if tracking_id is not None else None
        session_message.message_id = agent.next_message_id if known is None else known
        if known is not None:
            self._replace(agent_id, known, session_message)
            return
        message = set_aside(stored_message(session_message, session_message.message_id), self._max_inline)
        self._record(AppendMessage(agent_id, message, self._usage(agent, session_message)))
        if message.get("attachments"):
            agent.with_attachments.add(session_message.message_id)
        agent.last_appended = session_message.message_id
        agent.next_message_id += 1
        if tracking_id is not None:
            agent.message_ids[tracking_id] = session_message.message_id
            if len(agent.message_ids) > agent.remembered:
                del agent.message_ids[next(iter(agent.message_ids))]

    @staticmethod
    def _usage(agent: _Agent, session_message: SessionMessage) -> dict[str, int]:
        """Return what a message adds to its agent's totals; one the agent was built with was paid for elsewhere."""
        if agent.messages is not None:
            return {}
        if not agent.counts_usage:
            return {}
        usage = message_usage(session_message.message)
        counted = {name: usage[name] for name in USAGE if usage.get(name)}
        if agent.last_appended is None:
            counted["invocations"] = 1
        if calls := count_tool_calls(session_message.message):
            counted["toolCalls"] = calls
        return counted

    def read_message(self, session_id: str, agent_id: str, message_id: int, **kwargs: Any) -> SessionMessage | None:
        """Return a message as it was loaded."""
        found = (message for message in self._loaded(agent_id) if message is not None)
        return next((message for message in found if message.message_id == message_id), None)

    def update_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        """Record another content of a message."""
        agent = self._agent(agent_id)
        if not 0 <= session_message.message_id < agent.next_message_id:
            raise MessageNotFoundError(f"agent {agent_id!r} holds no message {session_message.message_id}")
        self._replace(agent_id, session_message.message_id, session_message)
        if session_message.redact_message is not None:
            agent.last_redacted = session_message.message_id

    def _replace(self, agent_id: str, message_id: int, session_message: SessionMessage) -> None:
        agent = self._agents[agent_id]
        fields = set_aside({**message_body(session_message), "updated_at": now()}, self._max_inline)
        frees = message_id in agent.with_attachments or message_id < agent.first_loaded
        if frees:
            fields.setdefault("attachments", [])
        self._record(ReplaceMessage(agent_id, message_id, fields, frees))
        if fields.get("attachments"):
            agent.with_attachments.add(message_id)

    def knows(self, agent_id: str, message: Mapping[str, Any]) -> bool:
        """Tell whether a message is stored or recorded, by its tracking id."""
        return message.get("tracking_id") in self._agent(agent_id).message_ids

    def list_messages(
        self, session_id: str, agent_id: str, limit: int | None = None, offset: int = 0, **kwargs: Any
    ) -> list[SessionMessage]:
        """Return messages as they were loaded, oldest first, without the `offset` oldest."""
        offset = checked_count(offset, "offset")
        limit = None if limit is None else checked_count(limit, "limit")
        messages, first = self._loaded(agent_id), self._agent(agent_id).first
        if offset < first:
            raise MongoDBSessionError(
                f"the {first} oldest messages of agent {agent_id!r}, which its conversation manager has removed, were "
                "not loaded: read them with MongoDBSessionRepository.list_messages"
            )
        return [message for message in messages[offset - first :][:limit] if message is not None]

    def create_multi_agent(self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any) -> None:
        """Record a new graph or swarm; it is stored together with what happens to it first."""
        self._check_open()
        self.multi_agents.create(multi_agent.id, multi_agent.serialize_state())

    def read_multi_agent(self, session_id: str, multi_agent_id: str, **kwargs: Any) -> dict[str, Any] | None:
        """Return the state of a graph or swarm as it was loaded or recorded last."""
        return self.multi_agents.read(multi_agent_id)

    def update_multi_agent(self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any) -> None:
        """Record the state of a graph or swarm, if it is another one."""
        self._check_open()
        self.multi_agents.update(multi_agent.id, multi_agent.serialize_state())

    def _loaded(self, agent_id: str) -> list[SessionMessage | None]:
        messages = self._agent(agent_id).messages
        if messages is None:
            raise MongoDBSessionError(
                f"the messages of agent {agent_id!r} are with the restored agent: read agent.messages, or the stored "
                "ones with MongoDBSessionRepository.list_messages"
            )
        return messages

    def _agent(self, agent_id: str) -> _Agent:
        agent = self._agents.get(agent_id)
        if agent is None:
            raise AgentNotFoundError(f"session {self.session_id!r} holds no agent {agent_id!r}")
        return agent

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError(f"session {self.session_id!r} is closed: open it with a new manager")

    def _record(self, change: Change) -> None:
        self._check_open()
        self.raise_refusal(change.agent_id)
        self._log.append(change)
