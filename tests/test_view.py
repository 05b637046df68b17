"""What was live is what is restored, whoever edits `agent.messages`."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strands import Agent
from strands.agent.conversation_manager import (
    NullConversationManager,
    SlidingWindowConversationManager,
)
from strands.agent.conversation_manager.compression.pin_message import pin_message
from strands.hooks import BeforeModelCallEvent

from fix_archive import told
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


# Random edits.

POSITIONS = st.integers(0, 40)
EDITS_OF_ONE = {
    "delete": lambda messages, at: messages.pop(at),
    "move": lambda messages, at: messages.append(messages.pop(at)),
    "copy": lambda messages, at: messages.insert(0, copy.deepcopy(messages[at])),
    "text": lambda messages, at: messages[at]["content"].append({"text": f"more {at}"}),
    "pin": lambda messages, at: pin_message(messages, at),
    "insert": lambda messages, at: messages.insert(at, {"role": "user", "content": [{"text": f"inserted {at}"}]}),
    "first": lambda messages, at: messages.__delitem__(slice(0, at)),
    "last": lambda messages, at: messages.__delitem__(slice(at, None)),
    "clear": lambda messages, at: messages.clear(),
}
edits = st.tuples(st.sampled_from(sorted(EDITS_OF_ONE)), POSITIONS)
steps = st.one_of(
    st.just("turn"),
    st.just("turn"),
    st.just("restart"),
    edits,
    st.tuples(st.just("within"), st.lists(edits, max_size=2)),
)


def edit_at(messages: list[Any], name: str, position: int) -> None:
    if messages:
        EDITS_OF_ONE[name](messages, position % len(messages))


class Within:
    """Edits the messages of an agent before the model is called."""

    def __init__(self) -> None:
        self.edits: list[Any] = []

    def register_hooks(self, registry: Any, **kwargs: Any) -> None:
        registry.add_callback(BeforeModelCallEvent, self._edit)

    def _edit(self, event: BeforeModelCallEvent) -> None:
        for name, position in self.edits:
            earlier = event.agent.messages[:-1]
            edit_at(earlier, name, position)
            event.agent.messages[:-1] = earlier
        self.edits = []


@given(
    script=st.lists(steps, min_size=3, max_size=14),
    window=st.sampled_from([None, 4]),
    embedded=st.sampled_from([1, 3, 128]),
)
def test_whatever_is_edited_is_restored_and_nothing_that_was_said_is_lost(
    server: str, shared_database: str, script: list[Any], window: int | None, embedded: int
) -> None:
    session_id = uuid.uuid4().hex
    with MongoDBSessionManagerFactory(server, shared_database, max_embedded_messages=embedded) as factory:
        said: list[Any] = []
        within = Within()

        def start() -> tuple[Any, Agent]:
            size = {} if window is None else {"window_size": window}
            keeper = NullConversationManager() if window is None else SlidingWindowConversationManager(**size)
            manager = factory.create_session_manager(session_id)
            return manager, agent(manager, *"abcdefghijklmno", conversation_manager=keeper, hooks=[within])

        manager, live = start()
        for number, step in enumerate([*script, "restart"]):
            if step == "turn":
                live(f"q{number}")
                said += [f"q{number}", None]
            elif step == "restart":
                manager.close()
                left = copy.deepcopy(live.messages)
                manager, live = start()
                assert live.messages == left
            elif step[0] == "within":
                within.edits = list(step[1])
                live(f"q{number}")
                said += [f"q{number}", None]
            else:
                edit_at(live.messages, *step)
        manager.close()
        stored = told(factory._call(factory._repository.list_messages, session_id, "agent"))
        assert stored[::2] == said[::2]
        assert len(stored) == len(said)
