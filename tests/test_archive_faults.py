"""Whatever stops the archive half way, or comes in between, no message is lost, doubled or brought back."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import bson
import pytest
from pymongo.errors import OperationFailure
from strands.types.session import Session, SessionAgent, SessionMessage

from fix_archive import (
    MOMENT,
    SECRET,
    SMALL,
    Driver,
    Other,
    Stored,
    append,
    appends,
    archive_of,
    begin,
    document_size,
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
    told,
)
from fix_overtaking import overtake
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    AsyncMongoDBSessionRepository,
    ConfigurationError,
    MessageTooLargeError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionConflictError,
    initialize_global_factory,
)
from mongodb_session_manager._format.buckets import MERGE_REFUSED
from mongodb_session_manager._format.changes import AppendMessage, ReplaceMessage
from mongodb_session_manager._format.documents import stored_message
from proxy import Proxy, command
from support import CommandLog, agent, alternating, apply, client_of, eventually, fail_point, texts

LOST = {
    "errorLabels": ["RetryableWriteError"],
    "writeConcernError": {"code": 6, "errmsg": "the write is done, its acknowledgement is lost"},
}
REFUSED = {"errorCode": 8000}
BROKEN = {"closeConnection": True}


Logged = tuple[MongoDBSessionRepository, CommandLog]


@pytest.fixture(scope="module")
def logged_repository(server: str, shared_database: str) -> Iterator[Logged]:
    log = CommandLog()
    with started(server, shared_database, log) as repository:
        yield repository, log


@pytest.fixture
def commands(request: pytest.FixtureRequest, commands: CommandLog, logged_repository: Logged) -> CommandLog:
    """The commands of the factory, or of the repository."""
    return commands if "factory" in request.fixturenames else logged_repository[1]


@pytest.fixture
def repository(database: str, logged_repository: Logged) -> Iterator[MongoDBSessionRepository]:
    """A repository that archives nothing of the short conversations here."""
    repository = logged_repository[0]
    yield repository
    idle(repository)


@pytest.fixture(scope="module")
def shared_archiving(server: str, shared_database: str) -> Iterator[MongoDBSessionRepository]:
    with MongoDBSessionRepository(server, shared_database, **SMALL) as repository:
        yield repository


@pytest.fixture
def archiving(database: str, shared_archiving: MongoDBSessionRepository) -> Iterator[MongoDBSessionRepository]:
    yield shared_archiving
    idle(shared_archiving)


# Crashes between the two commands.


def test_a_move_that_stopped_half_way_is_invisible(
    repository: MongoDBSessionRepository, archiving: MongoDBSessionRepository, stored: Stored
) -> None:
    begin(repository)
    apply(repository, "s", appends(range(20)))
    Other(stored).merge()
    assert archive_of(stored).count_documents({}) == 1
    assert told(archiving.list_messages("s", "agent")) == expected(20)
    assert archiving.get_message_count("s", "agent") == 20
    assert texts(archiving.open_session("s")["agents"]["agent"]["messages"]) == expected(20)
    append(archiving, *range(20, 30))
    settled(stored)
    assert everything(stored) == told(archiving.list_messages("s", "agent")) == expected(30)


def test_the_next_move_replaces_what_one_that_stopped_has_left(
    repository: MongoDBSessionRepository, archiving: MongoDBSessionRepository, stored: Stored, driver: Driver
) -> None:
    begin(repository)
    apply(repository, "s", appends(range(20)))
    Other(stored).merge()
    repository.update_message("s", "agent", said(19, "changed"))  # so the half that moves next is another one
    append(repository, *range(20, 25))
    append(archiving, 25)
    settled(stored)
    assert everything(stored) == [*expected(19), "changed", *expected(26, 20)]
    buckets = list(archive_of(stored).find())
    assert sum(len(bucket["messages"]) for bucket in buckets) == head(stored)["archived"]


@pytest.mark.parametrize("message_id", [0, 5, 15, 19])
def test_what_is_redacted_in_the_head_is_in_no_bucket_of_a_move_that_stopped(
    repository: MongoDBSessionRepository, stored: Stored, driver: Driver, database: str, message_id: int
) -> None:
    begin(repository)
    apply(repository, "s", appends(range(20)))
    repository.update_message("s", "agent", said(message_id, SECRET))
    other = Other(stored)
    other.merge()
    repository.update_message("s", "agent", redacted(message_id))
    assert not in_database(driver, database)
    assert not other.cut()
    wanted = expected(20)
    wanted[message_id] = "[redacted]"
    assert told(repository.list_messages("s", "agent")) == wanted


def test_a_copy_that_comes_late_does_not_bring_back_what_was_redacted(
    repository: MongoDBSessionRepository, stored: Stored, driver: Driver, database: str
) -> None:
    """A copy reads the head and is then stuck; somebody else does the same move; then the message is redacted."""
    begin(repository)
    repository.create_message("s", "agent", said(0, SECRET))
    apply(repository, "s", appends(range(1, 20)))
    before = head(stored)
    first, second = Other(stored), Other(stored)
    second.merge()
    assert second.cut()
    repository.update_message("s", "agent", redacted(0))
    # What the stuck copy has read is put back for it to read.
    after = stored.find_one({"_id": "s"})
    stored.update_one({"_id": "s"}, {"$set": {"agents.agent": before}})
    with pytest.raises(OperationFailure) as refused:
        first.merge()
    assert refused.value.code == MERGE_REFUSED
    stored.replace_one({"_id": "s"}, after)
    assert not first.cut()
    assert not in_database(driver, database)
    assert everything(stored) == ["[redacted]", *expected(20, 1)]


@pytest.mark.parametrize("first_cuts", [True, False])
def test_two_that_move_unlike_halves_lose_nothing(
    repository: MongoDBSessionRepository, stored: Stored, first_cuts: bool
) -> None:
    begin(repository)
    apply(repository, "s", appends(range(20)))
    first, second = Other(stored, 8), Other(stored, 16)
    first.merge()
    with pytest.raises(OperationFailure) as refused:
        second.merge()
    assert refused.value.code == MERGE_REFUSED
    if first_cuts:
        assert first.cut()
    assert everything(stored) == expected(20)
    assert told(repository.list_messages("s", "agent")) == expected(20)


def test_two_that_move_the_same_move_it_once(repository: MongoDBSessionRepository, stored: Stored) -> None:
    begin(repository)
    apply(repository, "s", appends(range(20)))
    first, second = Other(stored), Other(stored)
    first.merge()
    second.merge()
    assert second.cut()
    assert not first.cut()
    assert everything(stored) == expected(20)


def test_a_left_over_of_a_higher_revision_is_outrun(archiving: MongoDBSessionRepository, stored: Stored) -> None:
    """As when the sessions were restored from an older backup than the archive."""
    begin(archiving)
    append(archiving, *range(8))
    _id = {"incarnation": stored.find_one()["incarnation"], "agent": "agent", "first": 0}
    left_over = {"_id": _id, "session_id": "s", "revision": 70, "last": 2, "messages": []}
    archive_of(stored).insert_one(left_over)
    append(archiving, 8)
    settled(stored)
    assert head(stored)["revision"] > 70
    assert everything(stored) == told(archiving.list_messages("s", "agent")) == expected(9)


def test_an_append_between_the_two_commands_stays(repository: MongoDBSessionRepository, stored: Stored) -> None:
    begin(repository)
    apply(repository, "s", appends(range(20)))
    other = Other(stored)
    other.merge()
    append(repository, 20, 21)
    assert other.cut()
    assert everything(stored) == told(repository.list_messages("s", "agent")) == expected(22)


def test_a_message_that_moves_while_it_is_replaced_is_replaced(
    repository: MongoDBSessionRepository, stored: Stored, commands: CommandLog
) -> None:
    """The replacement knows the head as it was before the move."""
    begin(repository)
    apply(repository, "s", appends(range(20)))
    other = Other(stored)
    other.merge()
    assert other.cut()
    commands.clear()
    repository.update_message("s", "agent", said(3, "changed"))
    assert everything(stored) == [*expected(3), "changed", *expected(20, 4)]
    # Are there attachments? The head has it not; nor is the session to be renewed; it is looked for.
    # It is not in the head; the session is the same; it is looked for, changed, and the change is counted.
    assert commands.names == ["findAndModify", "find", "find", "find", "update", "findAndModify", "update"]


# Commands that fail.


Place = tuple[str, Stored, MongoDBSessionRepository]


@pytest.fixture(scope="module")
def places(embedded: str, standalone: str) -> Iterator[dict[str, Place]]:
    """The connection string, sessions and repository, the application `archiving`, on each of the two servers."""
    name = f"test_{uuid.uuid4().hex}"
    with contextlib.ExitStack() as stack:
        found = {}
        for where, uri in (("embedded", embedded), ("standalone", standalone)):
            client, log = stack.enter_context(client_of(uri)), CommandLog()
            stack.callback(client.drop_database, name)
            archiving = MongoDBSessionRepository(uri, name, appname="archiving", event_listeners=[log], **SMALL)
            stack.enter_context(archiving).list_sessions()
            log.wait_for_start()
            found[where] = (uri, client[name]["agent_sessions"], archiving)
        yield found


@pytest.fixture(params=alternating("embedded", "standalone"))
def place(request: pytest.FixtureRequest, places: dict[str, Place]) -> Place:
    """One of the places, without sessions."""
    uri, stored, archiving = places[request.param]
    return uri, emptied(stored), archiving


@pytest.mark.parametrize("failing", alternating("aggregate", "findAndModify"))
@pytest.mark.parametrize("failure", alternating(REFUSED, BROKEN, LOST), ids=["refused", "broken", "lost"])
@pytest.mark.parametrize("times", alternating(1, 50))
def test_whatever_fails_the_conversation_goes_on_and_the_next_append_moves(
    place: Place, failing: str, failure: dict[str, Any], times: int, caplog: pytest.LogCaptureFixture
) -> None:
    uri, stored, repository = place
    begin(repository)
    repository.create_message("s", "agent", said(0, SECRET))
    apply(repository, "s", appends(range(1, 8)))
    with fail_point(uri, failCommands=[failing], times=times, appName="archiving", **failure):
        append(repository, 8)
        append(repository, 9)
        assert repository.get_message_count("s", "agent") == 10
        assert told(repository.list_messages("s", "agent")) == [SECRET, *expected(10, 1)]
    idle(repository)
    append(repository, 10)
    settled(stored)
    assert told(repository.list_messages("s", "agent")) == [SECRET, *expected(11, 1)]
    assert everything(stored) == [SECRET, *expected(11, 1)]
    idle(repository)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("lost", alternating("aggregate", "findAndModify"))
def test_a_move_whose_acknowledgement_is_lost_is_done_once(place: Place, lost: str) -> None:
    uri, stored, _ = place
    with Proxy(uri) as proxy, MongoDBSessionRepository(proxy.uri, stored.database.name, **SMALL) as repository:
        begin(repository)
        apply(repository, "s", appends(range(8)))
        idle(repository)
        proxy.drop_after_request(command(lost))
        append(repository, 8)
        settled(stored)
        idle(repository)
        assert proxy.dropped == 1
        assert head(stored)["archived"] == 5
        assert everything(stored) == told(repository.list_messages("s", "agent")) == expected(9)


def test_who_may_not_write_the_archive_keeps_everything_in_the_session(
    archiving: MongoDBSessionRepository, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    stored.database.command("collMod", "agent_sessions_archive", validator={"never": {"$exists": True}})
    try:
        begin(archiving)
        append(archiving, *range(12))
        idle(archiving)
    finally:
        stored.database.command("collMod", "agent_sessions_archive", validator={})
    assert told(archiving.list_messages("s", "agent")) == expected(12)
    assert len(head(stored)["messages"]) == 12
    assert "old messages not moved, the next append tries again" in caplog.text
    assert {record.levelno for record in caplog.records if "old messages" in record.message} == {logging.WARNING}
    append(archiving, 12)
    settled(stored)
    assert everything(stored) == expected(13)


@pytest.mark.parametrize("slow", ["aggregate", "findAndModify"])
def test_a_writer_does_not_outrun_a_slow_archive(places: dict[str, Place], slow: str) -> None:
    uri, stored, repository = places["embedded"]
    emptied(stored)
    begin(repository)
    delay = {"blockConnection": True, "blockTimeMS": 100, "appName": "archiving", "times": 1000}
    with fail_point(uri, failCommands=[slow], **delay):
        for message_id in range(35):
            append(repository, message_id)
            assert len(head(stored)["messages"]) <= 17
    settled(stored)
    assert everything(stored) == expected(35)


# Concurrency.


@pytest.mark.anyio
async def test_who_is_overtaken_in_between_changes_nothing_in_the_archive(
    server: str, database: str, stored: Stored
) -> None:
    async def overtaking() -> None:
        """Write just before the repository sends something again."""
        theirs = SessionMessage(said(20, "theirs").message | {"tracking_id": "x"}, 20)
        async with AsyncMongoDBSessionRepository(server, database) as other:
            with contextlib.suppress(SessionConflictError):
                await other.create_message("s", "agent", theirs)

    async with AsyncMongoDBSessionRepository(server, database, **SMALL) as repository:
        overtake(repository._store.archive, "find_archived", overtaking, after=True)
        await repository.create_session(Session("s", "AGENT", MOMENT, MOMENT))
        await repository.create_agent("s", SessionAgent("agent", {}, {}, {}, MOMENT, MOMENT))
        assert await repository._apply("s", appends(range(20))) == {}
        await asyncio.to_thread(eventually, lambda: head(stored).get("archived", 0) > 3)
        changes = [
            ReplaceMessage("agent", 3, {"message": said(3, "stale").message, "updated_at": OLD}),
            AppendMessage("agent", stored_message(said(20), 20)),
        ]
        refused = await repository._apply("s", changes)
    assert isinstance(refused["agent"], SessionConflictError)
    assert everything(stored) == [*expected(20), "theirs"]


@pytest.mark.anyio
async def test_an_append_while_the_head_is_read_starts_a_move(server: str, database: str, stored: Stored) -> None:
    """The read has not seen it, and no later append follows."""
    async with AsyncMongoDBSessionRepository(server, database) as other:
        await other.create_session(Session("s", "AGENT", MOMENT, MOMENT))
        await other.create_agent("s", SessionAgent("agent", {}, {}, {}, MOMENT, MOMENT))
    async with AsyncMongoDBSessionRepository(server, database, **SMALL) as repository:
        mover, batches = repository._store.mover, iter([appends(range(1, 20))])

        async def append_once() -> None:
            for batch in batches:
                assert await repository._apply("s", batch) == {}

        mover._collection = copy.copy(mover._collection)
        overtake(mover._collection, "find_one", append_once, after=True)
        await repository.create_message("s", "agent", said(0))
        await asyncio.to_thread(eventually, lambda: head(stored).get("archived", 0) > 0)
    assert everything(stored) == expected(20)


def test_appending_replacing_redacting_and_reading_while_everything_moves(
    request: pytest.FixtureRequest, server: str, database: str, stored: Stored
) -> None:
    """One writer appends; others, from other processes' view, replace and read all the time."""
    total = 300 if request.config.getoption("full_adversity") else 40
    with (
        MongoDBSessionRepository(server, database, max_embedded_messages=4) as writer,
        MongoDBSessionRepository(server, database, max_embedded_messages=6) as changer,
        MongoDBSessionRepository(server, database, max_embedded_messages=4) as reader,
        ThreadPoolExecutor(3) as threads,
    ):
        begin(writer)
        append(writer, 0)
        appended, done = [1], threading.Event()
        changed: dict[int, str] = {}

        def change() -> None:
            order = random.Random(7)
            while not done.is_set():
                message_id = order.choice([order.randrange(appended[0]), max(0, appended[0] - order.randrange(1, 6))])
                text = f"changed {order.random()}"
                changer.update_message("s", "agent", said(message_id, text))
                changed[message_id] = text

        def read() -> None:
            while not done.is_set():
                before = appended[0]
                messages = reader.list_messages("s", "agent")
                assert [message.message_id for message in messages] == list(range(len(messages)))
                assert len(messages) >= before
                assert reader.get_message_count("s", "agent") >= len(messages)
                assert reader.read_message("s", "agent", before - 1).message_id == before - 1

        work = [threads.submit(change), threads.submit(read)]
        for message_id in range(1, total):
            append(writer, message_id)
            appended[0] = message_id + 1
        done.set()
        for future in work:
            future.result()
        settled(stored, 4)
        wanted = [changed.get(n, f"text {n}") for n in range(total)]
        assert told(reader.list_messages("s", "agent")) == wanted
    assert everything(stored) == wanted
    assert head(stored)["archived"] >= total - 4


