"""A model that needs no network, for the examples and the tests.

Install: `pip install strands-agents`. The other examples import this module; on its own it runs nothing.

Without a script it answers from the conversation it is sent, so it shows what the agent remembers:

    agent = Agent(model=ScriptedModel())
    agent("My name is Ada.")  # Hello! I have been sent 1 message.
    agent("What is my name?")  # Your name is Ada.

With a script it says what it is told to, one reply per call to the model, and then goes on as above:

    ScriptedModel(["Hello!", {"tool": "weather", "input": {"city": "Oslo"}}, "It rains in Oslo."])
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import BaseModel
from strands.models.model import Model
from strands.types.content import ContentBlock, Message, Messages
from strands.types.event_loop import StopReason, Usage
from strands.types.streaming import StreamEvent
from strands.types.tools import ToolSpec

T = TypeVar("T", bound=BaseModel)

# "my name is ada", "Call me Ada Lovelace": one word in any case, then words that start with a capital.
_TOLD_NAME = re.compile(
    r"\b(?i:my name is|i am called|i.m called|call me)\s+([^\W\d_][\w'-]*(?: [A-ZÀ-Þ][\w'-]*)*)",
)
_ASKED_NAME = re.compile(r"\b(?:what is|what.s|know|remember) my name\b", re.IGNORECASE)


@dataclass(frozen=True)
class Redaction:
    """A reply of a guardrail: the user's message is replaced and the model declines.

    Attributes:
        text: What replaces the user's message.
        answer: What the assistant says.
    """

    text: str
    answer: str = "I cannot help with that."


Reply = (
    str  # a text answer
    | dict[str, Any]  # a tool call: {"tool": name, "input": {...}, "text": said before the call, optional}
    | list[dict[str, Any]]  # several tool calls in one message
    | Redaction
    | BaseException  # raised instead of answering
    | Callable[[Messages], Any]  # called with the messages sent, returns one of the above, or None for the default
)


class ScriptedModel(Model):
    """A model that answers from a script, then from the conversation it is sent.

    Agents may share one instance: each call takes the next reply, whichever agent makes it.

    Args:
        replies: What to answer, in order; see `Reply`.
        delay: Seconds to wait before each streamed chunk.
        model_id: The name under which the model appears in traces and metrics.

    Attributes:
        replies: The replies not yet given; append to it to script more.
        calls: The messages sent with each call, oldest call first.
    """

    def __init__(self, replies: Iterable[Reply] = (), *, delay: float = 0.0, model_id: str = "scripted") -> None:
        self.replies: deque[Reply] = deque(replies)
        self.delay = delay
        self.config: dict[str, Any] = {"model_id": model_id}
        self.calls: list[Messages] = []

    def update_config(self, **model_config: Any) -> None:
        """Change the configuration, for example `context_window_limit`."""
        self.config.update(model_config)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration."""
        return self.config

    async def stream(
        self,
        messages: Messages,
        tool_specs: list[ToolSpec] | None = None,
        system_prompt: str | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[StreamEvent, None]:
        """Answer with the next reply, text word by word.

        Raises:
            BaseException: The scripted one, if the next reply is an exception.
            TypeError: The next reply is none of the forms of `Reply`.
        """
        reply = self._next_reply(messages)
        if reply is None:
            reply = _answer_from(messages)
        content, stop_reason = _assistant_content(reply)
        redacted = reply.text if isinstance(reply, Redaction) else None
        sent = len((system_prompt or "").split()) + sum(_count_words(message["content"]) for message in messages)
        for chunk in _chunks(content, stop_reason, redacted, sent):
            await asyncio.sleep(self.delay)
            yield chunk

    async def structured_output(
        self, output_model: type[T], prompt: Messages, system_prompt: str | None = None, **kwargs: Any
    ) -> AsyncGenerator[dict[str, T | Any], None]:
        """Build the output from the next reply, a dict of the output model's fields.

        Raises:
            ValueError: The next reply is not a dict, or does not fit the output model.
        """
        reply = self._next_reply(prompt)
        if not isinstance(reply, dict):
            raise ValueError(
                f"ScriptedModel cannot make up a {output_model.__name__}: "
                "script a dict of its fields as the next reply, ScriptedModel(replies=[{...}])"
            )
        yield {"output": output_model.model_validate(reply)}

    def _next_reply(self, messages: Messages) -> Any:
        """Record the call and take the next reply, None after the last one."""
        self.calls.append(copy.deepcopy(messages))
        try:
            reply = self.replies.popleft()  # atomic, hence no test for emptiness before it
        except IndexError:
            return None
        if callable(reply):
            reply = reply(messages)
        if isinstance(reply, BaseException):
            raise reply
        return reply


def _answer_from(messages: Messages) -> str:
    """Answer from the conversation: the user's name if asked for, else how long the conversation is."""
    said = [_text(message) for message in messages if message["role"] == "user"]
    if said and _ASKED_NAME.search(said[-1]):
        names = [name for text in said for name in _TOLD_NAME.findall(text)]
        return f"Your name is {names[-1]}." if names else "I do not know your name yet."
    return f"Hello! I have been sent {len(messages)} message{'' if len(messages) == 1 else 's'}."


def _assistant_content(reply: Any) -> tuple[list[ContentBlock], StopReason]:
    """Turn a reply into the content of an assistant message and the reason it ends."""
    if isinstance(reply, Redaction):
        return [{"text": reply.answer}], "guardrail_intervened"
    if isinstance(reply, str):
        return [{"text": reply}], "end_turn"
    calls = reply if isinstance(reply, list) else [reply]
    if not calls or not all(isinstance(call, dict) and "tool" in call for call in calls):
        raise TypeError(f"not a reply: {reply!r}")
    content: list[ContentBlock] = []
    for call in calls:
        if call.get("text"):
            content.append({"text": call["text"]})
        tool_use_id = f"tooluse_{uuid4().hex}"
        content.append({"toolUse": {"toolUseId": tool_use_id, "name": call["tool"], "input": call.get("input", {})}})
    return content, "tool_use"


def _chunks(
    content: list[ContentBlock], stop_reason: StopReason, redacted: str | None, sent: int
) -> Iterator[StreamEvent]:
    """Yield the chunks of a message in the order in which Strands' Bedrock provider does."""
    yield {"messageStart": {"role": "assistant"}}
    for block in content:
        if "toolUse" in block:
            use = block["toolUse"]
            yield {"contentBlockStart": {"start": {"toolUse": {"toolUseId": use["toolUseId"], "name": use["name"]}}}}
            yield {"contentBlockDelta": {"delta": {"toolUse": {"input": json.dumps(use["input"])}}}}
        else:
            yield {"contentBlockStart": {"start": {}}}
            for word in re.findall(r"\S+\s*|\s+", block["text"]):
                yield {"contentBlockDelta": {"delta": {"text": word}}}
        yield {"contentBlockStop": {}}
    yield {"messageStop": {"stopReason": stop_reason}}
    if redacted is not None:
        yield {"redactContent": {"redactUserContentMessage": redacted}}
    answered = _count_words(content)
    usage = Usage(inputTokens=sent, outputTokens=answered, totalTokens=sent + answered)
    yield {"metadata": {"usage": usage, "metrics": {"latencyMs": 20 + 5 * answered}}}


def _text(message: Message) -> str:
    return " ".join(block["text"] for block in message["content"] if "text" in block)


def _count_words(content: list[ContentBlock]) -> int:
    """Count words, our tokens; a tool call or result counts as its JSON form."""
    return sum(len((block.get("text") or json.dumps(block, default=str)).split()) for block in content)
