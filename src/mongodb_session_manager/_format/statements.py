"""The one update statement that stores the writes of all agents of a session. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bson import ObjectId

from .changes import AgentWrite, Identity, split_fields
from .content import REMOVED_CONTENT, block_ids, with_removed_content
from .documents import Document
from .expressions import array_at, stored_config_set
from .ids import agent_key
from .labels import guard
from .view import guarded_view, shows_content, view_without


class Update(NamedTuple):
    """The arguments of one `update_one`."""

    filter: Document
    update: Document | list[Document]
    array_filters: list[Document] | None


NOT_REWOUND: Document = {"$not": {"$type": "objectId"}}
"""The condition for the field `rewound` of an agent that was never rewound."""


@dataclass
class _Parts:
    """The parts of a statement, before they are expressed as update operators or as an aggregation pipeline."""

    sets: Document = field(default_factory=dict)
    unless_set: dict[str, tuple[Document, Any]] = field(default_factory=dict)
    increments: dict[str, int] = field(default_factory=dict)
    pushes: dict[str, list[Any]] = field(default_factory=dict)
    events: list[Document] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)
    redacted: list[Document | list[str]] = field(default_factory=list)
    views: dict[str, Document] = field(default_factory=dict)
    removed_views: list[str] = field(default_factory=list)
    replacements: dict[str, Mapping[int, Mapping[str, Any]]] = field(default_factory=dict)
    identities: dict[str, Mapping[int, Identity]] = field(default_factory=dict)


def compile_update(session_id: str, writes: Iterable[AgentWrite], owner: str | None = None) -> Update:
    """Return the one statement that stores all the writes, or matches nothing."""
    condition: Document = {"_id": session_id, **guard(owner)}
    parts = _Parts()
    moments = []
    dates: list[Document] = []
    unique: list[Document] = []
    for write in writes:
        path = f"agents.{agent_key(write.agent_id)}"
        if write.moment is not None:
            moments.append(write.moment)
        parts.events += write.events
        parts.outdated += write.outdated
        if redacted := write.redacted_ids:
            parts.redacted.append(redacted)
        if write.incarnation is not None:
            condition["incarnation"] = write.incarnation
        if write.attached:
            dates.append(write.dates.may_be_added)
        if write.created is not None:
            condition[path] = None
            parts.sets[path] = _whole(write)
            continue
        if write.loaded is not None:
            condition[f"{path}.rewound"] = write.loaded.rewound or NOT_REWOUND
        if write.by_id and (appended := write.appended):
            condition |= _may_follow(path, appended[0]["message_id"])
        elif (expected := write.expected_id) is not None:
            condition[f"{path}.next_message_id"] = expected
        elif write.data:
            condition[path] = {"$exists": True}
        known = _known(write)
        if others := sorted(write.replaced.keys() - known.keys()):
            condition[f"{path}.messages.message_id"] = {"$all": others}
            if write.by_id:
                unique += [_is_unique(path, message_id) for message_id in others]
        if known:
            condition[f"{path}.messages"] = {
                "$all": [{"$elemMatch": known[message_id]} for message_id in sorted(known)]
            }
        _add(write, path, parts)
    if unique:
        condition["$expr"] = {"$and": unique}
    if dates:
        condition["$and"] = dates
    if moments:
        parts.sets["updated_at"] = max(moments)
    replaces_content = any("attachments" in fields for each in parts.replacements.values() for fields in each.values())
    needs_values = parts.unless_set or parts.outdated or parts.redacted or parts.views or replaces_content
    if needs_values or parts.pushes.keys() & parts.replacements.keys():
        return Update(condition, [{"$set": _pipeline(parts)}], None)
    return _operators(condition, parts)


def _known(write: AgentWrite) -> dict[int, Document]:
    """Return, by id, the filters of the replaced messages whose identity is known."""
    return {
        message_id: {"message_id": message_id, "created_at": identity.created_at}
        for message_id, identity in write.identities.items()
        if identity.created_at is not None
    }


def _may_follow(path: str, message_id: int) -> Document:
    """Return the condition for appending a message with this id: it is the next one, or the agent's first one."""
    is_next = {f"{path}.next_message_id": message_id, f"{path}.messages.message_id": {"$not": {"$gte": message_id}}}
    is_first = {f"{path}.messages": {"$in": [None, []]}, f"{path}.archived": {"$in": [None, 0]}}
    return {path: {"$exists": True}, "$or": [is_next, is_first]}


