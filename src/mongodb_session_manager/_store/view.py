"""Loading the archived messages that the view of an agent shows."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

from .._format.documents import Document
from .._format.ids import message_id_of
from .._format.malformed import log_malformed
from .._format.view import Run, View, positions

logger = logging.getLogger(__name__)


def parse_views(session_id: str, agents: Mapping[str, Document]) -> bool:
    """Replace the stored view of each agent with a `View`; return `False` if one is malformed."""
    are_usable = True
    for key, agent in agents.items():
        if (stored := agent.pop("view", None)) is None:
            continue
        view = View.parse(stored)
        if view is None:
            log_malformed(session_id, f"agents.{key}.view", stored)
        elif isinstance(following := agent.get("next_message_id"), int) and not view.fits(following):
            logger.warning(
                "session_id=<%r>, agent=<%r>, after=<%d>, next_message_id=<%d> | the view refers to messages that are "
                "not stored",
                session_id,
                key,
                view.after,
                following,
            )
        are_usable = are_usable and view is not None
        agent["view"] = view
    return are_usable


def shows_nothing(agent: Document) -> bool:
    """Return whether a view shows none of the stored messages to which it refers."""
    view = agent.get("view")
    has_content = view is not None and any(item.message is not None for item in view.items)
    if view is None or not view.runs or has_content:
        return False
    return not agent["shown"] and not agent["messages"]


def wanted(agent: Document, is_regular: bool) -> list[Run]:
    """Return the ranges of archived positions that hold messages of an agent's view.

    Args:
        agent: The loaded agent.
        is_regular: Whether every id is the position of its message; otherwise, all archived messages are searched.
    """
    view, archived, ids = agent["view"], int(agent["archived"]), agent["ids"]
    lowest = min([first for first, _ in view.runs] + [view.after])
    if not archived or (ids and isinstance(ids[0], int) and lowest >= ids[0]):
        return []
    return positions(view, archived) if is_regular else [(0, archived)]


def add_archived(agent: Document, buckets: Iterable[Document], ranges: Iterable[Run], is_regular: bool) -> int:
    """Add the archived messages that a view shows to `messages` and `shown`; return the number of missing ones."""
    view, archived = agent["view"], int(agent["archived"])
    found: dict[int, Any] = {
        position: message
        for bucket in buckets
        for position, message in enumerate(bucket["messages"], int(bucket["_id"]["first"]))
        if position < archived
    }
    tail: list[Any] = []
    earlier: list[Any] = []
    present = sorted(found)
    for position in present:
        message = found[position]
        if tail or message_id_of(message, position) >= view.after:
            if not tail:
                agent["first"] = view.after if is_regular else position
            tail.append(message)
        elif view.needs(message_id_of(message, position)):
            earlier.append(message)
    agent["messages"] = tail + agent["messages"]
    agent["shown"] = earlier + agent["shown"]
    if not is_regular:
        return 0
    return sum(end - begin - bisect_left(present, end) + bisect_left(present, begin) for begin, end in ranges)
