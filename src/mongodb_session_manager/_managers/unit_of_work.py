"""A session's loaded state and its recorded changes, as the repository that Strands' session logic calls. No I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from bson import ObjectId
from strands.session.session_repository import SessionRepository
from strands.types.agent import LocalAgent
from strands.types.content import Message
from strands.types.session import Session, SessionAgent, SessionMessage

from .._format.attachment_refs import MAX_INLINE_ATTACHMENT_BYTES, replacement, set_aside
from .._format.changes import (
    AddGuardrailEvent,
    AppendMessage,
    Change,
    CreateAgent,
    Identity,
    ObserveConfig,
    ReplaceMessage,
    SetMessageFields,
    UpdateAgent,
)
from .._format.codec import decode, encode
from .._format.documents import (
    STATE_FIELDS,
    USAGE,
    Document,
    agent_from,
    agent_id_of,
    agent_key,
    agent_state,
    checked_count,
    checked_id,
    config_set,
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
from .._format.multi_agents import MultiAgents
from .._format.odd_fields import messages_from, tell_odd, usable
from ..errors import (
    AgentNotFoundError,
    MessageNotFoundError,
    MongoDBSessionError,
    SessionClosedError,
    StateTooLargeError,
    again,
)
from .capture import CapturedConfig, count_tool_calls

if TYPE_CHECKING:
    from strands.multiagent import MultiAgentBase

logger = logging.getLogger(__name__)

FetchMessages = Callable[[str, int, int], list[SessionMessage]]
"""Returns the stored messages of an agent from one position to below another."""

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
        # By position. `None` represents an element that is no message: it is kept, but not restored.
        found = list(messages_from(documents, self.first, session_id, agent_id, restoring=True))
        self.messages: list[SessionMessage | None] | None = [message for message, _ in found]
        known = [(message, document) for message, document in found if message is not None]
        self.next_message_id: int = 0 if stored is None else stored["next_message_id"]
        self.first_loaded = known[0][0].message_id if known else self.next_message_id
        self.message_ids = {
            tracking_id: message.message_id
            for message, _ in known
            if (tracking_id := message.message.get("tracking_id")) is not None
        }
        # Whether the newest message is known to be without attachments. Only that one is replaced often: it grows.
        self.newest_is_plain = False
        self.remembered = max(_REMEMBERED, len(self.messages))
        self.identities = {message.message_id: Identity.of(document) for message, document in known}
        last = self.messages[-1] if self.messages else None
        self.last = None if last is None else _LastMessage.of(last.message)
        data: Document = usable(
            dict, None if stored is None else stored.get("agent_data"), session_id, f"{path}.agent_data"
        )
        self.config = CapturedConfig(data.get("model"), decode(data.get("system_prompt")))
        self.set_by_user = config_set(stored or {})
        usage = None if stored is None else stored.get("usage")
        self.counts_usage = usage is None or (type(usage) is dict and usable_numbers(usage) == usage)
        if not self.counts_usage:
            tell_odd(session_id, f"{path}.usage", usage)
        # The stored values of these fields are unusable. They are kept until the agent has another value.
        self.odd_state = [name for name in STATE_FIELDS if _is_odd(name, data.get(name))]
        for name in self.odd_state:
            if data.get(name) is not None:
                tell_odd(session_id, f"{path}.agent_data.{name}", data[name])
        self.defaults: Document = {}
        self.removed = 0 if stored is None else removed_messages(stored)
        self.last_appended: int | None = None
        self.last_usage: Document = {}
        self.counts_invocation = False
        self.last_redacted: int | None = None
        self.corrected_offset: int | None = None
        self.refusal: MongoDBSessionError | None = None
        self.refusal_told = False
        self.too_large: StateTooLargeError | None = None
        self.too_large_told = False


class _LastMessage(NamedTuple):
    """Distinguishes a longer version of an agent's last message from a new message."""

    tracking_id: str | None
    blocks: list[Any]

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Self:
        return cls(message.get("tracking_id"), list(message.get("content") or ()))

    def is_start_of(self, message: Mapping[str, Any]) -> bool:
        """Return whether `message` is this one with further content blocks."""
        blocks = message["content"]
        return (
            self.tracking_id is not None
            and self.tracking_id == message.get("tracking_id")
            and len(blocks) > len(self.blocks)
            and blocks[: len(self.blocks)] == self.blocks
        )


