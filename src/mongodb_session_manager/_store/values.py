"""`Values`: bytes under ids in a collection. The file of a large value is complete before a document refers to it.

    {_id, size, ..., data}    a value in its document
    {_id, size, ..., file}    `file` is the id of a file

A reader gets the old or the new value, complete, even if the writer is killed while it replaces the value.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from bson import ObjectId

from .._format.documents import Document
from .._io.collection import Collection
from .._io.driver_errors import DuplicateKeyError
from ..errors import DatabaseError

INLINE_LIMIT = 4 * 1024 * 1024
"""The maximum number of bytes of a value that is stored in its document.

A document can hold 16 MiB, but a server with a small cache (256 MiB) sometimes refuses to replace such a document:
"transaction is too large and will not fit in the storage engine cache".
"""

ROUNDS = 8
"""The number of attempts of a read or a write while the value changes."""


class Files(Protocol):
    """The files of large values."""

    async def download(self, file: ObjectId, size: int) -> bytes | None:
        """Return the content of a file, or `None` if it is not complete."""

    async def unname(self, file: ObjectId) -> None:
        """Prepare the removal of a file whose value is replaced."""

    async def delete(self, file: ObjectId) -> None:
        """Remove a file."""


class Values:
    """Its methods must be called within an `operation()` of the connection."""

    def __init__(self, collection: Collection, files: Files) -> None:
        self._collection = collection
        self._files = files

    async def put(self, value_id: Any, value: Document, check: Callable[[], None] = lambda: None) -> None:
        """Store a document without its `_id`, with `data` or with the `file` that holds the data.

        `check` is called immediately before each attempt.
        """
        file = value.get("file")

        async def put(expected: ObjectId | None) -> bool:
            check()
            condition = {"_id": value_id, "file": expected}
            try:
                result = await self._collection.send(
                    lambda values: values.replace_one(condition, value, upsert=expected is None)
                )
            except DuplicateKeyError:
                return False  # the value is in another file, or another writer has just created it
            return bool(result.matched_count or result.upserted_id is not None)

        await self._exchange(value_id, put, lambda stored: file is not None and stored.get("file") == file)

    async def remove(self, value_id: Any) -> None:
        async def remove(expected: ObjectId | None) -> bool:
            return await self._collection.delete_one({"_id": value_id, "file": expected})

        await self._exchange(value_id, remove, lambda stored: not stored)

    async def _exchange(
        self, value_id: Any, act: Callable[[ObjectId | None], Awaitable[bool]], done: Callable[[Document], bool]
    ) -> None:
        """Replace or remove a value, and then its old file.

        Args:
            value_id: The value.
            act: Replaces or removes the value if it is in a given file (`None`: in the document, or missing); returns
                whether it did.
            done: Returns whether an earlier attempt, whose acknowledgement was lost, has stored this document.
        """
        file: ObjectId | None = None  # most values are in no file
        replaced: list[ObjectId] = []
        for _ in range(ROUNDS):
            if await act(file):
                break
            stored = await self._collection.find_one({"_id": value_id}, {"file": 1}) or {}
            if done(stored):
                break
            file = stored.get("file")
            if file is not None:
                await self._files.unname(file)
                replaced.append(file)
        else:
            raise DatabaseError("the value kept changing while it was written: try again later")
        for file in replaced:
            await self._files.delete(file)

    async def read(self, value_id: Any) -> bytes | None:
        seen = None
        for _ in range(ROUNDS):
            document = await self._collection.find_one({"_id": value_id})
            if document is None:
                return None
            file: ObjectId | None = document.get("file")
            if file is None:
                return bytes(document["data"])
            if file == seen:
                raise DatabaseError("the value's file is not complete")
            if (data := await self._files.download(file, document["size"])) is not None:
                return data
            seen = file  # replaced while it was read, or damaged
        raise DatabaseError("the value kept changing while it was read: try again later")

    async def file_of(self, value_id: Any) -> ObjectId | None:
        document = await self._collection.find_one({"_id": value_id}, {"file": 1})
        return None if document is None else document.get("file")
