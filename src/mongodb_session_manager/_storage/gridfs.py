"""Files of a GridFS bucket that hold large values: a file is the value of a key while the key's document refers to it.

The name of a file is its key. A file that is being written or replaced has no name. If its writer is killed, `sweep`
names or removes the file, according to the key's document. Standard GridFS clients can read files with a name.
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
"""Bytes of a chunk: the default of GridFS clients."""

BATCH = 32
"""The chunks of one command, about 8 MiB."""

WRITING_TIME = timedelta(hours=1)
"""The longest time from the first command for a file to the last."""

ABANDONED_AFTER = timedelta(days=1)
"""The age from which a file without a name is abandoned; long enough to tolerate clock skew."""

_DUPLICATE_KEY = 11000
_SWEPT_AT_ONCE = 16


class Bucket:
    """A GridFS bucket. Its methods must be called within an `operation()` of the connection."""

    def __init__(self, bucket: Collection) -> None:
        self._connection = bucket.connection
        self._files = bucket.part(".files")
        self._chunks = bucket.part(".chunks")

    async def upload(self, key: str, data: bytes) -> ObjectId:
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
        """Raise `DatabaseTimeoutError` if a sweep could soon remove the file as abandoned."""
        if now() - file.generation_time > WRITING_TIME:
            raise DatabaseTimeoutError(f"writing the value took longer than {WRITING_TIME}")

    async def download(self, file: ObjectId, size: int) -> bytes | None:
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
        await self._files.update_one({"_id": file}, {"$set": {"filename": key}})

    async def unname(self, file: ObjectId) -> None:
        await self._files.update_one({"_id": file}, {"$unset": {"filename": ""}})

    async def delete(self, file: ObjectId) -> None:
        await self._chunks.delete_many({"files_id": file})
        await self._files.delete_one({"_id": file})

    async def sweep(self, current: Callable[[str], Awaitable[ObjectId | None]]) -> None:
        """Name or remove abandoned files; `current` returns the id of the file that a key's document refers to."""
        abandoned = {
            "filename": None,
            "uploadDate": {"$lt": self._connection.now() - ABANDONED_AFTER},
            "metadata.key": {"$type": "string"},  # other programs' files have no such key
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
        # An earlier attempt, whose reply was lost, stored them.
