"""Throughput and event-loop lag of many concurrent streams in one process, as in a web server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

from strands import Agent
from strands.session import SessionManager

from ._bench import Bench, new_id
from ._contenders import (
    DESCRIPTIONS,
    FILE,
    LIBRARY,
    MOTOR,
    NONE,
    PER_INVOCATION,
    PYMONGO,
    SNAPSHOT,
    Contender,
    contender,
)
from ._model import Pace, agent, look
from ._results import Budget, Cell, Finding, Spread, percentile

ROUND_TRIP = 0.005
TICK = 0.005

PACED = Pace(tokens=75, seconds=0.005, parsed=5)
"""At this pace, 50 streams without a session manager reach about 109 turns per second and idle half of the time."""

PRESSED = Pace(tokens=40, seconds=0.0, parsed=20)
"""Without a delay of the model, only the processor time of a turn counts."""


REAL = Pace(tokens=500, seconds=0.02, parsed=5)
"""A real model at 50 tokens per second: a turn takes 10 seconds, and 50 streams need about a fifth of a processor."""


@dataclass(frozen=True)
class _Case:
    """A set of contenders and its parameters.

    Attributes:
        turns: Turns of each stream.
        live: Whether an agent is kept for all turns of a stream.
        calls: Whether the model calls a tool in each turn.
        apart: Seconds between the beginnings of two streams.
        least: The budget of turns/s relative to no session manager.
    """

    name: str
    contenders: tuple[str, ...]
    pace: Pace
    streams: int
    turns: int
    rounds: int
    live: bool = False
    calls: bool = False
    apart: float = 0.0
    least: float | None = None


_ALL = (NONE, LIBRARY, PER_INVOCATION, MOTOR, PYMONGO, FILE, SNAPSHOT)
_DRIVERS = (NONE, LIBRARY, MOTOR, PYMONGO)
_FEWER = (NONE, LIBRARY, PYMONGO, FILE, SNAPSHOT)

FRESH_50 = "50 streams, a new agent for each request"
REAL_50 = "50 streams, real-life turns with a tool call"

CASES = (
    _Case(FRESH_50, _ALL, PACED, 50, 4, 7, least=0.8),
    _Case("50 streams, live agents", _DRIVERS, PACED, 50, 4, 5, live=True),
    _Case("50 streams, a model without delay", _FEWER, PRESSED, 50, 4, 5),
    _Case("200 streams, a new agent for each request", _FEWER, PACED, 200, 3, 5, least=0.6),
    _Case(REAL_50, _ALL, REAL, 50, 2, 3, calls=True, apart=0.1),
)
_QUICK = (
    _Case(FRESH_50, (NONE, LIBRARY), Pace(3, 0.001, 1), 3, 2, 2, least=0.8),
    _Case(REAL_50, (NONE, LIBRARY), Pace(3, 0.001, 1), 3, 1, 1, calls=True, apart=0.001),
)


@dataclass(frozen=True)
class _Sample:
    turns_per_second: float
    processor_ms: float
    lag_p50: float
    lag_p99: float
    lag_max: float


async def measure(bench: Bench) -> Finding:
    """Measure the streams of each contender."""
    cases = _QUICK if bench.quick else CASES
    bench.begin(sum(case.rounds * len(case.contenders) for case in cases))
    rows: list[dict[str, Cell]] = []
    budgets: list[Budget] = []
    with bench.networks([ROUND_TRIP]) as (uri,):
        for case in cases:

            async def sample(name: str, case: _Case = case) -> _Sample:
                async with contender(name, uri) as subject:
                    return await _streams(subject, case)

            found = await bench.rounds(case.contenders, case.rounds, sample)
            rows += [_row(case, name, samples, found[NONE]) for name, samples in found.items()]
            budgets += _budgets(case, found)
    setting = {
        "round trip": ROUND_TRIP,
        "tick of the lag meter": TICK,
        "cases": [asdict(case) for case in cases],
        "contenders": DESCRIPTIONS,
    }
    return Finding("Concurrent streams", setting, rows, budgets)


def _budgets(case: _Case, found: dict[str, list[_Sample]]) -> list[Budget]:
    if case.least is None:
        return []
    ours, none = found[LIBRARY], found[NONE]
    lags = [[one.lag_p99 for one in samples] for samples in (ours, none)]
    budgets = [
        Budget.at_least(f"{case.name}: turns/s relative to no session manager", case.least, _ratio(ours, none), " ×"),
        Budget.at_most(
            f"{case.name}: event-loop lag p99 relative to no session manager", 1.5, Spread.of_ratios(*lags), " ×"
        ),
    ]
    return budgets + [
        Budget.at_least(f"{case.name}: turns/s relative to {name}", 1, _ratio(ours, found[name]), " ×")
        for name in (FILE, SNAPSHOT)
        if case.name == FRESH_50 and name in found
    ]


def _ratio(samples: list[_Sample], base: list[_Sample]) -> Spread:
    return Spread.of_ratios([one.turns_per_second for one in samples], [one.turns_per_second for one in base])


def _row(case: _Case, name: str, samples: list[_Sample], base: list[_Sample]) -> dict[str, Cell]:
    return {
        "case": case.name,
        "contender": name,
        "turns/s": Spread.of(one.turns_per_second for one in samples),
        "× none": _ratio(samples, base),
        "lag p50, ms": Spread.of(one.lag_p50 for one in samples),
        "lag p99, ms": Spread.of(one.lag_p99 for one in samples),
        "lag max, ms": Spread.of(one.lag_max for one in samples),
        "processor/turn, ms": Spread.of(one.processor_ms for one in samples),
    }


async def _streams(subject: Contender, case: _Case) -> _Sample:
    sessions = [new_id() for _ in range(case.streams)]
    async with contextlib.AsyncExitStack() as stack:
        agents: dict[str, Agent] = {}
        if case.live:
            for session_id in sessions:
                manager = await stack.enter_async_context(subject.session(session_id))
                agents[session_id] = _agent(manager, case)

        async def stream(number: int, session_id: str) -> None:
            await asyncio.sleep(number * case.apart)
            for _ in range(case.turns):
                if case.live:
                    await _turn(agents[session_id])
                    continue
                async with subject.session(session_id) as manager:
                    await _turn(_agent(manager, case))

        async with _lag_meter() as lags:
            processor, start = time.process_time(), time.perf_counter()
            await asyncio.gather(*(stream(number, session_id) for number, session_id in enumerate(sessions)))
            took, used = time.perf_counter() - start, time.process_time() - processor
    turns = case.streams * case.turns
    return _Sample(turns / took, used / turns * 1e3, percentile(lags, 50), percentile(lags, 99), percentile(lags, 100))


def _agent(manager: SessionManager[Any] | None, case: _Case) -> Agent:
    return agent(manager, case.pace, calls="look" if case.calls else None, tools=[look] if case.calls else [])


async def _turn(streaming: Agent) -> None:
    async for _ in streaming.stream_async("Tell me more."):
        pass


@contextlib.asynccontextmanager
async def _lag_meter() -> AsyncIterator[list[float]]:
    """Yield a list that fills with the event-loop lag in milliseconds."""
    lags: list[float] = []

    async def tick() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(TICK)
            lags.append((time.perf_counter() - start - TICK) * 1e3)

    ticker = asyncio.create_task(tick())
    try:
        yield lags
    finally:
        ticker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticker
