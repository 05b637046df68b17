"""Aggregation expressions for parts of a session document. Pure.

A path argument begins with `$`, or with `$$` for a variable. Stored values of the wrong type are read as empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .documents import RESTORED, Document
from .ids import NO_MESSAGE

ALL = 2**31 - 1
"""More elements than an array has."""


def array_at(path: str) -> Document:
    return {"$cond": [{"$isArray": [path]}, path, []]}


def number_at(path: str) -> Document:
    return {"$cond": [{"$in": [{"$type": path}, ["int", "long"]]}, path, 0]}


def is_object(path: str) -> Document:
    return {"$eq": [{"$type": path}, "object"]}


def _entries(path: str) -> Document:
    return {"$objectToArray": {"$cond": [is_object(path), path, {}]}}


def entries_at(path: str) -> Document:
    return {"$filter": {"input": _entries(path), "cond": is_object("$$this.v")}}


def size_at(message: str) -> Document:
    return {"$bsonSize": {"$cond": [is_object(message), message, {"m": message}]}}


MALFORMED_AGENTS: Document = {
    "$cond": [
        {"$in": [{"$type": "$agents"}, ["object", "missing", "null"]]},
        {"$filter": {"input": _entries("$agents"), "cond": {"$not": [is_object("$$this.v")]}}},
        [{"k": None, "v": "$agents"}],
    ]
}
"""The expression for the malformed values in `agents`; `k` is `null` if `agents` itself is malformed."""


def malformed_at(path: str, kind: str) -> Document:
    """Return the expression for a value of another type than `kind`, which is "object" or "array"."""
    return {"$cond": [{"$in": [{"$type": path}, [kind, "missing", "null"]]}, "$$REMOVE", path]}


def stored_removed(agent: str) -> Document:
    removed = number_at(f"{agent}.agent_data.conversation_manager_state.removed_message_count")
    return {"$max": [removed, 0]}


def is_view(agent: str) -> Document:
    """Return the expression for whether an agent has a view; a part of it can still be malformed."""
    view = f"{agent}.view"
    has_id: Document = {"$in": [{"$type": f"{view}.after"}, ["int", "long"]]}
    has_items: Document = {"$isArray": [f"{view}.items"]}
    conditions: list[Document] = [is_object(view), has_id, has_items]
    return {"$and": conditions}


def _before_view(agent: str) -> Document:
    """Return the expression for the number of messages in the head that precede the `after` of the view."""
    is_after = {"$gte": ["$$this.message_id", f"{agent}.view.after"]}
    are_after = {"$map": {"input": array_at(f"{agent}.messages"), "in": is_after}}
    count = {"$cond": [{"$lt": ["$$at", 0]}, {"$size": "$$are_after"}, "$$at"]}
    at = {"$let": {"vars": {"at": {"$indexOfArray": ["$$are_after", True]}}, "in": count}}
    return {"$let": {"vars": {"are_after": are_after}, "in": at}}


def to_restore(agent: str, *, with_view: bool = True) -> Document:
    """Return the expression for the messages in an agent's head that restoring needs.

    These are all but the `removed_messages`, or all if the stored count is greater than the number of messages. With a
    view, they are the messages that follow it.
    """
    return {"$slice": [array_at(f"{agent}.messages"), _left_out(agent, with_view), ALL]}


def ids_left_out(agent: str, *, with_view: bool = True) -> Document:
    """Return the expression for the ids of the messages in the head that `to_restore` leaves out.

    The other ids are read with their messages: in a result of at most 16 MiB there is no room for every id twice.
    """
    return ids_of({"$slice": [array_at(f"{agent}.messages"), _left_out(agent, with_view)]})


def _left_out(agent: str, with_view: bool) -> Document:
    removed = {"$subtract": [stored_removed(agent), number_at(f"{agent}.archived")]}
    count = {"$size": array_at(f"{agent}.messages")}
    without_view = {"$cond": [{"$gt": [removed, count]}, 0, {"$max": [removed, 0]}]}
    return {"$cond": [is_view(agent), _before_view(agent), without_view]} if with_view else without_view


def ids_of(messages: Any) -> Document:
    """Return the expression for the ids of `messages`, as `stored_id` returns them; any number is a valid id here."""
    stored: Document = {"$cond": [{"$isNumber": "$$this.message_id"}, "$$this.message_id", None]}
    stored = {"$cond": [is_object("$$this"), stored, NO_MESSAGE]}
    return {"$map": {"input": messages, "in": stored}}


def with_ids(messages: str, ids: Sequence[int]) -> Document:
    """Return the expression for `messages` with these ids; elements that are not messages are kept."""
    message = {"$arrayElemAt": [messages, "$$at"]}
    merged = {"$mergeObjects": [message, {"message_id": {"$arrayElemAt": [{"$literal": list(ids)}, "$$at"]}}]}
    numbered = {"$cond": [{"$eq": [{"$type": message}, "object"]}, merged, message]}
    return {"$map": {"input": {"$range": [0, len(ids)]}, "as": "at", "in": numbered}}


def restored(message: str) -> Document:
    fields = {name: f"{message}.{name}" for name in RESTORED}
    return {"$cond": [is_object(message), fields, NO_MESSAGE]}


def stored_config_set(agent: str) -> Document:
    return {"$setUnion": [array_at(f"{agent}.config_set"), array_at(f"{agent}.agent_data.config_set")]}
