"""Graphs and swarms go on where they stopped, in whatever process, and each state is stored once, by one writer."""

from __future__ import annotations

import asyncio
import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from strands import ToolContext, tool
from strands.hooks import BeforeNodeCallEvent, HookProvider, HookRegistry
from strands.multiagent import Swarm
from strands.multiagent.base import MultiAgentBase, MultiAgentResult, Status
from strands.session import FileSessionManager

import interpreter
import mongodb_session_manager
from mongodb_session_manager import (
    AccessDeniedError,
    AgentNotFoundError,
    DatabaseError,
    EncodingError,
    InvalidArgumentError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionClosedError,
    SessionConflictError,
    SessionNotFoundError,
    StateTooLargeError,
)
from mongodb_session_manager.demo import ScriptedModel
from orchestrators import Async, Odd, Streaming, Sync, handoff, join, node, pipeline, sent, team
from proxy import Proxy, command
from support import CommandLog, agent, alternating, eventually, fail_point, texts, untraced

Stored = pymongo.collection.Collection[dict[str, Any]]

OPEN, WRITE = "findAndModify", "update"
IMAGE = {"image": {"format": "png", "source": {"bytes": b"\x89PNG\0\xff"}}}
# A swarm that is restored to begin again makes an `Agent()`, which reads files.
SWARM = pytest.mark.may_block
BOTH = pytest.mark.parametrize("kind", ["graph", pytest.param("swarm", marks=SWARM)])


