"""An exported session that somebody has changed is refused by the number of a line, or is a session like any other."""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import re
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Any

import bson
import pymongo
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from strands import ToolContext, tool
from strands.agent.conversation_manager import (
    NullConversationManager,
    SlidingWindowConversationManager,
    SummarizingConversationManager,
)
from strands.types.exceptions import ContextWindowOverflowException

from mongodb_session_manager import DatabaseError, InvalidArgumentError, MongoDBSessionManagerFactory, demo
from mongodb_session_manager._copying import export_format as portable
from mongodb_session_manager._copying.export_format import MAX_ELEMENTS, MAX_LINE, Reader, _record, line_of
from mongodb_session_manager._copying.imports import _batches, _batches_async
from mongodb_session_manager.demo import Redaction
from orchestrators import handoff, node, pipeline, team
from support import agent, eventually, texts

Stored = pymongo.collection.Collection[dict[str, Any]]
Lines = list[Any]

# A swarm makes an `Agent()`, and with it a Bedrock client that reads files.
pytestmark = pytest.mark.may_block

MANAGERS = {
    kind.__name__: kind
    for kind in (NullConversationManager, SlidingWindowConversationManager, SummarizingConversationManager)
}
IMAGE = {"image": {"format": "png", "source": {"bytes": bytes(range(256)) * 8}}}
ODD = {
    "tuple": (1, [2], {"a": (3,)}),
    "set": {1, 2},
    "big": 2**70,
    "text": "\ud83d",
    "at": datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    "day": date(2026, 1, 2),
    "keys": {1: "one", "$set": {"$ref": 1, "a.b": 2}},
    "bytes": b"\x00\xff",
    "nested": {"a": [{"b": [{"c": None}]}]},
}
REFUSAL = re.compile(r"^(line \d+ cannot be imported|the export is truncated): .")


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"It rains in {city}."


@tool(context=True)
def approve(tool_context: ToolContext) -> str:
    """Ask somebody."""
    return f"They said {tool_context.interrupt('approval', reason={'amount': 7})}."


TOOLS = [weather, approve]


@pytest.fixture(autouse=True)
def words_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_count_words", len)


@pytest.fixture(scope="module")
def shared_sessions(server: str, shared_database: str) -> Iterator[MongoDBSessionManagerFactory]:
    options: Any = {"max_inline_attachment_bytes": 1000, "max_embedded_messages": 8}
    with MongoDBSessionManagerFactory(server, shared_database, **options) as small:
        yield small