def test_two_writers_of_a_long_session_are_exact(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    winners, losers = (factory.create_session_manager("s", **SMALL) for _ in range(2))
    winner, loser = agent(winners, *[f"w{n}" for n in range(6)]), agent(losers, "l")
    for n in range(6):
        winner(f"q{n}")
    with pytest.raises(SessionConflictError):
        loser("mine")
    settled(stored)
    assert everything(stored) == [text for n in range(6) for text in (f"q{n}", f"w{n}")]


# What it costs.


def test_the_archive_costs_nothing_until_it_acts_and_two_commands_then(
    factory: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog
) -> None:
    manager = factory.create_session_manager("s", max_embedded_messages=6)
    live = agent(manager, *["answer"] * 13)
    for _ in range(3):
        live("question")
    assert commands.names == ["findAndModify"] + ["update"] * 6
    for _ in range(10):
        live("question")
    settled(stored, 6)
    eventually(lambda: commands.names.count("findAndModify") == 1 + archive_of(stored).count_documents({}))
    moves = archive_of(stored).count_documents({})
    assert 3 <= moves <= 6
    assert sorted(commands.names) == sorted(
        ["findAndModify"] + ["update"] * 26 + ["aggregate", "findAndModify"] * moves
    )


def test_a_manager_per_turn_archives_too(server: str, database: str, stored: Stored) -> None:
    """Closing waits for the move that the last append has begun."""
    for n in range(4):
        with MongoDBSessionManager("s", server, database, max_embedded_messages=4) as manager:
            agent(manager, "answer")(f"question {n}")
        assert len(head(stored)["messages"]) <= 4
    assert len(everything(stored)) == 8


# Documents of the original.

OLD = datetime(2024, 11, 5, tzinfo=UTC)
OLD_MANAGER = {"__name__": "SlidingWindowConversationManager", "removed_message_count": 0, "model_call_count": 0}


def old_document(texts: list[str], *, ids: bool = True) -> dict[str, Any]:
    messages = [
        {
            "message": {"role": ("user", "assistant")[n % 2], "content": [{"text": text}]},
            **({"message_id": n} if ids else {}),
            "redact_message": None,
            "created_at": OLD,
            "updated_at": OLD,
        }
        for n, text in enumerate(texts)
    ]
    return {
        "_id": "s",
        "session_id": "s",
        "application_name": None,
        "session_type": "AGENT",
        "created_at": OLD,
        "updated_at": OLD,
        "metadata": {},
        "feedbacks": [],
        "guardrail_events": [],
        "agents": {
            "agent": {
                "agent_data": {"agent_id": "agent", "state": {}, "conversation_manager_state": OLD_MANAGER},
                "created_at": OLD,
                "updated_at": OLD,
                "messages": messages,
            }
        },
        "session_viewer_password": "correct horse",
    }


def test_five_megabytes_come_under_the_bound_with_the_first_append(
    repository: MongoDBSessionRepository, stored: Stored, commands: CommandLog
) -> None:
    old = [f"{n} " + "x" * 4000 for n in range(1250)]
    stored.insert_one(old_document(old))
    assert document_size(stored) > 5_000_000
    repository.open_session("s")
    commands.clear()
    repository.create_message("s", "agent", said(1250))
    idle(repository)
    assert document_size(stored) < 300_000
    assert commands.names.count("aggregate") <= 6
    assert repository.get_message_count("s", "agent") == 1251
    assert everything(stored) == [*old, "text 1250"]
    assert max(len(bson.encode(bucket)) for bucket in archive_of(stored).find()) < 2_200_000
    assert stored.find_one({"_id": "s"})["session_viewer_password"] == "correct horse"


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("room", alternating(10, 5_000))
def test_a_document_without_room_gets_some(repository: MongoDBSessionRepository, stored: Stored, room: int) -> None:
    """Its messages take 4 MB of it."""
    old = [f"{n} " + "x" * 40_000 for n in range(100)]
    document = old_document(old)
    document["filler"] = "z" * (16 * 1024 * 1024 - len(bson.encode(document)) - room - 13)
    stored.insert_one(document)
    repository.open_session("s")
    for message_id, text in ((100, "question " + "a" * 3_000_000), (101, "answer " + "b" * 3_000_000)):
        repository.create_message("s", "agent", said(message_id, text))
    idle(repository)
    assert document_size(stored) < len(document["filler"]) + 3_100_000
    after = everything(stored)
    assert [text[:8] for text in after[-2:]] == ["question", "answer b"]
    assert after[:-2] == old


def test_a_message_that_fits_in_no_document_is_refused_and_moves_nothing(
    factory: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog
) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, "one", "two", "three")
    live("hello")
    with pytest.raises(MessageTooLargeError):
        live("x" * 17_000_000)
    assert "aggregate" not in commands.names
    assert everything(stored) == ["hello", "one"]


