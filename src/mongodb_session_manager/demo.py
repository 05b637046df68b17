"""A model and a MongoDB server for trying the library: no account, no key, no network.

    from strands import Agent
    from mongodb_session_manager import MongoDBSessionManager
    from mongodb_session_manager.demo import ScriptedModel, demo_server

    with MongoDBSessionManager("ada-1", demo_server("demo-data")) as session:
        agent = Agent(model=ScriptedModel(), session_manager=session, callback_handler=None)
        print(agent("Hello, my name is Ada."))

The server needs the extra `embedded`, or `mongod` on `PATH`. In your application, pass your connection string in place
of `demo_server(...)`, and one of Strands' models in place of `ScriptedModel()`:

    strands.models.BedrockModel()
    strands.models.openai.OpenAIModel(model_id="gpt-4o")
    strands.models.anthropic.AnthropicModel(model_id="claude-sonnet-4-6", max_tokens=1024)
    strands.models.ollama.OllamaModel("http://localhost:11434", model_id="llama3.1")

Importing `mongodb_session_manager` does not import this module.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import json
import os
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

from .embedded import EmbeddedMongoDB, find_mongod
from .errors import EmbeddedServerError, MissingExtraError, raise_alone

__all__ = ["Redaction", "Reply", "ScriptedModel", "demo_server"]

T = TypeVar("T", bound=BaseModel)

_NO_MONGOD = (
    "demo_server() found no mongod: pip install 'mongodb-session-manager[embedded]', put mongod on your PATH, or set"
    " MONGODB_URI to the connection string of a server"
)

# Matches "my name is ada" and "Call me Ada Lovelace": one word in any case, then words that start with a capital.
_TOLD_NAME = re.compile(
    r"\b(?i:my name is|i am called|i.m called|call me)\s+([^\W\d_][\w'-]*(?: [A-ZÀ-Þ][\w'-]*)*)",
)
_ASKED_NAME = re.compile(r"\b(?:what is|what.s|know|remember) my name\b", re.IGNORECASE)


def demo_server(data_directory: str | os.PathLike[str] | None = None) -> str:
    """Start a MongoDB server for a demo and return its connection string.

    If the environment variable `MONGODB_URI` names a server, none is started. Otherwise an `EmbeddedMongoDB` starts,
    which takes about a second, and ends with this process. `MONGODB_URI` is set to it: later calls, child processes and
    managers without a connection string use the same server.

    Args:
        data_directory: The embedded server's data directory, created if it does not exist. The next process that uses
            it continues with its data; only one server can use it at a time. Default: a temporary directory, removed
            when the process ends.

    Raises:
        MissingExtraError: There is no `mongod`, for example because the extra `embedded` is not installed.
        EmbeddedServerError: The server did not start, for example because another server uses the data directory.
    """
    if uri := os.environ.get("MONGODB_URI"):
        return uri
    try:
        binary = find_mongod()
    except EmbeddedServerError:
        if os.environ.get("MONGOD_BINARY"):
            raise
        raise_alone(MissingExtraError(_NO_MONGOD))
    server = EmbeddedMongoDB(binary=binary, data_directory=data_directory)
    server.start()
    atexit.register(server.stop)
    os.environ["MONGODB_URI"] = server.connection_string
    return server.connection_string


@dataclass(frozen=True)
class Redaction:
    """A guardrail intervenes: the user's message is replaced, and the assistant declines.

    Attributes:
        text: The replacement of the user's message.
        answer: The text of the assistant's message.
    """

    text: str
    answer: str = "I cannot help with that."


Reply = str | dict[str, Any] | list[dict[str, Any]] | Redaction | BaseException | Callable[[Messages], Any]
"""One reply of a script.

- `str`: a text.
- `dict`: a tool call, `{"tool": name, "input": {...}}`. The optional key `"text"` holds text before the call.
- `list` of such dicts: several tool calls in one message.
- `Redaction`: a guardrail intervenes.
- `BaseException`: raised in place of an answer.
- function: called with the conversation; returns one of the above, or `None` for the default answer.
"""


class ScriptedModel(Model):
    """A Strands model that answers from a script, and then from the conversation.

    Each call of the model takes the next reply of the script:

        ScriptedModel(["Hello!", {"tool": "weather", "input": {"city": "Oslo"}}, "It rains in Oslo."])

    After the script, or without one, the answer shows the memory of the agent:

        agent = Agent(model=ScriptedModel())
        agent("My name is Ada.")  # Hello! I have been sent 1 message.
        agent("What is my name?")  # Your name is Ada.

    It streams word by word and reports usage, a token for each word. Several agents can share one instance.

    Args:
        replies: The script, in order; see `Reply`.
        delay: Seconds to wait before each streamed chunk.
        model_id: The model's name in configurations, traces and metrics.

    Attributes:
        replies: The rest of the script; append to it to extend the script.
        calls: The conversation sent with each call, oldest call first.
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
        """Stream the next reply, text word by word.

        Raises:
            BaseException: The next reply is this exception.
            TypeError: The next reply is not a `Reply`.
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
                f"ScriptedModel has no {output_model.__name__} to return: "
                "script a dict of its fields as the next reply, ScriptedModel([{...}])"
            )
        yield {"output": output_model.model_validate(reply)}

    def _next_reply(self, messages: Messages) -> Any:
        """Record the call and take the next reply; None after the last one."""
        self.calls.append(copy.deepcopy(messages))
        try:
            reply = self.replies.popleft()  # not after a test for emptiness: another thread can take the last one
        except IndexError:
            return None
        if callable(reply):
            reply = reply(messages)
        if isinstance(reply, BaseException):
            raise reply
        return reply


def _answer_from(messages: Messages) -> str:
    """Return the user's name if the last message asks for it, else the length of the conversation."""
    said = [_text(message) for message in messages if message["role"] == "user"]
    if said and _ASKED_NAME.search(said[-1]):
        names = [name for text in said for name in _TOLD_NAME.findall(text)]
        return f"Your name is {names[-1]}." if names else "I do not know your name yet."
    return f"Hello! I have been sent {len(messages)} message{'' if len(messages) == 1 else 's'}."


def _assistant_content(reply: Any) -> tuple[list[ContentBlock], StopReason]:
    if isinstance(reply, Redaction):
        return [{"text": reply.answer}], "guardrail_intervened"
    if isinstance(reply, str):
        return [{"text": reply}], "end_turn"
    calls = reply if isinstance(reply, list) else [reply]
    if not calls or not all(isinstance(call, dict) and "tool" in call for call in calls):
        raise TypeError(f"not a reply: {reply!r}; expected one of the forms of mongodb_session_manager.demo.Reply")
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
    """Yield a message's chunks in the order of Strands' Bedrock provider."""
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
    """Count the words, of tool calls and results in their JSON form."""
    return sum(len((block.get("text") or json.dumps(block, default=str)).split()) for block in content)