@pytest.fixture
def sessions(database: str, shared_sessions: MongoDBSessionManagerFactory) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory that sets attachments aside and archives early."""
    yield shared_sessions
    eventually(lambda: not shared_sessions._connection._tasks)


def with_everything(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s", application_name="app") as manager:
        live = agent(
            manager,
            {"tool": "weather", "input": {"city": "Oslo"}},
            "It rains.",
            "An image.",
            Redaction("[redacted]"),
            {"tool": "approve"},
            tools=TOOLS,
            state={"visits": 3, "nested": {"a": [1, None]}},
            system_prompt="Be kind.",
        )
        live("What is the weather?")
        live([{"text": "Look."}, IMAGE])
        live("my card")
        live("May I?")
        other = agent(manager, *"abcd", agent_id="an.other", conversation_manager=NullConversationManager())
        other("hello")
        manager.update_metadata(ODD)
        manager.add_feedback({"rating": "up", "comment": "good", "more": (1, {2})})
        manager.update_agent_config("agent", system_prompt="Be brief.", prompt_metadata={"version": (1, 2)})


def long_and_summarized(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s") as manager:
        summarizing = SummarizingConversationManager(summary_ratio=0.5, preserve_recent_messages=2)
        too_long = ContextWindowOverflowException("too long")
        replies = [*map(str, range(10)), too_long, "the summary", *map(str, range(10, 14))]
        live = agent(manager, *replies, conversation_manager=summarizing)
        for n in range(14):
            live([{"text": f"text {n}"}, *([IMAGE] if n == 3 else [])])


def orchestrated(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s") as manager:
        pipeline(manager, node("first", "one"), node("second", "two"))("the task")
        team(manager, node("third", handoff("fourth")), node("fourth", "4"))("the task")
        with suppress(Exception):  # it stops in the middle
            pipeline(manager, node("first", "one"), node("second", RuntimeError()), name="stopped")("the task")
        agent(manager, "a reply")("a prompt")


@pytest.fixture(scope="module")
def exported() -> list[list[str]]:
    """The lines of `exports`, made by the first test that uses them."""
    return []


@pytest.fixture
def exports(sessions: MongoDBSessionManagerFactory, exported: list[list[str]]) -> list[Lines]:
    """Several exported sessions, without digests."""
    if not exported:
        for make in (with_everything, long_and_summarized, orchestrated):
            make(sessions)
            exported.append(list(sessions.export_session("s")))
            sessions.delete_session("s")
    found = [[json.loads(line) for line in lines] for lines in exported]
    for lines in found:
        del lines[-1]["end"]["sha256"]
    return found


# Changes.

TAGS = ["int", "str", "decimal", "datetime", "date", "time", "timedelta", "bytearray", "binary", "tuple", "set",
        "frozenset", "dict", "attachment", "bson", "another", "", 5, None]  # fmt: skip
NAMES = ["__msm__", "v", "$ref", "$set", "$oid", "__bytes_encoded__", "data", "", "a.b", "a\0b", "state", "state_until",
         "incarnation", "expires_at", "_id", "session_id", "removed_message_count", "__name__", "summary_message",
         "pending_tool_execution", "tool_use_message", "interrupt_state", "model_state", "usage", "config_set",
         "attachments", "toolUse", "toolResult", "text", "tracking_id", "redact_message", "moved"]  # fmt: skip


def deep(levels: int, value: Any = 1) -> Any:
    for _ in range(levels):
        value = {"a": value}
    return value


VALUES: list[Callable[[], Any]] = [
    *(lambda value=value: copy.deepcopy(value) for value in (
        None, True, False, 0, -1, 1, 2**31 - 1, 2**31, 2**53, 2**63 - 1, -(2**63), 2**63, 2**64, 1e308, 1.5, "", "x",
        "\ud83d", "a\0b", "5", "2026-01-01", "yesterday", [], {}, [None], [{}], [[]], [5], ["x"], {"a": 1}, {"$set": 1},
        {"": 1}, {"a.b": 1}, {"$numberLong": str(2**63 - 1)}, {"$numberInt": "7"}, {"$numberDouble": "NaN"},
        {"$numberDouble": "Infinity"}, {"$numberDouble": "-1.5"}, {"$numberDecimal": "1E+400"}, {"$oid": "0" * 24},
        {"$date": {"$numberLong": str(2**62)}}, {"$date": {"$numberLong": "-62135596800001"}}, {"$date": "x"},
        {"$date": {"$numberLong": "0"}}, {"$ref": "a", "$id": 1}, {"$code": "x", "$scope": {}}, {"$code": "x"},
        {"$regularExpression": {"pattern": "(", "options": ""}}, {"$timestamp": {"t": 1, "i": 1}}, {"$minKey": 1},
        {"$binary": {"base64": "AAAA", "subType": "00"}}, {"$binary": {"base64": "AAAA", "subType": "04"}},
        {"$symbol": "x"}, {"$undefined": True}, {"$uuid": "x"}, {"$literal": [["$a", 1]]}, {"$literal": 5},
        {"$literal": [["__msm__", "set"], ["v", []]]}, {"__msm__": "set"}, {"__bytes_encoded__": True, "data": "AAAA"},
        {"__bytes_encoded__": True, "data": "!"}, {"role": "user", "content": []}, {"role": "user", "content": [5]},
        {"role": "user", "content": "text"}, {"role": 5, "content": []}, {"toolUse": {}},
        {"toolUse": {"toolUseId": "1"}},
        {"toolResult": {"toolUseId": "1"}}, {"toolResult": 5}, {"text": 5}, {"text": None},
    )),
    lambda: deep(95),
    lambda: deep(115),
    lambda: deep(300),
]  # fmt: skip


class Changer:
    """Changes exports at random, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def changed(self, records: Lines) -> Lines:
        records = copy.deepcopy(records)
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            change = self.random.choice(
                [self.value] * 8 + [self.marker] * 3 + [self.name] * 3 + [self.without, self.again, self.mixed] * 2
                + [self.lines] * 2
            )  # fmt: skip
            change(records)
        lines = [record if isinstance(record, str) else f"{json.dumps(record)}\n" for record in records]
        if self.random.random() < 0.1:
            lines = self.damaged(lines)
        return lines

    def place(self, records: Lines) -> tuple[Any, Any]:
        """Return a container within a line, and a key or position of it."""
        while True:
            at: Any = self.random.choice(records[1:-1] if self.random.random() < 0.97 else records)
            if isinstance(at, dict) and "data" in at and self.random.random() < 0.9:
                continue
            found = []
            waiting = [at]
            while waiting:
                container = waiting.pop()
                for key in list(container) if isinstance(container, dict) else range(len(container)):
                    found.append((container, key))
                    if isinstance(container[key], dict | list):
                        waiting.append(container[key])
            if found:
                return self.random.choice(found)

    def any_value(self) -> Any:
        return self.random.choice(VALUES)()

    def value(self, records: Lines) -> None:
        container, key = self.place(records)
        container[key] = self.any_value()

    def marker(self, records: Lines) -> None:
        container, key = self.place(records)
        value = self.random.choice([container[key], [container[key]], [[container[key], 1]], self.any_value()])
        tag = self.random.choice(TAGS)
        if tag == "bson":
            value = {"$binary": {"base64": base64.b64encode(packed(self.random.choice([1, 3, 300]))).decode(),
                                 "subType": "00"}}  # fmt: skip
        container[key] = self.random.choice([{"__msm__": tag, "v": value}] * 8 + [{"__msm__": tag}])

    def name(self, records: Lines) -> None:
        container, key = self.place(records)
        if isinstance(container, dict):
            name = self.random.choice(NAMES)
            container[name] = container.pop(key) if self.random.random() < 0.5 else self.any_value()

    def without(self, records: Lines) -> None:
        container, key = self.place(records)
        del container[key]

    def again(self, records: Lines) -> None:
        container, key = self.place(records)
        if isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))

    def mixed(self, records: Lines) -> None:
        container, key = self.place(records)
        other, there = self.place(records)
        container[key] = copy.deepcopy(other[there])

    def lines(self, records: Lines) -> None:
        one, other = self.random.randrange(len(records)), self.random.randrange(len(records))
        match self.random.randrange(4):
            case 0:
                del records[one]
            case 1:
                records.insert(other, copy.deepcopy(records[one]))
            case 2:
                records[one], records[other] = records[other], records[one]
            case 3:
                del records[one:]
        if len(records) < 3:
            records += [{"x": 1}, {"y": 1}, {"z": 1}]
        elif self.random.random() < 0.8:  # as many lines as the last one says
            kinds = [next(iter(record), "") for record in records if isinstance(record, dict)]
            counts = {"agents": kinds.count("agent"), "messages": kinds.count("message")}
            if isinstance(end := records[-1].get("end") if isinstance(records[-1], dict) else None, dict):
                end.update(counts)

    def damaged(self, lines: list[Any]) -> list[Any]:
        data = bytearray("".join(lines).encode())
        at = self.random.randrange(len(data))
        match self.random.randrange(3):
            case 0:
                data[at] ^= 1 << self.random.randrange(8)
            case 1:
                del data[at : at + self.random.randrange(1, 200)]
            case 2:
                del data[at:]
        size = self.random.choice([7, 100, 5000, len(data) + 1])
        return [bytes(data[begin : begin + size]) for begin in range(0, len(data), size)]


