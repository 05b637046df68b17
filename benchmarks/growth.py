"""Cost of a growing conversation: append, open, redact, memory."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
import tracemalloc
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pymongo
from pymongo.database import Database
from strands import Agent
from strands.agent.conversation_manager import SlidingWindowConversationManager
from strands.types.content import Message
from strands.types.session import SessionMessage

from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
)
from mongodb_session_manager._format.buckets import bucket_of
from mongodb_session_manager._format.layout import ARCHIVE, Place

from ._bench import Bench, new_id
from ._contenders import DATABASE
from ._model import agent
from ._results import Budget, Cell, Finding, Spread

_BYTES = 4096
_WINDOW = 40
_SMALL = 10
_LARGE = 1_000
"""From this size on, all rounds measure one session, because growing one per round would take too long."""
_BATCH = 40

_REMOVED = "agent_data.conversation_manager_state.removed_message_count"
"""The path, in an agent, of the number of messages that the conversation manager has removed."""


@dataclass(frozen=True)
class _Plan:
    """The parameters of a run.

    Attributes:
        sizes: Numbers of messages at which to measure.
        rounds: Number of rounds.
        sessions: Sessions that share the appends of a round, so that each one stays near the size.
        appends: Messages appended to each session.
        openings: Openings with a window of each session in a round; their median counts.
        whole: Longer conversations are inserted as documents, and only opened with a window.
    """

    sizes: tuple[int, ...]
    rounds: int
    sessions: int
    appends: int
    openings: int
    whole: int

    @classmethod
    def chosen(cls, quick: bool) -> _Plan:
        """Return the parameters."""
        if quick:
            return cls((_SMALL, 200), 1, 2, 2, 1, _SMALL)
        return cls((_SMALL, 100, 1_000, 10_000, 100_000), 8, 4, 8, 5, 10_000)


@dataclass
class _Found:
    """Measurements at one size, one value per round; seconds or bytes."""

    appends: list[list[float]] = field(default_factory=list)
    small_appends: list[list[float]] = field(default_factory=list)
    reopen: list[float] = field(default_factory=list)
    windowed: list[float] = field(default_factory=list)
    short: list[float] = field(default_factory=list)  # opening a session of as many messages as the window
    redact_latest: list[float] = field(default_factory=list)
    redact_first: list[float] = field(default_factory=list)
    held: int = 0
    held_short: int = 0


async def measure(bench: Bench) -> Finding:
    """Measure a growing session at each size, and sessions that stay small in the same rounds."""
    plan = _Plan.chosen(bench.quick)
    bench.begin(len(plan.sizes) * (plan.rounds + 1))
    found: dict[int, _Found] = {}
    with bench.networks([0.0]) as (uri,):
        async with MongoDBSessionManagerFactory(uri, DATABASE) as factory:
            short = new_id()
            first = _Session(factory, short)
            await first.grown_to(_WINDOW)
            await first.close()
            grown = _Session(factory, new_id())
            for size in plan.sizes:
                if size > plan.whole:
                    await grown.extended_to(size, uri)
                elif size >= _LARGE:
                    await grown.grown_to(size)
                found[size] = await _at_size(bench, plan, factory, size, grown, short, uri)
            await grown.close()
    rows = [_row(size, one) for size, one in found.items()]
    setting = {
        "message, bytes": _BYTES,
        "window": _WINDOW,
        "appends each round": plan.sessions * plan.appends,
        "rounds": plan.rounds,
        "network": "none, to show the cost of the server and of the process",
    }
    return Finding("Growth of a conversation", setting, rows, _budgets(max(plan.sizes), found[max(plan.sizes)]))


class _Session:
    """A session whose conversation grows without a model."""

    def __init__(self, factory: MongoDBSessionManagerFactory, session_id: str) -> None:
        self.session_id = session_id
        self.size = 0
        self._factory = factory
        self._manager: AsyncMongoDBSessionManager | None = None
        self._agent: Agent | None = None

    async def _open(self) -> tuple[AsyncMongoDBSessionManager, Agent]:
        if self._manager is None or self._agent is None:
            self._manager = await self._factory.create_session_manager_async(self.session_id)
            self._agent = _agent(self._manager)
        return self._manager, self._agent

    async def grown_to(self, size: int) -> None:
        """Append messages up to `size`, many per command."""
        manager, holder = await self._open()
        while self.size < size:
            for _ in range(min(_BATCH, size - self.size)):
                self._add(_message(self.size), manager, holder)
            _trim(manager, holder)
            await manager.flush()

    async def extended_to(self, size: int, uri: str) -> None:
        """Insert messages between the archived ones and the others, without the library."""
        if self.size == 0:
            await self.grown_to(_WINDOW)
        await self.close()
        await asyncio.to_thread(_insert, uri, self.session_id, size - self.size)
        self.size = size

    async def append(self) -> float:
        """Append a message with one command; return the seconds."""
        manager, holder = await self._open()
        message = _message(self.size)
        start = time.perf_counter()
        self._add(message, manager, holder)
        await manager.flush()
        took = time.perf_counter() - start
        _trim(manager, holder)
        await manager.flush()
        return took

    def _add(self, message: Message, manager: AsyncMongoDBSessionManager, holder: Agent) -> None:
        holder.messages.append(message)
        manager.append_message(message, holder)
        self.size += 1

    async def redact_latest(self) -> float:
        """Redact the latest message; return the seconds."""
        manager, holder = await self._open()
        redacted: Message = {**holder.messages[-1], "content": [{"text": "[redacted]"}]}
        holder.messages[-1]["content"] = redacted["content"]
        start = time.perf_counter()
        manager.redact_latest_message(redacted, holder)
        await manager.flush()
        return time.perf_counter() - start

    async def close(self) -> None:
        """Close the session's manager."""
        manager, _ = await self._open()
        self._manager = self._agent = None
        await manager.close()


