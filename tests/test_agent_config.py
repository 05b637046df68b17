"""The configuration of agents: seen as they run, kept as users set it, and how much they have said."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pymongo
import pytest
from pymongo import monitoring
from pymongo.collection import Collection
from strands import Agent

from fix_archive import documents_of, emptied, store_again
from mongodb_session_manager import (
    AgentNotFoundError,
    AsyncMongoDBSessionRepository,
    InvalidArgumentError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionNotFoundError,
)
from mongodb_session_manager.demo import ScriptedModel
from support import CommandLog, agent, alternating

Driver = pymongo.MongoClient[dict[str, Any]]
Stored = Collection[dict[str, Any]]


class Replies(monitoring.CommandListener):
    """What the server answered, as text."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None: ...

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self.texts.append(repr(event.reply))

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


class Blocking:
    """An object whose coroutine methods are called like ordinary ones."""

    def __init__(self, target: Any, runner: asyncio.Runner, *first: Any) -> None:
        self.target, self._runner, self._first = target, runner, first

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = partial(getattr(self.target, name), *self._first)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self._runner.run(result) if inspect.iscoroutine(result) else result

        return call


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def shared_replies() -> Replies:
    return Replies()


@pytest.fixture(scope="module")
def listened(
    server: str,
    shared_database: str,
    shared_factory: Callable[[], Any],
    shared_replies: Replies,
    runner: asyncio.Runner,
) -> Iterator[dict[str, Any]]:
    """What gives access to the session, by kind; the commands and replies of each are logged."""
    options: dict[str, Any] = {"event_listeners": [shared_factory()[1], shared_replies]}
    with (
        MongoDBSessionManagerFactory(server, shared_database, **options) as factory,
        MongoDBSessionRepository(server, shared_database, **options) as repository,
    ):
        async_repository = AsyncMongoDBSessionRepository(server, shared_database, **options)
        yield {"manager": factory, "repository": repository, "async repository": async_repository}
        runner.run(async_repository.close())


@pytest.fixture(scope="module")
def prepared(shared_factory: Callable[[], Any], shared_database: str, driver: Driver) -> dict[str, list[Any]]:
    """The documents of the session "s", in which "agent" has had two turns."""
    stored = emptied(driver[shared_database]["agent_sessions"])
    with shared_factory()[0].create_session_manager("s") as manager:
        live = agent(manager, "one", "two", system_prompt="Be brief.")
        live("Tell me of Oslo.")
        live("And of Rome.")
    return documents_of(stored)


@pytest.fixture
def replies(session: Blocking, shared_replies: Replies) -> Replies:
    return shared_replies


@pytest.fixture(params=alternating("manager", "async manager", "async repository", "repository"))
def session(
    request: pytest.FixtureRequest,
    prepared: dict[str, list[Any]],
    listened: dict[str, Any],
    factory: MongoDBSessionManagerFactory,
    stored: Stored,
    commands: CommandLog,
    shared_replies: Replies,
    runner: asyncio.Runner,
) -> Blocking:
    """The session "s", in which "agent" has had two turns, through each class that gives access to it."""
    store_again(stored, prepared)
    if request.param == "manager":
        session = Blocking(listened["manager"].create_session_manager("s"), runner)
    elif request.param == "async manager":
        session = Blocking(runner.run(listened["manager"].create_session_manager_async("s")), runner)
    else:
        session = Blocking(listened[request.param], runner, "s")
    session.get_usage()  # connects
    commands.clear()
    shared_replies.texts.clear()
    return session


CONFIG = {"agent_id": "agent", "model": "scripted", "system_prompt": "Be brief.", "prompt_metadata": None}


def test_what_an_agent_runs_with_is_stored(session: Blocking) -> None:
    assert session.get_agent_config("agent") == CONFIG
    assert session.list_agents() == [CONFIG]
    assert session.get_agent_config("unknown") is None


def test_update_sets_what_is_given_and_keeps_the_rest(session: Blocking) -> None:
    session.update_agent_config("agent", model="better")
    assert session.get_agent_config("agent") == {**CONFIG, "model": "better"}
    session.update_agent_config("agent", system_prompt="", prompt_metadata={"version": 3})
    expected = {"agent_id": "agent", "model": "better", "system_prompt": "", "prompt_metadata": {"version": 3}}
    assert session.get_agent_config("agent") == expected
    session.update_agent_config("agent")
    assert session.list_agents() == [expected]


