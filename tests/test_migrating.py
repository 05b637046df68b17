"""What users of versions 0.5 to 0.9 read in the table of differences, and what stays the same."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo.collection import Collection
from strands.types.session import Session, SessionMessage, SessionType

from mongodb_session_manager import (
    AgentNotFoundError,
    ConfigurationError,
    InvalidArgumentError,
    MessageNotFoundError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionExistsError,
    SessionNotFoundError,
    create_metadata_sqs_hook,
)
from support import agent

Stored = Collection[dict[str, Any]]
Call = Callable[[MongoDBSessionManager, MongoDBSessionRepository], Any]

MESSAGE = SessionMessage({"role": "user", "content": []}, 99)

SAME: dict[str, tuple[Call, Any]] = {
    "an unknown key is deleted": (lambda m, r: m.delete_metadata(["never there"]), None),
    "nothing is updated": (lambda m, r: m.update_metadata({}), None),
    "an agent that is not there has no configuration": (lambda m, r: m.get_agent_config("nobody"), None),
    "nothing of a configuration is set": (lambda m, r: m.update_agent_config("ag"), None),
    "a message that is not there": (lambda m, r: r.read_message("s", "ag", 99), None),
    "a session that is not there": (lambda m, r: r.read_session("none"), None),
    "messages are counted": (lambda m, r: m.get_message_count("ag"), 2),
    "the name of the application": (lambda m, r: r.get_application_name("s"), None),
    "a page of messages": (lambda m, r: [entry.message_id for entry in r.list_messages("s", "ag", 1, 1)], [1]),
}

DIFFERENT: dict[str, tuple[Call, type[Exception]]] = {
    "no session to update": (lambda m, r: r.update_metadata("none", {"a": 1}), SessionNotFoundError),
    "no session to delete from": (lambda m, r: r.delete_metadata("none", ["a"]), SessionNotFoundError),
    "no session for feedback": (lambda m, r: r.add_feedback("none", {}), SessionNotFoundError),
    "no session with feedback": (lambda m, r: r.get_feedbacks("none"), SessionNotFoundError),
    "no session with an application": (lambda m, r: r.get_application_name("none"), SessionNotFoundError),
    "no session with agents": (lambda m, r: r.list_agents("none"), SessionNotFoundError),
    "no session with a configuration": (lambda m, r: r.get_agent_config("none", "ag"), SessionNotFoundError),
    "no agent to count": (lambda m, r: m.get_message_count("nobody"), AgentNotFoundError),
    "no agent to list": (lambda m, r: r.list_messages("s", "nobody"), AgentNotFoundError),
    "no agent to configure": (lambda m, r: m.update_agent_config("nobody", model="x"), AgentNotFoundError),
    "no agent for a prompt": (lambda m, r: m.set_prompt_metadata("nobody", {"v": 1}), AgentNotFoundError),
    "no message to change": (lambda m, r: r.update_message("s", "ag", MESSAGE), MessageNotFoundError),
    "a session that exists": (lambda m, r: r.create_session(Session("s", SessionType.AGENT)), SessionExistsError),
    "a key with a dollar": (lambda m, r: m.update_metadata({"$x": 1}), InvalidArgumentError),
    "keys by their old name": (lambda m, r: m.delete_metadata(metadata_keys=["a"]), TypeError),
    "a password": (lambda m, r: m.get_session_viewer_password(), AttributeError),  # type: ignore[attr-defined]
    "a hook that cannot be": (lambda m, r: create_metadata_sqs_hook(""), ConfigurationError),
}


@pytest.fixture
def manager(factory: MongoDBSessionManagerFactory) -> MongoDBSessionManager:
    manager = factory.create_session_manager("s", metadata_fields=["customer"])
    agent(manager, "Hello.", agent_id="ag")("Hi.")
    return manager


def test_what_is_the_same(manager: MongoDBSessionManager, repository: MongoDBSessionRepository) -> None:
    assert {name: call(manager, repository) for name, (call, _) in SAME.items()} == {
        name: result for name, (_, result) in SAME.items()
    }


def error_of(call: Call, *args: Any) -> type[Exception] | None:
    try:
        call(*args)
    except Exception as error:
        return type(error)
    return None


def test_what_is_an_error_here(
    manager: MongoDBSessionManager, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    before = stored.find_one({"_id": "s"})
    assert {name: error_of(call, manager, repository) for name, (call, _) in DIFFERENT.items()} == {
        name: error for name, (_, error) in DIFFERENT.items()
    }
    assert stored.find_one({"_id": "s"}) == before


def test_a_new_session_has_neither_a_password_nor_empty_fields(manager: MongoDBSessionManager, stored: Stored) -> None:
    document = stored.find_one({"_id": "s"})
    assert "session_viewer_password" not in document
    assert (document["metadata"], document["session_type"]) == ({}, "AGENT")


def test_dates_are_aware_and_those_of_strands_are_text(
    manager: MongoDBSessionManager, repository: MongoDBSessionRepository
) -> None:
    manager.update_metadata({"when": datetime(2026, 1, 2)})
    assert manager.get_metadata() == {"metadata": {"when": datetime(2026, 1, 2, tzinfo=UTC)}}
    session = repository.read_session("s")
    assert session is not None
    assert isinstance(session.created_at, str)


def test_what_was_set_by_hand_stays(manager: MongoDBSessionManager, factory: MongoDBSessionManagerFactory) -> None:
    manager.update_agent_config("ag", model="mine")
    manager.set_prompt_metadata("ag", {"version": 1})
    resumed = factory.create_session_manager("s")
    live = agent(resumed, "Bye.", agent_id="ag")
    live.state.set("changed", True)
    live("Bye.")
    resumed.sync_agent(live)
    config = resumed.get_agent_config("ag")
    assert config is not None
    assert (config["model"], config["prompt_metadata"]) == ("mine", {"version": 1})


def test_metadata_moves_updated_at(manager: MongoDBSessionManager, stored: Stored) -> None:
    before = stored.find_one({"_id": "s"})["updated_at"]
    manager.update_metadata({"a": 1})
    assert stored.find_one({"_id": "s"})["updated_at"] > before


def test_a_feedback_hook_gets_the_feedback_alone(factory: MongoDBSessionManagerFactory) -> None:
    seen: list[Any] = []

    def hook(original_func: Any, action: str, session_id: str, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return original_func(kwargs["feedback"])

    factory.create_session_manager("h", feedbackHook=hook).add_feedback({"rating": "up"})
    assert seen == [{"feedback": {"rating": "up"}}]
