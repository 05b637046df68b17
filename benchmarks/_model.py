"""A model without a network that streams like a model behind HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from strands import Agent, tool
from strands.models.model import Model
from strands.session import SessionManager
from strands.types.content import Messages
from strands.types.streaming import StreamEvent
from strands.types.tools import ToolSpec

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Pace:
    """The speed of a model.

    Attributes:
        tokens: Chunks of text per answer.
        seconds: Delay before each chunk.
        parsed: How often the JSON of a chunk is parsed. A provider's client parses it once, but also reads HTTP,
            decodes frames and validates; the repetitions simulate this work.
    """

    tokens: int = 40
    seconds: float = 0.005
    parsed: int = 5


INSTANT = Pace(tokens=5, seconds=0.0, parsed=0)
"""A model without delay, to measure only the session manager."""

_CHUNK = json.dumps(
    {
        "contentBlockIndex": 0,
        "delta": {"text": "token "},
        "p": "abcdefghijklmnopqrstuvwxyz" * 4,
        "usage": {"inputTokens": 1000, "outputTokens": 10, "totalTokens": 1010},
    }
)


class StreamingModel(Model):
    """A model that streams an answer at a given pace, and can call a tool before it answers.

    Args:
        pace: The speed of the answer.
        tool: The name of a tool without arguments that the model calls first.
    """

    def __init__(self, pace: Pace = INSTANT, tool: str | None = None) -> None:
        self._pace = pace
        self._tool = tool
        self._config: dict[str, Any] = {"model_id": "streaming"}

    def update_config(self, **model_config: Any) -> None:
        """Change the configuration."""
        self._config.update(model_config)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration."""
        return self._config

    async def stream(
        self,
        messages: Messages,
        tool_specs: list[ToolSpec] | None = None,
        system_prompt: str | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[StreamEvent, None]:
        """Stream the tool call if there is a tool and no result yet, else the answer."""
        yield {"messageStart": {"role": "assistant"}}
        if self._tool is not None and not any("toolResult" in block for block in messages[-1]["content"]):
            await asyncio.sleep(self._pace.seconds)
            use_id = f"use_{len(messages)}"
            yield {"contentBlockStart": {"start": {"toolUse": {"toolUseId": use_id, "name": self._tool}}}}
            yield {"contentBlockDelta": {"delta": {"toolUse": {"input": "{}"}}}}
            yield {"contentBlockStop": {}}
            yield {"messageStop": {"stopReason": "tool_use"}}
        else:
            yield {"contentBlockStart": {"start": {}}}
            for _ in range(self._pace.tokens):
                await asyncio.sleep(self._pace.seconds)
                for _ in range(self._pace.parsed):
                    json.loads(_CHUNK)
                yield {"contentBlockDelta": {"delta": {"text": "token "}}}
            yield {"contentBlockStop": {}}
            yield {"messageStop": {"stopReason": "end_turn"}}
        count = self._pace.tokens
        yield {
            "metadata": {
                "usage": {"inputTokens": 100, "outputTokens": count, "totalTokens": 100 + count},
                "metrics": {"latencyMs": round(count * self._pace.seconds * 1000)},
            }
        }

    async def structured_output(
        self, output_model: type[T], prompt: Messages, system_prompt: str | None = None, **kwargs: Any
    ) -> AsyncGenerator[dict[str, T | Any], None]:
        """Not supported: no measure needs structured output.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError
        yield {}  # type: ignore[unreachable]


@tool
def look() -> str:
    """Look outside."""
    return "It rains."


def agent(
    manager: SessionManager[Any] | None, pace: Pace = INSTANT, *, calls: str | None = None, **options: Any
) -> Agent:
    """Return an agent that prints nothing; its model calls the tool `calls` before it answers."""
    model = StreamingModel(pace, calls)
    return Agent(model=model, agent_id="agent", session_manager=manager, callback_handler=None, **options)