def test_prompt_metadata_replaces_what_was_set(session: Blocking, stored: Stored) -> None:
    set_prompt_metadata = (
        session.set_prompt_metadata
        if hasattr(type(session.target), "set_prompt_metadata")
        else lambda agent_id, given: session.update_agent_config(agent_id, prompt_metadata=given)
    )
    set_prompt_metadata("agent", {"version": 1, "author": "Ada"})
    when = datetime(2026, 1, 2, tzinfo=UTC)
    given = {"$set": {"a.b": 1}, "when": when, 7: (2**70, b"x")}
    set_prompt_metadata("agent", given)
    assert session.get_agent_config("agent") == {**CONFIG, "prompt_metadata": given}
    set_prompt_metadata("agent", {"when": when})
    path = "agents.agent.agent_data.prompt_metadata.when"
    assert stored.count_documents({path: {"$type": "date"}}) == 1
    set_prompt_metadata("agent", {})
    assert session.get_agent_config("agent") == {**CONFIG, "prompt_metadata": {}}


def test_setting_changes_only_the_configuration(session: Blocking, stored: Stored) -> None:
    before = stored.find_one({"_id": "s"})
    session.update_agent_config("agent", model="better", system_prompt="Be kind.", prompt_metadata={"a": 1})
    after = stored.find_one({"_id": "s"})
    # Each client reads the clock of the server for itself, to within a round trip.
    assert after.pop("updated_at") >= before.pop("updated_at") - timedelta(seconds=1)
    for document in (before, after):
        for name in ("model", "system_prompt", "prompt_metadata"):
            document["agents"]["agent"]["agent_data"].pop(name, None)
        document["agents"]["agent"].pop("config_set", None)
    assert after == before


def test_each_call_is_one_command(session: Blocking, commands: CommandLog) -> None:
    session.get_agent_config("agent")
    session.list_agents()
    session.get_message_count("agent")
    session.get_usage()
    session.list_messages("agent")
    session.update_agent_config("agent", model="better", prompt_metadata={"a": 1})
    assert commands.names == ["find", "find", "find", "find", "find", "update"]


def test_messages_are_listed_with_their_ids(session: Blocking) -> None:
    listed = session.list_messages("agent")
    assert [message.message_id for message in listed] == [0, 1, 2, 3]
    assert [message.message["role"] for message in listed] == ["user", "assistant", "user", "assistant"]
    assert session.list_messages("agent", limit=2, offset=1) == listed[1:3]
    assert all(message.created_at.endswith("+00:00") for message in listed)


def test_the_server_counts(session: Blocking, replies: Replies) -> None:
    assert session.get_message_count("agent") == 4
    assert len(replies.texts) == 1
    assert "Oslo" not in replies.texts[0]
    assert "content" not in replies.texts[0]


def test_no_answer_about_agents_holds_messages(session: Blocking, replies: Replies) -> None:
    session.get_agent_config("agent")
    session.list_agents()
    session.get_usage()
    assert len(replies.texts) == 3
    assert all("Oslo" not in text and "'messages'" not in text for text in replies.texts)


def test_an_agent_that_is_not_there(session: Blocking, stored: Stored) -> None:
    before = stored.find_one({"_id": "s"})
    for call in (
        lambda: session.update_agent_config("unknown", model="better"),
        lambda: session.update_agent_config("unknown"),
        lambda: session.get_message_count("unknown"),
        lambda: session.list_messages("unknown"),
    ):
        with pytest.raises(AgentNotFoundError, match="session 's' has no agent 'unknown'"):
            call()
    assert stored.find_one({"_id": "s"}) == before


def test_a_session_that_is_not_there(session: Blocking, stored: Stored) -> None:
    stored.delete_one({"_id": "s"})
    for call in (
        lambda: session.get_agent_config("agent"),
        lambda: session.update_agent_config("agent", model="better"),
        session.list_agents,
        session.get_usage,
        lambda: session.get_message_count("agent"),
        lambda: session.list_messages("agent"),
    ):
        with pytest.raises(SessionNotFoundError, match="session 's' does not exist"):
            call()
    assert stored.count_documents({"_id": "s"}) == 0


