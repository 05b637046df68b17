"""A session is written back into one document, which the original restores, and nothing is lost on the way."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
from strands.types.session import Session, SessionAgent, SessionMessage

from fix_archive import (
    FIVES,
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
    store_again,
    told,
)
from fix_attachments import CHUNKS, FILES
from fix_overtaking import overtake
from fix_rollback import as_1_0_0, picture, restored_by_the_original
from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    AttachmentError,
    DatabaseError,
    InvalidArgumentError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionNotFoundError,
    StateTooLargeError,
)
from mongodb_session_manager._copying.write_back import WriteBack
from mongodb_session_manager._format.changes import ReplaceMessage
from mongodb_session_manager._format.layout import Place
from proxy import Proxy, command
from support import CommandLog, agent, apply, client_of, sampled, texts

LIMITS: dict[str, Any] = {**SMALL, "max_inline_attachment_bytes": 100}
WITH_PICTURES = (2, 17, 29)
COMMANDS = ["find", "getMore", "update", "findAndModify", "delete", "aggregate"]


def shown(message_id: int, size: int = 5000) -> SessionMessage:
    message = said(message_id)
    message.message["content"] = [{"text": f"text {message_id}"}, *picture(size + message_id)[1:]]
    return message


def fill(repository: MongoDBSessionRepository, stored: Stored) -> None:
    """Store two agents of 30 messages each, most of them in several buckets; some have attachments."""
    begin(repository)
    repository.create_agent("s", SessionAgent("an.other", {}, {}, {}, MOMENT, MOMENT))
    for part in FIVES:
        apply(repository, "s", [*appends(part), *appends(part, agent_id="an.other")])
        settled(stored)
        settled(stored, agent_id="an.other")
    for message_id in WITH_PICTURES:
        repository.update_message("s", "agent", shown(message_id))
    for message_id in (4, 28):
        repository.update_message("s", "agent", redacted(message_id))
    idle(repository)
    assert archive_of(stored).count_documents({}) >= 8


COLLECTIONS = ("agent_sessions", "agent_sessions_archive", FILES, CHUNKS)


@pytest.fixture(scope="module")
def repository_options() -> dict[str, Any]:
    return LIMITS


@pytest.fixture(scope="module")
def documents(
    shared_repository: MongoDBSessionRepository, shared_database: str, driver: Driver
) -> dict[str, list[Any]]:
    """The documents that `fill` has stored, by collection."""
    stored = emptied(driver[shared_database]["agent_sessions"])
    fill(shared_repository, stored)
    return documents_of(stored)


WANTED = [*expected(4), "[redacted]", *expected(28, 5), "[redacted]", "text 29"]


@pytest.fixture(scope="module")
def back(server: str, shared_database: str) -> Iterator[MongoDBSessionRepository]:
    """Another process, which archives nothing here."""
    with MongoDBSessionRepository(server, shared_database) as repository:
        yield repository


@pytest.fixture
def filled(
    documents: dict[str, list[Any]], repository: MongoDBSessionRepository, stored: Stored
) -> MongoDBSessionRepository:
    store_again(stored, documents)
    return repository


def counts(stored: Stored) -> list[int]:
    """How many buckets, files and chunks there are."""
    return [stored.database[name].count_documents({}) for name in ("agent_sessions_archive", FILES, CHUNKS)]


def assert_in_one_document(stored: Stored, wanted: list[str] = WANTED) -> None:
    for agent_id, key, expected_texts in (("agent", "agent", wanted), ("an.other", "an%2Eother", expected(30))):
        _, messages = restored_by_the_original(stored, key)
        assert told(messages) == expected_texts
        assert [message.message_id for message in messages] == list(range(len(messages)))
        found = head(stored, agent_id)
        assert found.keys() & {"archived", "archive_revision", "stale_below"} == set()
    for message_id in WITH_PICTURES:
        content = head(stored)["messages"][message_id]["message"]["content"]
        assert content[1]["image"]["source"]["bytes"] == b"x" * (5000 + message_id)
    assert counts(stored) == [0, 0, 0]


# What is stored afterwards.


def test_the_original_restores_a_long_session_that_was_written_back(
    filled: MongoDBSessionRepository, stored: Stored, driver: Driver, database: str
) -> None:
    before = stored.find_one({"_id": "s"})
    filled.write_back("s")
    assert_in_one_document(stored)
    assert not in_database(driver, database)
    after = stored.find_one({"_id": "s"})
    for document in (before, after):
        for stored_agent in document["agents"].values():
            for name in ("messages", "archived", "revision", "archive_revision"):
                stored_agent.pop(name, None)
    assert after == before


@pytest.mark.parametrize("is_async", [False, True], ids=["factory", "factory, async"])
@pytest.mark.usefixtures("filled")
def test_a_factory_writes_a_session_back(factory: MongoDBSessionManagerFactory, stored: Stored, is_async: bool) -> None:
    if is_async:
        assert asyncio.run(factory.write_back_async("s")) is None  # type: ignore[func-returns-value]
    else:
        assert factory.write_back("s") is None  # type: ignore[func-returns-value]
    assert_in_one_document(stored)
    with factory.create_session_manager("s") as manager:
        assert texts(agent(manager).messages) == WANTED


@pytest.mark.anyio
async def test_an_asynchronous_repository_writes_a_session_back(
    filled: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    async with AsyncMongoDBSessionRepository(server, database) as repository:
        await repository.write_back("s")
    assert_in_one_document(stored)


def test_writing_back_again_changes_nothing(filled: MongoDBSessionRepository, stored: Stored) -> None:
    filled.write_back("s")
    before = stored.find_one({"_id": "s"})
    filled.write_back("s")
    assert stored.find_one({"_id": "s"}) == before


@pytest.mark.own_factory
def test_a_short_session_stays_as_it_is_and_costs_four_reads(
    factory: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog
) -> None:
    with factory.create_session_manager("s") as manager:
        agent(manager, "answer")("question")
    before = stored.find_one({"_id": "s"})
    commands.clear()
    factory.write_back("s")
    assert commands.names == ["find"] * 4
    assert stored.find_one({"_id": "s"}) == before


def test_what_1_0_0_has_stored_in_other_places_moves(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    with factory.create_session_manager("s", **SMALL) as manager:
        live = agent(manager, *["answer"] * 8)
        for n in range(8):
            live(f"question {n}")
        manager.update_agent_config("agent", model="better")
        usage, config = manager.get_usage(), manager.get_agent_config("agent")
    settled(stored)
    as_1_0_0(stored)
    for bucket in archive_of(stored).find():
        for message in bucket["messages"]:
            if own := message.get("event_loop_metrics", {}).pop("message_usage", None):
                message["usage"] = own
        archive_of(stored).replace_one({"_id": bucket["_id"]}, bucket)
    repository.write_back("s")
    _, messages = restored_by_the_original(stored)
    assert len(messages) == 16
    answers = head(stored)["messages"][1::2]
    assert all(answer["event_loop_metrics"]["message_usage"]["totalTokens"] > 0 for answer in answers)
    assert repository.get_usage("s") == usage
    assert repository.get_agent_config("s", "agent") == config
    repository.fork_session("s", "fork", 3)
    assert repository.get_usage("fork")["total"]["invocations"] == 2


def test_buckets_that_1_0_0_has_not_removed_are_removed(
    filled: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    """It was interrupted after it had written the session back."""
    filled.write_back("s")
    session = stored.find_one({"_id": "s"})
    old_id = {"session_id": "s", "agent": "agent", "since": head(stored)["created_at"], "first": 0}
    bucket = {"session_id": "s", "revision": 1, "last": 0, "messages": session["agents"]["agent"]["messages"][:1]}
    archive_of(stored).insert_one({"_id": old_id, **bucket})
    del session["incarnation"]
    session["agents"]["agent"]["stale_below"] = 9000
    session["agents"]["agent"]["revision"] = 9000
    stored.replace_one({"_id": "s"}, session)
    with MongoDBSessionRepository(server, database, **LIMITS) as repository:
        append(repository, 30)
        settled(stored)
        assert told(repository.list_messages("s", "agent")) == [*WANTED, "text 30"]
    assert archive_of(stored).count_documents({"_id.session_id": "s"}) == 0
    assert everything(stored) == [*WANTED, "text 30"]


def test_this_version_goes_on_and_archives_again(
    filled: MongoDBSessionRepository, back: MongoDBSessionRepository, stored: Stored
) -> None:
    filled.write_back("s")
    append(filled, 30)
    settled(stored)
    assert everything(stored) == told(filled.list_messages("s", "agent")) == [*WANTED, "text 30"]
    for message_id in range(31, 50):
        append(filled, message_id)
        settled(stored)
    filled.update_message("s", "agent", said(7, "changed"))
    wanted = [*WANTED[:7], "changed", *WANTED[8:], *expected(50, 30)]
    assert everything(stored) == told(back.list_messages("s", "agent")) == wanted
    back.write_back("s")
    assert everything(stored) == told(back.list_messages("s", "agent")) == wanted
    assert counts(stored) == [0, 0, 0]


def test_a_session_that_expires_still_does(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionRepository(server, database, session_ttl=timedelta(days=1), **LIMITS) as repository:
        fill(repository, stored)
        updated_at = stored.find_one({"_id": "s"})["updated_at"]
        repository.write_back("s")
        assert_in_one_document(stored)
        assert stored.find_one({"_id": "s"})["updated_at"] == updated_at
        append(repository, *range(30, 40))
        settled(stored)
        assert all("expires_at" in bucket for bucket in archive_of(stored).find())


# What cannot be written back.


def test_a_session_that_does_not_exist(repository: MongoDBSessionRepository) -> None:
    with pytest.raises(SessionNotFoundError, match="'s'"):
        repository.write_back("s")
    with pytest.raises(InvalidArgumentError):
        repository.write_back({"$ne": ""})  # type: ignore[arg-type]


def everything_stored(stored: Stored) -> list[Any]:
    return [list(stored.database[name].find(sort=[("_id", 1)])) for name in COLLECTIONS]


def test_a_session_that_does_not_fit_is_refused_and_stays(filled: MongoDBSessionRepository, stored: Stored) -> None:
    filled.create_message("s", "agent", said(30, "x" * 8_500_000))
    filled.create_message("s", "agent", shown(31, 8_500_000))
    idle(filled)
    before = everything_stored(stored)
    with pytest.raises(StateTooLargeError, match=r"'s'.* would take 170\d{5} bytes.* 16777216"):
        filled.write_back("s")
    assert everything_stored(stored) == before


@pytest.mark.usefixtures("large")
def test_the_size_is_known_to_the_byte(filled: MongoDBSessionRepository, stored: Stored) -> None:
    archived = head(stored)["archived"]
    archive_of(stored).update_many({"_id.agent": "agent"}, {"$set": {"messages.$[].latency_ms": "x" * 600_000}})
    stored.update_one({"_id": "s"}, {"$set": {"filler": "z" * 2_000_000}})
    with pytest.raises(StateTooLargeError) as refused:
        filled.write_back("s")
    size = int(str(refused.value).partition("would take ")[2].partition(" ")[0])
    assert head(stored)["archived"] == archived
    stored.update_one({"_id": "s"}, {"$set": {"filler": "z" * (2_000_000 - size + 16 * 1024 * 1024)}})
    filled.write_back("s")
    assert 0 < 16 * 1024 * 1024 - document_size(stored) < 500  # the list of the attachments that are now removed
    assert told(restored_by_the_original(stored)[1]) == WANTED
    assert counts(stored) == [0, 0, 0]


def test_a_missing_bucket_or_attachment_is_an_error_and_changes_nothing(
    filled: MongoDBSessionRepository, stored: Stored
) -> None:
    lost = stored.database[CHUNKS].find_one_and_delete({})
    before = everything_stored(stored)
    with pytest.raises(AttachmentError):
        filled.write_back("s")
    assert everything_stored(stored) == before
    stored.database[CHUNKS].insert_one(lost)
    archive_of(stored).delete_one({"_id.agent": "agent", "_id.first": {"$gt": 5}})
    before = everything_stored(stored)
    with pytest.raises(DatabaseError, match="missing in its archive"):
        filled.write_back("s")
    assert everything_stored(stored) == before


# Crashes and lost replies.


@contextmanager
def stopped_after(uri: str, appname: str, done: int) -> Iterator[None]:
    """Have the server refuse all commands of a client but the first ones, as if its process ended there."""
    data = {"failCommands": COMMANDS, "appName": appname, "errorCode": 8000}
    with client_of(uri) as client:
        client.admin.command({"configureFailPoint": "failCommand", "mode": {"skip": done}, "data": data})
        try:
            yield
        finally:
            client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


class Target(NamedTuple):
    """The sessions of a database, with its indexes, and their repository behind a proxy, the application `target`."""

    uri: str
    stored: Stored
    proxy: Proxy
    repository: MongoDBSessionRepository


@pytest.fixture(scope="module")
def targets(embedded: str, standalone: str) -> Iterator[dict[str, Target]]:
    """A target on each of the two servers."""
    name = f"test_{uuid.uuid4().hex}"
    with contextlib.ExitStack() as stack:
        found = {}
        for where, uri in (("server", embedded), ("standalone", standalone)):
            client = stack.enter_context(client_of(uri))
            stack.callback(client.drop_database, name)
            proxy = stack.enter_context(Proxy(uri))
            repository = stack.enter_context(MongoDBSessionRepository(proxy.uri, name, appname="target", **LIMITS))
            repository.create_session(Session("s", "AGENT"))
            found[where] = Target(uri, client[name]["agent_sessions"], proxy, repository)
        yield found


def test_a_call_that_stops_anywhere_leaves_a_whole_session(
    request: pytest.FixtureRequest, targets: dict[str, Target], documents: dict[str, list[Any]]
) -> None:
    """The session is written back again, at once or after it was used."""
    step = 1 if request.config.getoption("--full-adversity") else 5
    begins = range(random.randrange(step), 44 + step, step)
    cases = [(done, goes_on) for done in begins for goes_on in (False, True) if step == 1 or goes_on == done % 2]
    uri, stored, _, stopping = targets["server"]
    with MongoDBSessionRepository(uri, stored.database.name, **LIMITS) as other:
        for done, goes_on in cases:
            store_again(emptied(stored), documents)
            with stopped_after(uri, "target", done):
                is_done = False
                with contextlib.suppress(MongoDBSessionError):
                    stopping.write_back("s")
                    is_done = True
            assert told(other.list_messages("s", "agent")) == everything(stored) == WANTED
            assert told(other.list_messages("s", "an.other")) == expected(30)
            wanted = go_on(other, stored) if goes_on else WANTED
            other.write_back("s")
            assert_in_one_document(stored, wanted)
            if is_done:
                break
    assert is_done
    assert done >= 8


def go_on(repository: MongoDBSessionRepository, stored: Stored) -> list[str]:
    """Move messages in other steps than before, and compare all that is read; return what is stored then."""
    for first in range(30, 50, 5):
        apply(repository, "s", appends(range(first, first + 5)))
        settled(stored)
    repository.update_message("s", "agent", said(7, "changed"))
    wanted = [*WANTED[:7], "changed", *WANTED[8:], *expected(50, 30)]
    for offset in (0, 7, 25, 42):
        assert told(repository.list_messages("s", "agent", offset=offset)) == wanted[offset:]
    assert everything(stored) == wanted
    return wanted


@pytest.mark.parametrize(
    ("when", "lost", "where"),
    sampled(
        [
            (when, lost, where)
            for when in ("before", "after")
            for lost in ("find", "update", "delete")
            for where in ("server", "standalone")
        ],
        ("after", "find", "server"),
        ("after", "update", "server"),
        ("after", "update", "standalone"),
        ("before", "update", "standalone"),
        ("after", "delete", "standalone"),
    ),
)
def test_a_command_that_is_lost_or_whose_reply_is_lost_is_done_once(
    targets: dict[str, Target], documents: dict[str, list[Any]], lost: str, where: str, when: str
) -> None:
    _, stored, proxy, repository = targets[where]
    store_again(emptied(stored), documents)
    proxy.reset()
    drop = proxy.drop_before_request if when == "before" else proxy.drop_after_request
    drop(command(lost), 2)
    repository.write_back("s")
    assert proxy.dropped == 2
    assert_in_one_document(stored)


# Other writers.


def write_back_overtaken_by(
    back: MongoDBSessionRepository, other: Callable[[], object], rounds: int = 1, *, after: bool = True
) -> None:
    """Write the session back while somebody else writes between its reads and its update, or before its reads."""
    left = iter(range(rounds))

    async def overtaken() -> None:
        if next(left, None) is not None:
            await asyncio.to_thread(other)

    async def write_back() -> None:
        work = WriteBack(back._async._store)
        overtake(work, "_gather", overtaken, after=after)
        await work.write_back("s")

    back._portal.call(write_back)


@pytest.mark.parametrize("message_id", [7, 27], ids=["archived", "in the document"])
def test_a_redaction_meanwhile_is_kept(
    filled: MongoDBSessionRepository,
    back: MongoDBSessionRepository,
    stored: Stored,
    driver: Driver,
    database: str,
    message_id: int,
) -> None:
    filled.update_message("s", "agent", said(message_id, SECRET))
    write_back_overtaken_by(back, lambda: filled.update_message("s", "agent", redacted(message_id)))
    wanted = [*WANTED[:message_id], "[redacted]", *WANTED[message_id + 1 :]]
    assert_in_one_document(stored, wanted)
    assert not in_database(driver, database)


def test_an_append_with_an_attachment_meanwhile_is_written_back_too(
    filled: MongoDBSessionRepository, back: MongoDBSessionRepository, stored: Stored, server: str, database: str
) -> None:
    with MongoDBSessionRepository(server, database, max_inline_attachment_bytes=100) as quiet:
        write_back_overtaken_by(back, lambda: quiet.create_message("s", "agent", shown(30)))
    assert_in_one_document(stored, [*WANTED, "text 30"])


def test_nothing_of_a_session_that_is_deleted_meanwhile_comes_back_in_a_later_one(
    filled: MongoDBSessionRepository, back: MongoDBSessionRepository, stored: Stored
) -> None:
    def replace() -> None:
        filled.delete_session("s")
        filled.fork_session("like it", "s")
        filled.delete_session("like it")

    filled.fork_session("s", "like it")
    filled.update_message("s", "agent", said(7, SECRET))
    filled.update_message("like it", "agent", said(7, "hello"))
    write_back_overtaken_by(back, replace)
    assert_in_one_document(stored, [*WANTED[:7], "hello", *WANTED[8:]])


@pytest.mark.usefixtures("filled")
def test_a_move_meanwhile_is_written_back_too(back: MongoDBSessionRepository, stored: Stored) -> None:
    def move() -> None:
        other = Other(stored, 4)
        other.merge()
        assert other.cut()

    write_back_overtaken_by(back, move)
    assert_in_one_document(stored)


def test_a_move_that_is_overtaken_moves_nothing(filled: MongoDBSessionRepository, stored: Stored) -> None:
    other = Other(stored, 4)
    other.merge()
    filled.write_back("s")
    assert not other.cut()
    assert_in_one_document(stored)


def test_a_copy_that_arrives_after_its_session_was_written_back_is_removed(
    filled: MongoDBSessionRepository, stored: Stored
) -> None:
    other = Other(stored, 4)
    other.merge()
    late = archive_of(stored).find_one({"_id.agent": "agent", "_id.first": other.head.archived})
    filled.write_back("s")
    archive_of(stored).insert_one(late)
    assert not other.cut()
    place = Place("s", other.head.life.incarnation)
    filled._portal.call(filled._async._store.mover.remove_orphan, place, "agent", other.head)
    assert_in_one_document(stored)


@pytest.mark.anyio
@pytest.mark.parametrize("read", ["open_session", "list_messages", "read_message", "update_message"])
async def test_what_reads_the_archive_meanwhile_finds_every_message(
    filled: MongoDBSessionRepository, stored: Stored, server: str, database: str, read: str
) -> None:
    rounds = 1

    async def overtaken() -> None:
        nonlocal rounds
        if rounds:
            rounds -= 1
            await asyncio.to_thread(filled.write_back, "s")

    wanted = WANTED
    async with AsyncMongoDBSessionRepository(server, database) as repository:
        for name in ("read_buckets", "find_archived"):
            overtake(repository._store.archive, name, overtaken)
        if read == "open_session":
            document = await repository.open_session("s")
            assert texts(document["agents"]["agent"]["messages"]) == wanted
        elif read == "list_messages":
            assert told(await repository.list_messages("s", "agent")) == wanted
        elif read == "read_message":
            message = await repository.read_message("s", "agent", 7)
            assert message is not None
            assert told([message]) == ["text 7"]
        else:
            await repository.update_message("s", "agent", redacted(7))
            wanted = [*wanted[:7], "[redacted]", *wanted[8:]]
        assert rounds == 0
    await asyncio.to_thread(assert_in_one_document, stored, wanted)


@pytest.mark.parametrize("after", [True, False], ids=["before the update", "before the buckets are read"])
def test_two_calls_at_once(
    filled: MongoDBSessionRepository, back: MongoDBSessionRepository, stored: Stored, after: bool
) -> None:
    write_back_overtaken_by(back, lambda: filled.write_back("s"), after=after)
    assert_in_one_document(stored)


def test_a_session_that_is_deleted_meanwhile_stays_deleted(
    filled: MongoDBSessionRepository, back: MongoDBSessionRepository, stored: Stored
) -> None:
    with pytest.raises(SessionNotFoundError):
        write_back_overtaken_by(back, lambda: filled.delete_session("s"))
    assert everything_stored(stored) == [[], [], [], []]


def test_a_session_that_always_changes_is_an_error(
    filled: MongoDBSessionRepository, back: MongoDBSessionRepository, stored: Stored
) -> None:
    change = functools.partial(filled.update_message, "s", "agent", said(28, "text 28"))
    with pytest.raises(DatabaseError, match="kept changing"):
        write_back_overtaken_by(back, change, rounds=100)
    assert everything(stored) == [*WANTED[:28], "text 28", "text 29"]


@pytest.mark.parametrize("fields", ["message", "metrics"])
def test_a_change_of_a_message_that_is_written_back_meanwhile_is_kept(
    filled: MongoDBSessionRepository,
    back: MongoDBSessionRepository,
    stored: Stored,
    server: str,
    database: str,
    fields: str,
) -> None:
    """The change reaches the bucket after it was read, and counts only after the update."""
    read, changed = threading.Event(), threading.Event()

    def between_read_and_update() -> None:
        read.set()
        assert changed.wait(30)

    async def change() -> dict[str, Any]:
        async with AsyncMongoDBSessionRepository(server, database) as slow:

            async def overtaking() -> None:
                if not changed.is_set():
                    changed.set()
                    await asyncio.to_thread(writing.result, 30)

            overtake(slow._store.archive, "change", overtaking, after=True)
            await asyncio.to_thread(read.wait, 30)
            new: dict[str, Any] = {"event_loop_metrics": {"n": 1}, "updated_at": head(stored)["created_at"]}
            if fields == "message":
                new["message"] = said(7, "changed").message
            return await slow._apply("s", [ReplaceMessage("agent", 7, new)])

    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write_back_overtaken_by, back, between_read_and_update)
        assert asyncio.run(change()) == {}
    assert head(stored)["messages"][7]["event_loop_metrics"] == {"n": 1}
    assert_in_one_document(stored, [*WANTED[:7], "changed", *WANTED[8:]] if fields == "message" else WANTED)


def test_writers_and_readers_go_on_while_it_is_written_back_again_and_again(
    server: str, database: str, back: MongoDBSessionRepository, stored: Stored
) -> None:
    total = 30
    with (
        MongoDBSessionRepository(server, database, **SMALL) as writer,
        MongoDBSessionRepository(server, database, max_embedded_messages=6) as changer,
        ThreadPoolExecutor(2) as threads,
    ):
        begin(writer)
        append(writer, 0)
        appended, done, backs = [1], threading.Event(), [0]
        changed: dict[int, str] = {}

        def change() -> None:
            n = 0
            while not done.is_set():
                message_id = (n * 7) % appended[0]
                changer.update_message("s", "agent", said(message_id, f"changed {n}"))
                changed[message_id] = f"changed {n}"
                n += 1

        def write_back() -> None:
            while not done.is_set():
                with contextlib.suppress(DatabaseError):
                    back.write_back("s")
                    backs[0] += 1

        work = [threads.submit(change), threads.submit(write_back)]
        for message_id in range(1, total):
            append(writer, message_id)
            appended[0] = message_id + 1
        done.set()
        for future in work:
            future.result()
        assert backs[0] > 0
        idle(writer)
        idle(changer)
        wanted = [changed.get(n, f"text {n}") for n in range(total)]
        assert told(back.list_messages("s", "agent")) == everything(stored) == wanted
        back.write_back("s")
        assert told(restored_by_the_original(stored)[1]) == wanted
    assert counts(stored) == [0, 0, 0]


@pytest.mark.parametrize("is_archived", [False, True])
def test_no_bucket_of_an_interrupted_move_is_left(
    back: MongoDBSessionRepository, stored: Stored, is_archived: bool
) -> None:
    begin(back)
    apply(back, "s", appends(range(10)))
    if is_archived:
        other = Other(stored)
        other.merge()
        assert other.cut()
    killed = Other(stored, 3)
    killed.merge()
    back.write_back("s")
    assert counts(stored) == [0, 0, 0]
    assert not killed.cut()
    assert told(restored_by_the_original(stored)[1]) == everything(stored) == expected(10)
    append(back, 10)
    assert told(back.list_messages("s", "agent")) == expected(11)


def test_an_open_manager_goes_on_after_its_session_was_written_back(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with factory.create_session_manager("s", **SMALL) as manager:
        live = agent(manager, *["answer"] * 12)
        for n in range(6):
            live(f"question {n}")
        factory.write_back("s")
        assert "archived" not in head(stored)
        for n in range(6, 12):
            live(f"question {n}")
        settled(stored)
    assert everything(stored) == [text for n in range(12) for text in (f"question {n}", "answer")]
