"""Strands' `Storage` in MongoDB: one document per key; large values are in GridFS.

<collection>              {_id: key, size, updated_at, data}    a value in its document
                          {_id: key, size, updated_at, file}    `file` is the id of a file in the bucket
<collection>_blobs        the GridFS bucket, see `gridfs`
"""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, Self, TypeVar

from strands.storage import Storage
from strands.storage import storage as strands_storage

from .._format.documents import Document
from .._format.keys import normalized_key, normalized_prefix, prefix_range
from .._io import drivers
from .._io.collection import Collection
from .._io.connection import Connection
from .._io.names import checked_name, given
from .._io.settings import Settings
from .._store import values
from .._store.values import Values
from ..errors import InvalidArgumentError
from .gridfs import Bucket

P = ParamSpec("P")
T = TypeVar("T")

# Marks a view that has a prefix, so that Strands' subsystems do not add theirs; there is no public name.
_NAMESPACED = getattr(strands_storage, "_NAMESPACED", None)

_OPTIONS = ("connection_string", "database_name", "collection_name", "client")


class MongoDBStorage(Storage[str, str]):
    """Stores bytes under string keys, for `SnapshotSessionManager(storage=...)` and `Agent(storage=...)`.

    Keys and errors are those of Strands' own backends: `/` is the separator, repeated ones count as one, leading and
    trailing ones are ignored; a backslash or a segment `..` is refused; every error is a `StorageError` and an error of
    this package. A value can have any size: above 4 MiB it is stored in the GridFS bucket `<collection_name>_blobs`. A
    reader gets the old or the new value, complete, even if the writer is killed while it replaces the value.

    The coroutines can be awaited on any event loop. With `client=`, they run on the client's loop, which must not be
    blocked: `SnapshotSessionManager` blocks the loop on which an agent is constructed, so construct the agent on
    another thread, or pass a connection string.

    Args:
        connection_string: The MongoDB connection string; `None` reads the environment variable `MONGODB_URI`.
        database_name: The database; `None` for the one in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the values. It must not contain sessions.
        client: An `AsyncIOMotorClient`, `AsyncMongoClient` or `MongoClient` that the caller owns; it is never closed.
        **client_options: Options of PyMongo's `MongoClient`, like `maxPoolSize`.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    def __init__(
        self,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str | None = "agent_storage",
        *,
        client: drivers.Client | None = None,
        **client_options: Any,
    ) -> None:
        settings = Settings.checked(connection_string, client, client_options, _OPTIONS)
        self._bind(Connection(settings), database_name, collection_name, owned=True)

    def _bind(
        self, connection: Connection, database_name: str | None, collection_name: str | None, *, owned: bool
    ) -> None:
        self._connection = connection
        self._owns_connection = owned
        self._collection = Collection(
            connection,
            checked_name(connection.database_name(database_name), "database_name"),
            checked_name(given(collection_name, "agent_storage"), "collection_name"),
        )
        self._bucket = Bucket(self._collection.part("_blobs"))
        self._values = Values(self._collection, self._bucket)
        self._prefix = ""

    def __repr__(self) -> str:
        return f"MongoDBStorage({self._collection!r}, {self._connection!r})"

    async def write(self, key: str, data: bytes) -> None:
        """Store bytes under a key; an existing value is replaced.

        Raises:
            InvalidArgumentError: The key or the data is invalid.
            MongoDBSessionError: It is unknown whether the value is stored; the key has the old or the new value.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InvalidArgumentError(f"data must be bytes, not {type(data).__name__}")
        await self._run(self._write, self._prefix + normalized_key(key), bytes(data))

    async def read(self, key: str) -> bytes | None:
        """Return the value of a key, or `None` if there is none.

        Raises:
            InvalidArgumentError: The key is invalid.
        """
        return await self._run(self._read, self._prefix + normalized_key(key))

    async def delete(self, key: str) -> None:
        """Remove the value of a key, if there is one.

        Raises:
            InvalidArgumentError: The key is invalid.
        """
        await self._run(self._delete, self._prefix + normalized_key(key))

    async def list(self, query: str = "") -> builtins.list[str]:
        """Return the keys that begin with a prefix, sorted; all keys for `""`.

        Raises:
            InvalidArgumentError: The prefix is invalid.
        """
        keys = await self._run(self._list, self._prefix + normalized_prefix(query))
        return [key[len(self._prefix) :] for key in keys]

    def namespace(self, prefix: str) -> Self:
        """Return a view of the keys that begin with a prefix; in the view, keys have no prefix.

        The view shares the connection; closing the view has no effect.

        Raises:
            InvalidArgumentError: The prefix is invalid.
        """
        normalized = normalized_prefix(prefix).rstrip("/")
        view = copy.copy(self)
        view._owns_connection = False
        view._prefix = f"{self._prefix}{normalized}/" if normalized else self._prefix
        view._namespaced = _NAMESPACED  # type: ignore[attr-defined]
        return view

    def close(self) -> None:
        """Wait for pending operations and close the client, unless the caller owns it. Idempotent."""
        if self._owns_connection:
            self._connection.close_blocking()

    async def close_async(self) -> None:
        """Wait for pending operations and close the client, unless the caller owns it. Idempotent."""
        if self._owns_connection:
            await self._connection.close_async()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close_async()

    # On the loop of the client.

    async def _run(self, operation: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        async def counted() -> T:
            async with self._connection.operation():
                return await operation(*args, **kwargs)

        return await self._connection.portal.run(counted)

    async def _write(self, key: str, data: bytes) -> None:
        value: Document = {"size": len(data), "updated_at": self._connection.now()}
        if len(data) <= values.INLINE_LIMIT:
            await self._values.put(key, {**value, "data": data})
            return
        file = await self._bucket.upload(key, data)
        await self._values.put(key, {**value, "file": file}, lambda: self._bucket.check_time(file))
        await self._bucket.name(file, key)
        await self._bucket.sweep(self._values.file_of)

    async def _read(self, key: str) -> bytes | None:
        return await self._values.read(key)

    async def _delete(self, key: str) -> None:
        await self._values.remove(key)

    async def _list(self, prefix: str) -> builtins.list[str]:
        bounds = {"_id": prefix_range(prefix)}
        documents = await self._collection.find(bounds, {"_id": 1}, sort=[("_id", 1)])
        return [document["_id"] for document in documents]


class SharedStorage(MongoDBStorage):
    """A storage on a connection that the caller closes."""

    def __init__(self, connection: Connection, database_name: str | None, collection_name: str | None) -> None:
        self._bind(connection, database_name, collection_name, owned=False)
