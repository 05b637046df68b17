"""Sessions that the original (0.5 to 0.9) has stored are opened, continued and left as they are."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import pytest
from bson import ObjectId
from pymongo.collection import Collection
from strands import Agent
from strands.types.session import SessionMessage

from fix_legacy import CREATED, PNG, SECRET, conversation, old_agent, old_message, old_session
from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository
from support import CommandLog, agent, alternating, message_ids, texts


def restored_conversation() -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [{"text": "What is this?"}, {"image": {"format": "png", "source": {"bytes": PNG}}}],
        },
        {
            "role": "assistant",
            "content": [{"toolUse": {"toolUseId": "t1", "name": "look", "input": {"area.of": "$all"}}}],
        },
        {
            "role": "user",
            "content": [{"toolResult": {"toolUseId": "t1", "status": "success", "content": [{"text": "a cat"}]}}],
        },
        {"role": "assistant", "content": [{"text": "A cat."}]},
        {"role": "user", "content": [{"text": "[redacted]"}]},
        {"role": "assistant", "content": [{"text": "I cannot help with that."}]},
    ]


# Both managers, with or without a turn.

Use = Callable[..., list[Agent]]
"""(factory, reply, *agent ids, prompt=None): open the session, restore the agents, say `prompt` to each, close."""


def with_the_sync_manager(
    factory: MongoDBSessionManagerFactory, reply: str, *agent_ids: str, prompt: str | None = None
) -> list[Agent]:
    with factory.create_session_manager("s") as manager:
        agents = [restored(manager, reply, agent_id) for agent_id in agent_ids]
        for each in agents:
            if prompt is not None:
                each(prompt)
    return agents


def with_the_async_manager(
    factory: MongoDBSessionManagerFactory, reply: str, *agent_ids: str, prompt: str | None = None
) -> list[Agent]:
    async def use() -> list[Agent]:
        async with await factory.create_session_manager_async("s") as manager:
            agents = [restored(manager, reply, agent_id) for agent_id in agent_ids]
            for each in agents:
                if prompt is not None:
                    await each.invoke_async(prompt)
        return agents

    return asyncio.run(use())


def restored(manager: Any, reply: str, agent_id: str) -> Agent:
    """An agent with the model and prompt that the original has stored, so that only the conversation is new."""
    each = agent(None, reply, agent_id=agent_id, system_prompt="Be brief.")
    each.model.update_config(model_id="anthropic.claude-3-haiku")
    return Agent(
        model=each.model,
        agent_id=agent_id,
        session_manager=manager,
        system_prompt="Be brief.",
        callback_handler=None,
    )


@pytest.fixture(params=alternating(with_the_sync_manager, with_the_async_manager), ids=["sync", "async"])
def use(request: pytest.FixtureRequest) -> Use:
    return request.param


def test_an_agent_is_restored(factory: MongoDBSessionManagerFactory, stored: Collection[Any], use: Use) -> None:
    stored.insert_one(old_session(agent=old_agent("agent", *conversation(), state={"visits": 3, "a.b": ["$x"]})))
    (first,) = use(factory, "never said", "agent")
    assert first.messages == restored_conversation()
    assert first.state.get() == {"visits": 3, "a.b": ["$x"]}


@pytest.mark.parametrize("value", ["deleting", "copying"])
def test_a_state_that_an_application_has_stored_does_not_hide_the_session(
    factory: MongoDBSessionManagerFactory, stored: Collection[Any], commands: CommandLog, use: Use, value: str
) -> None:
    stored.insert_one({**old_session(agent=old_agent("agent", *conversation())), "state": value})
    (first,) = use(factory, "", "agent")
    assert first.messages == restored_conversation()
    assert commands.names == ["findAndModify", "update"]
    use(factory, "and on", "agent", prompt="Go on")
    assert factory.count_sessions() == 1
    assert [each.session_id for each in factory.list_sessions().sessions] == ["s"]
    factory.fork_session("s", "fork")
    assert {each["_id"]: each["state"] for each in stored.find()} == {"s": value, "fork": value}
    assert factory.delete_session("s")
    assert [each.session_id for each in factory.list_sessions().sessions] == ["fork"]


def test_the_first_open_numbers_the_messages_gives_an_incarnation_and_does_nothing_else(
    factory: MongoDBSessionManagerFactory, stored: Collection[Any], commands: CommandLog, use: Use
) -> None:
    before = old_session(agent=old_agent("agent", *conversation()), other=old_agent("other"))
    stored.insert_one(copy.deepcopy(before))
    use(factory, "never said")
    expected = copy.deepcopy(before)
    expected["agents"]["agent"]["next_message_id"] = 6
    expected["agents"]["other"]["next_message_id"] = 0
    after = stored.find_one({"_id": "s"})
    assert type(after.pop("incarnation")) is ObjectId
    assert after == expected
    assert commands.names == ["findAndModify", "update"]


def test_the_second_open_writes_nothing(
    factory: MongoDBSessionManagerFactory, stored: Collection[Any], commands: CommandLog, use: Use
) -> None:
    stored.insert_one(old_session(agent=old_agent("agent", *conversation()), other=old_agent("other")))
    use(factory, "never said")
    before = stored.find_one({"_id": "s"})
    commands.clear()
    use(factory, "never said", "agent", "other")
    assert commands.names == ["findAndModify"]
    assert stored.find_one({"_id": "s"}) == before


def test_a_turn_continues_the_conversation_and_keeps_all_that_is_unknown(
    factory: MongoDBSessionManagerFactory, stored: Collection[Any], use: Use
) -> None:
    before = old_session(
        agent=old_agent("agent", *conversation(), state={"visits": 3}), other=old_agent("other", *conversation()[:1])
    )
    stored.insert_one(copy.deepcopy(before))
    (first,) = use(factory, "Still a cat.", "agent", prompt="And now?")
    assert texts(first.messages[6:]) == ["And now?", "Still a cat."]

    after = stored.find_one({"_id": "s"})
    assert after is not None
    new = after["agents"]["agent"]["messages"][6:]
    assert message_ids(after) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert texts(new) == ["And now?", "Still a cat."]
    assert new[1]["event_loop_metrics"]["cycle_metrics"]["cycle_count"] == 1
    assert after["agents"]["agent"]["next_message_id"] == 8
    assert after["agents"]["agent"]["usage"]["invocations"] == 1
    assert after["updated_at"] > CREATED
    assert after["agents"]["agent"]["updated_at"] > CREATED

    # All else is as it was.
    expected = copy.deepcopy(before)
    expected["agents"]["other"]["next_message_id"] = 1
    expected["incarnation"] = after["incarnation"]
    expected["updated_at"] = after["updated_at"]
    ours = expected["agents"]["agent"]
    ours["messages"] += new
    ours["next_message_id"] = 8
    ours["usage"] = after["agents"]["agent"]["usage"]
    ours["updated_at"] = after["agents"]["agent"]["updated_at"]
    for name in ("_internal_state", "conversation_manager_state", "updated_at"):  # Strands may say more today
        ours["agent_data"][name] = after["agents"]["agent"]["agent_data"][name]
    assert after == expected


def test_the_agent_resumes_what_was_continued(
    factory: MongoDBSessionManagerFactory, stored: Collection[Any], use: Use
) -> None:
    stored.insert_one(old_session(agent=old_agent("agent", *conversation())))
    use(factory, "Still a cat.", "agent", prompt="And now?")
    (again,) = use(factory, "It is.", "agent", prompt="Sure?")
    assert texts(again.messages[3:]) == [
        "A cat.",
        "[redacted]",
        "I cannot help with that.",
        "And now?",
        "Still a cat.",
        "Sure?",
        "It is.",
    ]
    after = stored.find_one({"_id": "s"})
    assert after is not None
    assert message_ids(after) == list(range(10))


def test_an_agent_without_messages(factory: MongoDBSessionManagerFactory, stored: Collection[Any], use: Use) -> None:
    stored.insert_one(old_session(agent=old_agent("agent", state={"visits": 3})))
    (first,) = use(factory, "Hello.", "agent", prompt="Hi")
    assert first.state.get() == {"visits": 3}
    after = stored.find_one({"_id": "s"})
    assert after is not None
    assert message_ids(after) == [0, 1]
    assert texts(after["agents"]["agent"]["messages"]) == ["Hi", "Hello."]


def test_an_agent_without_a_list_of_messages(
    factory: MongoDBSessionManagerFactory, stored: Collection[Any], use: Use
) -> None:
    bare = old_agent("agent")
    del bare["messages"]
    stored.insert_one(old_session(agent=bare))
    use(factory, "Hello.", "agent", prompt="Hi")
    after = stored.find_one({"_id": "s"})
    assert after is not None
    assert message_ids(after) == [0, 1]
    assert after["agents"]["agent"]["next_message_id"] == 2


def test_two_agents(factory: MongoDBSessionManagerFactory, stored: Collection[Any], use: Use) -> None:
    stored.insert_one(
        old_session(
            agent=old_agent("agent", *conversation()), other=old_agent("other", old_message(0, "user", {"text": "Hey"}))
        )
    )
    first, second = use(factory, "Yes.", "agent", "other", prompt="Sure?")
    assert texts(first.messages[5:]) == ["I cannot help with that.", "Sure?", "Yes."]
    assert texts(second.messages) == ["Hey", "Sure?", "Yes."]
    after = stored.find_one({"_id": "s"})
    assert after is not None
    assert message_ids(after, "agent") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert message_ids(after, "other") == [0, 1, 2]


@pytest.mark.parametrize("fields", [{"agents": {}}, {}], ids=["empty", "missing"])
def test_a_session_without_agents(
    factory: MongoDBSessionManagerFactory, stored: Collection[Any], use: Use, fields: dict[str, Any]
) -> None:
    before = old_session()
    del before["agents"]
    stored.insert_one({**before, **fields})
    use(factory, "Hello.", "agent", prompt="Hi")
    after = stored.find_one({"_id": "s"})
    assert after is not None
    assert message_ids(after) == [0, 1]
    assert {name: after[name] for name in before if name != "updated_at"} == {
        name: before[name] for name in before if name != "updated_at"
    }


def test_ids_continue_after_the_highest_where_some_are_missing(
    factory: MongoDBSessionManagerFactory, stored: Collection[Any], use: Use
) -> None:
    gaps = [old_message(4, "user", {"text": "a"}), old_message(9, "assistant", {"text": "b"})]
    stored.insert_one(old_session(agent=old_agent("agent", *gaps)))
    use(factory, "d", "agent", prompt="c")
    after = stored.find_one({"_id": "s"})
    assert after is not None
    assert message_ids(after) == [4, 9, 10, 11]


def test_dates_that_are_strings(factory: MongoDBSessionManagerFactory, stored: Collection[Any], use: Use) -> None:
    before = old_session(agent=old_agent("agent", *conversation()))
    iso = CREATED.isoformat()
    for part in (before, before["agents"]["agent"], before["agents"]["agent"]["agent_data"]):
        part.update(created_at=iso, updated_at=iso)
    for message in before["agents"]["agent"]["messages"]:
        message.update(created_at=iso, updated_at=iso)
    stored.insert_one(before)
    (first,) = use(factory, "Still a cat.", "agent", prompt="And now?")
    assert len(first.messages) == 8
    after = stored.find_one({"_id": "s"})
    assert after is not None
    assert message_ids(after) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert after["created_at"] == iso


def test_an_agent_whose_id_holds_a_percent_sign(
    factory: MongoDBSessionManagerFactory, stored: Collection[Any], use: Use
) -> None:
    """The original stored the agent `50%` under that key; today its key is `50%25`."""
    stored.insert_one(old_session(**{"50%": old_agent("50%", old_message(0, "user", {"text": "Hey"}))}))
    (first,) = use(factory, "Yes.", "50%", prompt="Sure?")
    assert texts(first.messages) == ["Hey", "Sure?", "Yes."]
    (again,) = use(factory, "never said", "50%")
    assert texts(again.messages) == ["Hey", "Sure?", "Yes."]
    after = stored.find_one({"_id": "s"})
    assert after is not None
    assert after["agents"].keys() == {"50%25"}


def test_a_message_of_old_can_be_redacted(server: str, database: str, stored: Collection[Any]) -> None:
    messages = conversation()
    stored.insert_one(old_session(agent=old_agent("agent", *messages)))
    text = {"role": "user", "content": [{"text": "[gone]"}]}
    with MongoDBSessionRepository(server, database) as repository:
        found = repository.read_message("s", "agent", 4)
        assert isinstance(found, SessionMessage)
        assert found.message["content"] == [{"text": SECRET}]
        found.redact_message = text
        repository.update_message("s", "agent", found)
    after = stored.find_one({"_id": "s"})
    assert after is not None
    assert "4111 1111" not in repr(after)
    replaced = after["agents"]["agent"]["messages"][4]
    assert replaced == {
        **messages[4],
        "message": text,
        "redact_message": text,
        "updated_at": replaced["updated_at"],
    }
