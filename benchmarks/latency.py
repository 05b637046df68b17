"""Latency of opening a session and of a turn with a model without delay, at several round trips."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Any

import pymongo
from pymongo.collection import Collection

from mongodb_session_manager import MongoDBSessionManagerFactory

from ._bench import Bench, new_id
from ._contenders import DATABASE, DESCRIPTIONS, FILE, LIBRARY, NONE, PER_INVOCATION, SNAPSHOT, contender
from ._model import agent
from ._results import Cell, Finding, Spread

_NONE_SYNC = "none, synchronous"
_LIBRARY_SYNC = "library, synchronous"

_WRITE = "one write, PyMongo"

_CONTENDERS = (_WRITE, NONE, LIBRARY, PER_INVOCATION, FILE, SNAPSHOT, _NONE_SYNC, _LIBRARY_SYNC)
_DESCRIPTIONS = {
    **DESCRIPTIONS,
    _WRITE: "an update of a small document by PyMongo's MongoClient with w=majority, as the lower bound",
    _NONE_SYNC: 'the same with `agent("...")`, for which Strands starts a thread and an event loop each time',
    _LIBRARY_SYNC: 'MongoDBSessionManager from a factory, with `agent("...")`',
}


@dataclass(frozen=True)
class _Sample:
    """Measurements in seconds.

    Attributes:
        opening: Opening a session and restoring its agent.
        turn: A turn, as the median of several.
    """

    opening: float
    turn: float


async def measure(bench: Bench) -> Finding:
    """Measure each contender at each round trip."""
    round_trips = [0.0, 0.005] if bench.quick else [0.0, 0.001, 0.005, 0.02]
    turns, rounds = (2, 1) if bench.quick else (10, 7)
    keys = [(seconds, name) for seconds in round_trips for name in _CONTENDERS]
    bench.begin(len(keys) * rounds)
    with bench.networks(round_trips) as uris:
        uri = dict(zip(round_trips, uris, strict=True))

        async def sample(key: tuple[float, str]) -> _Sample:
            seconds, name = key
            if name == _WRITE:
                return await asyncio.to_thread(_write, uri[seconds], turns)
            if name in (_NONE_SYNC, _LIBRARY_SYNC):
                return await asyncio.to_thread(_synchronous, name, uri[seconds], turns)
            return await _asynchronous(name, uri[seconds], turns)

        found = await bench.rounds(keys, rounds, sample)
    rows = [_row(*key, samples, found) for key, samples in found.items()]
    setting = {"round trips, s": round_trips, "turns": turns, "rounds": rounds, "contenders": _DESCRIPTIONS}
    return Finding("Latency of one turn", setting, rows)


def _row(
    seconds: float, name: str, samples: list[_Sample], found: dict[tuple[float, str], list[_Sample]]
) -> dict[str, Cell]:
    base = found[seconds, _NONE_SYNC if name in (_NONE_SYNC, _LIBRARY_SYNC) else NONE]
    writes = [one.turn for one in found[seconds, _WRITE]]
    added = [one.turn - other.turn for one, other in zip(samples, base, strict=True)]
    compared = name not in (_WRITE, NONE, _NONE_SYNC)
    return {
        "round trip, ms": seconds * 1e3,
        "contender": name,
        "opening, ms": Spread.of(one.opening * 1e3 for one in samples) if name != _WRITE else None,
        "turn, ms": Spread.of(one.turn * 1e3 for one in samples),
        "added to a turn, ms": Spread.of(value * 1e3 for value in added) if compared else None,
        "added, × one write": Spread.of_ratios(added, writes) if compared else None,
    }


async def _asynchronous(name: str, uri: str, turns: int) -> _Sample:
    async with contender(name, uri) as subject:
        session_id = new_id()
        async with subject.session(session_id) as manager:
            await agent(manager).invoke_async("Hello.")
        start = time.perf_counter()
        async with subject.session(session_id) as manager:
            live = agent(manager)
            opening = time.perf_counter() - start
            took = []
            for _ in range(turns):
                start = time.perf_counter()
                await live.invoke_async("And now?")
                took.append(time.perf_counter() - start)
    return _Sample(opening, statistics.median(took))


def _write(uri: str, turns: int) -> _Sample:
    client: pymongo.MongoClient[dict[str, Any]]
    with pymongo.MongoClient(uri, w="majority") as client:
        collection: Collection[dict[str, Any]] = client[DATABASE]["writes"]
        took = []
        for _ in range(turns + 1):  # the first opens the connection
            start = time.perf_counter()
            collection.update_one({"_id": 1}, {"$inc": {"count": 1}}, upsert=True)
            took.append(time.perf_counter() - start)
    return _Sample(0.0, statistics.median(took[1:]))


def _synchronous(name: str, uri: str, turns: int) -> _Sample:
    with MongoDBSessionManagerFactory(uri, DATABASE) as factory:
        session_id = new_id()
        with factory.create_session_manager(session_id) as first:
            agent(first)("Hello.")
        start = time.perf_counter()
        manager = factory.create_session_manager(session_id) if name == _LIBRARY_SYNC else None
        live = agent(manager)
        opening = time.perf_counter() - start
        took = []
        for _ in range(turns):
            start = time.perf_counter()
            live("And now?")
            took.append(time.perf_counter() - start)
        if manager is not None:
            manager.close()
    return _Sample(opening, statistics.median(took))
