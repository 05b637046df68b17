"""A model that answers with whole messages from a script, and records its requests."""

from __future__ import annotations

import json
import pickle
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from strands.models.model import Model
from strands.types.exceptions import ContextWindowOverflowException


class RecordingModel(Model):
    """A model that answers each call with the next reply.

    Args:
        replies: Texts, lists of content blocks, `Reply`s or exceptions.
        stateful: Whether the provider keeps the conversation. The state of each answer is then the number of its call.

    Attributes:
        calls: The arguments of each call: messages, system prompt and model state.
        agent: The agent of the model; a reply can cancel it.
    """

    def __init__(self, replies: Sequence[Any], *, stateful: bool = False) -> None:
        self._replies = list(replies)
        self._stateful = stateful
        self.calls: list[dict[str, Any]] = []
        self.agent: Any = None

    @property
    def stateful(self) -> bool:
        return self._stateful

    def update_config(self, **model_config: Any) -> None: ...

    def get_config(self) -> dict[str, Any]:
        return {"model_id": "recording", "context_window_limit": 100_000}

    async def structured_output(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        raise NotImplementedError
        yield  # type: ignore[unreachable]  # makes this method a generator

    async def stream(
        self,
        messages: Any,
        tool_specs: Any = None,
        system_prompt: str | None = None,
        *,
        system_prompt_content: Any = None,
        model_state: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        sent = {"messages": messages, "system": system_prompt_content or system_prompt, "state": model_state}
        self.calls.append(pickle.loads(pickle.dumps(sent)))  # a copy, in a tenth of the time of `deepcopy`
        reply = self._replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        reply = reply if isinstance(reply, Reply) else Reply(reply)
        if self._stateful and model_state is not None:
            model_state["response_id"] = model_state.get("response_id", 0) + 1
        for position, chunk in enumerate(reply.chunks()):
            if position == 2 and reply.cancels:
                self.agent.cancel()
            yield chunk


class Reply:
    """One answer of a model.

    Args:
        content: A text, or content blocks.
        stop: The stop reason; default `"tool_use"` with a tool call, else `"end_turn"`.
        redacts: The text with which a guardrail replaces the user's message.
        cancels: Whether the agent is cancelled while the model answers.
    """

    def __init__(
        self, content: Any, *, stop: str | None = None, redacts: str | None = None, cancels: bool = False
    ) -> None:
        self._content: list[Any] = [{"text": content}] if isinstance(content, str) else content
        calls_tool = any("toolUse" in block for block in self._content)
        self._stop = stop or ("tool_use" if calls_tool else "end_turn")
        self._redacts = redacts
        self.cancels = cancels

    def chunks(self) -> Iterator[Any]:
        yield {"messageStart": {"role": "assistant"}}
        for block in self._content:
            start = {}
            if "toolUse" in block:
                start = {"toolUse": {name: block["toolUse"][name] for name in ("toolUseId", "name")}}
            yield {"contentBlockStart": {"start": start}}
            for delta in _deltas(block):
                yield {"contentBlockDelta": {"delta": delta}}
            yield {"contentBlockStop": {}}
        yield {"messageStop": {"stopReason": self._stop}}
        if self._redacts is not None:
            yield {"redactContent": {"redactUserContentMessage": self._redacts}}
        usage = {"inputTokens": 11, "outputTokens": 7, "totalTokens": 18, "cacheReadInputTokens": 3}
        yield {"metadata": {"usage": usage, "metrics": {"latencyMs": 5}}}


def _deltas(block: dict[str, Any]) -> Iterator[Any]:
    match block:
        case {"text": text}:
            yield {"text": text[:5]}
            yield {"text": text[5:]}
        case {"toolUse": use}:
            yield {"toolUse": {"input": json.dumps(use["input"])}}
        case {"reasoningContent": {"reasoningText": reasoning}}:
            yield {"reasoningContent": {"text": reasoning["text"]}}
            if "signature" in reasoning:
                yield {"reasoningContent": {"signature": reasoning["signature"]}}
        case {"reasoningContent": {"redactedContent": redacted}}:
            yield {"reasoningContent": {"redactedContent": redacted}}
        case {"citationsContent": {"citations": citations, "content": [{"text": text}]}}:
            for citation in citations:
                yield {"citation": citation}
            yield {"text": text}


def overflow() -> ContextWindowOverflowException:
    return ContextWindowOverflowException("the input is too long")


def comparable(value: Any) -> Any:
    """Remove fields that no model receives, and the ids that Strands generates for direct tool calls."""
    if isinstance(value, dict):
        hidden = ("tracking_id", "metadata") if "role" in value else ()
        return {
            key: comparable(item) for key, item in value.items() if key not in hidden and not _is_made_up(key, item)
        }
    return [comparable(item) for item in value] if isinstance(value, list) else value


def _is_made_up(key: str, value: Any) -> bool:
    return key == "toolUseId" and value.startswith("tooluse_")
