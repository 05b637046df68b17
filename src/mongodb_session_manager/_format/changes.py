"""The recorded changes of the agents of a session. Pure.

Changes are recorded in the order they happen. `fold` gathers the recorded changes into one `AgentWrite` per agent;
`statements` turns the writes of all agents into one statement. When that statement matched nothing, `comparison`
compares a write with the stored session and returns the part of it that is still to be stored.

A write is exact: it matches the `next_message_id` it was made for. So a message id is used once, by one writer, and a
writer that comes second changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple, Self, TypeAlias

from bson import ObjectId

from .attachment_refs import Reference
from .content import all_block_ids
from .documents import Document, StoredMessage
from .ids import checked_id
from .retention import UNDATED, Dates
from .sizes import AGENT_FIELDS, stored_size
from .view import replaced_in

_PART_BYTES = 15 * 1024 * 1024
"""The maximum number of bytes of messages in one statement. MongoDB allows 16 MiB; the rest is for other fields."""


class Identity(NamedTuple):
    """Distinguishes stored messages with the same id: a version before 1.0 might have reused an id.

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


class Loaded(NamedTuple):
    """An agent as its writer has loaded it.

    Attributes:
        rewound: The id of its last rewind, `None` without one. A rewind uses message ids again, so `next_message_id`
            alone does not show that the writer is outdated.
    """

    rewound: ObjectId | None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """Return the agent in its stored form as a writer loads it."""
        rewound = stored.get("rewound")
        return cls(rewound if isinstance(rewound, ObjectId) else None)


class CreateAgent(NamedTuple):
    """An agent without messages is created; an existing agent stays unchanged."""

    agent_id: str
    document: Document


@dataclass(frozen=True, slots=True)
class AppendMessage:
    """A message is appended.

    Attributes:
        agent_id: The agent.
        message: The message.
        usage: Its part of the running totals of the agent. The statement that appends increments them, so each message
            counts exactly once.
        by_id: Whether the caller has chosen the id. It must be greater than every stored id, and can be any id if no
            message is stored.
        size: The size of the message in bytes, without its attachments; `None` if it was not measured.
    """

    agent_id: str
    message: StoredMessage
    usage: Mapping[str, int] = field(default_factory=dict)
    by_id: bool = False
    size: int | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ReplaceMessage:
    """The content of a message is replaced: merged, updated or redacted.

    Attributes:
        agent_id: The agent.
        message_id: The message.
        fields: The new fields.
        identity: The identity of the message, if it is known.
        by_id: Whether the writer has not loaded the message. If several messages have its id, `identity` selects one.
        size: The size of the fields in bytes, without attachments; `None` if it was not measured.
    """

    agent_id: str
    message_id: int
    fields: Document
    identity: Identity | None = field(default=None, compare=False, repr=False)
    by_id: bool = False
    size: int | None = field(default=None, compare=False, repr=False)


class UpdateAgent(NamedTuple):
    """Fields of `agent_data` get new values.

    `expected` is the `next_message_id` that the writer knows; `None` overwrites the fields without a check.
    """

    agent_id: str
    expected: int | None
    fields: Document
    moment: datetime


class StoreView(NamedTuple):
    """The live messages of an agent are not the stored ones in their order.

    Attributes:
        agent_id: The agent.
        expected: The `next_message_id` that the writer knows.
        view: The view, see `view`; an empty one is removed.
        archive_revision: The agent's `archive_revision` when the writer read it.
        moment: The time of the change.
    """

    agent_id: str
    expected: int
    view: Document
    archive_revision: int
    moment: datetime


class ObserveConfig(NamedTuple):
    """The agent runs with this model or system prompt; values that a user has set stay."""

    agent_id: str
    expected: int
    fields: Document


class AddGuardrailEvent(NamedTuple):
    """A guardrail has intervened; `event` is an entry of the session's `guardrail_events`."""

    agent_id: str
    event: Document


@dataclass(frozen=True, slots=True)
class SetMessageFields:
    """Fields of a message other than its content, such as its metrics, get new values."""

    agent_id: str
    message_id: int
    fields: Document
    identity: Identity | None = field(default=None, compare=False, repr=False)


Change: TypeAlias = (
    CreateAgent
    | AppendMessage
    | ReplaceMessage
    | UpdateAgent
    | StoreView
    | ObserveConfig
    | AddGuardrailEvent
    | SetMessageFields
)


