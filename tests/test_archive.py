"""Long sessions: old messages move out of the session document, and nobody who reads or changes them can tell."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import pymongo
import pytest
from hypothesis import given
from hypothesis import strategies as st
from motor.motor_asyncio import AsyncIOMotorClient
from strands.agent.conversation_manager import NullConversationManager, SlidingWindowConversationManager
from strands.types.session import Session, SessionAgent, SessionMessage

from fix_archive import (
    FIVES,
    MOMENT,
    SECRET,
    SMALL,
    Driver,
    Stored,
    append,
    appends,
    archive_of,
    begin,
    document_size,
    documents_of,
    emptied,
    everything,
    expected,
    head,
    idle,
    in_database,
    redacted,
    said,
    settled,
    started,
    store_again,
    told,
)
from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    DatabaseError,
    MessageNotFoundError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionConflictError,
)
from mongodb_session_manager._format.changes import AddGuardrailEvent, AppendMessage, SetMessageFields
from mongodb_session_manager._format.documents import stored_message
from mongodb_session_manager._format.ids import agent_key
from mongodb_session_manager._managers.unit_of_work import UnitOfWork
from support import CommandLog, agent, apply, eventually, texts

Logged = tuple[MongoDBSessionRepository, CommandLog]


@pytest.fixture(scope="module")
def logged_repository(server: str, shared_database: str) -> Iterator[Logged]:
    log = CommandLog()
    with started(server, shared_database, log, **SMALL) as repository:
        yield repository, log


@pytest.fixture
def commands(request: pytest.FixtureRequest, commands: CommandLog, logged_repository: Logged) -> CommandLog:
    """The commands of the factory, or of the repository."""
    return commands if "factory" in request.fixturenames else logged_repository[1]


@pytest.fixture
def repository(database: str, logged_repository: Logged) -> Iterator[MongoDBSessionRepository]:
    repository = logged_repository[0]
    yield repository
    idle(repository)


def store_thirty(repository: MongoDBSessionRepository, stored: Stored) -> None:
    """Store a session of 30 messages, of which 25 are archived in five buckets."""
    begin(repository)
    for part in FIVES:
        apply(repository, "s", appends(part))
        settled(stored)
    assert head(stored)["archived"] == 25
    idle(repository)


@pytest.fixture(scope="module")
def long_documents(
    server: str, shared_database: str, driver: Driver, logged_repository: Logged
) -> dict[str, list[Any]]:
    stored = emptied(driver[shared_database]["agent_sessions"])
    store_thirty(logged_repository[0], stored)
    return documents_of(stored)


@pytest.fixture
def long(
    long_documents: dict[str, list[Any]], repository: MongoDBSessionRepository, stored: Stored
) -> MongoDBSessionRepository:
    """A repository with that session, of which it knows nothing yet."""
    store_again(stored, long_documents)
    return repository


# What is stored.


def test_the_older_half_moves_into_a_bucket(repository: MongoDBSessionRepository, stored: Stored) -> None:
    begin(repository)
    append(repository, *range(8))
    assert "archived" not in head(stored)
    whole = head(stored)["messages"]
    append(repository, 8)
    settled(stored)
    assert [message["message_id"] for message in head(stored)["messages"]] == [5, 6, 7, 8]
    assert head(stored)["archived"] == 5
    (bucket,) = archive_of(stored).find()
    incarnation = stored.find_one()["incarnation"]
    assert list(bucket["_id"].items()) == [("incarnation", incarnation), ("agent", "agent"), ("first", 0)]
    assert (bucket["session_id"], bucket["last"]) == ("s", 4)
    assert bucket["messages"] == whole[:5]


def test_what_a_session_document_holds_but_the_head_stays_as_it_is(
    long: MongoDBSessionRepository, stored: Stored
) -> None:
    before = stored.find_one({"_id": "s"})
    append(long, 30, 31, 32, 33)
    settled(stored)
    after = stored.find_one({"_id": "s"})
    for document in (before, after):
        for name in ("messages", "archived", "next_message_id", "updated_at"):
            del document["agents"]["agent"][name]
        del document["updated_at"]
    assert after == before


def test_many_bytes_move_as_many_messages_do(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionRepository(server, database, max_embedded_bytes=10_000) as repository:
        begin(repository)
        for message_id in range(40):
            repository.create_message("s", "agent", said(message_id, f"{message_id} " + "x" * 1000))
        eventually(lambda: len(bson.encode(head(stored))) < 11_500)
        messages = repository.list_messages("s", "agent")
    assert [message.message_id for message in messages] == list(range(40))
    assert head(stored)["archived"] > 0


def test_metrics_count_and_move_too(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionRepository(server, database, max_embedded_bytes=10_000) as repository:
        begin(repository)
        for message_id in range(10):
            apply(
                repository,
                "s",
                [
                    AppendMessage("agent", stored_message(said(message_id), message_id)),
                    SetMessageFields("agent", message_id, {"event_loop_metrics": {"n": "x" * 2000}}),
                ],
            )
        eventually(lambda: head(stored).get("archived", 0) > 0)
        eventually(lambda: len(bson.encode(head(stored))) < 11_500)
        assert told(repository.list_messages("s", "agent")) == expected(10)
        loaded = repository.open_session("s")["agents"]["agent"]["messages"]
        assert [message["message_id"] for message in loaded] == list(range(10))
        assert not any("event_loop_metrics" in message for message in loaded)
    bucket = archive_of(stored).find_one()
    assert bucket["messages"][0]["event_loop_metrics"] == {"n": "x" * 2000}


def test_the_newest_message_stays_however_large(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionRepository(server, database, max_embedded_bytes=1000) as repository:
        begin(repository)
        for message_id in range(4):
            repository.create_message("s", "agent", said(message_id, f"{message_id}" + "x" * 5000))
            eventually(lambda wanted=message_id: head(stored).get("archived", 0) == wanted)
        assert len(head(stored)["messages"]) == 1
        assert [message.message_id for message in repository.list_messages("s", "agent")] == [0, 1, 2, 3]


def test_agents_of_one_session_have_their_own_archives(repository: MongoDBSessionRepository, stored: Stored) -> None:
    begin(repository)
    counts = {agent_id: 9 + n for n, agent_id in enumerate(["agent", "a.b", "$x", "50%", "日本", "0", "archived"])}
    for agent_id in [*counts][1:]:
        repository.create_agent("s", SessionAgent(agent_id, {}, {}, {}, MOMENT, MOMENT))
    each = [appends(range(count), f"{agent_id} {{}}", agent_id) for agent_id, count in counts.items()]
    apply(repository, "s", itertools.chain(*each))
    for agent_id in counts:
        settled(stored, agent_id=agent_id)
    document = repository.open_session("s")
    for agent_id, count in counts.items():
        wanted = [f"{agent_id} {n}" for n in range(count)]
        assert told(repository.list_messages("s", agent_id)) == everything(stored, agent_id) == wanted
        assert texts(document["agents"][agent_key(agent_id)]["messages"]) == wanted


def test_a_session_that_is_deleted_and_imported_is_archived_again(
    repository: MongoDBSessionRepository, stored: Stored
) -> None:
    begin(repository)
    append(repository, *range(4))
    lines = list(repository.export_session("s"))
    apply(repository, "s", appends(range(4, 40)))
    settled(stored)
    repository.delete_session("s")
    repository.import_session(lines)
    append(repository, *range(4, 20))
    settled(stored)
    assert everything(stored) == expected(20)


def test_more_messages_than_a_document_holds(
    request: pytest.FixtureRequest, server: str, database: str, stored: Stored
) -> None:
    """17 MB in one session, whose document stays small all the while."""
    text, count = "x" * 20_000, 1000 if request.config.getoption("full_adversity") else 850
    sizes = []
    with MongoDBSessionRepository(server, database) as repository:
        begin(repository)
        for first in range(0, count, 25):
            assert apply(repository, "s", appends(range(first, first + 25), f"{{}} {text}")) == {}
            if first % 50 == 0:
                sizes.append(document_size(stored))
        assert max(sizes) < 1_300_000  # a writer waits at twice 256 KiB; each statement adds 500 KB
        assert repository.get_message_count("s", "agent") == count
        assert [m.message_id for m in repository.list_messages("s", "agent", 3, 498)] == [498, 499, 500]
        assert repository.read_message("s", "agent", 77).to_message()["content"][0]["text"] == f"77 {text}"
        repository.update_message("s", "agent", said(77, "shorter"))
        listed = repository.list_messages("s", "agent")
    assert [message.message_id for message in listed] == list(range(count))
    assert [n for n in range(count) if told([listed[n]]) != [f"{n} {text}"]] == [77]


# Reading.


def test_reading_one(long: MongoDBSessionRepository) -> None:
    for message_id in (0, 4, 5, 9, 10, 24, 25, 29):
        assert long.read_message("s", "agent", message_id) == said(message_id)
    assert long.read_message("s", "agent", 30) is None


def test_counting_loads_nothing(long: MongoDBSessionRepository, commands: CommandLog) -> None:
    commands.clear()
    assert long.get_message_count("s", "agent") == 30
    assert commands.names == ["find"]


def test_listing_asks_the_archive_only_for_what_is_there(long: MongoDBSessionRepository, commands: CommandLog) -> None:
    in_the_head = [(5, 25), (None, 25), (10, 40), (0, 0)]
    for limit, offset in [*in_the_head, (1, 24), (None, 0), (3, 7)]:
        commands.clear()
        assert told(long.list_messages("s", "agent", limit, offset)) == expected(30)[offset:][:limit]
        assert commands.names == ["find"] * (1 if (limit, offset) in in_the_head else 2), (limit, offset)


@given(limit=st.none() | st.integers(0, 40), offset=st.integers(0, 40))
def test_any_part_of_a_conversation_is_that_part_of_the_list(
    long: MongoDBSessionRepository, limit: int | None, offset: int
) -> None:
    assert long.list_messages("s", "agent", limit, offset) == [said(n) for n in range(30)][offset:][:limit]


def test_a_part_of_the_archive_that_is_missing_is_an_error(long: MongoDBSessionRepository, stored: Stored) -> None:
    archive_of(stored).delete_one({"_id.first": 5})
    with pytest.raises(DatabaseError, match="message 5 is missing"):
        long.list_messages("s", "agent")
    assert told(long.list_messages("s", "agent", offset=10)) == expected(30, 10)
    assert told(long.list_messages("s", "agent", limit=5)) == expected(5)


@pytest.mark.anyio
async def test_the_async_repository_reads_and_changes_the_same(
    long: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    async with AsyncMongoDBSessionRepository(server, database, **SMALL) as repository:
        assert told(await repository.list_messages("s", "agent", 20, 3)) == expected(23, 3)
        assert await repository.read_message("s", "agent", 7) == said(7)
        await repository.update_message("s", "agent", said(7, "changed"))
        assert told(await repository.list_messages("s", "agent", 2, 7)) == ["changed", "text 8"]
        assert await repository.get_message_count("s", "agent") == 30
        for message_id in range(30, 40):
            await repository.create_message("s", "agent", said(message_id))
    assert len(head(stored)["messages"]) <= 8  # closing waited for the last move
    assert everything(stored) == [*expected(7), "changed", *expected(40, 8)]


@pytest.mark.anyio
@pytest.mark.may_block  # PyMongo's asynchronous client looks for files of the machine when it connects
@pytest.mark.parametrize("client_class", [pymongo.AsyncMongoClient, AsyncIOMotorClient])
async def test_a_borrowed_client_of_either_driver_archives(
    server: str, database: str, stored: Stored, client_class: Any
) -> None:
    client = client_class(server)
    async with AsyncMongoDBSessionRepository(database_name=database, client=client, **SMALL) as repository:
        await repository.create_session(Session("s", "AGENT", MOMENT, MOMENT))
        await repository.create_agent("s", SessionAgent("agent", {}, {}, {}, MOMENT, MOMENT))
        for message_id in range(12):
            await repository.create_message("s", "agent", said(message_id))
        await repository.update_message("s", "agent", said(0, "changed"))
        assert told(await repository.list_messages("s", "agent")) == ["changed", *expected(12, 1)]
    assert len(head(stored)["messages"]) <= 8
    assert everything(stored) == ["changed", *expected(12, 1)]
    if client_class is pymongo.AsyncMongoClient:
        await client.close()
    else:
        await asyncio.to_thread(client.close)


@contextmanager
def examined(stored: Stored) -> Iterator[list[tuple[str, int]]]:
    """The collection of every command in the block, and how many documents the server examined for it."""
    database, found = stored.database, []
    database.command("profile", 2)
    try:
        yield found
    finally:
        database.command("profile", 0)
        of_commands = {"docsExamined": {"$exists": True}, "ns": {"$not": {"$regex": r"\.system\."}}}
        entries = list(database["system.profile"].find(of_commands))
        database["system.profile"].drop()
        found += [(entry["ns"].partition(".")[2], entry["docsExamined"]) for entry in entries]


def test_the_server_examines_no_more_of_a_longer_conversation(
    long: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    def new_date(repository: MongoDBSessionRepository) -> None:
        message = replace(said(0), created_at="2026-11-23T12:00:00+00:00")
        repository.update_message("s", "agent", message)

    uses: dict[str, Callable[[MongoDBSessionRepository], object]] = {
        "read": lambda repository: repository.read_message("s", "agent", 0),
        "read nothing": lambda repository: repository.read_message("s", "agent", 2000),
        "replace": lambda repository: repository.update_message("s", "agent", said(0, "new")),
        "replace with another date": new_date,
        "redact": lambda repository: repository.update_message("s", "agent", redacted(0)),
    }
    most = {}
    for name, use in uses.items():
        # A new one, which knows nothing about the session.
        with examined(stored) as commands, MongoDBSessionRepository(server, database, **SMALL) as repository:
            use(repository)
        assert "agent_sessions_archive" in {collection for collection, _ in commands}
        most[name] = max(count for _, count in commands)
    assert most == dict.fromkeys(uses, 1)


# Restoring.


def test_behind_a_window_one_command_restores_and_no_bucket_is_read(
    factory: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog
) -> None:
    manager = factory.create_session_manager("s", **SMALL)
    window = SlidingWindowConversationManager(window_size=4, per_turn=False)
    live = agent(manager, *[f"answer {n}" for n in range(8)], conversation_manager=window)
    for n in range(8):
        live(f"question {n}")
    settled(stored)
    eventually(lambda: commands.names.count("aggregate") == archive_of(stored).count_documents({}))
    manager.close()
    commands.clear()
    manager = factory.create_session_manager("s", **SMALL)
    restored = agent(manager, "answer", conversation_manager=SlidingWindowConversationManager(window_size=4))
    assert texts(restored.messages) == ["question 6", "answer 6", "question 7", "answer 7"]
    assert commands.names == ["findAndModify"]
    restored("question 8")
    assert everything(stored)[-3:] == ["answer 7", "question 8", "answer"]
    assert manager.get_message_count("agent") == 18
    assert texts([message.message for message in manager.list_messages("agent", 2)]) == ["question 0", "answer 0"]


def test_what_a_window_shows_stays_in_the_session_document(
    factory: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog
) -> None:
    """Half of what is allowed would be less than the window."""
    manager = factory.create_session_manager("s", max_embedded_bytes=20_000)
    window = SlidingWindowConversationManager(window_size=12, per_turn=False)
    live = agent(manager, *["answer " + "x" * 700] * 24, conversation_manager=window)
    for n in range(24):
        live(f"question {n} " + "x" * 700)
        eventually(lambda: not manager._connection._tasks)
        commands.clear()
        document = factory.create_session_manager("s")._repository._store.mover.head("s", "agent")
        assert commands.names == ["findAndModify"]
        assert document.size <= 20_000
    assert archive_of(stored).count_documents({}) > 2


def test_without_a_window_one_more_query_restores_all_agents(
    factory: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog
) -> None:
    said_by_all = [f"{kind} {n}" for n in range(6) for kind in ("question", "answer")]
    with factory.create_session_manager("s", **SMALL) as manager:
        for agent_id in ("one", "two"):
            replies = [f"answer {n}" for n in range(6)]
            live = agent(manager, *replies, agent_id=agent_id, conversation_manager=NullConversationManager())
            for n in range(6):
                live(f"question {n}")
            settled(stored, agent_id=agent_id)
            assert everything(stored, agent_id) == said_by_all
    commands.clear()
    with factory.create_session_manager("s", **SMALL) as manager:
        for agent_id in ("one", "two"):
            live = agent(manager, agent_id=agent_id, conversation_manager=NullConversationManager())
            assert texts(live.messages) == said_by_all
    assert commands.names == ["findAndModify", "find"]


def test_restoring_reads_the_buckets_above_the_offset_only(
    factory: MongoDBSessionManagerFactory, long: MongoDBSessionRepository, stored: Stored
) -> None:
    """Buckets below are not even there."""
    state = {"__name__": "SlidingWindowConversationManager", "removed_message_count": 12, "model_call_count": 0}
    stored.update_one({"_id": "s"}, {"$set": {"agents.agent.agent_data.conversation_manager_state": state}})
    archive_of(stored).delete_many({"_id.first": {"$lt": 10}})
    with factory.create_session_manager("s", **SMALL) as manager:
        restored = agent(manager, conversation_manager=SlidingWindowConversationManager(window_size=100))
        assert texts(restored.messages) == expected(30, 12)
    document = long.open_session("s")["agents"]["agent"]
    assert document["first"] == 12
    assert [message["message_id"] for message in document["messages"]] == list(range(12, 30))


def test_a_message_with_the_tracking_id_of_an_archived_one_replaces_nothing(
    long: MongoDBSessionRepository, stored: Stored
) -> None:
    work = UnitOfWork("s", long.open_session("s"))
    work.create_message("s", "agent", said(3, "again"))
    assert apply(long, "s", work.pending()) == {}
    assert everything(stored) == [*expected(30), "again"]


def test_an_update_by_the_tracking_id_of_an_archived_message_replaces_it(
    long: MongoDBSessionRepository, stored: Stored
) -> None:
    work = UnitOfWork("s", long.open_session("s"))
    work.record_replacement("agent", "t3", said(3, "changed").message)
    assert apply(long, "s", work.pending()) == {}
    assert everything(stored) == [*expected(3), "changed", *expected(30, 4)]


def test_an_open_session_remembers_a_bounded_number_of_tracking_ids() -> None:
    work = UnitOfWork("s", {"_id": "s", "agents": {}})
    work.create_agent("s", SessionAgent("agent", {}, {}, {}, MOMENT, MOMENT))
    for message_id in range(1500):
        work.create_message("s", "agent", said(message_id))
        work.settle(len(work.pending()), {})
    assert len(work._agents["agent"].message_ids) == 1024
    work.record_replacement("agent", "t1499", said(1499, "changed").message)
    (change,) = work.pending()
    assert change.message_id == 1499


def test_only_what_the_conversation_manager_has_left_is_loaded(long: MongoDBSessionRepository, stored: Stored) -> None:
    for removed in (0, 24, 25, 26, 29, 30, 2**40, -1, 1.5, "3", True, None):
        state = {"removed_message_count": removed}
        stored.update_one({"_id": "s"}, {"$set": {"agents.agent.agent_data.conversation_manager_state": state}})
        first = removed if type(removed) is int and 0 <= removed <= 30 else 0
        document = long.open_session("s")
        assert document["agents"]["agent"]["first"] == first
        assert [message["message_id"] for message in document["agents"]["agent"]["messages"]] == list(range(first, 30))
        work = UnitOfWork("s", document)
        assert told(work.list_messages("s", "agent", offset=first)) == expected(30, first)
        assert told(work.list_messages("s", "agent", limit=1, offset=first)) == expected(30, first)[:1]
        if first:
            with pytest.raises(MongoDBSessionError, match=f"the {first} oldest messages of agent 'agent'"):
                work.list_messages("s", "agent", offset=first - 1)


def test_a_session_that_was_deleted_does_not_come_back_in_one_of_the_same_id(
    long: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    stored.delete_one({"_id": "s"})
    long.create_session(Session("s", "AGENT", MOMENT, MOMENT))
    later = (datetime.fromisoformat(MOMENT) + timedelta(days=1)).isoformat()
    long.create_agent("s", SessionAgent("agent", {}, {}, {}, later, later))
    fresh = [f"new {n}" for n in range(20)]
    for n, text in enumerate(fresh):
        long.create_message("s", "agent", said(n, text))
        assert long.read_message("s", "agent", 0).message["content"] == [{"text": "new 0"}]
    settled(stored)
    assert told(long.list_messages("s", "agent")) == fresh
    assert texts(long.open_session("s")["agents"]["agent"]["messages"]) == fresh


# Changing what is archived.


def test_archived_messages_are_replaced(long: MongoDBSessionRepository, stored: Stored) -> None:
    wanted = expected(30)
    for message_id in (0, 4, 5, 24):
        long.update_message("s", "agent", said(message_id, f"changed {message_id}"))
        wanted[message_id] = f"changed {message_id}"
        assert everything(stored) == told(long.list_messages("s", "agent")) == wanted


def test_what_is_redacted_in_the_archive_is_gone(
    repository: MongoDBSessionRepository, stored: Stored, driver: Driver, database: str
) -> None:
    begin(repository)
    repository.create_message("s", "agent", said(0, SECRET))
    apply(repository, "s", appends(range(1, 20)))
    settled(stored)
    assert in_database(driver, database)
    repository.update_message("s", "agent", redacted(0))
    assert not in_database(driver, database)
    assert told(repository.list_messages("s", "agent", 2)) == ["[redacted]", "text 1"]


def test_a_guardrail_event_on_an_archived_message(long: MongoDBSessionRepository, stored: Stored) -> None:
    event = {"action": "BLOCKED", "timestamp": datetime(2026, 1, 1, tzinfo=UTC)}
    changes = [
        SetMessageFields("agent", 7, {"guardrail_event": event}),
        AddGuardrailEvent("agent", {**event, "message_id": 7, "agent_id": "agent"}),
    ]
    for _ in range(2):  # as after a lost acknowledgement
        assert apply(long, "s", changes) == {}
    assert stored.find_one()["guardrail_events"] == [{**event, "message_id": 7, "agent_id": "agent"}]
    bucket = archive_of(stored).find_one({"_id.first": 5})
    assert [message.get("guardrail_event") for message in bucket["messages"]] == [None, None, event, None, None]


def test_changes_in_the_archive_and_in_the_head_go_together(long: MongoDBSessionRepository, stored: Stored) -> None:
    work = UnitOfWork("s", long.open_session("s"))
    work.update_message("s", "agent", said(2, "old"))
    work.update_message("s", "agent", said(28, "new"))
    work.create_message("s", "agent", said(30))
    assert apply(long, "s", work.pending()) == {}
    wanted = expected(31)
    wanted[2], wanted[28] = "old", "new"
    assert everything(stored) == wanted


def test_a_refused_writer_changes_nothing_in_the_archive(long: MongoDBSessionRepository, stored: Stored) -> None:
    work = UnitOfWork("s", long.open_session("s"))
    append(long, 30)
    work.update_message("s", "agent", said(2, "stale"))
    work.create_message("s", "agent", said(30, "mine"))
    work.create_message("s", "agent", SessionMessage({**said(31).message, "tracking_id": "mine"}, 31))
    stored.update_one(
        {"_id": "s"},
        {"$set": {"agents.agent.messages.$[m].message.tracking_id": "theirs"}},
        array_filters=[{"m.message_id": 30}],
    )
    refused = apply(long, "s", work.pending())
    assert isinstance(refused["agent"], SessionConflictError)
    assert everything(stored) == expected(31)


def test_a_message_that_is_nowhere_is_not_found(long: MongoDBSessionRepository, stored: Stored) -> None:
    with pytest.raises(MessageNotFoundError):
        long.update_message("s", "agent", said(30))
    archive_of(stored).delete_one({"_id.first": 5})
    with pytest.raises(MessageNotFoundError):
        long.update_message("s", "agent", said(7))


def test_an_append_whose_acknowledgement_was_lost_is_known_in_the_archive(
    long: MongoDBSessionRepository, stored: Stored
) -> None:
    """The message was stored and archived before the writer asks again."""
    changes = [AppendMessage("agent", stored_message(said(n), n)) for n in range(28, 40)]
    assert apply(long, "s", changes[2:]) == {}
    eventually(lambda: head(stored)["archived"] > 30)
    settled(stored)
    assert apply(long, "s", changes[2:]) == {}
    assert everything(stored) == expected(40)


def test_the_newest_message_costs_no_look_into_the_archive(
    repository: MongoDBSessionRepository, stored: Stored, commands: CommandLog
) -> None:
    store_thirty(repository, stored)
    commands.clear()
    repository.update_message("s", "agent", redacted(29))
    assert commands.names == ["findAndModify"]
    commands.clear()
    repository.update_message("s", "agent", redacted(28))
    assert commands.names == ["findAndModify", "findAndModify"]
    assert everything(stored)[-2:] == ["[redacted]", "[redacted]"]
