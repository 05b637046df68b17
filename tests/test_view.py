"""What was live is what is restored, whoever edits `agent.messages`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from strands import Agent
from strands.agent.conversation_manager import (
    NullConversationManager,
    SlidingWindowConversationManager,
)
from strands.agent.conversation_manager.compression.pin_message import pin_message

from mongodb_session_manager import MongoDBSessionManagerFactory
from support import agent, texts

Documents = Any


def restored(factory: MongoDBSessionManagerFactory, session_id: str = "s", **options: Any) -> Agent:
    return agent(factory.create_session_manager(session_id), **options)


def turns(factory: MongoDBSessionManagerFactory, count: int = 3, **options: Any) -> tuple[Any, Agent]:
    """Return a manager and its agent after some turns: messages q0, a0, q1, a1, ..."""
    manager = factory.create_session_manager("s")
    live = agent(manager, *(f"a{n}" for n in range(count + 10)), **options)
    for n in range(count):
        live(f"q{n}")
    return manager, live


def view_of(stored: Documents) -> Any:
    return stored.find_one("s")["agents"]["agent"].get("view")


def test_nothing_is_stored_while_nothing_was_edited(factory: MongoDBSessionManagerFactory, stored: Documents) -> None:
    manager, live = turns(factory)
    manager.close()
    assert view_of(stored) is None
    assert restored(factory).messages == live.messages


def clear(messages: list[Any]) -> None:
    messages.clear()


def say(messages: list[Any]) -> None:
    messages.append({"role": "user", "content": [{"text": "never said"}]})


def drop_last_turn(messages: list[Any]) -> None:
    del messages[-2:]


def drop_first_turn(messages: list[Any]) -> None:
    del messages[:2]


def edit_text(messages: list[Any]) -> None:
    messages[1]["content"][0]["text"] = "edited"


def pin(messages: list[Any]) -> None:
    pin_message(messages, 0)


def reverse(messages: list[Any]) -> None:
    messages.reverse()


def repeat(messages: list[Any]) -> None:
    messages.extend(copy.deepcopy(messages[:2]))


def merge(messages: list[Any]) -> None:
    messages[2:4] = [{**messages[0], "content": [*messages[0]["content"], *messages[3]["content"]]}]


EDITS = [clear, say, drop_last_turn, drop_first_turn, edit_text, pin, reverse, repeat, merge]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("manager_of", [NullConversationManager, SlidingWindowConversationManager])
def test_an_edit_is_restored(
    factory: MongoDBSessionManagerFactory, edit: Callable[[list[Any]], None], manager_of: type
) -> None:
    manager, live = turns(factory, conversation_manager=manager_of())
    edit(live.messages)
    manager.close()
    again = restored(factory, conversation_manager=manager_of())
    assert again.messages == live.messages
    again = agent(factory.create_session_manager("s"), "later", conversation_manager=manager_of())
    again("and now?")
    assert restored(factory, conversation_manager=manager_of()).messages == again.messages


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_between_turns_is_restored(
    factory: MongoDBSessionManagerFactory, stored: Documents, edit: Callable[[list[Any]], None]
) -> None:
    _, live = turns(factory)
    edit(live.messages)
    live("next")
    live("and one more")
    assert restored(factory).messages == live.messages
    assert texts(stored.find_one("s")["agents"]["agent"]["messages"])[:6] == ["q0", "a0", "q1", "a1", "q2", "a2"]
