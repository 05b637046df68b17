"""Sizes in bytes of BSON: of values, and of the parts of a session document; the error for too large a part. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

import bson
from bson import ObjectId

from ..errors import StateTooLargeError
from .codec import CODEC_OPTIONS, MAX_NESTING
from .documents import STATE_FIELDS, Document
from .expressions import entries_at
from .ids import agent_id_of

MAX_DOCUMENT_BYTES: Final = 16 * 1024 * 1024

LARGE: Final = 64 * 1024
"""A larger value is encoded in a thread; encoding a dense value of this size takes some milliseconds."""

_ELEMENT = 2  # bytes of an element without its name: its type and the end of the name
_CONTAINER = 5  # bytes of a document or array without elements: its length and its end
_NUMBER = 4
_SMALL = frozenset({bool, type(None), datetime, ObjectId})
"""Types of small values, which are not counted."""

AGENT_FIELDS = (*STATE_FIELDS, "system_prompt", "model", "prompt_metadata")
"""The fields of `agent_data` that can be large."""


def stored_size(document: Mapping[str, Any]) -> int:
    return len(bson.encode(document, codec_options=CODEC_OPTIONS))


def size_of(value: Any) -> int:
    return stored_size({"v": value})


def least_size(value: object, limit: int) -> int:
    """Return a lower bound of the size of a value that is not encoded; counting stops beyond `limit`.

    Nothing is copied. The length of a list counts before its elements, so that a huge list is not walked through.
    """
    size = 0
    level = [value]
    for _ in range(MAX_NESTING + 2):  # a value that contains itself has no end
        below: list[Any] = []
        for found in level:
            kind = type(found)
            if kind is str or kind is bytes:
                size += len(found)  # type: ignore[arg-type]
            elif kind is int or kind is float:
                size += _NUMBER
            elif kind in _SMALL:
                continue
            elif isinstance(found, dict):
                size += _CONTAINER + _ELEMENT * dict.__len__(found) + _size_of_keys(found)
                if size > limit:
                    return size
                below += dict.values(found)
            elif isinstance(found, list | tuple | set | frozenset):
                size += _CONTAINER + _ELEMENT * len(found) + _digits(len(found))
                if size > limit:
                    return size
                below += found
            elif hasattr(kind, "__dataclass_fields__"):  # Strands' agents and messages
                below.append(getattr(found, "__dict__", None))
            if size > limit:
                return size
        if not below:
            break
        level = below
    return size


def _size_of_keys(value: dict[Any, Any]) -> int:
    try:
        return len("".join(dict.keys(value)))
    except TypeError:  # not all of them are text
        return sum(len(key) for key in dict.keys(value) if type(key) is str)


def _digits(count: int) -> int:
    """Return how many digits the numbers below `count` have together: they name the elements of an array."""
    digits, first = 0, 1
    while first < count:
        digits += count - first
        first *= 10
    return digits + bool(count)


def is_large(value: object) -> bool:
    return least_size(value, LARGE) > LARGE


def is_large_session(document: Mapping[str, Any]) -> bool:
    """Return whether a loaded session is large. The server has measured the messages that its document holds."""
    measured, agents = 0, {}
    for key, agent in document["agents"].items():
        if type(agent.get("bytes")) is not int or agent.get("shown") or agent["first"] < agent["archived"]:
            return is_large(document)  # messages from elsewhere
        measured += agent["bytes"]
        agents[key] = {name: value for name, value in agent.items() if name not in ("messages", "ids")}
    return least_size({**document, "agents": agents}, LARGE) + measured > LARGE and is_large(document)


# The parts of a session document; queried only after the server refused a statement because of its size.

_SESSION_PARTS = {"metadata": "metadata", "feedback": "feedbacks", "guardrail events": "guardrail_events"}
"""The name of a part in errors, and its field."""


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
            "view": _bson_size("$$each.v.view"),
            "messages": _bson_size("$$each.v.messages"),
        },
    ),
    "multi_agents": _sizes_of_each("$multi_agents", {"state": _bson_size("$$each.v.state")}),
}
"""The projection for the sizes of the parts of a session document."""


def of_agent(field: str, agent_id: str) -> str:
    return f"{field} of agent {agent_id!r}"


def of_multi_agent(multi_agent_id: str) -> str:
    return f"state of multi-agent {multi_agent_id!r}"


def refuse_unstorable(session_id: str, part: str, value: Any) -> None:
    """Raise `StateTooLargeError`, before encoding, for a value that is too large for any document."""
    size = least_size(value, MAX_DOCUMENT_BYTES)
    if size > MAX_DOCUMENT_BYTES:
        raise StateTooLargeError(
            f"session {session_id!r}: {part} was not stored: it takes at least {size} bytes, but a MongoDB document "
            f"can hold at most {MAX_DOCUMENT_BYTES}"
        )


def too_large(session_id: str, part: str, size: int, sizes: Mapping[str, Any]) -> StateTooLargeError:
    """Return the error for a refused part; `sizes`, a result of `PART_SIZES`, is empty if no document can hold it."""
    refused = f"session {session_id!r}: {part} was not stored: it takes {size} bytes, "
    if not sizes:
        return StateTooLargeError(f"{refused}but a MongoDB document can hold at most {MAX_DOCUMENT_BYTES}")
    largest = sorted(_named(sizes), key=lambda named: named[1], reverse=True)[:3]
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
