"""Writing a session from the lines of its portable form, which nobody vouches for.

A message goes through the head of its agent as it does in a conversation, only that no turn waits for it: what is too
much moves into a bucket.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ._attachments import CHUNK_BYTES
from ._buckets import BUCKET_MESSAGES, Head, Step, bucket_of, everything, taken
from ._codec import stored_size
from ._copies import Copy, SessionCopies
from ._documents import Document, agent_key, checked_id, config_set, removed_messages
from ._loop import Portal
from ._portable import MAX_LINE, AgentRead, MessageRead, PieceRead, Read, Reader, SessionRead
from ._references import Reference, references_of
from .errors import InvalidArgumentError, SessionExistsError

_LINES = 256
_CHARACTERS = 1024 * 1024
"""Lines that are read in one go: until there are so many, or they have so many characters."""

_MOST_IN_DOCUMENT = 14 * 1024 * 1024
"""Bytes of all heads together that fit into a session document, with room for what follows."""


@dataclass
class _Agent:
    """An agent whose messages are coming in."""

    key: str
    fields: Document
    removed: int
    archived: int = 0
    next_id: int = 0
    messages: list[Document] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def head(self) -> Head:
        end = self.archived + len(self.messages)
        size = sum(self.sizes)
        return Head(archived=self.archived, below=self.archived, next_id=end, size=size, removed=self.removed)


class Import:
    """A session on its way in; one call at a time is carried out.

    Args:
        sessions: The repository it is written to.
        session_id: The new session; `None` for the id it was exported with.
    """

    def __init__(self, sessions: SessionImports, session_id: str | None) -> None:
        self._sessions = sessions
        self._session_id = session_id
        self._reader = Reader()
        self._copy: Copy | None = None
        self._document: Document = {}
        self._agents: list[_Agent] = []
        self._unfinished: Reference | None = None
        self._chunk = bytearray()
        self._chunks = 0
        self._turn = asyncio.Lock()
        self._is_over = False

    async def store(self, lines: Iterable[object]) -> None:
        """Read lines and store what has to be stored before the session document."""
        async with self._turn, self._sessions._connection.operation():
            self._check()
            for found in await asyncio.to_thread(self._read, lines):
                await self._take(found)

    async def finish(self) -> str:
        """Insert the session document; return its id.

        Raises:
            InvalidArgumentError: The last line has not come.
            SessionExistsError: There is a session of that id.
        """
        async with self._turn, self._sessions._connection.operation():
            self._check()
            self._reader.check_end()
            assert self._copy is not None  # the line of the session came before the last one
            await self._drop_unfinished()
            await self._make_room()
            document = self._whole(self._copy)
            await self._copy.commit(lambda collection: collection.insert_one(document))
            self._is_over = True
            self._sessions._ensure_indexes()
            await self._copy.finish()
            return self._copy.session_id

    async def abandon(self) -> None:
        """Remove what was stored, unless the session is there."""
        async with self._turn, self._sessions._connection.operation():
            if not self._is_over and self._copy is not None:
                await self._copy.abandon()
            self._is_over = True

    def _check(self) -> None:
        if self._is_over:
            raise InvalidArgumentError("the import was given up")

    def _read(self, lines: Iterable[object]) -> list[Read]:
        return [found for line in lines if (found := self._reader.read(line)) is not None]

    async def _take(self, found: Read) -> None:
        match found:
            case SessionRead():
                await self._begin(found)
            case AgentRead():
                data = {"created_at": found.fields.get("created_at"), **(found.fields.get("agent_data") or {})}
                data.pop("config_set", None)
                fields = {**found.fields, "agent_data": {k: v for k, v in data.items() if v is not None}}
                if names := config_set(found.fields):
                    fields["config_set"] = sorted(names)
                self._agents.append(_Agent(agent_key(found.agent_id), fields, removed_messages(fields)))
            case MessageRead():
                await self._message(found)
            case PieceRead():
                await self._piece(found)

    async def _begin(self, found: SessionRead) -> None:
        session_id = found.session_id if self._session_id is None else self._session_id
        if await self._sessions._find(session_id, {"_id": 1}) is not None:
            raise SessionExistsError(f"session {session_id!r} exists already")
        self._copy = self._sessions._copy(session_id)
        await self._copy.begin(self._sessions._session_ttl)
        origin = self._copy.origin(found.session_id)
        self._document = {"_id": session_id, "session_id": session_id, **found.fields, "copy_of": origin}

    async def _message(self, found: MessageRead) -> None:
        agent, message, size = self._agents[-1], found.message, found.size
        if references_of(message):
            assert self._copy is not None
            message = in_generation(message, self._copy.generation)
            size = stored_size(message)
        agent.messages.append(message)
        agent.sizes.append(size)
        agent.next_id = message["message_id"] + 1
        limits = self._sessions._limits
        while limits.exceeded(agent.head):
            await self._archive(agent, limits.step(agent.head))

    async def _archive(self, agent: _Agent, step: Step) -> None:
        assert self._copy is not None
        count = min(taken(agent.sizes, step), BUCKET_MESSAGES)
        first, messages = agent.archived, agent.messages[:count]
        bucket = bucket_of(self._copy.session_id, agent.key, self._copy.moment, first, messages)
        await self._copy.put_bucket(bucket)
        agent.archived += count
        del agent.messages[:count], agent.sizes[:count]

    async def _make_room(self) -> None:
        """Archive more of what the limits allow in each head if all heads do not fit into one document."""
        by_size = sorted(self._agents, key=lambda agent: sum(agent.sizes), reverse=True)
        for agent in by_size:
            while len(agent.messages) > 1 and sum(sum(each.sizes) for each in self._agents) > _MOST_IN_DOCUMENT:
                await self._archive(agent, everything(agent.head))

    async def _piece(self, piece: PieceRead) -> None:
        copy = self._copy
        assert copy is not None
        reference = piece.reference._replace(generation=copy.generation)
        if piece.at == 0:
            await self._drop_unfinished()
            self._unfinished, self._chunks = reference, 0
        self._chunk += piece.data
        while len(self._chunk) >= CHUNK_BYTES or (piece.whole and self._chunk):
            data = bytes(self._chunk[:CHUNK_BYTES])
            del self._chunk[:CHUNK_BYTES]
            await self._sessions._attachments.put_chunk(
                copy.session_id, reference, self._chunks, data, copy.expires_from
            )
            self._chunks += 1
        if piece.whole:
            await self._sessions._attachments.put_entry(copy.session_id, reference, copy.expires_from)
            self._unfinished = None

    async def _drop_unfinished(self) -> None:
        if self._unfinished is not None and self._copy is not None:
            await self._sessions._attachments.drop_chunks(self._copy.session_id, self._unfinished)
        self._unfinished = None
        self._chunk.clear()

    def _whole(self, copy: Copy) -> Document:
        agents = {}
        for agent in self._agents:
            numbers = {"created_at": copy.moment, "next_message_id": agent.next_id}
            archived = {"archived": agent.archived} if agent.archived else {}
            agents[agent.key] = {**agent.fields, **numbers, **archived, "messages": agent.messages}
        return {**self._document, "attachments_generation": copy.generation, **copy.expiry, "agents": agents}


class SessionImports(SessionCopies):
    """The part of the repository that imports."""

    def _import(self, session_id: str | None) -> Import:
        return Import(self, None if session_id is None else checked_id(session_id, "session_id"))


async def feed(portal: Portal, session: Import, stream: object) -> str:
    """Import a session from a stream that is read on the running loop, or in threads, and stored on the portal's."""
    batches = _batches_async(stream) if hasattr(stream, "__aiter__") else _in_threads(_batches(stream))
    try:
        async for lines in batches:
            await portal.run(session.store, lines)
        return await portal.run(session.finish)
    except BaseException:
        await portal.run(session.abandon)
        raise


