"""The two drivers, Motor and PyMongo, behind one interface. The only module that imports Motor.

Motor is imported on first use, because the application pays for every import at its start.
Everything above sees collections whose methods are awaited, whichever driver they belong to.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard, cast

from pymongo import AsyncMongoClient, MongoClient, WriteConcern
from pymongo import errors as driver
from pymongo.client_options import ClientOptions
from pymongo.topology_description import TopologyDescription

from .._format.codec import CODEC_OPTIONS
from ..errors import ClientTypeError, ConfigurationError
from .loop import ThreadPool

if TYPE_CHECKING:
    from motor.motor_asyncio import AsyncIOMotorClient

    MotorClient: TypeAlias = AsyncIOMotorClient[Any]
    AsyncClient: TypeAlias = AsyncIOMotorClient[Any] | AsyncMongoClient[Any]
    Client: TypeAlias = AsyncClient | MongoClient[Any]

SyncClient: TypeAlias = MongoClient[Any]


def __getattr__(name: str) -> Any:
    """Return the type `Client`, which is public, to code that evaluates it."""
    if name != "Client":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from motor.motor_asyncio import AsyncIOMotorClient

    return AsyncIOMotorClient[Any] | AsyncMongoClient[Any] | MongoClient[Any]


class AsyncCursor(Protocol):
    """The part of a driver's cursor that is used."""

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]: ...
    def to_list(self, length: int | None = ...) -> Awaitable[list[dict[str, Any]]]: ...


class AsyncCollection(Protocol):
    """The part of a driver's collection that is used; every call but `find` is awaited on the client's loop."""

    def find(self, *args: Any, **kwargs: Any) -> AsyncCursor: ...
    async def find_one(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None: ...
    async def find_one_and_update(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None: ...
    async def count_documents(self, *args: Any, **kwargs: Any) -> int: ...
    async def insert_one(self, *args: Any, **kwargs: Any) -> Any: ...
    async def insert_many(self, *args: Any, **kwargs: Any) -> Any: ...
    async def replace_one(self, *args: Any, **kwargs: Any) -> Any: ...
    async def update_one(self, *args: Any, **kwargs: Any) -> Any: ...
    async def update_many(self, *args: Any, **kwargs: Any) -> Any: ...
    async def delete_one(self, *args: Any, **kwargs: Any) -> Any: ...
    async def delete_many(self, *args: Any, **kwargs: Any) -> Any: ...
    async def create_indexes(self, *args: Any, **kwargs: Any) -> list[str]: ...
    def aggregate(self, *args: Any, **kwargs: Any) -> Any: ...
    @property
    def name(self) -> str: ...
    @property
    def database(self) -> Any: ...
    @property
    def write_concern(self) -> WriteConcern: ...


async def find_and_modify(
    collection: AsyncCollection,
    query: Mapping[str, Any],
    update: Any,
    fields: Mapping[str, Any],
    *,
    upsert: bool = False,
) -> dict[str, Any] | None:
    """Send a findAndModify that the driver does not send again by itself; return the new document's `fields`.

    For a retryable write, the server keeps a copy of the whole document: a session of 15 MB would be written twice.
    """
    command = {
        "findAndModify": collection.name,
        "query": query,
        "update": update,
        "fields": fields,
        "new": True,
        "upsert": upsert,
        "writeConcern": collection.write_concern.document,
    }
    reply = await collection.database.command(command, codec_options=CODEC_OPTIONS)
    if (error := reply.get("writeConcernError")) is not None:  # the driver raises it for its own methods only
        error = {**error, "errorLabels": reply.get("errorLabels", [])}
        is_late = (error.get("errInfo") or {}).get("wtimeout")
        raise (driver.WTimeoutError if is_late else driver.WriteConcernError)(
            error.get("errmsg", ""), error.get("code"), error
        )
    found: dict[str, Any] | None = reply["value"]
    return found


async def run_pipeline(collection: AsyncCollection, pipeline: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run an aggregation; with `$merge` or `$out`, the result is empty."""
    cursor = collection.aggregate(pipeline)
    if inspect.isawaitable(cursor):  # PyMongo's; Motor sends the command when its cursor is iterated
        cursor = await cursor
    return [document async for document in cursor]


def check_client(client: object) -> None:
    """Raise `ClientTypeError` unless it is a client, and `ConfigurationError` if its writes are unacknowledged."""
    if is_client(client):
        if not options_of(client).write_concern.acknowledged:
            raise ConfigurationError("client has write concern w=0: a session cannot rely on unacknowledged writes")
        return
    raise ClientTypeError(
        f"client must be a motor.motor_asyncio.AsyncIOMotorClient, pymongo.AsyncMongoClient or pymongo.MongoClient, "
        f"not a {type(client).__name__}; or pass connection_string and let the library open its own"
    )


def is_client(client: object) -> TypeGuard[Client]:
    return is_motor(client) or isinstance(client, AsyncMongoClient | MongoClient)


def is_motor(client: object) -> TypeGuard[MotorClient]:
    motor = sys.modules.get("motor.motor_asyncio")  # before Motor is imported, there is no client of it
    return isinstance(client, getattr(motor, "AsyncIOMotorClient", ()))


def open_motor(
    connection_string: str | None, loop: asyncio.AbstractEventLoop, options: Mapping[str, Any]
) -> MotorClient:
    """Open a client. Call it in a thread: it imports Motor, and describes the machine to the server from files."""
    from motor.motor_asyncio import AsyncIOMotorClient

    return AsyncIOMotorClient(connection_string, io_loop=loop, **options)


def motor_over(client: SyncClient, loop: asyncio.AbstractEventLoop, executor: ThreadPool | None = None) -> MotorClient:
    """Return a Motor client for an event loop that uses the connections of a synchronous client.

    The executor runs its commands; `None` is Motor's own, which all clients of the process share. The first call
    imports Motor and must not run on a caller's event loop.
    """
    from motor.core import AgnosticBase
    from motor.motor_asyncio import AsyncIOMotorClient

    wrapper: MotorClient = AsyncIOMotorClient.__new__(AsyncIOMotorClient)  # its constructor opens its own pool
    AgnosticBase.__init__(wrapper, client)
    wrapper._io_loop = loop if executor is None else _LoopWithExecutor(loop, executor)
    return wrapper


class _LoopWithExecutor:
    """An event loop, for Motor, that runs functions in an executor of ours."""

    def __init__(self, loop: asyncio.AbstractEventLoop, executor: ThreadPool) -> None:
        self._loop = loop
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def run_in_executor(self, _: object, function: Any, *args: Any) -> asyncio.Future[Any]:
        return self._loop.run_in_executor(self._executor, function, *args)


def bound_loop(client: AsyncClient) -> asyncio.AbstractEventLoop | None:
    """Return the loop that a borrowed client was used on; neither driver has a public attribute for it."""
    loop: asyncio.AbstractEventLoop | None = getattr(client, "_io_loop" if is_motor(client) else "_loop", None)
    return loop


def options_of(client: Client) -> ClientOptions:
    return cast(ClientOptions, client.options)


def topology_of(client: Client) -> TopologyDescription:
    return cast(TopologyDescription, client.topology_description)


async def close_client(client: AsyncClient) -> None:
    """Close a client; a Motor client in another thread, because it sends its last command on the calling one."""
    if isinstance(client, AsyncMongoClient):
        await client.close()
    else:
        await asyncio.get_running_loop().run_in_executor(None, client.close)
