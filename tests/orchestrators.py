"""Graphs and swarms with scripted nodes, for tests and for the processes that tests start."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from strands import Agent
from strands.multiagent import GraphBuilder, Swarm
from strands.multiagent.base import MultiAgentBase, MultiAgentResult
from strands.session import SessionManager

from mongodb_session_manager.demo import ScriptedModel

Build = Callable[[SessionManager | None], MultiAgentBase]


def node(name: str, *replies: Any, **options: Any) -> Agent:
    """Return an agent that says `replies`, for a graph or swarm."""
    return Agent(
        name=name, agent_id=name, model=ScriptedModel(replies), callback_handler=None, load_tools_from_directory=False,
        **options,
    )  # fmt: skip


def pipeline(manager: SessionManager | None, *nodes: Agent, name: str = "pipeline", hooks: Any = None) -> Any:
    """Return a graph whose nodes follow one another."""
    builder = GraphBuilder().set_graph_id(name).set_execution_timeout(100).set_hook_providers(hooks or [])
    for position, each in enumerate(nodes):
        builder.add_node(each, each.name)
        if position:
            builder.add_edge(nodes[position - 1].name, each.name)
    if manager is not None:
        builder.set_session_manager(manager)
    return builder.build()


def join(manager: SessionManager | None, left: Agent, right: Agent, last: Agent) -> Any:
    """Return a graph of two nodes at the same time and one after both."""
    builder = GraphBuilder().set_graph_id("join").set_execution_timeout(100)
    for each in (left, right, last):
        builder.add_node(each, each.name)
    for each in (left, right):
        builder.add_edge(each.name, last.name)
    if manager is not None:
        builder.set_session_manager(manager)
    return builder.build()


def team(manager: SessionManager | None, *nodes: Agent, hooks: Any = None) -> Swarm:
    """Return a swarm that begins with the first node."""
    return Swarm(list(nodes), id="team", session_manager=manager, hooks=hooks)


def handoff(to: str, message: str = "go on", **context: Any) -> dict[str, Any]:
    """Return the reply of a node that hands over to another one."""
    return {"tool": "handoff_to_agent", "input": {"agent_name": to, "message": message, "context": context}}


async def stream(orchestrator: MultiAgentBase, task: Any) -> MultiAgentResult:
    async for event in orchestrator.stream_async(task):
        last = event
    result: MultiAgentResult = last["result"]
    return result


class Sync:
    """The synchronous manager, as synchronous code uses it."""

    def open(self, factory: Any, session_id: str = "s", **options: Any) -> Any:
        return factory.create_session_manager(session_id, **options)

    def run(self, manager: Any, build: Build, task: Any) -> MultiAgentResult:
        return build(manager)(task)

    def flush(self, manager: Any) -> None:
        manager.flush()


class Async:
    """The asynchronous manager, on a running event loop, on which the orchestrator is built too."""

    def open(self, factory: Any, session_id: str = "s", **options: Any) -> Any:
        return asyncio.run(factory.create_session_manager_async(session_id, **options))

    def run(self, manager: Any, build: Build, task: Any) -> MultiAgentResult:
        async def main() -> MultiAgentResult:
            return await self._invoke(build(manager), task)

        return asyncio.run(main())

    def flush(self, manager: Any) -> None:
        asyncio.run(manager.flush())

    def _invoke(self, orchestrator: MultiAgentBase, task: Any) -> Awaitable[MultiAgentResult]:
        return orchestrator.invoke_async(task)


class Streaming(Async):
    """The same with the events streamed."""

    def _invoke(self, orchestrator: MultiAgentBase, task: Any) -> Awaitable[MultiAgentResult]:
        return stream(orchestrator, task)


def sent(each: Agent) -> list[Any]:
    """Return what the model of a node was sent, call by call, without what is different in every run."""
    model: Any = each.model
    return [[{"role": message["role"], "content": message["content"]} for message in call] for call in model.calls]


class Odd(MultiAgentBase):
    """An orchestrator of somebody else's making."""

    def __init__(self, state: Any, name: str = "odd") -> None:
        super().__init__()
        self.id, self.state = name, state

    async def invoke_async(self, task: Any, invocation_state: Any = None, **kwargs: Any) -> MultiAgentResult:
        raise NotImplementedError

    def serialize_state(self) -> Any:
        return self.state

    def deserialize_state(self, payload: dict[str, Any]) -> None:
        self.state = payload
