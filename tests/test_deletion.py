"""Deleting a session leaves nothing of it, however it is interrupted, and takes nothing from a later one of its id."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Any

import pymongo
import pytest
from pymongo.collection import Collection
from strands.multiagent import Swarm
from strands.types.session import Session, SessionAgent, SessionType

from fix_archive import documents_of, emptied, store_again
from fix_deletion import (
    COUNT,
    EVERYWHERE,
    ID,
    MOMENT,
    PICTURE,
    SMALL,
    failing_after,
    fill,
    is_whole,
    said,
    traces,
    wait_for_moves,
)
from fix_overtaking import overtake
from mongodb_session_manager import (
    AccessDeniedError,
    AsyncMongoDBSessionRepository,
    InvalidArgumentError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionNotFoundError,
)
from support import agent, alternating, eventually, fail_point, sampled, texts

Driver = pymongo.MongoClient[dict[str, Any]]
Stored = Collection[dict[str, Any]]


@pytest.fixture(scope="module")
def repository_options() -> dict[str, Any]:
    return SMALL


@pytest.fixture(scope="module")
def documents(
    shared_repository: MongoDBSessionRepository, shared_database: str, driver: Driver
) -> dict[str, list[Any]]:
    """A session with parts in every collection, by collection."""
    stored = emptied(driver[shared_database]["agent_sessions"])
    fill(shared_repository)
    wait_for_moves(stored)
    eventually(lambda: not shared_repository._async._connection._tasks)
    assert traces(driver, shared_database) == EVERYWHERE
    found = documents_of(stored)
    assert len(found["agent_sessions_archive"]) >= 2
    return found


@pytest.fixture
def full(
    documents: dict[str, list[Any]], repository: MongoDBSessionRepository, stored: Stored
) -> MongoDBSessionRepository:
    store_again(stored, documents)
    return repository


def test_nothing_of_a_deleted_session_is_left(full: MongoDBSessionRepository, driver: Driver, database: str) -> None:
    assert full.delete_session(ID) is True
    assert traces(driver, database) == set()
    assert not full.session_exists(ID)


def test_other_sessions_lose_nothing(
    full: MongoDBSessionRepository, driver: Driver, database: str, stored: Stored
) -> None:
    others = [ID[:-1], ID + "0"]
    for other in others:
        fill(full, other)
        wait_for_moves(stored, other)
    assert full.delete_session(ID)
    assert all(is_whole(full, other) for other in others)


def test_a_session_that_is_not_there(full: MongoDBSessionRepository) -> None:
    assert full.delete_session("unknown") is False
    assert full.delete_session(ID) is True
    assert full.delete_session(ID) is False
    assert full.delete_session("again", anything="else") is False


def test_a_bad_id_is_refused(full: MongoDBSessionRepository) -> None:
    bad_ids: list[Any] = ["", "a\0b", {"$ne": None}, None]
    for bad in bad_ids:
        with pytest.raises(InvalidArgumentError):
            full.delete_session(bad)
    assert is_whole(full)


def test_a_factory_deletes(factory: MongoDBSessionManagerFactory, driver: Driver, database: str) -> None:
    agent(factory.create_session_manager(ID), "hello")("hi")
    assert factory.delete_session(ID) is True
    assert factory.delete_session(ID) is False
    assert traces(driver, database) == set()


@pytest.mark.anyio
async def test_a_factory_and_a_repository_delete_asynchronously(
    factory: MongoDBSessionManagerFactory, server: str, database: str, driver: Driver
) -> None:
    await factory.create_session_manager_async(ID)
    assert await factory.delete_session_async(ID) is True
    await factory.create_session_manager_async(ID)
    async with AsyncMongoDBSessionRepository(server, database) as repository:
        assert await repository.delete_session(ID) is True
    assert traces(driver, database) == set()


# Interruptions.


REFUSED, CUT = {"errorCode": 8000}, {"closeConnection": True}


@pytest.mark.parametrize(
    ("finish", "how", "done"),
    [
        *alternating(*(("delete", REFUSED, done) for done in (0, 1, 5, 3, 7))),
        *alternating(("delete", CUT, 2), ("delete", CUT, 6)),
        *alternating(("start", REFUSED, 7), ("start", REFUSED, 1)),
        *sampled(
            [
                *(("delete", REFUSED, done) for done in (2, 4, 6)),
                *(("delete", CUT, done) for done in (0, 1, 3, 4, 5, 7)),
                *((finish, REFUSED, done) for finish in ("open", "create") for done in (1, 4, 7)),
                ("start", REFUSED, 4),
            ],
            *(("open", REFUSED, 4), ("create", REFUSED, 1)),
        ),
    ],
)
def test_an_interrupted_deletion_is_finished_by_the_next_process_that_meets_it(
    full: MongoDBSessionRepository,
    server: str,
    driver: Driver,
    database: str,
    stored: Stored,
    monkeypatch: pytest.MonkeyPatch,
    done: int,
    finish: str,
    how: dict[str, Any],
) -> None:
    monkeypatch.setattr("mongodb_session_manager._store.deletion.LEASE", timedelta(0))
    with failing_after(server, done, failCommands=["findAndModify", "delete"], **how), suppress(MongoDBSessionError):
        full.delete_session(ID)
    if not done:
        assert is_whole(full)
        full.delete_session(ID)
    assert not full.session_exists(ID)
    assert full.list_sessions().sessions == ()
    assert full.count_sessions() == 0
    with pytest.raises(SessionNotFoundError):
        full.list_messages(ID, "agent")
    document = stored.find_one({"_id": ID})
    assert document is None or document.keys() == {
        *("_id", "session_id", "incarnation", "state", "state_by", "state_until")
    }
    with MongoDBSessionRepository(f"{server}&appName={uuid.uuid4().hex}", database) as other:
        match finish:
            case "delete":
                assert other.delete_session(ID) is False
            case "open":
                assert other.open_session(ID)["agents"] == {}
            case "create":
                other.create_session(Session(ID, "AGENT"))
            case "start":
                other.list_sessions()
                eventually(lambda: not traces(driver, database))
        if finish in ("open", "create"):
            assert traces(driver, database) == {"agent_sessions"}
            assert other.delete_session(ID) is True
    assert traces(driver, database) == set()


@pytest.mark.parametrize("lost", sampled(range(3), 0, 2))
@pytest.mark.parametrize("command", ["findAndModify", "delete"])
def test_a_lost_acknowledgement(
    full: MongoDBSessionRepository, server: str, driver: Driver, command: str, lost: int
) -> None:
    write_concern_error = {"code": 6, "errmsg": "done, but nobody hears of it"}
    data = {"failCommands": [command], "errorLabels": ["RetryableWriteError"]}
    with fail_point(server, times=lost + 1, writeConcernError=write_concern_error, **data):
        assert full.delete_session(ID) is True
    assert traces(driver, full._async._store.collection.database) == set()


# Writers under way.


def test_a_manager_learns_that_its_session_is_gone(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str
) -> None:
    manager = factory.create_session_manager(ID)
    live = agent(manager, "hello", "again")
    live("hi")
    assert factory.delete_session(ID)
    with pytest.raises(SessionNotFoundError):
        live("are you there?")
    with pytest.raises(SessionNotFoundError):
        manager.update_metadata({"colour": "red"})
    with pytest.raises(SessionNotFoundError):
        manager.add_feedback({"rating": "up"})
    with pytest.raises(SessionNotFoundError):
        manager.flush()
    assert traces(driver, database) == set()


def test_a_manager_that_has_not_stored_anything_yet(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str
) -> None:
    live = agent(factory.create_session_manager(ID), "hello")
    assert factory.delete_session(ID)
    with pytest.raises(SessionNotFoundError):
        live("hi")
    assert traces(driver, database) == set()


def test_a_manager_does_not_go_on_in_another_session_of_the_same_id(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    """Both conversations are at the same message, so nothing but the session tells them apart."""
    live = agent(factory.create_session_manager(ID), "one", "two")
    live("earlier")
    assert factory.delete_session(ID)
    agent(factory.create_session_manager(ID), "other")("later")
    with pytest.raises(SessionNotFoundError):
        live("once more")
    assert texts(stored.find_one({"_id": ID})["agents"]["agent"]["messages"]) == ["later", "other"]
    with factory.create_session_manager(ID) as manager:
        agent(manager, "again")("still here")
    assert len(stored.find_one({"_id": ID})["agents"]["agent"]["messages"]) == 4


def test_a_swarm_does_not_go_on_in_another_session_of_the_same_id(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    def swarm(manager: Any) -> Swarm:
        return Swarm([agent(None, "done", agent_id="one")], id="swarm", session_manager=manager)

    running = swarm(factory.create_session_manager(ID))
    running("earlier")
    assert factory.delete_session(ID)
    swarm(factory.create_session_manager(ID))("later")
    state = stored.find_one({"_id": ID})["multi_agents"]
    with pytest.raises(SessionNotFoundError):
        running("once more")
    assert stored.find_one({"_id": ID})["multi_agents"] == state


def picture_message(picture: bytes = PICTURE) -> Any:
    return [{"text": "look"}, {"image": {"format": "png", "source": {"bytes": picture}}}]


@pytest.mark.parametrize("back", [False, True], ids=["gone", "back"])
def test_attachments_of_a_message_that_comes_too_late_are_removed(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str, back: bool
) -> None:
    manager = factory.create_session_manager(ID, max_inline_attachment_bytes=1000)
    live = agent(manager, "nice", "nicer")
    live(picture_message())
    assert factory.delete_session(ID)
    if back:
        agent(factory.create_session_manager(ID), "hello", agent_id="other")("hi")
    with pytest.raises(MongoDBSessionError):
        live(picture_message(PICTURE[::-1]))
    assert traces(driver, database) == ({"agent_sessions"} if back else set())


def test_attachments_stored_while_the_session_is_deleted(
    factory: MongoDBSessionManagerFactory, server: str, driver: Driver, database: str
) -> None:
    manager = factory.create_session_manager(ID, max_inline_attachment_bytes=1000)
    live = agent(manager, "nice")
    files = driver[database]["agent_sessions_attachments.files"]
    with (
        fail_point(server, failCommands=["update"], blockConnection=True, blockTimeMS=1000),
        ThreadPoolExecutor(1) as pool,
    ):
        turn = pool.submit(live, picture_message())
        eventually(lambda: files.count_documents({}))
        assert factory.delete_session(ID)
        with pytest.raises(SessionNotFoundError):
            turn.result(60)
    assert traces(driver, database) == set()


def test_a_repository_stores_no_attachments_of_a_session_that_is_gone(
    repository: MongoDBSessionRepository, driver: Driver, database: str
) -> None:
    with pytest.raises(SessionNotFoundError):
        repository.create_message(ID, "agent", said(0, PICTURE))
    assert traces(driver, database) == set()


@pytest.mark.parametrize("back", [False, True], ids=["gone", "back"])
def test_a_bucket_that_is_moved_while_the_session_is_deleted(
    server: str, database: str, driver: Driver, stored: Stored, back: bool
) -> None:
    """The deletion has looked for buckets before this one was there."""
    archive = driver[database]["agent_sessions_archive"]
    with (
        MongoDBSessionRepository(server, database, **SMALL) as repository,
        fail_point(server, failCommands=["findAndModify"], blockConnection=True, blockTimeMS=1000),
    ):
        repository.create_session(Session(ID, "AGENT", MOMENT, MOMENT))
        repository.create_agent(ID, SessionAgent("agent", {}, {}, {}, MOMENT, MOMENT))
        for n in range(9):
            repository.create_message(ID, "agent", said(n))
        eventually(lambda: archive.count_documents({}))
        stored.delete_one({"_id": ID})
        if back:
            repository.create_session(Session(ID, "AGENT"))
            repository.create_agent(ID, SessionAgent("agent", {}, {}))
        repository.close()  # waits for the move
    assert traces(driver, database) == ({"agent_sessions"} if back else set())


def test_a_bucket_that_another_process_has_moved_meanwhile_stays(
    server: str, database: str, driver: Driver, stored: Stored
) -> None:
    """The move finds the head changed, as after a deletion, but the bucket it has made is the other's as well."""
    archive = driver[database]["agent_sessions_archive"]
    with MongoDBSessionRepository(server, database, **SMALL) as repository:
        repository.create_session(Session(ID, "AGENT", MOMENT, MOMENT))
        repository.create_agent(ID, SessionAgent("agent", {}, {}, {}, MOMENT, MOMENT))
        for n in range(9):
            repository.create_message(ID, "agent", said(n))
        wait_for_moves(stored)
        first = stored.find_one({"_id": ID})["agents"]["agent"]["archived"]
        with fail_point(server, failCommands=["findAndModify"], blockConnection=True, blockTimeMS=1000):
            for n in range(9, 14):
                repository.create_message(ID, "agent", said(n))
            eventually(lambda: archive.count_documents({}) == 2)
            taken = archive.find_one({"_id.first": first})["last"] + 1 - first
            sets = {
                "agents.agent.archived": first + taken,
                "agents.agent.messages": {"$slice": ["$agents.agent.messages", taken, 1000]},
            }
            assert stored.update_one({"_id": ID, "agents.agent.archived": first}, [{"$set": sets}]).modified_count
            repository.close()  # waits for the move
    with MongoDBSessionRepository(server, database) as repository:
        messages = repository.list_messages(ID, "agent")
    assert texts([message.to_message() for message in messages]) == [f"text {n}" for n in range(14)]