@pytest.fixture(autouse=True, scope="module")
def that_agent_has_no_bedrock_client() -> Iterator[None]:
    """It is never asked, and such a client loads megabytes of JSON."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strands.agent.agent.BedrockModel", ScriptedModel)
        yield


@pytest.fixture(params=alternating(Sync, Async, Streaming), ids=["sync", "async", "streamed"])
def api(request: pytest.FixtureRequest) -> Any:
    return request.param()


class Trio:
    """Three nodes and the orchestrator in which they follow one another.

    Args:
        kind: `"graph"` or `"swarm"`.
        hooks: Of the orchestrator.
        **replies: What a node says in the place of its usual reply: something else, or what a model is scripted with.
    """

    def __init__(self, kind: str, hooks: Any = None, **replies: Any) -> None:
        self.kind, self._hooks = kind, hooks
        usual: dict[str, Any] = {"first": "one", "second": "two", "third": "three"}
        self.nodes = []
        for name, successor in (("first", "second"), ("second", "third"), ("third", None)):
            reply = replies.get(name, usual[name])
            hands_over = kind == "swarm" and successor is not None and isinstance(reply, str)
            script = [handoff(successor, f"from {name}", by=name), reply] if hands_over else reply
            self.nodes.append(node(name, *(script if isinstance(script, list) else [script])))

    def build(self, manager: Any) -> MultiAgentBase:
        build: Any = team if self.kind == "swarm" else pipeline
        return build(manager, *self.nodes, hooks=self._hooks)

    @property
    def worked(self) -> list[str]:
        """The nodes whose model was called."""
        return [each.name for each in self.nodes if each.model.calls]

    @property
    def sent(self) -> list[Any]:
        """What the models of all nodes were sent."""
        return [without_ids(sent(each)) for each in self.nodes]


def without_ids(messages: Any) -> Any:
    """Leave out the ids of tool calls, which the scripted model makes up."""
    if isinstance(messages, dict):
        return {key: without_ids(value) for key, value in messages.items() if key != "toolUseId"}
    return [without_ids(each) for each in messages] if isinstance(messages, list) else messages


@functools.cache
def sent_without_manager(kind: str, with_image: bool = False) -> list[Any]:
    """What the models of all nodes are sent without a session manager."""
    trio = Trio(kind)
    trio.build(None)([{"text": "what is it?"}, IMAGE] if with_image else "the task")
    return trio.sent


def in_another_process(factory: MongoDBSessionManagerFactory) -> Any:
    """A manager that shares nothing with any other one but the database."""
    return factory.create_session_manager("s")


def state_of(stored: Stored, key: str) -> dict[str, Any]:
    return stored.find_one({"_id": "s"})["multi_agents"][key]["state"]


KEY = {"graph": "pipeline", "swarm": "team"}


# What is stored, and what it costs.


@BOTH
@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
def test_one_update_per_node_and_one_at_the_end(
    api: Any, factory: MongoDBSessionManagerFactory, commands: CommandLog, kind: str, save_on: str
) -> None:
    result = api.run(api.open(factory, save_on=save_on), Trio(kind).build, "the task")
    assert result.status == Status.COMPLETED
    assert commands.names == [OPEN] + [WRITE] * (4 if save_on == "message" else 1)


@BOTH
def test_constructing_and_restoring_sends_nothing(
    api: Any, factory: MongoDBSessionManagerFactory, commands: CommandLog, kind: str
) -> None:
    manager = api.open(factory)
    api.run(manager, Trio(kind).build, "the task")
    manager = api.open(factory)
    commands.clear()

    async def on_a_running_loop() -> None:
        Trio(kind).build(manager)

    asyncio.run(on_a_running_loop())
    api.flush(manager)
    assert commands.names == []


@BOTH
def test_syncing_an_unchanged_orchestrator_sends_nothing(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, kind: str
) -> None:
    manager = factory.create_session_manager("s")
    orchestrator = Trio(kind).build(manager)
    manager.sync_multi_agent(orchestrator)
    assert commands.names == [OPEN, WRITE]  # it was new
    manager.sync_multi_agent(orchestrator)
    assert commands.names == [OPEN, WRITE]
    orchestrator("the task")
    commands.clear()
    manager.sync_multi_agent(orchestrator)
    manager.flush()
    assert commands.names == []


@BOTH
def test_the_stored_state_is_the_orchestrators(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored, kind: str
) -> None:
    manager = factory.create_session_manager("s")
    orchestrator = Trio(kind).build(manager)
    orchestrator([{"text": "what is it?"}, IMAGE])
    assert repository.read_multi_agent("s", orchestrator.id) == orchestrator.serialize_state()
    document = stored.find_one({"_id": "s"})
    assert document["multi_agents"].keys() == {KEY[kind]}
    element = document["multi_agents"][KEY[kind]]
    assert element.keys() == {"state", "revision", "writer", "created_at", "updated_at"}
    assert element["state"]["status"] == "completed"
    assert element["revision"] == 4
    assert element["created_at"] <= element["updated_at"] <= document["updated_at"]
    assert document["agents"] == {}


ODD_STATE = {
    "bytes": b"\0\xff",
    "as strands": {"__bytes_encoded__": True, "data": "AAA="},
    "tuple": (1, (2.5, None)),
    "set": {1, 2},
    "emoji": "half of \ud83d",
    "a.b": {"$set": {"$ref": 1, "$id": 2}, "": "", "nul\0": 1},
    "big": 2**80,
    "by number": {1: "one", (1, 2): "pair"},
    "deep": [[[[[[[[[[[[["here"]]]]]]]]]]]]],
}


def test_any_state_comes_back_equal(factory: MongoDBSessionManagerFactory) -> None:
    manager = factory.create_session_manager("s")
    manager.initialize_multi_agent(Odd({}, "graph.1/$%"))
    manager.sync_multi_agent(Odd(ODD_STATE, "graph.1/$%"))
    restored = Odd(None, "graph.1/$%")
    in_another_process(factory).initialize_multi_agent(restored)
    assert restored.state == ODD_STATE
    assert type(restored.state["tuple"][1]) is tuple


def test_what_happens_to_a_state_later_is_not_stored(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    manager = factory.create_session_manager("s")
    odd = Odd({"nodes": ["a"]})
    manager.initialize_multi_agent(odd)
    odd.state["nodes"].append("b")
    manager.flush()
    assert state_of(stored, "odd") == {"nodes": ["a"]}


def test_a_state_that_cannot_be_stored_is_refused_before_anything_is_sent(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    manager = factory.create_session_manager("s")
    manager.initialize_multi_agent(Odd({}))
    manager.flush()
    commands.clear()
    with pytest.raises(EncodingError, match="unsupported type object"):
        manager.sync_multi_agent(Odd({"it": object()}))
    manager.flush()
    assert commands.names == []


@pytest.mark.parametrize("bad", ["", "nul\0", None, {"$gt": ""}])
def test_an_id_that_cannot_be_stored_is_refused(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, bad: Any
) -> None:
    manager = factory.create_session_manager("s")
    with pytest.raises(InvalidArgumentError, match="multi_agent_id"):
        manager.initialize_multi_agent(Odd({}, bad))
    for use in (repository.create_multi_agent, repository.update_multi_agent):
        with pytest.raises(InvalidArgumentError, match="multi_agent_id"):
            use("s", Odd({}, bad))
    with pytest.raises(InvalidArgumentError, match="multi_agent_id"):
        repository.read_multi_agent("s", bad)


# A session holds agents and orchestrators.


@SWARM
def test_a_session_holds_agents_and_orchestrators_of_the_same_ids(
    api: Any, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = api.open(factory)
    assistant = agent(manager, "hello", agent_id="pipeline")
    asyncio.run(assistant.invoke_async("hi"))
    api.run(manager, Trio("graph").build, "the task")
    api.run(manager, Trio("swarm").build, "the task")
    asyncio.run(assistant.invoke_async("and now?"))
    document = stored.find_one({"_id": "s"})
    assert texts(document["agents"]["pipeline"]["messages"])[:2] == ["hi", "hello"]
    assert len(document["agents"]["pipeline"]["messages"]) == 4
    assert document["multi_agents"].keys() == {"pipeline", "team"}

    manager = in_another_process(factory)
    assert texts(agent(manager, agent_id="pipeline").messages)[0] == "hi"
    assert Trio("swarm").build(manager)("again").status == Status.COMPLETED


def test_a_graph_within_a_graph_has_a_state_of_its_own(
    api: Any, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    def build(manager: Any) -> MultiAgentBase:
        inner = pipeline(manager, node("a", "A"), node("b", "B"), name="inner")
        return pipeline(manager, node("before", "1"), NamedNode(inner, "nested"), node("after", "2"), name="outer")

    api.run(api.open(factory), build, "the task")
    assert state_of(stored, "inner")["execution_order"] == ["a", "b"]
    assert state_of(stored, "outer")["execution_order"] == ["before", "nested", "after"]


class NamedNode:
    """Lets `pipeline` name a nested orchestrator."""

    def __new__(cls, orchestrator: Any, name: str) -> Any:
        orchestrator.name = name
        return orchestrator


# Interrupted in the middle.


class BrokenError(Exception):
    """What a node fails with."""


@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
def test_a_graph_goes_on_after_an_exception(
    api: Any, factory: MongoDBSessionManagerFactory, save_on: str, tmp_path: Path
) -> None:
    """Strands still calls it failed when it is through, with its own file session manager too."""
    for open_manager in (
        lambda: api.open(factory, save_on=save_on),
        lambda: FileSessionManager("s", str(tmp_path)),
    ):
        failing = Trio("graph", second=BrokenError("no"))
        with pytest.raises(BrokenError):
            api.run(open_manager(), failing.build, "the task")
        resumed = Trio("graph")
        result = api.run(open_manager(), resumed.build, "the task")
        assert result.status == Status.FAILED
        assert resumed.worked == ["second", "third"]
        assert resumed.sent[1:] == sent_without_manager("graph")[1:]
        assert [each.node_id for each in result.execution_order] == ["first", "second", "third"]


@SWARM
def test_a_swarm_begins_again_after_an_exception_as_strands_has_it(
    api: Any, factory: MongoDBSessionManagerFactory, stored: Stored, tmp_path: Path
) -> None:
    """A failed swarm has no next node: the same happens with Strands' own file session manager."""
    for open_manager in (lambda: api.open(factory), lambda: FileSessionManager("s", str(tmp_path))):
        failing = Trio("swarm", second=BrokenError("no"))
        assert api.run(open_manager(), failing.build, "the task").status == Status.FAILED
        resumed = Trio("swarm")
        assert api.run(open_manager(), resumed.build, "the task").status == Status.COMPLETED
        assert resumed.worked == ["first", "second", "third"]
    assert state_of(stored, "team")["status"] == "completed"


