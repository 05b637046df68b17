"""Files of a GridFS bucket, each the value of one key for as long as the key's document points at it.

A file has a name, its key, while it is the key's value for certain. One that is being written or being replaced has
none; if that never ends because the process does, `sweep` decides by what the key's document says. Standard GridFS
clients read what has a name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial

from bson import ObjectId
from pymongo.errors import BulkWriteError

from .._format.dates import now
from .._format.documents import Document
from .._io.collection import Collection
from .._io.drivers import AsyncCollection
from .._io.indexes import ensure_indexes
from ..errors import DatabaseTimeoutError

CHUNK = 255 * 1024
"""Bytes of a chunk: what GridFS clients use unless told otherwise."""

BATCH = 32
"""Chunks sent or read by one command, about 8 MiB."""

WRITING_TIME = timedelta(hours=1)
"""How long a file may take from its first command to being its key's value."""

DOUBT_TIME = timedelta(days=1)
"""Age at which nobody can be writing a file without a name any more, whatever the clocks of the machines say."""

_DUPLICATE_KEY = 11000
_SWEPT_AT_ONCE = 16


class Bucket:
    """A GridFS bucket on a connection. Its methods are operations under way of the connection's."""

    def __init__(self, bucket: Collection) -> None:
        self._connection = bucket.connection
        self._files = bucket.part(".files")
        self._chunks = bucket.part(".chunks")

    async def upload(self, key: str, data: bytes) -> ObjectId:
        """Write a file that has no name yet, and return its id."""
        ensure_indexes(self._files, [("filename", "uploadDate")])
        ensure_indexes(self._chunks, [("files_id", "n")])
        file = ObjectId()
        document = {
            "_id": file,
            "length": len(data),
            "chunkSize": CHUNK,
            "uploadDate": self._connection.now(),
            "metadata": {"key": key},
        }
        await self._files.send(lambda files: files.replace_one({"_id": file}, document, upsert=True))
        for first in range(0, len(data), CHUNK * BATCH):
            chunks = [
                {"_id": ObjectId(), "files_id": file, "n": start // CHUNK, "data": data[start : start + CHUNK]}
                for start in range(first, min(first + CHUNK * BATCH, len(data)), CHUNK)
            ]
            await self._chunks.send(partial(_insert, chunks))
        return file

    def check_time(self, file: ObjectId) -> None:
        """Refuse to make a file the value of its key when a sweep may soon take it for abandoned.

        Raises:
            DatabaseTimeoutError: It was begun too long ago.
        """
        if now() - file.generation_time > WRITING_TIME:
            raise DatabaseTimeoutError(f"writing the value took longer than {WRITING_TIME}")

    async def download(self, file: ObjectId, size: int) -> bytes | None:
        """Return the content of a file, `None` if it is not there as a whole (any more)."""
        chunks: list[Document] = []
        length = 0
        while length < size:
            found = await self._chunks.send(partial(_following, file, len(chunks)))
            if not found:
                return None
            chunks += found
            length += sum(len(chunk["data"]) for chunk in found)
        if [chunk["n"] for chunk in chunks] != list(range(len(chunks))):
            return None
        return b"".join(chunk["data"] for chunk in chunks)

    async def name(self, file: ObjectId, key: str) -> None:
        """Say that a file is the value of its key."""
        await self._files.update_one({"_id": file}, {"$set": {"filename": key}})

    async def doubt(self, file: ObjectId) -> None:
        """Say that a file is about to be its key's value no more."""
        await self._files.update_one({"_id": file}, {"$unset": {"filename": ""}})

    async def delete(self, file: ObjectId) -> None:
        """Remove a file that no key's document points at."""
        await self._chunks.delete_many({"files_id": file})
        await self._files.delete_one({"_id": file})

    async def sweep(self, current: Callable[[str], Awaitable[ObjectId | None]]) -> None:
        """Decide on files that have long been without a name, because their writer ended before it was done.

        Args:
            current: Returns the file that a key's document points at.
        """
        abandoned = {
            "filename": None,
            "uploadDate": {"$lt": self._connection.now() - DOUBT_TIME},
            "metadata.key": {"$type": "string"},  # not somebody else's
        }
        for document in await self._files.send(
            lambda files: files.find(abandoned, limit=_SWEPT_AT_ONCE).to_list(_SWEPT_AT_ONCE)
        ):
            file, key = document["_id"], document["metadata"]["key"]
            if await current(key) == file:
                await self.name(file, key)
            else:
                await self.delete(file)


async def _following(file: ObjectId, first: int, collection: AsyncCollection) -> list[Document]:
    return await collection.find({"files_id": file, "n": {"$gte": first}}, sort=[("n", 1)], limit=BATCH).to_list()


async def _insert(chunks: list[Document], collection: AsyncCollection) -> None:
    try:
        await collection.insert_many(chunks, ordered=False)
    except BulkWriteError as error:
        refused = error.details.get("writeErrors", [])
        if error.details.get("writeConcernErrors") or any(each["code"] != _DUPLICATE_KEY for each in refused):
            raise
        # They are there from the first time it was sent; the reply was lost.
