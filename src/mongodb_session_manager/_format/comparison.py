"""Comparing a write whose statement matched nothing with the stored session. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

from ..errors import AgentNotFoundError, MessageNotFoundError, SessionConflictError
from .changes import AgentWrite, Identity, Loaded, MessageWrite
from .dates import as_date
from .documents import Document
from .ids import is_message_id


class StoredView(NamedTuple):
    """The facts of a stored agent that a write is compared with.

    Attributes:
        next_message_id: The stored `next_message_id`.
        messages: `message` and `created_at` of the messages that the write refers to, by id.
        loaded: The agent as a writer would load it now.
    """

    next_message_id: int
    messages: Mapping[int, Mapping[str, Any]]
    loaded: Loaded | None = None

    @classmethod
    def of(cls, agent: Mapping[str, Any], messages: Mapping[int, Mapping[str, Any]]) -> Self:
        """Return the facts of an agent in its stored form."""
        return cls(agent["next_message_id"], messages, Loaded.of(agent))


def reconcile(write: AgentWrite, stored: StoredView | None) -> AgentWrite | None:
    """Return the part of a write that is not stored yet, or `None` if all of it is stored.

    Args:
        write: A write whose statement matched nothing.
        stored: The stored agent, `None` if there is none.

    Raises:
        SessionConflictError: Another writer has written, or the agent was rewound; nothing of the write is stored.
        AgentNotFoundError: The agent does not exist, and the write does not create it.
        MessageNotFoundError: A message to replace does not exist.
    """
    if stored is None:
        if write.created is not None:
            return write
        raise AgentNotFoundError(f"the session has no agent {write.agent_id!r}")
    if write.loaded is not None and write.loaded != stored.loaded:
        raise SessionConflictError(
            f"agent {write.agent_id!r}: its conversation was rewound after this session was loaded, so the changes of "
            "this session were not stored; open it with a new manager and repeat the request"
        )
    if missing := [message_id for message_id in write.replaced if message_id not in stored.messages]:
        raise MessageNotFoundError(f"agent {write.agent_id!r} has no message {missing[0]}")

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
        # All messages are stored, by a statement whose acknowledgement was lost, and with them the rest of the write.
        # Sending the rest again is harmless unless another writer has written since.
        rest.expected = written[-1].fields["message_id"] + 1
        if stored.next_message_id != rest.expected:
            rest = replace(rest, data={}, config={}, view=None, expected=None)
    elif rest.expected_id is not None and stored.next_message_id != rest.expected_id:
        is_longer = stored.next_message_id > rest.expected_id
        theirs = f"stored message {stored.next_message_id - 1}" if is_longer else "replaced the agent"
        raise SessionConflictError(
            f"agent {write.agent_id!r}: another writer {theirs} after this session was loaded, so the changes of this "
            "session were not stored; open it with a new manager and repeat the request"
        )
    is_left = rest.messages or rest.data or rest.config or rest.view is not None or rest.outdated
    return rest if is_left else None


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


def _position(messages: Sequence[Document], message_id: int, ours: Identity | None, by_id: bool) -> int | None:
    """Return the position of the message that an id refers to, or `None` if there is none.

    Among several messages with that id, the identity selects one. If none of them matches, a write of an old process
    might have renumbered the message. A writer that knows only the id refers to the first one.
    """
    alike = [n for n, message in enumerate(messages) if message.get("message_id") == message_id]
    if ours is not None:
        same = [
            n
            for n, message in enumerate(messages)
            if is_message_id(message.get("message_id")) and _is_same(ours, Identity.of(message))
        ]
        for found in ([n for n in same if n in alike], [] if by_id else same):
            if found:
                return found[0]
        if not by_id and ours.created_at is not None:
            return None
    return alike[0] if alike else None


def _is_same(ours: Identity, theirs: Identity) -> bool:
    # A redaction might have removed the tracking id.
    known = ours.tracking_id is not None and theirs.tracking_id is not None
    return as_date(ours.created_at) == as_date(theirs.created_at) and not (
        known and ours.tracking_id != theirs.tracking_id
    )


def positions(write: AgentWrite, messages: Sequence[Document]) -> dict[int, int]:
    """Return by id the positions, in the head, of the messages that a write refers to."""
    found = {n: _position(messages, n, each.identity, write.by_id) for n, each in write.messages.items()}
    return {message_id: position for message_id, position in found.items() if position is not None}


def renumbered(write: AgentWrite, new_ids: Mapping[int, int]) -> AgentWrite:
    """Return a write with other ids of stored messages."""
    messages = {n: each for n, each in write.messages.items() if each.recorded is not None}
    for message_id, message in write.messages.items():
        new_id = new_ids.get(message_id, message_id)
        if message.recorded is None and new_id in messages:  # a new message that is stored already
            messages[new_id] = replace(messages[new_id])
            messages[new_id].amend(message.fields)
        elif message.recorded is None:
            messages[new_id] = message
    return replace(write, messages=messages)


def known_messages(write: AgentWrite, messages: Sequence[Document]) -> dict[int, Document]:
    """Return the messages of a head that a write refers to, by the ids in the write."""
    return {message_id: messages[position] for message_id, position in positions(write, messages).items()}