@pytest.mark.usefixtures("large")
def test_many_agents_in_a_document_without_room(repository: MongoDBSessionRepository, stored: Stored) -> None:
    """Each of them is within its limits."""
    document = old_document([])
    for n in range(70):
        messages = old_document([f"{n} {i} " + "x" * 11_000 for i in range(21)])["agents"]["agent"]["messages"]
        document["agents"][f"a{n}"] = {
            **document["agents"]["agent"],
            "next_message_id": 21,
            "messages": messages,
        }
    stored.insert_one(document)
    assert 16_000_000 < document_size(stored) < 16 * 1024 * 1024
    repository.create_message("s", "a3", said(21, "y" * 900_000))
    assert document_size(stored) < 16 * 1024 * 1024
    assert len(repository.list_messages("s", "a3")) == 22
    for n in (0, 3, 4, 69):
        assert [text.split("x")[0] for text in everything(stored, f"a{n}")][:21] == [f"{n} {i} " for i in range(21)]


def test_messages_without_ids_have_their_positions(archiving: MongoDBSessionRepository, stored: Stored) -> None:
    stored.insert_one(old_document([f"text {n}" for n in range(20)], ids=False))
    archiving.open_session("s")
    append(archiving, 20)
    settled(stored)
    archiving.update_message("s", "agent", said(3, "changed"))
    archiving.update_message("s", "agent", said(19, "changed too"))
    wanted = [*expected(3), "changed", *expected(19, 4), "changed too", "text 20"]
    assert everything(stored) == told(archiving.list_messages("s", "agent")) == wanted
    assert [message.message_id for message in archiving.list_messages("s", "agent")] == list(range(21))