@dataclass(slots=True)
class MessageWrite:
    """The change of one message: a new message, or new fields of a stored one.

    Attributes:
        fields: The fields to store.
        recorded: A new message as first recorded, `None` for a stored one. If a statement whose acknowledgement
            was lost has stored the message, this identifies it.
        amended: The later changes of a new message, which that statement possibly did not contain.
        usage: The part of a new message in the running totals of its agent.
        known_as: The identity of a stored message, if it is known.
        size: The size of a new message in bytes.
    """

    fields: Mapping[str, Any]
    recorded: StoredMessage | None = None
    amended: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, int] = field(default_factory=dict)
    known_as: Identity | None = None
    size: int = 0

    @property
    def identity(self) -> Identity | None:
        """The identity of the message, `None` if it is not known."""
        return self.known_as if self.recorded is None else Identity.of(self.recorded)

    @property
    def redacts(self) -> bool:
        """Whether the message is redacted."""
        return self.fields.get("redact_message") is not None

    def amend(self, fields: Mapping[str, Any]) -> None:
        """Change fields of a new message, or further ones of a stored message."""
        if self.recorded is None:
            self.fields = {**self.fields, **fields}
            return
        sets, unsets = split_fields(fields)
        if "message" not in fields:
            former = {name: self.fields[name] for name in sets if name in self.fields}
            self.size += stored_size(sets) - stored_size(former)
        self.fields = {name: value for name, value in self.fields.items() if name not in unsets} | sets
        self.amended = {**self.amended, **fields}