def packed(levels: int) -> bytes:
    data = bson.encode({"v": 1})
    for _ in range(levels):
        data = bson.encode({"v": {"__msm__": "bson", "v": data}})
    return data


# What a session that was imported must be able to do.


def refused(lines: list[Any]) -> bool:
    """Return whether a stream is refused before anything of it is stored."""
    if any(isinstance(line, bytes) for line in lines):
        return False
    reader = Reader()
    try:
        for line in lines:
            reader.read(line)
        reader.check_end()
    except InvalidArgumentError as error:
        names_a_line(error)
        return True
    return False


def names_a_line(error: Exception) -> None:
    assert REFUSAL.match(str(error)), error
    assert error.__context__ is None


def goes_on(factory: MongoDBSessionManagerFactory, session_id: str) -> None:
    factory.list_sessions()
    factory.list_sessions(order="created_at")
    list(factory.export_session(session_id))
    with factory.create_session_manager(session_id) as manager:
        manager.get_metadata()
        manager.get_feedbacks()
        manager.get_application_name()
        work = manager._unit
        states = copy.deepcopy(work.multi_agents._known)
        for config in manager.list_agents():
            take_a_turn(manager, config["agent_id"])
        for multi_agent_id in states:
            orchestrate(manager, multi_agent_id)
        manager.update_metadata({"changed": True})
        manager.add_feedback({"rating": "down"})
    reader = Reader()
    for line in factory.export_session(session_id):
        reader.read(line)
    reader.check_end()
    factory.list_sessions()


