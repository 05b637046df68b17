"""How MongoDB is reached: settings, one client and its life, driver errors as ours. The only module that imports Motor.

Everything above sees collections whose methods are awaited, and does not know which driver they belong to.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import re
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias, TypedDict, cast
from urllib.parse import unquote

import pymongo
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, ReadPreference, WriteConcern, monitoring
from pymongo import errors as driver
from pymongo.client_options import ClientOptions
from pymongo.read_concern import ReadConcern
from pymongo.uri_parser import parse_uri

from ._codec import CODEC_OPTIONS
from ._driver_errors import driver_errors
from ._loop import ExitOrder, Lock, Portal, close_at_exit, io_portal, portal_to, running_loop
from .errors import (
    ClientTypeError,
    ConfigurationError,
    DatabaseError,
    EventLoopError,
    SessionClosedError,
)

logger = logging.getLogger(__name__)

Client: TypeAlias = "AsyncIOMotorClient[Any] | AsyncMongoClient[Any]"

DEFAULT_DATABASE = "agent_sessions"

SOCKET_TIMEOUT_MS = 30_000
"""How long an owned client waits for an answer unless the user says otherwise; the driver would wait for ever."""

_entered: ContextVar[bool] = ContextVar("mongodb_session_manager_entered", default=False)


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
    collection: AsyncCollection, query: Mapping[str, Any], update: Any, fields: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Send a findAndModify that the driver does not send again by itself; return the new document's `fields`.

    For one that the driver may send again, the server keeps a copy of the whole document: a session of 15 MB would be
    written twice.
    """
    command = {
        "findAndModify": collection.name,
        "query": query,
        "update": update,
        "fields": fields,
        "new": True,
        "writeConcern": collection.write_concern.document,
    }
    found: dict[str, Any] | None = (await collection.database.command(command, codec_options=CODEC_OPTIONS))["value"]
    return found


