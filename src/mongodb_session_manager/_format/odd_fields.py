"""Reading what cannot be used of a stored session as its default, and telling of it once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from strands.types.session import SessionMessage

from . import documents
from .documents import Document, agent_key, message_from, restorable

logger = logging.getLogger(__name__)

T = TypeVar("T")

_told: dict[tuple[str, str], None] = {}
_MOST_TOLD = 4096


def tell_odd(session_id: object, field: str, value: object) -> None:
    """Log, once for a session and field, that a stored value is read as its default."""
    if (key := (str(session_id), field)) not in _told:
        if len(_told) >= _MOST_TOLD:
            _told.clear()
        _told[key] = None
        logger.warning(
            "session_id=<%r>, field=<%r>, type=<%s> | a stored value cannot be used; it is kept, and read as absent",
            session_id,
            field,
            type(value).__name__,
        )


def usable(kind: type[T], value: object, session_id: object, field: str) -> T:
    """Return a stored value of the type that its field has, in the place of any other an empty one."""
    if value is not None and type(value) is not kind:
        tell_odd(session_id, field, value)
    return documents.usable(kind, value)


def usable_agents(session_id: object, document: Mapping[str, Any]) -> dict[str, Document]:
    """Return those values of `agents` that are the sub-document of an agent, by key."""
    agents: dict[str, Any] = usable(dict, document.get("agents"), session_id, "agents")
    for key in [key for key, agent in agents.items() if type(agent) is not dict]:
        usable(dict, agents.pop(key), session_id, f"agents.{key}")
    return agents


def messages_from(
    stored: Iterable[Any], first: int, session_id: str, agent_id: str, *, restoring: bool
) -> Iterator[tuple[SessionMessage | None, Any]]:
    """Yield Strands' view of stored messages, with each of them; `None` for what is no message.

    With `restoring`, they are those that an agent can go on from.
    """
    for position, element in enumerate(stored, first):
        message = message_from(element, position)
        if message is not None and restoring:
            message = restorable(message)
        if message is None:
            tell_odd(session_id, f"agents.{agent_key(agent_id)}.messages", element)
        yield message, element
