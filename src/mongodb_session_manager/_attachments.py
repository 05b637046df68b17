"""Large attachments of messages, in the GridFS bucket `<collection>_attachments`; any GridFS client reads it.

A file's `_id` is `{session_id, sha256, generation}`, that of a chunk `{file, n}`: what a session holds once is stored
once, all of a session lies in one range of either index, and storing anything again changes nothing. The entry in
`.files` is written last, so a file that has one is whole, and whoever finds none stores all of it.

Files are stored before the message that refers to them, and removed when no message of the session does any more. So
that nobody refers to a file while somebody else removes it, the session's document counts generations: removing begins
with a new one, and a message with attachments is only stored in the generation in which its writer made sure of them.
Each session begins to count at another number, see `_beside`, where `expires_from` is explained as well.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from bson import MaxKey
from pymongo import ReturnDocument

from ._beside import ARCHIVE, CHUNKS, FILES, FOREVER, Keeping, beside, kept_from, within, within_chunks
from ._changes import AgentWrite
from ._commands import ensure_indexes, send
from ._connection import AsyncCollection, Connection, run_pipeline
from ._documents import Document, array_at, entries_at, message_id_of, now
from ._driver_errors import DuplicateKeyError
from ._references import Reference, attached, detached, references_of
from .errors import AttachmentError, SessionNotFoundError

T = TypeVar("T")

CHUNK_BYTES = 2 * 1024 * 1024

_KNOWN_SESSIONS = 64
_KNOWN_FILES = 256
_COPIED_AT_ONCE = 64

_REFERENCES: Document = {
    **dict.fromkeys(("attachments_generation", "session_ttl", "keep_until"), 1),
    "attachments": {
        "$map": {
            "input": entries_at("$agents"),
            "in": array_at("$$this.v.messages.attachments"),
        }
    },
}


class StaleAttachments(Exception):
    """Attachments were removed since a writer made sure of its own; `document` is the session, read since then."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        super().__init__()
        self.document = document


@dataclass
class _Known:
    """Files that are there, by SHA-256, as long as the session's generation is this one."""

    generation: int = 0
    keeping: Keeping = FOREVER
    files: dict[str, Reference] = field(default_factory=dict)

    def add(self, references: Iterable[Reference]) -> None:
        for reference in references:
            self.files.pop(reference.sha256, None)
            self.files[reference.sha256] = reference
            if len(self.files) > _KNOWN_FILES:
                del self.files[next(iter(self.files))]


