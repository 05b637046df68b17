"""Conversations that continue without a difference here, but not with the session managers of Strands.

Each test asserts what `FileSessionManager` loses. If such an assertion fails because nothing is lost any more, Strands
has fixed it, and the conversation belongs in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from strands import Agent, tool
from strands.agent.conversation_manager import SlidingWindowConversationManager
from strands.session import FileSessionManager

from conversations import use
from mongodb_session_manager import MongoDBSessionManagerFactory
from recording_model import RecordingModel, comparable, overflow

Managers = Callable[[], Any] | None


@tool
def tell() -> str:
    """Tell a long story."""
    return "once upon a time " * 60


def sent_afterwards(
    options: Callable[[], dict[str, Any]], before: list[str], after: list[str], replies: list[Any], managers: Managers
) -> Any:
    """Return the requests to the model after a restart; without managers, nothing is restarted."""
    model = RecordingModel(replies)

    def make() -> Agent:
        return Agent(
            model=model,
            tools=[tell],
            agent_id="agent",
            session_manager=None if managers is None else managers(),
            callback_handler=None,
            load_tools_from_directory=False,
            **options(),
        )

    agent = make()
    for prompt in before:
        agent(prompt)
    calls = len(model.calls)
    agent = agent if managers is None else make()
    for prompt in after:
        agent(prompt)
    return [comparable(call["messages"]) for call in model.calls[calls:]]


@pytest.fixture
def managers(factory: MongoDBSessionManagerFactory, tmp_path: Path) -> list[Managers]:
    return [
        None,
        lambda: factory.create_session_manager("s"),
        lambda: FileSessionManager("s", str(tmp_path)),
    ]


STORY = [[use("tell", "t1")], "A story.", overflow(), "It was long.", "Bye."]


def test_tool_results_that_the_window_has_shortened_stay_shortened(managers: list[Managers]) -> None:
    uninterrupted, ours, files = (
        sent_afterwards(lambda: {}, ["tell", "how was it?"], ["bye"], STORY, each) for each in managers
    )
    assert ours == uninterrupted
    assert "[truncated:" in str(ours)
    assert "[truncated:" not in str(files)
    assert str(files).count("once upon a time") == 60


def test_what_the_context_manager_has_cut_stays_cut(managers: list[Managers]) -> None:
    options: Callable[[], dict[str, Any]] = lambda: {"context_manager": {"strategies": []}}  # noqa: E731
    uninterrupted, ours, files = (
        sent_afterwards(options, ["tell", "how was it?"], ["bye"], STORY, each) for each in managers
    )
    assert ours == uninterrupted
    assert str(ours).count("once upon a time") < 60
    assert str(files).count("once upon a time") == 60


def test_a_window_keeps_what_it_has_pinned(managers: list[Managers]) -> None:
    """`FileSessionManager` leaves out the oldest messages, as many as the window has removed."""

    def options() -> dict[str, Any]:
        return {"conversation_manager": SlidingWindowConversationManager(4, pin_first=1)}

    before, replies = ["I am Ada", "two", "three"], ["1", "2", "3", "4"]
    uninterrupted, ours, files = (sent_afterwards(options, before, ["who am I?"], replies, each) for each in managers)
    assert ours == uninterrupted
    assert "I am Ada" in str(ours)
    assert "I am Ada" not in str(files)
