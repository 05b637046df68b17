"""A client that declares the strict Stable API, which refuses every command and operator outside of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from pymongo.collection import Collection
from pymongo.server_api import ServerApi
from strands.types.session import SessionMessage

from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository
from support import CommandLog, agent, eventually, texts

Stored = Collection[dict[str, Any]]

STRICT: dict[str, Any] = {"server_api": ServerApi("1", strict=True, deprecation_errors=True)}


@pytest.fixture
def strict(server: str, database: str, commands: CommandLog) -> Iterator[MongoDBSessionManagerFactory]:
    with MongoDBSessionManagerFactory(
        server,
        database,
        max_embedded_messages=4,
        max_inline_attachment_bytes=1000,
        event_listeners=[commands],
        **STRICT,
    ) as factory:
        yield factory


@pytest.fixture
def repository(server: str, database: str) -> Iterator[MongoDBSessionRepository]:
    with MongoDBSessionRepository(
        server, database, max_embedded_messages=4, max_inline_attachment_bytes=1000, **STRICT
    ) as repository:
        yield repository


def picture() -> list[dict[str, Any]]:
    return [{"text": "look"}, {"image": {"format": "png", "source": {"bytes": b"\x89PNG" * 1000}}}]


def gone() -> dict[str, Any]:
    return {"role": "assistant", "content": [{"text": "[gone]"}]}


def test_a_session_is_opened_written_to_and_resumed(strict: MongoDBSessionManagerFactory) -> None:
    with strict.create_session_manager("s") as manager:
        live = agent(manager, "first", "second")
        live("one")
        live(picture())
        manager.update_metadata({"a.b": 1, "c": 2})
        manager.delete_metadata(["c"])
        manager.add_feedback({"rating": "up"})
        manager.update_agent_config("agent", model="better")
    with strict.create_session_manager("s") as manager:
        resumed = agent(manager, "third")
        resumed("three")
        assert texts(resumed.messages) == ["one", "first", "look", "second", "three", "third"]
        assert resumed.messages[2]["content"] == picture()
        manager.redact_latest_message(gone(), resumed)
        assert manager.get_usage()["total"]["invocations"] == 3
        assert manager.get_metadata() == {"metadata": {"a": {"b": 1}}}
        assert manager.list_agents()[0]["model"] == "better"
        assert manager.get_message_count("agent") == 6


def test_a_long_session_is_archived_redacted_exported_forked_and_deleted(
    strict: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    for number in range(6):
        with strict.create_session_manager("s") as manager:
            agent(manager, f"a{number}")(picture() if number == 1 else f"q{number}")
    eventually(lambda: stored.find_one({"_id": "s"})["agents"]["agent"].get("archived", 0) >= 6)
    message = repository.read_message("s", "agent", 2)
    assert message is not None
    message.redact_message = gone()
    repository.update_message("s", "agent", message)  # in the archive, with an attachment
    with strict.create_session_manager("s") as manager:
        live = agent(manager, "more")
        live("and")
        manager.redact_latest_message(gone(), live)
    shown = [found.to_message() for found in repository.list_messages("s", "agent")]
    assert texts(shown)[:4] == ["q0", "a0", "[gone]", "a1"]
    assert texts(shown)[-2:] == ["and", "[gone]"]
    assert repository.import_session(io.StringIO("".join(repository.export_session("s"))), "copy") == "copy"
    repository.fork_session("s", "fork", 5)
    repository.fork_session("copy", "whole")
    assert texts([found.to_message() for found in repository.list_messages("fork", "agent")]) == texts(shown)[:6]
    assert strict.count_sessions() == 4
    assert len(strict.list_sessions().sessions) == 4
    for session in ("s", "copy", "fork", "whole"):
        repository.delete_session(session)
    assert strict.count_sessions() == 0


def test_a_session_of_old_is_numbered(strict: MongoDBSessionManagerFactory, stored: Stored) -> None:
    with strict.create_session_manager("s") as manager:
        agent(manager, "first")("one")
    newer = {"agents.agent.next_message_id": "", "agents.agent.messages.0.message_id": ""}
    stored.update_one({"_id": "s"}, {"$unset": newer, "$set": {"agents.agent.agent_data.config_set": ["model"]}})
    with strict.create_session_manager("s") as manager:
        live = agent(manager, "second")
        live("two")
    assert texts(live.messages) == ["one", "first", "two", "second"]


def test_the_repository_and_a_session_that_expires(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionManagerFactory(server, database, session_ttl=timedelta(hours=1), **STRICT) as factory:
        with factory.create_session_manager("s") as manager:
            agent(manager, "first")("one")
        with factory.create_session_manager("s") as manager:
            agent(manager, "second")("two")
    with MongoDBSessionRepository(server, database, **STRICT) as repository:
        repository.create_message("s", "agent", SessionMessage(gone(), 4))
        assert repository.session_exists("s")
        assert len(repository.list_messages("s", "agent", limit=2, offset=1)) == 2


def test_no_operator_is_newer_than_the_oldest_supported_server() -> None:
    """MongoDB 4.4 has none of these, and a newer server accepts some of them in the strict API."""
    from pathlib import Path

    import mongodb_session_manager

    newer = ("$getField", "$setField", "$unsetField", "$firstN", "$lastN", "$sortArray", "$dateTrunc", "$topN", "$maxN")
    for path in Path(mongodb_session_manager.__file__).parent.rglob("*.py"):
        code = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.lstrip().startswith("#"))
        for operator in newer:
            assert f'"{operator}"' not in code, f"{path.name} uses {operator}"
