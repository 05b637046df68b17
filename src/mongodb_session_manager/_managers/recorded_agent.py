"""One agent of a unit of work: its loaded state, the id of its next message, and the refusal of its changes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self
from weakref import ref

from strands import Agent
from strands.types.agent import LocalAgent
from strands.types.session import SessionAgent, SessionMessage

from .._format.bounded import Bounded
from .._format.changes import Identity, Loaded, StoreView
from .._format.codec import decode
from .._format.dates import now
from .._format.documents import (
    STATE_FIELDS,
    USAGE,
    Document,
    StoredMessage,
    agent_from,
    config_set,
    message_from,
    message_usage,
    removed_messages,
    usable_internal_state,
    usable_numbers,
)
from .._format.ids import agent_key
from .._format.malformed import log_malformed, messages_from, usable_field
from .._format.view import View, shadow, shown
from ..errors import MongoDBSessionError, StateTooLargeError, again
from .capture import CapturedConfig, count_tool_calls
from .live_messages import LiveMessages
from .stored_messages import StoredMessages

logger = logging.getLogger(__name__)

_REMEMBERED = 1024
"""The number of new messages whose ids are remembered, in addition to those of the loaded messages."""


class LastMessage(NamedTuple):
    """The last message of an agent, to distinguish a longer version of it from a new message."""

    tracking_id: str | None
    blocks: list[Any]

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Self:
        """Return the identifying values of a message."""
        return cls(message.get("tracking_id"), shadow(list(message.get("content") or ())))

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
        self.archive_revision: int = stored.get("archive_revision") or 0
        self.view: View | None = stored.get("view")
        self.live: LiveMessages | None = LiveMessages() if self.loaded is None else None
        self._agent: ref[LocalAgent] | None = None
        self.is_restoring = False
        self._records: list[tuple[SessionMessage, Any]] = []
        self._live_list: list[Any] | None = None
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
        self.corrected_offset: int | None = (
            None  # the number of messages that a restore left out, if it is not the requested one
        )
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
        earlier = list(messages_from(stored.get("shown") or [], 0, session_id, agent_id, restoring=True))
        self.shown = {message.message_id: message for message, _ in earlier if message is not None}
        known = [(message, document) for message, document in (*earlier, *found) if message is not None]
        self.next_message_id: int = stored["next_message_id"]
        self.loaded_as = Loaded.of(stored)
        remembered = max(_REMEMBERED, len(known))
        self.message_ids: Bounded[str, int] = Bounded(remembered)
        self.identities: Bounded[int, Identity] = Bounded(remembered)
        self.versions: Bounded[int, Any] = Bounded(remembered)
        # There is room for all of them: `update` takes less time than setting each.
        self.identities.update((message.message_id, Identity.of(document)) for message, document in known)
        self.versions.update((message.message_id, document.get("updated_at")) for message, document in known)
        tracking_ids = ((message.message.get("tracking_id"), message.message_id) for message, _ in known)
        self.message_ids.update((found, message_id) for found, message_id in tracking_ids if found is not None)
        last = self.messages[-1] if self.messages else None
        self.last = None if last is None else LastMessage.of(last.message)
        # Whether the newest message is known to have no attachments. Only the newest is replaced often: it grows.
        self.newest_is_plain = False

    def append(self, session_message: SessionMessage, stored: StoredMessage, message: StoredMessage) -> None:
        """Keep an appended message: the original, its stored form, and its stored form without attachments."""
        message_id = session_message.message_id
        self.stored.append(stored)
        self.last_appended = message_id
        self.last = LastMessage.of(session_message.message)
        self.last_usage = message.get("event_loop_metrics") or {}
        self.newest_is_plain = not message.get("attachments")
        if self.live is not None:
            is_live = self._is_live(session_message.message)
            self.live.append(message_id, session_message.to_message(), is_live=is_live)
        self._remember(message_id, self.last.tracking_id, message)
        self.next_message_id += 1
        if self.messages is not None:
            self.messages.append(session_message)

    def _is_live(self, message: Any) -> bool:
        agent = None if self._agent is None else self._agent()
        return agent is None or any(each is message for each in reversed(agent.messages))

    def release(self, agent: LocalAgent) -> None:
        """Drop the loaded messages: the restored agent holds them."""
        self.messages = self.last_appended = None
        self._agent = ref(agent)

    def record_state(self, fields: Mapping[str, Any]) -> None:
        """Keep new fields of the agent's state."""
        self._state = {**self._state, **fields}

    def newest(self) -> SessionAgent:
        """Return the agent with its newest recorded state; nothing mutable is shared."""
        updated_at = self._state.get("updated_at") or self._dates["updated_at"]
        return agent_from(self.agent_id, {"agent_data": self._state, **self._dates, "updated_at": updated_at})

    def restore_from_recorded(self) -> None:
        """Make a later restore use the newest recorded state."""
        self.loaded = self.newest()

    def replace(self, session_message: SessionMessage, fields: Mapping[str, Any], *, continues: bool) -> None:
        """Keep new content of a message, and its stored fields; `continues` if the agent has continued the message."""
        message_id = session_message.message_id
        self._replace_stored(message_id, fields)
        self.versions[message_id] = fields["updated_at"]
        if message_id == self.next_message_id - 1:
            self.last = LastMessage.of(session_message.to_message())
        if self.live is not None and continues:
            self.live.extend(message_id, session_message.to_message())
        elif self.live is not None:
            redacts = session_message.redact_message is not None
            self.live.replace(message_id, session_message.to_message(), redacts=redacts)

    def _replace_stored(self, message_id: int, fields: Mapping[str, Any]) -> None:
        """Keep new content of a stored message, also for a later restore."""
        self.stored.replace(message_id, fields)
        if self.messages is None:
            return
        if self.view is not None:
            self.view = self.view.without_content_of({message_id})
            if message_id < self.view.after and (record := message_from(fields, message_id)) is not None:
                self.shown[message_id] = record
        for message in self.messages:
            if message is not None and message.message_id == message_id:
                message.message = decode(fields["message"])
                message.redact_message = decode(fields["redact_message"])

    def view_change(self, agent: Agent, base: tuple[list[Any], int] | None, session_id: str) -> StoreView | None:
        """Return the change that stores the live messages, or `None` if they would be restored without it.

        `base` describes a restore without a view, see `LiveMessages.change`.
        """
        if self.live is None or self.refusal is not None or agent.model.stateful:
            return None
        unstorable, ids, versions = set(self.live.unstorable), self.message_ids, self.versions
        next_id = self.next_message_id
        view = self.live.change(agent.messages, base, next_id, ids.get, lambda n: versions.get(n, ...))
        for message_id in self.live.unstorable - unstorable:
            logger.warning(
                "session_id=<%r>, agent_id=<%r>, message_id=<%d> | an edit of a live message was not stored: it holds "
                "a value that cannot be stored",
                session_id,
                self.agent_id,
                message_id,
            )
        return None if view is None else StoreView(self.agent_id, next_id, view, self.archive_revision, now())

    # Restoring.

    @contextmanager
    def restoring(self, agent: LocalAgent) -> Iterator[None]:
        """Return the context in which Strands restores the agent; at its end, the agent gets the live messages."""
        self.is_restoring = True
        try:
            yield
        finally:
            self.is_restoring = False
            for record, message in self._records:
                _set_message(record, message)
        self.end_restore(agent)

    def restored_from(self, first: int, messages: Iterable[SessionMessage | None]) -> None:
        """Keep the messages that Strands restores, beginning at a position."""
        if self.is_restoring:
            found = (None if message is None else (message.message_id, message.to_message()) for message in messages)
            self.live = LiveMessages.of(first, found)

    def begin_view(self, view: View, session_id: str) -> list[SessionMessage]:
        """Return the stored messages that a view shows, for Strands to restore; `end_restore` sets the live messages.

        Strands repairs broken tool calls in restored messages and logs a warning, so the messages are empty until then.
        """
        tail = {message.message_id: message for message in self.messages or () if message is not None}
        records = {n: record for n, record in self.shown.items() if n < view.after} | tail
        messages = {n: record.to_message() for n, record in records.items()}
        found, missing = shown(view, messages)
        if missing:
            logger.warning(
                "session_id=<%r>, agent_id=<%r>, missing=<%d> | restoring an agent without live messages that are not "
                "stored",
                session_id,
                self.agent_id,
                missing,
            )
        loaded = (
            None if message is None else (message.message_id, message.to_message()) for message in self.messages or ()
        )
        self.live = LiveMessages.of(self.first, loaded)
        self.live.show(view, found, {n: messages[n] for n in records if n < view.after})
        self._live_list = _without_aliases([*(each.message for each in found), *(messages[n] for n in tail)])
        live = {each.message_id for each in found} | tail.keys()
        self._records = [(record, messages[n]) for n, record in records.items() if n in live]
        for record, message in self._records:
            _set_message(record, {"role": message["role"], "content": []})
        return [record for record, _ in self._records]

    def end_restore(self, agent: LocalAgent) -> None:
        """Set `agent.messages` to the live messages of the view, if there is one."""
        if isinstance(agent, Agent) and agent.model.stateful:  # its provider has the messages
            self.live = None
        elif self._live_list is not None:
            agent.messages[:] = self._live_list
        elif self.live is not None:
            self.live.repaired(agent.messages)
        self.shown, self._records, self._live_list = {}, [], None

    def _remember(self, message_id: int, tracking_id: str | None, document: Mapping[str, Any]) -> None:
        self.identities[message_id] = Identity.of(document)
        self.versions[message_id] = document.get("updated_at")
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


def _without_aliases(messages: list[Any]) -> list[Any]:
    """Return messages in which no dict occurs twice, so that changing one message does not change another."""
    seen: set[int] = set()
    found = []
    for message in messages:
        found.append(shadow(message) if id(message) in seen else message)
        seen.add(id(message))
    return found


def _set_message(record: SessionMessage, message: Any) -> None:
    if record.redact_message is None:
        record.message = message
    else:
        record.redact_message = message


def _is_malformed(name: str, stored: Any) -> bool:
    """Return whether a stored part of an agent's state is malformed, so that it cannot be restored unchanged."""
    state = decode(stored)
    if type(state) is not dict:
        return state is not None or name == "conversation_manager_state"
    if name == "conversation_manager_state":
        removed = state.get("removed_message_count")
        return type(state.get("__name__")) is not str or type(removed) is not int or not 0 <= removed < 2**31
    return name == "_internal_state" and usable_internal_state(state) != state
