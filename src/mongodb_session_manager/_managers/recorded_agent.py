"""One agent of a unit of work: its loaded state, the id of its next message, and the refusal of its changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from strands.types.session import SessionAgent, SessionMessage

from .._format.bounded import Bounded
from .._format.changes import Identity
from .._format.codec import decode
from .._format.documents import (
    STATE_FIELDS,
    USAGE,
    Document,
    StoredMessage,
    agent_from,
    config_set,
    message_usage,
    removed_messages,
    usable_internal_state,
    usable_numbers,
)
from .._format.ids import agent_key
from .._format.malformed import log_malformed, messages_from, usable_field
from ..errors import MongoDBSessionError, StateTooLargeError, again
from .capture import CapturedConfig, count_tool_calls
from .stored_messages import StoredMessages

_REMEMBERED = 1024
"""The number of new messages whose ids are remembered, in addition to those of the loaded messages."""


class LastMessage(NamedTuple):
    """Distinguishes a longer version of an agent's last message from a new message."""

    tracking_id: str | None
    blocks: list[Any]

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Self:
        """Return the identifying values of a message."""
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


class RecordedAgent:
    """An agent, new or loaded. Loaded messages are kept until the agent is restored.

    Args:
        agent_id: The agent.
        stored: Its part of the session document; `None` for a new agent.
        session_id: The session, for log lines.
    """

    def __init__(self, agent_id: str, stored: Mapping[str, Any] | None, session_id: str = "") -> None:
        self.agent_id = agent_id
        self.loaded = None if stored is None else agent_from(agent_id, stored)
        stored = stored or {"next_message_id": 0}
        self._dates = {name: stored.get(name) for name in ("created_at", "updated_at")}
        path = f"agents.{agent_key(agent_id)}"
        self._load_messages(agent_id, stored, session_id)
        data: Document = usable_field(dict, stored.get("agent_data"), session_id, f"{path}.agent_data")
        self._state = {name: data.get(name) for name in (*STATE_FIELDS, "created_at")}
        self.config = CapturedConfig(data.get("model"), decode(data.get("system_prompt")))
        self.set_by_user = config_set(stored)
        usage = stored.get("usage")
        self.counts_usage = usage is None or (type(usage) is dict and usable_numbers(usage) == usage)
        if not self.counts_usage:
            log_malformed(session_id, f"{path}.usage", usage)
        # The stored values of these fields are unusable. They are kept until the agent has another value.
        self.malformed_state = [name for name in STATE_FIELDS if _is_malformed(name, data.get(name))]
        for name in self.malformed_state:
            if data.get(name) is not None:
                log_malformed(session_id, f"{path}.agent_data.{name}", data[name])
        self.defaults: Document = {}
        self.removed = removed_messages(stored)
        self.last_appended: int | None = None
        self.last_usage: Document = {}
        self.counts_invocation = False
        self.last_redacted: int | None = None
        self.corrected_offset: int | None = None
        self.refusal: MongoDBSessionError | None = None
        self._refusal_reported = False
        self.too_large: StateTooLargeError | None = None
        self._too_large_reported = False

    def _load_messages(self, agent_id: str, stored: Mapping[str, Any], session_id: str) -> None:
        self.first: int = stored.get("first", 0)
        elements = stored.get("messages") or []
        self.stored = StoredMessages(self.first, elements)
        found = list(messages_from(elements, self.first, session_id, agent_id, restoring=True))
        # By position. `None` represents an element that is not a message: it is kept, but not restored.
        self.messages: list[SessionMessage | None] | None = [message for message, _ in found]
        known = [(message, document) for message, document in found if message is not None]
        self.next_message_id: int = stored["next_message_id"]
        remembered = max(_REMEMBERED, len(found))
        self.message_ids: Bounded[str, int] = Bounded(remembered)
        self.identities: Bounded[int, Identity] = Bounded(remembered)
        for message, document in known:
            self._remember(message.message_id, message.message.get("tracking_id"), document)
        last = self.messages[-1] if self.messages else None
        self.last = None if last is None else LastMessage.of(last.message)
        # Whether the newest message is known to have no attachments. Only the newest is replaced often: it grows.
        self.newest_is_plain = False

    def append(self, session_message: SessionMessage, message: StoredMessage) -> None:
        """Remember an appended message in its original and its stored form."""
        message_id = session_message.message_id
        self.last_appended = message_id
        self.last = LastMessage.of(session_message.message)
        self.last_usage = message.get("event_loop_metrics") or {}
        self.newest_is_plain = not message.get("attachments")
        self._remember(message_id, self.last.tracking_id, message)
        self.next_message_id += 1
        if self.messages is not None:
            self.messages.append(session_message)

    def replace_stored(self, message_id: int, fields: Mapping[str, Any]) -> None:
        """Remember new content of a stored message, also for a later restore."""
        self.stored.replace(message_id, fields)
        if self.messages is None:
            return
        for message in self.messages:
            if message is not None and message.message_id == message_id:
                message.message = decode(fields["message"])
                message.redact_message = decode(fields["redact_message"])

    def record_state(self, fields: Mapping[str, Any]) -> None:
        """Remember new fields of the agent's state."""
        self._state = {**self._state, **fields}

    def newest(self) -> SessionAgent:
        """Return the agent with its newest recorded state; nothing mutable is shared."""
        updated_at = self._state.get("updated_at") or self._dates["updated_at"]
        return agent_from(self.agent_id, {"agent_data": self._state, **self._dates, "updated_at": updated_at})

    def restore_from_recorded(self) -> None:
        """Have a later restore use the newest recorded state."""
        self.loaded = self.newest()

    def _remember(self, message_id: int, tracking_id: str | None, document: Mapping[str, Any]) -> None:
        self.identities[message_id] = Identity.of(document)
        if tracking_id is not None:
            self.message_ids[tracking_id] = message_id

    def count_usage(self, message: Mapping[str, Any]) -> dict[str, int]:
        """Return the usage that a message adds to the agent's totals.

        Messages that the agent was built with add nothing: they were paid for elsewhere.
        """
        if self.messages is not None or not self.counts_usage:
            return {}
        usage = message_usage(message)
        counted = {name: usage[name] for name in USAGE if usage.get(name)}
        if self.counts_invocation:
            counted["invocations"] = 1
            self.counts_invocation = False
        if calls := count_tool_calls(message):
            counted["toolCalls"] = calls
        return counted

    def refuse(self, error: MongoDBSessionError) -> None:
        """Refuse all later changes, except after a `StateTooLargeError`: the next state can be smaller."""
        if isinstance(error, StateTooLargeError):
            self.too_large, self._too_large_reported = error, False
        else:
            self.refusal = error

    def raise_refusal(self, *, unreported: bool = False) -> None:
        """Raise the refusal of changes; with `unreported`, only if it has not been raised before."""
        if self.refusal is not None and not (unreported and self._refusal_reported):
            self._refusal_reported = True
            raise again(self.refusal)

    def raise_too_large(self, *, unreported: bool) -> None:
        """Raise the refusal of the state; with `unreported`, only if it has not been raised before."""
        if self.too_large is None or (unreported and self._too_large_reported):
            return
        error, self._too_large_reported = self.too_large, True
        if error.pending:  # the next flush tries again
            self.too_large = None
        raise again(error)


def _is_malformed(name: str, stored: Any) -> bool:
    """Return whether a stored part of an agent's state is malformed, so that it cannot be restored unchanged."""
    state = decode(stored)
    if type(state) is not dict:
        return state is not None or name == "conversation_manager_state"
    if name == "conversation_manager_state":
        removed = state.get("removed_message_count")
        return type(state.get("__name__")) is not str or type(removed) is not int or not 0 <= removed < 2**31
    return name == "_internal_state" and usable_internal_state(state) != state