# The same id again.


def test_a_session_of_the_same_id(full: MongoDBSessionRepository, driver: Driver, stored: Stored) -> None:
    """Its agent even claims to have been created in the same moment."""
    assert full.delete_session(ID)
    fill(full, text="new")
    wait_for_moves(stored)
    assert is_whole(full, text="new")
    assert full.delete_session(ID)
    assert traces(driver, stored.database.name) == set()


@pytest.mark.parametrize("held", [*alternating(0, 2, 4, 6), *sampled([1, 3, 5])])
def test_a_session_that_is_created_while_one_of_its_id_is_deleted_loses_nothing(
    full: MongoDBSessionRepository, server: str, database: str, driver: Driver, stored: Stored, held: int
) -> None:
    before = stored.find_one({"_id": ID})["incarnation"]
    with MongoDBSessionRepository(server, database, **SMALL) as other, ThreadPoolExecutor(1) as pool:
        with failing_after(server, held, failCommands=["delete"], blockConnection=True, blockTimeMS=200):
            deletion = pool.submit(full.delete_session, ID)
            eventually(lambda: not stored.count_documents({"_id": ID, "incarnation": before, "state": None}))
            fill(other, text="new")
        assert deletion.result(60) is True
        wait_for_moves(stored)
        assert is_whole(other, text="new")
        for name in ("archive", "attachments.files"):
            collection = driver[database][f"agent_sessions_{name}"]
            assert collection.count_documents({"_id.incarnation": before}) == 0
        assert other.delete_session(ID)
    assert traces(driver, database) == set()