class Attachments:
    """The attachments of a collection of sessions.

    Args:
        connection: The connection of the sessions.
        database_name: Their database.
        collection_name: Their collection.
    """

    def __init__(self, connection: Connection, database_name: str, collection_name: str) -> None:
        self._connection = connection
        self._database_name = database_name
        self._collection_name = collection_name
        self._known: dict[str, _Known] = {}

    async def _send(self, suffix: str, command: Callable[[AsyncCollection], Awaitable[T]]) -> T:
        return await send(self._connection, self._database_name, f"{self._collection_name}{suffix}", command)

    def learn(self, session_id: str, document: Mapping[str, Any], references: Iterable[Reference] = ()) -> None:
        """Take note of a session's generation and of what it refers to, read in one command."""
        self._known.pop(session_id, None)
        self._known[session_id] = known = _Known(document.get("attachments_generation") or 0, Keeping.of(document))
        known.add(references)
        if len(self._known) > _KNOWN_SESSIONS:
            del self._known[next(iter(self._known))]

    # Storing.

    async def store(self, session_id: str, writes: Iterable[AgentWrite]) -> None:
        """Store what was set aside from the messages of writes, and put references into the writes.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        writes = [write for write in writes if any(_set_aside([*write.contents(), *write.earlier_contents()]))]
        if not writes:
            return
        if session_id not in self._known:
            self.learn(session_id, await self._document(session_id))
        known = self._known[session_id]
        expires_from = known.keeping.expires_from(now())
        needed = {id(data): data for write in writes for data in _set_aside(write.contents())}
        aside = needed | {id(data): data for write in writes for data in _set_aside(write.earlier_contents())}
        digests = await asyncio.to_thread(_digests, aside)
        sent = {digests[key]: data for key, data in needed.items()}
        stored = await self._ensure_stored(session_id, known, sent, expires_from)
        references = {
            key: str(stored.get(sha256) or Reference(sha256, len(aside[key]), known.generation))
            for key, sha256 in digests.items()
        }
        for write in writes:
            write.exchange(lambda message: detached(message, references) if message.get("attachments") else message)
            write.generation, write.expires_from = known.generation, expires_from

    async def _document(self, session_id: str) -> Document:
        projection = dict.fromkeys(("attachments_generation", "session_ttl", "keep_until"), 1)
        document = await self._send("", lambda sessions: sessions.find_one({"_id": session_id}, projection))
        if document is None:
            raise SessionNotFoundError(f"session {session_id!r} does not exist any more")
        return document

    async def _ensure_stored(
        self, session_id: str, known: _Known, blobs: Mapping[str, bytes], expires_from: datetime | None
    ) -> dict[str, Reference]:
        """Store what is not there of contents by SHA-256; return what to refer to."""
        stored = {sha256: known.files[sha256] for sha256 in blobs if sha256 in known.files}
        new = {sha256: Reference(sha256, len(blobs[sha256]), known.generation) for sha256 in blobs.keys() - stored}
        if new:
            condition = {"_id": {"$in": [_file_id(session_id, reference) for reference in new.values()]}}
            there = await self._send(FILES, lambda files: _file_ids(files, condition))
            for sha256, reference in new.items():
                if (file := _file_id(session_id, reference)) not in there:
                    await self._upload(file, blobs[sha256], expires_from)
                else:
                    stored[sha256] = reference
        if stored and expires_from is not None:
            await self._keep([_file_id(session_id, reference) for reference in stored.values()], expires_from)
        known.add(new.values())
        known.add(stored.values())
        return stored | new

    async def _keep(self, files: list[Document], expires_from: datetime) -> None:
        """Keep files that were there already: as long as nobody refers to one, nobody may have renewed it."""
        kept = {"$max": {"expires_from": expires_from}}
        for suffix, condition in ((CHUNKS, {"files_id": {"$in": files}}), (FILES, {"_id": {"$in": files}})):
            await self._send(suffix, partial(_update_many, condition, kept))

    async def _upload(self, file: Document, data: bytes, expires_from: datetime | None) -> None:
        for n, start in enumerate(range(0, len(data), CHUNK_BYTES)):
            await self._insert_chunk(file, n, data[start : start + CHUNK_BYTES], expires_from)
        await self._insert_entry(file, len(data), expires_from)

    async def _insert_chunk(self, file: Document, n: int, data: bytes, expires_from: datetime | None) -> None:
        chunks_name = f"{self._collection_name}{CHUNKS}"
        ensure_indexes(self._connection, self._database_name, chunks_name, [("files_id", "n")], unique=True)
        chunk = {"_id": {"file": file, "n": n}, "files_id": file, "n": n, "data": data}
        await self._insert(CHUNKS, {**chunk, **kept_from(expires_from)})

    async def _insert_entry(self, file: Document, length: int, expires_from: datetime | None) -> None:
        entry = {
            "_id": file,
            "length": length,
            "chunkSize": CHUNK_BYTES,
            "uploadDate": now(),
            "filename": file["sha256"],
            **kept_from(expires_from),
        }
        await self._insert(FILES, entry)

    async def _insert(self, suffix: str, document: Document) -> None:
        try:
            await self._send(suffix, lambda collection: collection.insert_one(document))
        except DuplicateKeyError:  # the same, by somebody else or an attempt whose acknowledgement was lost
            if "expires_from" in document:
                kept = {"$max": {"expires_from": document["expires_from"]}}
                await self._send(suffix, partial(_update_many, {"_id": document["_id"]}, kept))

    # Reading.

    async def restore(self, session_id: str, messages: Mapping[str, list[Document]]) -> None:
        """Put the bytes back into the stored messages of agents, by agent id, in place.

        Raises:
            AttachmentError: An attachment is missing or is not what was stored.
        """
        wanted: dict[Reference, str] = {}
        for agent_id, elements in messages.items():
            for position, element in enumerate(elements):
                for reference in references_of(element):
                    wanted.setdefault(reference, f"message {message_id_of(element, position)} of agent {agent_id!r}")
        if not wanted:
            return
        async with self._connection.operation():
            parts = await self._send(CHUNKS, lambda chunks: _parts(chunks, session_id, wanted))
            blobs = await asyncio.to_thread(_joined, parts)
        for reference, where in wanted.items():
            if str(reference) not in blobs:
                raise AttachmentError(
                    f"session {session_id!r}: {where} holds an attachment of {reference.length} bytes that is missing "
                    f"or damaged in {f'{self._collection_name}_attachments'!r} (SHA-256 {reference.sha256})"
                )
        for elements in messages.values():
            elements[:] = [attached(element, blobs) if references_of(element) else element for element in elements]

    # Copying, of which a session has a generation of its own.

    async def chunk(self, session_id: str, reference: Reference, n: int) -> bytes | None:
        """Return the bytes of a chunk, `None` if it is not there."""
        condition = {"_id": {"file": _file_id(session_id, reference), "n": n}}
        found = await self._send(CHUNKS, lambda chunks: chunks.find_one(condition, {"data": 1}))
        return None if found is None else found["data"]

    async def put_chunk(
        self, session_id: str, reference: Reference, n: int, data: bytes, expires_from: datetime | None
    ) -> None:
        """Store a chunk of a file that is not whole yet; all but the last are of `CHUNK_BYTES`."""
        await self._insert_chunk(_file_id(session_id, reference), n, data, expires_from)

    async def put_entry(self, session_id: str, reference: Reference, expires_from: datetime | None) -> None:
        """Make a file of its chunks."""
        await self._insert_entry(_file_id(session_id, reference), reference.length, expires_from)

    async def drop_chunks(self, session_id: str, reference: Reference) -> None:
        """Remove the chunks of a file that never became whole."""
        file = _file_id(session_id, reference)
        if await self._send(FILES, lambda files: files.find_one({"_id": file}, {"_id": 1})) is None:
            condition = {"_id": {"$gte": {"file": file}, "$lte": {"file": file, "n": MaxKey()}}}
            await self._send(CHUNKS, lambda chunks: chunks.delete_many(condition))

    async def copy(
        self,
        session_id: str,
        references: Sequence[Reference],
        new_id: str,
        generation: int,
        expires_from: datetime | None,
    ) -> bool:
        """Copy files of a session, on the server, to a generation of another; return whether all were there."""
        new = {"session_id": {"$literal": new_id}, "sha256": "$file.sha256", "generation": {"$literal": generation}}
        chunk = {"_id": {"file": new, "n": "$n"}, "files_id": new, "n": "$n", "data": "$data"}
        entry = {"_id": new, **{name: f"${name}" for name in ("length", "chunkSize", "uploadDate", "filename")}}
        chunk, entry = ({**document, **kept_from(expires_from)} for document in (chunk, entry))
        for begin in range(0, len(references), _COPIED_AT_ONCE):
            files = [_file_id(session_id, reference) for reference in references[begin : begin + _COPIED_AT_ONCE]]
            ranges = [{"_id": {"$gte": {"file": file}, "$lte": {"file": file, "n": MaxKey()}}} for file in files]
            await self._copy(CHUNKS, {"$or": ranges}, "$files_id", chunk)
            await self._copy(FILES, {"_id": {"$in": files}}, "$_id", entry)
        digests = {reference.sha256 for reference in references}
        copied = {"_id": within(new_id, "sha256"), "_id.generation": generation}
        return await self._send(FILES, lambda files: files.count_documents(copied)) >= len(digests)

    async def _copy(self, suffix: str, condition: Document, file: str, new: Document) -> None:
        into = {"into": f"{self._collection_name}{suffix}", "whenMatched": "keepExisting", "whenNotMatched": "insert"}
        pipeline = [{"$match": condition}, {"$set": {"file": file}}, {"$replaceWith": new}, {"$merge": into}]
        await self._send(suffix, lambda collection: run_pipeline(collection, pipeline))

    async def drop_generation(self, session_id: str, generation: int) -> None:
        """Remove all files of one generation of a session."""
        ours = {"_id": within_chunks(session_id), "files_id.generation": generation}
        await self._send(CHUNKS, lambda chunks: chunks.delete_many(ours))
        ours = {"_id": within(session_id, "sha256"), "_id.generation": generation}
        await self._send(FILES, lambda files: files.delete_many(ours))

    # Removing.

    async def has_any(self, session_id: str) -> bool:
        """Tell whether a session has attachments."""
        condition = {"_id": within(session_id, "sha256")}
        return await self._send(FILES, lambda files: files.find_one(condition, {"_id": 1})) is not None

    async def remove_refused(self, session_id: str, generation: int) -> None:
        """Remove what was stored in a generation for messages that were refused because the session was deleted."""
        if await self._send("", lambda sessions: sessions.find_one({"_id": session_id}, {"_id": 1})) is not None:
            await self.remove_unreferenced(session_id)  # it is back, but these messages are not
            return
        for suffix, condition in beside(session_id, generation):
            await self._send(suffix, partial(_delete_many, condition))

    async def remove_unreferenced(self, session_id: str) -> None:
        """Remove the attachments that no message of a session refers to.

        If it is interrupted, the next call for the session removes what is left.
        """
        if not await self.has_any(session_id):
            return
        document = await self._send(
            "",
            lambda sessions: sessions.find_one_and_update(
                {"_id": session_id},
                {"$inc": {"attachments_generation": 1}},
                projection=_REFERENCES,
                return_document=ReturnDocument.AFTER,
            ),
        )
        if document is None:
            return
        # What is moved to the archive meanwhile was in the head.
        used = {reference for messages in document["attachments"] for reference in _parsed(messages)}
        self.learn(session_id, document, used)
        used |= await self._send(ARCHIVE, lambda archive: _archived(archive, session_id))
        kept = [_file_id(session_id, reference) for reference in used]
        earlier = {"$lt": document["attachments_generation"]}
        chunks = {"_id": within_chunks(session_id), "files_id": {"$nin": kept}, "files_id.generation": earlier}
        files = {"_id": {**within(session_id, "sha256"), "$nin": kept}, "_id.generation": earlier}
        # Chunks first: an entry in `.files` is how what is left after an interruption is found again.
        await self._send(CHUNKS, lambda collection: collection.delete_many(chunks))
        await self._send(FILES, lambda collection: collection.delete_many(files))


def _file_id(session_id: str, reference: Reference) -> Document:
    return {"session_id": session_id, "sha256": reference.sha256, "generation": reference.generation}


async def _update_many(condition: Document, update: Document, collection: AsyncCollection) -> None:
    await collection.update_many(condition, update)


async def _delete_many(condition: Document, collection: AsyncCollection) -> None:
    await collection.delete_many(condition)


def _parsed(messages: Iterable[Any]) -> set[Reference]:
    """Return what the `attachments` of several messages list."""
    return {reference for listed in messages for reference in references_of({"attachments": listed})}


def _set_aside(messages: Iterable[Mapping[str, Any]]) -> Iterable[bytes]:
    return (data for message in messages for data in message.get("attachments") or ())


def _digests(blobs: Mapping[int, bytes]) -> dict[int, str]:
    return {key: hashlib.sha256(data).hexdigest() for key, data in blobs.items()}


async def _archived(archive: AsyncCollection, session_id: str) -> set[Reference]:
    """Return what the archived messages of a session refer to."""
    buckets = archive.find({"_id": within(session_id, "agent")}, {"messages.attachments": 1})
    return {
        reference
        async for bucket in buckets
        for reference in _parsed(message.get("attachments") for message in bucket["messages"] if type(message) is dict)
    }


async def _file_ids(files: AsyncCollection, condition: Document) -> list[Document]:
    return [entry["_id"] async for entry in files.find(condition, {"_id": 1})]


async def _parts(
    chunks: AsyncCollection, session_id: str, references: Iterable[Reference]
) -> dict[Reference, list[bytes]]:
    """Return the chunks of several files, in order, from one query."""
    parts: dict[tuple[str, int], tuple[Reference, list[bytes]]] = {}
    ranges = []
    for reference in references:
        parts[reference.sha256, reference.generation] = (reference, [])
        file = _file_id(session_id, reference)
        ranges.append({"_id": {"$gte": {"file": file}, "$lte": {"file": file, "n": MaxKey()}}})
    async for chunk in chunks.find({"$or": ranges}, sort=[("_id", 1)]):
        file = chunk["files_id"]
        parts[file["sha256"], file["generation"]][1].append(chunk["data"])
    return dict(parts.values())


def _joined(parts: dict[Reference, list[bytes]]) -> dict[str, bytes]:
    """Return the contents that are what their references say, by reference."""
    blobs = {}
    for reference in tuple(parts):
        data = b"".join(parts.pop(reference))
        if len(data) == reference.length and hashlib.sha256(data).hexdigest() == reference.sha256:
            blobs[str(reference)] = data
    return blobs