def _is_unique(path: str, message_id: int) -> Document:
    ids = {"$ifNull": [f"${path}.messages.message_id", []]}
    return {"$eq": [{"$size": {"$filter": {"input": ids, "cond": {"$eq": ["$$this", message_id]}}}}, 1]}


def _add(write: AgentWrite, path: str, parts: _Parts) -> None:
    if replaced := write.replaced:
        parts.replacements[f"{path}.messages"] = replaced
        parts.identities[f"{path}.messages"] = write.identities
        parts.increments[f"{path}.revision"] = 1
        for message_id in [n for n, message in write.messages.items() if n in replaced and message.redacts]:
            meant = _chosen(f"{path}.messages", is_meant(message_id, write.identities.get(message_id)))
            parts.redacted.append(block_ids(meant))
    if appended := write.appended:
        parts.pushes[f"{path}.messages"] = appended
        parts.sets[f"{path}.next_message_id"] = appended[-1]["message_id"] + 1
    parts.sets |= {f"{path}.agent_data.{name}": value for name, value in write.data.items()}
    parts.unless_set |= {
        f"{path}.agent_data.{name}": (stored_config_set(f"${path}"), value) for name, value in write.config.items()
    }
    _add_view(write, path, parts)
    parts.increments |= {f"{path}.usage.{name}": amount for name, amount in write.increments.items()}
    if write.moment is not None:
        parts.sets[f"{path}.updated_at"] = write.moment


def _add_view(write: AgentWrite, path: str, parts: _Parts) -> None:
    """Store or remove the view; if a message is replaced, remove its old content from the stored view."""
    if write.view and shows_content(write.view):
        new = write.messages.keys()
        parts.views[f"{path}.view"] = guarded_view(f"${path}", write.view, new, write.archive_revision)
    elif write.view:
        parts.sets[f"{path}.view"] = write.view
    elif write.view is not None:
        parts.removed_views.append(f"{path}.view")
    elif replaced := [n for n, fields in write.replaced.items() if "attachments" in fields]:
        parts.views[f"{path}.view"] = view_without(f"${path}", replaced)


def _whole(write: AgentWrite) -> Document:
    """Return the sub-document of an agent that does not exist yet."""
    created, appended = write.created or {}, write.appended
    usage = {"usage": totals} if (totals := write.increments) else {}
    view = {"view": write.view} if write.view else {}
    return {
        **created,
        **usage,
        **view,
        "agent_data": {**created["agent_data"], **write.config, **write.data},
        "updated_at": write.moment or created["updated_at"],
        "next_message_id": appended[-1]["message_id"] + 1 if appended else 0,
        "messages": appended,
    }


def _operators(condition: Document, parts: _Parts) -> Update:
    array_filters: list[Document] = []
    sets = parts.sets
    unsets: Document = dict.fromkeys(parts.removed_views, "")
    for path, messages in parts.replacements.items():
        for message_id, fields in messages.items():
            name = f"m{len(array_filters)}"
            array_filters.append({f"{name}.message_id": message_id})
            identity = parts.identities[path].get(message_id)
            if identity is not None and identity.created_at is not None:
                array_filters[-1][f"{name}.created_at"] = identity.created_at
            kept, removed = split_fields(fields)
            sets |= {f"{path}.$[{name}].{key}": value for key, value in kept.items()}
            unsets |= {f"{path}.$[{name}].{key}": value for key, value in removed.items()}
    pushes = {path: {"$each": values} for path, values in parts.pushes.items()}
    # An event is added at most once, however often the statement is sent.
    events = {"guardrail_events": {"$each": parts.events}} if parts.events else {}
    operators = {"$set": sets, "$unset": unsets, "$push": pushes, "$inc": parts.increments, "$addToSet": events}
    used = {name: fields for name, fields in operators.items() if fields}
    return Update(condition, used, array_filters or None)


