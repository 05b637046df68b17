"""Values of many megabytes: the event loop that serves all sessions goes on while one is encoded or decoded."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bson
import pymongo
import pytest

from mongodb_session_manager import (
    InvalidArgumentError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    StateTooLargeError,
)
from mongodb_session_manager._format.sizes import LARGE, is_large, least_size
from mongodb_session_manager._io.loop import io_portal
from support import CommandLog, agent, alternating

Documents = pymongo.collection.Collection[dict[str, Any]]

DENSE: list[Any] = [{"a": [1]}] * 60_000
"""1.6 MB of BSON that Python takes about a third of a second to encode."""

TOO_DENSE: list[Any] = [[]] * 4_000_000
"""12 MB of JSON that no document can hold."""


class Heartbeat:
    """Measures how long the I/O loop is kept from other work.

    Attributes:
        longest: The most processor time, in seconds, that the loop's thread has spent between two beats.
        whole: The processor time of the whole process.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self.whole = 0.0

    async def beat(self, stopped: asyncio.Event) -> None:
        last = time.thread_time()
        while not stopped.is_set():
            await asyncio.sleep(0.001)
            now = time.thread_time()
            self.longest = max(self.longest, now - last)
            last = now


@contextmanager
def heartbeat() -> Iterator[Heartbeat]:
    """Let the I/O loop beat. The garbage collector, which stops every thread, has to wait."""
    found = Heartbeat()
    stopped = asyncio.Event()
    gc.collect()
    gc.disable()
    try:
        beating = io_portal().submit(found.beat, stopped)
        time.sleep(0.02)
        begun = time.process_time()
        yield found
        found.whole = time.process_time() - begun
        io_portal().loop.call_soon_threadsafe(stopped.set)
        beating.result()
    finally:
        gc.enable()


KEPT = {"v": DENSE}


def hold_metadata(manager: MongoDBSessionManager, stored: Documents) -> None:
    stored.update_one({"_id": "s"}, {"$set": {"metadata": KEPT}})


def hold_feedback(manager: MongoDBSessionManager, stored: Documents) -> None:
    stored.update_one({"_id": "s"}, {"$set": {"feedbacks": [KEPT]}})


def hold_config(manager: MongoDBSessionManager, stored: Documents) -> None:
    stored.update_one({"_id": "s"}, {"$set": {"agents.agent.agent_data.prompt_metadata": KEPT}})


def hold_message(manager: MongoDBSessionManager, stored: Documents) -> None:
    stored.update_one({"_id": "s"}, {"$set": {"agents.agent.messages.0.message.content": [RESULT]}})


RESULT = {"toolResult": {"toolUseId": "t", "status": "success", "content": [{"json": KEPT}]}}


CALLS = {
    "update_metadata": (None, lambda factory, manager: manager.update_metadata(KEPT)),
    "get_metadata": (hold_metadata, lambda factory, manager: manager.get_metadata()),
    "list_sessions": (hold_metadata, lambda factory, manager: factory.list_sessions()),
    "list_sessions_filter": (None, lambda factory, manager: factory.list_sessions(metadata=KEPT)),
    "count_sessions_filter": (None, lambda factory, manager: factory.count_sessions(metadata=KEPT)),
    "add_feedback": (None, lambda factory, manager: manager.add_feedback(KEPT)),
    "get_feedbacks": (hold_feedback, lambda factory, manager: manager.get_feedbacks()),
    "set_prompt_metadata": (None, lambda factory, manager: manager.set_prompt_metadata("agent", KEPT)),
    "get_agent_config": (hold_config, lambda factory, manager: manager.get_agent_config("agent")),
    "list_agents": (hold_config, lambda factory, manager: manager.list_agents()),
    "list_messages": (hold_message, lambda factory, manager: manager.list_messages("agent")),
    "open": (hold_message, lambda factory, manager: factory.create_session_manager("s")),
}


@pytest.mark.parametrize("name", alternating(*CALLS))
def test_the_io_loop_serves_others_while_a_large_value_is_on_its_way(
    factory: MongoDBSessionManagerFactory, stored: Documents, name: str
) -> None:
    prepare, call = CALLS[name]
    with factory.create_session_manager("s") as manager:
        agent(manager, "hello")("hi")
        if prepare is not None:
            prepare(manager, stored)
        with heartbeat() as beat:
            call(factory, manager)
    assert beat.longest < beat.whole / 2


REFUSED = {
    "metadata": (lambda manager, value: manager.update_metadata({"v": value}), "metadata was not stored"),
    "feedback": (lambda manager, value: manager.add_feedback({"v": value}), "feedback was not stored"),
    "config": (
        lambda manager, value: manager.set_prompt_metadata("agent", {"v": value}),
        "prompt_metadata of agent 'agent' was not stored",
    ),
}


@pytest.mark.parametrize("name", alternating(*REFUSED))
def test_a_value_that_no_document_can_hold_is_refused_before_anything_is_sent(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, name: str
) -> None:
    call, says = REFUSED[name]
    with factory.create_session_manager("s") as manager:
        agent(manager, "hello")("hi")
        commands.clear()
        begun = time.process_time()
        with pytest.raises(StateTooLargeError, match=f"{says}: it takes at least [0-9]+ bytes, but a MongoDB document"):
            call(manager, TOO_DENSE)
        refusing = time.process_time() - begun
        assert commands.names == []
    begun = time.process_time()
    bson.encode({"v": TOO_DENSE})  # in C: the library's own encoding takes many times as long
    assert refusing < 3 * (time.process_time() - begun)


@pytest.mark.parametrize("function", ["list_sessions", "count_sessions"])
def test_a_filter_that_no_document_can_equal_is_refused_before_anything_is_sent(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, function: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"metadata must be a filter of at most 16777216 bytes"):
        getattr(factory, function)(metadata={"v": TOO_DENSE})
    assert commands.names == []


HOLDS_ITSELF: list[Any] = []
HOLDS_ITSELF.append(HOLDS_ITSELF)


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, "b": [None, True, 1.5, "text", b"bytes"]},
        list(range(1000)),
        [[]] * 1001,
        {f"key {number}": {"x": str(number)} for number in range(300)},
        {"é": "日本語" * 50},
        ["x"] * 11,
    ],
)
def test_the_least_size_of_a_value_is_near_its_size_and_never_greater(value: Any) -> None:
    size = len(bson.encode({"v": value}))
    assert size / 3 <= least_size({"v": value}, 2**24) <= size


def test_a_value_that_holds_itself_has_a_size() -> None:
    assert not is_large(HOLDS_ITSELF)


def test_a_value_that_is_the_same_ones_over_and_over_is_large() -> None:
    value: list[Any] = []
    for _ in range(100):
        value = [value, value]
    assert is_large(value)
    assert LARGE < least_size(value, LARGE) < 2 * LARGE
