"""A bidirectional model that says what it is told to."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator
from typing import Any

from strands.bidi.models import BidiModel
from strands.bidi.types.events import (
    BidiReasoningDeltaEvent,
    BidiReasoningStartEvent,
    BidiReasoningStopEvent,
    BidiResponseStartEvent,
    BidiResponseStopEvent,
    BidiTextDeltaEvent,
    BidiTextStartEvent,
    BidiTextStopEvent,
    BidiToolUseBlocksEvent,
    BidiTranscriptDeltaEvent,
    BidiTranscriptStartEvent,
    BidiTranscriptStopEvent,
    BidiUsageEvent,
)


class ScriptedBidiModel(BidiModel):
    """Emits the events of the next turn when it is sent something.

    Args:
        *turns: Lists of events.

    Attributes:
        history: The messages it was started with.
        received: What it was sent since.
    """

    def __init__(self, *turns: list[Any]) -> None:
        self._turns = list(turns)
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self.history: list[Any] = []
        self.received: list[Any] = []

    def update_config(self, **model_config: Any) -> None: ...

    def get_config(self) -> dict[str, Any]:
        return {"model_id": "scripted-bidi"}

    async def start(
        self, system_prompt: str | None = None, tools: Any = None, messages: Any = None, **kwargs: Any
    ) -> None:
        self.history = copy.deepcopy(messages)

    async def stop(self) -> None: ...

    async def send(self, content: Any) -> None:
        self.received.append(content)
        if self._turns:
            self.emit(*self._turns.pop(0))

    def emit(self, *events: Any) -> None:
        """Emit events now."""
        for event in events:
            self._events.put_nowait(event)

    async def receive(self) -> AsyncGenerator[Any, None]:
        while True:
            yield await self._events.get()


def said(text: str, content_id: str) -> list[Any]:
    """Return the events of a response in writing."""
    return [
        BidiResponseStartEvent(f"response {content_id}"),
        BidiTextStartEvent(content_id),
        BidiTextDeltaEvent(text, content_id),
        BidiTextStopEvent(content_id),
        BidiUsageEvent(10, 5, 15),
        BidiResponseStopEvent(f"response {content_id}"),
    ]


def spoken(heard: str, thought: str, words: list[str], content_id: str) -> list[Any]:
    """Return the events of a response aloud: what the user said comes late, in between."""
    user, thinking, mouth = f"user {content_id}", f"thought {content_id}", f"said {content_id}"
    return [
        BidiTranscriptStartEvent("user", user),
        BidiResponseStartEvent(f"response {content_id}"),
        BidiReasoningStartEvent(thinking),
        BidiReasoningDeltaEvent(thought, thinking),
        BidiTranscriptStartEvent("assistant", mouth),
        BidiReasoningStopEvent(thinking),
        BidiTranscriptDeltaEvent(heard, "user", user),
        *(BidiTranscriptDeltaEvent(word, "assistant", mouth) for word in words),
        BidiTranscriptStopEvent("user", user),
        BidiTranscriptStopEvent("assistant", mouth),
        BidiResponseStopEvent(f"response {content_id}"),
    ]


def calls(name: str, tool_use_id: str, **input_: Any) -> list[Any]:
    """Return the events of a tool call."""
    return [BidiToolUseBlocksEvent([{"toolUseId": tool_use_id, "name": name, "input": input_}])]
