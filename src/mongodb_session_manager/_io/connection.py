"""How MongoDB is reached: settings, one client and its life, driver errors as ours. The only module that imports Motor.

Everything above sees collections whose methods are awaited, and does not know which driver they belong to.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import logging
import os
import re
import reprlib
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, partial
from typing import Any, Protocol, TypeAlias, TypedDict, cast
from urllib.parse import unquote

import pymongo
from motor.core import AgnosticBase
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, ReadPreference, WriteConcern, common, monitoring
from pymongo import errors as driver
from pymongo.client_options import ClientOptions
from pymongo.read_concern import ReadConcern
from pymongo.topology_description import TopologyDescription
from pymongo.uri_parser import parse_uri

from .._format.codec import CODEC_OPTIONS
from ..errors import (
    AccessDeniedError,
    ClientTypeError,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailableError,
    EventLoopError,
    InvalidArgumentError,
    MongoDBSessionError,
    SessionClosedError,
)
from .clock import clock_of
from .driver_errors import Account, driver_errors, may_be_sent_again
from .gate import Gate, GatedLoop
from .loop import ExitOrder, Lock, Portal, close_at_exit, io_portal, portal_to, running_loop

logger = logging.getLogger(__name__)

AsyncClient: TypeAlias = "AsyncIOMotorClient[Any] | AsyncMongoClient[Any]"
SyncClient: TypeAlias = "pymongo.MongoClient[Any]"
Client: TypeAlias = "AsyncClient | SyncClient"

DEFAULT_DATABASE = "agent_sessions"

SOCKET_TIMEOUT_MS = 30_000
"""How long an owned client waits for an answer unless the user says otherwise; the driver would wait for ever."""

_CHECK_GRACE = 0.5  # seconds

_HELLO_PAUSES = (0.05, 0.2, 0.8)
"""Pauses in seconds before the server's clock is read again after a lost connection."""

_UNKNOWN_COMMAND = 59

_OPEN: AbstractAsyncContextManager[None] = nullcontext()

_gates: weakref.WeakValueDictionary[tuple[int, int], Gate] = weakref.WeakValueDictionary()
"""Gates by the ids of client and loop; a gate keeps its client alive, so no other client can have the same id."""

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
        cls,
        connection_string: str | None,
        client: Client | None,
        client_options: Mapping[str, Any],
        ours: Iterable[str] = (),
    ) -> Settings:
        """Return settings that can be used, the environment variable `MONGODB_URI` filled in.

        Args:
            connection_string: Where MongoDB is.
            client: A client that the caller owns.
            client_options: Options of the driver; an option that is `None` is not given.
            ours: The caller's own options, for the error that names an unknown option.

        Raises:
            ConfigurationError: No connection or two connections are configured, or an option is unknown or invalid.
            ClientTypeError: `client` is not a MongoDB client.
        """
        client_options = _checked_options(client_options, ours)
        if client is not None:
            _check_client(client)
            if connection_string is not None or client_options:
                raise ConfigurationError(
                    "client cannot be combined with connection_string or client options: a borrowed client is "
                    "configured by its owner"
                )
            return cls(client=client)
        connection_string = connection_string or os.environ.get("MONGODB_URI")
        if isinstance(connection_string, str):
            connection_string = connection_string.strip()
        if not connection_string:
            raise ConfigurationError(
                "no MongoDB connection configured: pass connection_string, set the environment variable MONGODB_URI, "
                "or pass client (an AsyncIOMotorClient, AsyncMongoClient or MongoClient)"
            )
        if not isinstance(connection_string, str):
            raise ConfigurationError(f"connection_string must be a str, not {type(connection_string).__name__}")
        _check_uri(connection_string)
        return cls(connection_string=connection_string, client_options=dict(client_options))

    def reason(self, error: Exception) -> str:
        """Return what may be shown of a driver's error, which may quote any part of a string that holds a password."""
        address = (self.connection_string or "").partition("://")[2]
        secrets = re.split(r"[:/@?&=]", address.rpartition("@")[0])
        secrets += [str(value) for name, value in self.client_options.items() if name.lower() in _SECRETS]
        return "" if any(secret and secret in str(error) for secret in secrets) else f": {error}"

    def bounded_options(self) -> dict[str, Any]:
        """Return the client options with a bound on the wait for an answer, if there is none."""
        named = {name.lower() for name in self.client_options} | set(
            re.findall(r"[?&](\w+)=", (self.connection_string or "").lower())
        )
        bound = {} if named & {"sockettimeoutms", "timeoutms"} else {"socketTimeoutMS": SOCKET_TIMEOUT_MS}
        return {**bound, **self.client_options}


