"""Processor time that storing adds to a turn of a live agent, compared with two bare updates by the same driver."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient
from strands.hooks import AfterInvocationEvent, MessageAddedEvent

from ._bench import Bench, new_id
from ._contenders import DATABASE, LIBRARY, MOTOR, NONE, PYMONGO, contender
from ._model import agent
from ._results import Budget, Cell, Finding, Spread

_BARE_MOTOR = "two updates, Motor"
_BARE_PYMONGO = "two updates, PyMongo async"
_FLOOR_MOTOR = "a turn that awaits two updates, Motor"
_FLOOR_PYMONGO = "a turn that awaits two updates, PyMongo async"
_LIBRARY = (LIBRARY, MOTOR, PYMONGO)
_BARE = {
    _FLOOR_MOTOR: _BARE_MOTOR,
    _FLOOR_PYMONGO: _BARE_PYMONGO,
    LIBRARY: _BARE_MOTOR,
    MOTOR: _BARE_MOTOR,
    PYMONGO: _BARE_PYMONGO,
}
"""The updates that a way is compared with. The floor is a turn without a session manager that awaits them in a hook."""

_WAYS = (_BARE_MOTOR, _BARE_PYMONGO, NONE, *_BARE)


@dataclass(frozen=True)
class _Sample:
    """Milliseconds of a turn, or of two updates, one after the other."""

    processor: float
    took: float


async def measure(bench: Bench) -> Finding:
    """Measure turns and updates, one after the other."""
    turns, rounds = (3, 1) if bench.quick else (60, 9)
    bench.begin(len(_WAYS) * rounds)
    with bench.networks([0.0]) as (uri,):

        async def sample(way: str) -> _Sample:
            if way in (_BARE_MOTOR, _BARE_PYMONGO, _FLOOR_MOTOR, _FLOOR_PYMONGO):
                return await _updates(way, uri, turns)
            async with contender(way, uri) as subject, subject.session(new_id()) as manager:
                live = agent(manager)
                return await _measured(lambda: live.invoke_async("And now?"), turns)

        found = await bench.rounds(_WAYS, rounds, sample)
    rows = [_row(way, found) for way in _WAYS]
    budgets = [
        Budget.at_most(f"processor time added to a live turn, {way}", 1.6, _ratio(way, found), " × two updates")
        for way in _LIBRARY
    ]
    setting = {"turns": turns, "rounds": rounds, "network": "none", "update": "$set and $push of a message, w=majority"}
    return Finding("Processor time of a live turn", setting, rows, budgets)


def _row(way: str, found: dict[str, list[_Sample]]) -> dict[str, Cell]:
    return {
        "way": way,
        "processor, ms": Spread.of(one.processor for one in found[way]),
        "added, ms": Spread.of(_added(way, found)) if way in _BARE else None,
        "added, × two updates": _ratio(way, found) if way in _BARE else None,
        "wall clock, ms": Spread.of(one.took for one in found[way]),
    }


def _added(way: str, found: dict[str, list[_Sample]]) -> list[float]:
    return [one.processor - none.processor for one, none in zip(found[way], found[NONE], strict=True)]


def _ratio(way: str, found: dict[str, list[_Sample]]) -> Spread:
    return Spread.of_ratios(_added(way, found), [one.processor for one in found[_BARE[way]]])


async def _updates(way: str, uri: str, times: int) -> _Sample:
    """Measure two updates on their own, or in the hooks of a turn without a session manager."""
    client: Any = AsyncIOMotorClient(uri) if way in (_BARE_MOTOR, _FLOOR_MOTOR) else AsyncMongoClient(uri)
    collection = client[DATABASE]["updates"]
    session_id = new_id()
    message = {"role": "user", "content": [{"text": "And now?"}]}
    update = {"$set": {"latest": message}, "$push": {"messages": message}}

    async def one() -> None:
        await collection.update_one({"_id": session_id}, update, upsert=True)

    async def two() -> None:
        await one()
        await one()

    async def on_question(event: MessageAddedEvent[Any]) -> None:
        if event.message["role"] == "user":
            await one()

    async def on_end(event: AfterInvocationEvent) -> None:
        await one()

    live = agent(None)
    live.hooks.add_callback(MessageAddedEvent, on_question)
    live.hooks.add_callback(AfterInvocationEvent, on_end)
    try:
        if way in (_BARE_MOTOR, _BARE_PYMONGO):
            return await _measured(two, times)
        return await _measured(lambda: live.invoke_async("And now?"), times)
    finally:
        closing = client.close()
        if closing is not None:
            await closing


async def _measured(call: Callable[[], Awaitable[object]], times: int) -> _Sample:
    """Call it `times` times, after a first call that opens connections; return the mean."""
    await call()
    processor, start = time.process_time(), time.perf_counter()
    for _ in range(times):
        await call()
    used, took = time.process_time() - processor, time.perf_counter() - start
    return _Sample(used / times * 1e3, took / times * 1e3)
