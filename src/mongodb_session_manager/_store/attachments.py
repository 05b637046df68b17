"""`Attachments`: large attachments of messages, in the GridFS bucket `<collection>_attachments`.

Any GridFS client can read the bucket.

An attachment belongs to one message. The `_id` of its file is `{incarnation, sha256, token}`, the `_id` of a chunk
`{file, n}`. So storing a chunk twice changes nothing, and one range of `_id` holds all files of a session. The entry in
`.files` is stored last: a file that has one is complete.

Files are stored before the message that refers to them. A statement that replaces a message moves the references of the
old content to `removed_attachments` of the same document; then the files that no message refers to are removed.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from .._format.attachment_refs import Attachment, Reference, attached, detached, references_of
from .._format.changes import AgentWrite
from .._format.documents import Document
from .._format.expressions import ALL, array_at, entries_at, number_at
from .._format.ids import message_id_of
from .._format.layout import ARCHIVE, CHUNKS, FILES, Place
from .._format.retention import Dates
from .._format.statements import without_removed
from .._io.collection import Collection
from .._io.driver_errors import DuplicateKeyError
from .._io.drivers import AsyncCollection
from .._io.indexes import ensure_indexes
from ..errors import AttachmentError

CHUNK_BYTES = 2 * 1024 * 1024

_AT_ONCE = 64

_ALL_ARCHIVED: Document = {"archived": ALL}

_CHUNK: Document = {"n": "$n", "data": "$data"}
_ENTRY: Document = {name: f"${name}" for name in ("length", "chunkSize", "uploadDate", "filename")}
"""The fields of a chunk and of an entry that are copied unchanged."""

_NAMED: Document = {
    "agents": {
        "$map": {
            "input": entries_at("$agents"),
            "in": {
                "key": "$$this.k",
                "archived": number_at("$$this.v.archived"),
                "attachments": array_at("$$this.v.messages.attachments"),
            },
        }
    }
}


class Attachments:
    def __init__(self, sessions: Collection) -> None:
        self._connection = sessions.connection
        self._sessions = sessions
        self._archive = sessions.part(ARCHIVE)
        self._files = sessions.part(FILES)
        self._chunks = sessions.part(CHUNKS)

    # Storing.

    async def store(self, place: Place, writes: Sequence[AgentWrite], dates: Dates) -> None:
        """Store the attachments of writes in files with these dates, and replace them with references in the writes."""
        if not any(map(_has_attachments, writes)):
            return
        needed = {write.agent_id: list(_attachments(write.contents())) for write in writes}
        earlier = {write.agent_id: list(_attachments(write.earlier_contents())) for write in writes}
        writes = [write for write in writes if needed[write.agent_id] or earlier[write.agent_id]]
        listed = itertools.chain(*needed.values(), *earlier.values())
        references = await asyncio.to_thread(_references_to, {id(each.data): each for each in listed})
        for write in writes:
            write.attached = [references[id(each.data)] for each in needed[write.agent_id]]
            write.dates = dates
        for key, attachment in {id(each.data): each for each in itertools.chain(*needed.values())}.items():
            reference, data = references[key], attachment.data
            for n, start in enumerate(range(0, len(data), CHUNK_BYTES)):
                await self.put_chunk(place, reference, n, data[start : start + CHUNK_BYTES], dates.expires_at)
            await self.put_entry(place, reference, dates.expires_at)
        texts = {key: str(reference) for key, reference in references.items()}
        for write in writes:
            write.exchange(lambda message: detached(message, texts) if message.get("attachments") else message)

    async def put_chunk(
        self, place: Place, reference: Reference, n: int, data: bytes, date: datetime | None = None
    ) -> None:
        """Store a chunk of a file that is not complete yet; all chunks except the last have `CHUNK_BYTES`."""
        ensure_indexes(self._chunks, [("files_id", "n")])
        chunk = {"_id": place.chunk_id(reference, n), "files_id": place.file_id(reference), "n": n, "data": data}
        await insert_part(self._chunks, {**chunk, "session_id": place.session_id}, date)

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
        await insert_part(self._files, entry, date)

    # Reading.

    async def restore(self, place: Place, messages: Mapping[str, list[Document]]) -> None:
        """Replace the references in stored messages with the bytes, in place. `messages` maps agent ids to messages.

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
            parts = await self._chunks.send(lambda chunks: _parts(chunks, place, wanted))
            blobs = await asyncio.to_thread(_joined, parts)
        if missing := [reference for reference in wanted if str(reference) not in blobs]:
            error = AttachmentError(
                f"session {place.session_id!r}: {wanted[missing[0]]} has an attachment of {missing[0].length} bytes "
                f"that is missing or damaged in {self._files.name.removesuffix('.files')!r} "
                f"(SHA-256 {missing[0].sha256})"
            )
            error.references = tuple(map(str, missing))
            raise error
        for elements in messages.values():
            elements[:] = [attached(element, blobs) if references_of(element) else element for element in elements]

    # Copying.

    async def chunk(self, place: Place, reference: Reference, n: int) -> bytes | None:
        condition = {"_id": {"$in": [each.chunk_id(reference, n) for each in _places(place, reference)]}}
        found = await self._chunks.find_one(condition, {"data": 1})
        return None if found is None else found["data"]

    async def drop_chunks(self, place: Place, reference: Reference) -> None:
        file = place.file_id(reference)
        if await self._files.find_one({"_id": file}, {"_id": 1}) is None:
            await self._chunks.delete_many({"_id": place.chunks_of(reference)})

    async def copy(self, source: Place, references: Sequence[Reference], target: Place) -> list[Reference]:
        """Copy files to another session, on the server; return the references whose files are incomplete."""
        missing = []
        for begin in range(0, len(references), _AT_ONCE):
            batch = references[begin : begin + _AT_ONCE]
            chunks, files = _filters(source, batch)
            await self._copy_chunks(chunks, target)
            await self._copy_files(files, target)
            copied = {"_id": {"$in": [target.file_id(reference) for reference in batch]}}
            there = [entry["_id"] for entry in await self._files.find(copied, {"_id": 1})]
            counts = await self._chunk_counts(target, batch)
            for reference in batch:
                is_whole = counts.get((reference.sha256, reference.token), 0) * CHUNK_BYTES >= reference.length
                if target.file_id(reference) not in there or not is_whole:
                    missing.append(reference)
        return missing

    async def _chunk_counts(self, place: Place, references: Sequence[Reference]) -> dict[tuple[str, str], int]:
        ranges = [{"_id": place.chunks_of(reference)} for reference in references]
        count: list[Document] = [
            {"$match": {"$or": ranges}},
            {"$project": {"_id": 1}},
            {"$group": {"_id": "$_id.file", "count": {"$sum": 1}}},
        ]
        found = await self._chunks.aggregate(count)
        return {(file["_id"]["sha256"], file["_id"]["token"]): file["count"] for file in found}

    async def copy_from_v1(self, source: Place, target: Place) -> None:
        await self._copy_chunks({"_id": source.chunks()}, target)
        await self._copy_files({"_id": source.files()}, target)

    async def _copy_chunks(self, condition: Document, target: Place) -> None:
        file = _copied_id("$files_id", target)
        await copy_parts(
            self._chunks, condition, target, {"_id": {"file": file, "n": "$n"}, "files_id": file, **_CHUNK}
        )

    async def _copy_files(self, condition: Document, target: Place) -> None:
        await copy_parts(self._files, condition, target, {"_id": _copied_id("$_id", target), **_ENTRY})

    # Removing.

    async def remove_removed(self, place: Place, listed: list[Any]) -> None:
        """Remove the files that a session's `removed_attachments` lists, unless a message refers to them."""
        await self.remove_unnamed(place, parsed(listed))
        update = without_removed(place.session_id, place.incarnation, listed)
        await self._sessions.update_one(update.filter, update.update)

    async def remove_unnamed(self, place: Place, references: Sequence[Reference]) -> None:
        """Remove files that no message of the session refers to: in 1.0.0, messages shared files."""
        if not references:
            return
        agents = await self._sessions.send(partial(_find_named, place))
        named = {each for agent in agents.values() for listed in agent["attachments"] for each in parsed(listed)}
        if gone := [reference for reference in references if reference not in named]:
            named = await self._archive.send(partial(_named_in_archive, place, agents, gone))
            gone = [reference for reference in gone if reference not in named]
        for begin in range(0, len(gone), _AT_ONCE):
            batch = gone[begin : begin + _AT_ONCE]
            chunks, files = _filters(place, batch)
            await self._files.delete_many(files)  # first, see `layout.OUTSIDE`
            await self._chunks.delete_many(chunks)


