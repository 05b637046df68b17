"""The session document, and the conversion of Strands' dataclasses to documents and back. Pure.

_id, session_id          the session id
application_name         str | null
owner, title, tags       see `labels`; absent if the session has none
session_type             "AGENT"
created_at, updated_at   BSON dates, UTC
metadata, feedbacks, guardrail_events
agents.<agent key>
    agent_data           fields of Strands' SessionAgent + model, system_prompt, prompt_metadata
    created_at, updated_at   in forks of 1.0.0, the date of the fork; `agent_data` holds the date of creation
    next_message_id      the id of the next message; absent in documents of versions before 1.0
    archived, revision   see `buckets`; absent if no message was archived or replaced
    view                 see `view`; absent if the live messages are the stored ones
    config_set           names of the configuration fields that a user has set; 1.0.0 kept it in `agent_data`
    messages             [{message, message_id, redact_message, created_at, updated_at, attachments?,
                           event_loop_metrics?}]
                         `event_loop_metrics.message_usage` is the usage of the message; 1.0.0 kept it in `usage`
incarnation              an ObjectId; the ids of all parts outside the document begin with it, see `layout`
time_to_live, expires_at of a session that expires, see `retention`
state, state_by, state_until
                         of a session that is being copied or deleted, see `_store.deletion`
removed_attachments      references of replaced messages, until the files are removed, see `_store.attachments`
has_content, removed_content
                         of a session whose storage was used, see `content`
migrating, moved         of a session of 1.0.0 whose migration is not complete, see `_store.migration`
multi_agents.<key>       see `multi_agents`
copy_of                  the origin of an imported session or a fork: {session_id, at}
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NotRequired, TypedDict, TypeVar

from bson import ObjectId
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from .codec import decode, encode
from .dates import to_date, to_iso
from .ids import is_numbered, message_id_of

T = TypeVar("T")

MESSAGE_DEPTH = 6  # document, agents, key, messages, element, message
STATE_DEPTH = 5  # document, agents, key, agent_data, field

MAX_NUMBER = 2**62
"""The largest number that is incremented: MongoDB refuses an increment beyond 2**63 - 1."""

USAGE = (
    "inputTokens",
    "outputTokens",
    "totalTokens",
    "cacheReadInputTokens",
    "cacheWriteInputTokens",
    "latencyMs",
    "invocations",
    "toolCalls",
)
"""The running totals of an agent, as Strands and Bedrock name them; `latencyMs` in milliseconds."""

RESTORED = ("message", "message_id", "redact_message", "created_at", "updated_at", "attachments")
"""The fields of a stored message that restoring an agent needs."""

MESSAGE_USAGE = "message_usage"
"""The field of a message's `event_loop_metrics` that holds the usage of this message alone.

The original removes `event_loop_metrics` before it builds a `SessionMessage`, which takes no unknown field.
"""

STATE_FIELDS = ("state", "conversation_manager_state", "_internal_state")
"""The fields of `agent_data` that hold the state of the agent."""

Document = dict[str, Any]
"""A document or a part of one, as the driver takes and returns it."""


class StoredMessage(TypedDict):
    """An element of `messages`."""

    message: Document
    message_id: int
    redact_message: Document | None
    created_at: datetime
    updated_at: datetime
    attachments: NotRequired[list[Any]]
    event_loop_metrics: NotRequired[Document]
    guardrail_event: NotRequired[Document]


def new_session(session_id: str, application_name: str | None, moment: datetime) -> Document:
    return {
        "_id": session_id,
        "session_id": session_id,
        "incarnation": ObjectId(),
        "application_name": application_name,
        "session_type": SessionType.AGENT.value,
        "created_at": moment,
        "updated_at": moment,
        "metadata": {},
        "feedbacks": [],
        "guardrail_events": [],
        "agents": {},
    }


def session_from(document: Mapping[str, Any]) -> Session:
    """Return Strands' view of a session document; a `session_type` that Strands does not know is `AGENT`."""
    return Session(
        session_id=document["_id"],
        session_type=SessionType.AGENT,
        created_at=to_iso(document.get("created_at")),
        updated_at=to_iso(document.get("updated_at")),
    )


def usable(kind: type[T], value: object) -> T:
    """Return a stored value if it has the type of its field, else an empty value of that type."""
    return value if type(value) is kind else kind()


def usable_numbers(values: object) -> dict[str, Any]:
    """Return the numbers of a stored object that the server can increment, by name."""
    return {name: number for name, number in usable(dict, values).items() if is_number(number)}


def number(fields: Mapping[str, Any], name: str) -> int:
    """Return a stored int; any other value is read as 0."""
    value = fields.get(name)
    return int(value) if isinstance(value, int) else 0


