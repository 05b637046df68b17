"""The aggregations that make the document of a fork from the document of its session. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .._format.buckets import head_numbers
from .._format.codec import decode, encode
from .._format.documents import MESSAGE_USAGE, USAGE, Document, usable_numbers
from .._format.expressions import MALFORMED_AGENTS, array_at, entries_at, malformed_at
from .._format.ids import agent_id_of, checked_id, checked_message_id
from .._format.layout import live_at
from .._format.statements import REMOVED
from ..errors import AgentNotFoundError, InvalidArgumentError

AtMessage = int | Mapping[str, int] | None
"""The last message of a fork: its id, or by agent id; `None` for all."""

_STATE_DEPTH = 5  # document, agents, key, agent_data, field
_ALL = 2**31 - 1


def checked_ends(at_message: object) -> int | dict[str, int] | None:
    """Return `at_message` if it can say where a fork ends.

    Raises:
        InvalidArgumentError: It cannot.
    """
    if at_message is None:
        return None
    if not isinstance(at_message, Mapping):
        return checked_message_id(at_message)
    return {checked_id(agent_id, "agent_id"): checked_message_id(n) for agent_id, n in at_message.items()}


def ends_of(session_id: str, at_message: int | dict[str, int] | None, agents: Iterable[str]) -> dict[str, int]:
    """Return the id of the last message of those agents that are to be cut.

    Raises:
        InvalidArgumentError: One number was given for several agents.
        AgentNotFoundError: There is no such agent.
    """
    known = list(agents)
    if isinstance(at_message, int):
        if len(known) > 1:
            raise InvalidArgumentError(
                f"session {session_id!r} has several agents: give at_message as a dict, agent id to message id"
            )
        if not known:
            raise AgentNotFoundError(f"session {session_id!r} holds no agent")
        return {known[0]: at_message}
    ends = at_message or {}
    for agent_id in ends:
        if agent_id not in known:
            raise AgentNotFoundError(f"session {session_id!r} holds no agent {agent_id!r}")
    return ends


def facts(ends: int | dict[str, int] | None) -> Document:
    """Return the projection that brings what has to be known of a session to fork it."""
    agent = "$$agent.v"
    messages = array_at(f"{agent}.messages")
    if isinstance(ends, int):
        last: Any = ends
    else:
        branches = [
            {"case": {"$eq": ["$$agent.k", {"$literal": key}]}, "then": message_id}
            for key, message_id in (ends or {}).items()
        ]
        last = {"$switch": {"branches": branches, "default": _ALL}} if branches else _ALL
    later = {"$filter": {"input": messages, "cond": {"$gt": ["$$this.message_id", last]}}}
    fields = {
        **head_numbers(agent),
        "key": "$$agent.k",
        "attachments": {"$map": {"input": messages, "in": "$$this.attachments"}},
        "state": f"{agent}.agent_data.conversation_manager_state",
        "usage": f"{agent}.usage",
        "malformed_messages": malformed_at(f"{agent}.messages", "array"),
        "agent_data": malformed_at(f"{agent}.agent_data", "object"),
        "cut_usage": {"$let": {"vars": {"later": later}, "in": usage_of("$$later")}},
    }
    entries = entries_at("$agents")
    return {
        "incarnation": 1,
        "time_to_live": 1,
        "copy_of": 1,
        "malformed_agents": MALFORMED_AGENTS,
        "heads": {"$map": {"input": entries, "as": "agent", "in": fields}},
    }


def usage_of(messages: str) -> Document:
    """Return the expression for what `messages` have added to the totals of their agent.

    An invocation begins with a message of the user that holds no result of a tool.
    """
    content = {"$cond": [{"$isArray": "$$m.message.content"}, "$$m.message.content", []]}
    calls = {"$filter": {"input": content, "cond": {"$ne": [{"$type": "$$this.toolUse"}, "missing"]}}}
    results = {"$filter": {"input": content, "cond": {"$ne": [{"$type": "$$this.toolResult"}, "missing"]}}}
    prompt = {"$and": [{"$eq": ["$$m.message.role", "user"]}, {"$eq": [{"$size": results}, 0]}]}

    def total(expression: Any) -> Document:
        return {"$sum": {"$map": {"input": messages, "as": "m", "in": expression}}}

    counted = {"invocations": total({"$cond": [prompt, 1, 0]}), "toolCalls": total({"$size": calls})}
    return {
        name: counted.get(name)
        or total({"$ifNull": [f"$$m.event_loop_metrics.{MESSAGE_USAGE}.{name}", f"$$m.usage.{name}"]})
        for name in USAGE
    }


@dataclass
class Branch:
    """An agent of the session, and the part of it that the fork takes.

    Attributes:
        agent: The values of `facts` for the agent.
        cut_at: The position of the first message that the fork does not take; `None` if it takes all.
        next_id: The id after the last message that the fork takes.
        cut_usage: The usage of the messages that the fork does not take.
    """

    agent: Document
    cut_at: int | None
    next_id: int
    cut_usage: Document

    @property
    def agent_id(self) -> str:
        """The id of the agent."""
        return agent_id_of(self.agent["key"])

    @property
    def archived(self) -> int:
        """How many messages are below the head of the fork."""
        archived = int(self.agent["archived"])
        return archived if self.cut_at is None else min(archived, self.cut_at)

    @property
    def kept(self) -> int:
        """How many messages of the head the fork takes."""
        count = int(self.agent["count"])
        return count if self.cut_at is None else max(0, self.cut_at - int(self.agent["archived"]))


_NOT_COPIED = (
    *("attachments_generation", "expires_at", "migrating", "moved", "session_ttl", "kept_until", "keep_until"),
    REMOVED,
)
"""Fields of a session that a fork does not get."""


def snapshot_of(
    session_id: str, own: Mapping[str, Any], until: datetime, number: int, moment: datetime, sessions: str
) -> list[Document]:
    """Return the aggregation that copies a session document into a staged one.

    It changes nothing without the session, or after the staged document was removed.

    Args:
        session_id: The session.
        own: The filter for the staged document.
        until: The end of its lease.
        number: The number of the round, which distinguishes the snapshots of a fork.
        moment: The current time.
        sessions: The name of the collection.
    """
    origin = {
        "session_id": {"$literal": session_id},
        "at": moment,
        "incarnation": "$incarnation",
        "state": "$state",
        "round": number,
    }
    literals = {name: {"$literal": value} for name, value in own.items()}
    fields = {**literals, "session_id": literals["_id"], "state_until": until, "feedbacks": []}
    is_staged = {"$and": [{"$eq": [f"${name}", value]} for name, value in literals.items()]}
    replace = {"$replaceWith": {"$cond": [is_staged, "$$new", "$$ROOT"]}}
    return [
        {"$match": {"_id": session_id, **live_at(moment)}},
        {"$set": {"copy_of": {"$mergeObjects": [origin]}}},  # in the place of whatever is there
        {"$unset": list(_NOT_COPIED)},
        {"$set": fields},
        {"$merge": {"into": sessions, "on": "_id", "whenMatched": [replace], "whenNotMatched": "discard"}},
    ]


def fork_of(session_id: str, moment: datetime, branches: Iterable[Branch], expiry: Document) -> list[Document]:
    """Return the update that cuts a staged copy and makes it live.

    Args:
        session_id: The session it is copied from.
        moment: The current time.
        branches: The agents of the session.
        expiry: The fields `time_to_live` and `expires_at` of the fork; empty if it does not expire.
    """
    branches = list(branches)
    fields: Document = {
        "created_at": moment,
        "updated_at": moment,
        "guardrail_events": _events(branches),
        "copy_of": {"$literal": {"session_id": session_id, "at": moment}},
        "state": {"$ifNull": ["$copy_of.state", "$$REMOVE"]},  # an application can have a field of that name
        **expiry,
    }
    for branch in branches:
        fields |= {f"agents.{branch.agent['key']}.{name}": value for name, value in _cut(branch).items()}
    unset = ["state_until", *(f"agents.{branch.agent['key']}.stale_below" for branch in branches)]
    return [{"$set": fields}, {"$unset": unset}]


def _cut(branch: Branch) -> Document:
    if branch.cut_at is None:
        return {}
    messages = array_at(f"$agents.{branch.agent['key']}.messages")
    fields: Document = {
        "messages": {"$slice": [messages, branch.kept]} if branch.kept else [],
        "next_message_id": branch.next_id,
        "archived": branch.archived,
        "agent_data.conversation_manager_state": {"$literal": _state(branch)},
        "agent_data._internal_state": {"$literal": {}},
    }
    if usage := usable_numbers(branch.agent.get("usage")):
        cut = branch.cut_usage
        fields["usage"] = {"$literal": {name: max(0, total - cut.get(name, 0)) for name, total in usage.items()}}
    return fields


def _state(branch: Branch) -> Any:
    """Return the state of the conversation manager in which the fork shows what it should.

    A window is as long as it is now. A summary of what the fork holds is kept; one that tells more than the fork holds
    goes, and what it stood for is shown again.
    """
    cut_at = branch.cut_at or 0
    state = decode(branch.agent.get("state"))
    if type(state) is not dict:
        return branch.agent.get("state")
    removed = state.get("removed_message_count")
    if type(removed) is not int or removed <= 0:
        return encode(state, depth=_STATE_DEPTH, name="conversation_manager_state")
    if state.get("summary_message") is not None:
        changed = {} if removed < cut_at else {"summary_message": None, "removed_message_count": 0}
    else:
        shown = int(branch.agent["archived"]) + int(branch.agent["count"]) - removed
        changed = {"removed_message_count": min(removed, max(0, cut_at - max(shown, 1)))}
    return encode({**state, **changed}, depth=_STATE_DEPTH, name="conversation_manager_state")


def _events(branches: Iterable[Branch]) -> Any:
    """Return the expression for the guardrail events of messages that the fork takes."""
    gone = [
        {
            "$and": [
                {"$eq": ["$$this.agent_id", {"$literal": agent_id_of(branch.agent["key"])}]},
                {"$gte": ["$$this.message_id", branch.next_id]},
            ]
        }
        for branch in branches
        if branch.cut_at is not None
    ]
    events = {"$ifNull": ["$guardrail_events", []]}
    return {"$filter": {"input": events, "cond": {"$not": [{"$or": gone}]}}} if gone else events
