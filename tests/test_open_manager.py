"""Reads and updates through an open manager, and agents that stay in memory while other managers write."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from strands import tool
from strands.agent.conversation_manager import SlidingWindowConversationManager
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from fix_archive import Stored, archive_of, settled
from mongodb_session_manager import (
    AgentNotFoundError,
    AsyncMongoDBSessionManager,
    EventLoopError,
    InvalidArgumentError,
    MessageNotFoundError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionClosedError,
    SessionConflictError,
    SessionNotFoundError,
)
from mongodb_session_manager.demo import Redaction
from orchestrators import node, pipeline
from support import CommandLog, Paused, agent, alternating, texts
from support import Session as Opened

pytestmark = pytest.mark.anyio


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


CALL_ADD = {"tool": "add", "input": {"a": 1, "b": 2}}
SMALL: dict[str, Any] = {"max_embedded_messages": 4}


@pytest.fixture(params=alternating(False, True), ids=["sync", "async"])
def session(factory: MongoDBSessionManagerFactory, request: pytest.FixtureRequest) -> Iterator[Opened]:
    with asyncio.Runner() as runner:
        yield Opened(factory, runner, request.param)


@pytest.fixture(scope="module")
def repository(server: str, shared_database: str) -> Iterator[MongoDBSessionRepository]:
    with MongoDBSessionRepository(server, shared_database) as repository:
        yield repository


def said(messages: list[SessionMessage]) -> list[str]:
    return texts([message.to_message() for message in messages])


def changed(message: SessionMessage, text: str) -> SessionMessage:
    message.message["content"] = [{"text": text}]
    return message


def image(data: bytes) -> Any:
    return {"image": {"format": "png", "source": {"bytes": data}}}


# Reading.


def test_what_is_read_through_an_open_manager_is_what_is_stored(
    session: Opened, repository: MongoDBSessionRepository
) -> None:
    opened = session.open().manager.session_repository
    live = agent(session.manager, CALL_ADD, "three", Redaction("[redacted]"), tools=[add], state={"colour": "red"})
    live("one and two?")
    live("my card is 4111")
    live.state.set("colour", "green")
    session.manager.sync_agent(live)
    session.flush()
    for _ in range(2):
        assert opened.list_messages("s", "agent") == repository.list_messages("s", "agent")
        for offset, limit in ((0, 2), (1, None), (2, 1), (5, 3), (99, None), (0, 0)):
            expected = repository.list_messages("s", "agent", limit, offset)
            assert opened.list_messages("s", "agent", limit, offset) == expected
        for message_id in (0, 3, 5, 6, 99):
            assert opened.read_message("s", "agent", message_id) == repository.read_message("s", "agent", message_id)
        read, stored = opened.read_agent("s", "agent"), repository.read_agent("s", "agent")
        assert (read.state, read._internal_state) == (stored.state, stored._internal_state) != ({}, {})
        assert read.conversation_manager_state == stored.conversation_manager_state
        assert read.created_at == stored.created_at
        assert opened.read_session("s").created_at == repository.read_session("s").created_at
        assert opened.read_agent("s", "other") is None
        session.close()
        opened = session.open().manager.session_repository  # not restored
    assert agent(session.manager).state.get("colour") == "green"
    assert opened.list_messages("s", "agent") == repository.list_messages("s", "agent")


async def test_on_a_running_loop_the_messages_of_live_agents_are_read_from_memory(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    async with factory.create_session_manager_async("s") as manager:
        await agent(manager, "hello", agent_id="other").invoke_async("hi")
        await agent(manager, "hello").invoke_async("hi")
    async with factory.create_session_manager_async("s") as manager:
        live = agent(manager, "fine")
        commands.clear()
        opened = manager.session_repository
        assert said(opened.list_messages("s", "agent")) == ["hi", "hello"]
        assert said(opened.list_messages("s", "other")) == ["hi", "hello"]
        await live.invoke_async("how are you?")
        assert said(opened.list_messages("s", "agent")) == ["hi", "hello", "how are you?", "fine"]
        assert opened.read_message("s", "agent", 3).message["role"] == "assistant"
        assert opened.read_agent("s", "agent").agent_id == "agent"
        assert commands.names == ["update", "update"]


def test_attachments_outside_the_document_are_read_with_their_message(
    session: Opened, repository: MongoDBSessionRepository
) -> None:
    small, large = image(b"x" * 10), image(b"y" * 500)
    live = agent(session.open(max_inline_attachment_bytes=100).manager, "a picture")
    live([{"text": "What is this?"}, small, large])
    for _ in range(2):
        opened = session.manager.session_repository
        message = opened.read_message("s", "agent", 0)
        assert message.message["content"][1:] == [small, large]
        assert opened.list_messages("s", "agent") == repository.list_messages("s", "agent")
        session.close()
        session.open()
    opened = session.manager.session_repository
    message.message["content"][2] = image(b"z" * 600)
    opened.update_message("s", "agent", message)
    assert opened.read_message("s", "agent", 0).message == repository.read_message("s", "agent", 0).message
    assert agent(session.manager).messages[0]["content"][1:] == [small, image(b"z" * 600)]


def test_a_recorded_message_is_read_before_it_is_stored(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s", save_on="invocation") as manager:
        seen = []

        def reply(_: Any) -> str:
            seen.extend(said(manager.session_repository.list_messages("s", "agent")))
            return "hello"

        agent(manager, reply)("hi")
        assert seen == ["hi"]


def test_editing_the_live_messages_changes_nothing_that_is_read(session: Opened) -> None:
    live = agent(session.open().manager, "hello", "fine")
    live("hi")
    live.messages[0]["content"][0]["text"] = "edited"
    opened = session.manager.session_repository
    assert said(opened.list_messages("s", "agent")) == ["hi", "hello"]
    changed(opened.list_messages("s", "agent")[1], "edited, too")
    assert said(opened.list_messages("s", "agent")) == ["hi", "hello"]
    assert texts(live.messages) == ["edited", "hello"]


def test_messages_that_the_conversation_manager_removed_are_read_from_the_database(
    session: Opened, stored: Stored, commands: CommandLog
) -> None:
    def windowed(*replies: str) -> Any:
        return agent(session.manager, *replies, conversation_manager=SlidingWindowConversationManager(window_size=4))

    session.open(**SMALL)
    live = windowed(*(f"reply {n}" for n in range(6)))
    for n in range(6):
        live(f"prompt {n}")
        settled(stored, 4)
    assert archive_of(stored).count_documents({}) > 0
    everything = [text for n in range(6) for text in (f"prompt {n}", f"reply {n}")]
    for _ in range(2):
        opened = session.manager.session_repository
        assert said(opened.list_messages("s", "agent")) == everything
        assert said(opened.list_messages("s", "agent", 3, 1)) == everything[1:4]
        assert opened.read_message("s", "agent", 2).message["content"] == [{"text": "prompt 1"}]
        commands.clear()
        assert said(opened.list_messages("s", "agent", offset=8)) == everything[8:]
        assert commands.names == []
        session.close()
        session.open(**SMALL)
        windowed()


def test_a_live_agent_keeps_no_more_stored_messages_in_memory_than_live_ones(session: Opened) -> None:
    live = agent(session.open().manager, *(["hello"] * 6))
    for _ in range(6):
        live("hi")
        live.messages.clear()
    _, kept = session.manager._unit.agent("agent").stored._known
    assert len(kept) <= 2
    assert len(session.manager.session_repository.list_messages("s", "agent")) == 12


@pytest.mark.may_block  # the client connects on the loop of the test
async def test_on_the_loop_of_the_client_what_is_not_in_memory_is_refused(server: str, database: str) -> None:
    client: Any = AsyncIOMotorClient(server)
    async with AsyncMongoDBSessionManager("s", client=client, database_name=database) as manager:
        window = SlidingWindowConversationManager(window_size=2)
        live = agent(manager, "a", "b", "c", conversation_manager=window)
        for prompt in ("one", "two", "three"):
            await live.invoke_async(prompt)
        opened = manager.session_repository
        assert said(opened.list_messages("s", "agent", offset=4)) == ["three", "c"]
        with pytest.raises(EventLoopError, match="not in memory"):
            opened.list_messages("s", "agent")
        found = await asyncio.to_thread(opened.list_messages, "s", "agent")
        assert said(found) == ["one", "a", "two", "b", "three", "c"]
    client.close()


# Writing.


def test_an_update_changes_the_stored_message_and_what_is_read_and_restored(
    session: Opened, repository: MongoDBSessionRepository
) -> None:
    live = agent(session.open().manager, "hello", "fine", "bye")
    live("hi")
    opened = session.manager.session_repository
    opened.update_message("s", "agent", changed(opened.list_messages("s", "agent")[0], "changed"))
    assert said(opened.list_messages("s", "agent")) == ["changed", "hello"]
    assert said(repository.list_messages("s", "agent")) == ["changed", "hello"]
    assert texts(live.messages) == ["hi", "hello"]
    live("how are you?")
    opened.update_message("s", "agent", changed(opened.read_message("s", "agent", 3), "better"))
    live("see you")
    session.close()
    expected = ["changed", "hello", "how are you?", "better", "see you", "bye"]
    assert texts(agent(session.open().manager).messages) == expected


def test_an_agent_that_is_restored_later_has_what_was_changed_before(session: Opened) -> None:
    agent(session.open().manager, "hello")("hi")
    session.close()
    opened = session.open().manager.session_repository
    opened.update_message("s", "agent", changed(opened.read_message("s", "agent", 0), "changed"))
    opened.create_message("s", "agent", SessionMessage({"role": "user", "content": [{"text": "more"}]}, 0))
    with_state = opened.read_agent("s", "agent")
    with_state.state = {"colour": "red"}
    opened.update_agent("s", with_state)
    opened.create_agent("s", SessionAgent("second", {"made": "elsewhere"}, with_state.conversation_manager_state))
    opened.create_message("s", "second", SessionMessage({"role": "user", "content": [{"text": "first"}]}, 0))
    for _ in range(2):
        live, second = agent(session.manager), agent(session.manager, agent_id="second")
        assert texts(live.messages) == ["changed", "hello", "more"]
        assert live.state.get() == {"colour": "red"}
        assert (texts(second.messages), second.state.get()) == (["first"], {"made": "elsewhere"})
        session.close()
        session.open()


def test_an_archived_message_is_updated(session: Opened, stored: Stored, repository: MongoDBSessionRepository) -> None:
    session.open(**SMALL)
    window = SlidingWindowConversationManager(window_size=4)
    live = agent(session.manager, *(f"reply {n}" for n in range(7)), conversation_manager=window)
    for n in range(6):
        live(f"prompt {n}")
        settled(stored, 4)
    opened = session.manager.session_repository
    opened.update_message("s", "agent", changed(opened.list_messages("s", "agent")[2], "changed"))
    expected = ["prompt 0", "reply 0", "changed", "reply 1"]
    assert said(opened.list_messages("s", "agent", 4)) == said(repository.list_messages("s", "agent", 4)) == expected
    live("and on")
    assert said(repository.list_messages("s", "agent", offset=12)) == ["and on", "reply 6"]


def test_an_unknown_message_is_refused_and_the_agent_continues(session: Opened) -> None:
    live = agent(session.open().manager, "hello", "fine")
    live("hi")
    opened = session.manager.session_repository
    message = opened.read_message("s", "agent", 1)
    for message_id in (2, 99):
        message.message_id = message_id
        with pytest.raises(MessageNotFoundError):
            opened.update_message("s", "agent", message)
    with pytest.raises(AgentNotFoundError):
        opened.update_message("s", "nobody", message)
    message.message_id = -1
    with pytest.raises(InvalidArgumentError):
        opened.update_message("s", "agent", message)
    live("how are you?")
    assert session.get_message_count("agent") == 4


async def test_on_a_running_loop_an_update_is_stored_without_blocking_it(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    manager = await factory.create_session_manager_async("s")
    await agent(manager, "hello").invoke_async("hi")
    opened = manager.session_repository
    opened.update_message("s", "agent", changed(opened.read_message("s", "agent", 1), "changed"))
    assert said(opened.list_messages("s", "agent")) == ["hi", "changed"]
    await manager.flush()
    found = await asyncio.to_thread(stored.find_one, {"_id": "s"})
    assert texts(found["agents"]["agent"]["messages"]) == ["hi", "changed"]
    await manager.close()


def test_agents_that_another_worker_created_are_read_and_written(session: Opened, factory: Any) -> None:
    opened = session.open().manager.session_repository
    with factory.create_session_manager("s") as other:
        agent(other, "hello", agent_id="late")("hi")
    assert said(opened.list_messages("s", "late")) == ["hi", "hello"]
    assert opened.read_agent("s", "late").agent_id == "late"
    opened.update_message("s", "late", changed(opened.read_message("s", "late", 1), "changed"))
    opened.create_message("s", "late", SessionMessage({"role": "user", "content": [{"text": "more"}]}, 2))
    opened.update_agent("s", opened.read_agent("s", "late"))
    assert said(opened.list_messages("s", "late")) == ["hi", "changed", "more"]


def test_a_graph_is_read_and_updated(session: Opened, repository: MongoDBSessionRepository) -> None:
    opened = session.open().manager.session_repository
    graph = pipeline(None, node("first", "one"), node("last", "two"))
    assert opened.read_multi_agent("s", "pipeline") is None
    opened.create_multi_agent("s", graph)
    graph("go")
    opened.update_multi_agent("s", graph)
    read = opened.read_multi_agent("s", "pipeline")
    assert read == repository.read_multi_agent("s", "pipeline")
    assert read is not None
    assert sorted(read["completed_nodes"]) == ["first", "last"]


def test_another_session_and_a_closed_one_are_refused(session: Opened) -> None:
    opened = session.open().manager.session_repository
    with pytest.raises(InvalidArgumentError, match="'s', the session that this manager has open, got 't'"):
        opened.list_messages("t", "agent")
    assert opened.create_session(Session("s", SessionType.AGENT)).session_id == "s"
    session.close()
    with pytest.raises(SessionClosedError):
        opened.list_messages("s", "agent")


# Reloading.


def test_an_agent_in_memory_continues_what_another_worker_wrote(
    session: Opened, factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    live = agent(session.open().manager, "hello", "third")
    live("hi")
    with factory.create_session_manager("s") as other:
        elsewhere = agent(other, "second")
        elsewhere.state.set("colour", "red")
        elsewhere("again")
    commands.clear()
    session.reload()
    assert commands.names == ["findAndModify"]
    assert texts(live.messages) == ["hi", "hello", "again", "second"]
    assert live.state.get("colour") == "red"
    live("and again")
    session.close()
    assert texts(agent(session.open().manager).messages) == ["hi", "hello", "again", "second", "and again", "third"]


def test_after_a_conflict_reload_repeats_the_turn(session: Opened, factory: MongoDBSessionManagerFactory) -> None:
    live = agent(session.open().manager, "hello", "lost", "third")
    live("hi")
    with factory.create_session_manager("s") as other:
        agent(other, "second")("again")
    with pytest.raises(SessionConflictError):
        live("and again")
    opened = session.manager.session_repository
    assert said(opened.list_messages("s", "agent")) == ["hi", "hello", "again", "second"]
    session.reload()
    assert texts(live.messages) == ["hi", "hello", "again", "second"]
    assert opened is session.manager.session_repository
    live("and again")
    assert said(opened.list_messages("s", "agent"))[-2:] == ["and again", "lost"]
    assert session.get_message_count("agent") == 6


def test_reload_restores_the_conversation_manager(session: Opened, factory: MongoDBSessionManagerFactory) -> None:
    def windowed(manager: Any, *replies: str) -> Any:
        return agent(manager, *replies, conversation_manager=SlidingWindowConversationManager(window_size=4))

    live = windowed(session.open().manager, "a", "z")
    live("one")
    with factory.create_session_manager("s") as other:
        elsewhere = windowed(other, "b", "c", "d")
        for prompt in ("two", "three", "four"):
            elsewhere(prompt)
        expected = texts(elsewhere.messages)
    session.reload()
    assert texts(live.messages) == expected == ["three", "c", "four", "d"]
    live("five")
    assert live.conversation_manager.removed_message_count == 6
    assert session.get_message_count("agent") == 10


def test_reload_stores_what_was_recorded_first(session: Opened, stored: Stored) -> None:
    live = agent(session.open().manager, "hello")
    live("hi")
    live.state.set("colour", "red")
    session.manager._unit.update_agent("s", SessionAgent.from_agent(live))
    session.reload()
    assert live.state.get("colour") == "red"


def test_reload_in_the_middle_of_a_turn_is_refused(factory: MongoDBSessionManagerFactory) -> None:
    refusals = []

    def reload(_: Any) -> str:
        with pytest.raises(SessionConflictError) as caught:
            manager.reload()
        refusals.append(str(caught.value))
        return "hello"

    with factory.create_session_manager("s") as manager:
        live = agent(manager, reload, "fine")
        live("hi")
        pipeline(manager, node("first", reload))("go")
        manager.reload()
        live("how are you?")
    assert [text.partition(":")[0] for text in refusals] == [
        "'agent' is in the middle of a turn",
        "'pipeline' is in the middle of a turn",
    ]


def test_reload_of_a_deleted_session_neither_creates_it_nor_empties_the_agent(
    session: Opened, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    live = agent(session.open().manager, "hello")
    live("hi")
    repository.delete_session("s")
    with pytest.raises(SessionNotFoundError):
        session.reload()
    assert stored.count_documents({"_id": "s", "agents": {"$exists": True}}) == 0
    repository.create_session(Session("s", SessionType.AGENT))
    with pytest.raises(SessionNotFoundError, match="deleted and created again"):
        session.reload()
    assert texts(live.messages) == ["hi", "hello"]


def test_an_agent_that_nothing_uses_any_more_is_not_kept_by_its_manager(session: Opened) -> None:
    live = agent(session.open().manager, "hello")
    live("hi")
    del live
    gc.collect()
    session.reload()
    again = agent(session.manager, "fine")  # after a reload, an agent with that id can be constructed again
    assert texts(again.messages) == ["hi", "hello"]


def test_a_graph_in_memory_resumes_where_another_worker_stopped(
    session: Opened, factory: MongoDBSessionManagerFactory
) -> None:
    first, last = node("first", "one", "not asked"), node("last", "two", "five")
    graph = pipeline(session.open().manager, first, last)
    graph("go")
    with factory.create_session_manager("s") as other:
        elsewhere = pipeline(other, node("first", "three"), node("last", BrokenPipeError("gone")))
        with pytest.raises(BrokenPipeError):
            elsewhere("again")
    session.reload()
    graph("and again")
    assert (list(first.model.replies), list(last.model.replies)) == (["not asked"], [])


# With a lease, and with a view.


async def test_reload_waits_for_the_turn_of_another_manager(factory: Any, commands: CommandLog) -> None:
    here = await factory.create_session_manager_async("s", on_busy="wait")
    live = agent(here, "one", "three")
    await live.invoke_async("first")
    elsewhere = await factory.create_session_manager_async("s", on_busy="wait")
    other = agent(elsewhere)
    other.model = model = Paused(["two"])
    turn = asyncio.create_task(other.invoke_async("second"))
    await model.asked.wait()
    reload = asyncio.create_task(here.reload())
    await asyncio.sleep(0.05)
    assert not reload.done()
    model.go.set()
    await reload
    assert texts(live.messages) == ["first", "one", "second", "two"]
    await turn
    commands.clear()
    await live.invoke_async("third")
    assert commands.names == ["update", "update"]
    await here.close()
    await elsewhere.close()
    async with factory.create_session_manager_async("s", on_busy="refuse") as third:
        assert len(agent(third).messages) == 6


async def test_a_manager_that_was_reloaded_and_not_used_does_not_keep_others_out(factory: Any) -> None:
    here = await factory.create_session_manager_async("s", on_busy="wait", lease=1.0)
    live = agent(here, "one")
    await live.invoke_async("first")
    await here.reload()
    async with factory.create_session_manager_async("s", on_busy="wait", busy_timeout=30.0) as other:
        await agent(other, "two").invoke_async("second")
    await here.reload()
    assert texts(live.messages) == ["first", "one", "second", "two"]
    await here.close()


async def test_a_cancelled_reload_leaves_no_lease(factory: Any) -> None:
    here = await factory.create_session_manager_async("s", on_busy="wait")
    await agent(here, "one").invoke_async("first")
    other = await factory.create_session_manager_async("s", on_busy="wait")
    reload = asyncio.create_task(here.reload())
    await asyncio.sleep(0.1)
    reload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reload
    await other.close()
    async with factory.create_session_manager_async("s", on_busy="wait", busy_timeout=10.0):
        pass
    await here.close()


def test_reload_restores_the_view(session: Opened, factory: MongoDBSessionManagerFactory) -> None:
    live = agent(session.open().manager, "a", "b", "d")
    live("one")
    with factory.create_session_manager("s") as other:
        elsewhere = agent(other, "b")
        elsewhere("two")
        del elsewhere.messages[:2]
    session.reload()
    assert texts(live.messages) == ["two", "b"]
    live("three")
    assert said(session.manager.session_repository.list_messages("s", "agent")) == [
        "one",
        "a",
        "two",
        "b",
        "three",
        "b",
    ]
    session.close()
    assert texts(agent(session.open().manager).messages) == ["two", "b", "three", "b"]


def test_an_update_is_shown_by_the_view(session: Opened) -> None:
    live = agent(session.open().manager, "a", "b")
    live("one")
    live("two")
    del live.messages[0:1]
    live.messages[0]["content"][0]["text"] = "shortened"
    session.manager.sync_agent(live)
    session.flush()
    opened = session.manager.session_repository
    assert said(opened.list_messages("s", "agent")) == ["one", "a", "two", "b"]
    opened.update_message("s", "agent", changed(opened.read_message("s", "agent", 2), "updated"))
    live.messages[1]["content"][0]["text"] = "updated"
    session.close()
    assert texts(agent(session.open().manager).messages) == ["shortened", "updated", "b"]
    session.close()
    opened = session.open().manager.session_repository  # before the agent is restored
    opened.update_message("s", "agent", changed(opened.read_message("s", "agent", 1), "all new"))
    first = texts(agent(session.manager).messages)
    session.close()
    assert texts(agent(session.open().manager).messages) == first == ["all new", "updated", "b"]
