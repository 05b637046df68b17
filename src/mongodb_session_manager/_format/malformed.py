"""Malformed fields: stored values of another type than their field has.

Applications and earlier versions have stored them. They are read as the default, kept unchanged, and logged once for
each session and field. An operation that needs the field raises the error of a `MalformedField`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from strands.types.session import SessionMessage

from ..errors import DatabaseError
from .bounded import Bounded
from .documents import Document, is_number, message_from, restorable, usable
from .ids import agent_id_of, agent_key

logger = logging.getLogger(__name__)

T = TypeVar("T")

_logged: Bounded[tuple[str, str], None] = Bounded(4096)
"""The sessions and fields that were logged."""

_SESSION_TYPES: Mapping[str, type] = {
    "metadata": dict,
    "feedbacks": list,
    "guardrail_events": list,
    "agents": dict,
    "multi_agents": dict,
}
_AGENT_TYPES: Mapping[str, type] = {"agent_data": dict, "messages": list, "usage": dict}


class MalformedField(NamedTuple):
    """A field of a session document that holds a value of the wrong type."""

    path: str
    value: Any
    kind: type

    def error(self, session_id: str) -> DatabaseError:
        return DatabaseError(
            f"session {session_id!r} holds a {type(self.value).__name__} in the field {self.path!r}, where a "
            f"{self.kind.__name__} is needed: correct or remove it"
        )


def malformed_fields(document: Mapping[str, Any]) -> Iterator[MalformedField]:
    """Yield the fields of a session document that cannot be written into."""
    yield from _malformed(document, "", _SESSION_TYPES)
    for key, agent in usable(dict, document.get("agents")).items():
        if type(agent) is not dict:
            yield MalformedField(f"agents.{key}", agent, dict)
            continue
        yield from _malformed(agent, f"agents.{key}.", _AGENT_TYPES)
        yield from _malformed(usable(dict, agent.get("agent_data")), f"agents.{key}.agent_data.", {"config_set": list})
        for name, number in usable(dict, agent.get("usage")).items():
            if not is_number(number):
                yield MalformedField(f"agents.{key}.usage.{name}", number, int)
    multi_agents = usable(dict, document.get("multi_agents"))
    yield from _malformed(multi_agents, "multi_agents.", dict.fromkeys(multi_agents, dict))


def _malformed(fields: Mapping[str, Any], path: str, types: Mapping[str, type]) -> Iterator[MalformedField]:
    for name, kind in types.items():
        if name in fields and type(fields[name]) is not kind:
            yield MalformedField(f"{path}{name}", fields[name], kind)


def unusable_agents(document: Mapping[str, Any]) -> dict[str | None, MalformedField]:
    """Return, by agent id, the fields that prevent restoring and writing an agent; `None` means all agents.

    The document must have been read with `MALFORMED_AGENTS` and `malformed_messages`.
    """
    found: dict[str | None, MalformedField] = {}
    for entry in document.get("malformed_agents") or []:
        key, value = entry["k"], entry.get("v")
        if value is not None:
            path = "agents" if key is None else f"agents.{key}"
            found[None if key is None else agent_id_of(key)] = MalformedField(path, value, dict)
    for key, agent in document["agents"].items():
        for name, value, kind in (
            ("messages", agent.get("malformed_messages"), list),
            ("agent_data", agent.get("agent_data"), dict),
            ("next_message_id", agent.get("next_message_id"), int),
        ):
            if value is not None and not isinstance(value, kind):
                found[agent_id_of(key)] = MalformedField(f"agents.{key}.{name}", value, kind)
    return found


def log_malformed(session_id: object, field: str, value: object) -> None:
    """Log, once for each session and field, that a stored value is read as its default."""
    if (key := (str(session_id), field)) not in _logged:
        _logged[key] = None
        logger.warning(
            "session_id=<%r>, field=<%r>, type=<%s> | a stored value is unusable; it is kept, and read as absent",
            session_id,
            field,
            type(value).__name__,
        )


def usable_field(kind: type[T], value: object, session_id: object, field: str) -> T:
    """Return a stored value if it has the type of its field, else an empty value; log a malformed one."""
    if value is not None and type(value) is not kind:
        log_malformed(session_id, field, value)
    return usable(kind, value)


def usable_agents(session_id: object, document: Mapping[str, Any]) -> dict[str, Document]:
    """Return by key the values of `agents` that are objects; log the others."""
    agents: dict[str, Any] = usable_field(dict, document.get("agents"), session_id, "agents")
    for key in [key for key, agent in agents.items() if type(agent) is not dict]:
        usable_field(dict, agents.pop(key), session_id, f"agents.{key}")
    return agents


def messages_from(
    stored: Iterable[Any], first: int, session_id: str, agent_id: str, *, restoring: bool
) -> Iterator[tuple[SessionMessage | None, Any]]:
    """Yield Strands' view of each element of `messages`, and the element; log malformed ones.

    The view is `None` for an element that is not a message. With `restoring`, messages have only the blocks that
    Strands can restore.
    """
    for position, element in enumerate(stored, first):
        message = message_from(element, position)
        if message is not None and restoring:
            message = restorable(message)
        if message is None:
            log_malformed(session_id, f"agents.{agent_key(agent_id)}.messages", element)
        yield message, element
