"""Sessions that 1.0.0 has stored are read as they are, moved over by the first write, and deleted without a trace."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
import pytest
from bson import ObjectId
from pymongo.database import Database
from strands.agent.conversation_manager import SlidingWindowConversationManager
from strands.types.session import SessionMessage

from from_v100 import (
    EXPECTED,
    EXPIRING,
    OUTSIDE,
    UNFINISHED,
    all_that_is_stored,
    export_of,
    left_under_old_ids,
    load,
    load_again,
    load_as,
    shown,
    traces,
)
from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository, SessionConflictError
from support import agent, eventually, sampled, texts

Driver = pymongo.MongoClient[dict[str, Any]]
Stored = pymongo.collection.Collection[dict[str, Any]]
Some = Callable[[Iterable[Any], int], list[Any]]

pytestmark = pytest.mark.own_database

LIMITS: dict[str, Any] = {"max_embedded_messages": 8, "max_inline_attachment_bytes": 100}
ALL = sorted(EXPECTED)
WITH_AGENTS = [session_id for session_id in ALL if EXPECTED[session_id]["messages"]]
DOUBLED = "v100-doubled"
PLACES_OF_1_0_0 = {"session_ttl", "kept_until", "keep_until", "migrating", "moved"}


@pytest.fixture(scope="module")
def old_database(driver: Driver) -> Iterator[Database[dict[str, Any]]]:
    name = f"test_{uuid.uuid4().hex}"
    load(driver[name])
    yield driver[name]
    driver.drop_database(name)


@pytest.fixture(scope="module")
def shared_repository(old_database: Database[dict[str, Any]], server: str) -> Iterator[MongoDBSessionRepository]:
    with MongoDBSessionRepository(server, old_database.name, **LIMITS) as repository:
        yield repository


@pytest.fixture(scope="module")
def shared_small(old_database: Database[dict[str, Any]], server: str) -> Iterator[MongoDBSessionManagerFactory]:
    with MongoDBSessionManagerFactory(server, old_database.name, **LIMITS) as factory:
        yield factory


@pytest.fixture
def loaded(old_database: Database[dict[str, Any]]) -> Database[dict[str, Any]]:
    load_again(old_database)
    return old_database


@pytest.fixture
def repository(
    loaded: Database[dict[str, Any]], shared_repository: MongoDBSessionRepository
) -> Iterator[MongoDBSessionRepository]:
    yield shared_repository
    eventually(lambda: not shared_repository._async._connection._tasks)


@pytest.fixture
def small(
    loaded: Database[dict[str, Any]], shared_small: MongoDBSessionManagerFactory
) -> Iterator[MongoDBSessionManagerFactory]:
    yield shared_small
    eventually(lambda: not shared_small._connection._tasks)


def messages_of(repository: MongoDBSessionRepository, session_id: str, agent_id: str) -> list[dict[str, Any]]:
    found = [message.to_dict() for message in repository.list_messages(session_id, agent_id)]
    return [{name: each[name] for name in ("message", "redact_message", "message_id")} for each in found]


def expected_messages(session_id: str, agent_id: str) -> list[dict[str, Any]]:
    found = EXPECTED[session_id]["messages"][agent_id]
    return [{name: each[name] for name in ("message", "redact_message", "message_id")} for each in found]


def without_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in each.items() if name != "message_id"} for each in messages]


def assert_whole(
    repository: MongoDBSessionRepository, session_id: str, of: str | None = None, added: int = 0, *, ids: bool = True
) -> None:
    """A session holds what 1.0.0 says that it, or the session it is a copy of, holds; and `added` more messages."""
    of = of or session_id
    assert repository.session_exists(session_id)
    for agent_id in EXPECTED[of]["messages"]:
        found, wanted = messages_of(repository, session_id, agent_id), expected_messages(of, agent_id)
        assert len(found) == len(wanted) + added
        del found[len(wanted) :]
        if ids:
            assert found == wanted
        else:
            assert without_ids(found) == without_ids(wanted)
        assert repository.get_message_count(session_id, agent_id) == len(wanted) + added


def assert_nothing_left(database: Database[dict[str, Any]], *session_ids: str) -> None:
    database["agent_sessions"].update_many({}, {"$unset": {"copy_of": ""}})  # which names the session
    assert traces(database, *session_ids) == set()
    live = {found.get("incarnation") for found in database["agent_sessions"].find()}
    for suffix in OUTSIDE:
        for found in database[f"agent_sessions{suffix}"].find({}, {"_id": 1}):
            incarnation = found["_id"].get("incarnation") or found["_id"].get("file", {}).get("incarnation")
            assert incarnation is None or incarnation in live, found


def is_moved(database: Database[dict[str, Any]], session_id: str) -> bool:
    """Whether all of a session is where this version keeps it; what 1.0.0 left unfinished is no part of it."""
    found = database["agent_sessions"].find_one({"_id": session_id})
    assert found is not None
    return (
        isinstance(found.get("incarnation"), ObjectId)
        and not found.keys() & PLACES_OF_1_0_0
        and (session_id.startswith("v100-half") or not left_under_old_ids(database)[session_id])
    )


def half_of(session_ids: list[str]) -> set[str]:
    return set(random.sample(session_ids, len(session_ids) // 2))


# Reading.


def test_sessions_are_read_as_1_0_0_read_them_and_reading_writes_nothing(
    repository: MongoDBSessionRepository, loaded: Database[dict[str, Any]]
) -> None:
    before = all_that_is_stored(loaded)
    assert {found.session_id for found in repository.list_sessions(limit=100).sessions} == {*ALL}
    assert repository.count_sessions() == len(ALL)
    for session_id in ALL:
        wanted = EXPECTED[session_id]
        assert_whole(repository, session_id)
        assert repository.read_session(session_id) is not None
        assert repository.get_metadata(session_id) == wanted["metadata"]
        found = [{**each, "created_at": str(each["created_at"])} for each in repository.get_feedbacks(session_id)]
        assert found == wanted["feedbacks"]
        assert repository.get_usage(session_id) == wanted["usage"]
        assert repository.list_agents(session_id) == wanted["agents"]
        assert list(repository.export_session(session_id))
        for agent_id, messages in wanted["messages"].items():
            assert repository.read_agent(session_id, agent_id) is not None
            assert len(repository.list_messages(session_id, agent_id, limit=3, offset=1)) == min(3, len(messages) - 1)
            for each in messages[:: max(1, len(messages) - 1)]:  # the first, archived or not, and the last
                message = repository.read_message(session_id, agent_id, each["message_id"])
                assert message is not None
                assert message.to_dict()["message"] == each["message"]
    assert all_that_is_stored(loaded) == before


def test_every_session_restores_its_whole_conversation_and_goes_on(
    small: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, loaded: Database[dict[str, Any]]
) -> None:
    """Through the one manager or the other, others in each run."""

    async def go_on(session_id: str) -> None:
        async with await small.create_session_manager_async(session_id) as manager:
            for agent_id, messages in EXPECTED[session_id]["messages"].items():
                live = agent(manager, "further", agent_id=agent_id)
                assert texts(live.messages) == shown(messages)
                await live.invoke_async("and on")

    asynchronous = half_of(WITH_AGENTS)
    for session_id in WITH_AGENTS:
        if session_id in asynchronous:
            asyncio.run(go_on(session_id))
            continue
        with small.create_session_manager(session_id) as manager:
            for agent_id, messages in EXPECTED[session_id]["messages"].items():
                live = agent(manager, "further", agent_id=agent_id)
                assert texts(live.messages) == shown(messages)
                live("and on")
    for session_id in WITH_AGENTS:
        eventually(lambda session_id=session_id: is_moved(loaded, session_id))
        assert_whole(repository, session_id, added=2, ids=session_id != DOUBLED)


# The first write.


def by_a_turn(repository: MongoDBSessionRepository, factory: MongoDBSessionManagerFactory, session_id: str) -> None:
    with factory.create_session_manager(session_id) as manager:
        agent(manager, "further", agent_id="another")("and on")


def by_opening(repository: MongoDBSessionRepository, factory: MongoDBSessionManagerFactory, session_id: str) -> None:
    factory.create_session_manager(session_id).close()


def by_taking_turns(
    repository: MongoDBSessionRepository, factory: MongoDBSessionManagerFactory, session_id: str
) -> None:
    for number in range(2):
        with factory.create_session_manager(session_id, on_busy="wait", busy_timeout=5.0) as manager:
            agent(manager, "further", agent_id=f"another-{number}")("and on")


def by_metadata(repository: MongoDBSessionRepository, factory: MongoDBSessionManagerFactory, session_id: str) -> None:
    repository.update_metadata(session_id, {"n": 1})


def by_feedback(repository: MongoDBSessionRepository, factory: MongoDBSessionManagerFactory, session_id: str) -> None:
    repository.add_feedback(session_id, {"rating": "up"})


def by_an_append(repository: MongoDBSessionRepository, factory: MongoDBSessionManagerFactory, session_id: str) -> None:
    after = repository.list_messages(session_id, "agent")[-1].message_id + 1
    content: Any = [{"text": "more"}, {"image": {"format": "png", "source": {"bytes": b"x" * 400}}}]
    repository.create_message(session_id, "agent", SessionMessage({"role": "user", "content": content}, after))


def by_a_change_of_an_archived_message(
    repository: MongoDBSessionRepository, factory: MongoDBSessionManagerFactory, session_id: str
) -> None:
    message = repository.list_messages(session_id, "agent")[1]
    repository.update_message(session_id, "agent", message)


MOVING = [by_a_turn, by_opening, by_taking_turns, by_an_append, by_a_change_of_an_archived_message]
OTHERS = [by_metadata, by_feedback]
"""What a session without a date takes as it is, and that with one does not."""


def test_after_the_first_write_nothing_is_where_1_0_0_kept_it(
    repository: MongoDBSessionRepository,
    small: MongoDBSessionManagerFactory,
    loaded: Database[dict[str, Any]],
    some: Some,
) -> None:
    """Each write to an archived session, and some to others."""
    others = ["v100-attachments", EXPIRING, "v100-half-imported-2", "v100-half-written"]
    writes = {
        *(("v100-archive", write) for write in MOVING),
        ("v100-attachments", by_a_change_of_an_archived_message),
        *((session_id, write) for session_id in others for write in some(MOVING, 1)),
    }
    written = {f"{session_id}-{write.__name__}": (session_id, write) for session_id, write in writes}
    for name, (session_id, _) in written.items():
        load_as(loaded, session_id, name, timedelta(0) if session_id == EXPIRING else None)
    before = left_under_old_ids(loaded)
    for name, (_, write) in written.items():
        write(repository, small, name)
    eventually(lambda: not small._connection._tasks and not repository._async._connection._tasks)
    for name, (session_id, write) in written.items():
        eventually(lambda name=name: is_moved(loaded, name))
        wanted = shown(EXPECTED[session_id]["messages"]["agent"])
        if write is by_an_append:
            assert len(repository.list_messages(name, "agent")) == len(wanted) + 1
        else:
            assert_whole(repository, name, session_id)
        with small.create_session_manager(name) as manager:
            assert texts(agent(manager).messages)[: len(wanted)] == wanted
    left = left_under_old_ids(loaded)
    assert {other: left[other] for other in EXPECTED} == {other: before[other] for other in EXPECTED}
    for name in written:
        assert repository.delete_session(name)
    assert_nothing_left(loaded, *written)


# What ends.


def test_a_deleted_session_leaves_no_byte(
    repository: MongoDBSessionRepository, loaded: Database[dict[str, Any]]
) -> None:
    for number, session_id in enumerate(ALL, 1):
        assert repository.delete_session(session_id)
        if number % 4 == 0:
            assert_nothing_left(loaded, *ALL[:number])
        assert not repository.session_exists(session_id)
    for session_id in (*ALL, *UNFINISHED):
        assert not repository.delete_session(session_id)
    assert_nothing_left(loaded, *ALL, *UNFINISHED)
    for suffix in ("", *OUTSIDE):
        assert loaded[f"agent_sessions{suffix}"].count_documents({}) == 0


def test_what_1_0_0_left_under_an_id_is_no_part_of_a_new_session(
    repository: MongoDBSessionRepository, small: MongoDBSessionManagerFactory, loaded: Database[dict[str, Any]]
) -> None:
    for session_id in UNFINISHED:
        with small.create_session_manager(session_id) as manager:
            live = agent(manager, "hello")
            assert live.messages == []
            live("hi")
        found = texts([each.message for each in repository.list_messages(session_id, "agent")])
        assert found == ["hi", "hello"]
        assert repository.delete_session(session_id)
    assert_nothing_left(loaded, *UNFINISHED)


def test_a_copy_goes_into_an_id_under_which_1_0_0_left_something(
    repository: MongoDBSessionRepository, loaded: Database[dict[str, Any]]
) -> None:
    for session_id in UNFINISHED:
        repository.import_session(export_of("v100-attachments"), session_id)
        assert_whole(repository, session_id, "v100-attachments")
        assert repository.delete_session(session_id)
    assert_nothing_left(loaded, *UNFINISHED)


def redact(repository: MongoDBSessionRepository, session_id: str, message_id: int, text: str = "[gone]") -> None:
    message = repository.read_message(session_id, "agent", message_id)
    assert message is not None
    message.redact_message = {"role": message.message["role"], "content": [{"text": text}]}
    repository.update_message(session_id, "agent", message)


def bytes_of(message: dict[str, Any]) -> list[bytes]:
    sources = [block["image"]["source"]["bytes"] for block in message["message"]["content"] if "image" in block]
    return [base64.b64decode(source["data"]) for source in sources]


def is_stored(database: Database[dict[str, Any]], content: bytes) -> bool:
    """Whether bytes are stored anywhere, whatever they belong to."""
    return any(
        content in batch for name in database.list_collection_names() for batch in database[name].find_raw_batches()
    )


@pytest.fixture
def only_attachments(repository: MongoDBSessionRepository, loaded: Database[dict[str, Any]]) -> list[dict[str, Any]]:
    """The expected messages of the session with attachments; other sessions hold the same, so they are gone."""
    load_again(loaded, only="v100-attachments")
    return list(EXPECTED["v100-attachments"]["messages"]["agent"])


@pytest.mark.parametrize(
    ("moved", "order"),
    sampled([(False, (1, 23)), (False, (23, 1)), (True, (1, 23)), (True, (23, 1))], (False, (1, 23)), (True, (23, 1))),
)
def test_a_redacted_message_and_its_attachment_are_gone_from_everywhere(
    repository: MongoDBSessionRepository,
    small: MongoDBSessionManagerFactory,
    loaded: Database[dict[str, Any]],
    only_attachments: list[dict[str, Any]],
    moved: bool,
    order: tuple[int, int],
) -> None:
    """Messages 1, which is archived, and 23 share a file; 2, which is archived, has two files of its own."""
    session_id = "v100-attachments"
    if moved:
        small.create_session_manager(session_id).close()
        eventually(lambda: is_moved(loaded, session_id))
    redact(repository, session_id, 2)
    for content in bytes_of(only_attachments[2]):
        eventually(lambda content=content: not is_stored(loaded, content))
    assert not is_stored(loaded, only_attachments[2]["message"]["tracking_id"].encode() + b"\0\0text 2")
    (shared,) = bytes_of(only_attachments[1])
    redact(repository, session_id, order[0])
    kept = repository.read_message(session_id, "agent", order[1])
    assert kept is not None
    assert bytes_of(kept.to_dict()) == [shared]
    redact(repository, session_id, order[1])
    eventually(lambda: not is_stored(loaded, shared))
    (other,) = bytes_of(only_attachments[22])
    assert is_stored(loaded, other)
    found = texts([each.to_message() for each in repository.list_messages(session_id, "agent")])
    wanted = shown(only_attachments)
    for message_id in (1, 2, 23):
        wanted[message_id] = "[gone]"
    assert found == wanted
    for text in (b"text 2\0", b"text 1\0", b"text 23\0"):
        assert not is_stored(loaded, text)


# Copies.


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.full_adversity)], ids=["some moved over", "others"])
def moved_over(request: pytest.FixtureRequest, small: MongoDBSessionManagerFactory) -> set[str]:
    """Half of the sessions, others in each run, which are moved over; the rest is as 1.0.0 has stored it."""
    chosen = set(random.Random(_SEED).sample(ALL, len(ALL) // 2))
    moved = set(ALL) - chosen if request.param else chosen
    for session_id in moved:
        small.create_session_manager(session_id).close()
    return moved


_SEED = random.random()


def test_a_copy_is_whole_and_stands_alone(
    repository: MongoDBSessionRepository, moved_over: set[str], loaded: Database[dict[str, Any]]
) -> None:
    """A fork, or an export that is imported, others in each run."""
    forked = half_of(ALL)
    for session_id in ALL:
        if session_id in forked:
            repository.fork_session(session_id, f"{session_id}-copied")
        else:
            repository.import_session(list(repository.export_session(session_id)), f"{session_id}-copied")
        assert_whole(repository, session_id, ids=session_id != DOUBLED)
        assert repository.delete_session(session_id)
        assert_whole(repository, f"{session_id}-copied", session_id, ids=session_id != DOUBLED)
        found = loaded["agent_sessions"].find_one({"_id": f"{session_id}-copied"})
        assert found["incarnation"]
        assert not found.keys() & (PLACES_OF_1_0_0 | {"state"})
        assert repository.delete_session(f"{session_id}-copied")
    assert_nothing_left(loaded, *ALL)


def test_a_fork_ends_where_it_should(repository: MongoDBSessionRepository, loaded: Database[dict[str, Any]]) -> None:
    for session_id in ("v100-archive", "v100-attachments"):
        for last in (2, 12, 22):
            copied = f"{session_id}-{last}"
            repository.fork_session(session_id, copied, {"agent": last})
            found = without_ids(messages_of(repository, copied, "agent"))
            assert found == without_ids(expected_messages(session_id, "agent"))[: last + 1]
        assert_whole(repository, session_id)


def test_what_1_0_0_exported_is_imported(
    repository: MongoDBSessionRepository, small: MongoDBSessionManagerFactory
) -> None:
    for session_id in ("v100-plain", "v100-archive", "v100-attachments", DOUBLED):
        imported = f"{session_id}-imported"
        assert repository.import_session(export_of(session_id), imported) == imported
        assert_whole(repository, imported, session_id, ids=session_id != DOUBLED)
        with small.create_session_manager(imported) as manager:
            for agent_id, messages in EXPECTED[session_id]["messages"].items():
                live = agent(manager, "further", agent_id=agent_id)
                assert texts(live.messages) == shown(messages)
                live("and on")
        assert_whole(repository, imported, session_id, added=2, ids=session_id != DOUBLED)


def test_a_session_is_written_back_into_one_document(
    repository: MongoDBSessionRepository, moved_over: set[str], loaded: Database[dict[str, Any]]
) -> None:
    for session_id in WITH_AGENTS:
        repository.write_back(session_id)
        found = loaded["agent_sessions"].find_one({"_id": session_id})
        for agent_id, messages in EXPECTED[session_id]["messages"].items():
            stored = found["agents"][agent_id.replace(".", "%2E")]["messages"]
            assert len(stored) == len(messages)
            assert not any(each.get("attachments") for each in stored)
        assert_whole(repository, session_id, ids=session_id != DOUBLED)
        assert repository.delete_session(session_id)
    assert_nothing_left(loaded, *WITH_AGENTS)


# Expiring.


def outside(database: Database[dict[str, Any]], session_id: str) -> list[dict[str, Any]]:
    found = database["agent_sessions"].find_one({"_id": session_id})
    return [
        each
        for suffix in OUTSIDE
        for each in database[f"agent_sessions{suffix}"].find({"session_id": session_id})
        if {each["_id"].get("incarnation"), each["_id"].get("file", {}).get("incarnation")} & {found["incarnation"]}
    ]


def let_it_expire(client: Driver) -> None:
    """Wait until the server has looked twice for what has expired."""

    def passes() -> int:
        return int(client.admin.command("serverStatus")["metrics"]["ttl"]["passes"])

    before = passes()
    eventually(lambda: passes() >= before + 2 or time.sleep(0.3))


def test_a_session_that_expires_goes_on_to_do_so_with_all_of_it_and_no_part_early(expiring: str) -> None:
    """On a server that looks every second for what has expired; the sessions have half an hour left."""
    age = timedelta(hours=7, minutes=30)
    writes = {write: f"v100-for-{write.__name__}" for write in (*MOVING, *OTHERS)}
    with pymongo.MongoClient[dict[str, Any]](expiring, tz_aware=True) as client, ExitStack() as stack:
        database = client[f"test_{uuid.uuid4().hex}"]
        stack.callback(client.drop_database, database.name)
        load(database, age=age)
        for session_id in writes.values():
            load_as(database, EXPIRING, session_id, age)
        repository = stack.enter_context(MongoDBSessionRepository(expiring, database.name, **LIMITS))
        factory = stack.enter_context(MongoDBSessionManagerFactory(expiring, database.name, **LIMITS))
        let_it_expire(client)
        for write, session_id in writes.items():
            assert_whole(repository, session_id, EXPIRING)
            write(repository, factory, session_id)
        for session_id in writes.values():
            eventually(lambda session_id=session_id: is_moved(database, session_id))
        let_it_expire(client)
        for write, session_id in writes.items():
            assert_whole(repository, session_id, EXPIRING, added=write is by_an_append)
            found = database["agent_sessions"].find_one({"_id": session_id})
            assert found["time_to_live"] == 8 * 3600
            # Opening reads.
            left = timedelta(minutes=25) if write is by_opening else timedelta(hours=7, minutes=55)
            assert left <= found["expires_at"] - datetime.now(UTC) <= timedelta(hours=10), write
            rest = outside(database, session_id)
            assert len(rest) >= 7
            assert all(each["expires_at"] >= found["expires_at"] for each in rest)
        assert "expires_at" not in database["agent_sessions"].find_one({"_id": "v100-archive"})
        # And when its time has come, all of it goes.
        moment = datetime.now(UTC) - timedelta(seconds=1)
        for suffix in ("", *OUTSIDE):
            database[f"agent_sessions{suffix}"].update_many(
                {"session_id": {"$in": [*writes.values()]}}, {"$set": {"expires_at": moment}}
            )
        eventually(lambda: traces(database, *writes.values()) == set() or time.sleep(0.3))
        for session_id in ("v100-archive", "v100-attachments", EXPIRING):
            assert_whole(repository, session_id)


# Several at once.


def test_many_open_and_write_at_the_same_time(
    loaded: Database[dict[str, Any]], repository: MongoDBSessionRepository, server: str
) -> None:
    count, sessions = 3, ["v100-archive", "v100-attachments", EXPIRING, "v100-half-imported-2", DOUBLED]
    barrier = threading.Barrier(count)

    def live(number: int) -> list[str]:
        stored = []
        with MongoDBSessionManagerFactory(server, loaded.name, **LIMITS) as factory:
            factory.ping()
            for session_id in sessions:
                barrier.wait(60)
                try:
                    with factory.create_session_manager(session_id) as manager:
                        manager.update_metadata({f"n{number}": number})
                        # A full window would drop messages as soon as the other one has stored a turn.
                        window = SlidingWindowConversationManager(window_size=1000)
                        agent_id = "agent" if number < 2 else f"agent {number}"
                        live = agent(manager, "further", agent_id=agent_id, conversation_manager=window)
                        if number < 2:
                            assert texts(live.messages)[: len(wanted[session_id])] == wanted[session_id]
                        live(f"from {number}")
                    stored.append(session_id)
                except SessionConflictError:  # of the turn, or told by closing
                    assert number < 2
        return stored

    wanted = {session_id: shown(EXPECTED[session_id]["messages"]["agent"]) for session_id in sessions}
    with ThreadPoolExecutor(count) as threads:
        stored = list(threads.map(live, range(count)))
    for session_id in sessions:
        eventually(lambda session_id=session_id: is_moved(loaded, session_id))
        turns = sum(session_id in each for each in stored[:2])
        assert turns >= 1
        assert repository.get_metadata(session_id)["metadata"].items() >= {f"n{n}": n for n in range(count)}.items()
        found = repository.list_messages(session_id, "agent")
        assert texts([each.to_message() for each in found])[: len(wanted[session_id])] == wanted[session_id]
        assert len(found) >= len(wanted[session_id]) + 2 * turns
        if session_id != DOUBLED:
            assert len({each.message_id for each in found}) == len(found)
        for number in range(2, count):
            assert len(repository.list_messages(session_id, f"agent {number}")) == 2
        assert repository.delete_session(session_id)
    assert_nothing_left(loaded, *sessions)


# 1.0.0 goes on while this version is rolled out.


class OldProcess:
    """Sends what 1.0.0 sends, with what it learned of a session before that was moved over."""

    def __init__(self, database: Database[dict[str, Any]], session_id: str) -> None:
        self.database, self.session_id = database, session_id
        self.generation = self.document.get("attachments_generation")

    @property
    def document(self) -> dict[str, Any]:
        found = self.database["agent_sessions"].find_one({"_id": self.session_id})
        assert found is not None
        return found

    @property
    def head(self) -> dict[str, Any]:
        return dict(self.document["agents"]["agent"])

    def say(self, text: str, picture: bytes | None = None) -> None:
        """Store a message, and its attachment before it; who wrote it finds that the session has no generation."""
        number, moment = self.head["next_message_id"], datetime.now(UTC)
        content: list[dict[str, Any]] = [{"text": text}]
        message: dict[str, Any] = {
            "message": {"role": "user", "content": content, "tracking_id": f"{text}-{number}"},
            "message_id": number,
            "redact_message": None,
            "created_at": moment,
            "updated_at": moment,
        }
        condition: dict[str, Any] = {"_id": self.session_id, "agents.agent.next_message_id": number}
        if picture is not None:
            generation = self.document.get("attachments_generation") or 0
            digest = hashlib.sha256(picture).hexdigest()
            file = {"session_id": self.session_id, "sha256": digest, "generation": generation}
            chunk = {"_id": {"file": file, "n": 0}, "files_id": file, "n": 0, "data": picture}
            entry = {
                "_id": file,
                "length": len(picture),
                "chunkSize": 2 << 20,
                "uploadDate": moment,
                "filename": digest,
            }
            self.database["agent_sessions_attachments.chunks"].insert_one(chunk)
            self.database["agent_sessions_attachments.files"].insert_one(entry)
            reference = f"{digest}:{len(picture)}:{generation}"
            marker = {"__msm__": "attachment", "v": reference}
            content.append({"image": {"format": "png", "source": {"bytes": marker}}})
            message["attachments"] = [reference]
            condition["attachments_generation"] = generation or {"$in": [None, 0]}
        matched = self.database["agent_sessions"].update_one(
            condition,
            {
                "$push": {"agents.agent.messages": message},
                "$set": {
                    "agents.agent.next_message_id": number + 1,
                    "agents.agent.updated_at": moment,
                    "updated_at": moment,
                },
            },
        )
        assert matched.matched_count == 1

    def archive(self, count: int) -> None:
        """Move the oldest messages of the head into a bucket, in two statements."""
        head = self.head
        first, revision = head.get("archived", 0), head.get("revision", 0)
        matching = {
            "_id": self.session_id,
            "agents.agent.created_at": head["created_at"],
            "agents.agent.archived": first or {"$in": [None, 0]},
            "agents.agent.revision": revision or {"$in": [None, 0]},
        }
        bucket_id = {"session_id": self.session_id, "agent": "agent", "since": head["created_at"], "first": first}
        bucket = {
            "_id": {"$literal": bucket_id},
            "session_id": "$_id",
            "revision": {"$literal": revision},
            "last": {"$literal": first + count - 1},
            "messages": {"$slice": ["$agents.agent.messages", count]},
            "generation": {"$ifNull": ["$attachments_generation", 0]},
        }
        into = {"into": "agent_sessions_archive", "on": "_id", "whenMatched": "fail", "whenNotMatched": "insert"}
        sessions = self.database["agent_sessions"]
        sessions.aggregate([{"$match": matching}, {"$project": bucket}, {"$merge": into}])
        rest = {"$slice": ["$agents.agent.messages", count, 2**31 - 1]}
        sets = {"agents.agent.messages": rest, "agents.agent.archived": first + count}
        assert sessions.update_one(matching, [{"$set": sets}]).matched_count == 1


PICTURE = bytes(range(256)) * 2


@pytest.mark.parametrize("session_id", ["v100-archive", "v100-attachments", "v100-plain"])
def test_what_1_0_0_stores_after_a_session_was_moved_over_is_a_part_of_it(
    repository: MongoDBSessionRepository,
    small: MongoDBSessionManagerFactory,
    loaded: Database[dict[str, Any]],
    session_id: str,
) -> None:
    small.create_session_manager(session_id).close()
    eventually(lambda: is_moved(loaded, session_id))
    old = OldProcess(loaded, session_id)
    old.say("old", PICTURE)
    old.say("older")
    old.archive(len(old.head["messages"]) - 1)
    wanted = [*shown(EXPECTED[session_id]["messages"]["agent"]), "old", "older"]

    def assert_all_there(of: str, *more: str) -> None:
        found = [each.to_message() for each in repository.list_messages(of, "agent")]
        assert texts(found) == [*wanted, *more]
        pictures = [
            block["image"]["source"]["bytes"] for block in found[len(wanted) - 2]["content"] if "image" in block
        ]
        assert pictures == [PICTURE]

    assert_all_there(session_id)
    repository.fork_session(session_id, "forked")
    assert_all_there("forked")
    repository.import_session(list(repository.export_session(session_id)), "imported")
    assert_all_there("imported")
    more: list[str] = []
    for turn in range(2):
        with small.create_session_manager(session_id) as manager:
            live = agent(manager, f"a{turn}")
            assert texts(live.messages) == [*wanted, *more][-len(live.messages) :]
            assert len(live.messages) >= min(30, len(wanted))
            live(f"q{turn}")
            appended = [f"r{turn}", f"s{turn}"]
            for text in appended:
                manager.append_message({"role": "user", "content": [{"text": text}]}, live)
            more += [f"q{turn}", f"a{turn}", *appended]
    assert_all_there(session_id, *more)
    redact(repository, session_id, repository.list_messages(session_id, "agent")[len(wanted) - 2].message_id)
    assert repository.delete_session("forked")
    assert repository.delete_session("imported")
    eventually(lambda: not is_stored(loaded, PICTURE))
    assert repository.delete_session(session_id)
    assert_nothing_left(loaded, session_id)


def test_what_a_killed_move_of_1_0_0_left_never_takes_the_place_of_what_is_archived(
    repository: MongoDBSessionRepository, small: MongoDBSessionManagerFactory, loaded: Database[dict[str, Any]]
) -> None:
    """1.0.0 has left a copy of messages 5 to 9, of which one is redacted before it is archived."""
    session_id = "v100-half-written"
    with small.create_session_manager(session_id) as manager:
        live = agent(manager, "a", "b")
        redact(repository, session_id, 6)
        live("p")
        live("q")
    eventually(lambda: loaded["agent_sessions"].find_one({"_id": session_id})["agents"]["agent"]["archived"] > 9)
    old = OldProcess(loaded, session_id)
    old.say("old")
    old.archive(len(old.head["messages"]) - 1)
    wanted = shown(EXPECTED[session_id]["messages"]["agent"])
    wanted[6] = "[gone]"
    for _ in range(2):
        found = texts([each.to_message() for each in repository.list_messages(session_id, "agent")])
        assert found == [*wanted, "p", "a", "q", "b", "old"]
        kept = loaded["agent_sessions_archive"].find({"session_id": session_id})
        assert "text 6" not in [text for bucket in kept for text in texts(bucket["messages"])]
