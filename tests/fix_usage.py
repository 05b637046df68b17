"""Agents whose model counts tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from strands import Agent, tool

from mongodb_session_manager.demo import ScriptedModel
from support import agent

CALL = {
    "inputTokens": 10,
    "outputTokens": 5,
    "totalTokens": 15,
    "cacheReadInputTokens": 3,
    "cacheWriteInputTokens": 2,
    "latencyMs": 7,
}
METADATA = {"usage": {name: value for name, value in CALL.items() if name != "latencyMs"}, "metrics": {"latencyMs": 7}}


class MeteredModel(ScriptedModel):
    """A scripted model of which each call uses the same."""

    async def stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        async for chunk in super().stream(*args, **kwargs):
            yield {"metadata": METADATA} if "metadata" in chunk else chunk


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


ADD = {"tool": "add", "input": {"a": 1, "b": 2}}


def metered(manager: Any, *replies: Any, **options: Any) -> Agent:
    live = agent(manager, tools=[add], **options)
    live.model = MeteredModel(replies)
    return live
