"""The storage of a session: its values live and die with the session and its messages."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.collection import Collection
from strands import Agent, tool
from strands.storage import InMemoryStorage
from strands.types.exceptions import StorageError

from fix_archive import SECRET, SMALL, appends, documents_of, emptied, redacted, said, store_again
from fix_copying import left_of
from fix_overtaking import overtake
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    InvalidArgumentError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    MongoDBStorage,
    SessionClosedError,
    SessionNotFoundError,
)
from mongodb_session_manager._format.content import block_ids_of
from mongodb_session_manager._format.keys import block_id_of, copied_key
from mongodb_session_manager._store import content as _content
from mongodb_session_manager._store import values as _values
from mongodb_session_manager.demo import Redaction
from orchestrators import node, pipeline
from support import CommandLog, Session, agent, alternating, apply, bson_of, eventually, fail_point, sampled, texts

Stored = Collection[dict[str, Any]]

pytestmark = pytest.mark.anyio

STASH = "context/s/scopes/agent/agent"
TTL = timedelta(hours=8)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=alternating(False, True), ids=["manager", "async manager"])
def session(request: pytest.FixtureRequest, factory: MongoDBSessionManagerFactory, runner: asyncio.Runner) -> Session:
    return Session(factory, runner, request.param)


@pytest.fixture
def content(stored: Stored) -> Stored:
    """The collection of the values."""
    return stored.database["agent_sessions_content"]


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values beyond 100 bytes have pieces of 64 bytes."""
    monkeypatch.setattr(_values, "INLINE_LIMIT", 100)
    monkeypatch.setattr(_content, "PIECE_BYTES", 64)


def write(storage: MongoDBStorage, values: dict[str, bytes]) -> None:
    async def write_all() -> None:
        for key, data in values.items():
            await storage.write(key, data)

    asyncio.run(write_all())


def values_of(storage: MongoDBStorage) -> dict[str, bytes | None]:
    async def read_all() -> dict[str, bytes | None]:
        return {key: await storage.read(key) for key in await storage.list("")}

    return asyncio.run(read_all())


def holds(stored: Stored, *texts: bytes) -> bool:
    """Tell whether one of the texts, as it is or as base64, is anywhere in the database."""
    names = stored.database.list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}})
    wanted = [*texts, *(base64.b64encode(text).rstrip(b"=")[:-1] for text in texts)]
    return any(text in batch for name in names for batch in bson_of(stored.database[name]) for text in wanted)


def stashing(manager: Any, *replies: Any, **options: Any) -> Agent:
    """Return an agent whose context manager stores its blocks in the storage of the session."""
    return with_limit(agent(manager, *replies, storage=manager.storage, context_manager="auto", **options))


def with_limit(live: Agent) -> Agent:
    model: Any = live.model
    model.update_config(context_window_limit=200_000)
    return live


# With Strands' context manager.


@tool
def report() -> str:
    """Return much."""
    return "word " * 4000


def invoked(live: Agent, text: str) -> None:
    asyncio.run(live.invoke_async(text))


def called(live: Agent, text: str) -> None:
    live(text)


TURNS = pytest.mark.parametrize("turn", alternating(called, invoked))


@TURNS
def test_an_agent_stores_what_it_offloads_in_its_session(
    session: Session, turn: Callable[..., Any], content: Stored
) -> None:
    """Strands shows no warning: warnings are errors here."""
    session.open()
    live = stashing(session.manager, {"tool": "report", "input": {}}, "Done.", tools=[report])
    turn(live, "Report.")
    assert "word " * 4000 not in str(live.messages)
    session.close()
    session.open()
    storage = session.manager.storage
    keys = asyncio.run(storage.list(f"{STASH}/"))
    assert any(b"word " * 4000 in (asyncio.run(storage.read(key)) or b"") for key in keys)
    assert f"{STASH}/{live.messages[0]['tracking_id']}_0" in keys
    incarnation = session.manager._unit.incarnation
    for document in content.find():
        assert document["_id"]["incarnation"] == incarnation
        assert document["session_id"] == "s"
    resumed = stashing(session.manager, tools=[report])
    assert resumed.messages == live.messages
    assert resumed.storage is session.manager.storage


def test_strands_warns_about_a_storage_that_is_not_the_sessions(factory: MongoDBSessionManagerFactory) -> None:
    other = factory.create_session_manager("other")
    manager = factory.create_session_manager("s")
    agent(manager, agent_id="own", storage=manager.storage.namespace("mine"))
    for number, storage in enumerate((other.storage, InMemoryStorage(), factory.create_storage())):
        with pytest.warns(UserWarning, match="Agent-level storage"):
            agent(manager, agent_id=f"agent {number}", storage=storage)