def take_a_turn(manager: Any, agent_id: str) -> None:
    stored = manager._unit.read_agent("x", agent_id)
    name = stored.conversation_manager_state.get("__name__", "SlidingWindowConversationManager")
    count = manager.get_message_count(agent_id)
    if name not in MANAGERS:
        with pytest.raises(DatabaseError, match="conversation_manager_state"):
            agent(manager, agent_id=agent_id)
        return
    live = agent(manager, "a reply", agent_id=agent_id, tools=TOOLS, conversation_manager=MANAGERS[name]())
    prompt: Any = "a prompt"
    if live._interrupt_state.activated:
        prompt = [
            {"interruptResponse": {"interruptId": each, "response": "yes"}} for each in live._interrupt_state.interrupts
        ]
    result = live(prompt)
    if result.stop_reason != "interrupt":
        assert texts(live.messages[-1:]) == ["a reply"]
        assert manager.get_message_count(agent_id) > count


def orchestrate(manager: Any, multi_agent_id: str) -> None:
    try:
        run(manager, multi_agent_id)
    except DatabaseError as error:
        names_the_field(error, multi_agent_id)


def run(manager: Any, multi_agent_id: str) -> None:
    if multi_agent_id == "team":
        live: Any = team(manager, node("third", handoff("fourth")), node("fourth", "4"))
    else:
        live = pipeline(manager, node("first", "one"), node("second", "two"), name=multi_agent_id)
    live("the task")


def names_the_field(error: Exception, multi_agent_id: str) -> None:
    """A state can be that of another graph, which only the application knows."""
    assert f"'multi_agents.{multi_agent_id}.state' cannot be restored" in str(error), error


def left_of(stored: Stored) -> dict[str, int]:
    database = stored.database
    counts = {name: database[name].count_documents({}) for name in database.list_collection_names()}
    return {name: count for name, count in counts.items() if count}


def change_and_use(factory: MongoDBSessionManagerFactory, stored: Stored, exports: list[Lines], seed: int) -> str:
    changer = Changer(seed)
    lines = changer.changed(changer.random.choice(exports))
    before_storing = refused(lines)
    if before_storing and seed % 20:
        return "refused"
    try:
        session_id = factory.import_session(lines, "t")
    except InvalidArgumentError as error:
        names_a_line(error)
        outcome = "refused"
    else:
        assert not before_storing
        goes_on(factory, session_id)
        assert factory.delete_session(session_id)
        outcome = "used"
    assert left_of(stored) == {}
    return outcome