@BOTH
@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
@pytest.mark.parametrize("how", alternating("cancelled", "abandoned"))
def test_it_goes_on_after_it_was_cancelled(
    factory: MongoDBSessionManagerFactory, kind: str, save_on: str, how: str
) -> None:
    async def main() -> None:
        started = asyncio.Event()
        trio = Trio(kind)
        trio.nodes[1].model = Waiting(started)
        orchestrator = trio.build(await factory.create_session_manager_async("s", save_on=save_on))
        if how == "cancelled":
            running = asyncio.create_task(orchestrator.invoke_async("the task"))
            await started.wait()
            while not running.done():  # `asyncio.wait_for` in the graph may swallow one, until Python 3.12
                running.cancel()
                await asyncio.wait([running], timeout=1)
            assert running.cancelled()
        else:
            events = orchestrator.stream_async("the task")
            async for event in events:
                if event.get("type") == "multiagent_node_start" and event["node_id"] == "second":
                    break
            await events.aclose()

    asyncio.run(main())
    resumed = Trio(kind)
    result = resumed.build(in_another_process(factory))("the task")
    assert result.status == Status.COMPLETED
    assert resumed.worked == ["second", "third"]
    assert resumed.sent[1:] == sent_without_manager(kind)[1:]


class Waiting(ScriptedModel):
    """A model that says when it is called, and never answers."""

    def __init__(self, called: asyncio.Event) -> None:
        super().__init__()
        self._called = called

    async def stream(self, *args: Any, **kwargs: Any) -> Any:
        self._called.set()
        await asyncio.Event().wait()
        yield {}