def test_an_agent_with_the_storage_of_its_session_is_restored_as_any_other(
    factory: MongoDBSessionManagerFactory,
) -> None:
    with factory.create_session_manager("s") as manager:
        live = agent(manager, "Hello!", storage=manager.storage, state={"n": 1})
        live("Hi.")
        live.state.set("n", 2)
    with factory.create_session_manager("s") as manager:
        again = agent(manager, storage=manager.storage)
        plain = agent(None, storage=manager.storage)
        assert (again.messages, again.state.get()) == (live.messages, {"n": 2})
        assert type(again) is type(plain)


def test_nodes_of_a_graph_store_their_content_in_the_session(
    factory: MongoDBSessionManagerFactory, content: Stored
) -> None:
    with factory.create_session_manager("s") as manager:
        options: Any = {"storage": manager.storage, "context_manager": "auto"}
        nodes = [with_limit(node(name, "Done.", **options)) for name in ("one", "two")]
        pipeline(manager, *nodes)("Go.")
        assert {key.split("/")[-2] for key in asyncio.run(manager.storage.list("context/"))} == {"one", "two"}
    assert factory.delete_session("s")
    assert content.count_documents({}) == 0


# Redaction.


@tool
def account() -> str:
    """Return the account of the user."""
    return SECRET


WAYS_OF_TURNS = [*itertools.product((called, invoked), ("conflict", "wait"), (1, -1))]
RUN = [(called, "conflict", 1), (invoked, "wait", -1)]


@pytest.mark.parametrize("save_on", ["message", "overlap", "invocation"])
@pytest.mark.parametrize(
    ("turn", "on_busy", "order"), [*alternating(*RUN), *sampled(way for way in WAYS_OF_TURNS if way not in RUN)]
)
def test_nothing_of_a_redacted_prompt_or_tool_result_is_left(
    session: Session, stored: Stored, save_on: str, turn: Callable[..., Any], on_busy: str, order: int
) -> None:
    session.open(save_on=save_on, on_busy=on_busy)
    turns: list[Any] = [(SECRET, [Redaction("[removed]")]), ("Go on.", [{"tool": "account"}, Redaction("[removed]")])]
    live = stashing(session.manager, tools=[account])
    model: Any = live.model
    for text, replies in [*turns[::order], ("bye", ["Bye."])]:
        model.replies.extend(replies)
        turn(live, text)
    session.close()
    assert not holds(stored, SECRET.encode())
    session.open()
    keys = asyncio.run(session.manager.storage.list(f"{STASH}/"))
    stashed = {key.removeprefix(f"{STASH}/").rpartition("_")[0] for key in keys}
    said = [each for each in live.messages if each["content"][0].get("text", "[removed]") != "[removed]"]
    assert stashed == {each["tracking_id"] for each in said}
    assert len(stashed) == 5


def test_an_explicit_redaction_removes_the_content(session: Session, stored: Stored) -> None:
    session.open()
    live = stashing(session.manager, f"You said {SECRET}.")
    live("hi")
    assert holds(stored, SECRET.encode())
    session.manager.redact_latest_message({"role": "assistant", "content": [{"text": "[removed]"}]}, live)
    session.flush()
    assert not holds(stored, SECRET.encode())
    assert len(values_of(session.manager.storage)) == 1


@pytest.fixture(scope="module")
def repository_options() -> dict[str, Any]:
    return SMALL


def key_of(message_id: int, session_id: str = "s") -> str:
    return f"context/{session_id}/scopes/agent/agent/t{message_id}_0"


COUNT = 12


@pytest.fixture(scope="module")
def documents(server: str, shared_database: str, driver: MongoClient[dict[str, Any]]) -> dict[str, list[Any]]:
    stored = emptied(driver[shared_database]["agent_sessions"])
    with MongoDBSessionManagerFactory(server, shared_database, **SMALL) as factory:
        with factory.create_session_manager("s") as manager:
            agent(manager)
        with MongoDBSessionRepository(server, shared_database, **SMALL) as repository:
            apply(repository, "s", appends(range(COUNT)))
            eventually(lambda: not repository._async._connection._tasks)
        with factory.create_session_manager("s") as manager:
            write(manager.storage, {**{key_of(n): b"block %d" % n for n in range(COUNT)}, "own": b"value"})
    assert stored.find_one({"agents.agent.archived": 8}) is not None
    return documents_of(stored)


