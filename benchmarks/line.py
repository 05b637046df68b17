"""Requests that wait in line for their sessions, with `on_busy="wait"`.

Two factories share nothing, so their managers wait for each other like those of two processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from dataclasses import asdict, dataclass

from ._bench import Bench, new_id
from ._contenders import LIBRARY, Contender, contender
from ._counting import Counter
from ._model import INSTANT, Pace, agent
from ._results import Budget, Cell, Finding, Spread, percentile

_NO_LINE = "a session for each request"
_ONE = "one process"
_TWO = "two factories"
_WAYS = (_NO_LINE, _ONE, _TWO)

_MOST_GAP = {_ONE: 10, _TWO: 500}
"""The budgets of the 99th percentile, in milliseconds."""


@dataclass(frozen=True)
class _Case:
    """Requests that arrive at once for each session.

    Attributes:
        requests: The number of requests, a multiple of `sessions`.
        sessions: The number of sessions; at most as many requests have their turn at the same time.
        apart: Seconds between the arrivals for two sessions, so that their turns do not end at the same time.
    """

    name: str
    pace: Pace
    requests: int
    sessions: int
    rounds: int
    apart: float = 0.0


_SLOW = "a model of one second"
_CASES = (
    _Case("a model without delay", INSTANT, 1_000, 50, 3),
    _Case(_SLOW, Pace(tokens=20, seconds=0.05, parsed=1), 300, 50, 3, apart=0.02),
)
_QUICK = (_Case(_SLOW, Pace(tokens=2, seconds=0.005, parsed=1), 9, 3, 1),)


@dataclass(frozen=True)
class _Sample:
    """One run of all requests.

    Attributes:
        requests_per_second: The rate of the run.
        gaps: Milliseconds from the end of each turn to the beginning of the next one.
        commands: The number of commands per request.
    """

    requests_per_second: float
    gaps: list[float]
    commands: float


async def measure(bench: Bench) -> Finding:
    """Measure a line in one process and across two factories, and the same requests without a line."""
    cases = _QUICK if bench.quick else _CASES
    bench.begin(sum(case.rounds * len(_WAYS) for case in cases))
    rows: list[dict[str, Cell]] = []
    budgets = []
    with bench.networks([0.0]) as (uri,):
        for case in cases:

            async def sample(way: str, case: _Case = case) -> _Sample:
                return await _requests(way, case, uri)

            found = await bench.rounds(_WAYS, case.rounds, sample)
            rows += [_row(case, way, found) for way in _WAYS]
            if case.name == _SLOW:
                budgets = [
                    Budget.at_most(
                        f"a waiter's turn after the release, {way}, p99",
                        most,
                        Spread.of(percentile(one.gaps, 99) for one in found[way]),
                        " ms",
                    )
                    for way, most in _MOST_GAP.items()
                ]
    setting = {"network": "none", "cases": [asdict(case) for case in cases]}
    return Finding("Waiting in line", setting, rows, budgets)


def _row(case: _Case, way: str, found: dict[str, list[_Sample]]) -> dict[str, Cell]:
    samples = found[way]
    rates, base = ([one.requests_per_second for one in each] for each in (samples, found[_NO_LINE]))
    return {
        "case": f"{case.requests:,} requests on {case.sessions} sessions, {case.name}",
        "line": way,
        "requests/s": Spread.of(rates),
        "× no line": Spread.of_ratios(rates, base),
        "gap p50, ms": Spread.of(percentile(one.gaps, 50) for one in samples),
        "gap p99, ms": Spread.of(percentile(one.gaps, 99) for one in samples),
        "commands/request": Spread.of(one.commands for one in samples),
    }


async def _requests(way: str, case: _Case, uri: str) -> _Sample:
    begun: dict[int, list[float]] = defaultdict(list)
    ended: dict[int, list[float]] = defaultdict(list)
    counter = Counter()
    # Without a line, the requests that would share a session come one after the other, each with a session of its own.
    slots = [asyncio.Semaphore(1 if way == _NO_LINE else case.requests) for _ in range(case.sessions)]

    async def request(number: int, subject: Contender, session_id: str) -> None:
        line = number % case.sessions
        await asyncio.sleep(line * case.apart)
        async with slots[line], subject.session(session_id) as manager:
            begun[line].append(time.perf_counter())
            await agent(manager, case.pace).invoke_async("And now?")
            ended[line].append(time.perf_counter())

    options = {"on_busy": "wait", "busy_timeout": 600.0, "event_listeners": [counter]}
    async with contextlib.AsyncExitStack() as stack:
        count = 2 if way == _TWO else 1
        subjects = [await stack.enter_async_context(contender(LIBRARY, uri, **options)) for _ in range(count)]
        names = [new_id() for _ in range(case.requests if way == _NO_LINE else case.sessions)]
        sessions = [names[number % len(names)] for number in range(case.requests)]
        # The requests of a session take turns between the factories.
        turns = [subjects[number // case.sessions % count] for number in range(case.requests)]
        counter.count, start = 0, time.perf_counter()
        await asyncio.gather(*map(request, range(case.requests), turns, sessions))
        took = time.perf_counter() - start
        commands = counter.count / case.requests
    gaps = [gap for line in ended for gap in _gaps(begun[line], ended[line])]
    return _Sample(case.requests / took, gaps, commands)


def _gaps(begun: list[float], ended: list[float]) -> list[float]:
    """Return the milliseconds from the end of each turn to the beginning of the next one.

    The next turn can begin a little before the caller learns of the end of the last one.
    """
    return [max(0.0, begin - end) * 1e3 for end, begin in zip(ended, begun[1:], strict=False)]
