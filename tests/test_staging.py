"""Imports and forks: a copy is live and complete, or it is removed, whoever is killed, slow or deletes meanwhile."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pymongo
import pytest
from pymongo import monitoring
from strands.types.session import Session, SessionAgent

import interpreter
from fix_archive import documents_of, emptied, store_again
from fix_deletion import EVERYWHERE, ID, MOMENT, SMALL, fill, is_whole, said, traces, wait_for_moves
from mongodb_session_manager import (
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionConflictError,
    SessionExistsError,
)
from support import CommandLog, eventually, fail_point

Driver = pymongo.MongoClient[dict[str, Any]]
Stored = pymongo.collection.Collection[dict[str, Any]]

COPY = "copy-c0ffee"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def repository_options() -> dict[str, Any]:
    return SMALL


@pytest.fixture
def expiring(server: str, database: str) -> Iterator[MongoDBSessionRepository]:
    with MongoDBSessionRepository(server, database, **SMALL, session_ttl=timedelta(days=8)) as repository:
        yield repository


@pytest.fixture(scope="module")
def full_documents(
    shared_repository: MongoDBSessionRepository, shared_database: str, driver: Driver
) -> dict[str, list[Any]]:
    """The documents of a session that has messages and attachments in all places."""
    stored = emptied(driver[shared_database]["agent_sessions"])
    fill(shared_repository)
    wait_for_moves(stored)
    eventually(lambda: not shared_repository._async._connection._tasks)
    return documents_of(stored)


@pytest.fixture
def full(
    full_documents: dict[str, list[Any]], repository: MongoDBSessionRepository, stored: Stored
) -> MongoDBSessionRepository:
    """A repository with that session."""
    store_again(stored, full_documents)
    return repository


def fork(repository: MongoDBSessionRepository, new_id: str = COPY) -> None:
    repository.fork_session(ID, new_id)


def export_and_import(repository: MongoDBSessionRepository, new_id: str = COPY) -> None:
    repository.import_session(list(repository.export_session(ID)), new_id)


COPYING = pytest.mark.parametrize("copy", [fork, export_and_import])


def parts_of(stored: Stored, session_id: str) -> list[dict[str, Any]]:
    names = ("agent_sessions_archive", "agent_sessions_attachments.files", "agent_sessions_attachments.chunks")
    return [part for name in names for part in stored.database[name].find({"session_id": session_id})]


def incarnations(stored: Stored, session_id: str) -> set[Any]:
    """The incarnations of all that is stored of a session."""
    found = {
        part["_id"].get("incarnation") or part["_id"]["file"]["incarnation"] for part in parts_of(stored, session_id)
    }
    return found | {document["incarnation"] for document in stored.find({"_id": session_id})}


def end_leases(stored: Stored) -> None:
    stored.update_many({"state": "copying"}, {"$set": {"state_until": LONG_AGO}})


def unfinished(stored: Stored) -> list[dict[str, Any]]:
    return list(stored.find({"state": {"$exists": True}}))


# How copies end.


@COPYING
def test_a_copy_is_deleted_without_a_trace_and_alone(
    full: MongoDBSessionRepository, stored: Stored, driver: Driver, database: str, copy: Any
) -> None:
    copy(full)
    assert is_whole(full, COPY)
    assert full.delete_session(ID)
    assert is_whole(full, COPY)
    stored.update_one({"_id": COPY}, {"$unset": {"copy_of": ""}})  # which names the session
    assert traces(driver, database) == set()
    assert traces(driver, database, COPY) == EVERYWHERE
    assert full.delete_session(COPY)
    assert traces(driver, database, COPY) == set()


def check_dates(stored: Stored, session_id: str = COPY) -> None:
    """No part of a session that expires can expire before it."""
    document = stored.find_one({"_id": session_id})
    assert document is not None
    parts = parts_of(stored, session_id)
    assert len(parts) > 5
    assert all(document["expires_at"] <= part["expires_at"] for part in parts)
    ahead = document["expires_at"] - datetime.now(UTC)
    assert ahead > timedelta(seconds=document["time_to_live"]) - timedelta(minutes=5)


@COPYING
def test_a_copy_into_a_collection_that_expires_does_so_with_all_that_belongs_to_it(
    full: MongoDBSessionRepository, expiring: MongoDBSessionRepository, stored: Stored, copy: Any
) -> None:
    copy(expiring)
    assert stored.find_one({"_id": COPY})["time_to_live"] == 8 * 24 * 3600
    check_dates(stored)
    assert "time_to_live" not in stored.find_one({"_id": ID})
    expiring.update_metadata(COPY, {"n": 1})
    check_dates(stored)


def test_a_fork_of_a_session_that_expires_does_so_too(
    repository: MongoDBSessionRepository, expiring: MongoDBSessionRepository, stored: Stored
) -> None:
    fill(expiring)
    wait_for_moves(stored)
    fork(repository)
    assert stored.find_one({"_id": COPY})["time_to_live"] == 8 * 24 * 3600
    check_dates(stored)


def test_an_import_slower_than_its_time_to_live_is_alive(
    full: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    lines = list(full.export_session(ID))
    ttl = timedelta(seconds=2)

    def slowly() -> Iterator[str]:
        yield from lines[:-1]
        assert all("expires_at" not in part for part in [*parts_of(stored, COPY), stored.find_one({"_id": COPY})])
        time.sleep(1.5 * ttl.total_seconds())
        yield lines[-1]

    with (
        pytest.MonkeyPatch.context() as patch,
        MongoDBSessionRepository(server, database, session_ttl=ttl) as other,
    ):
        patch.setattr("mongodb_session_manager._copying.imports._LINES", 1)
        before = datetime.now(UTC)
        other.import_session(slowly(), COPY)
    document = stored.find_one({"_id": COPY})
    assert document["expires_at"] > before + 2.4 * ttl
    assert all(document["expires_at"] <= part["expires_at"] for part in parts_of(stored, COPY))


class Listener(monitoring.CommandListener):
    """Calls functions before a command is sent and after its reply has come."""

    def __init__(self) -> None:
        self.before: Callable[[monitoring.CommandStartedEvent], object] = lambda event: None
        self.after: Callable[[monitoring.CommandSucceededEvent], object] = lambda event: None

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.before(event)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        self.after(event)

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


def test_a_fork_that_takes_its_time_to_live_to_date_its_parts_is_alive(
    full: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    ttl, slow = timedelta(seconds=2), Listener()

    def wait(event: monitoring.CommandStartedEvent) -> None:
        if event.command.get("update") == "agent_sessions_archive" and event.command["updates"][0].get("multi"):
            slow.before = lambda event: None
            time.sleep(1.5 * ttl.total_seconds())

    slow.before = wait
    with MongoDBSessionRepository(server, database, session_ttl=ttl, event_listeners=[slow]) as other:
        other.fork_session(ID, COPY)
        document = stored.find_one({"_id": COPY})
    assert document["expires_at"] > document["updated_at"] + ttl
    assert all(document["expires_at"] <= part["expires_at"] for part in parts_of(stored, COPY))


# Others, meanwhile.


def test_a_copy_under_way_is_not_seen_and_not_deleted(
    full: MongoDBSessionRepository, server: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mongodb_session_manager._copying.imports._LINES", 1)
    monkeypatch.setattr("mongodb_session_manager._store.opening._COPY_TIMEOUT", 0.1)
    lines = list(full.export_session(ID))

    def slowly() -> Iterator[str]:
        for number, line in enumerate(lines):
            if number == len(lines) - 1:
                assert not full.session_exists(COPY)
                assert full.read_session(COPY) is None
                assert full.count_sessions() == 1
                assert [each.session_id for each in full.list_sessions().sessions] == [ID]
                assert not full.delete_session(COPY)
                with pytest.raises(SessionConflictError, match="is being imported or forked: repeat"):
                    full.open_session(COPY)
                with pytest.raises(SessionConflictError):
                    full.create_session(Session(COPY, "AGENT", MOMENT, MOMENT))
                with pytest.raises(SessionExistsError, match="is being imported or forked already"):
                    fork(full)
            yield line

    full.import_session(slowly(), COPY)
    assert is_whole(full, COPY)
    assert full.count_sessions() == 2


def test_a_manager_waits_for_a_copy_that_becomes_live(
    full: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    slow, go_on = Listener(), threading.Event()

    def wait(event: monitoring.CommandStartedEvent) -> None:
        if event.command_name == "update":
            go_on.wait(30)

    slow.before = wait
    with (
        MongoDBSessionRepository(server, database, event_listeners=[slow]) as other,
        MongoDBSessionManagerFactory(server, database, **SMALL) as factory,
        ThreadPoolExecutor(2) as threads,
    ):
        copying = threads.submit(fork, other)
        eventually(lambda: stored.find_one({"_id": COPY}))
        opening = threads.submit(factory.create_session_manager, COPY)
        time.sleep(0.2)
        assert not opening.done()
        go_on.set()
        copying.result()
        with opening.result() as manager:
            assert manager.get_metadata() == {"metadata": {"colour": "red"}}


def test_forks_and_deletions_of_one_id_leave_a_session_or_nothing(
    request: pytest.FixtureRequest,
    full: MongoDBSessionRepository,
    server: str,
    database: str,
    driver: Driver,
) -> None:
    rounds = 400 if request.config.getoption("--full-adversity") else 10
    with MongoDBSessionRepository(server, database, **SMALL) as other, ThreadPoolExecutor(2) as threads:
        for number in range(rounds):
            delay = random.uniform(0, 0.02)
            forking = threads.submit(fork, full)

            def delete(delay: float = delay) -> bool:
                time.sleep(delay)
                return other.delete_session(COPY)

            deleted = threads.submit(delete).result()
            forking.result()
            assert full.session_exists(COPY) is not deleted, number
            if not deleted:
                assert is_whole(full, COPY)
                assert full.delete_session(COPY)
            assert traces(driver, database, COPY) == set()
    assert is_whole(full)


@pytest.mark.parametrize("how", ["before its archive", "before it is live", "after it is live"])
def test_a_fork_that_stalls_leaves_a_later_one_alone(
    full: MongoDBSessionRepository, server: str, database: str, stored: Stored, how: str
) -> None:
    stalled, go_on, slow = threading.Event(), threading.Event(), Listener()
    live: list[int] = []

    def is_it(event: monitoring.CommandStartedEvent) -> bool:
        if "archive" in how:
            return event.command.get("update") == "agent_sessions_archive"
        return event.command.get("update") == "agent_sessions" and "$unset" in event.command["updates"][0]["u"]

    def stall() -> None:
        if not stalled.is_set():
            stalled.set()
            go_on.wait(60)

    if "before" in how:
        slow.before = lambda event: stall() if is_it(event) else None
    else:
        slow.before = lambda event: live.append(event.request_id) if is_it(event) else None
        slow.after = lambda event: stall() if event.request_id in live else None
    with (
        MongoDBSessionRepository(server, database, event_listeners=[slow], **SMALL) as other,
        ThreadPoolExecutor(1) as threads,
    ):
        forking = threads.submit(fork, other)
        stalled.wait(60)
        end_leases(stored)
        assert full.delete_session(COPY) is (how == "after it is live")
        export_and_import(full)
        go_on.set()
        error = forking.exception()
    if "before" in how:
        assert isinstance(error, SessionConflictError)
        assert "was removed by another process while it was copied" in str(error)
    else:
        assert error is None
    assert is_whole(full, COPY)
    assert incarnations(stored, COPY) == {stored.find_one({"_id": COPY})["incarnation"]}


def test_a_copy_whose_lease_was_over_leaves_nothing(
    full: MongoDBSessionRepository, stored: Stored, driver: Driver, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mongodb_session_manager._copying.imports._LINES", 1)
    lines = list(full.export_session(ID))

    def frozen() -> Iterator[str]:
        for number, line in enumerate(lines):
            if number == len(lines) // 2:
                end_leases(stored)
                full.delete_session(COPY)
                assert traces(driver, database, COPY) == set()
            yield line

    with pytest.raises(SessionConflictError, match="was removed by another process"):
        full.import_session(frozen(), COPY)
    assert traces(driver, database, COPY) == set()


def test_a_slow_stream_keeps_its_lease(
    full: MongoDBSessionRepository, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mongodb_session_manager._copying.staging.LEASE", timedelta(seconds=1))
    monkeypatch.setattr("mongodb_session_manager._copying.imports._LINES", 1)
    lines = list(full.export_session(ID))

    def slowly() -> Iterator[str]:
        yield from lines[:-1]
        first = stored.find_one({"_id": COPY})["state_until"]
        eventually(lambda: stored.find_one({"_id": COPY})["state_until"] > first + timedelta(seconds=1))
        assert not full.delete_session(COPY)
        yield lines[-1]

    full.import_session(slowly(), COPY)
    assert is_whole(full, COPY)
    assert unfinished(stored) == []


def test_a_copy_that_failed_can_be_repeated_at_once(
    full: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    with MongoDBSessionRepository(server, database, **SMALL, appName="failing") as other:
        other.session_exists(COPY)
        with (
            fail_point(server, failCommands=["aggregate", "findAndModify"], appName="failing", times=2, errorCode=8000),
            pytest.raises(MongoDBSessionError),
        ):
            fork(other)
        assert [each["state"] for each in unfinished(stored)] == ["copying"]
        fork(other)
    assert is_whole(full, COPY)


# A source that is busy.


def test_a_busy_session_with_many_attachments_is_forked(
    repository: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    repository.create_session(Session(ID, "AGENT", MOMENT, MOMENT))
    for agent_id in ("agent", "other"):
        repository.create_agent(ID, SessionAgent(agent_id, {}, {}, {}, MOMENT, MOMENT))
    picture = bytes(range(256)) * 8

    def message(number: int, seed: int) -> Any:
        return said(number, seed.to_bytes(4, "big") + picture, f"version {seed}:")

    for number in range(12):
        repository.create_message(ID, "agent", message(number, number))
    stop = threading.Event()

    def append() -> None:
        number = 0
        while not stop.is_set():
            repository.create_message(ID, "other", message(number, number))
            number += 1

    def replace() -> None:
        seed = 1000
        while not stop.is_set():
            repository.update_message(ID, "agent", message(random.randrange(12), seed))
            seed += 1

    log = CommandLog()
    with MongoDBSessionRepository(server, database, **SMALL, event_listeners=[log]) as other:
        with ThreadPoolExecutor(3) as threads:
            writing: list[Future[None]] = [threads.submit(append), threads.submit(replace), threads.submit(replace)]
            try:
                for number in range(2):
                    fork(other, f"fork {number}")
            finally:
                stop.set()
            for each in writing:
                each.result()
        for number in range(2):
            messages = other.list_messages(f"fork {number}", "agent")
            assert len(messages) == 12
            other.list_messages(f"fork {number}", "other")
            for each in messages:
                text, image = each.message["content"]
                seed = int(text["text"].split()[1].rstrip(":")) if text["text"].startswith("version") else None
                assert seed is not None
                assert image["image"]["source"]["bytes"] == seed.to_bytes(4, "big") + picture
            files = stored.database["agent_sessions_attachments.files"].count_documents(
                {"session_id": f"fork {number}"}
            )
            assert files == sum(other.get_message_count(f"fork {number}", name) for name in ("agent", "other"))


# Killed processes.

KILLED = Path(__file__).with_name("killed_copy.py")


Killed = tuple[list[int], dict[str, list[Any]]]


@pytest.fixture(scope="module")
def killed(
    request: pytest.FixtureRequest,
    shared_repository: MongoDBSessionRepository,
    full_documents: dict[str, list[Any]],
    server: str,
    shared_database: str,
    driver: Driver,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Killed]:
    """Return a function that makes copies in processes that are killed at some of their commands.

    It returns the numbers that are in the ids of the copies, and all documents that are left then.
    """
    stored = driver[shared_database]["agent_sessions"]
    step = 1 if request.config.getoption("--full-adversity") else 5

    @functools.cache
    def killed(what: str) -> Killed:
        store_again(emptied(stored), full_documents)
        lines = tmp_path_factory.mktemp("killed") / "lines"
        lines.write_text("".join(shared_repository.export_session(ID)))
        shown, _ = interpreter.run(KILLED, server, shared_database, what, lines, step)
        return [int(number) for number in shown.split()], documents_of(stored)

    return killed


@pytest.mark.parametrize("what", ["fork", "import"])
def test_a_process_can_be_killed_at_every_command_of_a_copy(
    killed: Callable[[str], Killed],
    repository: MongoDBSessionRepository,
    server: str,
    database: str,
    driver: Driver,
    stored: Stored,
    what: str,
) -> None:
    numbers, documents = killed(what)
    store_again(emptied(stored), documents)
    assert numbers[-1] > 12
    live = {each.session_id for each in repository.list_sessions(limit=100).sessions} - {ID}
    assert {f"{what}-whole", f"{what}-{numbers[-1]}"} <= live, "one killed after its last command has made it"
    assert len(live) <= 4
    assert all(is_whole(repository, session_id) for session_id in live)
    left = {each["_id"] for each in unfinished(stored)}
    assert len(left) >= len(numbers) - len(live) - 2
    stored.update_many({"state": "copying"}, {"$set": {"state_until": datetime.now(UTC) + timedelta(minutes=1)}})
    start_process(server, database)  # a lease is respected
    assert {each["_id"] for each in unfinished(stored)} == left
    end_leases(stored)
    start_process(server, database)
    assert unfinished(stored) == []
    assert {each["session_id"] for each in [*stored.find(), *all_parts(stored)]} == {*live, ID}
    for session_id in live:
        assert is_whole(repository, session_id)
        assert repository.delete_session(session_id)
        assert traces(driver, database, f"{session_id}\0") == set()
    assert is_whole(repository)


def start_process(server: str, database: str) -> None:
    """Use a collection in a new process, which closes its repository."""
    code = (
        "import sys; from mongodb_session_manager import MongoDBSessionRepository\n"
        "with MongoDBSessionRepository(*sys.argv[1:]) as repository: repository.count_sessions()"
    )
    interpreter.run(code, server, database)


def all_parts(stored: Stored) -> list[dict[str, Any]]:
    return [
        part
        for name in stored.database.list_collection_names()
        if name.startswith("agent_sessions_")
        for part in stored.database[name].find()
    ]


def test_who_needs_the_id_finishes_a_killed_copy(
    killed: Callable[[str], Killed],
    repository: MongoDBSessionRepository,
    database: str,
    driver: Driver,
    stored: Stored,
) -> None:
    numbers, documents = killed("import")
    store_again(emptied(stored), documents)
    end_leases(stored)
    act: dict[str, Callable[[str], object]] = {
        "open": repository.open_session,
        "delete": repository.delete_session,
        "import": lambda session_id: export_and_import(repository, session_id),
        "fork": lambda session_id: fork(repository, session_id),
    }
    finishers = itertools.cycle(random.sample(list(act), len(act)))
    for number, finisher in zip(numbers[:-3], finishers, strict=False):
        session_id = f"import-{number}"
        act[finisher](session_id)
        if finisher == "open":
            assert parts_of(stored, session_id) == []
            assert repository.get_metadata(session_id) == {"metadata": {}}
        elif finisher == "delete":
            assert traces(driver, database, f"{session_id}\0") == set()
        else:
            assert is_whole(repository, session_id)
            assert len(incarnations(stored, session_id)) == 1