@pytest.fixture
def filled(stored: Stored, documents: dict[str, list[Any]]) -> None:
    """Store a session with archived messages, and a value for each message and one of its own."""
    store_again(stored, documents)


@pytest.mark.parametrize("message_id", [3, COUNT - 1], ids=["archived", "in the document"])
@pytest.mark.usefixtures("filled")
def test_a_message_that_is_redacted_later_loses_its_content(
    factory: MongoDBSessionManagerFactory,
    repository: MongoDBSessionRepository,
    stored: Stored,
    message_id: int,
    small_files: None,
) -> None:
    manager = factory.create_session_manager("s")
    repository.update_message("s", "agent", redacted(message_id))
    expected = {key_of(n): b"block %d" % n for n in range(COUNT) if n != message_id} | {"own": b"value"}
    assert values_of(manager.storage) == expected
    # A writer that has read the message before comes too late, in this process or another one.
    for storage in (manager.storage, factory.create_session_manager("s").storage):
        write(storage, {key_of(message_id): SECRET.encode(), f"mine/t{message_id}_12": SECRET.encode() * 20})
        assert not holds(stored, SECRET.encode())
        assert values_of(storage) == expected
    assert texts([repository.read_message("s", "agent", message_id).to_message()]) == ["[redacted]"]


@pytest.mark.parametrize("count", alternating(2, COUNT))
@pytest.mark.parametrize("later", alternating(0, COUNT))
def test_a_message_that_was_redacted_before_the_first_value_has_no_content(
    factory: MongoDBSessionManagerFactory,
    repository: MongoDBSessionRepository,
    commands: CommandLog,
    count: int,
    later: int,
) -> None:
    """Whether it was or is in the archive, and whether its replacement has a tracking id, as that of Strands has."""
    manager = factory.create_session_manager("s")
    agent(manager)
    manager.flush()
    apply(repository, "s", appends(range(count)))
    eventually(lambda: not repository._async._connection._tasks)
    for number in (0, 1):
        message: Any = redacted(number)
        if number:
            message.redact_message["tracking_id"] = "t1"
        repository.update_message("s", "agent", message)
    apply(repository, "s", appends(range(count, count + later)))
    eventually(lambda: not repository._async._connection._tasks)
    write(manager.storage, {key_of(n): SECRET.encode() for n in (0, 1)} | {key_of(2): b"block"})
    assert values_of(manager.storage) == {key_of(2): b"block"}


