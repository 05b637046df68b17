"""What a fork takes of its session, and the aggregation that makes its document. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ._buckets import head_numbers
from ._codec import decode, encode
from ._documents import (
    MESSAGE_USAGE,
    ODD_AGENTS,
    USAGE,
    Document,
    agent_id_of,
    array_at,
    checked_id,
    checked_message_id,
    entries_at,
    odd_at,
    usable_numbers,
)
from ._untrusted import LEFT_BEHIND
from .errors import AgentNotFoundError, InvalidArgumentError

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
    has_attachments = {"$gt": [{"$size": array_at("$$this.attachments")}, 0]}
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
        "with_attachments": {"$filter": {"input": messages, "cond": has_attachments}},
        "state": f"{agent}.agent_data.conversation_manager_state",
        "usage": f"{agent}.usage",
        "odd_messages": odd_at(f"{agent}.messages", "array"),
        "agent_data": odd_at(f"{agent}.agent_data", "object"),
        "cut_usage": {"$let": {"vars": {"later": later}, "in": usage_of("$$later")}},
    }
    entries = entries_at("$agents")
    return {
        "attachments_generation": 1,
        "session_ttl": 1,
        "odd_agents": ODD_AGENTS,
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
    """An agent of the session and what the fork takes of it.

    Attributes:
        agent: What `facts` has brought of it.
        cut_at: The position of the first message the fork does not take; `None` if it takes all.
        next_id: The id that follows the last one it takes.
        cut_usage: What those it does not take have added to the totals.
        replaced: Messages of the head with attachments, as the fork refers to them, by position within the head.
    """

    agent: Document
    cut_at: int | None
    next_id: int
    cut_usage: Document
    replaced: dict[int, Document]

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


def unchanged(session_id: str, document: Mapping[str, Any]) -> Document:
    """Return the filter that matches as long as `facts` of a session are what they were."""
    condition: Document = {"_id": session_id}
    for head in document["heads"]:
        path = f"agents.{head['key']}"
        condition[f"{path}.created_at"] = head.get("created_at")
        condition[f"{path}.next_message_id"] = head["next_message_id"]
        condition |= {f"{path}.{name}": head[name] or {"$in": [None, 0]} for name in ("archived", "revision")}
    condition["attachments_generation"] = document.get("attachments_generation")
    agents = {"$size": entries_at("$agents")}
    condition["$expr"] = {"$eq": [agents, len(document["heads"])]}
    return condition


def document_of(session_id: str, moment: Any, own: Document, branches: Iterable[Branch]) -> list[Document]:
    """Return the stages that make the document of the fork out of that of its session.

    Args:
        session_id: The fork.
        moment: When it is made.
        own: Expressions for further fields that it has of its own.
        branches: Its agents.
    """
    branches = list(branches)
    fields: Document = {
        "session_id": {"$literal": session_id},
        "created_at": moment,
        "updated_at": moment,
        "feedbacks": [],
        "guardrail_events": _events(branches),
        **own,
    }
    for branch in branches:
        fields |= {f"agents.{branch.agent['key']}.{name}": value for name, value in _agent(branch, moment).items()}
    left_behind = sorted(LEFT_BEHIND - {"_id", "session_id", "agents"})
    return [{"$unset": left_behind}, {"$set": fields}, {"$set": {"_id": {"$literal": session_id}}}]


def _agent(branch: Branch, moment: Any) -> Document:
    path = f"$agents.{branch.agent['key']}"
    messages: Any = {"$slice": [array_at(f"{path}.messages"), branch.kept]} if branch.kept else []
    if branch.replaced and branch.kept:
        cases = [
            {"case": {"$eq": ["$$at", at]}, "then": {"$literal": message}} for at, message in branch.replaced.items()
        ]
        one = {"$arrayElemAt": [f"{path}.messages", "$$at"]}
        chosen = {"$switch": {"branches": cases, "default": one}}
        messages = {"$map": {"input": {"$range": [0, branch.kept]}, "as": "at", "in": chosen}}
    fields: Document = {
        "created_at": moment,
        "agent_data.created_at": {"$ifNull": [f"{path}.agent_data.created_at", f"{path}.created_at"]},
        "messages": messages,
    }
    if branch.cut_at is None:
        return fields
    fields |= {"next_message_id": branch.next_id, "archived": branch.archived}
    fields |= {
        f"agent_data.{name}": {"$literal": value}
        for name, value in (
            ("conversation_manager_state", _state(branch)),
            ("_internal_state", {}),
        )
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
