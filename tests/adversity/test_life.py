"""A process is killed between any two commands of an operation; the next one finds or restores a complete state."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
import pytest
from pymongo.database import Database
from strands.types.session import Session, SessionAgent, SessionMessage

from fix_archive import documents_of, emptied, store_again
from from_v100 import EXPECTED, load_as, shown
from from_v100 import OUTSIDE as OUTSIDE_OF_V1
from killing import Child, Killer, start
from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository
from mongodb_session_manager._format.layout import OUTSIDE
from mongodb_session_manager._store import content as _content
from mongodb_session_manager._store import values as _values
from support import agent, eventually, texts

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

Driver = pymongo.MongoClient[dict[str, Any]]
Say = Callable[[str, Any], None]

LIMITS: dict[str, Any] = {"max_embedded_messages": 4, "max_inline_attachment_bytes": 100}
MOMENT = "2026-01-05T09:30:00+00:00"
COUNT = 12
TTL = timedelta(hours=8)
V1 = "v100-attachments"
SOURCE = "source-0000"


def picture(seed: object) -> bytes:
    return random.Random(str(seed)).randbytes(300)


def said(message_id: int, text: str, *pictures: bytes) -> SessionMessage:
    images: Any = [{"image": {"format": "png", "source": {"bytes": data}}} for data in pictures]
    role: Any = ("user", "assistant")[message_id % 2]
    message: Any = {"role": role, "content": [{"text": text}, *images], "tracking_id": f"t{message_id}"}
    return SessionMessage(message, message_id, None, MOMENT, MOMENT)


def fill(repository: MongoDBSessionRepository, session_id: str) -> None:
    """Create a session with about three buckets, an archived attachment and one in the document."""
    repository.create_session(Session(session_id, "AGENT", MOMENT, MOMENT))
    repository.create_agent(session_id, SessionAgent("agent", {}, {}, {}, MOMENT, MOMENT))
    for n in range(COUNT):
        pictures = [picture(n)] if n in (1, COUNT - 1) else []
        repository.create_message(session_id, "agent", said(n, f"text {n}", *pictures))


async def store(factory: MongoDBSessionManagerFactory, session_id: str) -> None:
    """Store a large value in the storage of a session, and a small one for each message."""
    async with factory.create_session_manager_async(session_id) as manager:
        for n in range(COUNT):
            await manager.storage.write(f"context/{session_id}/t{n}_0", b"text %d" % n)
        await manager.storage.write("large", STORED["large"])


TEXTS = [f"text {n}" for n in range(COUNT)]


@dataclass(frozen=True)
class Context:
    """The database of an operation, and the session that it uses: what is stored of it, and its export."""

    uri: str
    database: Database[dict[str, Any]]
    documents: dict[str, list[Any]]
    lines: list[str]

    def store(self, session_id: str) -> None:
        """Store the session under an id."""
        store_again(self.database["agent_sessions"], self.documents, {SOURCE: session_id})


@dataclass(frozen=True)
class Later:
    """The database and the clients of the check."""

    database: Database[dict[str, Any]]
    repository: MongoDBSessionRepository
    factory: MongoDBSessionManagerFactory


def content(repository: MongoDBSessionRepository, session_id: str) -> list[tuple[str, list[bytes]]]:
    found = [message.to_message() for message in repository.list_messages(session_id, "agent")]
    return [
        (texts([message])[0], [block["image"]["source"]["bytes"] for block in message["content"] if "image" in block])
        for message in found
    ]


STORED = {"large": random.Random("large").randbytes(200)}
OTHER = random.Random("other").randbytes(150)


def values_of(later: Later, session_id: str) -> tuple[set[str], dict[str, bytes]]:
    """The blocks of messages in the storage of a session, and its other values."""

    async def read() -> tuple[set[str], dict[str, bytes]]:
        prefix = f"context/{session_id}/"
        async with later.factory.create_session_manager_async(session_id, must_exist=True) as manager:
            keys = await manager.storage.list()
            values = {key: await manager.storage.read(key) or b"" for key in keys}
        blocks = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        return blocks, {key: data for key, data in values.items() if not key.startswith(prefix)}

    return asyncio.run(read())


WHOLE = [(f"text {n}", [picture(n)] if n in (1, COUNT - 1) else []) for n in range(COUNT)]


class Operation:
    """An operation that is interrupted.

    Attributes:
        makes: Whether it creates the session.
        removes: Whether it removes the session.
        client: The class of the client that the killed process creates.
        options: The options of that client.
    """

    client: Any = MongoDBSessionManagerFactory

    makes = False
    removes = False
    options: dict[str, Any] = {}  # noqa: RUF012

    def prepare(self, context: Context, session_id: str) -> None:
        if not self.makes:
            context.store(session_id)

    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        raise NotImplementedError

    def check(self, found: list[tuple[str, list[bytes]]], child: Child) -> None:
        """Check the content of the session if it exists."""
        assert found == WHOLE

    def check_opened(self, later: Later, session_id: str, child: Child) -> None:
        """Check the session after another process has opened it."""


class OpenNew(Operation):
    makes = True

    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        with factory.create_session_manager(session_id) as manager:
            agent(manager, "hello")("hi")

    def check(self, found: list[tuple[str, list[bytes]]], child: Child) -> None:
        assert found == [("hi", []), ("hello", [])][: len(found)]
        assert child.killed or len(found) == 2


class Turn(Operation):
    """Appends, with an attachment, and moves old messages."""

    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        def answer(_: object) -> str:
            say("acknowledged", 1)  # otherwise the model is not called
            return "answer"

        with factory.create_session_manager(session_id) as manager:
            live = agent(manager, answer, "another")
            live([{"text": "look"}, {"image": {"format": "png", "source": {"bytes": picture("turn")}}}])
            say("acknowledged", 2)
            live("more")
            say("acknowledged", 4)

    def check(self, found: list[tuple[str, list[bytes]]], child: Child) -> None:
        acknowledged = max(child.has_said("acknowledged"), default=0)
        added = [("look", [picture("turn")]), ("answer", []), ("more", []), ("another", [])]
        assert found == (WHOLE + added)[: len(found)]
        assert len(found) >= len(WHOLE) + acknowledged


class Replace(Operation):
    """Replaces an archived message and its attachment."""

    client = MongoDBSessionRepository

    def work(self, factory: Any, context: Context, session_id: str, say: Say) -> None:
        factory.update_message(session_id, "agent", said(1, "replaced", picture("new")))
        say("acknowledged", 1)

    def check(self, found: list[tuple[str, list[bytes]]], child: Child) -> None:
        replaced = [*WHOLE[:1], ("replaced", [picture("new")]), *WHOLE[2:]]
        assert found == replaced or (not child.has_said("acknowledged") and found == WHOLE)

    def check_opened(self, later: Later, session_id: str, child: Child) -> None:
        incarnation = later.database["agent_sessions"].find_one({"_id": session_id})["incarnation"]
        chunks = later.database["agent_sessions_attachments.chunks"]

        def old() -> int:
            return chunks.count_documents({"_id.file.incarnation": incarnation, "data": picture(1)})

        if content(later.repository, session_id)[1][0] == "replaced":
            eventually(lambda: not old())
        else:
            assert old() == 1


class Redact(Operation):
    """Redacts an archived message, and removes its attachment and its content in the storage."""

    client = MongoDBSessionRepository

    def work(self, factory: Any, context: Context, session_id: str, say: Say) -> None:
        message = said(1, "text 1")
        message.redact_message = {"role": "assistant", "content": [{"text": "gone"}]}
        factory.update_message(session_id, "agent", message)
        say("acknowledged", 1)

    def check(self, found: list[tuple[str, list[bytes]]], child: Child) -> None:
        redacted = [*WHOLE[:1], ("gone", []), *WHOLE[2:]]
        assert found == redacted or (not child.has_said("acknowledged") and found == WHOLE)

    def check_opened(self, later: Later, session_id: str, child: Child) -> None:
        values, mine = values_of(later, session_id)
        if content(later.repository, session_id)[1][0] == "gone":
            assert "t1_0" not in values
        assert values | {"t1_0"} == {f"t{n}_0" for n in range(COUNT)}
        assert mine == STORED


class Store(Operation):
    """Stores values in the storage of a session: a large one in the place of another, and a small one."""

    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        with factory.create_session_manager(session_id) as manager:
            asyncio.run(manager.storage.write("large", OTHER))
            asyncio.run(manager.storage.write("new", b"new"))
        say("acknowledged", 1)

    def check_opened(self, later: Later, session_id: str, child: Child) -> None:
        _, mine = values_of(later, session_id)
        assert mine in (STORED, {"large": OTHER}, {"large": OTHER, "new": b"new"})
        assert not child.has_said("acknowledged") or len(mine) == 2


class Fork(Operation):
    makes = True

    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        factory.fork_session(SOURCE, session_id)


class Import(Operation):
    makes = True

    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        factory.import_session(context.lines, session_id)


class Delete(Operation):
    removes = True

    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        assert factory.delete_session(session_id)


class Renew(Operation):
    """Writes to a session whose expiry date must be extended."""

    options = {"session_ttl": TTL}  # noqa: RUF012

    def prepare(self, context: Context, session_id: str) -> None:
        super().prepare(context, session_id)
        with MongoDBSessionRepository(context.uri, context.database.name, session_ttl=TTL, **LIMITS) as repository:
            repository.update_metadata(session_id, {"n": 1})
        date = {"$set": {"expires_at": datetime.now(UTC) + timedelta(minutes=5)}}
        for suffix in ("", *OUTSIDE):
            changed = context.database[f"agent_sessions{suffix}"].update_many({"session_id": session_id}, date)
            assert changed.matched_count

    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        with factory.create_session_manager(session_id) as manager:
            manager.update_metadata({"n": 2})
            say("acknowledged", 1)

    def check_opened(self, later: Later, session_id: str, child: Child) -> None:
        found = later.database["agent_sessions"].find_one({"_id": session_id})
        if child.has_said("acknowledged"):
            assert found["expires_at"] > datetime.now(UTC) + timedelta(hours=7, minutes=50)
        for suffix in OUTSIDE:
            for part in later.database[f"agent_sessions{suffix}"].find({"session_id": session_id}):
                assert part["expires_at"] >= found["expires_at"]


class Migrate(Operation):
    """Opens a session that 1.0.0 has stored, and writes to it."""

    def prepare(self, context: Context, session_id: str) -> None:
        load_as(context.database, V1, session_id)

    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        with factory.create_session_manager(session_id) as manager:
            manager.update_metadata({"n": 1})

    def check(self, found: list[tuple[str, list[bytes]]], child: Child) -> None:
        wanted = EXPECTED[V1]["messages"]["agent"]
        assert [text for text, _ in found] == shown(wanted)
        counts = [sum("image" in block for block in each["message"]["content"]) for each in wanted]
        assert [len(pictures) for _, pictures in found] == [
            0 if each["redact_message"] else count for each, count in zip(wanted, counts, strict=True)
        ]

    def check_opened(self, later: Later, session_id: str, child: Child) -> None:
        for suffix, path in zip(OUTSIDE_OF_V1, ("_id", "_id", "_id.file"), strict=True):
            found = later.database[f"agent_sessions{suffix}"]
            eventually(lambda found=found, path=path: not found.count_documents({f"{path}.session_id": session_id}))


class WriteBack(Operation):
    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        factory.write_back(session_id)
        say("acknowledged", 1)

    def check_opened(self, later: Later, session_id: str, child: Child) -> None:
        if child.has_said("acknowledged"):
            found = later.database["agent_sessions"].find_one({"_id": session_id})
            assert len(found["agents"]["agent"]["messages"]) == COUNT


class Rewind(Operation):
    """Removes archived messages and an attachment; what is removed stays as a session."""

    def work(self, factory: MongoDBSessionManagerFactory, context: Context, session_id: str, say: Say) -> None:
        factory.rewind_session(session_id, 4, keep_as=f"{session_id}-kept")
        say("acknowledged", 1)

    def check(self, found: list[tuple[str, list[bytes]]], child: Child) -> None:
        assert found == WHOLE[:5] or (not child.has_said("acknowledged") and found == WHOLE)

    def check_opened(self, later: Later, session_id: str, child: Child) -> None:
        kept, sessions = f"{session_id}-kept", later.database["agent_sessions"]
        sessions.update_many({"_id": kept, "state": "copying"}, {"$set": {"state_until": datetime(2020, 1, 1)}})
        if len(content(later.repository, session_id)) == 5:
            assert content(later.repository, kept) == WHOLE
            own = sessions.find_one({"_id": session_id})["incarnation"]
            of_agent = {"_id.incarnation": own, "_id.first": {"$gte": 5}}
            assert not later.database["agent_sessions_archive"].count_documents(of_agent)
            assert later.database["agent_sessions_attachments.files"].count_documents({"_id.incarnation": own}) == 1
        elif later.repository.session_exists(kept):
            assert content(later.repository, kept) == WHOLE
        later.repository.delete_session(kept)
        assert parts_of(later.database, kept) == []


OPERATIONS = [
    OpenNew(),
    Turn(),
    Replace(),
    Redact(),
    Store(),
    Fork(),
    Import(),
    Delete(),
    Renew(),
    Migrate(),
    WriteBack(),
    Rewind(),
]


def interrupted(operation: Operation, context: Context, session_id: str, at: int | None, after: bool) -> Child:
    def work(killer: Killer, say: Say) -> None:
        options = {**LIMITS, **operation.options, "event_listeners": [killer]}
        with operation.client(context.uri, context.database.name, **options) as client:
            tasks = getattr(client, "_async", client)._connection._tasks
            client.list_sessions()
            eventually(lambda: not tasks)  # the tasks that a process starts with
            killer.armed = True
            operation.work(client, context, session_id, say)
            eventually(lambda: not tasks)
            killer.armed = False

    return start(work, at, after).wait()


def parts_of(database: Database[dict[str, Any]], session_id: str) -> list[Any]:
    """All stored parts of a session, live or not."""
    found: list[Any] = [*database["agent_sessions"].find({"_id": session_id}, {"state": 1})]
    for suffix in OUTSIDE:
        paths = ("session_id", "_id.session_id", "_id.file.session_id")
        condition = {"$or": [{path: session_id} for path in paths]}
        found += database[f"agent_sessions{suffix}"].find(condition, {"_id": 1})
    return found


def check(operation: Operation, later: Later, lines: list[str], session_id: str, child: Child) -> None:
    sessions, repository, factory = later.database["agent_sessions"], later.repository, later.factory
    is_there = repository.session_exists(session_id)
    if not child.killed:
        assert is_there is not operation.removes
    before: list[tuple[str, list[bytes]]] = []
    if is_there:
        before = content(repository, session_id) if repository.list_agents(session_id) else []
        operation.check(before, child)
    else:
        assert operation.makes or operation.removes
        assert session_id not in {found.session_id for found in repository.list_sessions(limit=1000).sessions}
    # A lease lasts a minute; the test does not wait until it expires.
    sessions.update_many({"_id": session_id, "state": "copying"}, {"$set": {"state_until": datetime(2020, 1, 1)}})
    with factory.create_session_manager(session_id) as manager:
        assert texts(agent(manager).messages) == [text for text, _ in before]
    eventually(lambda: not factory._connection._tasks)
    assert not sessions.count_documents({"_id": session_id, "state": {"$exists": True}})
    operation.check_opened(later, session_id, child)
    if is_there:
        after = content(repository, session_id) if repository.list_agents(session_id) else []
        assert after == before
        factory.fork_session(session_id, "again")
        assert (content(repository, "again") if after else []) == after
        assert factory.delete_session("again")
        assert parts_of(later.database, "again") == []
    if operation.makes and not is_there:
        assert repository.delete_session(session_id)
        repository.import_session(lines, session_id)
        assert content(repository, session_id) == WHOLE
    assert repository.delete_session(session_id)
    assert not repository.delete_session(session_id)
    assert parts_of(later.database, session_id) == []


@pytest.fixture(scope="module")
def small_values() -> Iterator[None]:
    """Values beyond 100 bytes have several pieces; forked processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_values, "INLINE_LIMIT", 100)
        patch.setattr(_content, "PIECE_BYTES", 64)
        yield


