"""The messages of a long conversation: heads, buckets, and the statements that move messages. Pure.

The session document keeps an agent's newest messages, its head. Older ones are in `<collection>_archive`:

    _id          {incarnation, agent: <agent key>, first: <position>}, see `layout`
    session_id   the session
    revision     that of the head when the bucket was made; it grows with every change of a message in the bucket
    last         the position of the last message
    messages     the elements of `messages` of the session document
    removed_attachments
                 references of replaced messages, until the files are removed
    expires_at   if the session expires, see `retention`

A position counts the messages of an agent from 0. Versions before 1.0 might have stored ids that have gaps, or do not
increase; positions always locate a message. In the agent's sub-document, `archived` is the position of the head's first
message, and `revision` grows with every change of a message in the head, but not with an append. `archive_revision`
grows after every change of a message in a bucket.

A move takes two statements and brings no message to the client. `merge` copies the oldest messages into the bucket
that begins at `archived`; `cut` takes them out of the head and adds their number to `archived`. Both match the same
`archived` and `revision`, and select only messages that cannot change without changing these. A bucket that begins at
`archived` or later is left over from an unfinished move: no reader uses it, and the next move replaces it. `merge`
refuses to replace a bucket of a higher revision, or a different one of the same revision, so that a delayed statement
cannot undo a later change. `outrun` raises the head's revision so that the move can continue.

Two statements lower `archived`: a write-back, to 0, see `_copying.write_back`, and a rewind that removes archived
messages, see `_copying.rewind`. They leave the buckets from `archived` on behind and store a higher revision than
theirs in `stale_below`; the head continues with that revision. No message moves while the field is there. Removing
these buckets, which have a lower revision, and then the field, ends the write-back or the rewind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from ..errors import ConfigurationError
from .changes import Identity, split_fields
from .documents import Document
from .expressions import ALL, array_at, entries_at, ids_of, is_object, number_at, size_at, stored_removed
from .ids import is_numbered
from .layout import LIVE, Place
from .retention import LIFE, Dates, Life
from .statements import REMOVED, Update, attachments_of, is_meant, replaced_message, with_removed

MAX_EMBEDDED_MESSAGES = 128
MAX_EMBEDDED_BYTES = 256 * 1024

BUCKET_MESSAGES = 1024
"""The maximum number of messages of a bucket. A bucket starts less than this number below each of its positions."""

_BUCKET_BYTES = 2 * 1024 * 1024
_MAX_EMBEDDED_BYTES = 8 * 1024 * 1024
_TAKEN = "__taken__"

_STUCK_CHANGES = 1024
"""The maximum number of delayed statements that can change a bucket without reaching the revision of later buckets."""


@dataclass(frozen=True, slots=True)
class Head:
    """The known numbers of an agent's messages in the session document.

    Attributes:
        since: The `created_at` of the agent.
        archived: The position of the first message.
        revision: The revision of the head.
        below: The number of ids below the first one's: `archived`, unless a version before 1.0 left gaps.
        next_id: The id of the next message.
        size: A lower bound of the size of all messages in bytes.
        removed: How many of the agent's oldest messages its conversation manager has removed.
        certain: Whether only appends have changed it since it was read, as far as this process knows.
        is_numbered: Whether the ids of the messages increase; other messages only move if there is no room.
        life: The `Life` of the session when the head was read.
        stale_below: Buckets of a lower revision, from `archived` on, are left over from a write-back or a rewind; 0
            without one.
    """

    since: Any = None
    archived: int = 0
    revision: int = 0
    below: int = 0
    next_id: int = 0
    size: int = 0
    removed: int = 0
    certain: bool = True
    is_numbered: bool = True
    life: Life = field(default_factory=Life)
    stale_below: int = 0

    @classmethod
    def of(cls, numbers: Mapping[str, Any]) -> Self:
        archived, count = int(numbers["archived"]), int(numbers["count"])
        next_id = int(numbers.get("next_message_id") or archived + count)
        return cls(
            since=numbers.get("created_at"),
            archived=archived,
            revision=int(numbers["revision"]),
            below=next_id - count,
            next_id=next_id,
            size=int(numbers["bytes"]),
            removed=int(numbers["removed"]),
            is_numbered="ids" not in numbers or is_numbered(numbers),
            life=Life.of(numbers.get("session") or {}),
            stale_below=int(numbers.get("stale_below") or 0),
        )

    @property
    def count(self) -> int:
        return self.next_id - self.below

    @property
    def is_regular(self) -> bool:
        """Whether every id is the position of its message, as versions since 1.0 store them."""
        return self.below == self.archived


class Step(NamedTuple):
    """The size of a move: the oldest messages until both numbers are reached, but at most `most`."""

    messages: int
    size: int
    most: int


class Limits(NamedTuple):
    """The maximum number of messages of an agent in the session document, and of their bytes."""

    messages: int
    size: int

    @classmethod
    def checked(cls, max_embedded_messages: object, max_embedded_bytes: object) -> Self:
        limits = {"max_embedded_messages": max_embedded_messages, "max_embedded_bytes": max_embedded_bytes}
        for name, value in limits.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name} must be an int >= 1, got {value!r}")
        checked = cls(int(max_embedded_messages), int(max_embedded_bytes))  # type: ignore[call-overload]
        if checked.size > _MAX_EMBEDDED_BYTES:
            raise ConfigurationError(f"max_embedded_bytes must be an int <= {_MAX_EMBEDDED_BYTES}, got {checked.size}")
        return checked

    def exceeded(self, head: Head, times: int = 1) -> bool:
        """Return whether messages must move; the newest stays, whatever its size."""
        if not head.is_numbered:
            return False
        return head.count > 1 and (head.count > times * self.messages or head.size > times * self.size)

    def step(self, head: Head) -> Step:
        """Return the move after which the head has half of its limits.

        The messages that restoring the agent needs stay in the head if they take at most three quarters of the limits.
        """
        kept = head.archived + head.count - head.removed
        stays = kept <= self.messages * 3 // 4 and head.size * kept // head.count <= self.size * 3 // 4
        most = head.count - kept if stays and 0 < kept < head.count else head.count - 1
        messages = head.count - self.messages // 2 if head.count > self.messages else 0
        size = head.size - self.size // 2 if head.size > self.size else 0
        return Step(messages, size, min(most, BUCKET_MESSAGES))


def everything(head: Head) -> Step:
    """Return the move that leaves only the newest message; a single message is moved, too."""
    older = max(1, head.count - 1)
    return Step(older, 0, min(older, BUCKET_MESSAGES))


def head_numbers(path: str) -> Document:
    """Return the expression for the numbers that `Head.of` takes; `path` leads to the agent and begins with `$`."""
    messages = array_at(f"{path}.messages")
    return {
        "created_at": f"{path}.created_at",
        "archived": number_at(f"{path}.archived"),
        "revision": number_at(f"{path}.revision"),
        "next_message_id": f"{path}.next_message_id",
        "ids": ids_of(messages),
        "count": {"$size": messages},
        "bytes": {"$bsonSize": {"m": messages}},
        "removed": stored_removed(path),
        "stale_below": number_at(f"{path}.stale_below"),
        "session": LIFE,
    }


def numbers_of(key: str) -> Document:
    path = f"$agents.{key}"
    return {"_id": 0, "head": {"$cond": [is_object(path), head_numbers(path), None]}}


_KEYED_NUMBERS = {"key": "$$agent.k", **head_numbers("$$agent.v")}

NUMBERS_OF_ALL: Document = {
    "_id": 0,
    "heads": {"$map": {"input": entries_at("$agents"), "as": "agent", "in": _KEYED_NUMBERS}},
}
"""The projection for the `heads` of all agents, each with its `key`."""


def _unchanged(session_id: str, key: str, head: Head) -> Document:
    """Return the filter that matches while the messages of `head` are unchanged; others can follow them."""
    numbers = {"archived": head.archived, "revision": head.revision}
    return {
        "_id": session_id,
        "incarnation": head.life.incarnation,
        **LIVE,
        **(_increasing_ids(f"$agents.{key}.messages") if head.is_numbered else {}),
        f"agents.{key}.messages.0": {"$exists": True},
        f"agents.{key}.created_at": head.since,
        f"agents.{key}.stale_below": None,
        **{f"agents.{key}.{name}": value or {"$not": {"$gt": 0}} for name, value in numbers.items()},
    }


def _increasing_ids(messages: str) -> Document:
    """Return the filter that matches unless a version before 1.0 has reused an id since the head was numbered."""
    ids = {"$ifNull": [f"{messages}.message_id", []]}
    at = {"$range": [1, {"$size": "$$ids"}]}
    above = {"$gt": [{"$arrayElemAt": ["$$ids", "$$at"]}, {"$arrayElemAt": ["$$ids", {"$subtract": ["$$at", 1]}]}]}
    increase = {"$allElementsTrue": [{"$map": {"input": at, "as": "at", "in": above}}]}
    return {"$expr": {"$let": {"vars": {"ids": ids}, "in": increase}}}


def _taken(messages: str, step: Step) -> Document:
    """Return the expression for the number of `messages` that a step moves, at least one."""
    size = {"$add": ["$$value.size", size_at("$$this")]}
    wanted = {"$or": [{"$lt": ["$$value.count", step.messages]}, {"$lt": ["$$value.size", step.size]}]}
    fits = {"$or": [{"$eq": ["$$value.count", 0]}, {"$lte": [size, _BUCKET_BYTES]}]}
    longer = {"count": {"$add": ["$$value.count", 1]}, "size": size, "more": True}
    same = {"count": "$$value.count", "size": "$$value.size", "more": False}
    more = {"$cond": [{"$and": ["$$value.more", wanted, fits]}, longer, same]}
    begin = {"count": 0, "size": 0, "more": True}
    counted = {"$reduce": {"input": {"$slice": [messages, step.most]}, "initialValue": begin, "in": more}}
    return {"$max": [1, {"$let": {"vars": {"taken": counted}, "in": "$$taken.count"}}]}


def taken(sizes: Sequence[int], step: Step) -> int:
    count = size = 0
    for added in sizes[: step.most]:
        if not (count < step.messages or size < step.size) or (count and size + added > _BUCKET_BYTES):
            break
        count, size = count + 1, size + added
    return max(1, count)


def bucket_of(place: Place, key: str, first: int, messages: Sequence[Document]) -> Document:
    """Return a bucket of messages that were never in a head."""
    return {
        "_id": place.bucket_id(key, first),
        "session_id": place.session_id,
        "revision": 0,
        "last": first + len(messages) - 1,
        "messages": list(messages),
    }


def merge(session_id: str, key: str, head: Head, step: Step, archive: str, dates: Dates) -> list[Document]:
    """Return the aggregation that copies the oldest messages of a head into their bucket, which gets `dates`."""
    messages = f"$agents.{key}.messages"
    bucket = {
        "_id": {"$literal": Place(session_id, head.life.incarnation).bucket_id(key, head.archived, head.since)},
        "session_id": "$_id",
        "revision": {"$literal": head.revision},
        "last": {"$add": [f"${_TAKEN}", head.archived - 1]},
        "messages": {"$slice": [messages, f"${_TAKEN}"]},
    }
    if dates.expires_at is not None:
        bucket["expires_at"] = {"$literal": dates.expires_at}
    newer = {"$gt": ["$$new.revision", "$revision"]}
    alike = {"$and": [{"$eq": ["$$new.revision", "$revision"]}, {"$eq": ["$$new.last", "$last"]}]}
    # Aggregations have no operator that raises an error, but a change of _id does (ImmutableField).
    replace_or_fail = {"$replaceWith": {"$cond": [{"$or": [newer, alike]}, "$$new", {"_id": None}]}}
    return [
        {"$match": _unchanged(session_id, key, head)},
        {"$set": {_TAKEN: _taken(messages, step)}},
        {"$project": bucket},
        {"$merge": {"into": archive, "on": "_id", "whenMatched": [replace_or_fail], "whenNotMatched": "insert"}},
    ]


MERGE_REFUSED = 66
"""The server's error code for a bucket that `merge` must not replace."""


