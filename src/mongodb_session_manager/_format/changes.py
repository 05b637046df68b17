"""The changes of the agents of a session, and the one update statement that stores them. Pure.

Changes are recorded in the order they happen. `fold` gathers the recorded changes into one `AgentWrite` per agent, and
`compile_update` turns the writes of all agents into one statement. When that statement matched nothing, `reconcile`
compares a write with the stored session and returns the part of it that is still to be stored.

A write is exact: it matches the `next_message_id` it was made for. So a message id is used once, by one writer, and a
writer that comes second changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple, Self, TypeAlias

from bson import ObjectId

from ..errors import AgentNotFoundError, MessageNotFoundError, SessionConflictError
from .attachment_refs import Reference
from .documents import Document, StoredMessage
from .expressions import array_at, stored_config_set
from .ids import agent_key, checked_id
from .retention import UNDATED, Dates
from .sizes import AGENT_FIELDS, stored_size

_PART_BYTES = 15 * 1024 * 1024
"""A statement may hold 16 MiB; the rest is for what is not a message."""


class Identity(NamedTuple):
    """Distinguishes stored messages with the same id: a version before 1.0 can have reused an id.

    Attributes:
        created_at: The stored value.
        tracking_id: The tracking id of the message, if it has one.
    """

    created_at: Any
    tracking_id: str | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """Return the identity of a stored message."""
        message = stored.get("message")
        tracking_id = message.get("tracking_id") if isinstance(message, Mapping) else None
        created_at = stored.get("created_at")
        return cls(
            created_at if isinstance(created_at, str | datetime) else None,
            tracking_id if isinstance(tracking_id, str) else None,
        )


@dataclass(frozen=True, slots=True)
class CreateAgent:
    """The agent is there, empty; one that exists already is left alone."""

    agent_id: str
    document: Document


@dataclass(frozen=True, slots=True)
class AppendMessage:
    """A message follows the others.

    `usage` is what it adds to the running totals of its agent. They are incremented by the statement that appends, so
    exactly as often. With `by_id` the caller has chosen the id: it must be greater than every stored id, and can be any
    id if no message is stored.
    """

    agent_id: str
    message: StoredMessage
    usage: Mapping[str, int] = field(default_factory=dict)
    by_id: bool = False


@dataclass(frozen=True, slots=True)
class ReplaceMessage:
    """A message has another content: merged, updated or redacted.

    `identity` is that of the message, if it is known. With `by_id`, the writer has not loaded the message: if several
    messages have its id, `identity` selects one of them.
    """

    agent_id: str
    message_id: int
    fields: Document
    identity: Identity | None = field(default=None, compare=False, repr=False)
    by_id: bool = False


@dataclass(frozen=True, slots=True)
class UpdateAgent:
    """Fields of `agent_data` have new values.

    `expected` is the `next_message_id` that the writer knows; `None` overwrites whatever is there.
    """

    agent_id: str
    expected: int | None
    fields: Document
    moment: datetime


@dataclass(frozen=True, slots=True)
class ObserveConfig:
    """The agent runs with this model or system prompt; what a user has set stays."""

    agent_id: str
    expected: int
    fields: Document


@dataclass(frozen=True, slots=True)
class AddGuardrailEvent:
    """A guardrail stepped in; `event` is an entry of the session's `guardrail_events`."""

    agent_id: str
    event: Document


@dataclass(frozen=True, slots=True)
class SetMessageFields:
    """Fields beside a message's content have new values, like its metrics."""

    agent_id: str
    message_id: int
    fields: Document
    identity: Identity | None = field(default=None, compare=False, repr=False)


Change: TypeAlias = (
    CreateAgent | AppendMessage | ReplaceMessage | UpdateAgent | ObserveConfig | AddGuardrailEvent | SetMessageFields
)


