"""A simulated network: a process that forwards TCP connections and delays every byte.

The proxy is a separate process, so that it does not compete with the measured code for the interpreter's lock. It
delays bytes, but does not limit the throughput, like a fast network over a long distance.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import cast


@contextlib.contextmanager
def proxies(port: int, round_trips: Sequence[float]) -> Iterator[list[int]]:
    """Run a process that forwards to a local port; yield the port to connect to for each round trip.

    Args:
        port: The local port of the server.
        round_trips: Seconds that the proxy adds to a round trip, half in each direction.
    """
    command = [sys.executable, "-I", __file__, str(port), *map(str, round_trips)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            ports = [int(word) for word in process.stdout.readline().split()]
            if len(ports) != len(round_trips):
                raise RuntimeError("the proxy did not start")
            yield ports
        finally:
            process.stdin.close()  # ends the process


class _End(asyncio.Protocol):
    """One end of a forwarded connection; forwards received bytes to the other end after `delay` seconds."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.other: _End
        self.transport: asyncio.Transport
        self._held: deque[bytes] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._held.append(data)
        # Timers of the same time can fire in any order, so each one forwards the oldest bytes.
        asyncio.get_running_loop().call_later(self.delay, self._forward)

    def connection_lost(self, exc: Exception | None) -> None:
        asyncio.get_running_loop().call_later(self.delay, self.other.transport.close)

    def _forward(self) -> None:
        self.other.transport.write(self._held.popleft())


class _ClientEnd(_End):
    """The end to which a client has connected; it connects to the server."""

    def __init__(self, delay: float, port: int) -> None:
        super().__init__(delay)
        self.other = _End(delay)
        self.other.other = self
        self._port = port
        self._connecting: asyncio.Task[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self.other, "127.0.0.1", self._port)
        except OSError:
            self.transport.abort()
        else:
            self.transport.resume_reading()


async def _serve(port: int, round_trips: Sequence[float]) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)  # readable at its end, when the parent closes it or dies
    ports = []
    for round_trip in round_trips:
        delay = round_trip / 2
        server = await loop.create_server(lambda delay=delay: _ClientEnd(delay, port), "127.0.0.1", 0)  # type: ignore[misc]
        ports.append(server.sockets[0].getsockname()[1])
    print(*ports, flush=True)
    await ended.wait()


def main() -> None:
    """Forward connections until standard input ends."""
    port, *round_trips = sys.argv[1:]
    # select() waits in microseconds; epoll and poll wait in milliseconds, which is too coarse for short round trips.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_serve(int(port), [float(word) for word in round_trips]))


if __name__ == "__main__":
    main()
