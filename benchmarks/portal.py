"""Cost of a hand-over to the library's I/O thread, compared with a call on the caller's event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient

from mongodb_session_manager import MongoDBSessionManagerFactory
from mongodb_session_manager._io.loop import io_portal, portal_to

from ._bench import Bench
from ._results import Cell, Finding, Spread

_AWAIT = "await on the caller's loop"
_OWN = "hand-over to the caller's loop"
_THREAD = "hand-over to the I/O thread, awaited"
_BLOCKING = "hand-over to the I/O thread, blocking"
_RAW = "ping, Motor client"
_BORROWED = "ping, factory with the application's Motor client"
_OWNED = "ping, factory with its own client"


async def _nothing() -> None:
    return None


async def measure(bench: Bench) -> Finding:
    """Call an empty coroutine, and one that pings the server, in each way."""
    calls, pings, rounds = (50, 5, 1) if bench.quick else (2_000, 300, 9)
    here, thread = portal_to(asyncio.get_running_loop()), io_portal()
    with bench.networks([0.0]) as (uri,):
        motor: AsyncIOMotorClient[Any] = AsyncIOMotorClient(uri)
        owned, borrowed = MongoDBSessionManagerFactory(uri), MongoDBSessionManagerFactory(client=motor)

        async def blocking() -> None:
            await asyncio.to_thread(lambda: [thread.call(_nothing) for _ in range(calls)])

        ways: dict[str, Callable[[], Awaitable[object]]] = {
            _AWAIT: lambda: _repeat(_nothing, calls),
            _OWN: lambda: _repeat(lambda: here.run(_nothing), calls),
            _THREAD: lambda: _repeat(lambda: thread.run(_nothing), calls),
            _BLOCKING: blocking,
            _RAW: lambda: _repeat(lambda: motor.admin.command("ping"), pings),
            _BORROWED: lambda: _repeat(borrowed.ping_async, pings),
            _OWNED: lambda: _repeat(owned.ping_async, pings),
        }
        bench.begin(len(ways) * rounds)

        async def sample(way: str) -> float:
            start = time.perf_counter()
            await ways[way]()
            return (time.perf_counter() - start) / (pings if way.startswith("ping") else calls) * 1e6

        await asyncio.gather(owned.ping_async(), borrowed.ping_async())
        found = await bench.rounds(list(ways), rounds, sample)
        await owned.close_async()
        await borrowed.close_async()
        motor.close()
    rows: list[dict[str, Cell]] = [{"way": way, "each, µs": Spread.of(values)} for way, values in found.items()]
    setting = {"calls": calls, "pings": pings, "rounds": rounds, "network": "none", "both event loops": "idle"}
    return Finding("Hand-over to the I/O thread", setting, rows)


async def _repeat(call: Callable[[], Awaitable[object]], times: int) -> None:
    for _ in range(times):
        await call()