def parsed(listed: object) -> list[Reference]:
    return references_of({"attachments": listed})


def _places(place: Place, reference: Reference) -> list[Place]:
    """Return the places of a file: 1.0.0 might have stored it after the session was migrated."""
    is_migrated = reference.is_of_v1 and place.incarnation is not None
    return [place, Place(place.session_id, None)] if is_migrated else [place]


def _has_attachments(write: AgentWrite) -> bool:
    return any(
        "attachments" in fields
        for message in write.messages.values()
        for fields in (message.fields, message.amended, message.recorded or ())
    )


def _attachments(messages: Iterable[Mapping[str, Any]]) -> Iterable[Attachment]:
    return (each for message in messages for each in message.get("attachments") or () if isinstance(each, Attachment))


def _references_to(attachments: Mapping[int, Attachment]) -> dict[int, Reference]:
    return {
        key: Reference(hashlib.sha256(each.data).hexdigest(), len(each.data), each.token)
        for key, each in attachments.items()
    }


def _filters(place: Place, references: Iterable[Reference]) -> tuple[Document, Document]:
    stored = [(each, one) for one in references for each in _places(place, one)]
    chunks = {"$or": [{"_id": each.chunks_of(one)} for each, one in stored]}
    return chunks, {"_id": {"$in": [each.file_id(one) for each, one in stored]}}