@pytest.fixture(scope="module")
def source(
    small_values: None, server: str, driver: Driver, shared_database: str
) -> tuple[dict[str, list[Any]], list[str]]:
    """What is stored of the session that the operations use, and its export."""
    stored = emptied(driver[shared_database]["agent_sessions"])
    with (
        MongoDBSessionRepository(server, shared_database, **LIMITS) as repository,
        MongoDBSessionManagerFactory(server, shared_database, **LIMITS) as factory,
    ):
        fill(repository, SOURCE)
        asyncio.run(store(factory, SOURCE))
        lines = list(repository.export_session(SOURCE))
    return documents_of(stored), lines


@pytest.mark.timeout(900)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: type(operation).__name__)
def test_a_process_is_killed_between_any_two_commands(
    server: str,
    driver: Driver,
    database: str,
    source: tuple[dict[str, list[Any]], list[str]],
    operation: Operation,
    some: Callable[[Any, int], list[Any]],
) -> None:
    context = Context(server, driver[database], *source)
    context.store(SOURCE)
    operation.prepare(context, "not-killed-")
    children = {"not-killed-": interrupted(operation, context, "not-killed-", None, False)}
    count = len(children["not-killed-"].commands)
    assert count
    # Killed when its last command was answered, it leaves what it leaves if it is not killed.
    points = [(number, after) for number in range(1, count + 1) for after in (False, True)][:-1]
    for number, after in some(points, 1):
        session_id = f"{('before', 'after-')[after]}-{number:04}"
        operation.prepare(context, session_id)
        children[session_id] = child = interrupted(operation, context, session_id, number, after)
        assert child.killed or len(child.commands) < number
    with (
        MongoDBSessionRepository(server, database, **LIMITS) as repository,
        MongoDBSessionManagerFactory(server, database, **LIMITS) as factory,
    ):
        later = Later(context.database, repository, factory)
        for session_id, child in children.items():
            try:
                check(operation, later, context.lines, session_id, child)
            except BaseException as error:
                error.add_note(f"killed at the command {session_id}: {child.commands}")
                raise
        assert content(repository, SOURCE) == WHOLE
        assert repository.delete_session(SOURCE)
    for suffix in ("", *OUTSIDE):
        assert context.database[f"agent_sessions{suffix}"].count_documents({}) == 0
