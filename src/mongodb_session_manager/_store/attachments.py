"""Large attachments of messages, in the GridFS bucket `<collection>_attachments`; any GridFS client reads it.

An attachment belongs to one message. The `_id` of its file is `{incarnation, sha256, token}`, the `_id` of a chunk
`{file, n}`. So storing a chunk twice changes nothing, and one range of `_id` holds all files of a session. The entry in
`.files` is stored last: a file that has one is complete.

Files are stored before the message that refers to them. A statement that replaces a message moves the references of the
old content to `removed_attachments` of the same document; then the files that no message refers to are removed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from .._format.attachment_refs import Attachment, Reference, attached, detached, references_of
from .._format.changes import AgentWrite
from .._format.documents import Document
from .._format.expressions import array_at, entries_at
from .._format.ids import message_id_of
from .._format.layout import ARCHIVE, CHUNKS, FILES, Place
from .._format.retention import Dates
from .._io.collection import ensure_indexes, send
from .._io.connection import AsyncCollection, Connection, run_pipeline
from .._io.driver_errors import DuplicateKeyError
from ..errors import AttachmentError

T = TypeVar("T")

CHUNK_BYTES = 2 * 1024 * 1024

_AT_ONCE = 64

_NAMED: Document = {
    "attachments": {"$map": {"input": entries_at("$agents"), "in": array_at("$$this.v.messages.attachments")}}
}


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

    async def _send(self, suffix: str, command: Callable[[AsyncCollection], Awaitable[T]]) -> T:
        return await send(self._connection, self._database_name, f"{self._collection_name}{suffix}", command)

    # Storing.

    async def store(self, place: Place, writes: Iterable[AgentWrite], dates: Dates) -> None:
        """Store the attachments of writes, and put references into the writes.

        Args:
            place: The session.
            writes: The writes.
            dates: The dates of the files.
        """
        writes = [write for write in writes if any(_attachments([*write.contents(), *write.earlier_contents()]))]
        needed = {id(each.data): each for write in writes for each in _attachments(write.contents())}
        known = needed | {id(each.data): each for write in writes for each in _attachments(write.earlier_contents())}
        references = await asyncio.to_thread(_references_to, known) if known else {}
        for write in writes:
            write.stored = [references[id(each.data)] for each in _attachments(write.contents())]
            write.dates = dates
        for key, attachment in needed.items():
            await self._upload(place, references[key], attachment.data, dates.expires_at)
        texts = {key: str(reference) for key, reference in references.items()}
        for write in writes:
            write.exchange(lambda message: detached(message, texts) if message.get("attachments") else message)

    async def _upload(self, place: Place, reference: Reference, data: bytes, date: datetime | None) -> None:
        for n, start in enumerate(range(0, len(data), CHUNK_BYTES)):
            await self.put_chunk(place, reference, n, data[start : start + CHUNK_BYTES], date)
        await self.put_entry(place, reference, date)

    async def put_chunk(
        self, place: Place, reference: Reference, n: int, data: bytes, date: datetime | None = None
    ) -> None:
        """Store a chunk of a file that is not complete yet; all chunks except the last have `CHUNK_BYTES`."""
        chunks_name = f"{self._collection_name}{CHUNKS}"
        ensure_indexes(self._connection, self._database_name, chunks_name, [("files_id", "n")])
        chunk = {"_id": place.chunk_id(reference, n), "files_id": place.file_id(reference), "n": n, "data": data}
        await self._insert(CHUNKS, {**chunk, "session_id": place.session_id}, date)

    async def put_entry(self, place: Place, reference: Reference, date: datetime | None = None) -> None:
        """Store the entry that completes a file; its chunks must be stored."""
        entry = {
            "_id": place.file_id(reference),
            "length": reference.length,
            "chunkSize": CHUNK_BYTES,
            "uploadDate": self._connection.now(),
            "filename": reference.sha256,
            "session_id": place.session_id,
        }
        await self._insert(FILES, entry, date)

    async def _insert(self, suffix: str, document: Document, date: datetime | None) -> None:
        if date is not None:
            document["expires_at"] = date
        try:
            await self._send(suffix, lambda collection: collection.insert_one(document))
        except DuplicateKeyError:  # an earlier attempt stored it
            if date is not None:
                later = {"$max": {"expires_at": date}}
                await self._send(suffix, lambda collection: collection.update_one({"_id": document["_id"]}, later))

    # Reading.

    async def restore(self, place: Place, messages: Mapping[str, list[Document]]) -> None:
        """Replace the references in stored messages by the bytes, in place. `messages` maps agent ids to messages.

        Raises:
            AttachmentError: An attachment is missing or damaged.
        """
        wanted: dict[Reference, str] = {}
        for agent_id, elements in messages.items():
            for position, element in enumerate(elements):
                for reference in references_of(element):
                    wanted.setdefault(reference, f"message {message_id_of(element, position)} of agent {agent_id!r}")
        if not wanted:
            return
        async with self._connection.operation():
            parts = await self._send(CHUNKS, lambda chunks: _parts(chunks, place, wanted))
            blobs = await asyncio.to_thread(_joined, parts)
        if missing := [reference for reference in wanted if str(reference) not in blobs]:
            error = AttachmentError(
                f"session {place.session_id!r}: {wanted[missing[0]]} holds an attachment of {missing[0].length} bytes "
                f"that is missing or damaged in {f'{self._collection_name}_attachments'!r} "
                f"(SHA-256 {missing[0].sha256})"
            )
            error.references = tuple(map(str, missing))
            raise error
        for elements in messages.values():
            elements[:] = [attached(element, blobs) if references_of(element) else element for element in elements]

    # Copying.

    async def chunk(self, place: Place, reference: Reference, n: int) -> bytes | None:
        """Return the bytes of a chunk, `None` if it is not stored."""
        condition = {"_id": {"$in": [each.chunk_id(reference, n) for each in _places(place, reference)]}}
        found = await self._send(CHUNKS, lambda chunks: chunks.find_one(condition, {"data": 1}))
        return None if found is None else found["data"]

    async def drop_chunks(self, place: Place, reference: Reference) -> None:
        """Remove the chunks of a file that was not completed."""
        file = place.file_id(reference)
        if await self._send(FILES, lambda files: files.find_one({"_id": file}, {"_id": 1})) is None:
            await self._send(CHUNKS, partial(_delete_many, {"_id": place.chunks_of(reference)}))

    async def copy(self, source: Place, references: Sequence[Reference], target: Place) -> list[Reference]:
        """Copy files to another session, on the server; return the references whose files are missing."""
        missing = []
        for begin in range(0, len(references), _AT_ONCE):
            batch = references[begin : begin + _AT_ONCE]
            ranges = [{"_id": each.chunks_of(one)} for one in batch for each in _places(source, one)]
            files = [each.file_id(one) for one in batch for each in _places(source, one)]
            await self._copy(CHUNKS, {"$or": ranges}, target)
            await self._copy(FILES, {"_id": {"$in": files}}, target)
            copied = {"_id": {"$in": [target.file_id(reference) for reference in batch]}}
            there = await self._send(FILES, partial(_ids, copied))
            missing += [reference for reference in batch if target.file_id(reference) not in there]
        return missing

    async def copy_from_v1(self, source: Place, target: Place) -> None:
        """Copy all files of a session from the ids of 1.0.0."""
        await self._copy(CHUNKS, {"_id": source.chunks()}, target)
        await self._copy(FILES, {"_id": source.files()}, target)

    async def _copy(self, suffix: str, condition: Document, target: Place) -> None:
        file = "$files_id" if suffix == CHUNKS else "$_id"
        token = {"$ifNull": [f"{file}.token", {"$toString": f"{file}.generation"}]}
        new = {"incarnation": target.incarnation, "sha256": f"{file}.sha256", "token": token}
        session_id = {"$literal": target.session_id}
        if suffix == CHUNKS:
            copied = {"_id": {"file": new, "n": "$n"}, "files_id": new, "n": "$n", "data": "$data"}
        else:
            copied = {"_id": new, **{name: f"${name}" for name in ("length", "chunkSize", "uploadDate", "filename")}}
        into = {"into": f"{self._collection_name}{suffix}", "whenMatched": "keepExisting", "whenNotMatched": "insert"}
        pipeline = [{"$match": condition}, {"$replaceWith": {**copied, "session_id": session_id}}, {"$merge": into}]
        await self._send(suffix, lambda collection: run_pipeline(collection, pipeline))

    # Removing.

    async def remove_unnamed(self, place: Place, references: Sequence[Reference]) -> None:
        """Remove files, except those that a message of the session refers to: in 1.0.0, messages shared files."""
        if not references:
            return
        named = await self._send("", partial(_named_in_head, place))
        if gone := [reference for reference in references if reference not in named]:
            named = await self._send(ARCHIVE, partial(_named_in_archive, place, gone))
            gone = [reference for reference in gone if reference not in named]
        for begin in range(0, len(gone), _AT_ONCE):
            batch = gone[begin : begin + _AT_ONCE]
            ranges = [{"_id": each.chunks_of(one)} for one in batch for each in _places(place, one)]
            files = [each.file_id(one) for one in batch for each in _places(place, one)]
            await self._send(CHUNKS, partial(_delete_many, {"$or": ranges}))
            await self._send(FILES, partial(_delete_many, {"_id": {"$in": files}}))


def parsed(listed: object) -> list[Reference]:
    """Parse a stored list of references; leave out invalid ones."""
    return references_of({"attachments": listed})


def _places(place: Place, reference: Reference) -> list[Place]:
    """Return the places of a file: 1.0.0 can have stored it after the session was migrated."""
    is_migrated = reference.is_of_v1 and place.incarnation is not None
    return [place, Place(place.session_id, None)] if is_migrated else [place]


def _attachments(messages: Iterable[Mapping[str, Any]]) -> Iterable[Attachment]:
    return (each for message in messages for each in message.get("attachments") or () if isinstance(each, Attachment))


def _references_to(attachments: Mapping[int, Attachment]) -> dict[int, Reference]:
    return {
        key: Reference(hashlib.sha256(each.data).hexdigest(), len(each.data), each.token)
        for key, each in attachments.items()
    }


async def _delete_many(condition: Document, collection: AsyncCollection) -> None:
    await collection.delete_many(condition)


async def _ids(condition: Document, files: AsyncCollection) -> list[Document]:
    return [entry["_id"] async for entry in files.find(condition, {"_id": 1})]


async def _named_in_head(place: Place, sessions: AsyncCollection) -> set[Reference]:
    condition = {"_id": place.session_id, "incarnation": place.incarnation}
    document = await sessions.find_one(condition, _NAMED)
    return {
        reference
        for messages in (document or {}).get("attachments", ())
        for listed in messages
        for reference in parsed(listed)
    }


async def _named_in_archive(place: Place, references: Sequence[Reference], archive: AsyncCollection) -> set[Reference]:
    wanted = {"_id": place.buckets(), "messages.attachments": {"$in": list(map(str, references))}}
    buckets = archive.find(wanted, {"messages.attachments": 1})
    return {
        reference async for bucket in buckets for message in bucket["messages"] for reference in references_of(message)
    }


async def _parts(
    chunks: AsyncCollection, place: Place, references: Iterable[Reference]
) -> dict[Reference, dict[int, bytes]]:
    """Return the chunks of several files, by reference and number, from one query."""
    parts: dict[tuple[str, str], tuple[Reference, dict[int, bytes]]] = {}
    ranges = []
    for reference in references:
        parts[reference.sha256, reference.token] = (reference, {})
        ranges += [{"_id": each.chunks_of(reference)} for each in _places(place, reference)]
    async for chunk in chunks.find({"$or": ranges}):
        file = chunk["files_id"]
        token = file["token"] if "token" in file else str(file["generation"])
        parts[file["sha256"], token][1][chunk["n"]] = chunk["data"]
    return dict(parts.values())


def _joined(parts: dict[Reference, dict[int, bytes]]) -> dict[str, bytes]:
    """Join chunks; return by reference the contents that match their length and SHA-256."""
    blobs = {}
    for reference in tuple(parts):
        chunks = parts.pop(reference)
        data = b"".join(chunks[n] for n in sorted(chunks))
        if len(data) == reference.length and hashlib.sha256(data).hexdigest() == reference.sha256:
            blobs[str(reference)] = data
    return blobs