def test_ids_with_gaps_and_doubles_are_found_and_nothing_is_lost(
    archiving: MongoDBSessionRepository, stored: Stored
) -> None:
    document = old_document([f"text {n}" for n in range(12)])
    for message, message_id in zip(
        document["agents"]["agent"]["messages"], [4, 4, 9, 9, 10, 2000, 2001, 2002, 2003, 2004, 2005, 2006], strict=True
    ):
        message["message_id"] = message_id
    stored.insert_one(document)
    archiving.open_session("s")
    archiving.create_message("s", "agent", said(2007, "new"))
    settled(stored)
    assert head(stored)["archived"] > 6
    assert everything(stored) == told(archiving.list_messages("s", "agent")) == [*expected(12), "new"]
    archiving.update_message("s", "agent", said(2000, "changed"))
    assert archiving.read_message("s", "agent", 2000).to_message()["content"] == [{"text": "changed"}]
    assert told(archiving.list_messages("s", "agent", 3, 4)) == ["text 4", "changed", "text 6"]


# Options.


@pytest.mark.parametrize(
    "make",
    [
        lambda server, factory, **options: MongoDBSessionRepository(server, **options),
        lambda server, factory, **options: MongoDBSessionManager("s", server, **options),
        lambda server, factory, **options: AsyncMongoDBSessionManager("s", server, **options),
        lambda server, factory, **options: MongoDBSessionManagerFactory(server, **options),
        lambda server, factory, **options: initialize_global_factory(server, **options),
        lambda server, factory, **options: factory.create_session_manager("s", **options),
    ],
    ids=["repository", "manager", "async manager", "factory", "global factory", "override"],
)
def test_limits_that_cannot_be_are_refused(
    server: str, factory: MongoDBSessionManagerFactory, make: Callable[..., Any]
) -> None:
    wrong: list[Any] = [0, -1, 1.5, "128", True]
    for name, values in (("max_embedded_messages", wrong), ("max_embedded_bytes", [*wrong, 2**40])):
        for value in values:
            with pytest.raises(ConfigurationError, match=name):
                make(server, factory, **{name: value})


def test_limits_of_a_factory_hold_unless_overridden(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionManagerFactory(server, database, max_embedded_messages=4) as factory:
        for session_id, options in (("s", {}), ("t", {"max_embedded_messages": 100})):
            with factory.create_session_manager(session_id, **options) as manager:
                live = agent(manager, *["answer"] * 3)
                for _ in range(3):
                    live("question")
    assert len(head(stored)["messages"]) <= 4
    assert len(stored.find_one({"_id": "t"})["agents"]["agent"]["messages"]) == 6