@dataclass(slots=True)
class MessageWrite:
    """The change of one message: a new message, or new fields of a stored one.

    Attributes:
        fields: The fields to store.
        recorded: A new message as it was first recorded, `None` for a stored one. If a statement whose acknowledgement
            was lost has stored the message, this identifies it.
        amended: The later changes of a new message, which that statement possibly did not contain.
        usage: What a new message adds to the running totals of its agent.
        known_as: The identity of a stored message, if it is known.
    """

    fields: Mapping[str, Any]
    recorded: StoredMessage | None = None
    amended: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, int] = field(default_factory=dict)
    known_as: Identity | None = None

    @property
    def identity(self) -> Identity | None:
        """The identity of the message, `None` if it is not known."""
        return self.known_as if self.recorded is None else Identity.of(self.recorded)

    def amend(self, fields: Mapping[str, Any]) -> None:
        """Change fields of a new message, or further ones of a stored message."""
        if self.recorded is None:
            self.fields = {**self.fields, **fields}
            return
        sets, unsets = split_fields(fields)
        self.fields = {name: value for name, value in self.fields.items() if name not in unsets} | sets
        self.amended = {**self.amended, **fields}


@dataclass
class AgentWrite:
    """All recorded changes of one agent, gathered.

    Attributes:
        agent_id: The agent.
        created: The sub-document of an agent that is created.
        messages: The changes of messages, by id, new messages in their order.
        by_id: Whether the writer has not loaded the messages, but refers to them by their ids.
        data: New fields of `agent_data`.
        config: Observed fields of `agent_data`: they are set unless a user has set them.
        events: New guardrail events.
        expected: The `next_message_id` that the writer knows, unless there are new messages.
        moment: The new `updated_at`; `None` leaves it.
        stored: The references to the attachments that were stored for the messages.
        dates: The expiry of their files.
        outdated: The references of archived messages whose content is replaced next.
        incarnation: The incarnation of the session.
    """

    agent_id: str
    created: Document | None = None
    messages: dict[int, MessageWrite] = field(default_factory=dict)
    by_id: bool = False
    data: Document = field(default_factory=dict)
    config: Document = field(default_factory=dict)
    events: list[Document] = field(default_factory=list)
    expected: int | None = None
    moment: datetime | None = None
    stored: list[Reference] = field(default_factory=list)
    dates: Dates = UNDATED
    outdated: list[str] = field(default_factory=list)
    incarnation: ObjectId | None = None

    def add(self, change: Change) -> None:
        """Add the change that happened next."""
        match change:
            case CreateAgent(document=document):
                self.created = document
                self._touch(document["updated_at"])
            case AppendMessage(message=message, usage=usage, by_id=by_id):
                self.by_id |= by_id
                self.messages[message["message_id"]] = MessageWrite(message, message, usage=usage)
                self._touch(message["updated_at"])
            case ReplaceMessage(message_id=message_id, fields=fields, identity=identity, by_id=by_id):
                self.set_fields(message_id, fields, identity)
                self.by_id |= by_id
                self._touch(fields["updated_at"])
            case SetMessageFields(message_id=message_id, fields=fields, identity=identity):
                self.set_fields(message_id, fields, identity)
            case UpdateAgent(expected=expected, fields=fields, moment=moment):
                self.data.update(fields)
                self.expected = expected
                self._touch(moment)
            case ObserveConfig(expected=expected, fields=fields):
                self.config.update(fields)
                self.expected = expected
            case AddGuardrailEvent(event=event):
                self.events.append(event)

    def _touch(self, moment: datetime) -> None:
        self.moment = moment if self.moment is None else max(self.moment, moment)

    def set_fields(self, message_id: int, fields: Mapping[str, Any], identity: Identity | None) -> None:
        """Change fields of a message, new or stored; `identity` is that of a stored one, if it is known."""
        message = self.messages.setdefault(message_id, MessageWrite({}))
        message.amend(fields)
        message.known_as = identity or message.known_as

    @property
    def appended(self) -> list[Mapping[str, Any]]:
        """The new messages, as they are to be stored."""
        return [message.fields for message in self.messages.values() if message.recorded is not None]

    @property
    def appended_size(self) -> int:
        """The size of the new messages in bytes of BSON."""
        return sum(map(stored_size, self.appended))

    @property
    def replaced(self) -> dict[int, Mapping[str, Any]]:
        """The new fields of stored messages, by id."""
        return {n: message.fields for n, message in self.messages.items() if message.recorded is None}

    @property
    def identities(self) -> dict[int, Identity]:
        """The known identities of stored messages, by id; a writer that has not loaded them knows none for certain."""
        known = {n: each.known_as for n, each in self.messages.items() if each.recorded is None and not self.by_id}
        return {n: identity for n, identity in known.items() if identity is not None}

    def contents(self) -> list[Mapping[str, Any]]:
        """Return the messages, and fields of messages, that are to be stored."""
        return [message.fields for message in self.messages.values()]

    def earlier_contents(self) -> list[Mapping[str, Any]]:
        """Return what may have been stored by a statement whose acknowledgement was lost."""
        new = [message for message in self.messages.values() if message.recorded is not None]
        return [fields for message in new for fields in (message.recorded or {}, message.amended)]

    def exchange(self, new: Callable[[Mapping[str, Any]], Any]) -> None:
        """Put `new(...)` in the place of each message and of the fields of each."""
        for message in self.messages.values():
            message.fields, message.amended = new(message.fields), new(message.amended)
            if message.recorded is not None:
                message.recorded = new(message.recorded)

    @property
    def increments(self) -> dict[str, int]:
        """What the new messages add to the agent's running totals."""
        totals: dict[str, int] = {}
        for message in self.messages.values():
            for name, amount in message.usage.items():
                totals[name] = totals.get(name, 0) + amount
        return totals

    @property
    def states(self) -> Document:
        """The pending fields of `agent_data`: the agent's state and configuration."""
        created = self.created["agent_data"] if self.created is not None else {}
        fields = {**created, **self.config, **self.data}
        return {name: fields[name] for name in AGENT_FIELDS if name in fields}

    @property
    def has_more_than_states(self) -> bool:
        """Whether the write stores anything else."""
        return bool(self.created or self.messages or self.events)

    def without_states(self, names: Iterable[str]) -> AgentWrite:
        """Return this write without some of the `states`."""
        left_out = set(names)

        def kept(fields: Mapping[str, Any]) -> Document:
            return {name: value for name, value in fields.items() if name not in left_out}

        created = None if self.created is None else {**self.created, "agent_data": kept(self.created["agent_data"])}
        return replace(self, created=created, data=kept(self.data), config=kept(self.config))

    def states_alone(self) -> AgentWrite:
        """Return the write that stores the `states` after everything else of this write is stored."""
        created = self.created["agent_data"] if self.created is not None else {}
        expected = self.expected
        if appended := self.appended:
            expected = appended[-1]["message_id"] + 1
        elif self.created is not None:
            expected = self.created["next_message_id"]
        return AgentWrite(
            self.agent_id,
            data={name: value for name, value in {**created, **self.data}.items() if name in AGENT_FIELDS},
            config=self.config,
            expected=expected,
            moment=self.moment,
            incarnation=self.incarnation,
        )

    @property
    def replaces_content(self) -> bool:
        """Whether stored messages get new content, so that their old attachments must be removed."""
        return any("attachments" in fields for fields in self.replaced.values())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send."""
        return not (self.created or self.messages or self.data or self.config or self.events or self.moment)

    @property
    def expected_id(self) -> int | None:
        """The `next_message_id` this write is for; `None` where only messages already stored change."""
        return next((n for n, message in self.messages.items() if message.recorded is not None), self.expected)


def split_fields(fields: Mapping[str, Any]) -> tuple[Document, Document]:
    """Return the fields of a message to set, and those to remove: `attachments`, if none are left."""
    unsets = {"attachments": ""} if fields.get("attachments") == [] else {}
    return {name: value for name, value in fields.items() if name not in unsets}, unsets


def fold(changes: Iterable[Change]) -> dict[str, AgentWrite]:
    """Gather changes, in the order they were recorded, into one write per agent."""
    writes: dict[str, AgentWrite] = {}
    for change in changes:
        agent_id = checked_id(change.agent_id, "agent_id")
        writes.setdefault(agent_id, AgentWrite(agent_id)).add(change)
    return writes


def in_parts(changes: Iterable[Change]) -> Iterator[list[Change]]:
    """Split changes, in order, into parts whose messages fit into one statement together; nearly always one."""
    part: list[Change] = []
    size = 0
    for change in changes:
        match change:
            case AppendMessage(message=content):
                added = stored_size(content)
            case ReplaceMessage(fields=fields):
                added = stored_size(fields)
            case _:
                added = 0
        if size and added and size + added > _PART_BYTES:
            yield part
            part, size = [], 0
        part.append(change)
        size += added
    if part:
        yield part


class Update(NamedTuple):
    """The arguments of one `update_one`."""

    filter: Document
    update: Document | list[Document]
    array_filters: list[Document] | None


@dataclass
class _Parts:
    """A statement in the making: what it does, before it is said in one of MongoDB's two languages."""

    sets: Document = field(default_factory=dict)
    unless_set: dict[str, tuple[Document, Any]] = field(default_factory=dict)
    increments: dict[str, int] = field(default_factory=dict)
    pushes: dict[str, list[Any]] = field(default_factory=dict)
    events: list[Document] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)
    replacements: dict[str, Mapping[int, Mapping[str, Any]]] = field(default_factory=dict)
    identities: dict[str, Mapping[int, Identity]] = field(default_factory=dict)