def test_many_delete_and_write_at_once(
    repository: MongoDBSessionRepository, server: str, database: str, driver: Driver
) -> None:
    """The last writer finds the session gone."""
    start = threading.Barrier(4)

    def write(repository: MongoDBSessionRepository) -> None:
        start.wait(30)
        with suppress(SessionNotFoundError):
            for n in range(10, COUNT):
                repository.create_message(ID, "agent", said(n, PICTURE[n:] if n % 4 == 0 else None))

    def delete(repository: MongoDBSessionRepository) -> None:
        start.wait(30)
        repository.delete_session(ID)

    with ExitStack() as stack:
        writing, *deleting = [
            stack.enter_context(MongoDBSessionRepository(server, database, **SMALL)) for _ in range(4)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(4))
        for _ in range(3):
            repository.create_session(Session(ID, SessionType.AGENT, MOMENT, MOMENT))
            repository.create_agent(ID, SessionAgent("agent", {}, {}, {}, MOMENT, MOMENT))
            for n in range(10):
                repository.create_message(ID, "agent", said(n, PICTURE[n:] if n % 4 == 0 else None))
            futures = [pool.submit(write, writing), *(pool.submit(delete, each) for each in deleting)]
            for future in futures:
                future.result(60)
            for each in (repository, writing, *deleting):
                eventually(lambda each=each: not each._async._connection._tasks)
            assert traces(driver, database) == set()