async def _at_size(
    bench: Bench,
    plan: _Plan,
    factory: MongoDBSessionManagerFactory,
    size: int,
    large: _Session,
    short: str,
    uri: str,
) -> _Found:
    found = _Found()
    for _ in range(plan.rounds):
        appends, small = await _appends(plan, factory, _SMALL, 0)
        await small.close()
        found.small_appends.append(appends)
        if size < _LARGE and size <= plan.whole:
            # At several sizes in a row, so that periodic work, such as moves to the archive, has its true share.
            appends, grown = await _appends(plan, factory, size, plan.appends)
        else:
            appends, grown = [await large.append() for _ in range(plan.sessions * plan.appends)], large
        found.appends.append(appends)
        if size <= plan.whole:
            found.reopen.append(await _opening_whole(factory, grown.session_id, uri))
        both = [[await _opening(factory, one) for one in (grown.session_id, short)] for _ in range(plan.openings)]
        for times, taken in zip((found.windowed, found.short), zip(*both, strict=True), strict=True):
            times.append(statistics.median(taken))
        found.redact_latest.append(await grown.redact_latest())
        found.redact_first.append(await asyncio.to_thread(_redact_first, uri, grown.session_id))
        if grown is not large:
            await grown.close()
        bench.step()
    found.held = await _held(lambda: _reopened(factory, grown.session_id))
    found.held_short = await _held(lambda: _reopened(factory, short))
    bench.step()
    return found


async def _appends(
    plan: _Plan, factory: MongoDBSessionManagerFactory, size: int, apart: int
) -> tuple[list[float], _Session]:
    """Append to new sessions of `size`, `size + apart`, ... messages; return the seconds and the last session."""
    appends: list[float] = []
    for number in range(plan.sessions):
        session = _Session(factory, new_id())
        await session.grown_to(size + number * apart)
        appends += [await session.append() for _ in range(plan.appends)]
        if number < plan.sessions - 1:
            await session.close()
    return appends, session


async def _reopened(factory: MongoDBSessionManagerFactory, session_id: str) -> Any:
    manager = await factory.create_session_manager_async(session_id)
    return manager, _agent(manager)


async def _opening(factory: MongoDBSessionManagerFactory, session_id: str) -> float:
    """Return the seconds to open a session and restore its agent."""
    start = time.perf_counter()
    manager, _ = await _reopened(factory, session_id)
    took = time.perf_counter() - start
    await manager.close()
    return took


async def _opening_whole(factory: MongoDBSessionManagerFactory, session_id: str, uri: str) -> float:
    """Return the seconds to open a session as if its conversation manager had removed no message."""
    removed = await asyncio.to_thread(_set_removed, uri, session_id, 0)
    took = await _opening(factory, session_id)
    await asyncio.to_thread(_set_removed, uri, session_id, removed)
    return took


async def _held(build: Callable[[], Awaitable[Any]]) -> int:
    """Return the bytes of Python objects that the result of `build` keeps alive."""
    gc.collect()
    tracemalloc.start()
    kept = await build()
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    await kept[0].close()
    return held


def _redact_first(uri: str, session_id: str) -> float:
    """Redact the oldest message; return the seconds."""
    redacted: Message = {"role": "user", "content": [{"text": "[redacted]"}]}
    with MongoDBSessionRepository(uri, DATABASE) as repository:
        repository.ping()
        start = time.perf_counter()
        repository.update_message(session_id, "agent", SessionMessage(_message(0), 0, redact_message=redacted))
        return time.perf_counter() - start


