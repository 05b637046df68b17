"""What this version stores is restored by the original, and what 1.0.0 has stored elsewhere is read and moved."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any

import pymongo
import pytest
from strands import tool
from strands.types.session import SessionAgent

from fix_archive import documents_of, emptied, store_again
from fix_rollback import AGENT_FIELDS, Stored, as_1_0_0, picture, restored_by_the_original
from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository
from support import CommandLog, agent, alternating, texts


@pytest.fixture(scope="module")
def repository_options() -> dict[str, Any]:
    return {"max_inline_attachment_bytes": 100}


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


CALL_ADD = {"tool": "add", "input": {"a": 1, "b": 2}}
GONE = {"role": "assistant", "content": [{"text": "[gone]"}]}


def use_sync(factory: MongoDBSessionManagerFactory, save_on: str) -> None:
    with factory.create_session_manager("s", save_on=save_on) as manager:
        live = agent(manager, CALL_ADD, "three", "secret", tools=[add], system_prompt="Be brief.")
        live.state.set("k", {"a.b": 1})
        live("1 + 2?")
        manager.update_agent_config("agent", model="better", prompt_metadata={"version": 3})
        live("more")
        manager.redact_latest_message(GONE, live, stop_reason="guardrail_intervened")
        manager.add_feedback({"rating": "up"})


async def use_async(factory: MongoDBSessionManagerFactory, save_on: str) -> None:
    async with await factory.create_session_manager_async("s", save_on=save_on) as manager:
        live = agent(manager, CALL_ADD, "three", "secret", tools=[add], system_prompt="Be brief.")
        live.state.set("k", {"a.b": 1})
        await live.invoke_async("1 + 2?")
        await manager.update_agent_config("agent", model="better", prompt_metadata={"version": 3})
        await live.invoke_async("more")
        manager.redact_latest_message(GONE, live, stop_reason="guardrail_intervened")
        await manager.add_feedback({"rating": "up"})


@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
@pytest.mark.parametrize("is_async", alternating(False, True), ids=["manager", "async manager"])
def test_the_original_restores_a_session_of_this_version(
    factory: MongoDBSessionManagerFactory, stored: Stored, is_async: bool, save_on: str
) -> None:
    if is_async:
        asyncio.run(use_async(factory, save_on))
    else:
        use_sync(factory, save_on)
    found, messages = restored_by_the_original(stored)
    assert found.state == {"k": {"a.b": 1}}
    assert [message.message_id for message in messages] == list(range(6))
    shown = [message.to_message() for message in messages]
    assert texts(shown) == ["1 + 2?", "", "", "three", "more", "[gone]"]
    assert shown[1]["content"][0]["toolUse"]["name"] == "add"
    data = stored.find_one({"_id": "s"})["agents"]["agent"]["agent_data"]
    assert (data["model"], data["prompt_metadata"]) == ("better", {"version": 3})


def test_the_original_restores_a_message_whose_attachment_was_redacted(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    with factory.create_session_manager("s", max_inline_attachment_bytes=100) as manager:
        live = agent(manager, "a cat", "a dog")
        live(picture())
        live("and now?")
    for message_id in (0, 3):  # one with an attachment, and one of a session that has some
        message = repository.read_message("s", "agent", message_id)
        assert message is not None
        message.redact_message = GONE
        repository.update_message("s", "agent", message)
    _, messages = restored_by_the_original(stored)
    assert texts([message.to_message() for message in messages]) == ["[gone]", "a cat", "and now?", "[gone]"]


@pytest.mark.parametrize("save_on", ["message", "invocation"])
def test_the_original_restores_a_message_that_a_manager_redacted_with_its_attachment(
    factory: MongoDBSessionManagerFactory, stored: Stored, save_on: str
) -> None:
    with factory.create_session_manager("s", max_inline_attachment_bytes=100, save_on=save_on) as manager:
        live = agent(manager, "a cat")
        manager.append_message({"role": "user", "content": picture()}, live)
        manager.redact_latest_message(GONE, live)
    _, messages = restored_by_the_original(stored)
    assert texts([message.to_message() for message in messages]) == ["[gone]"]


def test_the_original_restores_what_was_imported_and_forked(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    use_sync(factory, "message")
    lines = "".join(repository.export_session("s"))
    repository.delete_session("s")
    repository.import_session(io.StringIO(lines))
    found, messages = restored_by_the_original(stored)
    assert len(messages) == 6
    repository.fork_session("s", "fork", 3)
    repository.delete_session("s")
    repository.fork_session("fork", "s")
    found, messages = restored_by_the_original(stored)
    assert found.state == {"k": {"a.b": 1}}
    assert len(messages) == 4


# Documents of 1.0.0, which kept some fields in other places.


@pytest.fixture(scope="module")
def two_turns(
    shared_factory: Callable[[], tuple[MongoDBSessionManagerFactory, CommandLog]],
    shared_database: str,
    driver: pymongo.MongoClient[dict[str, Any]],
) -> dict[str, list[Any]]:
    """The documents of a session of two turns."""
    stored = emptied(driver[shared_database]["agent_sessions"])
    with shared_factory()[0].create_session_manager("s") as manager:
        live = agent(manager, "first", "second")
        live("one")
        live("two")
        manager.update_agent_config("agent", model="better", system_prompt="Be kind.")
    as_1_0_0(stored)
    return documents_of(stored)


@pytest.fixture
def earlier(two_turns: dict[str, list[Any]], stored: Stored) -> None:
    store_again(stored, two_turns)


@pytest.mark.usefixtures("earlier")
def test_what_a_user_set_in_1_0_0_stays_and_moves(
    factory: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog
) -> None:
    with factory.create_session_manager("s") as manager:
        agent(manager, "third", system_prompt="Be rude.")("three")
        config = manager.get_agent_config("agent")
    assert config is not None
    assert (config["model"], config["system_prompt"]) == ("better", "Be kind.")
    found = stored.find_one({"_id": "s"})["agents"]["agent"]
    assert "config_set" not in found["agent_data"]
    assert sorted(found["config_set"]) == ["model", "system_prompt"]
    SessionAgent(**{name: value for name, value in found["agent_data"].items() if name not in AGENT_FIELDS})
    commands.clear()
    with factory.create_session_manager("s") as manager:
        agent(manager, "fourth", system_prompt="Be rude.")("four")
        assert commands.names == ["findAndModify", "update", "update"]
        assert manager.get_agent_config("agent") == config


@pytest.mark.parametrize("set_now", ["model", "system_prompt"])
@pytest.mark.usefixtures("earlier")
def test_what_is_set_before_the_session_is_opened_is_added(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored, set_now: str
) -> None:
    stored.update_one({"_id": "s"}, {"$set": {"agents.agent.agent_data.config_set": ["system_prompt"]}})
    repository.update_agent_config("s", "agent", **{set_now: "mine"})
    with factory.create_session_manager("s") as manager:
        agent(manager, "third", system_prompt="Be rude.")("three")
    found = stored.find_one({"_id": "s"})["agents"]["agent"]
    assert sorted(found["config_set"]) == sorted({"system_prompt", set_now})
    assert found["agent_data"]["system_prompt"] == ("mine" if set_now == "system_prompt" else "Be kind.")
    assert found["agent_data"][set_now] == "mine"


@pytest.mark.usefixtures("earlier")
def test_a_user_sets_it_through_1_0_0_while_a_manager_is_open(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    stored.update_one({"_id": "s"}, {"$unset": {"agents.agent.agent_data.config_set": ""}})
    with factory.create_session_manager("s") as manager:
        live = agent(manager, "third", system_prompt="Be rude.")
        path = "agents.agent.agent_data"
        theirs = {"$set": {f"{path}.system_prompt": "Be old."}, "$addToSet": {f"{path}.config_set": "system_prompt"}}
        stored.update_one({"_id": "s"}, theirs)
        live("three")
    assert stored.find_one({"_id": "s"})["agents"]["agent"]["agent_data"]["system_prompt"] == "Be old."


@pytest.mark.usefixtures("earlier")
def test_the_usage_of_messages_of_1_0_0_is_subtracted_from_a_fork(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    with factory.create_session_manager("s") as manager:
        agent(manager, "third")("three")
        total = manager.get_usage()["total"]
    found = stored.find_one({"_id": "s"})["agents"]["agent"]["messages"]
    own = [message.get("usage") or message["event_loop_metrics"]["message_usage"] for message in found[1::2]]
    assert "usage" in found[1]
    assert "usage" not in found[5]
    for last, kept in ((1, own[:1]), (3, own[:2]), (5, own)):
        repository.fork_session("s", f"fork{last}", last)
        usage = repository.get_usage(f"fork{last}")["total"]
        assert usage["totalTokens"] == sum(each["totalTokens"] for each in kept)
        assert usage["invocations"] == len(kept)
    assert repository.get_usage("s")["total"] == total


@pytest.mark.usefixtures("earlier")
def test_a_session_of_1_0_0_is_exported_and_imported(repository: MongoDBSessionRepository, stored: Stored) -> None:
    repository.import_session(io.StringIO("".join(repository.export_session("s"))), "copy")
    assert repository.get_usage("copy") == repository.get_usage("s")
    assert repository.get_agent_config("copy", "agent") == repository.get_agent_config("s", "agent")
    found = stored.find_one({"_id": "copy"})["agents"]["agent"]
    assert "config_set" not in found["agent_data"]
    assert sorted(found["config_set"]) == ["model", "system_prompt"]
