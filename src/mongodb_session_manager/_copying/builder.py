"""`SessionBuilder`: fills a staged session with agents and messages, oldest first.

A message is added to the head of its agent, as in a conversation: beyond the limits, old messages move into a bucket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from .._format.buckets import BUCKET_MESSAGES, Head, Step, bucket_of, everything, taken
from .._format.documents import Document, removed_messages, usable
from .._format.sizes import MAX_DOCUMENT_BYTES, stored_size
from .._store.store import SessionStore
from .staging import Staging

_ELEMENT = 12
"""The maximum overhead of an array element in bytes."""

_PART = 1024 * 1024
"""Bytes of a session document that one update stores.

A server with a small cache refuses to write a large document at once.
"""

_MOST_ITEMS = 8192
"""The most items of a value that is divided: the time of the server for paths grows with the square of their number."""

_RESERVE = 16 * 1024
"""Bytes of the session document that stay free for later additions."""


@dataclass
class NewAgent:
    """An agent of a session that is built; `total` is the sum of the `sizes` of the messages in the head, in bytes."""

    key: str
    fields: Document
    archived: int = 0
    next_id: int = 0
    messages: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    total: int = 0

    @property
    def count(self) -> int:
        return self.archived + len(self.messages)

    @property
    def size(self) -> int:
        """The size of the messages in the head, as elements of an array."""
        return self.total + _ELEMENT * len(self.sizes)

    @property
    def head(self) -> Head:
        removed = removed_messages(self.fields)
        return Head(archived=self.archived, below=self.archived, next_id=self.count, size=self.total, removed=removed)

    def document(self) -> Document:
        archived = {"archived": self.archived} if self.archived else {}
        return {**self.fields, "next_message_id": self.next_id, **archived, "messages": self.messages}


class SessionBuilder:
    """Fills a staged session; `agents` of the fields holds sub-documents that are stored unchanged."""

    def __init__(self, store: SessionStore, staging: Staging, fields: Document) -> None:
        self.staging = staging
        self._store = store
        self._fields = fields
        self._agents: list[NewAgent] = []

    def add_agent(self, key: str, fields: Document) -> NewAgent:
        """Add an agent; the messages that are added next are its messages."""
        self._agents.append(NewAgent(key, fields))
        return self._agents[-1]

    async def add_message(self, message: Any, size: int) -> None:
        agent = self._agents[-1]
        agent.messages.append(message)
        agent.sizes.append(size)
        agent.total += size
        if type(message) is dict:
            agent.next_id = int(message["message_id"]) + 1
        limits = self._store.mover.limits
        # For a head within the limits, the state of the conversation manager is irrelevant.
        while len(agent.messages) > limits.messages or agent.total > limits.size:
            if not limits.exceeded(head := agent.head):
                break
            await self._archive(agent, limits.step(head))

    async def fill(self) -> None:
        """Store the session document; raise `SessionConflictError` as `Staging.fill` does."""
        await self._make_room()
        content = self._content()
        # Applications have stored fields that no path can name.
        if unnamed := {name: content.pop(name) for name in list(content) if not _is_path(name)}:
            await self.staging.fill([{"$replaceWith": {"$mergeObjects": ["$$ROOT", {"$literal": unnamed}]}}])
        for part in await asyncio.to_thread(_parts_of, content):
            await self.staging.fill({"$set": part})

    async def _archive(self, agent: NewAgent, step: Step) -> None:
        count = min(taken(agent.sizes, step), BUCKET_MESSAGES)
        bucket = bucket_of(self.staging.place, agent.key, agent.archived, agent.messages[:count])
        archive, condition = self._store.archive.collection, {"_id": bucket["_id"]}
        await archive.send(lambda buckets: buckets.replace_one(condition, bucket, upsert=True))
        agent.archived += count
        agent.total -= sum(agent.sizes[:count])
        del agent.messages[:count], agent.sizes[:count]

    async def _make_room(self) -> None:
        """Archive more messages than the limits require if the heads do not fit into one document."""
        frame = self._content()
        frame["agents"] |= {agent.key: {**agent.document(), "archived": 0, "messages": []} for agent in self._agents}
        room = MAX_DOCUMENT_BYTES - _RESERVE - await asyncio.to_thread(stored_size, frame)
        if room < 0:
            del self._fields["copy_of"]
        total = sum(agent.size for agent in self._agents)
        for agent in sorted(self._agents, key=attrgetter("size"), reverse=True):
            total -= agent.size
            while agent.messages and total + agent.size > room:
                await self._archive(agent, everything(agent.head))
            total += agent.size

    def _content(self) -> Document:
        agents = {agent.key: agent.document() for agent in self._agents}
        return {**self._fields, "agents": {**usable(dict, self._fields.get("agents")), **agents}}


def _parts_of(content: Document) -> list[Document]:
    """Return the fields of a document by path, in parts that can be stored one after the other."""
    parts: list[Document] = [{}]
    size = 0
    for path, value, length in _fields_of("", content):
        if parts[-1] and size + length > _PART:
            parts.append({})
            size = 0
        parts[-1][path] = value
        size += length or _PART  # the content of an empty value follows, and cannot be in the same update
    return parts


def _fields_of(path: str, value: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield values with paths and sizes in bytes.

    A large value is divided: it is yielded as an empty one of size 0, and its content follows.
    """
    size = stored_size({"": value})
    if path and (size <= _PART or not _can_be_divided(value)):
        yield path, value, size
        return
    if path:
        yield path, type(value)(), 0
    items: Iterable[tuple[Any, Any]] = value.items() if type(value) is dict else enumerate(value)
    for key, item in items:
        yield from _fields_of(f"{path}.{key}" if path else key, item)


def _can_be_divided(value: Any) -> bool:
    if type(value) not in (dict, list) or len(value) > _MOST_ITEMS:
        return False
    return type(value) is list or all(map(_is_path, value))


def _is_path(key: str) -> bool:
    return bool(key) and "." not in key and not key.startswith("$")