async def insert_part(collection: Collection, document: Document, date: datetime | None) -> None:
    """Insert a part of a session with an expiry date."""
    if date is not None:
        document["expires_at"] = date
    try:
        await collection.insert_one(document)
    except DuplicateKeyError:  # an earlier attempt stored it
        if date is not None:
            await collection.update_one({"_id": document["_id"]}, {"$max": {"expires_at": date}})


def _copied_id(file: str, target: Place) -> Document:
    token = {"$ifNull": [f"{file}.token", {"$toString": f"{file}.generation"}]}
    return {"incarnation": target.incarnation, "sha256": f"{file}.sha256", "token": token}


async def copy_parts(collection: Collection, condition: Document, target: Place, copied: Document) -> None:
    """Copy parts to another session, on the server; `copied` are the expressions of their fields."""
    document = {**copied, "session_id": {"$literal": target.session_id}}
    into = {"into": collection.name, "whenMatched": "keepExisting", "whenNotMatched": "insert"}
    await collection.aggregate([{"$match": condition}, {"$replaceWith": document}, {"$merge": into}])


async def _find_named(place: Place, sessions: AsyncCollection) -> dict[str, Document]:
    """Return, by key of an agent, how many of its messages are archived, and the attachments of the others."""
    condition = {"_id": place.session_id, "incarnation": place.incarnation}
    document = await sessions.find_one(condition, _NAMED)
    return {agent["key"]: agent for agent in (document or {}).get("agents", ())}


async def _named_in_archive(
    place: Place, agents: Mapping[str, Document], references: Sequence[Reference], archive: AsyncCollection
) -> set[Reference]:
    """Return the references of archived messages; no message is in a bucket that begins after the archived ones."""
    wanted = {"_id": place.buckets(), "messages.attachments": {"$in": list(map(str, references))}}
    buckets = archive.find(wanted, {"messages.attachments": 1})
    return {
        reference
        async for bucket in buckets
        if bucket["_id"]["first"] < agents.get(bucket["_id"]["agent"], _ALL_ARCHIVED)["archived"]
        for message in bucket["messages"]
        for reference in references_of(message)
    }


async def _parts(
    chunks: AsyncCollection, place: Place, references: Iterable[Reference]
) -> dict[Reference, dict[int, bytes]]:
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
