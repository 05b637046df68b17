"""A TCP proxy in front of a mongod, under the control of a test.

    with Proxy(server) as proxy, MongoDBSessionManagerFactory(proxy.uri) as factory:
        proxy.delay = 0.1
        proxy.drop_after_request(command("update"))

It reads the messages of MongoDB's wire protocol and forwards them whole. It runs on a thread and an event loop of its
own; everything may be called from any thread and is in force when the call returns.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from support import client_of

_HEADER = struct.Struct("<iiii")  # length, request id, response to, opcode


def command(name: str) -> bytes:
    """Return bytes that the message of a command holds which names its collection, like `update` or `findAndModify`."""
    return b"\x02" + name.encode() + b"\0"


class _CutError(Exception):
    """The connection is to be cut."""


@dataclass
class _Rule:
    """What befalls the next `times` requests that hold `match`, or, with `after`, the replies to them.

    Either the connection is cut once `kept` bytes are forwarded, counted from the end if negative, or with `freeze`
    everything freezes.
    """

    match: bytes
    after: bool
    times: int = 1
    kept: int = 0
    freeze: bool = False
    then_refuse: bool = False


@dataclass
class _Connection:
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    server: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    doomed: dict[int, _Rule] = field(default_factory=dict)  # by id, requests with a rule for their reply


class Proxy:
    """Forwards between clients and the primary of `server`.

    Attributes:
        uri: The connection string of the server by way of the proxy; drivers stay on that way.
        request_delay: Seconds each message to the server is held.
        reply_delay: Seconds each message to a client is held.
        bytes_per_second: How fast each connection forwards, per direction; `None` for at once.
        connections: How many connections were accepted.
        requests: How many messages came from clients.
        replies: How many messages came from the server.
        dropped: How many connections `drop_...`, `cut_...` and `refuse_after_request` have cut.
        frozen: How often `freeze_before_request` and `freeze_after_request` have frozen everything.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self.request_delay = 0.0
        self.reply_delay = 0.0
        self.bytes_per_second: float | None = None
        self.connections = 0
        self.requests = 0
        self.replies = 0
        self.dropped = 0
        self.frozen = 0
        self._rules: list[_Rule] = []
        self._handlers: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        with client_of(self._server) as client:
            client.admin.command("ping")
            address = client.address
        assert address is not None
        self._address = address
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(ready)), name="proxy in front of mongod", daemon=True
        )
        self._thread.start()
        assert ready.wait(30), "the proxy did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the proxy did not end"

    # What a test does.

    @property
    def uri(self) -> str:
        hosts, _, rest = self._server.partition("://")[2].partition("/")
        credentials, at, _ = hosts.rpartition("@")
        database, _, options = rest.partition("?")
        replaced = ("", "replicaset", "directconnection")
        kept = [option for option in options.split("&") if option.partition("=")[0].lower() not in replaced]
        query = "&".join([*kept, "directConnection=true"])
        return f"mongodb://{credentials}{at}127.0.0.1:{self.port}/{database}?{query}"

    @property
    def delay(self) -> tuple[float, float]:
        """Seconds a message is held on its way to the server and to the client; one number sets both."""
        return self.request_delay, self.reply_delay

    @delay.setter
    def delay(self, seconds: float | tuple[float, float]) -> None:
        self.request_delay, self.reply_delay = seconds if isinstance(seconds, tuple) else (seconds, seconds)

    @property
    def open_connections(self) -> int:
        """How many connections there are now."""
        return len(self._handlers)

    def freeze(self) -> None:
        """Hold every message from now on, connections stay open."""
        self._do(self._flowing.clear)

    def thaw(self) -> None:
        """Forward what was held, and everything after it; what a client no longer waits for reaches the server, too."""
        self._do(self._flowing.set)

    def refuse(self) -> None:
        """Cut all connections and refuse new ones, like a server that is down."""
        self._run(self._go_away())

    def accept(self) -> None:
        """Be reachable again."""
        self._run(self._listen())

    def cut(self) -> None:
        """Cut all connections; new ones are welcome."""
        self._do(self._cut_all)

    def drop_after_request(self, match: bytes, times: int = 1) -> None:
        """Have the server apply the next `times` messages with `match`, and cut the connection instead of replying."""
        self._add(_Rule(match, after=True, times=times))

    def drop_before_request(self, match: bytes, times: int = 1) -> None:
        """Cut the connection at the next `times` messages with `match`, which never reach the server."""
        self._add(_Rule(match, after=False, times=times))

    def cut_request(self, match: bytes, kept: int) -> None:
        """Cut the connection after `kept` bytes of the next message with `match`; negative ones count from its end."""
        self._add(_Rule(match, after=False, kept=kept))

    def cut_reply(self, match: bytes, kept: int) -> None:
        """Cut the connection after `kept` bytes of the reply to the next message with `match`."""
        self._add(_Rule(match, after=True, kept=kept))

    def freeze_before_request(self, match: bytes) -> None:
        """Freeze when the next message with `match` comes, which is held like everything from then on."""
        self._add(_Rule(match, after=False, freeze=True))

    def freeze_after_request(self, match: bytes) -> None:
        """Have the server apply the next message with `match`, and freeze when its reply comes."""
        self._add(_Rule(match, after=True, freeze=True))

    def refuse_after_request(self, match: bytes) -> None:
        """Like `drop_after_request`, and be unreachable from then on: the server died as soon as it had written."""
        self._add(_Rule(match, after=True, then_refuse=True))

    def reset(self) -> None:
        """Be transparent again; forget all rules and counts."""
        self.delay, self.bytes_per_second = 0.0, None
        self._do(self._rules.clear)
        self.thaw()
        self.accept()
        self.connections = self.requests = self.replies = self.dropped = self.frozen = 0

    # On the proxy's loop.

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def _do(self, action: Callable[[], object]) -> None:
        async def run() -> None:
            action()

        self._run(run())

    def _add(self, rule: _Rule) -> None:
        self._do(lambda: self._rules.append(rule))

    async def _serve(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._flowing = asyncio.Event()
        self._flowing.set()
        # One that never listens keeps the port while connections are refused.
        with _bound(0) as reserved:
            self.port = reserved.getsockname()[1]
            self._listener: asyncio.Server | None = None
            await self._listen()
            ready.set()
            await self._stop.wait()
            await self._go_away()
            while self._handlers:
                await asyncio.wait(self._handlers)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accept, sock=_bound(self.port))

    async def _go_away(self) -> None:
        if (listener := self._listener) is not None:
            self._listener = None
            for each in listener.sockets:
                self._loop.remove_reader(each)
            for _ in range(2):  # until what was accepted has its handler: asyncio forgets to close it otherwise
                await asyncio.sleep(0)
            listener.close()
        self._cut_all()

    def _cut_all(self) -> None:
        for handler in self._handlers:
            handler.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle a connection; one that is cancelled before its handler began is closed all the same."""
        handler = asyncio.ensure_future(self._handle(reader, writer))
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)
        handler.add_done_callback(lambda _: writer.transport.abort())

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            self.connections += 1
            server = await asyncio.open_connection(*self._address)
            writers.append(server[1])
            for each in writers:
                each.transport.set_write_buffer_limits(high=0)  # so that a message is sent when `drain` returns
            await self._pump(_Connection((reader, writer), server))
        except (OSError, asyncio.CancelledError):
            pass  # either side hung up, or the test cuts
        finally:
            for each in writers:
                each.transport.abort()
            for each in writers:
                with suppress(OSError, asyncio.CancelledError):
                    await each.wait_closed()

    async def _pump(self, connection: _Connection) -> None:
        """Forward in both directions until one of them ends: by hanging up, by a rule, or because the test cuts."""
        directions = [
            asyncio.ensure_future(self._requests(connection)),
            asyncio.ensure_future(self._replies(connection)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)

    async def _requests(self, connection: _Connection) -> None:
        while True:
            request_id, _, message = await _read(connection.client[0])
            self.requests += 1
            rule = next((rule for rule in self._rules if rule.match in message), None)
            if rule is not None:
                rule.times -= 1
                if not rule.times:
                    self._rules.remove(rule)
                if rule.after:
                    connection.doomed[request_id] = rule
                else:
                    await self._meet(rule, message, connection.server[1])
            await self._forward(message, self.request_delay, connection.server[1])

    async def _replies(self, connection: _Connection) -> None:
        while True:
            _, response_to, message = await _read(connection.server[0])
            self.replies += 1
            if (rule := connection.doomed.get(response_to)) is not None:
                await self._meet(rule, message, connection.client[1])
            await self._forward(message, self.reply_delay, connection.client[1])

    async def _meet(self, rule: _Rule, message: bytes, writer: asyncio.StreamWriter) -> None:
        if rule.freeze:
            self.frozen += 1
            self._flowing.clear()
            return
        self.dropped += 1
        writer.write(message[: rule.kept])
        await writer.drain()
        if rule.then_refuse:
            self._dying = asyncio.ensure_future(self._go_away())
        raise _CutError

    async def _forward(self, message: bytes, delay: float, writer: asyncio.StreamWriter) -> None:
        if delay:
            await asyncio.sleep(delay)
        await self._flowing.wait()
        step = len(message) if self.bytes_per_second is None else max(1, int(self.bytes_per_second / 100))
        for start in range(0, len(message), step):
            writer.write(message[start : start + step])
            await writer.drain()
            if self.bytes_per_second is not None:
                await asyncio.sleep(step / self.bytes_per_second)


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound


async def _read(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    header = await reader.readexactly(_HEADER.size)
    length, request_id, response_to, _ = _HEADER.unpack(header)
    return request_id, response_to, header + await reader.readexactly(length - _HEADER.size)