def compile_update(session_id: str, writes: Iterable[AgentWrite]) -> Update:
    """Return the one statement that makes all the writes true, or matches nothing."""
    condition: Document = {"_id": session_id}
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
        if write.incarnation is not None:
            condition["incarnation"] = write.incarnation
        if write.stored:
            dates.append(write.dates.may_be_added)
        if write.created is not None:
            condition[path] = None
            parts.sets[path] = _whole(write)
            continue
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
    if parts.unless_set or parts.outdated or replaces_content or parts.pushes.keys() & parts.replacements.keys():
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
    if appended := write.appended:
        parts.pushes[f"{path}.messages"] = appended
        parts.sets[f"{path}.next_message_id"] = appended[-1]["message_id"] + 1
    parts.sets |= {f"{path}.agent_data.{name}": value for name, value in write.data.items()}
    parts.unless_set |= {
        f"{path}.agent_data.{name}": (stored_config_set(f"${path}"), value) for name, value in write.config.items()
    }
    parts.increments |= {f"{path}.usage.{name}": amount for name, amount in write.increments.items()}
    if write.moment is not None:
        parts.sets[f"{path}.updated_at"] = write.moment


def _whole(write: AgentWrite) -> Document:
    """Return the sub-document of an agent that does not exist yet."""
    created, appended = write.created or {}, write.appended
    usage = {"usage": totals} if (totals := write.increments) else {}
    return {
        **created,
        **usage,
        "agent_data": {**created["agent_data"], **write.config, **write.data},
        "updated_at": write.moment or created["updated_at"],
        "next_message_id": appended[-1]["message_id"] + 1 if appended else 0,
        "messages": appended,
    }