async def run_pipeline(collection: AsyncCollection, pipeline: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run an aggregation; one that stores its result returns nothing."""
    cursor = collection.aggregate(pipeline)
    if inspect.isawaitable(cursor):  # PyMongo's; Motor sends the command when its cursor is iterated
        cursor = await cursor
    return [document async for document in cursor]


class PoolStats(TypedDict):
    """A client's pool at this moment; `None` where the client is borrowed and its events were not recorded."""

    pool_config: dict[str, Any]
    connections_open: int | None
    connections_in_use: int | None
    wait_queue: int | None


@dataclass
class _PoolCounter(monitoring.ConnectionPoolListener):
    """Counts a client's connections from the pool events of the driver."""

    open: int = 0
    in_use: int = 0
    waiting: int = 0
    _lock: Any = field(default_factory=Lock, repr=False)

    def _count(self, *, open: int = 0, in_use: int = 0, waiting: int = 0) -> None:
        with self._lock:
            self.open += open
            self.in_use += in_use
            self.waiting += waiting

    def connection_created(self, event: monitoring.ConnectionCreatedEvent) -> None:
        self._count(open=1)

    def connection_closed(self, event: monitoring.ConnectionClosedEvent) -> None:
        self._count(open=-1)

    def connection_check_out_started(self, event: monitoring.ConnectionCheckOutStartedEvent) -> None:
        self._count(waiting=1)

    def connection_check_out_failed(self, event: monitoring.ConnectionCheckOutFailedEvent) -> None:
        self._count(waiting=-1)

    def connection_checked_out(self, event: monitoring.ConnectionCheckedOutEvent) -> None:
        self._count(waiting=-1, in_use=1)

    def connection_checked_in(self, event: monitoring.ConnectionCheckedInEvent) -> None:
        self._count(in_use=-1)

    def pool_created(self, event: monitoring.PoolCreatedEvent) -> None: ...
    def pool_ready(self, event: monitoring.PoolReadyEvent) -> None: ...
    def pool_cleared(self, event: monitoring.PoolClearedEvent) -> None: ...
    def pool_closed(self, event: monitoring.PoolClosedEvent) -> None: ...
    def connection_ready(self, event: monitoring.ConnectionReadyEvent) -> None: ...


@dataclass(frozen=True)
class Settings:
    """Where MongoDB is: a connection string with client options, or a client that somebody else owns."""

    connection_string: str | None = field(default=None, repr=False)
    client: Client | None = field(default=None, repr=False)
    client_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def checked(
        cls, connection_string: str | None, client: Client | None, client_options: Mapping[str, Any]
    ) -> Settings:
        """Return settings that can be used, the environment variable `MONGODB_URI` filled in.

        Raises:
            ConfigurationError: Nothing says where MongoDB is, or too much does.
            ClientTypeError: `client` is not an asynchronous client.
        """
        if client is not None:
            _check_client(client)
            if connection_string is not None or client_options:
                raise ConfigurationError(
                    "client cannot be combined with connection_string or client options: a borrowed client is "
                    "configured by its owner"
                )
            return cls(client=client)
        connection_string = connection_string or os.environ.get("MONGODB_URI")
        if not connection_string:
            raise ConfigurationError(
                "nothing says where MongoDB is: pass connection_string, set the environment variable MONGODB_URI, or "
                "pass client (an AsyncIOMotorClient or AsyncMongoClient)"
            )
        if not isinstance(connection_string, str):
            raise ConfigurationError(f"connection_string must be a str, not {type(connection_string).__name__}")
        _check_uri(connection_string)
        return cls(connection_string=connection_string, client_options=dict(client_options))

    def reason(self, error: Exception) -> str:
        """Return what may be shown of a driver's error, which may quote any part of a string that holds a password."""
        address = (self.connection_string or "").partition("://")[2]
        secrets = re.split(r"[:/@?&=]", address.rpartition("@")[0])
        return "" if any(secret and secret in str(error) for secret in secrets) else f": {error}"

    def bounded_options(self) -> dict[str, Any]:
        """Return the client options with a bound on the wait for an answer, if there is none."""
        named = {name.lower() for name in self.client_options} | set(
            re.findall(r"[?&](\w+)=", (self.connection_string or "").lower())
        )
        bound = {} if named & {"sockettimeoutms", "timeoutms"} else {"socketTimeoutMS": SOCKET_TIMEOUT_MS}
        return {**bound, **self.client_options}


def _check_client(client: object) -> None:
    if isinstance(client, AsyncIOMotorClient | AsyncMongoClient):
        if not _options(client).write_concern.acknowledged:
            raise ConfigurationError("client has write concern w=0: a session cannot rely on unacknowledged writes")
        return
    kind = "a synchronous MongoClient" if isinstance(client, pymongo.MongoClient) else f"a {type(client).__name__}"
    raise ClientTypeError(
        f"client is {kind}: pass motor.motor_asyncio.AsyncIOMotorClient or pymongo.AsyncMongoClient, or pass "
        "connection_string and let the library open its own"
    )


def _check_uri(connection_string: str) -> None:
    if connection_string.startswith("mongodb+srv://"):
        return  # parsing it would ask DNS; the driver does that when it connects
    refusal = None
    options: Mapping[str, Any] = {}
    try:
        options = parse_uri(connection_string)["options"]
    except (driver.ConfigurationError, ValueError) as error:
        refusal = Settings(connection_string).reason(error)
    if refusal is not None:  # raised here so that the driver's error, which may hold the password, is not its context
        raise ConfigurationError(
            f"connection_string is not mongodb://[user:password@]host[:port]/[database][?options]{refusal}"
        )
    if options.get("w") == 0:
        raise ConfigurationError("connection_string has w=0: a session cannot rely on unacknowledged writes")


def _bound_loop(client: Client) -> asyncio.AbstractEventLoop | None:
    """Return the loop a borrowed client has been used on; neither driver tells it in public."""
    attribute = "_io_loop" if isinstance(client, AsyncIOMotorClient) else "_loop"
    loop: asyncio.AbstractEventLoop | None = getattr(client, attribute, None)
    return loop


def _options(client: Client) -> ClientOptions:
    return cast(ClientOptions, client.options)


async def _close_client(client: Client) -> None:
    # Motor's close() says goodbye to the server on the calling thread, PyMongo's is awaited.
    if isinstance(client, AsyncIOMotorClient):
        await asyncio.get_running_loop().run_in_executor(None, client.close)
    else:
        await client.close()


class Connection:
    """One client, owned or borrowed, on one event loop.

    An owned client is opened on first use and closed by `aclose`. A borrowed one is never closed; its own loop, if it
    has one already, does its I/O. In a forked child an owned client is opened anew.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._client: Client | None = settings.client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._portal: Portal | None = None
        self._pid = os.getpid()
        self._counter = _PoolCounter()
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._operations = 0
        self._idle = asyncio.Event()
        self._opening = asyncio.Lock()
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._abandoned: list[object] = []

    def __repr__(self) -> str:
        kind = "borrowed" if self.settings.client is not None else "owned"
        return f"<Connection {kind}, {'closed' if self._closing else 'open'}>"

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closing

    @property
    def portal(self) -> Portal:
        """The portal to the loop that does this connection's I/O for managers, factories and the sync repository."""
        if self.settings.client is None:
            return io_portal()
        self._refuse_in_child()
        if self._loop is None:
            self._loop = _bound_loop(self.settings.client) or running_loop()
        if self._loop is None:
            return io_portal()
        if self._portal is None:
            self._portal = portal_to(self._loop)
        return self._portal

    @property
    def identity(self) -> object:
        """What tells the servers behind this connection from others, as far as this process can know."""
        return hash(self.settings.connection_string) if self.settings.client is None else id(self.settings.client)

    def when_client_is_collected(self, function: Callable[[object], None]) -> None:
        """Call `function(identity)` when a borrowed client is gone and its identity may be used again."""
        if self.settings.client is not None:
            weakref.finalize(self.settings.client, function, self.identity).atexit = False

    def database_name(self, wanted: str | None) -> str:
        """Return `wanted`, else the database named in the connection string, else `"agent_sessions"`."""
        if wanted is not None:
            return wanted
        if self.settings.client is not None:
            return str(self.settings.client.get_default_database(DEFAULT_DATABASE).name)
        path = (self.settings.connection_string or "").partition("://")[2].partition("/")[2].partition("?")[0]
        return unquote(path).partition(".")[0] or DEFAULT_DATABASE

    async def client(self) -> Client:
        """Return the client, opened on the running loop if this is its first use.

        Raises:
            EventLoopError: The client belongs to another loop.
        """
        loop = asyncio.get_running_loop()
        if self._pid != os.getpid():
            self._leave_parent()
        if self._loop is None:
            self._loop = loop if self.settings.client is None else _bound_loop(self.settings.client) or loop
        if self._loop is not loop:
            raise EventLoopError(
                "this connection belongs to another event loop: open one repository per loop, or use the managers, "
                "which may be called from any"
            )
        if self._client is None:
            async with self._opening:
                if self._client is None:
                    self._client = await self._open_client(loop)
        return self._client

    async def _open_client(self, loop: asyncio.AbstractEventLoop) -> Client:
        options = self.settings.bounded_options()
        listeners = [*options.pop("event_listeners", ()), self._counter]
        make = partial(
            AsyncIOMotorClient, self.settings.connection_string, io_loop=loop, event_listeners=listeners, **options
        )
        refusal = None
        try:
            # In a thread, because the driver looks at files to describe the machine to the server.
            client: Client = await loop.run_in_executor(None, make)
        except (driver.PyMongoError, ValueError, TypeError, OSError) as error:
            refusal = self.settings.reason(error)
        if refusal is not None:  # not within `except`, so that an error that may hold the password is not its context
            raise ConfigurationError(f"the MongoDB client refused its configuration{refusal}")
        if not _options(client).write_concern.acknowledged:
            raise ConfigurationError("w=0: a session cannot rely on unacknowledged writes")
        self._finalizer = weakref.finalize(self, _close_collected, client, loop, os.getpid())
        self._finalizer.atexit = False
        close_at_exit(self.aclose_at_exit, loop, ExitOrder.CONNECTIONS)
        return client

    def _leave_parent(self) -> None:
        """Forget, in a forked child, the client whose sockets belong to the parent; keep it from being collected."""
        self._refuse_in_child()
        self._abandoned += [self._client, self._finalizer]
        if self._finalizer is not None:
            self._finalizer.detach()
        self._client, self._loop, self._finalizer = None, None, None
        self._pid, self._counter, self._operations, self._tasks = os.getpid(), _PoolCounter(), 0, set()
        self._idle, self._opening = asyncio.Event(), asyncio.Lock()

    def _refuse_in_child(self) -> None:
        if self.settings.client is not None and self._pid != os.getpid():
            raise EventLoopError("a borrowed client does not survive os.fork(): create one in the child")

    async def collection(self, database: str, name: str) -> AsyncCollection:
        """Return a collection that decodes as `_codec` expects and whose writes survive a failover.

        Reads go to the primary. Writes wait for a majority unless the client's own settings say otherwise.
        """
        client = await self.client()
        concern = client.write_concern.document
        write_concern = WriteConcern(**concern) if "w" in concern else WriteConcern(w="majority", **concern)
        collection: AsyncCollection = client.get_database(database).get_collection(
            name,
            codec_options=CODEC_OPTIONS,
            read_preference=ReadPreference.PRIMARY,
            write_concern=write_concern,
            read_concern=ReadConcern(),
        )
        return collection

    @asynccontextmanager
    async def operation(self) -> AsyncIterator[None]:
        """Count as under way, so that closing waits; operations inside of one are part of it.

        Raises:
            SessionClosedError: The connection is closed or closing.
        """
        if self._closing and not _entered.get():
            raise SessionClosedError("the connection is closed: open a new manager or factory")
        if self._pid != os.getpid():
            self._leave_parent()
        token = _entered.set(True)
        self._operations += 1
        try:
            yield
        finally:
            _entered.reset(token)
            self._operations -= 1
            if not self._operations:
                self._idle.set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the operations; closing waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def ping(self) -> None:
        """Raise unless the server answers."""
        async with self.operation():
            with driver_errors():
                await (await self.client()).admin.command("ping")

    async def server_version(self) -> str | None:
        """Return the version of the server, like `"7.0.14"`; `None` if it answers, but refuses to say."""
        async with self.operation():
            try:
                with driver_errors():
                    return str((await (await self.client()).admin.command("buildInfo"))["version"])
            except DatabaseError:
                await self.ping()
                return None

    def pool_stats(self) -> PoolStats:
        """Return the pool's configuration and its connections, as counted by the driver's pool events."""
        client = self._client if self._pid == os.getpid() else None
        pool = _options(client).pool_options if client is not None else None
        borrowed = self.settings.client is not None
        return {
            "pool_config": {}
            if pool is None
            else {
                "maxPoolSize": pool.max_pool_size,
                "minPoolSize": pool.min_pool_size,
                "maxIdleTimeMS": _milliseconds(pool.max_idle_time_seconds),
                "waitQueueTimeoutMS": _milliseconds(pool.wait_queue_timeout),
            },
            "connections_open": None if borrowed else self._counter.open,
            "connections_in_use": None if borrowed else self._counter.in_use,
            "wait_queue": None if borrowed else self._counter.waiting,
        }

    def close_blocking(self) -> None:
        """Close from synchronous code; see `aclose`. Does nothing the second time, even when the interpreter ends."""
        if not self._closing:
            self.portal.call(self.aclose)

    async def close_async(self) -> None:
        """Close from any event loop; see `aclose`."""
        if not self._closing:
            await self.portal.run(self.aclose)

    async def aclose(self) -> None:
        """Wait for what is under way, then close an owned client. Idempotent. Runs on the loop of the client."""
        self._closing = True
        if self._pid != os.getpid():
            self._leave_parent()
        while self._tasks or self._operations:
            if self._tasks:
                await asyncio.wait(set(self._tasks))
            else:  # an operation may start a task
                self._idle.clear()
                await self._idle.wait()
        if self.settings.client is None and (client := self._client) is not None:
            self._client = None
            if self._finalizer is not None:
                self._finalizer.detach()
            await _close_client(client)

    async def aclose_at_exit(self, seconds: float) -> None:
        """Close when the interpreter ends."""
        await self.aclose()


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _close_collected(client: Client, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """End the sockets and threads of a client whose connection was collected without being closed."""
    if pid == os.getpid() and loop.is_running():
        portal_to(loop).submit(_close_client, client)
