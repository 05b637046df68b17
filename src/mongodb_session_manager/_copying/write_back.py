"""Writing the archive and the attachments of a session back into its document, for versions before 1.0.

One update puts the messages of all agents back into the document. It matches the `archived`, `revision` and
`archive_revision` of each agent that were read. Appends do not change these, so they continue during the write-back,
except for an appended message that itself needs a change. The buckets and attachments are removed afterwards. Until
then no reader uses them, because `archived` is 0 and no message refers to an attachment; `buckets` explains why no
later move uses a left-over bucket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bson import ObjectId

from .._format.attachment_refs import attached, references_of
from .._format.buckets import Head, revision_above
from .._format.documents import MESSAGE_USAGE, Document, number
from .._format.expressions import ALL, array_at
from .._format.ids import agent_id_of, checked_id
from .._format.layout import Place
from .._format.sizes import MAX_DOCUMENT_BYTES, stored_size
from .._format.statements import REMOVED, Update, with_removed
from .._io.drivers import AsyncCollection
from .._store.sessions import ROUNDS
from .._store.store import SessionStore
from ..errors import DatabaseError, MessageTooLargeError, StateTooLargeError, raise_alone
from .source import read_source

_OF_ARCHIVE = ("archived", "archive_revision")


@dataclass
class _Agent:
    """An agent whose messages are gathered: `older` in the archive, `head` in the document."""

    key: str
    stored: Document
    head: list[Any]
    older: list[Any] = field(default_factory=list)
    count: int = 0  # of archived messages, even if they are not kept here
    revision: int = 0  # the highest of the head and of any bucket
    has_buckets: bool = False  # an interrupted move can leave one that is not part of the session
    changed: dict[int, Any] = field(default_factory=dict)
    references: list[str] = field(default_factory=list)

    @property
    def archived(self) -> int:
        return number(self.stored, "archived")

    @property
    def since(self) -> Any:
        return self.stored.get("created_at")

    @property
    def is_whole(self) -> bool:
        """Whether the session document alone holds the agent, in the form of versions before 1.0."""
        return not self.archived and not self.has_buckets and not any(map(_is_to_change, self.head))

    @property
    def below(self) -> int:
        """The new revision of the head: higher than any present or later revision of a bucket."""
        return revision_above(self.revision)

    def begin(self) -> None:
        self.older, self.count, self.revision = [], 0, number(self.stored, "revision")

    def following(self, bucket: Mapping[str, Any]) -> list[Any]:
        first = int(bucket["_id"]["first"])
        self.has_buckets = True
        self.revision = max(self.revision, number(bucket, "revision"))
        return bucket["messages"][self.count - first : self.archived - first] if first <= self.count else []


class WriteBack:
    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._connection = store.connection

    async def write_back(self, session_id: str, owner: str | None = None) -> None:
        checked_id(session_id, "session_id")
        async with self._connection.operation():
            for _ in range(ROUNDS):
                await self._store.expiry.life(session_id, owner)  # continues an interrupted migration
                place, document, found = await read_source(self._store, session_id, owner)
                agents = [_Agent(key, stored, stored.get("messages") or []) for key, stored in found.items()]
                bucket = await self._store.archive.collection.find_one({"_id": place.buckets()}, {"_id": 1})
                is_whole = bucket is None and all(agent.is_whole for agent in agents)
                if is_whole or await self._write_back_once(session_id, document, agents):
                    await self._remove_left_over(place, agents)
                    return
        raise DatabaseError(f"session {session_id!r} kept changing while it was written back: try again later")

    async def _write_back_once(self, session_id: str, document: Document, agents: Sequence[_Agent]) -> bool:
        """Put the messages of all agents into the session document; return `False` if they changed concurrently."""
        try:
            size = await self._gather(session_id, document, agents)
        except DatabaseError:
            # Another call might have written the session back and removed the missing documents.
            place = Place(session_id, document["incarnation"])
            condition = {"_id": session_id, "incarnation": place.incarnation, **_unchanged(agents)}
            if await self._store.collection.find_one(condition, {"_id": 1}) is not None and (
                not await self._store.migration.move_late_buckets(place)
            ):
                raise
            return False
        refused = StateTooLargeError(
            f"session {session_id!r} was not written back: its document would take {size} bytes, but a MongoDB "
            f"document can hold at most {MAX_DOCUMENT_BYTES}"
        )
        if size > MAX_DOCUMENT_BYTES:
            raise refused
        try:
            archived = [agent for agent in agents if not agent.is_whole]
            update = _put_back(session_id, document["incarnation"], archived)
            return not archived or await self._store.sessions.update(update)
        except MessageTooLargeError:  # it has grown in the meantime
            raise_alone(refused)

    async def _gather(self, session_id: str, document: Document, agents: Sequence[_Agent]) -> int:
        """Read all messages and convert them; return the size of the new document in bytes.

        At most the messages that fit into a document are kept in memory. If they do not fit, no attachment is read.

        Raises:
            AttachmentError: An attachment is missing or damaged.
            DatabaseError: An archived message is missing.
        """
        place = Place(session_id, document["incarnation"])
        by_key = {agent.key: agent for agent in agents}
        size = 0

        async def read(archive: AsyncCollection) -> None:
            nonlocal size
            size = 0
            for agent in agents:
                agent.begin()
            async for bucket in archive.find({"_id": place.buckets()}, sort=[("_id", 1)]):
                if (its := by_key.get(bucket["_id"]["agent"])) is None:
                    continue
                messages = its.following(bucket)
                size += await asyncio.to_thread(_size_of, messages, its.count)
                its.count += len(messages)
                if size <= MAX_DOCUMENT_BYTES:
                    its.older += messages

        await self._store.archive.collection.send(read)
        for agent in agents:
            if agent.count < agent.archived:
                raise DatabaseError(f"session {session_id!r}: message {agent.count} is missing in its archive")
            messages = [*agent.older, *agent.head]
            agent.references = [str(reference) for message in messages for reference in references_of(message)]
            size += await asyncio.to_thread(_size_of, agent.head, agent.count)
        size += stored_size(_frame_of(document, agents))
        if size <= MAX_DOCUMENT_BYTES:
            for agent in agents:
                await self._gather_attachments(place, agent)
        return size

    async def _gather_attachments(self, place: Place, agent: _Agent) -> None:
        messages = [*agent.older, *agent.head]
        await self._store.attachments.restore(place, {agent_id_of(agent.key): messages})
        messages = list(map(_in_document, messages))
        older, head = messages[: agent.count], messages[agent.count :]
        agent.older = older
        agent.changed = {n: new for n, (new, old) in enumerate(zip(head, agent.head, strict=True)) if new is not old}

    async def _remove_left_over(self, place: Place, agents: Iterable[_Agent]) -> None:
        session_id = place.session_id
        for agent in agents:
            self._store.mover.forget(session_id, agent.key)
            if below := (number(agent.stored, "stale_below") if agent.is_whole else agent.below):
                head = Head(since=agent.since, stale_below=below)
                await self._store.mover.remove_stale(place, agent.key, head)
        document = await self._store.sessions.find(session_id, {REMOVED: 1})
        if document is not None and document.get(REMOVED):
            await self._store.attachments.remove_removed(place, document[REMOVED])


def _refers(stored: Mapping[str, Any]) -> bool:
    listed = stored.get("attachments")
    return isinstance(listed, list) and len(references_of(stored)) == len(listed)


def _has_old_usage(stored: Mapping[str, Any]) -> bool:
    return type(stored.get("usage")) is dict and type(stored.get("event_loop_metrics", {})) is dict


def _is_to_change(stored: Any) -> bool:
    return type(stored) is dict and (_refers(stored) or _has_old_usage(stored))


def _in_document(stored: Any) -> Any:
    """Return a message that holds its attachments in the form of versions before 1.0."""
    if not _is_to_change(stored):
        return stored
    gone = [name for name, is_gone in (("attachments", _refers), ("usage", _has_old_usage)) if is_gone(stored)]
    message = {name: value for name, value in stored.items() if name not in gone}
    if "usage" in gone:
        message["event_loop_metrics"] = {MESSAGE_USAGE: stored["usage"], **stored.get("event_loop_metrics", {})}
    return message


def _size_of(messages: Iterable[Any], position: int) -> int:
    """Return how many bytes messages, attachments included, take in the array from a position on."""
    return sum(_element_size(message, at) for at, message in enumerate(messages, position))


def _element_size(stored: Any, position: int) -> int:
    more = 0
    if type(stored) is dict and _is_to_change(stored):
        blobs = {}
        for reference in references_of(stored):
            # The length is not verified yet: a damaged one must not take all memory. Pages of zeros take none.
            blobs[str(reference)] = bytes(min(reference.length, MAX_DOCUMENT_BYTES))
            more += max(0, reference.length - MAX_DOCUMENT_BYTES)
        stored = _in_document(attached(stored, blobs))
    return stored_size({str(position): stored}) - stored_size({}) + more


def _frame_of(document: Mapping[str, Any], agents: Sequence[_Agent]) -> Document:
    frame: Document = {**document, "agents": dict(document.get("agents") or {})}
    for agent in agents:
        stored = {**agent.stored, "messages": []}
        if not agent.is_whole:
            stored = {name: value for name, value in stored.items() if name not in _OF_ARCHIVE}
            stored |= {"revision": agent.below, "stale_below": agent.below}
        frame["agents"][agent.key] = stored
    if references := _references_of(agents):
        listed = frame.get(REMOVED)
        frame[REMOVED] = [*(listed if isinstance(listed, list) else []), *references]
    return frame


def _references_of(agents: Iterable[_Agent]) -> list[str]:
    return sorted({reference for agent in agents for reference in agent.references})


def _unchanged(agents: Iterable[_Agent]) -> Document:
    """Return the condition that agents are unchanged since they were read, except for appended messages."""
    condition: Document = {}
    for agent in agents:
        path = f"agents.{agent.key}"
        condition[path] = {"$exists": True}
        condition[f"{path}.created_at"] = agent.since
        for name in ("revision", *_OF_ARCHIVE):
            condition[f"{path}.{name}"] = number(agent.stored, name) or {"$not": {"$gt": 0}}
        if agent.head:
            condition[f"{path}.messages.{len(agent.head) - 1}"] = {"$exists": True}
    return condition


def _put_back(session_id: str, incarnation: ObjectId, agents: Sequence[_Agent]) -> Update:
    condition: Document = {"_id": session_id, "incarnation": incarnation, **_unchanged(agents)}
    sets: Document = {}
    new = []
    for agent in agents:
        path = f"agents.{agent.key}"
        # A version before 1.0 changes a message without changing the revision.
        condition |= {f"{path}.messages.{n}.updated_at": agent.head[n].get("updated_at") for n in agent.changed}
        sets[f"{path}.messages"] = {"$concatArrays": _parts(agent)}
        sets[f"{path}.revision"] = sets[f"{path}.stale_below"] = agent.below
        new.append({"$slice": [array_at(f"${path}.messages"), len(agent.head), ALL]})
    is_there = [{"$ne": [{"$type": f"$$this.{name}"}, "missing"]} for name in ("attachments", "usage")]
    to_change = {"$filter": {"input": {"$concatArrays": new}, "cond": {"$or": is_there}}}
    condition["$expr"] = {"$eq": [{"$size": to_change}, 0]}
    if references := _references_of(agents):
        sets[REMOVED] = with_removed([references])
    unset = [f"agents.{agent.key}.{name}" for agent in agents for name in _OF_ARCHIVE]
    return Update(condition, [{"$set": sets}, {"$unset": unset}], None)


def _parts(agent: _Agent) -> list[Any]:
    """Return expressions for the parts of an agent's messages; the server keeps the unchanged ones."""
    stored = array_at(f"$agents.{agent.key}.messages")
    parts: list[Any] = [{"$literal": agent.older}]
    position = 0
    for n in sorted(agent.changed):
        if n > position:
            parts.append({"$slice": [stored, position, n - position]})
        parts.append({"$literal": [agent.changed[n]]})
        position = n + 1
    parts.append({"$slice": [stored, position, ALL]})
    return parts
