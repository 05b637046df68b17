"""The table of conversations: the prompts, the replies of the model, and the tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, field_validator
from strands import Agent, ToolContext, tool
from strands.agent import _continuation
from strands.hooks import (
    AfterInvocationEvent,
    BeforeModelCallEvent,
    BeforeToolCallEvent,
    HookProvider,
    HookRegistry,
)

from recording_model import Reply


@dataclass(frozen=True)
class Turn:
    """One action of a caller.

    Attributes:
        prompt: The prompt, or a function that returns it for the result of the previous turn.
        options: Further arguments of the call.
        direct: Calls a tool of the agent instead of the agent.
        whole: Whether the turn is only cut at its end, because no message records an event within it, such as a
            cancellation or a redacted question that gets no answer.
    """

    prompt: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    direct: Callable[[Agent], Any] | None = None
    whole: bool = False


@dataclass(frozen=True)
class Conversation:
    """Attributes: `name`, `turns`, the model's `replies`, `options` of the agent, whether the model is `stateful`."""

    name: str
    turns: Sequence[Turn | Any]
    replies: Sequence[Any]
    options: Callable[[], dict[str, Any]] = dict
    stateful: bool = False


# Tools.


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def fail(reason: str) -> str:
    """Fail."""
    raise ValueError(reason)


@tool(context=True)
def count(tool_context: ToolContext) -> str:
    """Count how often this was called."""
    calls = (tool_context.agent.state.get("calls") or 0) + 1
    tool_context.agent.state.set("calls", calls)
    return f"called {calls} times"


@tool
def look() -> dict[str, Any]:
    """Look around."""
    return {"status": "success", "content": [{"json": {"a.b": {"$x": [1, None, 2.5]}}}, IMAGE, DOCUMENT]}


@tool(context=True)
def approve(what: str, tool_context: ToolContext) -> str:
    """Ask a human."""
    return f"{what}: {tool_context.interrupt('approval', reason={'what': what})}"


@tool(context=True)
def cancel(tool_context: ToolContext) -> str:
    """Cancel the agent."""
    tool_context.agent.cancel()
    return "cancelled"


TOOLS = [add, fail, count, look, approve, cancel]


def use(name: str, tool_use_id: str, **input_: Any) -> dict[str, Any]:
    return {"toolUse": {"toolUseId": tool_use_id, "name": name, "input": input_}}


# Content.

IMAGE = {"image": {"format": "png", "source": {"bytes": b"\x89PNG\0\xff"}}}
DOCUMENT = {"document": {"format": "pdf", "name": "report", "source": {"bytes": b"%PDF\0"}, "citations": {"enabled": True}}}  # fmt: skip  # noqa: E501
VIDEO = {"video": {"format": "mp4", "source": {"bytes": b"\0\0\0 ftyp"}}}
STORED_VIDEO = {"video": {"format": "mp4", "source": {"location": {"type": "s3", "uri": "s3://bucket/video.mp4"}}}}
GUARDED = {"guardContent": {"text": {"text": "guard this", "qualifiers": ["guard_content", "query"]}}}
CACHE_POINT = {"cachePoint": {"type": "default"}}
THOUGHT = {"reasoningContent": {"reasoningText": {"text": "Let me think.", "signature": "c2lnbmVk"}}}
HIDDEN = {"reasoningContent": {"redactedContent": b"\0\xfe\xff"}}
CITED = {
    "citationsContent": {
        "citations": [
            {
                "title": "report",
                "sourceContent": [{"text": "42"}],
                "location": {"documentPage": {"documentIndex": 0, "start": 1, "end": 2}},
            }
        ],
        "content": [{"text": "It is 42."}],
    }
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"text": text}]}


class Weather(BaseModel):
    """The weather."""

    city: str
    degrees: int

    @field_validator("degrees")
    @classmethod
    def possible(cls, value: int) -> int:
        if value < -273:
            raise ValueError("colder than possible")
        return value


STRUCTURED = {"structured_output_model": Weather}


def answers(*responses: Any) -> Callable[[Any], Any]:
    """Return the function that answers the interrupts of the previous turn."""

    def prompt(result: Any) -> Any:
        return [
            {"interruptResponse": {"interruptId": interrupt.id, "response": response}}
            for interrupt, response in zip(result.interrupts, responses, strict=True)
        ]

    return prompt


# Hooks. They keep their data in the agent's state or its messages, which are restored.


class AskBeforeAdding(HookProvider):
    def register_hooks(self, registry: HookRegistry, **kwargs: Any) -> None:
        registry.add_callback(BeforeToolCallEvent, self._ask)

    def _ask(self, event: BeforeToolCallEvent) -> None:
        if event.tool_use["name"] == "add" and event.interrupt("add", reason="may I?") != "yes":
            event.cancel_tool = "no"


class GoOnOnce(HookProvider):
    """Makes the agent invoke itself once more."""

    def register_hooks(self, registry: HookRegistry, **kwargs: Any) -> None:
        registry.add_callback(AfterInvocationEvent, self._go_on)

    def _go_on(self, event: AfterInvocationEvent) -> None:
        if len(event.agent.messages) and not event.agent.state.get("went_on"):
            event.agent.state.set("went_on", True)
            event.resume = "and then?"


class AddToPrompt(HookProvider):
    """Extends a user message before the model is called."""

    def register_hooks(self, registry: HookRegistry, **kwargs: Any) -> None:
        registry.add_callback(BeforeModelCallEvent, self._add)

    def _add(self, event: BeforeModelCallEvent) -> None:
        if event.agent.messages[-1]["content"] == [{"text": "grow"}]:
            _continuation.add_input(event, _continuation._ContinuationInput("and grow"))