def _set_removed(uri: str, session_id: str, count: int) -> int:
    """Set the stored number of messages that the conversation manager has removed; return the number before."""
    client: pymongo.MongoClient[dict[str, Any]]
    with pymongo.MongoClient(uri) as client:
        update = {"$set": {f"agents.agent.{_REMOVED}": count}}
        before: Any = client[DATABASE]["agent_sessions"].find_one_and_update({"_id": session_id}, update)
    return int(before["agents"]["agent"]["agent_data"]["conversation_manager_state"]["removed_message_count"])


def _insert(uri: str, session_id: str, count: int) -> None:
    """Insert `count` messages into a session, after its archived ones."""
    now = datetime.now(UTC)
    client: pymongo.MongoClient[dict[str, Any]]
    with pymongo.MongoClient(uri) as client:
        database: Database[dict[str, Any]] = client[DATABASE]
        session = database["agent_sessions"].find_one({"_id": session_id}) or {}
        archived = session["agents"]["agent"].get("archived", 0)
        place = Place(session_id, session["incarnation"])
        for first in range(archived, archived + count, _BATCH):
            positions = range(first, min(first + _BATCH, archived + count))
            dates = {"created_at": now, "updated_at": now}
            messages = [{"message": _message(n), "message_id": n, "redact_message": None, **dates} for n in positions]
            database[f"agent_sessions{ARCHIVE}"].insert_one(bucket_of(place, "agent", first, messages))
        path = "agents.agent"
        numbers = ("archived", "next_message_id", _REMOVED)
        higher = {f"{path}.{name}": {"$add": [{"$ifNull": [f"${path}.{name}", 0]}, count]} for name in numbers}
        renumbered = {"$mergeObjects": ["$$one", {"message_id": {"$add": ["$$one.message_id", count]}}]}
        messages_of_head = {"$map": {"input": f"${path}.messages", "as": "one", "in": renumbered}}
        update = [{"$set": {**higher, f"{path}.messages": messages_of_head}}]
        database["agent_sessions"].update_one({"_id": session_id}, update)


def _trim(manager: AsyncMongoDBSessionManager, holder: Agent) -> None:
    """Do what Strands does at the end of a turn: messages that the window needs are not archived."""
    holder.conversation_manager.apply_management(holder)
    manager.sync_agent(holder)


def _agent(manager: AsyncMongoDBSessionManager) -> Agent:
    return agent(manager, conversation_manager=SlidingWindowConversationManager(window_size=_WINDOW))


def _message(number: int) -> Message:
    return {
        "role": "assistant" if number % 2 else "user",
        "content": [{"text": f"{number} ".ljust(_BYTES, "x")}],
        "tracking_id": str(uuid.uuid4()),
    }


def _row(size: int, found: _Found) -> dict[str, Cell]:
    return {
        "messages": size,
        "append, ms": _ms(statistics.median(each) for each in found.appends),
        "append, mean × at 10": _mean_ratio(found),
        "append, median × at 10": Spread.of_ratios(
            [statistics.median(each) for each in found.appends],
            [statistics.median(each) for each in found.small_appends],
        ),
        "reopen whole, ms": _ms(found.reopen) if found.reopen else None,
        "reopen window, ms": _ms(found.windowed),
        "reopen window × short session": Spread.of_ratios(found.windowed, found.short),
        "redact latest, ms": _ms(found.redact_latest),
        "redact oldest, ms": _ms(found.redact_first),
        "memory, KB": round(found.held / 1024),
        "memory, short session, KB": round(found.held_short / 1024),
    }


def _ms(seconds: Any) -> Spread:
    return Spread.of(value * 1e3 for value in seconds)


def _mean_ratio(found: _Found) -> Spread:
    """Return the ratio of means, which includes occasional costs, such as moves to the archive."""
    means = [[statistics.fmean(each) for each in appends] for appends in (found.appends, found.small_appends)]
    return Spread.of_ratios(*means)


def _budgets(size: int, found: _Found) -> list[Budget]:
    return [
        Budget.at_most(f"append at {size:,} messages of 4 KB relative to 10, mean", 1.2, _mean_ratio(found), " ×"),
        Budget.at_most(
            f"reopening {size:,} messages with a sliding window relative to a session of {_WINDOW}",
            1.2,
            Spread.of_ratios(found.windowed, found.short),
            " ×",
        ),
        Budget.at_most(
            f"memory of an open session of {size:,} messages with a sliding window relative to one of {_WINDOW}",
            2.0,
            found.held / found.held_short,
            " ×",
        ),
    ]
