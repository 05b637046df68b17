"""Values of all kinds in a conversation, through the managers."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from strands import Agent, tool

from mongodb_session_manager import EncodingError, MongoDBSessionManagerFactory
from support import agent, alternating, texts

RESULTS: dict[str, tuple[Any, type]] = {
    "bytearray": (bytearray(b"\x00x"), bytearray),
    "numpy_float": (np.float32(0.1), float),
    "numpy_int": (np.int64(7), int),
    "numpy_bool": (np.bool_(True), bool),
    "numpy_date": (np.datetime64("2026-01-02"), dt.date),
    "timedelta": (dt.timedelta(days=1, microseconds=3), dt.timedelta),
    "decimal": (Decimal("1.10"), Decimal),
    "uuid": (UUID(int=5), UUID),
    "date": (dt.date(2026, 1, 2), dt.date),
    "time": (dt.time(3, 4, 5, 6), dt.time),
    "datetime": (dt.datetime(2026, 1, 2, 3, 4, 5, 6), dt.datetime),
    "members": ((1, {2, 2**70}, frozenset({"a"})), tuple),
}

REFUSED: dict[str, tuple[Any, str]] = {
    "path": (Path("secret"), r"PosixPath, at .*: convert it with str\(\)$"),
    "array": (np.array([1.5]), r"numpy.ndarray, at .*: convert it with .tolist\(\)$"),
    "enum": (enum.Enum("Plain", "A").A, r"Plain, at .*: convert it with .value$"),
}


def returning(name: str, value: Any) -> Any:
    @tool(name=name)
    def returns() -> dict[str, Any]:
        """Return a value as it is."""
        return {"status": "success", "content": [{"json": {"value": value}}]}

    return returns


TOOLS = [returning(name, value) for name, (value, *_) in {**RESULTS, **REFUSED}.items()]


def ask(live: Agent, text: str) -> None:
    live(text)


def ask_async(live: Agent, text: str) -> None:
    asyncio.run(live.invoke_async(text))


def open_sync(factory: MongoDBSessionManagerFactory, **options: Any) -> Any:
    return factory.create_session_manager("s", **options)


def open_async(factory: MongoDBSessionManagerFactory, **options: Any) -> Any:
    return asyncio.run(factory.create_session_manager_async("s", **options))


WAYS = pytest.mark.parametrize(
    ("open_", "ask", "save_on"),
    alternating((open_sync, ask, "message"), (open_async, ask_async, "message"), (open_async, ask_async, "invocation")),
)


def values(messages: list[Any]) -> dict[str, Any]:
    """Return what tools returned, by the id of the use."""
    results = [block["toolResult"] for message in messages for block in message["content"] if "toolResult" in block]
    return {result["toolUseId"]: result["content"][0]["json"]["value"] for result in results}


@WAYS
def test_a_turn_with_odd_tool_results_goes_on_and_is_restored(
    factory: MongoDBSessionManagerFactory, open_: Callable[..., Any], ask: Callable[..., None], save_on: str
) -> None:
    live = agent(open_(factory, save_on=save_on), [{"tool": name} for name in RESULTS], "done", "2", tools=TOOLS)
    ask(live, "use all")
    ask(live, "go on")
    restored = agent(open_(factory), "3", tools=TOOLS)
    assert texts(restored.messages) == ["use all", "", "", "done", "go on", "2"]
    before, after = values(live.messages), values(restored.messages)
    assert len(after) == len(RESULTS)
    assert after == before
    assert sorted(type(value).__name__ for value in after.values()) == sorted(t.__name__ for _, t in RESULTS.values())
    ask(restored, "and on")
    assert texts(restored.messages)[-2:] == ["and on", "3"]


def test_a_view_of_bytes_is_restored_as_bytes(factory: MongoDBSessionManagerFactory) -> None:
    """Strands copies what it sends to a model, which no view allows, so it is appended here."""
    with factory.create_session_manager("s") as manager:
        result = {"toolUseId": "1", "status": "success", "content": [{"json": {"value": memoryview(b"\x00x")}}]}
        manager.append_message({"role": "user", "content": [{"toolResult": result}]}, agent(manager))
    with factory.create_session_manager("s") as manager:
        messages = manager.session_repository.list_messages("s", "agent")
        assert values([each.to_message() for each in messages]) == {"1": b"\x00x"}


def test_a_large_bytearray_is_kept_outside_and_comes_back(factory: MongoDBSessionManagerFactory, stored: Any) -> None:
    value = bytearray(b"x" * 300_000)
    live = agent(factory.create_session_manager("s"), {"tool": "large"}, "2", tools=[returning("large", value)])
    live("use it")
    assert stored.database["agent_sessions_attachments.files"].count_documents({}) == 1
    restored = agent(factory.create_session_manager("s"))
    assert list(values(restored.messages).values()) == [value]
    assert [type(each) for each in values(restored.messages).values()] == [bytearray]


@WAYS
@pytest.mark.parametrize("name", alternating(*REFUSED))
def test_a_tool_result_that_cannot_be_stored_is_named(
    factory: MongoDBSessionManagerFactory, open_: Callable[..., Any], ask: Callable[..., None], save_on: str, name: str
) -> None:
    live = agent(open_(factory, save_on=save_on), {"tool": name}, "2", tools=TOOLS)
    with pytest.raises(EncodingError, match=REFUSED[name][1]) as raised:
        ask(live, "use it")
    assert "secret" not in str(raised.value)