CONVERSATIONS = [
    Conversation("nothing but text", ["how are you?"], ["Fine."]),
    Conversation(
        "a tool",
        ["1 + 2?"],
        [[{"text": "Let me see."}, use("add", "t1", a=1, b=2)], "3."],
    ),
    Conversation(
        "several tools in one turn",
        ["1 + 2, 3 + 4, how often?"],
        [
            [use("add", "t1", a=1, b=2), use("add", "t2", a=3, b=4), use("count", "t3")],
            [use("count", "t4")],
            "3, 7, 2.",
        ],
    ),
    Conversation(
        "tool errors",
        ["fail", "fail differently"],
        [[use("fail", "t1", reason="broken")], "It failed.", [use("unknown", "t2"), use("add", "t3", a="x")], "Too."],
    ),
    Conversation(
        "state that tools change",
        ["count", "count again"],
        [[use("count", "t1")], "1.", [use("count", "t2")], [use("count", "t3")], "3."],
    ),
    Conversation(
        "reasoning",
        ["think", "think of a tool"],
        [[THOUGHT, {"text": "Done."}], [THOUGHT, HIDDEN, use("add", "t1", a=1, b=2)], [HIDDEN, {"text": "3."}]],
    ),
    Conversation("citations", [[DOCUMENT, {"text": "what does it say?"}], "sure?"], [[CITED], "Yes."]),
    Conversation(
        "images, documents and videos",
        [[{"text": "see"}, IMAGE, DOCUMENT, VIDEO, STORED_VIDEO], "look around"],
        ["I see.", [use("look", "t1")], "A lot."],
    ),
    Conversation(
        "guard content and cache points",
        [[GUARDED, CACHE_POINT, {"text": "why?"}], [{"text": "again"}, CACHE_POINT]],
        ["Because.", "Because."],
        lambda: {"system_prompt": [{"text": "Be kind."}, CACHE_POINT, {"text": "Be brief."}]},
    ),
    Conversation(
        "structured output",
        [Turn("the weather?", STRUCTURED), Turn("and in Rome?", STRUCTURED)],
        [
            [use("Weather", "t1", city="Oslo", degrees=3)],
            [use("Weather", "t2", city="Rome", degrees=-300)],
            [use("Weather", "t3", city="Rome", degrees=30)],
        ],
    ),
    Conversation(
        "structured output that has to be forced",
        [Turn("the weather?", STRUCTURED)],
        ["It is cold.", [use("Weather", "t1", city="Oslo", degrees=3)]],
    ),
    Conversation(
        "a tool that asks a human",
        ["do it", Turn(answers("fine")), "again", Turn(answers({"no": ["way"]}))],
        [
            [use("count", "t1"), use("approve", "t2", what="all")],
            "Done.",
            [use("approve", "t3", what="more")],
            "Not done.",
        ],
    ),
    Conversation(
        "a hook that asks a human",
        ["1 + 2?", Turn(answers("yes")), "3 + 4?", Turn(answers("no"))],
        [[use("add", "t1", a=1, b=2)], "3.", [use("add", "t2", a=3, b=4)], "I may not."],
        lambda: {"hooks": [AskBeforeAdding()]},
    ),
    Conversation("cancelled while the model speaks", ["tell"], [Reply("Once upon a time", cancels=True)]),
    Conversation("cancelled by a tool", [Turn("cancel", whole=True), "still there?"], [[use("cancel", "t1")], "Yes."]),
    Conversation("a model that fails", ["one", "two"], [RuntimeError("no"), "Back again."]),
    Conversation(
        "a model that is cut off",
        ["tell", "go on"],
        [Reply([{"text": "Once"}, use("add", "t1", a=1, b=2)], stop="max_tokens"), "upon a time."],
    ),
    Conversation(
        "a guardrail",
        [Turn("how to pick a lock?", whole=True), "sorry"],
        [Reply("I cannot help.", stop="guardrail_intervened", redacts="[redacted]"), "No harm done."],
    ),
    Conversation(
        "a prompt of several messages",
        [[user("one"), user("two"), {"role": "assistant", "content": [{"text": "three"}]}, user("four")]],
        ["Five."],
    ),
    Conversation(
        "a tool called by the application",
        [Turn(direct=lambda agent: agent.tool.add(a=1, b=2), whole=True), "what was it?"],
        ["3."],
    ),
    Conversation("a message that grows", ["grow", "fine"], ["Bigger.", "Good."], lambda: {"hooks": [AddToPrompt()]}),
    Conversation("an agent that goes on by itself", ["go"], ["Gone.", "Then?"], lambda: {"hooks": [GoOnOnce()]}),
    Conversation(
        "a limit of turns",
        [Turn("count", {"limits": {"turns": 1}}), "go on"],
        [[use("count", "t1")], "1."],
    ),
    Conversation(
        "a conversation the provider keeps",
        [Turn("one", whole=True), Turn("count", whole=True), Turn("three", whole=True)],
        ["1.", [use("count", "t1")], "2.", "3."],
        stateful=True,
    ),
    Conversation(
        "text of every kind",
        ['\0 \ud83d é \U0001f600 {"$ref": 1}'],
        [[use("add", "t1", **{"a.b": {"$ref": 1, "$id": 2}, "": 2**70, "a": 1, "b": 2})], "3."],
    ),
]
