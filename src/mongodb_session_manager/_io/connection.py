"""One client and its life: opened on its event loop, closed after the operations in progress, left behind by a fork."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from contextvars import ContextVar
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pymongo
from pymongo import AsyncMongoClient, MongoClient, ReadPreference, WriteConcern
from pymongo import errors as driver
from pymongo.read_concern import ReadConcern

from .._format.bounded import Bounded
from .._format.codec import CODEC_OPTIONS
from ..errors import (
    AccessDeniedError,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailableError,
    EventLoopError,
    InvalidArgumentError,
    MongoDBSessionError,
    SessionClosedError,
)
from . import drivers
from .clock import clock_of
from .driver_errors import Account, driver_errors, may_be_sent_again
from .drivers import AsyncCollection, SyncClient, options_of
from .gate import Gate, gate_of
from .loop import ExitOrder, close_at_exit, io_portal, portal_to
from .pool_stats import PoolCounter, PoolStats, pool_config
from .portal import Portal, running_loop
from .settings import DEFAULT_DATABASE, Settings

if TYPE_CHECKING:
    from .drivers import AsyncClient, MotorClient

logger = logging.getLogger(__name__)

_CHECK_GRACE = 0.5  # seconds

_HELLO_PAUSES = (0.05, 0.2, 0.8)
"""Seconds before the server's clock is read again after a lost connection."""

_UNKNOWN_COMMAND = 59

_KNOWN_COLLECTIONS = 256
"""The driver's collections that are kept: building one takes as long as compiling a statement."""

_OPEN: AbstractAsyncContextManager[None] = nullcontext()

_entered: ContextVar[bool] = ContextVar("mongodb_session_manager_entered", default=False)
"""Whether the current task is in an operation. Not an argument, because operations nest through many layers."""


