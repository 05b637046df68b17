"""What a session that somebody hands in must be before it is stored. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ._codec import decode, stored_size
from ._documents import Document, to_date
from ._references import references_of
from .errors import EncodingError, InvalidArgumentError, raise_alone

LEFT_BEHIND = frozenset(
    {
        "_id",
        "session_id",
        "agents",
        "attachments_generation",
        "copy_of",
        "session_ttl",
        "kept_until",
        "keep_until",
    }
)
"""Fields of a session document that a copy has of its own, or not at all."""

AGENT_LEFT_BEHIND = frozenset(
    {"messages", "archived", "revision", "archive_revision", "stale_below", "next_message_id"}
)
"""Fields of an agent's sub-document that a copy has of its own."""


def require(condition: bool, otherwise: str) -> None:
    """Refuse what is handed in unless the condition holds."""
    if not condition:
        raise InvalidArgumentError(otherwise)


def _check_names(fields: Document, what: str) -> None:
    require(
        all(key and not key.startswith("$") and "." not in key for key in fields),
        f"{what} holds a field whose name is empty, begins with $ or holds a dot",
    )


def _check_date(value: object, name: str) -> None:
    try:
        if not isinstance(value, str | datetime | None):
            raise ValueError
        to_date(value)
    except ValueError:
        raise_alone(InvalidArgumentError(f"{name} is no date"))


def _check_kinds(fields: Document, kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    for name, kind in kinds.items():
        value = fields.get(name)
        require(value is None or (isinstance(value, kind) and type(value) is not bool), f"{name} is of another type")


def checked_session(fields: Document) -> Document:
    """Return what a copy takes of the fields of a session document, if they can be stored."""
    _check_names(fields, "the session")
    _check_kinds(
        fields,
        {
            "application_name": str,
            "session_type": str,
            "metadata": dict,
            "feedbacks": list,
            "guardrail_events": list,
            "multi_agents": dict,
        },
    )
    for name in ("created_at", "updated_at"):
        _check_date(fields.get(name), name)
    require(not any(key.startswith("$") for key in fields.get("metadata") or {}), "metadata holds an operator")
    for name in ("feedbacks", "guardrail_events"):
        require(all(type(entry) is dict for entry in fields.get(name) or []), f"{name} holds what is no object")
    multi_agents = fields.get("multi_agents") or {}
    _check_names(multi_agents, "multi_agents")
    for stored in multi_agents.values():
        require(
            type(stored) is dict
            and "state" in stored
            and isinstance(stored.get("revision"), int)
            and isinstance(stored.get("writer"), str),
            "multi_agents holds what is no multi-agent",
        )
    return {name: value for name, value in fields.items() if name not in LEFT_BEHIND}


def checked_agent(fields: Document) -> Document:
    """Return what a copy takes of the fields of an agent's sub-document, if they can be stored."""
    _check_names(fields, "the agent")
    _check_kinds(fields, {"agent_data": dict, "usage": dict, "config_set": list})
    data = fields.get("agent_data") or {}
    _check_names(data, "agent_data")
    _check_kinds(data, {"state": dict, "conversation_manager_state": dict, "_internal_state": dict})
    _check_kinds(data, {"config_set": list, "model": str})
    for dated in (fields, data):
        for name in ("created_at", "updated_at"):
            _check_date(dated.get(name), name)
    _check_kinds(fields.get("usage") or {}, dict.fromkeys(fields.get("usage") or {}, (int, float)))
    return {name: value for name, value in fields.items() if name not in AGENT_LEFT_BEHIND}


def _decoded(value: Any) -> Any:
    try:
        return decode(value)
    except EncodingError:
        raise_alone(InvalidArgumentError("it is nested too deep"))


def checked_message(message: Document, next_id: int) -> int:
    """Refuse what is no stored message that may follow the others; return how many bytes it takes."""
    _check_names(message, "the message")
    message_id = message.get("message_id")
    require(
        isinstance(message_id, int) and type(message_id) is not bool and next_id <= message_id < 2**31,
        "its message_id does not follow the one before it",
    )
    for name in ("message", "redact_message"):
        body = message.get(name)
        if body is None and name == "redact_message":
            continue
        decoded = _decoded(body)
        require(
            type(decoded) is dict
            and isinstance(decoded.get("role"), str)
            and isinstance(decoded.get("content"), list | tuple),
            f"{name} has no role and content",
        )
    for name in ("created_at", "updated_at"):
        _check_date(message.get(name), name)
    _check_kinds(message, {"usage": dict, "event_loop_metrics": dict, "guardrail_event": dict, "attachments": list})
    listed = message.get("attachments") or []
    require(len(references_of(message)) == len(listed), "attachments holds what is no reference")
    return stored_size(message)
