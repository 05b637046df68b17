"""Importing a session from the lines of its portable form, which come from an untrusted source.

Messages are added to the head of their agent, as in a conversation: beyond the limits, old messages move into a bucket.
The copy is staged, see `_staging`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from .._format.attachment_refs import Reference
from .._format.buckets import BUCKET_MESSAGES, Head, Step, bucket_of, everything, taken
from .._format.documents import Document, config_set, removed_messages
from .._format.ids import agent_key
from .._format.sizes import MAX_DOCUMENT_BYTES, stored_size
from .._io.portal import Portal
from .._store.attachments import CHUNK_BYTES
from .._store.store import SessionStore
from ..errors import InvalidArgumentError
from .export_format import MAX_LINE, AgentRead, MessageRead, PieceRead, Read, Reader, SessionRead
from .staging import Staging

_LINES = 256
_BYTES = 1024 * 1024
"""A batch is complete when it has this number of lines or of bytes."""

_READ = 64 * 1024
"""The most bytes or characters that are read from a file at a time."""

_ELEMENT = 12
"""The most bytes that an element of an array takes in addition to its value."""

_PART = 1024 * 1024
"""Bytes of a session document that one update stores.

A server with a small cache refuses to write a large document at once.
"""

_RESERVE = 16 * 1024
"""Bytes of the session document that an import leaves free for later additions."""


@dataclass
class _Agent:
    """An agent that is being imported."""

    key: str
    fields: Document
    removed: int
    archived: int = 0
    next_id: int = 0
    messages: list[Document] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """The size of the messages in the head, as elements of an array."""
        return sum(self.sizes) + _ELEMENT * len(self.sizes)

    @property
    def head(self) -> Head:
        end = self.archived + len(self.messages)
        size = sum(self.sizes)
        return Head(archived=self.archived, below=self.archived, next_id=end, size=size, removed=self.removed)


class Import:
    """A running import; calls are serialized.

    Args:
        store: The store of the session.
        session_id: The id of the new session; `None` for the id it was exported with.
    """

    def __init__(self, store: SessionStore, session_id: str | None) -> None:
        self._store = store
        self._session_id = session_id
        self._reader = Reader()
        self._staging: Staging | None = None
        self._document: Document = {}
        self._agents: list[_Agent] = []
        self._unfinished: Reference | None = None
        self._chunk = bytearray()
        self._chunks = 0
        self._turn = asyncio.Lock()
        self._is_over = False

    async def store(self, lines: Iterable[object]) -> None:
        """Read lines, and store the archived messages and the attachments."""
        async with self._turn, self._store.connection.operation():
            self._check()
            for found in await asyncio.to_thread(self._read, lines):
                await self._take(found)

    async def finish(self) -> str:
        """Store the session document, which makes the session live; return its id.

        Raises:
            InvalidArgumentError: The last line of the export is missing.
            SessionConflictError: Another process has removed the copy, because its lease was over.
        """
        async with self._turn, self._store.connection.operation():
            self._check()
            self._reader.check_end()
            staging = self._begun
            await self._drop_unfinished()
            await self._make_room()
            for part in await asyncio.to_thread(_parts_of, self._content()):
                await staging.fill(part)
            expiry = await staging.date(self._store.expiry.session_ttl)
            live = {
                "$unset": dict.fromkeys(("state", "state_by", "state_until"), ""),
                **({"$set": expiry} if expiry else {}),
            }
            await staging.go_live(live)
            self._is_over = True
            return staging.session_id

    async def abandon(self) -> None:
        """Remove the copy, unless the session is live."""
        async with self._turn, self._store.connection.operation():
            if not self._is_over and self._staging is not None:
                await self._staging.abandon()
            self._is_over = True

    @property
    def _begun(self) -> Staging:
        assert self._staging is not None  # the reader accepts no line before that of the session
        return self._staging

    def _check(self) -> None:
        if self._is_over:
            raise InvalidArgumentError("the import was abandoned")

    def _read(self, lines: Iterable[object]) -> list[Read]:
        return [found for line in lines if (found := self._reader.read(line)) is not None]

    async def _take(self, found: Read) -> None:
        match found:
            case SessionRead():
                await self._begin(found)
            case AgentRead():
                data = {k: v for k, v in (found.fields.get("agent_data") or {}).items() if v is not None}
                data.pop("config_set", None)
                fields = {**found.fields, "agent_data": data}
                if names := config_set(found.fields):
                    fields["config_set"] = sorted(names)
                self._agents.append(_Agent(agent_key(found.agent_id), fields, removed_messages(fields)))
            case MessageRead():
                await self._message(found)
            case PieceRead():
                await self._piece(found)

    async def _begin(self, found: SessionRead) -> None:
        session_id = found.session_id if self._session_id is None else self._session_id
        self._staging = Staging(self._store, session_id)
        origin = {"session_id": found.session_id, "at": self._store.connection.now()}
        self._document = {**found.fields, "copy_of": origin}
        await self._staging.begin()

    async def _message(self, found: MessageRead) -> None:
        agent, message = self._agents[-1], found.message
        agent.messages.append(message)
        agent.sizes.append(found.size)
        agent.next_id = message["message_id"] + 1
        limits = self._store.mover.limits
        while limits.exceeded(agent.head):
            await self._archive(agent, limits.step(agent.head))

    async def _archive(self, agent: _Agent, step: Step) -> None:
        count = min(taken(agent.sizes, step), BUCKET_MESSAGES)
        first, messages = agent.archived, agent.messages[:count]
        bucket = bucket_of(self._begun.place, agent.key, first, messages)
        condition = {"_id": bucket["_id"]}
        archive = self._store.archive.collection
        await archive.send(lambda buckets: buckets.replace_one(condition, bucket, upsert=True))
        agent.archived += count
        del agent.messages[:count], agent.sizes[:count]

    async def _make_room(self) -> None:
        """Archive more messages than the limits require if the heads do not fit into one document."""
        frame = self._content()
        frame["agents"] = {key: {**agent, "archived": 0, "messages": []} for key, agent in frame["agents"].items()}
        room = MAX_DOCUMENT_BYTES - _RESERVE - await asyncio.to_thread(stored_size, frame)
        if room < 0:
            del self._document["copy_of"]
        sizes = [agent.size for agent in self._agents]
        total = sum(sizes)
        for size, agent in sorted(zip(sizes, self._agents, strict=True), key=itemgetter(0), reverse=True):
            total -= size
            while agent.messages and total + agent.size > room:
                await self._archive(agent, everything(agent.head))
            total += agent.size

    async def _piece(self, piece: PieceRead) -> None:
        attachments, place, reference = self._store.attachments, self._begun.place, piece.reference
        if piece.at == 0:
            await self._drop_unfinished()
            self._unfinished, self._chunks = reference, 0
        self._chunk += piece.data
        while len(self._chunk) >= CHUNK_BYTES or (piece.whole and self._chunk):
            data = bytes(self._chunk[:CHUNK_BYTES])
            del self._chunk[:CHUNK_BYTES]
            await attachments.put_chunk(place, reference, self._chunks, data)
            self._chunks += 1
        if piece.whole:
            await attachments.put_entry(place, reference)
            self._unfinished = None

    async def _drop_unfinished(self) -> None:
        if self._unfinished is not None:
            await self._store.attachments.drop_chunks(self._begun.place, self._unfinished)
        self._unfinished = None
        self._chunk.clear()

    def _content(self) -> Document:
        agents = {}
        for agent in self._agents:
            archived = {"archived": agent.archived} if agent.archived else {}
            agents[agent.key] = {
                **agent.fields,
                "next_message_id": agent.next_id,
                **archived,
                "messages": agent.messages,
            }
        return {**self._document, "agents": agents}


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
    if type(value) is dict:
        return all(key and "." not in key and not key.startswith("$") for key in value)
    return type(value) is list


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


class _Lines:
    """Makes batches of lines from the parts of a stream, which can be chunks or lines.

    A line ends with a line feed. It also ends between a part that ends with an object and a part that begins with one,
    because the lines of a list can have no line feeds.
    """

    def __init__(self) -> None:
        self._batch: list[Any] = []
        self._size = 0
        self._begin_line()

    def add(self, part: Any) -> Iterator[list[Any]]:
        """Add a part; yield the batches that are complete."""
        if isinstance(part, str):
            part = part.encode(errors="surrogatepass")  # the reader refuses a surrogate, and names the line
        elif isinstance(part, bytearray | memoryview):
            part = bytes(part)
        if not isinstance(part, bytes):
            yield from self._end_line()
            yield from self._line(part)
            return
        if part.startswith(b"{") and self._is_object():
            yield from self._end_line()
        begin = 0
        while (end := part.find(b"\n", begin)) >= 0:
            self._rest.append(part[begin : end + 1])
            yield from self._end_line()
            begin = end + 1
        if begin < len(part):
            self._continue_line(part[begin:])
            if self._length > MAX_LINE + 2:
                yield from self._end_line()  # the reader refuses it

    def end(self) -> Iterator[list[Any]]:
        """Yield the batches that are left."""
        yield from self._end_line()
        if self._batch:
            yield self._batch

    def _begin_line(self) -> None:
        self._rest: list[bytes] = []
        self._length = self._quotes = 0
        self._is_escaped = False

    def _continue_line(self, part: bytes) -> None:
        self._rest.append(part)
        self._length += len(part)
        unescaped = part[self._is_escaped :].replace(b"\\\\", b"")
        self._is_escaped = unescaped.endswith(b"\\")
        self._quotes += unescaped.replace(b'\\"', b"").count(b'"')

    def _is_object(self) -> bool:
        """Return whether an object ends here: outside of strings, JSON has no two adjacent objects."""
        return bool(self._rest) and self._rest[-1].rstrip().endswith(b"}") and self._quotes % 2 == 0

    def _end_line(self) -> Iterator[list[Any]]:
        if self._rest:
            line = b"".join(self._rest)
            self._begin_line()
            yield from self._line(line)

    def _line(self, line: Any) -> Iterator[list[Any]]:
        self._batch.append(line)
        self._size += len(line) if isinstance(line, bytes) else 0
        if len(self._batch) >= _LINES or self._size >= _BYTES:
            batch, self._batch, self._size = self._batch, [], 0
            yield batch


def _batches(stream: Any) -> Iterator[list[Any]]:
    if isinstance(stream, str | bytes | bytearray | memoryview | dict) or not hasattr(stream, "__iter__"):
        raise InvalidArgumentError(
            "stream must be an open file, or an iterable or asynchronous iterable of str or bytes, not "
            f"{type(stream).__name__}"
        )
    if callable(readline := getattr(stream, "readline", None)):
        stream = itertools.takewhile(bool, map(readline, itertools.repeat(_READ)))
    lines = _Lines()
    for part in stream:
        yield from lines.add(part)
    yield from lines.end()


async def _batches_async(stream: Any) -> AsyncIterator[list[Any]]:
    lines = _Lines()
    async for part in stream:
        for batch in lines.add(part):
            yield batch
    for batch in lines.end():
        yield batch