def is_number(value: object) -> bool:
    """Return whether the server can increment a stored value; it refuses sums beyond 64 bits."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= MAX_NUMBER


def agent_state(agent: SessionAgent) -> Document:
    state = {name: encode(getattr(agent, name), depth=STATE_DEPTH, name=name) for name in STATE_FIELDS}
    return {**state, "updated_at": to_date(agent.updated_at)}


def new_agent(agent: SessionAgent) -> Document:
    created_at = to_date(agent.created_at)
    return {
        "agent_data": {"agent_id": agent.agent_id, "created_at": created_at, **agent_state(agent)},
        "created_at": created_at,
        "updated_at": to_date(agent.updated_at),
        "next_message_id": 0,
        "messages": [],
    }


def agent_from(agent_id: str, stored: Mapping[str, Any]) -> SessionAgent:
    data: Document = usable(dict, stored.get("agent_data"))
    state, manager_state, internal_state = (usable(dict, decode(data.get(name))) for name in STATE_FIELDS)
    return SessionAgent(
        agent_id=agent_id,
        state=state,
        conversation_manager_state=manager_state,
        _internal_state=usable_internal_state(internal_state),
        created_at=to_iso(data.get("created_at") or stored.get("created_at")),
        updated_at=to_iso(stored.get("updated_at") or data.get("updated_at")),
    )


def usable_internal_state(stored: Mapping[str, Any]) -> dict[str, Any]:
    checked = ("interrupt_state", "model_state")
    return {name: value for name, value in stored.items() if name not in checked or _is_internal(name, value)}


def _is_internal(name: str, value: Any) -> bool:
    if type(value) is not dict or name == "model_state":
        return type(value) is dict
    return "activated" in value and type(value.get("context")) is dict and type(value.get("interrupts")) is dict


def message_body(message: SessionMessage) -> Document:
    """Return the fields of a stored message that a replacement changes."""
    # `to_message` returns the replacement of a redacted message, so the original text is not stored.
    return {
        "message": encode(message.to_message(), depth=MESSAGE_DEPTH, name="message"),
        "redact_message": encode(message.redact_message, depth=MESSAGE_DEPTH, name="redact_message"),
        "updated_at": to_date(message.updated_at),
    }


def stored_message(message: SessionMessage, message_id: int) -> StoredMessage:
    body = message_body(message)
    stored: StoredMessage = {
        "message": body["message"],
        "message_id": message_id,
        "redact_message": body["redact_message"],
        "created_at": to_date(message.created_at),
        "updated_at": body["updated_at"],
    }
    if usage := message_usage(message.message):
        stored["event_loop_metrics"] = {MESSAGE_USAGE: usage}
    return stored


def message_usage(message: Mapping[str, Any]) -> Document:
    """Return the usage that Strands attached to an assistant message: tokens, and latencies in milliseconds.

    It is empty for other messages.
    """
    metadata = message.get("metadata") or {}
    reported = {**(metadata.get("usage") or {}), **(metadata.get("metrics") or {})}
    return {name: value for name, value in reported.items() if isinstance(value, int | float)}


def message_from(stored: Any, position: int) -> SessionMessage | None:
    """Return Strands' view of an element of `messages`, or `None` if it is not a message.

    `position` is the id of a message without one. The view of a redacted message with an unusable replacement is
    `None`: its original must stay hidden.
    """
    if type(stored) is not dict:
        return None
    message, redacted = _content_from(stored.get("message")), stored.get("redact_message")
    if message is None or (redacted is not None and (redacted := _content_from(redacted)) is None):
        return None
    created_at, updated_at = stored.get("created_at"), stored.get("updated_at")
    created = to_iso(created_at)
    return SessionMessage(
        message=message,
        message_id=message_id_of(stored, position),
        redact_message=redacted,
        created_at=created,
        updated_at=created if type(updated_at) is datetime and updated_at == created_at else to_iso(updated_at),
    )


def _content_from(stored: Any) -> Any:
    """Return a decoded message, or `None` if it is not one; content that is text becomes one block."""
    message = decode(stored)
    if type(message) is not dict or type(message.get("role")) is not str:
        return None
    content = message.get("content")
    if type(content) is str:
        message["content"] = [{"text": content}]
    elif not isinstance(content, list | tuple):
        return None
    return message


def restorable(message: SessionMessage) -> SessionMessage | None:
    """Return a message with those of its blocks that Strands can restore, or `None` if there is none."""
    for shown in _shown(message):
        if not all(map(_is_block, shown["content"])):
            shown["content"] = [block for block in shown["content"] if _is_block(block)]
            if not shown["content"]:
                return None
        if type(shown.get("tracking_id", "")) is not str:
            del shown["tracking_id"]
    return message


def is_restorable(message: SessionMessage) -> bool:
    return all(
        all(map(_is_block, shown["content"])) and type(shown.get("tracking_id", "")) is str for shown in _shown(message)
    )


def _shown(message: SessionMessage) -> list[Any]:
    return [shown for shown in (message.message, message.redact_message) if shown is not None]


def _is_block(block: Any) -> bool:
    return type(block) is dict and not any(
        name in block
        and (
            type(block[name]) is not dict
            or type(block[name].get("toolUseId")) is not str
            or type(block[name].get("name", "")) is not str
        )
        for name in ("toolUse", "toolResult")
    )


def removed_messages(stored: Mapping[str, Any]) -> int:
    """Return how many of an agent's oldest messages its conversation manager has removed; they are not restored."""
    data = usable(dict, stored.get("agent_data"))
    removed = usable(dict, decode(data.get("conversation_manager_state"))).get("removed_message_count")
    return removed if type(removed) is int and 0 <= removed < 2**31 else 0


def needs_upgrade(agent: Mapping[str, Any]) -> bool:
    """Return whether the ids or the `config_set` of a loaded agent must get their current form."""
    return "malformed_messages" not in agent and (not is_numbered(agent) or has_old_config_set(agent))


def has_old_config_set(agent: Mapping[str, Any]) -> bool:
    return type(usable(dict, agent.get("agent_data")).get("config_set")) is list


def config_set(agent: Mapping[str, Any]) -> set[str]:
    old = agent["agent_data"]["config_set"] if has_old_config_set(agent) else None
    places = (agent.get("config_set"), old)
    return {name for place in places if isinstance(place, list) for name in place if isinstance(name, str)}
