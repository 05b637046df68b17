"""Time from a request to the first token of the answer, at several round trips."""

from __future__ import annotations

import time
from dataclasses import dataclass

from strands import Agent

from ._bench import Bench, new_id
from ._contenders import DESCRIPTIONS, FILE, LIBRARY, NONE, OVERLAP, PER_INVOCATION, SNAPSHOT, contender
from ._counting import Counter
from ._model import agent
from ._results import Budget, Cell, Finding, Spread

_CONTENDERS = (NONE, LIBRARY, OVERLAP, PER_INVOCATION, FILE, SNAPSHOT)
_BUDGETS = {LIBRARY: 2, OVERLAP: 1, PER_INVOCATION: 1}


@dataclass(frozen=True)
class _First:
    """Seconds until the first token, and the commands that the server has answered until then."""

    seconds: float
    answered: int


@dataclass(frozen=True)
class _Sample:
    """The first token of a request with a new agent, which opens its session, and of one with a live agent."""

    new: _First
    live: _First


async def measure(bench: Bench) -> Finding:
    """Measure each contender at each round trip."""
    round_trips, rounds = ([0.0, 0.02], 1) if bench.quick else ([0.0, 0.005, 0.02], 15)
    keys = [(seconds, name) for seconds in round_trips for name in _CONTENDERS]
    bench.begin(len(keys) * rounds)
    with bench.networks(round_trips) as uris:
        uri = dict(zip(round_trips, uris, strict=True))

        async def sample(key: tuple[float, str]) -> _Sample:
            return await _requests(key[1], uri[key[0]])

        found = await bench.rounds(keys, rounds, sample)
    rows = [_row(key, found) for key in keys]
    budgets = [
        Budget.at_most(f"round trips before the first token, new agent, {name}", most, _round_trips(found, name)[0])
        for name, most in _BUDGETS.items()
    ]
    setting = {"round trips, s": round_trips, "rounds": rounds, "contenders": DESCRIPTIONS}
    return Finding("Time to the first token", setting, rows, budgets)


_Found = dict[tuple[float, str], list[_Sample]]


def _row(key: tuple[float, str], found: _Found) -> dict[str, Cell]:
    seconds, name = key
    new, live = _round_trips(found, name)
    samples, base = found[key], found[seconds, NONE]
    added = [one.new.seconds - other.new.seconds for one, other in zip(samples, base, strict=True)]
    return {
        "round trip, ms": seconds * 1e3,
        "contender": name,
        "new agent, round trips": new,
        "new agent, ms": Spread.of(one.new.seconds * 1e3 for one in samples),
        "new agent, added, ms": Spread.of(value * 1e3 for value in added) if name != NONE else None,
        "live agent, round trips": live,
        "live agent, ms": Spread.of(one.live.seconds * 1e3 for one in samples),
    }


def _round_trips(found: _Found, name: str) -> tuple[int, int]:
    """Return the round trips for which a new and a live agent wait, counted on the slowest network.

    On a fast one, a command that nothing waits for might be answered in time, too. The search for unfinished sessions,
    once per process, adds to one sample.
    """
    slowest = max(seconds for seconds, _ in found)
    samples = found[slowest, name]
    return min(one.new.answered for one in samples), min(one.live.answered for one in samples)


async def _requests(name: str, uri: str) -> _Sample:
    counter = Counter()
    # Contenders without the library send no commands.
    async with contender(name, uri, event_listeners=[counter]) as subject:
        session_id = new_id()
        async with subject.session(session_id) as manager:
            await agent(manager).invoke_async("Hello.")
        counter.answered, start = 0, time.perf_counter()
        async with subject.session(session_id) as manager:
            resumed = agent(manager)
            new = await _first(resumed, counter, start)
            counter.answered, start = 0, time.perf_counter()
            live = await _first(resumed, counter, start)
    return _Sample(new, live)


async def _first(streaming: Agent, counter: Counter, start: float) -> _First:
    """Return the first token of a turn; the turn is over then."""
    first: _First | None = None
    async for event in streaming.stream_async("And now?"):
        if first is None and "data" in event:
            first = _First(time.perf_counter() - start, counter.answered)
    if first is None:
        raise RuntimeError("the model answered nothing")
    return first
