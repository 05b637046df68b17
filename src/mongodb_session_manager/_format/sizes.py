"""The sizes of the parts of a session's document, and the error for a part that does not fit. Pure.

The sizes are queried only after the server refused a statement because the document would be too large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import StateTooLargeError
from .codec import stored_size
from .documents import STATE_FIELDS, Document, agent_id_of, entries_at
from .large_values import least_size

MAX_DOCUMENT_BYTES = 16 * 1024 * 1024

_SHOWN = 3

_SESSION_PARTS = {"metadata": "metadata", "feedback": "feedbacks", "guardrail events": "guardrail_events"}
"""The name of a part in errors, and its field."""

AGENT_FIELDS = (*STATE_FIELDS, "system_prompt", "model", "prompt_metadata")
"""The fields of `agent_data` that can be large."""


def _bson_size(path: str) -> Document:
    return {"$bsonSize": {"v": path}}


def _sizes_of_each(path: str, sizes: Document) -> Document:
    """Return the expression for `sizes` of each value of a sub-document; `$$each.v` is the value."""
    return {"$map": {"input": entries_at(path), "as": "each", "in": {"key": "$$each.k", "sizes": sizes}}}


PART_SIZES: Document = {
    "_id": 0,
    "session": {name: _bson_size(f"${field}") for name, field in _SESSION_PARTS.items()},
    "agents": _sizes_of_each(
        "$agents",
        {
            **{field: _bson_size(f"$$each.v.agent_data.{field}") for field in AGENT_FIELDS},
            "messages": _bson_size("$$each.v.messages"),
        },
    ),
    "multi_agents": _sizes_of_each("$multi_agents", {"state": _bson_size("$$each.v.state")}),
}
"""The projection that brings the sizes of the parts of a session's document."""


def of_agent(field: str, agent_id: str) -> str:
    """Return the name of a part of an agent in errors."""
    return f"{field} of agent {agent_id!r}"


def of_multi_agent(multi_agent_id: str) -> str:
    """Return the name of the state of an orchestrator in errors."""
    return f"state of multi-agent {multi_agent_id!r}"


def size_of(value: Any) -> int:
    """Return the size in bytes of an encoded value, computed as the server computes it."""
    return stored_size({"v": value})


def refuse_unstorable(session_id: str, part: str, value: Any) -> None:
    """Refuse a value, before it is encoded, if no document can hold it.

    Raises:
        StateTooLargeError: It takes more than `MAX_DOCUMENT_BYTES`.
    """
    size = least_size(value, MAX_DOCUMENT_BYTES)
    if size > MAX_DOCUMENT_BYTES:
        raise StateTooLargeError(
            f"session {session_id!r}: {part} was not stored: it takes at least {size} bytes, but a MongoDB document "
            f"can hold at most {MAX_DOCUMENT_BYTES}"
        )


def too_large(session_id: str, part: str, size: int, sizes: Mapping[str, Any]) -> StateTooLargeError:
    """Return the error for a part of a session that was not stored.

    Args:
        session_id: The session.
        part: The name of the part.
        size: Its size in bytes.
        sizes: The result of `PART_SIZES`; empty for a part that no document can hold.
    """
    refused = f"session {session_id!r}: {part} was not stored: it takes {size} bytes, "
    if not sizes:
        return StateTooLargeError(f"{refused}but a MongoDB document can hold at most {MAX_DOCUMENT_BYTES}")
    largest = sorted(_named(sizes), key=lambda named: named[1], reverse=True)[:_SHOWN]
    shown = ", ".join(f"{name} ({stored} bytes)" for name, stored in largest)
    return StateTooLargeError(
        f"{refused}and with it the session's document would exceed {MAX_DOCUMENT_BYTES} bytes; its largest parts are: "
        f"{shown}"
    )


def _named(sizes: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    yield from sizes["session"].items()
    for agent in sizes["agents"]:
        for field, size in agent["sizes"].items():
            yield of_agent(field, agent_id_of(agent["key"])), size
    for multi_agent in sizes["multi_agents"]:
        yield of_multi_agent(agent_id_of(multi_agent["key"])), multi_agent["sizes"]["state"]