PROGRAM = """
import asyncio, sys
from mongodb_session_manager import *
from orchestrators import *

uri, database, kind, save_on = sys.argv[1:]

class AtWork(ScriptedModel):
    async def stream(self, *args, **kwargs):
        print("at work", flush=True)
        await asyncio.Event().wait()
        yield

first, second, third = node("first", "one"), node("second"), node("third")
second.model = AtWork()
if kind == "swarm":
    first.model.replies.appendleft(handoff("second", "from first", by="first"))
build = {"swarm": team, "graph": pipeline, "join": join}[kind]

async def main():
    async with AsyncMongoDBSessionManager("s", uri, database, save_on=save_on) as manager:
        await build(manager, first, second, third).invoke_async("the task")

asyncio.run(main())
"""


def killed_at_work(server: str, database: str, *arguments: str, once: Callable[[], bool] = lambda: True) -> None:
    """Run an orchestrator in a process of its own, and kill it while its second node works."""
    with interpreter.start(PROGRAM, server, database, *arguments) as process:
        assert process.stdout.readline() == "at work\n"
        try:
            eventually(once)
        finally:
            process.send_signal(signal.SIGKILL)


@BOTH
def test_it_goes_on_after_its_process_was_killed(
    server: str, database: str, factory: MongoDBSessionManagerFactory, stored: Stored, kind: str
) -> None:
    killed_at_work(server, database, kind, "message")
    assert state_of(stored, KEY[kind])["status"] == "executing"
    resumed = Trio(kind)
    result = resumed.build(in_another_process(factory))("the task")
    assert result.status == Status.COMPLETED
    assert resumed.worked == ["second", "third"]
    assert resumed.sent[1:] == sent_without_manager(kind)[1:]
    assert state_of(stored, KEY[kind])["status"] == "completed"