def _operators(condition: Document, parts: _Parts) -> Update:
    array_filters: list[Document] = []
    sets = parts.sets
    unsets: Document = {}
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
    return stage


REMOVED = "removed_attachments"
"""The field of a session document or a bucket that lists the attachments of replaced messages, until they are removed.

A statement that replaces the content of a message moves the old references to this field of the same document. Before a
message in a bucket is replaced, the session document also lists its old references: opening a session reads that field,
but not the buckets.
"""


def attachments_of(messages: str, is_meant: Document) -> Document:
    """Return the expression for the attachments of the `messages` that a condition on `$$message` selects."""
    chosen = {"$filter": {"input": array_at(f"${messages}"), "as": "message", "cond": is_meant}}
    concatenated = {"$concatArrays": ["$$value", array_at("$$this.attachments")]}
    return {"$reduce": {"input": chosen, "initialValue": [], "in": concatenated}}


def with_removed(lists: Sequence[Document | list[str]]) -> Document:
    """Return the expression for `REMOVED` with further references; the field stays absent if there are none."""
    added = {"$concatArrays": [array_at(f"${REMOVED}"), "$$more"]}
    field = {"$cond": [{"$eq": ["$$more", []]}, f"${REMOVED}", added]}
    return {"$let": {"vars": {"more": {"$concatArrays": lists}}, "in": field}}


