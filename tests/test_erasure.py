"""Erasing a person: nothing of the owner is left, and the others lose nothing, however it is interrupted."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
import pytest
from bson import Binary, Code, ObjectId

from fix_archive import emptied, store_again
from fix_deletion import PICTURE, failing_after
from fix_erasure import ADA, HERS, SMALL, check_listed, documents_by, left, others, prepared
from fix_finding import START, Stored, session
from fix_overtaking import overtake
from from_v100 import EXPECTED, load
from mongodb_session_manager import (
    AccessDeniedError,
    AsyncMongoDBSessionRepository,
    ErasureProgress,
    ErasureReceipt,
    InvalidArgumentError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionConflictError,
    SessionNotFoundError,
    split_export,
)
from support import CommandLog, agent, alternating, eventually, fail_point

Driver = pymongo.MongoClient[dict[str, Any]]

PARTS = (
    "agent_sessions_archive",
    "agent_sessions_attachments.files",
    "agent_sessions_attachments.chunks",
    "agent_sessions_content",
)


@pytest.fixture(scope="module")
def documents(server: str, shared_database: str, driver: Driver) -> dict[str, list[Any]]:
    """Sessions of an owner, of another one, and of none, by collection."""
    found = prepared(server, driver[shared_database])
    assert left(driver[shared_database]).keys() == {"agent_sessions", *PARTS}
    return found


@pytest.fixture
def full(documents: dict[str, list[Any]], stored: Stored) -> Stored:
    store_again(stored, documents)
    return stored


@pytest.fixture(scope="module")
def repository_options() -> dict[str, Any]:
    return SMALL


def found_later(receipt: ErasureReceipt) -> dict[str, int]:
    """Return the collections in which something was found after the removal."""
    assert receipt["verified"].keys() == receipt["removed"].keys() >= {"agent_sessions", *PARTS}
    assert all(check["looked_for"] for check in receipt["verified"].values())
    return {name: check["found"] for name, check in receipt["verified"].items() if check["found"]}


def removed(receipt: ErasureReceipt) -> dict[str, int]:
    return {name: count for name, count in receipt["removed"].items() if count}


def test_a_scan_finds_nothing_of_the_owner_and_everything_of_the_others(
    full: Stored, repository: MongoDBSessionRepository
) -> None:
    """Also of sessions that no list shows: expired ones, copies and deletions under way."""
    database, later = full.database, datetime.now(UTC) + timedelta(hours=1)
    hidden = {f"{ADA}-copying": "copying", f"{ADA}-deleting": "deleting"}
    for session_id, state in hidden.items():
        own = {"session_id": session_id, "incarnation": (incarnation := ObjectId())}
        full.insert_one({"_id": session_id, **own, "owner": ADA, "state": state, "state_until": later})
        file = {"incarnation": incarnation, "sha256": "5a", "token": "1"}
        bucket = {"_id": {"incarnation": incarnation, "agent": "agent", "first": 0}, "session_id": session_id}
        database["agent_sessions_archive"].insert_one(bucket)
        database["agent_sessions_attachments.chunks"].insert_one(
            {"_id": {"file": file, "n": 0}, "files_id": file, "n": 0, "session_id": session_id}
        )
    repository.fork_session(HERS[0], f"{ADA}-fork", at_message=12)
    full.insert_one(session("bob-2", owner=[ADA[::-1], "bob"]))
    before, of_others = left(database), others(database)
    receipt = repository.erase_owner(ADA)
    assert left(database) == {}
    assert others(database) == of_others
    assert sorted(receipt["sessions"]) == sorted([*HERS, *hidden, f"{ADA}-fork"])
    assert removed(receipt) == before
    assert found_later(receipt) == {}


def test_an_expired_session_is_erased(stored: Stored, repository: MongoDBSessionRepository) -> None:
    past = datetime.now(UTC) - timedelta(seconds=10)
    stored.insert_one(session(f"{ADA}-1", owner=ADA, time_to_live=60, expires_at=past, incarnation=ObjectId()))
    repository.erase_owner(ADA)
    assert left(stored.database) == {}


def test_a_list_of_owners_is_no_owner(stored: Stored, repository: MongoDBSessionRepository) -> None:
    """An application has stored it, and it can name others, too."""
    shared = session("shared", owner=[ADA, "bob"])
    stored.insert_many([shared, session(f"{ADA}-1", owner=ADA)])
    assert repository.erase_owner(ADA)["sessions"] == [f"{ADA}-1"]
    assert list(stored.find()) == [shared]
    assert list(repository.export_owner(ADA)) == []


def test_an_owner_that_looks_like_an_expression_is_a_name(
    stored: Stored, repository: MongoDBSessionRepository, some: Callable[[Any, int], list[str]]
) -> None:
    """Also for the copies of its sessions."""
    owners = ["$owner", "$$ROOT", ".*", "^ada", "a.b", "{}", " ada", "ADA", "ada\n"]
    stored.insert_many([session("bob", owner="ada"), session("free"), session("odd", owner=1)])
    for owner in owners:
        repository.open_session(f"{owner}-1", owner=owner)
    copied = some(owners, 3)
    for owner in owners:
        ids, lines = [f"{owner}-1"], list(repository.export_owner(owner))
        assert len(list(split_export(lines))) == 1
        if owner in copied:
            ids += [f"{owner}-2", f"{owner}-3"]
            repository.import_session(lines, ids[1])
            repository.fork_session(ids[0], ids[2], owner=owner)
        assert sorted(repository.erase_owner(owner)["sessions"]) == ids
    assert {each["_id"] for each in stored.find()} == {"bob", "free", "odd"}


def test_the_id_of_a_session_can_be_of_any_type(stored: Stored, repository: MongoDBSessionRepository) -> None:
    """An application has stored it."""
    values: list[Any] = [1, 1.5, float("nan"), None, "", b"s", Binary(bytes(16), 4), ObjectId(), True, START]
    values += [{"a": {"b": 1}}, {}, Code("s"), Code("s", {})]
    stored.insert_many({**session("s"), "_id": value, "owner": ADA} for value in values)
    stored.insert_many({**session("s"), "_id": value, "owner": "bob"} for value in (2, {"a": {"b": 2}}))
    receipt = repository.erase_owner(ADA)
    assert sorted(receipt["sessions"]) == sorted(map(str, values))
    assert json.loads(json.dumps(receipt)) == receipt
    assert stored.count_documents({"owner": ADA}) == 0
    assert stored.count_documents({}) == 2


# The receipt.


def test_the_receipt_is_plain_data(full: Stored, repository: MongoDBSessionRepository) -> None:
    begun = datetime.now(UTC) - timedelta(seconds=1)
    receipt = repository.erase_owner(ADA)
    assert json.loads(json.dumps(receipt)) == receipt
    assert (receipt["owner"], receipt["database"]) == (ADA, full.database.name)
    started, finished = (datetime.fromisoformat(receipt[name]) for name in ("started_at", "finished_at"))
    assert begun <= started <= finished <= datetime.now(UTC) + timedelta(seconds=1)
    again = repository.erase_owner(ADA)
    assert (again["sessions"], removed(again), found_later(again)) == ([], {}, {})


def late_part(database: Any, document: dict[str, Any], number: int) -> None:
    """Store a bucket, as a writer that has not noticed the deletion."""
    bucket = {"incarnation": document["incarnation"], "agent": "agent", "first": 1000 + number}
    database["agent_sessions_archive"].insert_one({"_id": bucket, "session_id": document["_id"]})


@pytest.mark.anyio
@pytest.mark.parametrize("writes", [1, 100])
async def test_the_receipt_says_what_other_processes_have_left(
    server: str, full: Stored, driver: Driver, writes: int
) -> None:
    """What comes after the deletion is removed, too; the receipt admits it if more and more comes."""
    document = next(full.find({"_id": HERS[0]}))
    async with AsyncMongoDBSessionRepository(server, full.database.name, **SMALL) as repository:
        remaining = iter(range(writes))

        async def write() -> None:
            if (number := next(remaining, None)) is not None:
                await asyncio.to_thread(late_part, full.database, document, number)

        overtake(repository._store.deletion, "count_parts", write)
        receipt = await repository.erase_owner(ADA)
    assert found_later(receipt) == left(full.database) == ({} if writes == 1 else {"agent_sessions_archive": 1})


# Progress.


FORMS = [
    (MongoDBSessionRepository, "erase_owner"),
    (AsyncMongoDBSessionRepository, "erase_owner"),
    (MongoDBSessionManagerFactory, "erase_owner"),
    (MongoDBSessionManagerFactory, "erase_owner_async"),
]


@pytest.mark.parametrize(("cls", "name"), alternating(*FORMS))
@pytest.mark.parametrize("is_awaited", alternating(False, True))
def test_the_progress_is_told(
    server: str, database: str, stored: Stored, cls: Any, name: str, is_awaited: bool
) -> None:
    """On the thread of the caller, unless a synchronous method must await."""
    ids = [f"{ADA}-{number}" for number in range(9)]
    stored.insert_many(session(session_id, owner=ADA) for session_id in ids)
    told: list[ErasureProgress] = []
    threads = set()

    def tell(progress: ErasureProgress) -> None:
        threads.add(threading.get_ident())
        told.append(progress)

    async def tell_async(progress: ErasureProgress) -> None:
        await asyncio.sleep(0)
        tell(progress)

    target = cls(server, database)
    is_async = inspect.iscoroutinefunction(getattr(cls, name))
    with asyncio.Runner() as runner:
        erased = getattr(target, name)(ADA, progress=tell_async if is_awaited else tell)
        receipt = runner.run(erased) if is_async else erased
        closed = target.close()
        if inspect.iscoroutine(closed):
            runner.run(closed)
    assert sorted(receipt["sessions"]) == ids
    assert [each.session_id for each in told] == receipt["sessions"]
    assert [(each.done, each.total) for each in told] == [(number, 9) for number in range(1, 10)]
    assert (threads == {threading.get_ident()}) is (is_async or not is_awaited)
    assert stored.count_documents({}) == 0


def test_an_exception_of_the_progress_ends_the_erasure(stored: Stored, repository: MongoDBSessionRepository) -> None:
    stored.insert_many(session(f"{ADA}-{number}", owner=ADA) for number in range(12))

    def stop(progress: ErasureProgress) -> None:
        raise KeyError(progress.session_id)

    with pytest.raises(KeyError, match=ADA):
        repository.erase_owner(ADA, progress=stop)
    assert 0 < stored.count_documents({"owner": ADA}) < 12
    assert stored.count_documents({"state": {"$exists": True}}) == 0
    receipt = repository.erase_owner(ADA)
    assert len(receipt["sessions"]) == 12 - 8
    assert stored.count_documents({}) == 0


@pytest.mark.anyio
async def test_an_erasure_that_is_cancelled_leaves_whole_sessions(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    stored.insert_many(session(f"{ADA}-{number}", owner=ADA) for number in range(12))
    reached = asyncio.Event()

    async def wait(progress: ErasureProgress) -> None:
        reached.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(factory.erase_owner_async(ADA, progress=wait))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 0 < stored.count_documents({"owner": ADA}) < 12
    assert stored.count_documents({"state": {"$exists": True}}) == 0
    assert len((await factory.erase_owner_async(ADA))["sessions"]) == 12 - 8
    assert stored.count_documents({}) == 0


def test_sessions_that_are_created_meanwhile_are_erased(stored: Stored, repository: MongoDBSessionRepository) -> None:
    stored.insert_many(session(f"{ADA}-{number}", owner=ADA) for number in range(3))
    told = []

    def create(progress: ErasureProgress) -> None:
        told.append((progress.done, progress.total))
        if progress.done < 6:
            repository.open_session(f"{ADA}-new-{progress.done}", owner=ADA)

    receipt = repository.erase_owner(ADA, progress=create)
    assert len(receipt["sessions"]) == 3 + 5
    assert told == [(number, max(number, 3)) for number in range(1, 9)]
    assert stored.count_documents({}) == 0


# Arguments.


def test_an_owner_that_is_none_is_refused_and_nothing_is_sent(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    owners: list[Any] = ["", "a\0b", "\ud800", "x" * 1025, 5, None, b"ada", {"$ne": None}, ["ada"]]
    for owner in owners:
        for call in (
            lambda owner=owner: factory.erase_owner(owner),
            lambda owner=owner: list(factory.export_owner(owner)),
            lambda owner=owner: asyncio.run(factory.erase_owner_async(owner)),
        ):
            with pytest.raises(InvalidArgumentError, match="owner"):
                call()
        assert commands.names == [], owner


def test_a_progress_that_cannot_be_called_is_refused(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    with pytest.raises(InvalidArgumentError, match="progress must be callable, not str"):
        factory.erase_owner(ADA, progress="bar")  # type: ignore[arg-type]
    assert commands.names == []


# Interruptions.

COMMANDS = 37
"""The number of commands that erase three sessions."""


def test_an_erasure_that_is_interrupted_is_finished_by_the_next(
    documents: dict[str, list[Any]],
    stored: Stored,
    server: str,
    repository: MongoDBSessionRepository,
    some: Callable[[Any, int], list[int]],
) -> None:
    """Every session that is listed meanwhile is whole."""
    database, commands = stored.database, ["aggregate", "find", "findAndModify", "delete"]
    with MongoDBSessionRepository(f"{server}&appName=erasing", database.name, **SMALL) as erasing:
        for done in some(range(COMMANDS), 3):
            store_again(emptied(stored), documents)
            of_others = others(database)
            erasing.list_sessions()
            eventually(lambda: not erasing._async._connection._tasks)
            with (
                failing_after(server, done, failCommands=commands, errorCode=8000, appName="erasing"),
                pytest.raises(MongoDBSessionError),
            ):
                erasing.erase_owner(ADA)
            check_listed(repository)
            receipt = repository.erase_owner(ADA)
            assert left(database) == {}, done
            assert others(database) == of_others, done
            assert found_later(receipt) == {}, done


def test_an_error_names_the_session(full: Stored, server: str, repository: MongoDBSessionRepository) -> None:
    with (
        fail_point(server, failCommands=["findAndModify"], errorCode=13, times=1),
        pytest.raises(AccessDeniedError, match=rf"^session '{ADA}-\d' was not erased completely: ") as caught,
    ):
        repository.erase_owner(ADA)
    assert caught.value.code == 13
    listed = check_listed(repository)  # the fail point can meet several commands that arrive at once
    assert any(f"'{session_id}'" in str(caught.value) for session_id in listed)
    assert sorted(repository.erase_owner(ADA)["sessions"]) == sorted(listed)


# Writers under way.


def test_a_manager_learns_that_its_session_is_gone(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    stored.insert_many(session(f"{ADA}-{number}", owner=ADA) for number in range(10))
    manager = factory.create_session_manager(f"{ADA}-last", owner=ADA, max_inline_attachment_bytes=1000)
    live = agent(manager, "hello", "again", "more")
    live("hi")

    def write(progress: ErasureProgress) -> None:
        if progress.done == 1:  # it is not the turn of this session yet
            live([{"text": "look"}, {"image": {"format": "png", "source": {"bytes": PICTURE}}}])

    factory.erase_owner(ADA, progress=write)
    with pytest.raises(SessionNotFoundError):
        live("are you there?")
    with pytest.raises(SessionNotFoundError):
        manager.update_metadata({"a": 1})
    assert left(stored.database) == {}


def test_many_write_while_their_sessions_are_erased(server: str, database: str, stored: Stored) -> None:
    """With attachments and archives, until they find their sessions gone."""
    start = threading.Barrier(4)
    image = {"image": {"format": "png", "source": {"bytes": PICTURE}}}

    def write(factory: MongoDBSessionManagerFactory, number: int) -> int:
        live = agent(factory.create_session_manager(f"{ADA}-{number}", owner=ADA), *[ADA] * 60)
        start.wait(30)
        for turn in range(60):
            try:
                live([{"text": f"{ADA} {turn}"}, *([image] if turn % 2 else [])])
            except SessionNotFoundError:
                return turn
        return 60

    with MongoDBSessionManagerFactory(server, database, **SMALL) as factory, ThreadPoolExecutor(3) as pool:
        turns = [pool.submit(write, factory, number) for number in range(3)]
        start.wait(30)
        receipt = factory.erase_owner(ADA)
        assert all(turn.result(60) < 60 for turn in turns)
        assert len(receipt["sessions"]) == 3
    assert left(stored.database) == {}


def test_an_import_under_way_is_removed(full: Stored, repository: MongoDBSessionRepository, server: str) -> None:
    lines = list(repository.export_session(HERS[0]))

    def stream() -> Iterator[str]:
        yield from lines[:-1]
        yield "\n" * 300  # so that what was read before is stored
        repository.erase_owner(ADA)
        yield lines[-1]

    with (
        MongoDBSessionRepository(server, full.database.name, **SMALL) as importing,
        pytest.raises(SessionConflictError, match="was removed by another process"),
    ):
        importing.import_session(stream(), f"{ADA}-copy")
    assert left(full.database) == {}


@pytest.mark.anyio
async def test_a_fork_that_has_read_its_session_before_the_erasure_fails(
    server: str, stored: Stored, repository: MongoDBSessionRepository
) -> None:
    """The session is small enough to be read with one command."""
    stored.insert_one(session(f"{ADA}-1", owner=ADA))
    async with AsyncMongoDBSessionRepository(server, stored.database.name, **SMALL) as forking:
        await forking.open_session(f"{ADA}-1", owner=ADA)
        overtake(forking._store.collection, "insert_one", lambda: asyncio.to_thread(repository.erase_owner, ADA))
        with pytest.raises(SessionNotFoundError, match=f"session '{ADA}-1' no longer exists"):
            await forking.fork_session(f"{ADA}-1", f"{ADA}-2", owner=ADA)
    assert left(stored.database) == {}


# Sessions of 1.0.0.


@pytest.mark.own_database
def test_sessions_of_version_1_0_0_that_were_claimed_are_erased(server: str, driver: Driver, database: str) -> None:
    """With what is in the former places, also of forks and imports that were interrupted once."""
    load(driver[database])
    claimed = [
        session_id for session_id in EXPECTED if session_id not in ("v100-plain", "v100-doubled", "v100-expiring")
    ]
    ids = [f"{session_id}\0" for session_id in claimed]
    with MongoDBSessionRepository(server, database) as repository:
        for session_id in claimed:
            repository.claim_session(session_id, ADA)
        repository.claim_session("v100-plain", "bob")
        assert documents_by(driver[database], *ids, of_owner=True).keys() == {"agent_sessions", *PARTS[:3]}
        of_others = documents_by(driver[database], *ids, of_owner=False)
        receipt = repository.erase_owner(ADA)
    assert sorted(receipt["sessions"]) == sorted(claimed)
    assert found_later(receipt) == {}
    assert documents_by(driver[database], *ids, of_owner=True) == {}
    assert documents_by(driver[database], *ids, of_owner=False) == of_others


# The cost.


def test_the_number_of_commands_grows_with_the_sessions_of_the_owner(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, stored: Stored
) -> None:
    counts = []
    for ids in (range(0), range(8), range(16)):
        stored.insert_many([session("bob"), *(session(f"{n}", owner=ADA, incarnation=ObjectId()) for n in ids)])
        commands.clear()
        assert len(factory.erase_owner(ADA)["sessions"]) == len(ids)
        counts.append(len(commands.names))
        stored.delete_one({"_id": "bob"})
    assert counts[2] - counts[1] == counts[1] - counts[0]
    assert counts[2] < 16 * 12


def test_no_command_reads_the_sessions_of_others(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    database, owners = stored.database, [*(f"owner-{number % 20}" for number in range(200)), *[ADA] * 12]
    documents: dict[str, list[Any]] = {name: [] for name in ("agent_sessions", *PARTS)}
    for number, owner in enumerate(owners):
        own = {"incarnation": ObjectId()}
        file, session_id = {**own, "sha256": "5a", "token": "1"}, f"s{number}"
        documents["agent_sessions"].append(session(session_id, owner=owner, **own))
        keys = ({**own, "agent": "agent", "first": 0}, file, {"file": file, "n": 0}, {**own, "key": "own"})
        for name, key in zip(PARTS, keys, strict=True):
            documents[name].append({"_id": key, "session_id": session_id, "files_id": session_id, "n": 0})
    for name, found in documents.items():
        database[name].insert_many(found)
    database.command("profile", 2)
    try:
        receipt = factory.erase_owner(ADA)
        lines = list(factory.export_owner("owner-1"))
    finally:
        database.command("profile", 0)
        profile = [each for each in database["system.profile"].find() if "agent_sessions" in each["ns"]]
        database.drop_collection("system.profile")
    assert removed(receipt) == dict.fromkeys(("agent_sessions", *PARTS), 12)
    assert len(lines) == 10 * 3
    assert len(profile) > 12 * 8
    assert {each["planSummary"] for each in profile if each.get("planSummary", "").startswith("COLLSCAN")} == set()
    assert max(each.get("docsExamined", 0) for each in profile) <= 10
    assert max(each.get("keysExamined", 0) for each in profile) <= 40