def test_saving_per_invocation_a_killed_process_begins_again(
    server: str, database: str, factory: MongoDBSessionManagerFactory
) -> None:
    killed_at_work(server, database, "graph", "invocation")
    resumed = Trio("graph")
    assert resumed.build(in_another_process(factory))("the task").status == Status.COMPLETED
    assert resumed.worked == ["first", "second", "third"]


def test_of_two_nodes_at_the_same_time_only_the_unfinished_one_runs_again(
    server: str, database: str, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    def first_is_stored() -> bool:
        return bool(stored.count_documents({"multi_agents.join.state.completed_nodes": ["first"]}))

    killed_at_work(server, database, "join", "message", once=first_is_stored)
    nodes = [node("first", "one"), node("second", "two"), node("third", "three")]
    result = join(in_another_process(factory), *nodes)("the task")
    assert result.status == Status.COMPLETED
    assert [len(each.model.calls) for each in nodes] == [0, 1, 1]
    text = "".join(block["text"] for block in nodes[2].model.calls[0][0]["content"])
    assert "one" in text
    assert "two" in text


# Human in the loop.


class Approval(HookProvider):
    """Asks a human before the second node."""

    def register_hooks(self, registry: HookRegistry, **kwargs: Any) -> None:
        registry.add_callback(BeforeNodeCallEvent, self._ask)

    def _ask(self, event: BeforeNodeCallEvent) -> None:
        if event.node_id == "second" and event.interrupt("approval", reason={"of": ["second"]}) != "yes":
            event.cancel_node = "a human said no"


def answered(result: MultiAgentResult, response: Any) -> list[Any]:
    return [
        {"interruptResponse": {"interruptId": interrupt.id, "response": response}} for interrupt in result.interrupts
    ]


@BOTH
def test_a_human_answers_in_another_process(
    api: Any, factory: MongoDBSessionManagerFactory, stored: Stored, kind: str
) -> None:
    asked = Trio(kind, [Approval()])
    result = api.run(api.open(factory), asked.build, [{"text": "what is it?"}, IMAGE])
    assert result.status == Status.INTERRUPTED
    assert [interrupt.reason for interrupt in result.interrupts] == [{"of": ["second"]}]
    assert asked.worked == ["first"]
    assert state_of(stored, KEY[kind])["status"] == "interrupted"

    resumed = Trio(kind, [Approval()])
    result = api.run(api.open(factory), resumed.build, answered(result, "yes"))
    assert result.status == Status.COMPLETED
    assert resumed.worked == ["second", "third"]
    assert resumed.sent[1:] == sent_without_manager(kind, with_image=True)[1:]


@tool(context=True)
def ask_human(question: str, tool_context: ToolContext) -> str:
    """Ask a human."""
    tool_context.agent.state.set("asked", question)
    return f"a human says {tool_context.interrupt('human', reason=question)}"


@BOTH
def test_a_tool_within_a_node_waits_for_a_human_in_another_process(
    api: Any, factory: MongoDBSessionManagerFactory, kind: str
) -> None:
    def trio() -> Trio:
        made = Trio(kind)
        end = [] if kind == "graph" else [handoff("third", "from second")]
        made.nodes[1] = node(
            "second", {"tool": "ask_human", "input": {"question": "why?"}}, *end, "two", tools=[ask_human]
        )
        return made

    task = [{"text": "what is it?"}, IMAGE]
    one_process = trio()
    orchestrator = one_process.build(None)
    result = orchestrator(task)
    assert [interrupt.reason for interrupt in result.interrupts] == ["why?"]
    orchestrator(answered(result, {"because": "so"}))

    first, second = trio(), trio()
    second.nodes[1].model.replies.popleft()
    result = api.run(api.open(factory), first.build, task)
    assert result.status == Status.INTERRUPTED
    result = api.run(api.open(factory), second.build, answered(result, {"because": "so"}))
    assert result.status == Status.COMPLETED
    assert first.worked == ["first", "second"]
    assert second.worked == ["second", "third"]
    assert second.sent[1:] == [one_process.sent[1][1:], one_process.sent[2]]
    assert second.nodes[1].state.get("asked") == "why?"


@SWARM
def test_a_human_who_says_no(api: Any, factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    result = api.run(api.open(factory), Trio("swarm", [Approval()]).build, "the task")
    resumed = Trio("swarm", [Approval()])
    assert api.run(api.open(factory), resumed.build, answered(result, "no")).status == Status.FAILED
    assert resumed.worked == []
    assert state_of(stored, "team")["status"] == "failed"


# One writer.


@BOTH
@pytest.mark.parametrize("exists", alternating(False, True), ids=["new", "old"])
def test_of_two_writers_the_second_is_refused(
    api: Any, factory: MongoDBSessionManagerFactory, stored: Stored, kind: str, exists: bool
) -> None:
    if exists:
        api.run(api.open(factory), Trio(kind).build, "an earlier task")
    first, second = api.open(factory), api.open(factory)
    api.run(first, Trio(kind).build, "the task")
    before = stored.find_one({"_id": "s"})
    overtaken = Trio(kind)
    with pytest.raises(SessionConflictError, match=f"multi-agent '{KEY[kind]}': another writer"):
        api.run(second, overtaken.build, "another task")
    assert overtaken.worked == ["first"]  # it stopped at the first thing it could not store
    assert stored.find_one({"_id": "s"}) == before
    with pytest.raises(SessionConflictError):
        api.flush(second)
    api.run(api.open(factory), Trio(kind).build, "another task")


@SWARM
def test_a_refused_orchestrator_harms_nothing_else_of_the_session(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    first, second = factory.create_session_manager("s"), factory.create_session_manager("s")
    Trio("graph").build(first)("the task")
    assistant = agent(second, "hello")
    with pytest.raises(SessionConflictError):
        Trio("graph").build(second)("the task")
    assistant("hi")
    Trio("swarm").build(second)("the task")
    document = stored.find_one({"_id": "s"})
    assert texts(document["agents"]["agent"]["messages"]) == ["hi", "hello"]
    assert document["multi_agents"]["team"]["state"]["status"] == "completed"
    second.close()  # somebody was told


def test_closing_says_what_nobody_was_told(factory: MongoDBSessionManagerFactory) -> None:
    first, second = factory.create_session_manager("s"), factory.create_session_manager("s")
    Trio("graph").build(first)("the task")

    async def record() -> None:
        graph = Trio("graph").build(second)
        graph.state.status = Status.FAILED
        second.sync_multi_agent(graph)  # nobody waits for it on a thread whose event loop runs

    asyncio.run(record())
    with pytest.raises(SessionConflictError):
        second.close()


def test_two_create_it_at_the_same_moment_and_it_belongs_to_who_runs_it_first(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    managers = [factory.create_session_manager("s") for _ in range(2)]
    first, second = (Trio("graph").build(manager) for manager in managers)
    for manager in managers:
        manager.flush()
    second("the task")
    with pytest.raises(SessionConflictError):
        first("the task")
    assert state_of(stored, "pipeline")["current_task"] == "the task"


def test_an_orchestrator_built_again_on_the_same_manager_goes_on(factory: MongoDBSessionManagerFactory) -> None:
    manager = factory.create_session_manager("s")
    with pytest.raises(BrokenError):
        Trio("graph", second=BrokenError("no")).build(manager)("the task")
    resumed = Trio("graph")
    resumed.build(manager)("the task")
    assert resumed.worked == ["second", "third"]


@SWARM
def test_a_closed_session_refuses_it(factory: MongoDBSessionManagerFactory) -> None:
    manager = factory.create_session_manager("s")
    graph = Trio("graph").build(manager)
    manager.close()
    with pytest.raises(SessionClosedError):
        graph("the task")
    with pytest.raises(SessionClosedError):
        Trio("swarm").build(manager)


def test_the_session_is_deleted_meanwhile(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    manager = factory.create_session_manager("s")
    graph = Trio("graph").build(manager)
    stored.delete_one({"_id": "s"})
    with pytest.raises(SessionNotFoundError):
        graph("the task")
    assert stored.find_one({"_id": "s"}) is None


@SWARM
def test_it_is_removed_meanwhile(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    manager = factory.create_session_manager("s")
    swarm = Trio("swarm").build(manager)
    swarm("the task")
    stored.update_one({"_id": "s"}, {"$unset": {"multi_agents": 1}})
    with pytest.raises(AgentNotFoundError, match="multi-agent 'team'"):
        swarm("the task")


# What gets lost on the way.


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def behind_proxy(proxy: Proxy, database: str) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory of the proxy, with which it is connected."""
    with MongoDBSessionManagerFactory(
        proxy.uri, database, serverMonitoringMode="poll", serverSelectionTimeoutMS=300
    ) as factory:
        factory.ping()
        yield factory


@BOTH
@pytest.mark.parametrize("lost", alternating("request", "acknowledgement"))
@pytest.mark.parametrize("at", alternating("first", "second", "third"))
def test_lost_on_the_way_and_stored_once(
    proxy: Proxy, behind_proxy: MongoDBSessionManagerFactory, stored: Stored, kind: str, lost: str, at: str
) -> None:
    drop = proxy.drop_before_request if lost == "request" else proxy.drop_after_request
    trio = Trio(kind)
    position = ["first", "second", "third"].index(at)
    model = trio.nodes[position].model
    last = model.replies.pop()

    def answer(_: object) -> Any:
        drop(command("update"), 2)  # a replica set's driver repeats a write once, by itself
        return last

    model.replies.append(answer)
    assert trio.build(behind_proxy.create_session_manager("s"))("the task").status == Status.COMPLETED
    assert proxy.dropped == 2
    element = stored.find_one({"_id": "s"})["multi_agents"][KEY[kind]]
    assert element["revision"] == 4
    assert element["state"]["status"] == "completed"


@BOTH
@pytest.mark.parametrize("applied", alternating(False, True), ids=["not applied", "applied"])
def test_an_outage_stops_it_where_it_happened(
    proxy: Proxy, behind_proxy: MongoDBSessionManagerFactory, stored: Stored, kind: str, applied: bool
) -> None:
    """Then the manager stores what it has once the server is back, and another process goes on from there."""
    trio = Trio(kind)
    model = trio.nodes[1].model
    last = model.replies.pop()

    def answer(_: object) -> Any:
        if applied:
            proxy.refuse_after_request(command("update"))
        else:
            proxy.refuse()
        return last

    model.replies.append(answer)
    manager = behind_proxy.create_session_manager("s")
    orchestrator = trio.build(manager)
    with pytest.raises(MongoDBSessionError):
        orchestrator("the task")
    proxy.accept()
    eventually(lambda: flushed(manager))
    resumed = Trio(kind)
    result = resumed.build(in_another_process(behind_proxy))("the task")
    assert result.status == Status.COMPLETED
    assert resumed.worked == ["third"]
    assert resumed.sent[2] == sent_without_manager(kind)[2]


def flushed(manager: Any) -> bool:
    try:
        manager.flush()
    except MongoDBSessionError:
        return False
    return True


@SWARM
def test_a_failed_write_of_a_swarm_reaches_its_caller(
    api: Any, server: str, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    """A swarm only logs what its hooks raise."""
    trio = Trio("swarm")
    with fail_point(server, failCommands=["update"], errorCode=13), pytest.raises(AccessDeniedError, match="code 13"):
        api.run(api.open(factory), trio.build, "the task")
    assert trio.worked == ["first"]
    assert state_of(stored, "team")["next_nodes_to_execute"] == ["second"]
    resumed = Trio("swarm")
    api.run(api.open(factory), resumed.build, "the task")
    assert resumed.worked == ["second", "third"]


def test_a_state_too_large_to_store_stops_it_and_leaves_the_last_one(
    api: Any, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = api.open(factory)
    with untraced(), pytest.raises(StateTooLargeError):
        api.run(manager, Trio("graph", second="x" * 17_000_000).build, "the task")
    assert state_of(stored, "pipeline")["next_nodes_to_execute"] == ["second"]
    assistant = agent(manager, "hello")
    asyncio.run(assistant.invoke_async("hi"))

    resumed = Trio("graph")
    assert api.run(api.open(factory), resumed.build, "the task").status == Status.COMPLETED
    assert resumed.worked == ["second", "third"]


def test_after_a_state_too_large_a_smaller_one_is_stored(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    manager = factory.create_session_manager("s")
    manager.initialize_multi_agent(Odd({}))
    with pytest.raises(StateTooLargeError):
        manager.sync_multi_agent(Odd("x" * 17_000_000))
    manager.sync_multi_agent(Odd({"small": True}))
    assert state_of(stored, "odd") == {"small": True}


# The repositories.


def test_the_repository(factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository) -> None:
    for use in (repository.create_multi_agent, repository.update_multi_agent):
        with pytest.raises(SessionNotFoundError):
            use("none", Odd({}))
    with pytest.raises(SessionNotFoundError):
        repository.read_multi_agent("none", "odd")
    repository.open_session("s")
    assert repository.read_multi_agent("s", "odd") is None
    with pytest.raises(AgentNotFoundError, match="multi-agent 'odd'"):
        repository.update_multi_agent("s", Odd({}))
    repository.create_multi_agent("s", Odd({"step": 1}))
    repository.create_multi_agent("s", Odd({"step": 2}))  # it already exists
    assert repository.read_multi_agent("s", "odd") == {"step": 1}

    manager = factory.create_session_manager("s")
    manager.initialize_multi_agent(Odd(None))
    repository.update_multi_agent("s", Odd(ODD_STATE))
    assert repository.read_multi_agent("s", "odd") == ODD_STATE
    with pytest.raises(SessionConflictError):
        manager.sync_multi_agent(Odd({"step": 3}))
    assert repository.read_multi_agent("s", "odd") == ODD_STATE


@pytest.mark.parametrize("write", ["create", "update"])
def test_a_lost_acknowledgement_of_the_repository(proxy: Proxy, database: str, stored: Stored, write: str) -> None:
    with MongoDBSessionRepository(proxy.uri, database) as repository:
        repository.open_session("s")
        if write == "update":
            repository.create_multi_agent("s", Odd({"step": 0}))
        use: Callable[..., None] = getattr(repository, f"{write}_multi_agent")
        proxy.drop_after_request(command("update"), 2)
        use("s", Odd({"step": 1}))
        assert proxy.dropped == 2
        assert repository.read_multi_agent("s", "odd") == {"step": 1}
        assert stored.find_one({"_id": "s"})["multi_agents"]["odd"]["revision"] == (write == "update")


def test_a_manager_that_is_not_open_says_so() -> None:
    manager = mongodb_session_manager.AsyncMongoDBSessionManager("s", "mongodb://localhost")
    for use in (manager.initialize_multi_agent, manager.sync_multi_agent):
        with pytest.raises(SessionClosedError, match="is not open"):
            use(Odd({}))


def test_a_state_that_an_orchestrator_cannot_restore_is_one_clear_error(factory: MongoDBSessionManagerFactory) -> None:
    class Incompatible(Swarm):
        def deserialize_state(self, payload: dict[str, Any]) -> None:
            raise RuntimeError("a state of another version")

    with factory.create_session_manager("s") as manager:
        Swarm([agent(None, "done", agent_id="one")], id="swarm", session_manager=manager)("hello")
    with (
        factory.create_session_manager("s") as manager,
        pytest.raises(DatabaseError, match=r"'multi_agents.swarm.state' cannot be restored \(RuntimeError\)"),
    ):
        Incompatible([agent(None, "done", agent_id="one")], id="swarm", session_manager=manager)
