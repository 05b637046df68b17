"""Importing a session from lines of the export format, which come from an untrusted source.

The copy is staged, see `staging`, and built while it is read, see `builder`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from .._format.attachment_refs import Reference
from .._format.content import HAS_CONTENT
from .._format.documents import Document, config_set
from .._format.ids import agent_key
from .._format.keys import copied_key
from .._format.labels import labels_of, owner_of
from .._io.portal import Portal
from .._store.attachments import CHUNK_BYTES
from .._store.content import Upload
from .._store.store import SessionStore
from ..errors import InvalidArgumentError
from .builder import SessionBuilder
from .export_format import MAX_LINE, AgentRead, MessageRead, PieceRead, Read, Reader, SessionRead, ValueRead
from .staging import Staging

_LINES = 256
_BYTES = 1024 * 1024
"""A batch is complete when it has this number of lines or of bytes."""

_READ = 64 * 1024
"""The maximum number of bytes or characters that are read from a file at a time."""


class Import:
    """A running import; calls are serialized.

    Without a `session_id` or an `owner`, the session gets the one that it was exported with.
    """

    def __init__(self, store: SessionStore, session_id: str | None, owner: str | None = None) -> None:
        self._store = store
        self._owner = owner
        self._session_id = session_id
        self._reader = Reader()
        self._builder: SessionBuilder | None = None
        self._unfinished: Reference | None = None
        self._chunk = bytearray()
        self._chunks = 0
        self._upload: Upload | None = None
        self._has_content = False
        self._exported_id = ""
        self._turn = asyncio.Lock()
        self._is_over = False

    async def store(self, lines: Iterable[object]) -> None:
        async with self._turn, self._store.connection.operation():
            self._check()
            for found in await asyncio.to_thread(self._read, lines):
                await self._take(found)

    async def finish(self) -> str:
        """Store the session document, which makes the session live; return its id.

        Raises:
            InvalidArgumentError: The last line of the export is missing.
            SessionConflictError: Another process has removed the copy, because its lease had expired.
        """
        async with self._turn, self._store.connection.operation():
            self._check()
            self._reader.check_end()
            await self._drop_unfinished()
            await self._begun.fill()
            staging = self._begun.staging
            content = {HAS_CONTENT: True} if self._has_content else {}
            await staging.go_live({**await staging.date(self._store.expiry.session_ttl), **content})
            self._is_over = True
            return staging.session_id

    async def abandon(self) -> None:
        async with self._turn, self._store.connection.operation():
            if not self._is_over and self._builder is not None:
                await self._builder.staging.abandon()
            self._is_over = True

    @property
    def _begun(self) -> SessionBuilder:
        assert self._builder is not None  # the reader accepts no line before that of the session
        return self._builder

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
                self._begun.add_agent(agent_key(found.agent_id), _agent_fields(found.fields))
            case MessageRead():
                await self._begun.add_message(found.message, found.size)
            case PieceRead():
                await self._piece(found)
            case ValueRead():
                await self._value(found)

    async def _begin(self, found: SessionRead) -> None:
        session_id = found.session_id if self._session_id is None else self._session_id
        self._exported_id = found.session_id
        staging = Staging(self._store, session_id)
        origin = {"session_id": found.session_id, "at": self._store.connection.now()}
        fields = {**found.fields, **labels_of(self._owner), "copy_of": origin}
        self._builder = SessionBuilder(self._store, staging, fields)
        await staging.begin(owner_of(fields))

    async def _piece(self, piece: PieceRead) -> None:
        attachments, place, reference = self._store.attachments, self._begun.staging.place, piece.reference
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

    async def _value(self, value: ValueRead) -> None:
        staging = self._begun.staging
        if value.at == 0:
            key = copied_key(value.key, self._exported_id, staging.session_id)
            self._upload = self._store.content.upload(staging.place, key, value.size)
        assert self._upload is not None  # the reader accepts no other piece
        await self._upload.add(value.data)
        if value.whole:
            await self._upload.finish()
            self._has_content = True

    async def _drop_unfinished(self) -> None:
        if self._unfinished is not None:
            await self._store.attachments.drop_chunks(self._begun.staging.place, self._unfinished)
        self._unfinished = None
        self._chunk.clear()


def _agent_fields(fields: Document) -> Document:
    data = {name: value for name, value in (fields.get("agent_data") or {}).items() if value is not None}
    data.pop("config_set", None)
    names = config_set(fields)
    return {**fields, "agent_data": data, **({"config_set": sorted(names)} if names else {})}


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
    try:
        for lines in _batches(stream):
            portal.call(session.store, lines)
        return portal.call(session.finish)
    except BaseException:
        portal.call(session.abandon)
        raise


async def _in_threads(batches: Iterator[list[Any]]) -> AsyncIterator[list[Any]]:
    lines: list[Any]
    while lines := await asyncio.to_thread(next, batches, []):
        yield lines


class _Lines:
    """Collects the parts of a stream, which are lines or chunks, into batches of lines.

    A line ends with a line feed. It also ends between a part that ends with an object and a part that begins with one:
    the items of a list of lines can have no line feeds.
    """

    def __init__(self) -> None:
        self._batch: list[Any] = []
        self._size = 0
        self._begin_line()

    def add(self, part: Any) -> Iterator[list[Any]]:
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