async def test_a_write_and_a_redaction_at_the_same_time(
    server: str, database: str, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    """Whichever of their commands comes first, nothing is left."""
    async with (
        factory.create_session_manager_async("s") as manager,
        MongoDBSessionManagerFactory(server, database, **SMALL) as other,
    ):
        repository = other._async
        agent(manager)
        await manager.flush()
        await other._portal.run(repository._apply, "s", appends(range(12)))

        async def write_late(number: int) -> None:
            await asyncio.sleep(number / 3000)
            await manager.storage.write(key_of(number), SECRET.encode())

        for number in range(12):
            redaction = other._portal.run(repository.update_message, "s", "agent", redacted(number))
            await asyncio.gather(write_late(number), redaction)
        assert await manager.storage.list("") == []
    assert not holds(stored, SECRET.encode())


@pytest.mark.parametrize("size", alternating(5, 500))
async def test_a_write_and_a_deletion_at_the_same_time(
    server: str, database: str, factory: MongoDBSessionManagerFactory, stored: Stored, small_files: None, size: int
) -> None:
    async with MongoDBSessionManagerFactory(server, database) as other:
        await other.ping_async()
        for number in range(12):
            manager = await factory.create_session_manager_async("s")
            if number % 2:
                await manager.storage.write("before", bytes(size))

            async def delete_late(number: int = number) -> None:
                await asyncio.sleep(number / 3000)
                assert await other.delete_session_async("s")

            writing = manager.storage.write("key", bytes(size))
            _, outcome = await asyncio.gather(delete_late(), writing, return_exceptions=True)
            assert outcome is None or isinstance(outcome, SessionNotFoundError)
            assert left_of(stored, "s") == []


@pytest.mark.parametrize("ids", alternating(["functions/report", "a//b/", "/a"], ["", "a_1", "$a.b"]))
@pytest.mark.parametrize("first", alternating(0, COUNT - 3), ids=["archived", "in the document"])
def test_a_redacted_result_loses_its_content_whatever_the_id_of_the_call(
    factory: MongoDBSessionManagerFactory,
    repository: MongoDBSessionRepository,
    stored: Stored,
    ids: list[str],
    first: int,
) -> None:
    """Providers choose the ids; Strands makes them a part of the keys."""
    tool_use_ids = dict(enumerate(ids, first))
    with factory.create_session_manager("s") as manager:
        agent(manager)
    changes = appends(range(COUNT))
    for number, tool_use_id in tool_use_ids.items():
        result = {"toolUseId": tool_use_id, "status": "success", "content": [{"text": SECRET}]}
        changes[number].message["message"]["content"] = [{"toolResult": result}]
    apply(repository, "s", changes)
    eventually(lambda: not repository._async._connection._tasks)
    storage = factory.create_session_manager("s").storage
    write(storage, {f"{STASH}/{each}_0": SECRET.encode() for each in ids} | {f"{STASH}/other_0": b"kept"})
    for number, tool_use_id in tool_use_ids.items():
        before = {*asyncio.run(storage.list(""))}
        repository.update_message("s", "agent", redacted(number))
        assert len(before - {*asyncio.run(storage.list(""))}) == 1
        write(storage, {f"{STASH}/{tool_use_id}_1": SECRET.encode()})
    assert values_of(storage) == {f"{STASH}/other_0": b"kept"}
    assert not holds(stored, SECRET.encode())


@pytest.mark.usefixtures("filled")
def test_other_replacements_keep_the_content(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository
) -> None:
    repository.update_message("s", "agent", said(2, "another text"))
    manager = factory.create_session_manager("s")
    assert values_of(manager.storage)[key_of(2)] == b"block 2"


@pytest.mark.parametrize("message_id", alternating(3, COUNT - 1), ids=["archived", "in the document"])
@pytest.mark.usefixtures("filled")
def test_the_next_opening_finishes_the_removal_of_content(
    server: str,
    factory: MongoDBSessionManagerFactory,
    repository: MongoDBSessionRepository,
    content: Stored,
    message_id: int,
) -> None:
    with (
        fail_point(server, failCommands=["delete"], errorCode=8000, times=20),
        pytest.raises(MongoDBSessionError),
    ):
        repository.update_message("s", "agent", redacted(message_id))
    assert content.count_documents({"_id.key": key_of(message_id)}) == 1
    with factory.create_session_manager("s"):
        eventually(lambda: not content.count_documents({"_id.key": key_of(message_id)}))
    assert content.count_documents({}) == COUNT


def test_a_session_without_content_costs_nothing_for_it(
    factory: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog
) -> None:
    with factory.create_session_manager("s") as manager:
        live = agent(manager, Redaction("[removed]"))
        live(SECRET)
    with factory.create_session_manager("s") as manager:
        agent(manager)
    assert "has_content" not in (stored.find_one() or {})
    assert "delete" not in commands.names
    assert not re.search(r'"(has_|removed_)?content": ?[^\[]', "".join(factory.export_session("s")))


# Commands.


async def test_the_commands_of_each_operation(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    storage = (await factory.create_session_manager_async("s")).storage
    await storage.write("warm up", b"")  # builds the index
    storage = (await factory.create_session_manager_async("s")).storage
    commands.clear()
    await storage.write("a/b", b"1")
    assert commands.names == ["update", "update", "find"]
    commands.clear()
    await storage.write("a/b", b"2")
    assert commands.names == ["update", "find"]
    commands.clear()
    assert await storage.read("a/b") == b"2"
    assert await storage.list("a/") == ["a/b"]
    await storage.delete("a/b")
    assert commands.names == ["find", "find", "delete"]


# The life of a session.


def test_deleting_a_session_removes_its_values(
    factory: MongoDBSessionManagerFactory, stored: Stored, small_files: None
) -> None:
    manager, other = (factory.create_session_manager(name) for name in ("s", "other"))
    for each in (manager, other):
        write(each.storage, {"small": b"1", "large": bytes(500)})
    assert factory.delete_session("s")
    assert left_of(stored, "s") == []
    assert values_of(other.storage) == {"small": b"1", "large": bytes(500)}
    # A manager that has it open stores nothing, not even in a new session with the id.
    for _ in range(2):
        for data in (b"late", bytes(500)):
            with pytest.raises(SessionNotFoundError) as caught:
                write(manager.storage, {"small": data})
            assert isinstance(caught.value, StorageError)
        assert values_of(manager.storage) == {}
        assert "agent_sessions_content" not in left_of(stored, "s")
        again = factory.create_session_manager("s")
        assert values_of(again.storage) == {}
    write(again.storage, {"small": b"new"})
    assert values_of(manager.storage) == {}


def test_another_call_finishes_an_interrupted_deletion(
    server: str, factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with factory.create_session_manager("s") as manager:
        write(manager.storage, {"key": b"value"})
    with (
        fail_point(server, failCommands=["delete"], errorCode=8000, times=20),
        pytest.raises(MongoDBSessionError),
    ):
        factory.delete_session("s")
    assert set(left_of(stored, "s")) == {"agent_sessions", "agent_sessions_content"}
    assert not factory.delete_session("s")
    assert left_of(stored, "s") == []


@pytest.mark.parametrize("size", alternating(1, 500))
def test_a_value_expires_with_its_session_and_not_before(
    server: str,
    database: str,
    factory: MongoDBSessionManagerFactory,
    stored: Stored,
    content: Stored,
    small_files: None,
    size: int,
) -> None:
    def dates() -> tuple[datetime, list[datetime]]:
        document = stored.find_one() or {}
        return document["expires_at"], [each["expires_at"] for each in content.find()]

    with MongoDBSessionManagerFactory(server, database, session_ttl=TTL) as expiring:
        before = factory.create_session_manager("s")
        write(before.storage, {"before": bytes(size)})
        assert not content.count_documents({"expires_at": {"$exists": True}})
        manager = expiring.create_session_manager("s")
        manager.update_metadata({"n": 1})
        write(before.storage, {"unaware": bytes(size)})
        write(manager.storage, {"after": bytes(size)})
        date, of_values = dates()
        assert len(of_values) == 3 * (1 if size == 1 else 9)
        assert all(each >= date for each in of_values)
        soon = datetime.now(UTC) + timedelta(minutes=5)
        for collection in (stored, content):
            collection.update_many({}, {"$set": {"expires_at": soon}})
        # A writer with an outdated date in mind.
        write(before.storage, {"before": bytes(size)})
        with expiring.create_session_manager("s") as late:
            late.update_metadata({"n": 2})
        write(before.storage, {"unaware": bytes(size)})
        date, of_values = dates()
        assert date > datetime.now(UTC) + timedelta(hours=7)
        assert all(each >= date for each in of_values)
    assert "expires_at_1" in content.index_information()


@pytest.mark.usefixtures("filled")
def test_values_stay_when_a_session_is_written_back(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository
) -> None:
    repository.write_back("s")
    assert len(values_of(factory.create_session_manager("s").storage)) == COUNT + 1


# Before and after.


async def test_before_the_session_is_open_and_after_it_is_closed(
    server: str, database: str, factory: MongoDBSessionManagerFactory
) -> None:
    async with factory.create_session_manager_async("s") as manager:
        await manager.storage.write("key", b"value")
    early = AsyncMongoDBSessionManager("s", server, database)
    storage = early.storage
    assert await storage.read("key") == b"value"
    await storage.write("early", b"1")
    async with early:
        assert early.storage is storage
        assert await storage.list("") == ["early", "key"]
        view = storage.namespace("a/b")
        await view.write("c", b"2")
    for each in (storage, view):
        with pytest.raises(SessionClosedError):
            await each.read("c")
    missing = AsyncMongoDBSessionManager("missing", server, database)
    for operation in (missing.storage.write("a", b""), missing.storage.read("a"), missing.storage.list("")):
        with pytest.raises(SessionNotFoundError):
            await operation
    await missing.close()


async def test_a_session_that_was_created_again_before_it_is_open(
    server: str, database: str, factory: MongoDBSessionManagerFactory
) -> None:
    early = AsyncMongoDBSessionManager("s", server, database)
    for value in (b"1", b"2"):
        async with factory.create_session_manager_async("s") as manager:
            await manager.storage.write("key", value)
        assert await early.storage.read("key") == value
        assert await early.storage.list("") == ["key"]
        await factory.delete_session_async("s")
    await early.close()


async def test_a_closed_manager_of_a_factory_has_no_storage(factory: MongoDBSessionManagerFactory) -> None:
    async with factory.create_session_manager_async("s") as manager:
        await manager.storage.write("key", b"value")
    with pytest.raises(SessionClosedError, match="session 's' is closed"):
        await manager.storage.read("key")


async def test_the_storage_of_another_owners_session_is_that_of_none(
    server: str, database: str, factory: MongoDBSessionManagerFactory
) -> None:
    async with factory.create_session_manager_async("s", owner="bob") as manager:
        await manager.storage.write("key", b"value")
    for session_id in ("s", "absent"):
        attacker = AsyncMongoDBSessionManager(session_id, server, database, owner="alice")
        for operation in (
            lambda storage: storage.write("a", b""),
            lambda storage: storage.read("key"),
            lambda storage: storage.delete("key"),
            lambda storage: storage.list(""),
        ):
            with pytest.raises(SessionNotFoundError, match=f"session '{session_id}' does not exist"):
                await operation(attacker.storage)
        await attacker.close()
    async with factory.create_session_manager_async("s", owner="bob") as manager:
        assert await manager.storage.read("key") == b"value"


def test_what_it_shows(factory: MongoDBSessionManagerFactory) -> None:
    shown = repr(factory.create_session_manager("s").storage)
    assert shown == "<storage of session_id='s', <Connection owned, open>>"


# Copies.


def copied(factory: MongoDBSessionManagerFactory, way: str) -> None:
    if way == "fork":
        factory.fork_session("s", "t/2")
    else:
        assert factory.import_session(list(factory.export_session("s")), "t/2") == "t/2"


WAYS = pytest.mark.parametrize("way", ["import", "fork"])


@WAYS
def test_a_copy_has_the_values_of_its_session(
    factory: MongoDBSessionManagerFactory, stored: Stored, small_files: None, way: str
) -> None:
    values = {
        "a": b"",
        "b": b"small",
        "c": bytes(range(250)) * 4,
        "context/other/x_1": b"1",
        "é/\U0001f600": b"2",
        "s/snapshots": b"3",
    }
    with factory.create_session_manager("s") as manager:
        live = stashing(manager, "Hello!")
        live("Hi.")
        write(manager.storage, values)
        own = values_of(manager.storage)
    copied(factory, way)
    with factory.create_session_manager("t/2") as manager:
        renamed = {re.sub("^context/s/", "context/t/2/", key): data for key, data in own.items()}
        assert values_of(manager.storage) == renamed
        assert len(renamed) == len(values) + 2
        resumed = stashing(manager, "Again!")
        resumed("Go on.")
        assert len(asyncio.run(manager.storage.list("context/t/2/scopes/agent/agent/"))) == 4
    assert values_of(factory.create_session_manager("s").storage) == own
    assert factory.delete_session("t/2")
    assert left_of(stored, "t/2") == []


@WAYS
@pytest.mark.parametrize("ttl", alternating(None, TTL))
def test_a_copy_removes_the_content_of_a_message_that_is_redacted_in_it(
    server: str, database: str, stored: Stored, way: str, ttl: timedelta | None
) -> None:
    with MongoDBSessionManagerFactory(server, database, session_ttl=ttl) as factory:
        with factory.create_session_manager("s") as manager:
            live = stashing(manager, SECRET)
            live("Hi.")
        copied(factory, way)
        assert factory.delete_session("s")
        with factory.create_session_manager("t/2") as manager:
            live = stashing(manager)
            manager.redact_latest_message({"role": "assistant", "content": [{"text": "[removed]"}]}, live)
        assert not holds(stored, SECRET.encode())
        session, values = stored.find_one() or {}, list(stored.database["agent_sessions_content"].find())
        assert len(values) == 1
        assert ttl is None or values[0]["expires_at"] >= session["expires_at"]


@WAYS
@pytest.mark.usefixtures("filled")
def test_a_copy_does_not_revive_removed_content(
    server: str,
    factory: MongoDBSessionManagerFactory,
    repository: MongoDBSessionRepository,
    way: str,
) -> None:
    with fail_point(server, failCommands=["delete"], errorCode=8000, times=20), pytest.raises(MongoDBSessionError):
        repository.update_message("s", "agent", redacted(1))
    copied(factory, way)
    keys = asyncio.run(factory.create_session_manager("t/2").storage.list(""))
    assert keys == sorted([*(key_of(n, "t/2") for n in range(COUNT) if n != 1), "own"])


@WAYS
@pytest.mark.usefixtures("filled")
def test_a_copy_of_a_message_that_is_redacted_meanwhile_has_none_of_its_content(
    server: str, database: str, repository: MongoDBSessionRepository, way: str
) -> None:
    """The session was read before the redaction, and its archive during the redaction."""
    waiting = iter([3])

    def redact_in_part(message_id: int) -> None:
        with fail_point(server, failCommands=["delete"], errorCode=8000, times=20), pytest.raises(MongoDBSessionError):
            repository.update_message("s", "agent", redacted(message_id))

    async def redact() -> None:
        for message_id in waiting:
            await asyncio.to_thread(redact_in_part, message_id)

    with MongoDBSessionManagerFactory(server, database) as copying:
        overtake(copying._async._store.archive, "read_bucket", redact)
        copied(copying, way)
        assert next(waiting, None) is None
        messages = repository.list_messages("t/2", "agent")
        assert texts([messages[3].to_message()]) == ["[redacted]"]
        keys = asyncio.run(copying.create_session_manager("t/2").storage.list(""))
    assert sorted(keys) == sorted([*(key_of(n, "t/2") for n in range(COUNT) if n != 3), "own"])


@WAYS
def test_a_session_that_is_deleted_while_its_values_are_copied_is_not_copied(
    server: str, database: str, stored: Stored, way: str
) -> None:
    with MongoDBSessionManagerFactory(server, database) as factory:
        with factory.create_session_manager("s") as manager:
            write(manager.storage, {"a": b"1", "b": b"2"})
        overtake(factory._async._store.content, "keys", lambda: factory._async.delete_session("s"))
        with pytest.raises(SessionNotFoundError, match="session 's' no longer exists"):
            copied(factory, way)
    assert left_of(stored, "t/2") == []


@pytest.mark.usefixtures("filled")
def test_a_fork_of_the_beginning_has_the_content_of_its_messages(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository
) -> None:
    factory.fork_session("s", "t", 4)
    keys = asyncio.run(factory.create_session_manager("t").storage.list(""))
    assert keys == [*(key_of(n, "t") for n in range(5)), "own"]


@pytest.mark.parametrize("last", [-1, 1, COUNT - 3])
@pytest.mark.usefixtures("filled")
def test_a_rewind_removes_the_content_of_the_removed_messages(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored, last: int
) -> None:
    repository.rewind_session("s", last, keep_as="kept")
    manager = factory.create_session_manager("s")
    keys = sorted([*(key_of(n) for n in range(last + 1)), "own"])
    assert asyncio.run(manager.storage.list("")) == keys
    assert "removed_content" not in (stored.find_one({"_id": "s"}) or {})
    assert len(values_of(factory.create_session_manager("kept").storage)) == COUNT + 1
    write(manager.storage, {key_of(COUNT - 2): b"of another message"})  # the same tracking id, in another turn
    assert len(asyncio.run(manager.storage.list(""))) == len(keys) + 1


async def test_a_rewind_while_a_large_value_is_written_damages_no_export(
    server: str, database: str, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewind removes the pieces that are there; the value would be stored without them."""
    async with MongoDBSessionManagerFactory(server, database, **SMALL) as factory:
        async with factory.create_session_manager_async("s") as manager:
            agent(manager)
            await manager.flush()
            for number in range(4):
                await factory._portal.run(factory._async.create_message, "s", "agent", said(number))
            await manager.storage.write(f"{STASH}/t3_0", b"small")
            finish = _content.Upload.finish

            async def rewind_first(upload: _content.Upload) -> None:
                monkeypatch.setattr(_content.Upload, "finish", finish)
                await factory._async.rewind_session("s", 1)
                await finish(upload)

            monkeypatch.setattr(_content.Upload, "finish", rewind_first)
            await manager.storage.write(f"{STASH}/t3_1", bytes(500))
            assert await manager.storage.list("") == []
        assert len([line async for line in factory.export_session_async("s")]) > 3


@pytest.mark.usefixtures("filled")
def test_the_next_opening_finishes_the_removal_after_a_rewind(
    server: str, factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, content: Stored
) -> None:
    with fail_point(server, failCommands=["delete"], errorCode=8000, times=20):
        repository.rewind_session("s", 3)
    assert content.count_documents({}) == COUNT + 1
    with factory.create_session_manager("s"):
        eventually(lambda: content.count_documents({}) == 5)


# The export format.


def exported(factory: MongoDBSessionManagerFactory, values: dict[str, bytes]) -> list[str]:
    with factory.create_session_manager("s") as manager:
        write(manager.storage, values)
    lines = list(factory.export_session("s"))
    return [*lines[:-1], json.dumps({"end": {**json.loads(lines[-1])["end"], "sha256": None}})]


def without_digest(lines: list[str]) -> list[str]:
    end = json.loads(lines[-1])
    end["end"].pop("sha256")
    return [*lines[:-1], json.dumps(end)]


def test_the_lines_of_values(factory: MongoDBSessionManagerFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mongodb_session_manager._copying.export_format.PIECE_BYTES", 3)
    lines = exported(factory, {"b": b"12345", "a/c": b""})
    assert [json.loads(line) for line in lines[2:-1]] == [
        {"content": "a/c", "size": 0, "at": 0, "data": ""},
        {"content": "b", "size": 5, "at": 0, "data": "MTIz"},
        {"content": "b", "size": 5, "at": 3, "data": "NDU="},
    ]
    assert json.loads(lines[-1])["end"] == {"agents": 0, "messages": 0, "attachments": 0, "content": 2, "sha256": None}
    factory.import_session(without_digest(lines), "t")
    assert values_of(factory.create_session_manager("t").storage) == {"a/c": b"", "b": b"12345"}


def line(key: Any, data: str = "MTIz", size: Any = 3, at: Any = 0) -> str:
    return json.dumps({"content": key, "size": size, "at": at, "data": data})


DAMAGED = [
    ([line("a\\b")], "key must not contain a backslash"),
    ([line("../a")], "key must not contain the segment"),
    ([line("/a")], "its key is not valid"),
    ([line("")], "key must not be empty"),
    ([line(5)], "its key is not valid"),
    ([line({"$code": "a"})], "its key is not valid"),
    ([line("b"), line("a")], "its key does not follow"),
    ([line("a"), line("a")], "its key does not follow"),
    ([line("a", size=-1)], "its size"),
    ([line("a", size=2)], "its value does not have the given size"),
    ([line("a", size="3")], "unknown record type"),
    ([line("a", at=3)], "it does not continue its value"),
    ([line("a", size=6), line("a", size=7, at=3)], "it does not continue its value"),
    ([line("a", size=6), line("b")], "the value before it is not complete"),
    ([line("a", size=6), line("a", "", 6, 3)], "its value does not have the given size"),
    ([line("a", "MTI")], "its data is not base64"),
    ([line("a", size=2**70)], "damaged|64|unknown"),
    ([line("a", size=6)], "the value before it is not complete"),
    ([], "its counts do not match"),
]


def test_damaged_values_are_refused_and_leave_nothing(
    factory: MongoDBSessionManagerFactory, stored: Stored, small_files: None
) -> None:
    *head, end = without_digest(exported(factory, {"b": b"12345", "c": bytes(200)}))
    for lines, reason in DAMAGED:
        with pytest.raises(InvalidArgumentError, match=reason):
            factory.import_session([*head[:2], *lines, end], "t")
        assert left_of(stored, "t") == [], lines


def test_an_export_without_values_is_what_it_was(factory: MongoDBSessionManagerFactory) -> None:
    """Its lines are those of a session that never had a storage."""
    lines = {}
    for session_id in ("s", "s2"):
        with factory.create_session_manager(session_id) as manager:
            if session_id == "s":
                write(manager.storage, {"key": b"value"})
                asyncio.run(manager.storage.delete("key"))
    for session_id in ("s", "s2"):
        head, session, end = factory.export_session(session_id)
        lines[session_id] = (
            json.loads(head).keys(),
            json.loads(session)["session"].keys(),
            json.loads(end)["end"].keys(),
        )
    assert lines["s"] == lines["s2"]


# Keys.


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("context/s/scopes/agent/a/3f2a-1_0", "3f2a-1"),
        ("tooluse_x_12", "tooluse_x"),
        ("a/b_c", None),
        ("a_1/b", None),
        ("_1", ""),
        ("a/_1", ""),
        ("ab", None),
        ("a\n_1", "a\n"),
    ],
)
def test_the_id_in_a_key(key: str, expected: str | None) -> None:
    assert block_id_of(key) == expected


def test_the_ids_of_a_message() -> None:
    content: Any = [{"text": "a"}, {"toolResult": {"toolUseId": "u", "content": []}}, {"toolUse": {"toolUseId": "v"}}]
    assert block_ids_of({"message": {"tracking_id": "t", "content": content}}) == ["t", "u"]
    for odd in (None, {}, {"message": None}, {"message": {"tracking_id": 1, "content": [None, {"toolResult": []}]}}):
        assert block_ids_of(odd) == []


def test_the_key_in_a_copy() -> None:
    keys = ["context/s/scopes/a_0", "context/s2/a_0", "context/s", "other/s/a"]
    assert [copied_key(key, "s", "t//u") for key in keys] == ["context/t/u/scopes/a_0", *keys[1:]]
    assert [copied_key(key, "s", "..") for key in keys] == keys
    assert [copied_key(key, "a\\b", "t") for key in keys] == keys