class Connection:
    """One client, owned or borrowed, on one event loop.

    An owned client is opened on first use and closed by `aclose`; a forked child opens it again. A borrowed client is
    never closed. Its I/O runs on the loop on which it was used before, else on the library's loop.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        lent = settings.client
        self._synchronous = lent if isinstance(lent, MongoClient) else None
        self._client: AsyncClient | None = None if isinstance(lent, MongoClient) else lent
        self._loop: asyncio.AbstractEventLoop | None = None
        self._portal: Portal | None = None
        self._pid = os.getpid()
        self._counter = PoolCounter()
        self._clock = clock_of(lent)
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._operations = 0
        self._idle = asyncio.Event()
        self._opening = asyncio.Lock()
        self.closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.before_close: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._abandoned: list[object] = []
        self._gate: Gate | None = None
        self._threaded: MotorClient | None = None
        self._collections: Bounded[tuple[str, str], tuple[AsyncClient, AsyncCollection]] = Bounded(_KNOWN_COLLECTIONS)

    def __repr__(self) -> str:
        kind = "borrowed" if self.settings.client is not None else "owned"
        return f"<Connection {kind}, {'closed' if self.closed else 'open'}>"

    @property
    def portal(self) -> Portal:
        """The portal to the loop that does this connection's I/O for managers, factories and the sync repository."""
        self._refuse_in_child()
        if self.settings.client is None or self._client is None:
            return io_portal()
        self._loop = self._loop or drivers.bound_loop(self._client) or running_loop()
        if self._loop is None:
            return io_portal()
        self._portal = self._portal or portal_to(self._loop)
        return self._portal

    @property
    def identity(self) -> object:
        """An id of the servers behind this connection, the same for all connections with the same client or string."""
        return hash(self.settings.connection_string) if self.settings.client is None else id(self.settings.client)

    def when_client_is_collected(self, function: Callable[[object], None]) -> None:
        """Call `function(identity)` when a borrowed client is collected: another client can get the same identity."""
        if self.settings.client is not None:
            weakref.finalize(self.settings.client, function, self.identity).atexit = False

    def database_name(self, wanted: str | None) -> str:
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
        if self.closed:
            raise SessionClosedError("the connection is closed: open a new manager or factory")
        client = self.settings.client
        if client is None:
            client = self.portal.call(self.client)
        if isinstance(client, AsyncMongoClient):
            raise ConfigurationError(
                "a pymongo.AsyncMongoClient cannot be used synchronously: pass another client, or await this one"
            )
        return client if isinstance(client, MongoClient) else client.delegate

    async def client(self) -> AsyncClient:
        """Return the client, opened on the running loop if this is its first use, or raise `EventLoopError`."""
        loop = asyncio.get_running_loop()
        if self._is_left_behind:
            self._leave_behind()
        if self._loop is None:
            self._loop = loop if self._client is None else drivers.bound_loop(self._client) or loop
        if self._loop is not loop:
            raise EventLoopError(
                "this connection belongs to another event loop: open one repository per loop, or use the managers, "
                "which can be called from any loop"
            )
        if self._client is None:
            async with self._opening:
                if self._client is None:
                    self._client = await self._open_client(loop)
        return self._client

    async def _open_client(self, loop: asyncio.AbstractEventLoop) -> AsyncClient:
        if self._synchronous is not None:
            return await loop.run_in_executor(None, drivers.motor_over, self._synchronous, loop)
        options = self.settings.bounded_options()
        listeners = [*options.pop("event_listeners", ()), self._counter, self._clock]
        options |= {"event_listeners": listeners}
        refusal: ConfigurationError | None = None
        try:
            uri = self.settings.connection_string
            client = await loop.run_in_executor(None, drivers.open_motor, uri, loop, options)
        except (OSError, driver.PyMongoError, ValueError, TypeError, LookupError) as error:
            refusal = self.settings.refused(error)
        if refusal is not None:  # outside of `except`: the driver's error can contain the password
            raise refusal
        if not options_of(client).write_concern.acknowledged:
            raise ConfigurationError("w=0: a session cannot rely on unacknowledged writes")
        self._finalizer = weakref.finalize(self, _close_collected, client, loop, os.getpid())
        self._finalizer.atexit = False
        close_at_exit(self.aclose, loop, ExitOrder.CONNECTIONS)
        return client

    async def _commanded(self) -> AsyncClient:
        """Return the client for commands; a Motor client gets the thread pool of its gate."""
        client = await self.client()
        if not drivers.is_motor(client):
            return client
        if self._threaded is None:
            loop = asyncio.get_running_loop()
            self._gate = gate_of(client.delegate, loop)
            self._threaded = drivers.motor_over(client.delegate, loop, self._gate.executor)
        return self._threaded

    def admission(self) -> AbstractAsyncContextManager[None]:
        """Return a context that waits for a server and a thread to send a command; it raises errors of the driver."""
        return _OPEN if self._gate is None else self._gate

    @property
    def _is_left_behind(self) -> bool:
        """Whether the client belongs to a parent process, or is an owned client whose loop has ended."""
        has_ended = self.settings.client is None and self._loop is not None and self._loop.is_closed()
        return has_ended or self._pid != os.getpid()

    def _leave_behind(self) -> None:
        """Drop the client. In a forked child its sockets belong to the parent: prevent its garbage collection."""
        self._refuse_in_child()
        self._abandoned += [self._client, self._finalizer, self._gate, self._threaded, dict(self._collections)]
        self._collections.clear()
        if self._finalizer is not None:
            self._finalizer.detach()
        self._client, self._loop, self._finalizer, self._gate, self._threaded = None, None, None, None, None
        self.before_close = None
        self._pid, self._counter, self._operations, self._tasks = os.getpid(), PoolCounter(), 0, set()
        self._clock = clock_of(self.settings.client)
        self._idle, self._opening = asyncio.Event(), asyncio.Lock()

    def _refuse_in_child(self) -> None:
        if self.settings.client is not None and self._pid != os.getpid():
            raise EventLoopError("a borrowed client does not survive os.fork(): create one in the child")

    async def collection(self, database: str, name: str) -> AsyncCollection:
        """Return a collection that decodes as the codec expects and whose writes survive a failover.

        Reads go to the primary. Writes wait for a majority unless the client's own settings say otherwise.
        """
        client = await self._commanded()
        known = self._collections.get((database, name))
        if known is not None and known[0] is client:
            return known[1]
        concern = client.write_concern.document
        write_concern = WriteConcern(**concern) if "w" in concern else WriteConcern(w="majority", **concern)
        collection: AsyncCollection = client.get_database(database).get_collection(
            name,
            codec_options=CODEC_OPTIONS,
            read_preference=ReadPreference.PRIMARY,
            write_concern=write_concern,
            read_concern=ReadConcern(),
        )
        self._collections[database, name] = client, collection
        return collection

    def operation(self, *, timed: bool = True) -> AbstractAsyncContextManager[None]:
        """Return a context for which closing waits. Operations nest: during closing, inner ones can still start.

        Unless `timed` is false, an unknown clock of the server is read first.

        Raises:
            SessionClosedError: The connection is closed or closing.
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        return _Operation(self, timed)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def now(self) -> datetime:
        """Return the server's time as MongoDB stores it: UTC, whole milliseconds. Call it within an operation.

        Dates that several processes compare come from this clock: the clocks of their machines are not synchronized.
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
                    return  # the next command is refused for the same reason, for example the password, and reports it
            await asyncio.sleep(pause)

    async def _server(self, client: AsyncClient) -> None:
        if self._gate is not None:
            await self._gate.server()
        elif isinstance(client, AsyncMongoClient):
            with pymongo.timeout(options_of(client).timeout):
                _ = await client.is_primary

    def account(self, database: str | None = None) -> Account:
        if self._client is None:
            return Account(database=database)
        pool = options_of(self._client).pool_options
        credentials = getattr(pool, "_credentials", None)  # the drivers have no public attribute
        servers = drivers.topology_of(self._client).server_descriptions()
        return Account(
            user=getattr(credentials, "username", None),
            source=getattr(credentials, "source", None),
            hosts=", ".join(sorted(f"{host}:{port}" for host, port in servers)),
            database=database,
        )

    async def ping(self) -> None:
        async with self.operation(timed=False):
            with driver_errors(account=self.account):
                await self._ask("ping")

    async def check(self, database: str, name: str, seconds: float) -> None:
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
        client = self._client if self._pid == os.getpid() else None
        borrowed = self.settings.client is not None
        return {
            "pool_config": {} if client is None else pool_config(options_of(client)),
            "connections_open": None if borrowed else self._counter.open,
            "connections_in_use": None if borrowed else self._counter.in_use,
            "wait_queue": None if borrowed else self._counter.waiting + (self._gate.waiting if self._gate else 0),
        }

    def close_blocking(self) -> None:
        """Close from synchronous code; see `aclose`. A second call does nothing, even when the interpreter ends."""
        if not self.closed:
            self.portal.call(self.aclose)

    async def close_async(self) -> None:
        if not self.closed:
            await self.portal.run(self.aclose)

    async def aclose(self, seconds: float = 0.0) -> None:
        """Wait for operations and tasks, then close an owned client. Call it on its loop; `seconds` is unused."""
        self.closed = True
        if self._is_left_behind:
            self._leave_behind()
        if self.before_close is not None:
            token = _entered.set(True)
            self.start(self.before_close())
            _entered.reset(token)
        while self._tasks or self._operations:
            if self._tasks:
                await asyncio.wait(set(self._tasks))
            else:  # an operation can start a task
                self._idle.clear()
                await self._idle.wait()
        if self.settings.client is None and (client := self._client) is not None:
            self._client, self._threaded = None, None
            self._collections.clear()
            if self._finalizer is not None:
                self._finalizer.detach()
            await drivers.close_client(client)
            if self._gate is not None:
                self._gate.executor.shutdown(wait=False)


class _Operation(AbstractAsyncContextManager[None]):
    """The context of `Connection.operation`; a class, because each write enters two."""

    __slots__ = ("_connection", "_timed", "_token")

    def __init__(self, connection: Connection, timed: bool) -> None:
        self._connection = connection
        self._timed = timed

    async def __aenter__(self) -> None:
        connection = self._connection
        if connection.closed and not _entered.get():
            raise SessionClosedError("the connection is closed: open a new manager or factory")
        if connection._is_left_behind:
            connection._leave_behind()
        self._token = _entered.set(True)
        connection._operations += 1
        if self._timed and connection._clock.is_due():
            try:
                await connection._read_clock()
            except BaseException:
                await self.__aexit__()
                raise

    async def __aexit__(self, *_: object) -> None:
        _entered.reset(self._token)
        self._connection._operations -= 1
        if not self._connection._operations:
            self._connection._idle.set()


def _close_collected(client: AsyncClient, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """End the sockets and threads of a client whose connection was collected without being closed."""
    if pid == os.getpid() and loop.is_running():
        portal_to(loop).submit(drivers.close_client, client)