def test_what_the_server_refuses_is_an_error(full: MongoDBSessionRepository, server: str) -> None:
    with fail_point(server, failCommands=["findAndModify"], errorCode=13), pytest.raises(AccessDeniedError):
        full.delete_session(ID)
    assert is_whole(full)


# Reading meanwhile.


class Deleting(AsyncMongoDBSessionRepository):
    """Finds that somebody else has deleted the session between its document and its archive."""

    later: Callable[[], object] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        overtake(self._store.archive.collection, "send", self._overtaken)

    async def _overtaken(self) -> None:
        if (later := self.later) is not None:
            self.later = None
            await asyncio.to_thread(later)


READING: dict[str, Callable[[AsyncMongoDBSessionRepository], Any]] = {
    "list": lambda repository: repository.list_messages(ID, "agent"),
    "read": lambda repository: repository.read_message(ID, "agent", 3),
    "replace": lambda repository: repository.update_message(ID, "agent", said(3)),
}


@pytest.mark.anyio
@pytest.mark.parametrize("what", READING)
async def test_who_reads_meanwhile_is_told_that_the_session_does_not_exist(
    full: MongoDBSessionRepository, server: str, database: str, what: str
) -> None:
    async with Deleting(server, database, **SMALL) as repository:
        repository.later = lambda: full.delete_session(ID)
        with pytest.raises(SessionNotFoundError):
            await READING[what](repository)


@pytest.mark.anyio
async def test_who_opens_meanwhile_gets_a_new_session(
    full: MongoDBSessionRepository, server: str, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    for with_picture in (2, COUNT - 1):
        await asyncio.to_thread(full.update_message, ID, "agent", said(with_picture))
    async with Deleting(server, database, **SMALL) as repository:
        repository.later = lambda: full.delete_session(ID)
        assert (await repository.open_session(ID))["agents"] == {}
    assert caplog.messages == []


@pytest.mark.anyio
async def test_metadata_of_a_session_that_is_deleted_and_created_again_is_stored(
    server: str, database: str, full: MongoDBSessionRepository
) -> None:
    await asyncio.to_thread(full.delete_session, ID)
    async with AsyncMongoDBSessionRepository(server, database, **SMALL) as repository:
        overtake(repository._store.sessions, "get", lambda: repository.open_session(ID))
        await repository.update_metadata(ID, {"colour": "blue"})
        assert await repository.get_metadata(ID) == {"metadata": {"colour": "blue"}}