@pytest.mark.timeout(0)
def test_a_changed_export_is_refused_or_is_a_session_like_any_other(
    sessions: MongoDBSessionManagerFactory, stored: Stored, exports: list[Lines], request: pytest.FixtureRequest
) -> None:
    seeds: Sequence[int] = range(45_000)
    sampled = not request.config.getoption("--full-adversity")
    if shard := request.config.getoption("--seeds"):
        first, count = map(int, shard.split("+"))
        seeds, sampled = range(first, first + count), False
    elif sampled:
        seeds = random.sample(seeds, 200)
    outcomes: dict[str, int] = {"refused": 0, "used": 0}
    failures = []
    for done, seed in enumerate(seeds):
        if sampled and done >= 24 and all(outcomes.values()):
            break
        if not sampled and done % 500 == 0:
            print(seed, outcomes, len(failures), flush=True)
        try:
            outcomes[change_and_use(sessions, stored, exports, seed)] += 1
        except Exception as error:
            failures.append((seed, repr(error)[:300]))
            traceback.print_exc(limit=-5)
            sessions.delete_session("t")
    print(outcomes)
    assert failures == []
    assert min(outcomes.values()) > (0 if sampled else len(seeds) // 25)


@pytest.mark.parametrize("which", range(3))
def test_an_export_as_it_is_goes_on(
    sessions: MongoDBSessionManagerFactory, stored: Stored, exports: list[Lines], which: int
) -> None:
    sessions.import_session([json.dumps(record) for record in exports[which]], "t")
    goes_on(sessions, "t")
    assert sessions.delete_session("t")
    assert left_of(stored) == {}


# Kinds of changes.


def edited(records: Lines, number: int, path: str, value: Any) -> Lines:
    """Return lines with another value at a path of the line with that number, from 1."""
    records = copy.deepcopy(records)
    *way, last = [int(name) if name.isdigit() else name for name in path.split("/")]
    container = records[number - 1]
    for name in way:
        container = container[name]
    container[last] = value
    return [json.dumps(record) for record in records]


ASSISTANT = {"role": "assistant", "content": [{"text": "x"}]}
BAD = {
    "usage that is null": (3, "fields/usage/inputTokens", None, "usage must contain numbers"),
    "usage that cannot be incremented": (3, "fields/usage/inputTokens", {"$numberLong": str(2**63 - 1)}, "usage must"),
    "usage that is not a number": (
        3,
        "fields/usage/inputTokens",
        {"$numberDouble": "NaN"},
        "usage must contain numbers",
    ),
    "a set of configuration of objects": (3, "fields/config_set", [{}], "config_set must be a list of str"),
    "markers within metadata": (
        2,
        "session/metadata/a",
        {"__msm__": "set", "v": [[]]},
        "metadata: cannot read a marked",
    ),
    "a marker without a value": (2, "session/metadata/a", {"__msm__": "set"}, "metadata: cannot read a marked form"),
    "packed markers": (
        2,
        "session/metadata/a",
        {"__msm__": "bson", "v": {"$binary": {"base64": base64.b64encode(packed(300)).decode(), "subType": "00"}}},
        "metadata: cannot read a value nested deeper",
    ),
    "an attachment within metadata": (2, "session/metadata/a", {"__msm__": "attachment", "v": "x"}, "metadata: cannot"),
    "feedback that is a set": (2, "session/feedbacks", [{"__msm__": "set", "v": []}], "feedbacks.0 must be an object"),
    "a name that is code": (2, "session/application_name", {"$code": "x"}, "application_name must be a str, not Code"),
    "a tracking id": (4, "message/message/tracking_id", [], "message contains content blocks or a tracking id"),
    "content that is a number": (4, "message/message/content", [5], "message contains content blocks or a tracking id"),
    "a text that is a number": (
        4,
        "message/message/content",
        [{"text": 5}],
        "message contains text that is not a str",
    ),
    "a tool without a name": (
        4,
        "message/message/content",
        [{"toolUse": {"toolUseId": "1", "name": []}}],
        "message contains content blocks or a tracking id",
    ),
    "usage of a message": (
        4,
        "message/event_loop_metrics",
        {"message_usage": {"inputTokens": {"$numberLong": str(2**63 - 1)}}},
        "event_loop_metrics.message_usage must contain numbers",
    ),
    "a count of removed messages": (
        3,
        "fields/agent_data/conversation_manager_state/removed_message_count",
        "x",
        "agent_data.conversation_manager_state.removed_message_count must be an int >= 0",
    ),
    "a conversation manager that is a marker": (
        3,
        "fields/agent_data/conversation_manager_state",
        {"__msm__": "set"},
        "agent_data.conversation_manager_state: cannot read a marked form",
    ),
    "a conversation manager that is a set": (
        3,
        "fields/agent_data/conversation_manager_state",
        {"__msm__": "set", "v": []},
        "agent_data.conversation_manager_state must be an object",
    ),
    "a summary": (
        3,
        "fields/agent_data/conversation_manager_state/summary_message",
        5,
        "agent_data.conversation_manager_state.summary_message must be a message",
    ),
    "a state that is not JSON": (
        3,
        "fields/agent_data/state",
        {"at": {"$date": {"$numberLong": "0"}}},
        "agent_data.state cannot be restored",
    ),
    "interrupts": (
        3,
        "fields/agent_data/_internal_state/interrupt_state/interrupts",
        {"1": 5},
        "agent_data._internal_state.interrupt_state.interrupts must contain interrupts",
    ),
    "an interrupt with another field": (
        3,
        "fields/agent_data/_internal_state/interrupt_state/interrupts",
        {"1": {"id": "1", "name": "n", "another": 1}},
        "agent_data._internal_state cannot be restored",
    ),
    "a pending tool": (
        3,
        "fields/agent_data/_internal_state/interrupt_state/pending_tool_execution",
        {"assistant_message": ASSISTANT, "completed_tool_results": 5},
        "agent_data._internal_state.interrupt_state.pending_tool_execution must contain results of tools",
    ),
    "a pending tool with another field": (
        3,
        "fields/agent_data/_internal_state/interrupt_state/pending_tool_execution",
        {"assistant_message": ASSISTANT, "completed_tool_results": [], "another": 1},
        "agent_data._internal_state cannot be restored",
    ),
}


@pytest.fixture(scope="module")
def exported_turn(shared_sessions: MongoDBSessionManagerFactory) -> list[str]:
    shared_sessions.delete_session("s")
    with shared_sessions.create_session_manager("s") as manager:
        agent(manager, "a reply")("a prompt")
    lines = list(shared_sessions.export_session("s"))
    shared_sessions.delete_session("s")
    return lines


@pytest.fixture
def small(exported_turn: list[str]) -> Lines:
    """The lines of a session with one turn of one agent."""
    lines = list(map(json.loads, exported_turn))
    del lines[-1]["end"]["sha256"]
    return lines


def test_what_cannot_be_used_is_refused_by_its_line_and_field(
    sessions: MongoDBSessionManagerFactory, stored: Stored, small: Lines
) -> None:
    for number, path, value, reason in BAD.values():
        with pytest.raises(InvalidArgumentError, match=rf"^line {number} cannot be imported: {re.escape(reason)}"):
            sessions.import_session(edited(small, number, path, value), "t")
    assert left_of(stored) == {}
    sessions.list_sessions()


@pytest.mark.parametrize("orchestrator", ["stopped", "team"])
@pytest.mark.parametrize("changed", [{"status": "another"}, {"execution_time": {"$numberDouble": "Infinity"}}], ids=str)
def test_a_state_of_another_graph_or_swarm_is_an_error_that_names_the_field(
    sessions: MongoDBSessionManagerFactory, exports: list[Lines], orchestrator: str, changed: Any
) -> None:
    states = exports[2][1]["session"]["multi_agents"]
    name = "second" if orchestrator == "stopped" else "third"
    states[orchestrator]["state"] |= {"next_nodes_to_execute": [name], **changed}
    sessions.import_session(map(json.dumps, exports[2]), "t")
    with sessions.create_session_manager("t") as manager, pytest.raises(DatabaseError) as refused:
        run(manager, orchestrator)
    names_the_field(refused.value, orchestrator)
    assert refused.value.__context__ is None


def test_fields_that_are_unknown_or_absent_are_no_reason_to_refuse_a_session(
    sessions: MongoDBSessionManagerFactory, stored: Stored, small: Lines
) -> None:
    small[1]["session"] |= {"session_viewer_password": "p", "session_type": "OTHER", "more": {"a.b": [1, None]}}
    small[2]["fields"]["agent_data"] |= {"temperature": 1.5, "conversation_manager_state": None}
    del small[2]["fields"]["agent_data"]["_internal_state"], small[2]["fields"]["usage"]
    small[3]["message"]["message"]["content"] = "a text"  # as versions before 1.0 could store it
    small[3]["message"]["latency"] = 7
    sessions.import_session(map(json.dumps, small), "t")
    document = stored.find_one() or {}
    assert (document["session_viewer_password"], document["more"]) == ("p", {"a.b": [1, None]})
    goes_on(sessions, "t")


def test_fields_that_say_how_a_session_is_kept_are_not_imported(
    sessions: MongoDBSessionManagerFactory, stored: Stored, small: Lines
) -> None:
    plain = set(stored.find_one({"_id": sessions.import_session(map(json.dumps, small), "plain")}) or {})
    past = {"$date": {"$numberLong": "0"}}
    small[1]["session"] |= {
        "state": "deleting", "state_by": "x", "state_until": past, "expires_at": past, "time_to_live": 1, "moved": True,
        "session_ttl": 1, "kept_until": past, "keep_until": past, "removed_attachments": ["x"],
    }  # fmt: skip
    sessions.import_session(map(json.dumps, small), "t")
    assert set(stored.find_one({"_id": "t"}) or {}) == plain
    goes_on(sessions, "t")


@pytest.mark.parametrize(
    ("ids", "imported"),
    [
        ([1, 1, 2, 2], [1, 2, 3, 4]),
        ([0, 5, 3, 9], [0, 5, 6, 9]),
        ([None, "x", -1, 2**40], [0, 1, 2, 3]),
        ([7, 7, 7, 2**31 - 1], [7, 8, 9, 2**31 - 1]),
    ],
)
def test_ids_that_do_not_increase_are_replaced_as_by_opening(
    sessions: MongoDBSessionManagerFactory, stored: Stored, small: Lines, ids: list[Any], imported: list[int]
) -> None:
    messages = [copy.deepcopy(small[3]) for _ in ids]
    for n, (line, message_id) in enumerate(zip(messages, ids, strict=True)):
        line["message"] |= {"message_id": message_id, "message": {"role": "user", "content": [{"text": str(n)}]}}
    end = {"end": {"agents": 1, "messages": 4, "attachments": 0}}
    sessions.import_session(map(json.dumps, [*small[:3], *messages, end]), "t")
    document = stored.find_one() or {}
    found = document["agents"]["agent"]["messages"]
    assert [(each["message_id"], texts([each])) for each in found] == [(n, [str(k)]) for k, n in enumerate(imported)]
    document["agents"]["agent"]["next_message_id"] = None
    for each, message_id in zip(found, ids, strict=True):
        each["message_id"] = message_id
    stored.insert_one({**document, "_id": "old", "session_id": "old"})
    with sessions.create_session_manager("old"):
        old = (stored.find_one({"_id": "old"}) or {})["agents"]["agent"]["messages"]
        assert [each["message_id"] for each in old] == imported
    goes_on(sessions, "t")


# Parts of streams.


def parts_of(data: bytes) -> dict[str, Callable[[], Any]]:
    lines = data.splitlines(keepends=True)

    def chunks(size: int) -> list[bytes]:
        return [data[at : at + size] for at in range(0, len(data), size)]

    return {
        "lines": lambda: lines,
        "lines without ends": lambda: [line.rstrip(b"\n") for line in lines],
        "some lines without ends": lambda: [line.rstrip(b"\n") if n % 3 else line for n, line in enumerate(lines)],
        "text without ends": lambda: [line.rstrip(b"\n").decode() for line in lines],
        "with carriage returns": lambda: [line.replace(b"\n", b"\r\n") for line in lines],
        "with empty lines": lambda: data.replace(b"\n", b"\n\n").split(b"\n"),
        "single bytes": lambda: chunks(1),
        "chunks of 7": lambda: chunks(7),
        "chunks of 1000": lambda: chunks(1000),
        "one chunk": lambda: iter([data]),
        "bytearrays": lambda: map(bytearray, chunks(100)),
        "views": lambda: map(memoryview, chunks(100)),
        "text in chunks": lambda: [data.decode()[at : at + 100] for at in range(0, len(data), 100)],
        "empty parts": lambda: [part for chunk in chunks(50) for part in (b"", chunk, b"")],
        "a text file": lambda: io.StringIO(data.decode()),
        "a binary file": lambda: io.BytesIO(data),
    }


@pytest.mark.anyio
@pytest.mark.parametrize("kind", parts_of(b""))
@pytest.mark.parametrize("is_async", [False, True], ids=["iterable", "asynchronous"])
async def test_a_stream_is_read_alike_wherever_it_is_cut(kind: str, is_async: bool) -> None:
    # Characters of several bytes, and quotes, brackets and escapes where a line could seem to end.
    texts = [
        "grün \U0001f600",
        '}{"a": 1}',
        "}\\",
        '\\"}',
        "{}{}",
        "}\n{",
        "x" * (2_000 if kind in ("single bytes", "chunks of 7") else 200_000),
        "}",
    ]
    records: Lines = [{"format": "}{", "n": [{}, {}]}, *({"text": text} for text in texts), {"end": {}}]
    data = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode()
    parts = parts_of(data)[kind]()

    async def asynchronously() -> AsyncIterator[Any]:
        for part in parts:
            yield part

    if is_async:
        lines = [line async for batch in _batches_async(asynchronously()) for line in batch]
    else:
        lines = [line for batch in _batches(parts) for line in batch]
    assert [json.loads(line) for line in lines if line.strip()] == records


def test_the_body_of_a_request_can_be_imported_as_it_comes(
    sessions: MongoDBSessionManagerFactory, exports: list[Lines]
) -> None:
    async def upload(request: Request) -> PlainTextResponse:
        return PlainTextResponse(await sessions.import_session_async(request.stream(), "t"))

    data = "".join(f"{json.dumps(record)}\n" for record in exports[0]).encode()
    with TestClient(Starlette(routes=[Route("/", upload, methods=["POST"])])) as client:
        chunks = (data[at : at + 1000] for at in range(0, len(data), 1000))
        assert client.post("/", content=chunks).text == "t"
    assert len(list(sessions.export_session("t"))) == len(exports[0])


@pytest.mark.parametrize("part", ["x" * 2**16, "x" * MAX_LINE], ids=["small parts", "a large part"])
def test_a_line_without_end_is_refused_when_it_is_too_long(
    sessions: MongoDBSessionManagerFactory, stored: Stored, small: Lines, part: str
) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        yield from (f"{json.dumps(record)}\n" for record in small[:3])
        while True:
            read += len(part)
            assert read < MAX_LINE + 2 * len(part) + 10
            yield part

    with pytest.raises(InvalidArgumentError, match=rf"^line 4 cannot be imported: it is longer than {MAX_LINE} bytes"):
        sessions.import_session(endless(), "t")
    assert left_of(stored) == {}


# Limits.


@pytest.mark.parametrize(
    ("begin", "part", "end"),
    [
        (b'{"message": [', b"[],", b"[]]}"),
        (b'{"message": [', b'"ab",', b'""]}'),
        (b'{"message": ', b"[", b""),
        (b'{"a": "' + b"," * 1000 + b'", "b": [', b"1,", b"1]}"),
    ],
    ids=["arrays", "texts", "nested", "numbers behind a text"],
)
def test_a_line_of_too_many_values_is_refused_before_it_is_parsed(
    begin: bytes, part: bytes, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mongodb_session_manager._copying.export_format.json", None)
    most = MAX_ELEMENTS // 64
    monkeypatch.setattr(portable, "MAX_ELEMENTS", most)
    line = begin + part * (most + 1) + end
    assert len(line) < MAX_LINE
    with pytest.raises(InvalidArgumentError, match=rf"^line 1 cannot be imported: it contains more than {most} "):
        Reader().read(line)


def test_many_commas_in_a_text_are_not_many_values() -> None:
    text = '\\",[{' * (2**21)
    assert len(text) > 2 * MAX_ELEMENTS
    assert _record(json.dumps({"message": text, "more": [1, 2]}).encode()) == {"message": text, "more": [1, 2]}


def full(value: Any) -> dict[str, Any]:
    """Return a record of 64 KiB."""
    record: dict[str, Any] = {"values": []}
    size = len(bson.encode({"v": value})) - 8
    record["values"] = [value] * (2**16 // (size + 7))
    return record


NAMES_OF_ONE_CHARACTER = [chr(n) for n in range(35, 127) if chr(n) != "\\"]
PLAIN_NAMES = [name for name in NAMES_OF_ONE_CHARACTER if name != "$"]


@pytest.mark.parametrize(
    ("value", "is_json"),
    [
        (dict.fromkeys(PLAIN_NAMES), False),
        ({name: [] for name in PLAIN_NAMES}, True),
        ({name: {} for name in PLAIN_NAMES}, True),
        ({name: [] for name in NAMES_OF_ONE_CHARACTER}, False),
        (dict.fromkeys(PLAIN_NAMES, True), False),
        (dict.fromkeys(PLAIN_NAMES, 1), False),
        ([], True),
        (1.5, True),
        ("\x01" * 1000, False),
    ],
    ids=["null", "arrays", "objects", "arrays of $", "booleans", "numbers", "long array", "floats", "controls"],
)
def test_whatever_a_document_of_mongodb_holds_fits_into_a_line(
    value: Any, is_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MAX_LINE", "MAX_ELEMENTS", "MAX_RECORD"):
        monkeypatch.setattr(portable, name, getattr(portable, name) // 256)
    record = {"session": full(value)}
    assert 0.85 < len(bson.encode(record)) / 2**16 < 1
    line = line_of(record)
    assert len(line) <= portable.MAX_LINE
    assert bson.encode(_record(line.encode())) == bson.encode(record)
    assert line.startswith('{"session"') is is_json


def test_the_fields_of_all_agents_must_fit_into_one_document(small: Lines) -> None:
    reader = Reader()
    for record in small[:3]:
        reader.read(json.dumps(record))
    agents = [json.dumps({"agent": str(n), "fields": {"more": "x" * 6 * 2**20}}) for n in range(3)]
    for line in agents[:2]:
        reader.read(line)
    with pytest.raises(InvalidArgumentError, match=r"^line 6 cannot be imported: the fields of the session and its "):
        reader.read(agents[2])