def cut(session_id: str, key: str, head: Head, step: Step, dates: Dates) -> Update:
    path = f"agents.{key}"
    condition = {**_unchanged(session_id, key, head), **dates.may_be_added}
    sets = {
        f"{path}.messages": {"$slice": [f"${path}.messages", f"${_TAKEN}", ALL]},
        f"{path}.archived": {"$add": [f"${_TAKEN}", head.archived]},
    }
    stages: list[Document] = [{"$set": {_TAKEN: _taken(f"${path}.messages", step)}}, {"$set": sets}, {"$unset": _TAKEN}]
    return Update(condition, stages, None)


def outrun(session_id: str, key: str, head: Head, revision: int) -> Update:
    """Return the update that raises the revision of a head above that of a bucket that `merge` must not replace."""
    higher = max(head.revision, revision) + 1
    return Update(_unchanged(session_id, key, head), {"$set": {f"agents.{key}.revision": higher}}, None)


def revision_above(revision: int) -> int:
    """Return a revision for a head that no bucket of at most the given revision can reach; these are then removed."""
    return revision + 1 + _STUCK_CHANGES


def stale_buckets(place: Place, key: str, since: Any, archived: int, below: int) -> Document:
    """Return the filter for the buckets that a write-back or a rewind left behind; it never matches a later bucket."""
    first, last = (place.bucket_id(key, position, since) for position in (archived, ALL))
    return {"_id": {"$gte": first, "$lte": last}, "revision": {"$lt": below}}