@dataclass
class AgentWrite:
    """All recorded changes of one agent.

    Attributes:
        agent_id: The agent.
        created: The sub-document of an agent that is created.
        messages: The changes of messages, by id, new messages in their order.
        by_id: Whether the writer has not loaded the messages, but refers to them by their ids.
        data: New fields of `agent_data`.
        config: Observed fields of `agent_data`: they are set unless a user has set them.
        view: The new view. `{}` removes the stored view; `None` does not change it.
        archive_revision: The `archive_revision` of the agent that the view was made for.
        events: New guardrail events.
        expected: The `next_message_id` that the writer knows, unless there are new messages.
        moment: The new `updated_at`; `None` does not change it.
        attached: The references to the attachments that were stored for the messages.
        dates: The expiry of their files.
        outdated: The references of archived messages whose content is replaced next.
        redacted: The content ids of archived messages that the next write redacts, see `content`.
        incarnation: The incarnation of the session.
        loaded: The agent as the writer has loaded it; `None` for a writer that has not loaded it.
    """

    agent_id: str
    created: Document | None = None
    messages: dict[int, MessageWrite] = field(default_factory=dict)
    by_id: bool = False
    data: Document = field(default_factory=dict)
    config: Document = field(default_factory=dict)
    view: Document | None = None
    archive_revision: int = 0
    events: list[Document] = field(default_factory=list)
    expected: int | None = None
    moment: datetime | None = None
    attached: list[Reference] = field(default_factory=list)
    dates: Dates = UNDATED
    outdated: list[str] = field(default_factory=list)
    redacted: list[str] = field(default_factory=list)
    incarnation: ObjectId | None = None
    loaded: Loaded | None = None

    def add(self, change: Change) -> None:
        """Add the next change."""
        match change:
            case CreateAgent(document=document):
                self.created = document
                self._touch(document["updated_at"])
            case AppendMessage(message=message, usage=usage, by_id=by_id):
                self.by_id |= by_id
                size = size_of_change(change)
                self.messages[message["message_id"]] = MessageWrite(message, message, usage=usage, size=size)
                self._touch(message["updated_at"])
            case ReplaceMessage(message_id=message_id, fields=fields, identity=identity, by_id=by_id):
                self.set_fields(message_id, fields, identity)
                self.messages[message_id].size = size_of_change(change)
                self.by_id |= by_id
                if self.view:
                    self.view = replaced_in(self.view, {message_id})
                self._touch(fields["updated_at"])
            case SetMessageFields(message_id=message_id, fields=fields, identity=identity):
                self.set_fields(message_id, fields, identity)
            case UpdateAgent(expected=expected, fields=fields, moment=moment):
                self.data.update(fields)
                self.expected = expected
                self._touch(moment)
            case StoreView(expected=expected, view=view, archive_revision=revision, moment=moment):
                self.view, self.archive_revision = view, revision
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
        """The new messages in the form to be stored."""
        return [message.fields for message in self.messages.values() if message.recorded is not None]

    @property
    def appended_size(self) -> int:
        """The size of the new messages in bytes, at least."""
        return sum(message.size for message in self.messages.values() if message.recorded is not None)

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
        """Return the messages, and fields of messages, to store."""
        return [message.fields for message in self.messages.values()]

    def earlier_contents(self) -> list[Mapping[str, Any]]:
        """Return the fields that a statement whose acknowledgement was lost might have stored."""
        new = [message for message in self.messages.values() if message.recorded is not None]
        return [fields for message in new for fields in (message.recorded or {}, message.amended)]

    def exchange(self, new: Callable[[Mapping[str, Any]], Any]) -> None:
        """Replace the fields of each message with `new(fields)`."""
        for message in self.messages.values():
            message.fields, message.amended = new(message.fields), new(message.amended)
            if message.recorded is not None:
                message.recorded = new(message.recorded)

    @property
    def increments(self) -> dict[str, int]:
        """The increments of the agent's running totals for the new messages."""
        totals: dict[str, int] = {}
        for message in self.messages.values():
            for name, amount in message.usage.items():
                totals[name] = totals.get(name, 0) + amount
        return totals

    @property
    def states(self) -> Document:
        """The pending fields of `agent_data`, which are the agent's state and configuration, and its view."""
        created = self.created["agent_data"] if self.created is not None else {}
        fields = {**created, **self.config, **self.data}
        view = {"view": self.view} if self.view else {}
        return {name: fields[name] for name in AGENT_FIELDS if name in fields} | view

    @property
    def has_more_than_states(self) -> bool:
        """Whether the write stores more than the `states`."""
        return bool(self.created or self.messages or self.events)

    def without_states(self, names: Iterable[str]) -> AgentWrite:
        """Return this write without some of the `states`."""
        left_out = set(names)

        def kept(fields: Mapping[str, Any]) -> Document:
            return {name: value for name, value in fields.items() if name not in left_out}

        created = None if self.created is None else {**self.created, "agent_data": kept(self.created["agent_data"])}
        view = None if self.view and "view" in left_out else self.view
        return replace(self, created=created, data=kept(self.data), config=kept(self.config), view=view)

    def states_alone(self) -> AgentWrite:
        """Return the write that stores the `states` after the rest of this write."""
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
            view=self.view,
            archive_revision=self.archive_revision,
            expected=expected,
            moment=self.moment,
            incarnation=self.incarnation,
            loaded=self.loaded,
        )

    @property
    def replaces_content(self) -> bool:
        """Whether stored messages get new content, so that their old attachments must be removed."""
        return any("attachments" in fields for fields in self.replaced.values())

    @property
    def redacts(self) -> bool:
        """Whether messages are redacted, so that their content must be removed from the session's storage."""
        return bool(self.redacted) or any(message.redacts for message in self.messages.values())

    @property
    def redacted_ids(self) -> list[str]:
        """The ids of the content of redacted messages that the session document does not hold."""
        new = [each.recorded for each in self.messages.values() if each.recorded is not None and each.redacts]
        return sorted({*self.redacted, *all_block_ids(new)})

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send."""
        has_fields = self.data or self.config or self.view is not None
        return not (self.created or self.messages or has_fields or self.events or self.moment)

    @property
    def expected_id(self) -> int | None:
        """The `next_message_id` that this write must match; `None` if it only changes stored messages."""
        return next((n for n, message in self.messages.items() if message.recorded is not None), self.expected)


def split_fields(fields: Mapping[str, Any]) -> tuple[Document, Document]:
    """Return the fields of a message to set, and those to remove: an empty list of `attachments`."""
    unsets = {"attachments": ""} if fields.get("attachments") == [] else {}
    return {name: value for name, value in fields.items() if name not in unsets}, unsets


def fold(changes: Iterable[Change]) -> dict[str, AgentWrite]:
    """Gather changes, in the order they were recorded, into one write per agent."""
    writes: dict[str, AgentWrite] = {}
    for change in changes:
        agent_id = checked_id(change.agent_id, "agent_id")
        writes.setdefault(agent_id, AgentWrite(agent_id)).add(change)
    return writes


def size_of_change(change: Change) -> int:
    """Return the size of the message of a change in bytes; 0 for a change without content."""
    match change:
        case AppendMessage(message=content) | ReplaceMessage(fields=content):
            return stored_size(content) if change.size is None else change.size
        case _:
            return 0


def in_parts(changes: Iterable[Change]) -> Iterator[list[Change]]:
    """Split changes, in order, into parts whose messages fit into one statement; usually one part."""
    part: list[Change] = []
    size = 0
    for change in changes:
        added = size_of_change(change)
        if size and added and size + added > _PART_BYTES:
            yield part
            part, size = [], 0
        part.append(change)
        size += added
    if part:
        yield part
