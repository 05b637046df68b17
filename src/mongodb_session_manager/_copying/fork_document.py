"""Truncating a session after the last message that each agent keeps, for forks and rewinds. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from .._format.codec import decode, encode
from .._format.documents import MESSAGE_USAGE, STATE_DEPTH, USAGE, Document, is_number, usable, usable_numbers
from .._format.ids import checked_count, checked_id
from .._format.view import View
from ..errors import AgentNotFoundError, InvalidArgumentError, MessageNotFoundError
from .import_checks import AGENT_NOT_COPIED, NOT_COPIED


def checked_ends(at_message: object) -> int | dict[str, int] | None:
    """Return a valid `at_message`, or raise `InvalidArgumentError`."""
    if at_message is None:
        return None
    if not isinstance(at_message, Mapping):
        return checked_count(at_message, "at_message")
    return {checked_id(agent_id, "agent_id"): checked_count(n, "at_message") for agent_id, n in at_message.items()}


def ends_of(session_id: str, at_message: int | dict[str, int] | None, agents: Iterable[str]) -> dict[str, int]:
    """Return the last message ids of the agents that are cut.

    Raises:
        InvalidArgumentError: `at_message` is a single id, but the session has several agents.
        AgentNotFoundError: The session has no such agent.
    """
    known = list(agents)
    if isinstance(at_message, int):
        if len(known) > 1:
            raise InvalidArgumentError(
                f"session {session_id!r} has several agents: pass at_message as a dict of agent ids to message ids"
            )
        if not known:
            raise AgentNotFoundError(f"session {session_id!r} has no agent")
        return {known[0]: at_message}
    ends = at_message or {}
    for agent_id in ends:
        if agent_id not in known:
            raise AgentNotFoundError(f"session {session_id!r} has no agent {agent_id!r}")
    return ends


def no_message(agent_id: str, message_id: int) -> MessageNotFoundError:
    """Return the error for a message id that an agent does not have."""
    return MessageNotFoundError(f"agent {agent_id!r} has no message {message_id}")


def session_fields(session: Mapping[str, Any], ends: Mapping[str, int], moment: datetime) -> Document:
    """Return the fields of a fork, without its agents; `ends` are the last message ids of the agents that are cut."""
    fields = {name: value for name, value in session.items() if name not in NOT_COPIED}
    events = session.get("guardrail_events") or []
    if type(events) is list:
        events = [event for event in events if not _is_left_out(usable(dict, event), ends)]
    return {
        **fields,
        "created_at": moment,
        "updated_at": moment,
        "feedbacks": [],
        "guardrail_events": events,
        "copy_of": {"session_id": session["_id"], "at": moment},
    }


def _is_left_out(event: Document, ends: Mapping[str, int]) -> bool:
    agent_id, message_id = event.get("agent_id"), event.get("message_id")
    last = ends.get(agent_id) if type(agent_id) is str else None
    return last is not None and message_id is not None and is_number(message_id) and message_id > last


def agent_fields(agent: Mapping[str, Any]) -> Document:
    return {name: value for name, value in agent.items() if name not in AGENT_NOT_COPIED}


def cut_fields(fields: Document, last: int, kept: int, count: int, usage: Mapping[str, Any]) -> Document:
    """Return the fields of an agent that is cut.

    Args:
        fields: The fields of the agent in the session.
        last: The id of the last message that the fork has.
        kept: The number of messages of the fork.
        count: The number of messages of the session.
        usage: The usage of the messages that the fork does not have.
    """
    data = usable(dict, fields.get("agent_data"))
    state = _manager_state(data.get("conversation_manager_state"), kept, count)
    changed = {**fields, "agent_data": {**data, "conversation_manager_state": state, "_internal_state": {}}}
    view = View.parse(changed.pop("view", None))
    if view is not None and (cut := view.until(last)) is not None:
        changed["view"] = cut.document()
    if totals := usable_numbers(fields.get("usage")):
        changed["usage"] = {name: max(0, total - usage.get(name, 0)) for name, total in totals.items()}
    return changed


def _manager_state(stored: Any, kept: int, count: int) -> Any:
    """Return the state of the conversation manager after a cut.

    The length of a window does not change. A summary is kept if the fork has all its messages; otherwise it is removed,
    and its messages are restored.
    """
    state = decode(stored)
    if type(state) is not dict:
        return stored
    removed = state.get("removed_message_count")
    if type(removed) is int and removed > 0:
        if state.get("summary_message") is None:
            state["removed_message_count"] = min(removed, max(0, kept - max(count - removed, 1)))
        elif removed >= kept:
            state |= {"summary_message": None, "removed_message_count": 0}
    return encode(state, depth=STATE_DEPTH, name="conversation_manager_state")


def usage_of(messages: Iterable[Any]) -> Document:
    """Return the usage that messages have added to the totals of their agent.

    An invocation begins with a user message without tool results.
    """
    totals: Document = dict.fromkeys(USAGE, 0)
    for stored in messages:
        stored = usable(dict, stored)
        message = usable(dict, stored.get("message"))
        content = [block for block in usable(list, message.get("content")) if type(block) is dict]
        is_prompt = message.get("role") == "user" and not any("toolResult" in block for block in content)
        totals["invocations"] += is_prompt
        totals["toolCalls"] += sum("toolUse" in block for block in content)
        usage = {
            **usable_numbers(stored.get("usage")),
            **usable_numbers(usable(dict, stored.get("event_loop_metrics")).get(MESSAGE_USAGE)),
        }
        for name in totals.keys() - {"invocations", "toolCalls"}:
            totals[name] += usage.get(name, 0)
    return totals
