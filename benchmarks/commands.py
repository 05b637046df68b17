"""Commands that a turn sends to the server. The number is exact, so one round is sufficient."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from strands import Agent

from mongodb_session_manager import AsyncMongoDBSessionManager, MongoDBSessionManagerFactory

from ._bench import Bench, new_id
from ._contenders import DATABASE
from ._counting import Counter
from ._model import agent, look
from ._results import Budget, Cell, Finding

SaveOn = Literal["message", "invocation"]

_SAVE_ON: tuple[SaveOn, SaveOn] = ("message", "invocation")


@dataclass(frozen=True)
class _Case:
    """A turn whose commands are counted.

    Attributes:
        name: The description of the turn.
        original: Commands of versions 0.5 to 0.9, as published by their users; not measured here.
        budget: The upper limit, with `save_on="message"` and with `save_on="invocation"`.
        resumed: Whether the session already holds a turn.
        tool: Whether the model calls a tool.
        live: Whether the agent has had a turn before.
    """

    name: str
    original: int | None
    budget: tuple[int, int]
    resumed: bool = False
    tool: bool = False
    live: bool = False


_CASES = (
    _Case("new session, one turn, explicit sync", 19, (3, 2)),
    _Case("resumed session, one turn, explicit sync", 19, (3, 2), resumed=True),
    _Case("new session, one turn with a tool call, explicit sync", 29, (5, 2), tool=True),
    _Case("resumed session, one turn with a tool call, explicit sync", 29, (5, 2), resumed=True, tool=True),
    _Case("one more turn of a live agent, explicit sync", 9, (2, 1), live=True),
)


async def measure(bench: Bench) -> Finding:
    """Count the commands of each case."""
    bench.begin(len(_CASES) + 1)
    rows: list[dict[str, Cell]] = []
    budgets = []
    counter = Counter()
    with bench.networks([0.0]) as (uri,):
        async with MongoDBSessionManagerFactory(uri, DATABASE, event_listeners=[counter]) as factory:
            async with await factory.create_session_manager_async(new_id()):
                # The opening, and the search for unfinished sessions, which runs once per process.
                while counter.count < 2:  # noqa: ASYNC110 - counted in a thread of the driver
                    await asyncio.sleep(0.01)
            for case in _CASES:
                each, once = [await _count(factory, counter, case, save_on) for save_on in _SAVE_ON]
                names = ("save_on=message", "save_on=invocation")
                rows.append(
                    {"case": case.name, names[0]: each, names[1]: once, "original, as published": case.original}
                )
                budgets += [
                    Budget.at_most(f"commands, {case.name}, {name}", most, count)
                    for name, most, count in zip(names, case.budget, (each, once), strict=True)
                ]
                bench.step()
            counter.count = 0
            async with await factory.create_session_manager_async(new_id()):
                opened = counter.count
            rows.append({"case": "a manager from a factory, opened and closed", names[0]: opened, names[1]: opened})
            budgets.append(Budget.at_most("commands, a manager from a factory", 1, counter.count))
            bench.step()
    return Finding("Commands per turn", {"model": "answers, or calls a tool and answers"}, rows, budgets)


async def _count(factory: MongoDBSessionManagerFactory, counter: Counter, case: _Case, save_on: SaveOn) -> int:
    session_id = new_id()
    if case.resumed:
        async with await factory.create_session_manager_async(session_id) as manager:
            await _agent(manager, case).invoke_async("Hello.")
    counter.count = 0
    async with await factory.create_session_manager_async(session_id, save_on=save_on) as manager:
        live = _agent(manager, case)
        await live.invoke_async("And now?")
        if case.live:
            counter.count = 0
            await live.invoke_async("And then?")
        manager.sync_agent(live)
        await manager.flush()
    return counter.count


def _agent(manager: AsyncMongoDBSessionManager, case: _Case) -> Agent:
    return agent(manager, calls="look" if case.tool else None, tools=[look])