def without_removed(session_id: str, incarnation: ObjectId | None, references: list[str]) -> Update:
    """Return the statement that removes the references of removed files from a session's `REMOVED`."""
    left = {"$setDifference": [array_at(f"${REMOVED}"), references]}
    field = {"$let": {"vars": {"left": left}, "in": {"$cond": [{"$eq": ["$$left", []]}, "$$REMOVE", "$$left"]}}}
    return Update({"_id": session_id, "incarnation": incarnation}, [{"$set": {REMOVED: field}}], None)


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


@dataclass(frozen=True, slots=True)
class StoredView:
    """What has to be known of a stored agent to judge a write that matched nothing.

    Attributes:
        next_message_id: As stored.
        messages: By message id, those of `message`, `created_at` that tell a message from another.
    """

    next_message_id: int
    messages: Mapping[int, Mapping[str, Any]]


def reconcile(write: AgentWrite, stored: StoredView | None) -> AgentWrite | None:
    """Return what of `write` is still to be sent, `None` if all of it is stored already.

    Args:
        write: A write whose statement matched nothing.
        stored: The agent as it is stored, `None` if there is none.

    Raises:
        SessionConflictError: Somebody else wrote; nothing of the write is stored.
        AgentNotFoundError: There is no such agent, and the write would not create it.
        MessageNotFoundError: A message to be replaced is not there.
    """
    if stored is None:
        if write.created is not None:
            return write
        raise AgentNotFoundError(f"the session holds no agent {write.agent_id!r}")
    if missing := [message_id for message_id in write.replaced if message_id not in stored.messages]:
        raise MessageNotFoundError(f"agent {write.agent_id!r} holds no message {missing[0]}")

    new = [message for message in write.messages.values() if message.recorded is not None]
    written = list(itertools.takewhile(lambda message: _is_stored(message, stored), new))
    late = {
        message.fields["message_id"]: MessageWrite(message.amended, known_as=message.identity)
        for message in written
        if message.amended
    }
    replaced = {n: message for n, message in write.messages.items() if message.recorded is None} | late
    left = {message.fields["message_id"]: message for message in new[len(written) :]}
    rest = replace(write, created=None, messages=replaced | left)
    if written and not left:
        # All messages are stored, by a statement whose acknowledgement was lost. What else it said was stored with
        # them; saying it again is harmless as long as nobody has written since.
        rest.expected = written[-1].fields["message_id"] + 1
        if stored.next_message_id != rest.expected:
            rest = replace(rest, data={}, config={}, expected=None)
    elif rest.expected_id is not None and stored.next_message_id != rest.expected_id:
        is_longer = stored.next_message_id > rest.expected_id
        theirs = f"stored message {stored.next_message_id - 1}" if is_longer else "replaced the agent"
        raise SessionConflictError(
            f"agent {write.agent_id!r}: another writer {theirs} after this session was loaded, so the changes of this "
            "session were not stored; open it with a new manager and repeat the request"
        )
    return rest if rest.messages or rest.data or rest.config or rest.outdated else None


def _is_stored(message: MessageWrite, stored: StoredView) -> bool:
    """Return whether a message is stored: by its date and tracking id, or by its content if it has no tracking id."""
    ours = message.recorded
    theirs = None if ours is None else stored.messages.get(ours["message_id"])
    if ours is None or theirs is None:
        return False
    if ours["created_at"] != theirs.get("created_at"):  # the same message, sent twice by an application
        return False
    tracking_id = ours["message"].get("tracking_id")
    if tracking_id is not None:
        return bool(tracking_id == theirs["message"].get("tracking_id"))
    return bool(ours["message"] == theirs["message"])