def _pipeline(parts: _Parts) -> Document:
    """Return the update as an aggregation pipeline.

    The operators cannot both push to an array and change its elements, nor set a field depending on another one.
    """
    stage: Document = {path: {"$literal": value} for path, value in parts.sets.items()}
    stage |= {**parts.views, **dict.fromkeys(parts.removed_views, "$$REMOVE")}
    for path, (already_set, value) in parts.unless_set.items():
        is_set = {"$in": [path.rpartition(".")[2], already_set]}
        stage[path] = {"$cond": [is_set, f"${path}", {"$literal": value}]}
    for path, amount in parts.increments.items():
        stage[path] = {"$add": [{"$ifNull": [f"${path}", 0]}, amount]}
    for path in parts.pushes.keys() | parts.replacements.keys():
        branches = [
            {"case": is_meant(message_id, parts.identities[path].get(message_id)), "then": replaced_message(fields)}
            for message_id, fields in parts.replacements.get(path, {}).items()
        ]
        kept: Any = {"$ifNull": [f"${path}", []]}
        if branches:
            replaced = {"$switch": {"branches": branches, "default": "$$message"}}
            kept = {"$map": {"input": kept, "as": "message", "in": replaced}}
        stage[path] = {"$concatArrays": [kept, {"$literal": parts.pushes.get(path, [])}]}
    if parts.events:
        known = {"$ifNull": ["$guardrail_events", []]}
        added = {"$filter": {"input": {"$literal": parts.events}, "cond": {"$not": {"$in": ["$$this", known]}}}}
        stage["guardrail_events"] = {"$concatArrays": [known, added]}
    removed: list[Document | list[str]] = [parts.outdated] if parts.outdated else []
    removed += [
        attachments_of(path, is_meant(message_id, parts.identities[path].get(message_id)))
        for path, messages in parts.replacements.items()
        for message_id, fields in messages.items()
        if "attachments" in fields
    ]
    if removed:
        stage[REMOVED] = with_removed(removed)
    if parts.redacted:
        stage[REMOVED_CONTENT] = with_removed_content(parts.redacted)
    return stage


REMOVED = "removed_attachments"
"""The field of a session document or a bucket that lists the attachments of replaced messages, until they are removed.

A statement that replaces the content of a message moves the old references to this field of the same document. Before a
message in a bucket is replaced, the session document also lists its old references: opening a session reads that field,
but not the buckets.
"""


def attachments_of(messages: str, is_meant: Document) -> Document:
    """Return the expression for the attachments of the `messages` that a condition on `$$message` selects."""
    concatenated = {"$concatArrays": ["$$value", array_at("$$this.attachments")]}
    return {"$reduce": {"input": _chosen(messages, is_meant), "initialValue": [], "in": concatenated}}


def _chosen(messages: str, is_meant: Document) -> Document:
    return {"$filter": {"input": array_at(f"${messages}"), "as": "message", "cond": is_meant}}


def with_removed(lists: Sequence[Document | list[str]]) -> Document:
    """Return the expression for `REMOVED` with further references; the field stays absent if there are none."""
    added = {"$concatArrays": [array_at(f"${REMOVED}"), "$$more"]}
    field = {"$cond": [{"$eq": ["$$more", []]}, f"${REMOVED}", added]}
    return {"$let": {"vars": {"more": {"$concatArrays": lists}}, "in": field}}


def without_removed(session_id: str, incarnation: ObjectId | None, references: list[str]) -> Update:
    """Return the statement that removes the references of removed files from a session's `REMOVED`."""
    condition = {"_id": session_id, "incarnation": incarnation}
    return Update(condition, [{"$set": {REMOVED: removed_without(references)}}], None)


def removed_without(references: list[str]) -> Document:
    """Return the expression for `REMOVED` without the references of removed files."""
    left = {"$setDifference": [array_at(f"${REMOVED}"), references]}
    return {"$let": {"vars": {"left": left}, "in": {"$cond": [{"$eq": ["$$left", []]}, "$$REMOVE", "$$left"]}}}


def is_meant(message_id: int, identity: Identity | None) -> Document:
    """Return the condition on `$$message` that selects a message."""
    has_id: Document = {"$eq": ["$$message.message_id", message_id]}
    if identity is None or identity.created_at is None:
        return has_id
    return {"$and": [has_id, {"$eq": ["$$message.created_at", {"$literal": identity.created_at}]}]}


def replaced_message(fields: Mapping[str, Any]) -> Document:
    """Return the expression for `$$message` with other fields."""
    sets, unsets = split_fields(fields)
    message: Any = "$$message"
    if unsets:  # MongoDB 4.4 and the Stable API do not have $unsetField
        others = {"$not": {"$in": ["$$this.k", list(unsets)]}}
        message = {"$arrayToObject": {"$filter": {"input": {"$objectToArray": message}, "cond": others}}}
    return {"$mergeObjects": [message, {key: {"$literal": value} for key, value in sets.items()}]}