def feed_blocking(portal: Portal, session: Import, stream: object) -> str:
    """Import a session from a stream that is read on the calling thread."""
    try:
        for lines in _batches(stream):
            portal.call(session.store, lines)
        return portal.call(session.finish)
    except BaseException:
        portal.call(session.abandon)
        raise


async def _in_threads(batches: Iterator[list[Any]]) -> AsyncIterator[list[Any]]:
    def following() -> list[Any]:
        return next(batches, [])

    while lines := await asyncio.to_thread(following):
        yield lines


class _Batch:
    """Lines that are read in one go."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self._characters = 0

    def add(self, line: Any) -> bool:
        """Add a line; return whether it is enough."""
        self.lines.append(line)
        self._characters += len(line) if isinstance(line, str | bytes) else 0
        return len(self.lines) == _LINES or self._characters >= _CHARACTERS

    def take(self) -> list[Any]:
        """Return what was added since the last time."""
        lines, self.lines, self._characters = self.lines, [], 0
        return lines


def _batches(stream: Any) -> Iterator[list[Any]]:
    if isinstance(stream, str | bytes | bytearray | dict) or not hasattr(stream, "__iter__"):
        raise InvalidArgumentError(
            f"stream must be lines: an open file, or another iterable of str or bytes, not {type(stream).__name__}"
        )
    if callable(readline := getattr(stream, "readline", None)):
        stream = itertools.takewhile(bool, map(readline, itertools.repeat(MAX_LINE + 3)))
    batch = _Batch()
    for line in stream:
        if batch.add(line):
            yield batch.take()
    if batch.lines:
        yield batch.take()


async def _batches_async(stream: Any) -> AsyncIterator[list[Any]]:
    batch = _Batch()
    async for line in stream:
        if batch.add(line):
            yield batch.take()
    if batch.lines:
        yield batch.take()