def test_bad_arguments_are_refused(session: Blocking, commands: CommandLog) -> None:
    for arguments, message in (
        ({"model": 5}, "model must be a str, not int"),
        ({"system_prompt": ["Be kind."]}, "system_prompt must be a str, not list"),
        ({"prompt_metadata": "version 3"}, "prompt_metadata must be a dict, not str"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            session.update_agent_config("agent", **arguments)
    for agent_id, message in (
        ({"$ne": None}, "agent_id must be a str, not dict"),
        ("", "agent_id must not be empty"),
        ("a\0", "agent_id must not contain a NUL character"),
        (None, "agent_id must be a str, not NoneType"),
    ):
        for call in (
            session.get_agent_config,
            session.get_message_count,
            partial(session.update_agent_config, model="better"),
        ):
            with pytest.raises(InvalidArgumentError, match=message):
                call(agent_id)
    if hasattr(type(session.target), "set_prompt_metadata"):
        for given in ("version 3", None, [1]):
            with pytest.raises(InvalidArgumentError, match="prompt_metadata must be a dict"):
                session.set_prompt_metadata("agent", given)
    assert commands.names == []


def test_prompt_metadata_without_an_end_is_refused(session: Blocking, commands: CommandLog) -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with pytest.raises(ValueError, match="cannot store"):
        session.update_agent_config("agent", prompt_metadata=endless)
    assert commands.names == []


# What users set stays.


class Managers:
    """Opens managers of the session "s" of one kind."""

    def __init__(self, factory: MongoDBSessionManagerFactory, runner: asyncio.Runner, is_async: bool) -> None:
        self._factory, self._runner, self._is_async = factory, runner, is_async

    def open(self, **options: Any) -> Blocking:
        if self._is_async:
            manager: Any = self._runner.run(self._factory.create_session_manager_async("s", **options))
        else:
            manager = self._factory.create_session_manager("s", **options)
        return Blocking(manager, self._runner)


@pytest.fixture(params=alternating(False, True), ids=["manager", "async manager"])
def managers(request: pytest.FixtureRequest, factory: MongoDBSessionManagerFactory, runner: asyncio.Runner) -> Managers:
    return Managers(factory, runner, request.param)


def agent_of(session: Blocking, prompt: str = "Be brief.", model: str = "scripted") -> Agent:
    live = agent(session.target, system_prompt=prompt)
    live.model = ScriptedModel(model_id=model)
    return live


SET = {"agent_id": "agent", "model": "set", "system_prompt": "Set.", "prompt_metadata": {"version": 1}}


def set_all(session: Blocking) -> None:
    session.update_agent_config("agent", model="set", system_prompt="Set.")
    session.set_prompt_metadata("agent", {"version": 1})


@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
def test_what_users_set_survives_everything_the_agent_does(managers: Managers, save_on: str) -> None:
    session = managers.open(save_on=save_on)
    live = agent_of(session)
    live("one")
    set_all(session)
    live.system_prompt = "Be long."
    session.target.sync_agent(live)
    session.flush()
    assert session.get_agent_config("agent") == SET
    live.model = ScriptedModel(model_id="other")
    live.state.set("mood", "good")
    live("two")
    session.flush()
    assert session.get_agent_config("agent") == SET
    session.close()

    resumed = managers.open(save_on=save_on)
    assert resumed.get_agent_config("agent") == SET
    again = agent_of(resumed, "Be kind.", "third")
    again("three")
    resumed.target.sync_agent(again)
    resumed.flush()
    assert resumed.get_agent_config("agent") == SET
    assert resumed.get_message_count("agent") == 6
    assert again.state.get("mood") == "good"


@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
def test_what_users_set_elsewhere_survives_a_manager_opened_before(managers: Managers, save_on: str) -> None:
    session = managers.open(save_on=save_on)
    live = agent_of(session)
    live("one")
    set_all(managers.open())
    live.system_prompt = "Be long."
    live.model = ScriptedModel(["answer"], model_id="other")
    session.target.sync_agent(live)
    session.flush()
    assert session.get_agent_config("agent") == SET
    live("two")
    assert session.get_agent_config("agent") == SET
    assert session.get_message_count("agent") == 4


def test_what_is_not_set_follows_the_agent(managers: Managers) -> None:
    session = managers.open()
    live = agent_of(session)
    live("one")
    managers.open().update_agent_config("agent", model="set")
    live.system_prompt = "Be long."
    live.model = ScriptedModel(model_id="other")
    live("two")
    assert session.get_agent_config("agent") == {
        "agent_id": "agent",
        "model": "set",
        "system_prompt": "Be long.",
        "prompt_metadata": None,
    }


def test_what_is_set_is_only_told_and_does_not_change_the_agent(managers: Managers) -> None:
    session = managers.open()
    live = agent_of(session)
    live("one")
    set_all(session)
    again = agent_of(managers.open(), "Be kind.")
    assert (live.system_prompt, again.system_prompt) == ("Be brief.", "Be kind.")


def test_setting_neither_conflicts_with_a_turn_nor_adds_a_command_to_it(
    managers: Managers, commands: CommandLog, stored: Stored
) -> None:
    session, aside = managers.open(), managers.open()
    live = agent_of(session)
    live("one")
    commands.clear()
    aside.set_prompt_metadata("agent", {"version": 1})
    live("two")
    session.set_prompt_metadata("agent", {"version": 2})
    live.system_prompt = "Be long."
    live("three")
    assert commands.names == ["update", "update", "update", "update", "update", "update"]
    assert [message["message_id"] for message in stored.find_one({"_id": "s"})["agents"]["agent"]["messages"]] == [
        *range(6)
    ]


def test_another_agent_keeps_its_own(managers: Managers) -> None:
    session = managers.open()
    for agent_id in ("a.b", "$x", "50%", "日本", "0"):
        agent(session.target, agent_id=agent_id, system_prompt=f"I am {agent_id}.")("Hello")
    session.update_agent_config("a.b", system_prompt="Set.")
    session.set_prompt_metadata("$x", {"version": 1})
    assert session.list_agents() == [
        {"agent_id": "a.b", "model": "scripted", "system_prompt": "Set.", "prompt_metadata": None},
        {"agent_id": "$x", "model": "scripted", "system_prompt": "I am $x.", "prompt_metadata": {"version": 1}},
        {"agent_id": "50%", "model": "scripted", "system_prompt": "I am 50%.", "prompt_metadata": None},
        {"agent_id": "日本", "model": "scripted", "system_prompt": "I am 日本.", "prompt_metadata": None},
        {"agent_id": "0", "model": "scripted", "system_prompt": "I am 0.", "prompt_metadata": None},
    ]
    assert [session.get_message_count(agent_id) for agent_id in ("a.b", "$x", "50%", "日本", "0")] == [2] * 5
    assert session.get_agent_config("50%")["system_prompt"] == "I am 50%."


# What is only recorded so far.


def test_reads_see_what_is_only_recorded(managers: Managers, commands: CommandLog) -> None:
    session = managers.open()
    commands.clear()
    agent_of(session)
    assert commands.names == []
    assert session.get_agent_config("agent") == CONFIG
    assert session.list_agents() == [CONFIG]
    assert session.get_message_count("agent") == 0
    assert session.get_usage()["agents"].keys() == {"agent"}
    assert commands.names == ["update", "find", "find", "find", "find"]


def test_an_agent_only_recorded_can_be_configured(managers: Managers) -> None:
    session = managers.open(save_on="invocation")
    live = agent_of(session)
    set_all(session)
    live("one")
    assert session.get_agent_config("agent") == SET


def test_messages_only_recorded_are_counted(managers: Managers) -> None:
    session = managers.open()
    messages = [{"role": "user", "content": [{"text": "a"}]}, {"role": "assistant", "content": [{"text": "b"}]}]
    agent(session.target, messages=messages)
    assert session.get_message_count("agent") == 2


def test_the_system_prompt_as_blocks_is_stored_as_text(managers: Managers) -> None:
    session = managers.open()
    agent(session.target, system_prompt=[{"text": "Be brief."}, {"cachePoint": {"type": "default"}}])
    assert session.get_agent_config("agent") == CONFIG


def test_a_document_of_old(managers: Managers, stored: Stored) -> None:
    managers.open().close()
    data = {"agent_id": "agent", "model": "old", "system_prompt": "Old.", "prompt_metadata": {"version": 0}}
    stored.update_one({"_id": "s"}, {"$set": {"agents.agent": {"agent_data": data, "messages": []}, "agents.bare": {}}})
    session = managers.open()
    assert session.get_agent_config("agent") == data
    bare = {"agent_id": "bare", "model": None, "system_prompt": None, "prompt_metadata": None}
    assert session.list_agents() == [data, bare]
    assert [session.get_message_count(agent_id) for agent_id in ("agent", "bare")] == [0, 0]