def unexpected_option(name: str, expected: Iterable[str], of_driver: Iterable[str] = ()) -> ConfigurationError:
    """Return the error for an unknown option; it suggests the expected options before the driver's."""
    expected = list(expected)
    close = difflib.get_close_matches(name, expected, 1) or difflib.get_close_matches(name, list(of_driver), 1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    rest = " or an option of pymongo.MongoClient" if of_driver else ""
    listed = ", ".join(expected)
    return ConfigurationError(f"unexpected option {name!r}{hint} expected one of: {listed}{rest}")


_SECRETS = {"password", "authmechanismproperties", "tlscertificatekeyfilepassword"}

_FILES = {"tlscafile", "tlscertificatekeyfile", "tlscrlfile"}
"""Options whose validation reads a file: opening the client validates them, off the caller's event loop."""


@cache
def _driver_options() -> dict[str, str]:
    """Return the documented names of the driver's options, by their names in lower case."""
    names = re.findall(r"`(\w+)`", pymongo.MongoClient.__init__.__doc__ or "")
    return {name: name for name in common.VALIDATORS} | {
        name.lower(): name for name in names if name.lower() in common.VALIDATORS
    }


def _checked_options(given: Mapping[str, Any], ours: Iterable[str]) -> dict[str, Any]:
    """Return the given options of the driver that are not `None`."""
    for name in given:
        if name.lower() not in _driver_options():
            raise unexpected_option(name, ours, _driver_options().values())
    options = {name: value for name, value in given.items() if value is not None}
    refusal = ""
    for name, value in options.items():
        try:
            if name.lower() not in _FILES:
                common.validate(name, value)
        except Exception as error:
            refusal = f"{name} cannot be used"
            if name.lower() not in _SECRETS:
                shown = reprlib.repr(value)
                refusal = f"{name} cannot be {shown}" + ("" if isinstance(error, LookupError) else f": {error}")
        if refusal:  # outside of `except`: an error that can hold a password must not become its context
            raise ConfigurationError(refusal)
    return options


def _unreadable(error: OSError, options: Mapping[str, Any]) -> str:
    """Return the message for an unreadable file, with the option that names it."""
    names = [name for name, value in options.items() if name.lower() in _FILES]
    named = [name for name in names if error.filename is not None and options[name] == error.filename] or names
    reason = f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    return f"{' or '.join(named) or 'a file of TLS'} cannot be read ({reason})"


def _check_client(client: object) -> None:
    if isinstance(client, AsyncIOMotorClient | AsyncMongoClient | pymongo.MongoClient):
        if not _options(client).write_concern.acknowledged:
            raise ConfigurationError("client has write concern w=0: a session cannot rely on unacknowledged writes")
        return
    raise ClientTypeError(
        f"client must be a motor.motor_asyncio.AsyncIOMotorClient, pymongo.AsyncMongoClient or pymongo.MongoClient, "
        f"not a {type(client).__name__}; or pass connection_string and let the library open its own"
    )


_ESCAPE = "percent-encode the user name and the password (urllib.parse.quote_plus) if they hold any of : / ? # [ ] @ %"


def _check_uri(connection_string: str) -> None:
    if re.search(r"[\x00-\x1f\x7f]", connection_string):
        raise ConfigurationError("connection_string holds a line break or another control character")
    address = connection_string.partition("://")[2]
    authority = re.split("[/?]", address, maxsplit=1)[0]
    credentials = authority.rpartition("@")[0]
    # The driver would parse a part of the password as a host or a port, and show it.
    if "@" in credentials or credentials.count(":") > 1 or re.match(r"[^/?]*(/[^?]*|(/[^?]*)?\?[^=]*)@", address):
        raise ConfigurationError(f"connection_string cannot be parsed: {_ESCAPE}")
    if connection_string.startswith("mongodb+srv://"):
        return  # parsing it would ask DNS; the driver does that when it connects
    refusal = None
    options: Mapping[str, Any] = {}
    try:
        options = parse_uri(connection_string)["options"]
    except OSError as error:
        found = dict(re.findall(r"[?&](\w+)=([^&]*)", connection_string))
        refusal = f": {_unreadable(error, {name: unquote(value) for name, value in found.items()})}"
    except (driver.PyMongoError, ValueError, TypeError, LookupError) as error:
        refusal = Settings(connection_string).reason(error) or ("@" in address and f": {_ESCAPE}") or ""
    if refusal is not None:  # raised here so that the driver's error, which may hold the password, is not its context
        raise ConfigurationError(
            f"connection_string is not mongodb://[user:password@]host[:port]/[database][?options]{refusal}"
        )
    if options.get("w") == 0:
        raise ConfigurationError("connection_string has w=0: a session cannot rely on unacknowledged writes")


def _wrapped(client: SyncClient, loop: asyncio.AbstractEventLoop) -> AsyncIOMotorClient[Any]:
    """Return a Motor client for an event loop that uses the connections of a synchronous client."""
    wrapper: AsyncIOMotorClient[Any] = AsyncIOMotorClient.__new__(AsyncIOMotorClient)
    AgnosticBase.__init__(wrapper, client)
    wrapper._io_loop = loop
    return wrapper


def _bound_loop(client: AsyncClient) -> asyncio.AbstractEventLoop | None:
    """Return the loop a borrowed client has been used on; neither driver tells it in public."""
    attribute = "_io_loop" if isinstance(client, AsyncIOMotorClient) else "_loop"
    loop: asyncio.AbstractEventLoop | None = getattr(client, attribute, None)
    return loop


def _gate(client: pymongo.MongoClient[Any], loop: asyncio.AbstractEventLoop) -> Gate:
    """Return the gate of a client and a loop, which all connections that borrow the client share."""
    key = id(client), id(loop)
    gate = _gates.get(key)
    if gate is None:
        _gates[key] = gate = Gate(client)
    return gate


def _options(client: Client) -> ClientOptions:
    return cast(ClientOptions, client.options)


async def _close_client(client: AsyncClient) -> None:
    # Motor's close() says goodbye to the server on the calling thread, PyMongo's is awaited.
    if isinstance(client, AsyncIOMotorClient):
        await asyncio.get_running_loop().run_in_executor(None, client.close)
    else:
        await client.close()


class Connection:
    """One client, owned or borrowed, on one event loop.

    An owned client is opened on first use and closed by `aclose`. A borrowed one is never closed; its own loop, if it
    has one already, does its I/O; a synchronous client has no loop, so the library's loop does its I/O. In a forked
    child an owned client is opened again.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        lent = settings.client
        self._synchronous = lent if isinstance(lent, pymongo.MongoClient) else None
        self._client: AsyncClient | None = None if isinstance(lent, pymongo.MongoClient) else lent
        self._loop: asyncio.AbstractEventLoop | None = None
        self._portal: Portal | None = None
        self._pid = os.getpid()
        self._counter = _PoolCounter()
        self._clock = clock_of(lent)
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._operations = 0
        self._idle = asyncio.Event()
        self._opening = asyncio.Lock()
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._abandoned: list[object] = []
        self._gate: Gate | None = None
        self._threaded: AsyncIOMotorClient[Any] | None = None

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
        if self._client is None:
            return io_portal()
        if self._loop is None:
            self._loop = _bound_loop(self._client) or running_loop()
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

    def synchronous_client(self) -> SyncClient:
        """Return a synchronous client with the same connections; open it if this is its first use.

        Raises:
            ConfigurationError: The client is PyMongo's asynchronous one.
            SessionClosedError: The connection is closed.
        """
        if self._closing:
            raise SessionClosedError("the connection is closed: open a new manager or factory")
        client = self.settings.client
        if client is None:
            client = self.portal.call(self.client)
        if isinstance(client, AsyncMongoClient):
            raise ConfigurationError(
                "a pymongo.AsyncMongoClient cannot be used synchronously: pass another client, or await this one"
            )
        return client if isinstance(client, pymongo.MongoClient) else client.delegate

    async def client(self) -> AsyncClient:
        """Return the client, opened on the running loop if this is its first use.

        Raises:
            EventLoopError: The client belongs to another loop.
        """
        loop = asyncio.get_running_loop()
        if self._is_left_behind:
            self._leave_behind()
        if self._loop is None:
            self._loop = loop if self._client is None else _bound_loop(self._client) or loop
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

    async def _open_client(self, loop: asyncio.AbstractEventLoop) -> AsyncClient:
        if self._synchronous is not None:
            return _wrapped(self._synchronous, loop)
        options = self.settings.bounded_options()
        listeners = [*options.pop("event_listeners", ()), self._counter, self._clock]
        make = partial(
            AsyncIOMotorClient, self.settings.connection_string, io_loop=loop, event_listeners=listeners, **options
        )
        refusal = None
        try:
            # In a thread, because the driver looks at files to describe the machine to the server.
            client: AsyncClient = await loop.run_in_executor(None, make)
        except OSError as error:
            refusal = f": {_unreadable(error, self.settings.client_options)}"
        except (driver.PyMongoError, ValueError, TypeError, LookupError) as error:
            refusal = self.settings.reason(error)
            if files := [name for name in self.settings.client_options if name.lower() in _FILES]:
                refusal += f"; check {' and '.join(files)}"
        if refusal is not None:  # not within `except`, so that an error that may hold the password is not its context
            raise ConfigurationError(f"the MongoDB client refused its configuration{refusal}")
        if not _options(client).write_concern.acknowledged:
            raise ConfigurationError("w=0: a session cannot rely on unacknowledged writes")
        self._finalizer = weakref.finalize(self, _close_collected, client, loop, os.getpid())
        self._finalizer.atexit = False
        close_at_exit(self.aclose_at_exit, loop, ExitOrder.CONNECTIONS)
        return client

    async def _commanded(self) -> AsyncClient:
        """Return the client for commands; a Motor client gets the thread pool of its gate."""
        client = await self.client()
        if not isinstance(client, AsyncIOMotorClient):
            return client
        if self._threaded is None:
            loop = asyncio.get_running_loop()
            self._gate = gate = _gate(client.delegate, loop)
            self._threaded = threaded = AsyncIOMotorClient.__new__(AsyncIOMotorClient)
            threaded.delegate = client.delegate
            threaded._io_loop = GatedLoop(loop, gate.executor)
        return self._threaded

    def admission(self) -> AbstractAsyncContextManager[None]:
        """Return a context manager for sending a command: entering it waits for a server and a thread.

        Entering it raises errors of the driver.
        """
        return _OPEN if self._gate is None else self._gate

    @property
    def _is_left_behind(self) -> bool:
        """Whether the client belongs to a parent process, or is an owned client whose loop has ended."""
        has_ended = self.settings.client is None and self._loop is not None and self._loop.is_closed()
        return has_ended or self._pid != os.getpid()

    def _leave_behind(self) -> None:
        """Drop the client. In a forked child its sockets belong to the parent: prevent its garbage collection."""
        self._refuse_in_child()
        self._abandoned += [self._client, self._finalizer, self._gate, self._threaded]
        if self._finalizer is not None:
            self._finalizer.detach()
        self._client, self._loop, self._finalizer, self._gate, self._threaded = None, None, None, None, None
        self._pid, self._counter, self._operations, self._tasks = os.getpid(), _PoolCounter(), 0, set()
        self._clock = clock_of(self.settings.client)
        self._idle, self._opening = asyncio.Event(), asyncio.Lock()

    def _refuse_in_child(self) -> None:
        if self.settings.client is not None and self._pid != os.getpid():
            raise EventLoopError("a borrowed client does not survive os.fork(): create one in the child")

    async def collection(self, database: str, name: str) -> AsyncCollection:
        """Return a collection that decodes as `_codec` expects and whose writes survive a failover.

        Reads go to the primary. Writes wait for a majority unless the client's own settings say otherwise.
        """
        client = await self._commanded()
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
    async def operation(self, *, timed: bool = True) -> AsyncIterator[None]:
        """Count as an operation, for which closing waits; an operation inside another one is a part of it.

        Args:
            timed: Whether to read the server's clock first, if it is unknown.

        Raises:
            SessionClosedError: The connection is closed or closing.
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        if self._closing and not _entered.get():
            raise SessionClosedError("the connection is closed: open a new manager or factory")
        if self._is_left_behind:
            self._leave_behind()
        token = _entered.set(True)
        self._operations += 1
        try:
            if timed and self._clock.is_due():
                await self._read_clock()
            yield
        finally:
            _entered.reset(token)
            self._operations -= 1
            if not self._operations:
                self._idle.set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` in the background; closing waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def now(self) -> datetime:
        """Return the server's time as MongoDB stores it: UTC, whole milliseconds. Call it within an operation.

        Dates that several processes compare come from this clock: the clocks of their machines can differ.
        """
        return self._clock.now()

    async def _read_clock(self) -> None:
        """Read the server's clock; wait for the reply only if the clock is unknown."""
        clock = self._clock
        if clock.is_known():
            clock.postpone()
            self.start(self._refresh_clock())
            return
        with driver_errors(account=self.account):
            await self._server(await self._commanded())
            if clock.is_known():  # from the heartbeats
                return
            if clock.command is None or clock.command.get_loop() is not asyncio.get_running_loop():
                clock.command = self.start(self._say_hello())
                clock.command.add_done_callback(clock.command_done)
            await asyncio.shield(clock.command)

    async def _refresh_clock(self) -> None:
        try:
            await self._say_hello()
        except Exception as error:
            logger.debug("error=<%s> | the server's clock was not read again", type(error).__name__)

    async def _say_hello(self) -> None:
        """Take a reading of the server's clock with a command."""
        client = await self._commanded()
        for pause in (*_HELLO_PAUSES, None):
            try:
                async with self.admission():
                    begun = time.monotonic()
                    reply = await client.admin.command("hello", codec_options=CODEC_OPTIONS)
                self._clock.learn(reply.get("localTime"), time.monotonic() - begun)
                return
            except driver.PyMongoError as error:
                if pause is None or not may_be_sent_again(error):
                    if not isinstance(error, driver.OperationFailure):
                        raise
                    if error.code == _UNKNOWN_COMMAND:
                        self._clock.postpone()
                    return  # the next command gets the same refusal, for example of a password, and reports it
            await asyncio.sleep(pause)

    async def _server(self, client: AsyncClient) -> None:
        """Wait until a server that accepts writes is known, for at most as long as a command waits."""
        if self._gate is not None:
            await self._gate.server()
        elif isinstance(client, AsyncMongoClient):
            with pymongo.timeout(_options(client).timeout):
                _ = await client.is_primary

    def account(self, database: str | None = None) -> Account:
        """Return the client's user and servers, for errors about access to a database."""
        if self._client is None:
            return Account(database=database)
        pool = _options(self._client).pool_options
        credentials = getattr(pool, "_credentials", None)  # the drivers have no public attribute
        servers = cast(TopologyDescription, self._client.topology_description).server_descriptions()
        return Account(
            user=getattr(credentials, "username", None),
            source=getattr(credentials, "source", None),
            hosts=", ".join(sorted(f"{host}:{port}" for host, port in servers)),
            database=database,
        )

    async def ping(self) -> None:
        """Raise unless the server answers."""
        async with self.operation(timed=False):
            with driver_errors(account=self.account):
                await self._ask("ping")

    async def check(self, database: str, name: str, seconds: float) -> None:
        """Read from a collection within a time limit, which includes opening the client."""
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
            raise InvalidArgumentError(f"timeout must be a number of seconds > 0, got {seconds!r}")
        try:
            # The driver's limit gives the better error; the outer limit is for steps that the driver cannot limit.
            async with asyncio.timeout(seconds + _CHECK_GRACE), self.operation(timed=False):
                with driver_errors(account=partial(self.account, database)), pymongo.timeout(seconds):
                    await (await self.collection(database, name)).find_one({"_id": ""}, {"_id": 1})
        except TimeoutError as error:
            if isinstance(error, MongoDBSessionError):
                raise
            raise DatabaseUnavailableError(f"no usable MongoDB server within {seconds:g} s") from None

    async def server_version(self) -> str | None:
        """Return the version of the server, like `"7.0.14"`; `None` if the server refuses the command."""
        async with self.operation(timed=False):
            try:
                with driver_errors(account=self.account):
                    return str((await self._ask("buildInfo"))["version"])
            except (AccessDeniedError, DatabaseError):
                await self.ping()
                return None

    async def _ask(self, command: str) -> dict[str, Any]:
        """Send a command that does not wait for other commands."""
        client = await self._commanded()
        if self._gate is not None:
            await self._gate.server()
        answer: dict[str, Any] = await client.admin.command(command)
        return answer

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
            "wait_queue": None if borrowed else self._counter.waiting + (self._gate.waiting if self._gate else 0),
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
        if self._is_left_behind:
            self._leave_behind()
        while self._tasks or self._operations:
            if self._tasks:
                await asyncio.wait(set(self._tasks))
            else:  # an operation may start a task
                self._idle.clear()
                await self._idle.wait()
        if self.settings.client is None and (client := self._client) is not None:
            self._client, self._threaded = None, None
            if self._finalizer is not None:
                self._finalizer.detach()
            await _close_client(client)
            if self._gate is not None:
                self._gate.executor.shutdown(wait=False)

    async def aclose_at_exit(self, seconds: float) -> None:
        """Close when the interpreter ends."""
        await self.aclose()


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _close_collected(client: AsyncClient, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """End the sockets and threads of a client whose connection was collected without being closed."""
    if pid == os.getpid() and loop.is_running():
        portal_to(loop).submit(_close_client, client)