def holding_positions(place: Place, key: str, since: Any, begin: int, end: int) -> Document:
    """Return the filter for the buckets that hold positions from `begin` to below `end`, where `end` is archived."""
    low, high = (place.bucket_id(key, first, since) for first in (begin - BUCKET_MESSAGES, end))
    return {"_id": {"$gt": low, "$lt": high}, "last": {"$gte": begin}}


def from_message(place: Place, key: str, since: Any, message_id: int, gap: int) -> Document:
    """Return the filter for the buckets with messages whose id is at least `message_id`.

    It covers those that can hold the first such message: the ids increase, and are at most `gap` above the positions.
    """
    lowest = max(0, message_id - gap) - BUCKET_MESSAGES
    low, high = (place.bucket_id(key, first, since) for first in (lowest, message_id))
    return {"_id": {"$gt": low, "$lte": high}, "messages.message_id": {"$gte": message_id}}


def holding_message(
    place: Place, key: str, message_id: int, since: Any, created_at: Any = None, below: int = ALL
) -> tuple[Document, Document]:
    """Return filters for the bucket that holds a message, to be tried in turn.

    The first covers the buckets where the id is the position of its message; the second covers all, and is needed only
    if ids can differ from positions. The `created_at` of the message distinguishes duplicate ids, which 1.0.0 might
    have archived. The buckets begin before the position `below`.
    """
    message = {"message_id": message_id} | ({} if created_at is None else {"created_at": created_at})

    def within(low: int, high: int) -> Document:
        ids = {"$gte": place.bucket_id(key, low, since), "$lte": place.bucket_id(key, min(high, below - 1), since)}
        return {"_id": ids, "messages": {"$elemMatch": message}}

    return within(message_id - BUCKET_MESSAGES, message_id), within(0, ALL)


def change_in_bucket(condition: Document, message_id: int, fields: Document, created_at: Any = None) -> Update:
    """Return the update that sets fields of a message in a bucket. `condition` is a filter of `holding_message`.

    New content moves the references to the old attachments to the bucket's `removed_attachments`.
    """
    if "attachments" not in fields:
        sets = {f"messages.$.{name}": value for name, value in split_fields(fields)[0].items()}
        return Update(condition, {"$inc": {"revision": 1}, "$set": sets}, None)
    meant = is_meant(message_id, Identity(created_at))
    are_meant = {"$map": {"input": "$messages", "as": "message", "in": meant}}
    message = {"$arrayElemAt": ["$messages", "$$n"]}
    is_first = {"$eq": ["$$n", {"$indexOfArray": [are_meant, True]}]}
    new = {"$let": {"vars": {"message": message}, "in": replaced_message(fields)}}
    positions = {"$range": [0, {"$size": "$messages"}]}
    changed = {"$map": {"input": positions, "as": "n", "in": {"$cond": [is_first, new, message]}}}
    removed = with_removed([attachments_of("messages", meant)])
    stage = {"messages": changed, REMOVED: removed, "revision": {"$add": ["$revision", 1]}}
    return Update(condition, [{"$set": stage}], None)