def _is_odd(name: str, stored: Any) -> bool:
    """Return whether a stored part of an agent's state cannot be restored as it is."""
    state = decode(stored)
    if type(state) is not dict:
        return state is not None or name == "conversation_manager_state"
    if name == "conversation_manager_state":
        removed = state.get("removed_message_count")
        return type(state.get("__name__")) is not str or type(removed) is not int or not 0 <= removed < 2**31
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
        fetch: Reads messages that were not loaded, for an agent whose conversation manager asks for them.
    """

    def __init__(
        self,
        session_id: str,
        document: Mapping[str, Any],
        max_inline: int = MAX_INLINE_ATTACHMENT_BYTES,
        fetch: FetchMessages | None = None,
    ) -> None:
        self.session_id = session_id
        name = document.get("application_name")
        self.application_name: str | None = name if isinstance(name, str) else None
        self.incarnation: ObjectId | None = document.get("incarnation")
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
        self._fetch = fetch
        self._log: list[Change] = []
        self._closed = False

    # What flushing needs.

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be recorded any more."""
        return self._closed

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

        All later changes of a refused agent are refused for the same reason. An exception is `StateTooLargeError`: the
        next state can be smaller, and pending messages stay recorded.
        """
        pending = set()
        for agent_id, error in refused.items():
            agent = self._agents[agent_id]
            if not isinstance(error, StateTooLargeError):
                agent.refusal = error
                continue
            agent.too_large, agent.too_large_told = error, False
            if error.pending:
                pending.add(agent_id)
        for agent_id in {change.agent_id for change in self._log[:count]} - refused.keys():
            agent = self._agents[agent_id]
            if agent.too_large is not None and agent.too_large.pending:
                agent.too_large = None
        self._log[:count] = [change for change in self._log[:count] if change.agent_id in pending]

    def raise_refused(self, agent_id: str | None = None) -> None:
        """Raise why changes of the agent, or of any agent or orchestrator, were refused."""
        self.raise_refusal(agent_id)
        self.raise_too_large(agent_id)

    def raise_refusal(self, agent_id: str | None = None) -> None:
        """Raise why changes of the agent, or of anything, were refused."""
        for candidate in tuple(self._agents) if agent_id is None else (agent_id,):
            agent = self._agents.get(candidate)
            if agent is not None and agent.refusal is not None:
                agent.refusal_told = True
                raise again(agent.refusal)
        if agent_id is None:
            self.multi_agents.raise_refusal()

    def raise_too_large(self, agent_id: str | None = None) -> None:
        """Raise the `StateTooLargeError` of an agent, once; without `agent_id`, of any agent until there is room."""
        for candidate in tuple(self._agents) if agent_id is None else (agent_id,):
            agent = self._agents.get(candidate)
            if agent is None or agent.too_large is None or (agent_id is not None and agent.too_large_told):
                continue
            error, agent.too_large_told = agent.too_large, True
            if error.pending:  # the next flush tries again
                agent.too_large = None
            raise again(error)

    def raise_untold_refusal(self) -> None:
        """Raise why changes were refused if nobody was told yet."""
        for agent_id, agent in tuple(self._agents.items()):
            if not agent.refusal_told:
                self.raise_refusal(agent_id)
            self.raise_too_large(agent_id)
        self.multi_agents.raise_refusal(untold=True)

    def close(self) -> None:
        """Refuse to record any more."""
        self._closed = True

    def release(self, agent_id: str) -> None:
        """Let go of an agent's loaded messages, which the restored agent holds now."""
        agent = self._agents[agent_id]
        agent.messages = agent.last_appended = None

    def holds(self, agent_id: str) -> bool:
        """Return whether the session holds an agent with that id, stored or recorded."""
        return agent_id in self._agents

    def is_initialized(self, agent_id: str) -> bool:
        """Return whether an agent was restored or created through this unit of work."""
        agent = self._agents.get(agent_id)
        return agent is not None and agent.messages is None

    def start_invocation(self, agent_id: str) -> None:
        """Count the next message of an agent as the first one of an invocation."""
        agent = self._agent(agent_id)
        agent.last_appended, agent.counts_invocation = None, True

    def is_stored(self, agent_id: str) -> bool:
        """Return whether an agent was loaded."""
        return agent_id in self._agents and self._agents[agent_id].loaded is not None

    def prepare(self, agent: LocalAgent) -> None:
        """Replace an unusable or absent state of an agent's conversation manager with the state of a new one."""
        stored = self._agents.get(agent.agent_id)
        if stored is None or stored.loaded is None:
            return
        state = stored.loaded.conversation_manager_state
        if state and "conversation_manager_state" not in stored.odd_state:
            return
        if (manager := getattr(agent, "conversation_manager", None)) is not None:
            state = manager.get_state() if type(state.get("__name__")) is not str else state
            stored.loaded.conversation_manager_state = {**state, "removed_message_count": stored.removed}

    def keep_odd(self, agent: LocalAgent) -> None:
        """Keep the unusable stored state of a restored agent until the agent's state changes."""
        stored = self._agents[agent.agent_id]
        if stored.odd_state:
            state = agent_state(SessionAgent.from_agent(agent))
            stored.defaults = {name: state[name] for name in stored.odd_state}

    # What is recorded beside Strands' own calls.

    def record_config(self, agent_id: str, config: CapturedConfig) -> None:
        """Record the model and system prompt an agent runs with, if they are not those that are stored."""
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
        """Leave fields of an agent's configuration alone from now on, because a user has set them."""
        if agent_id in self._agents:
            self._agents[agent_id].set_by_user.update(fields)

    def record_guardrail(self, agent_id: str, event: Document) -> None:
        """Record that a guardrail stepped in, at the message redacted last and in the session's list."""
        message_id = self._agent(agent_id).last_redacted
        if message_id is None:
            raise MessageNotFoundError(f"agent {agent_id!r} has no redacted message")
        stored = encode(event, depth=_METRICS_DEPTH, name="guardrail_event")
        entry = {name: value for name, value in stored.items() if name != "trace"}
        identity = self._agent(agent_id).identities.get(message_id)
        self._record(SetMessageFields(agent_id, message_id, {"guardrail_event": stored}, identity))
        self._record(AddGuardrailEvent(agent_id, {**entry, "message_id": message_id, "agent_id": agent_id}))

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
        self._agents[agent_id] = _Agent(agent_id, None)
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
        agent = self._agent(session_agent.agent_id)
        fields = agent_state(session_agent)
        for name, default in tuple(agent.defaults.items()):
            if fields[name] == default:
                del fields[name]
            else:
                del agent.defaults[name]
        self._record(UpdateAgent(session_agent.agent_id, agent.next_message_id, fields, now()))
        agent.too_large = None

    def create_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        """Record a new message, or a longer version of the agent's last message.

        Strands appends a further input to the last message if both have the same role, and keeps its tracking id. Any
        other message is a new one, whatever its tracking id: applications pass the same message twice.

        The id is given here and written into `session_message`, because behind a conversation manager that has
        removed all messages Strands would begin again at 0.

        Raises:
            MessageTooLargeError: The message cannot be stored. Nothing is recorded; the next one gets the id.
        """
        agent = self._agent(agent_id)
        if self.is_continuation(agent_id, session_message.message):
            session_message.message_id = agent.next_message_id - 1
            self._replace(agent_id, session_message.message_id, session_message)
            return
        session_message.message_id = agent.next_message_id
        message = set_aside(stored_message(session_message, session_message.message_id), self._max_inline)
        self._record(AppendMessage(agent_id, message, self._usage(agent, session_message)))
        agent.last_appended = session_message.message_id
        agent.last = _LastMessage.of(session_message.message)
        agent.last_usage = message.get("event_loop_metrics") or {}
        agent.newest_is_plain = not message.get("attachments")
        agent.identities[session_message.message_id] = Identity.of(message)
        if len(agent.identities) > agent.remembered:
            del agent.identities[next(iter(agent.identities))]
        agent.next_message_id += 1
        if (tracking_id := agent.last.tracking_id) is not None:
            agent.message_ids.pop(tracking_id, None)  # so that it becomes the newest
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
        if agent.counts_invocation:
            counted["invocations"] = 1
            agent.counts_invocation = False
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
        body = {**message_body(session_message), "updated_at": now()}
        is_newest = message_id == agent.next_message_id - 1
        is_plain = is_newest and agent.newest_is_plain and session_message.redact_message is None
        fields = (set_aside if is_plain else replacement)(body, self._max_inline)
        if is_newest:
            agent.newest_is_plain = is_plain and "attachments" not in fields
        self._record(ReplaceMessage(agent_id, message_id, fields, agent.identities.get(message_id)))
        if is_newest:
            agent.last = _LastMessage.of(session_message.to_message())

    def is_continuation(self, agent_id: str, message: Mapping[str, Any]) -> bool:
        """Return whether a message is the agent's last one with further content blocks."""
        last = self._agent(agent_id).last
        return last is not None and last.is_start_of(message)

    def end_message(self, agent_id: str) -> None:
        """Take the next message of an agent for a new one, whatever it begins with."""
        self._agent(agent_id).last = None

    def list_messages(
        self, session_id: str, agent_id: str, limit: int | None = None, offset: int = 0, **kwargs: Any
    ) -> list[SessionMessage]:
        """Return messages, oldest first, without the `offset` oldest; elements that are no messages are left out.

        Messages that the conversation manager had removed are not loaded. They are fetched if they are requested:
        not every conversation manager restores its state. If there are fewer than `offset` messages, all are returned:
        the count that Strands passes is wrong, and an empty conversation would hide that.
        """
        offset = checked_count(offset, "offset")
        limit = None if limit is None else checked_count(limit, "limit")
        messages, agent = self._loaded(agent_id), self._agent(agent_id)
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
        return [message for message in messages[:limit] if message is not None]

    def corrected_offset(self, agent_id: str) -> int | None:
        """Return the number of messages left out when the agent was restored, `None` if it is the requested one."""
        return self._agent(agent_id).corrected_offset

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
