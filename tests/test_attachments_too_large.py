"""A message that cannot be stored, whatever is kept outside: refused before anything is sent, and the agent goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from strands import Agent, tool
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from mongodb_session_manager import (
    DatabaseError,
    MessageTooLargeError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
)
from support import CommandLog, agent, alternating, eventually, fail_point, message_ids, texts, untraced

SAVE_ON = pytest.mark.parametrize("save_on", alternating("message", "invocation"))
TOO_LONG = "a" * (15 * 1024 * 1024)
SAYS = r"^a message of 157\d{5} bytes, its attachments not counted, exceeds the maximum of 15728640 bytes"


@pytest.fixture(autouse=True, scope="module")
def nothing_is_traced() -> Iterator[None]:
    with untraced():
        yield


@tool
def read() -> str:
    """Read more than can be stored."""
    return TOO_LONG


def ask(live: Agent, text: str) -> None:
    live(text)


def ask_async(live: Agent, text: str) -> None:
    asyncio.run(live.invoke_async(text))


ASK = pytest.mark.parametrize("ask", alternating(ask, ask_async))


def restored(factory: MongoDBSessionManagerFactory) -> list[Any]:
    with factory.create_session_manager("s") as manager:
        return [message["content"] for message in agent(manager).messages]


@SAVE_ON
@ASK
@pytest.mark.parametrize("first", alternating(True, False))
def test_it_is_refused_before_anything_is_sent_and_the_agent_goes_on_without_it(
    factory: MongoDBSessionManagerFactory,
    commands: CommandLog,
    stored: Any,
    ask: Callable[..., None],
    save_on: str,
    first: bool,
) -> None:
    manager = factory.create_session_manager("s", save_on=save_on)
    live = agent(manager, *([] if first else ["1"]), "2", "3")
    if not first:
        ask(live, "one")
    commands.clear()
    with pytest.raises(MessageTooLargeError, match=SAYS):
        ask(live, TOO_LONG)
    assert commands.names == (["update"] if first else [])  # it stores the new agent
    ask(live, "two")
    ask(live, "three")
    expected = ["two", "2", "three", "3"] if first else ["one", "1", "two", "2", "three", "3"]
    assert texts(live.messages) == expected
    document = stored.find_one({"_id": "s"})
    assert texts(document["agents"]["agent"]["messages"]) == expected
    assert message_ids(document) == list(range(len(expected)))
    assert document["agents"]["agent"]["next_message_id"] == len(expected)
    assert restored(factory) == [message["content"] for message in live.messages]
    manager.close()


@SAVE_ON
@ASK
def test_a_tool_result_that_is_too_large(
    factory: MongoDBSessionManagerFactory, stored: Any, ask: Callable[..., None], save_on: str
) -> None:
    live = agent(factory.create_session_manager("s", save_on=save_on), {"tool": "read"}, "sorry", tools=[read])
    with pytest.raises(MessageTooLargeError, match=SAYS):
        ask(live, "read it")
    ask(live, "never mind")
    contents = [message["content"] for message in live.messages]
    assert [list(content[0]) for content in contents] == [
        ["text"],
        ["toolUse"],
        ["toolResult"],  # Strands' own, instead of the one that was lost
        ["text"],
        ["text"],
    ]
    assert contents[2][0]["toolResult"]["status"] == "error"
    assert restored(factory) == contents
    assert message_ids(stored.find_one({"_id": "s"})) == [0, 1, 2, 3, 4]


@SAVE_ON
def test_an_answer_that_is_too_large(factory: MongoDBSessionManagerFactory, save_on: str) -> None:
    live = agent(factory.create_session_manager("s", save_on=save_on), TOO_LONG, "2")
    with pytest.raises(MessageTooLargeError):
        live("one")
    live("two")
    assert texts(live.messages) == ["one", "two", "2"]
    assert restored(factory) == [message["content"] for message in live.messages]


def test_the_largest_message_is_stored(factory: MongoDBSessionManagerFactory) -> None:
    manager = factory.create_session_manager("s")
    text = TOO_LONG[:-1000]
    manager.append_message({"role": "user", "content": [{"text": text}]}, agent(manager))
    assert restored(factory) == [[{"text": text}]]


@SAVE_ON
def test_messages_that_do_not_fit_into_one_document_together(
    factory: MongoDBSessionManagerFactory, save_on: str
) -> None:
    said = [letter * (9 * 1024 * 1024) for letter in "abc"]
    live = agent(factory.create_session_manager("s", save_on=save_on), said[1], "4")
    live(said[0])
    live(said[2])
    assert restored(factory) == [[{"text": text}] for text in [*said, "4"]]


def test_what_made_room_for_the_next_can_be_redacted(server: str, embedded: str, database: str, stored: Any) -> None:
    """Also if it was copied to the archive, and the process ended before it was taken out of the session."""
    large = "secret" * (9 * 1024 * 1024 // 6)
    with MongoDBSessionManagerFactory(server, database) as factory:
        first = factory.create_session_manager("s")
        live = agent(first)
        first.append_message({"role": "user", "content": [{"text": large}]}, live)
        with fail_point(embedded, failCommands=["findAndModify"], errorCode=8), pytest.raises(DatabaseError):
            first.append_message({"role": "assistant", "content": [{"text": large}]}, live)
    archive = stored.database["agent_sessions_archive"]
    assert archive.count_documents({}) == 1
    with MongoDBSessionRepository(server, database) as repository:
        gone = {"role": "user", "content": [{"text": "[gone]"}]}
        repository.update_message("s", "agent", SessionMessage(gone, 0, gone))
        assert texts([message.to_message() for message in repository.list_messages("s", "agent")]) == ["[gone]"]
    assert archive.count_documents({"messages.message.content.text": large}) == 0


def test_a_replacement_that_is_too_large_leaves_what_is_stored(
    factory: MongoDBSessionManagerFactory, stored: Any
) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, "1", "2")
    live("one")
    merged = {**live.messages[-1], "content": [{"text": TOO_LONG}]}
    with pytest.raises(MessageTooLargeError):
        manager.append_message(merged, live)
    live("two")
    assert texts(stored.find_one({"_id": "s"})["agents"]["agent"]["messages"]) == ["one", "1", "two", "2"]


def test_the_repository_refuses_it(server: str, database: str, commands: CommandLog) -> None:
    message = SessionMessage({"role": "user", "content": [{"text": TOO_LONG}]}, 0)
    short = SessionMessage({"role": "user", "content": [{"text": "short"}]}, 0)
    with MongoDBSessionRepository(server, database, event_listeners=[commands]) as repository:
        repository.create_session(Session("s", SessionType.AGENT))
        repository.create_agent("s", SessionAgent("agent", {}, {}))
        eventually(lambda: not repository._async._connection._tasks)
        commands.clear()
        with pytest.raises(MessageTooLargeError, match=SAYS):
            repository.create_message("s", "agent", message)
        assert commands.names == []
        repository.create_message("s", "agent", short)
        commands.clear()
        with pytest.raises(MessageTooLargeError, match=SAYS):
            repository.update_message("s", "agent", message)
        assert commands.names == []
        assert [found.message for found in repository.list_messages("s", "agent")] == [short.message]
