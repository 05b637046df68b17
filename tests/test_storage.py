"""Strands' storage in MongoDB: what Strands' own backends do, of any size, from any loop, whole whatever dies."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import struct
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import gridfs
import pymongo
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient, monitoring
from strands import Agent, tool
from strands.experimental.context_manager import ContextManager, Offload
from strands.session import SnapshotSessionManager
from strands.storage import InMemoryStorage, LocalFileStorage, Storage
from strands.types.exceptions import StorageError

import interpreter
from mongodb_session_manager import (
    ConfigurationError,
    DatabaseError,
    DatabaseTimeoutError,
    DatabaseUnavailableError,
    EventLoopError,
    InvalidArgumentError,
    MongoDBSessionManagerFactory,
    MongoDBStorage,
    SessionClosedError,
)
from mongodb_session_manager._format.keys import prefix_range
from mongodb_session_manager._storage import gridfs as _blobs
from mongodb_session_manager._store import content as _content
from mongodb_session_manager._store import values as _values
from mongodb_session_manager.demo import ScriptedModel
from proxy import Proxy, command
from support import CommandLog, agent, alternating, fail_point, texts

pytestmark = pytest.mark.anyio

Database = pymongo.database.Database[dict[str, Any]]

MEGABYTE = 1024 * 1024


@pytest.fixture
def values(driver: pymongo.MongoClient[dict[str, Any]], database: str) -> Database:
    """The database of the test, to look at what is stored."""
    return driver[database]


@pytest.fixture(scope="module")
def shared_storage(server: str, shared_database: str) -> Iterator[tuple[MongoDBStorage, CommandLog]]:
    log = CommandLog()
    with MongoDBStorage(server, shared_database, event_listeners=[log]) as storage:
        yield storage, log


BOTH = pytest.mark.parametrize("kind", ["collection", "session"], indirect=True)
"""Whether the values are in a collection of their own, or belong to a session."""


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "collection")


@pytest.fixture
def storage(request: pytest.FixtureRequest, kind: str, database: str, sent: CommandLog) -> MongoDBStorage:
    """The storage of all tests that do not close it."""
    if kind == "session":
        manager = request.getfixturevalue("factory").create_session_manager("s")
        sent.clear()
        return manager.storage
    storage: MongoDBStorage = request.getfixturevalue("shared_storage")[0]
    sent.clear()
    return storage


@pytest.fixture
def sent(request: pytest.FixtureRequest, kind: str) -> CommandLog:
    """The commands of the storage."""
    if kind == "session":
        return request.getfixturevalue("commands")
    return request.getfixturevalue("shared_storage")[1]


@pytest.fixture
async def own_storage(server: str, database: str, kind: str) -> AsyncIterator[MongoDBStorage]:
    """A storage of another client."""
    if kind == "session":
        async with MongoDBSessionManagerFactory(server, database) as factory:
            yield (await factory.create_session_manager_async("s")).storage
        return
    async with MongoDBStorage(server, database) as storage:
        yield storage


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values beyond 100 bytes are files, of chunks of 64 bytes, three to a command."""
    monkeypatch.setattr(_values, "INLINE_LIMIT", 100)
    monkeypatch.setattr(_blobs, "CHUNK", 64)
    monkeypatch.setattr(_blobs, "BATCH", 3)
    monkeypatch.setattr(_content, "PIECE_BYTES", 64)
    monkeypatch.setattr(_content, "_AT_ONCE", 3)


def content(seed: str, size: int) -> bytes:
    """Return bytes of which each part is different."""
    block = b"".join(hashlib.sha256(f"{seed} {number}".encode()).digest() for number in range(1024))
    return (block * (size // len(block) + 1))[:size]


PIECES = {"_id.file": {"$exists": True}}


def files(values: Database) -> list[dict[str, Any]]:
    return list(values["agent_storage_blobs.files"].find())


def chunks(values: Database) -> int:
    return values["agent_storage_blobs.chunks"].count_documents({})


def nothing_but(values: Database, *keys: str) -> bool:
    """Tell whether the files of these keys are there, whole and named, and no others."""
    stored = files(values)
    expected = sum(-(-file["length"] // file["chunkSize"]) for file in stored)
    large = list(values["agent_sessions_content"].find({"file": {"$exists": True}}))
    pieces = {(each["_id"]["file"], each["_id"]["n"]) for each in values["agent_sessions_content"].find(PIECES)}
    wanted = {(each["file"], n) for each in large for n in range(-(-each["size"] // _content.PIECE_BYTES))}
    named = [file.get("filename", "") for file in stored] + [each["_id"]["key"] for each in large]
    return sorted(named) == sorted(keys) and chunks(values) == expected and pieces == wanted


# What Strands' own backends do.

PARTS = [
    "a",
    "b",
    "ab",
    "/",
    "//",
    ".",
    "..",
    "\\",
    "\0",
    " ",
    "é",
    "z",
    "\ud7ff",
    "\ue000",
    "\uffff",
    "\U0010ffff",
    "$",
]
KEYS = st.lists(st.sampled_from(PARTS), max_size=5).map("".join)
VALUES = st.binary(max_size=6) | st.binary(min_size=95, max_size=105) | st.sampled_from([64, 192, 193, 500]).map(bytes)
VIEWS = st.sampled_from(["", "", "a", "a/b", "/b//", "é"])
OPERATIONS = st.lists(
    st.tuples(st.just("write"), VIEWS, KEYS, VALUES)
    | st.tuples(st.sampled_from(["read", "delete", "list"]), VIEWS, KEYS)
    | st.tuples(st.just("search"), VIEWS, st.sampled_from(["a", "b z", "the", "é"])),
    max_size=12,
)
PLAIN_KEYS = st.sampled_from(
    ["a.txt", "d/b.txt", "d/e/c.txt", "d/e/d.txt", "/d//e/c.txt/", "no/thing", "", "../x", "x\\y"]
)
PLAIN = st.lists(
    st.tuples(st.just("write"), PLAIN_KEYS, VALUES)
    | st.tuples(st.sampled_from(["read", "delete", "list"]), PLAIN_KEYS),
    max_size=12,
)


async def outcome(storage: Storage, name: str, *arguments: Any) -> Any:
    """Return what an operation returns, or that it was refused."""
    try:
        result = await getattr(storage, name)(*arguments)
    except StorageError:
        return StorageError
    return [(found.key, found.score, found.data) for found in result] if name == "search" else result


def view(storage: Any, prefix: str) -> Any:
    return storage.namespace(prefix) if prefix else storage


@BOTH
def test_it_does_what_strands_in_memory_storage_does(
    storage: MongoDBStorage, values: Database, small_files: None
) -> None:
    @settings(max_examples=settings.default.max_examples // 2)
    @given(OPERATIONS)
    def the_same(operations: list[tuple[Any, ...]]) -> None:
        async def run() -> None:
            theirs = InMemoryStorage()
            for key in await ours.list(""):
                await ours.delete(key)
            for name, prefix, *arguments in operations:
                expected = await outcome(view(theirs, prefix), name, *arguments)
                assert await outcome(view(ours, prefix), name, *arguments) == expected, (name, prefix, arguments)
            keys = await theirs.list("")
            assert await ours.list("") == keys
            assert [await ours.read(key) for key in keys] == [await theirs.read(key) for key in keys]
            assert nothing_but(values, *[key for key in keys if len(await theirs.read(key) or b"") > 100])

        runner.run(run())

    ours = storage
    with asyncio.Runner() as runner:
        the_same()


def test_it_does_what_strands_file_storage_does(storage: MongoDBStorage, tmp_path: Path, small_files: None) -> None:
    @settings(max_examples=settings.default.max_examples // 2)
    @given(PLAIN)
    def the_same(operations: list[tuple[Any, ...]]) -> None:
        async def run() -> None:
            for key in await ours.list(""):
                await ours.delete(key)
                await theirs.delete(key)
            for name, *arguments in operations:
                expected = await outcome(theirs, name, *arguments)
                assert await outcome(ours, name, *arguments) == expected, (name, arguments)

        runner.run(run())

    theirs = LocalFileStorage(str(tmp_path))
    ours = storage
    with asyncio.Runner() as runner:
        the_same()


@given(KEYS, st.lists(KEYS))
def test_a_range_holds_what_begins_with_a_prefix(prefix: str, keys: list[str]) -> None:
    bounds = prefix_range(prefix)
    assert [
        key for key in keys if bounds["$gte"].encode() <= key.encode() < bounds.get("$lt", "\U0010ffff" * 99).encode()
    ] == [key for key in keys if key.startswith(prefix)]


@BOTH
async def test_what_is_no_key_is_refused_before_anything_is_sent(storage: MongoDBStorage, sent: CommandLog) -> None:
    for key in ("", "/", "a/../b", "..", "a\\b", "\ud83d", None, {"$gt": ""}, b"a", 3):
        for operation in (storage.read, storage.delete, lambda key: storage.write(key, b"")):
            with pytest.raises(InvalidArgumentError, match="key") as refused:
                await operation(key)  # type: ignore[arg-type]
            assert isinstance(refused.value, StorageError)
    for prefix in ("a\\", "../", "\udc00", None, {"$regex": "."}):
        with pytest.raises(InvalidArgumentError, match="prefix"):
            await storage.list(prefix)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="prefix"):
            storage.namespace(prefix)  # type: ignore[arg-type]
    for data in ("text", None, 5, [1, 2]):
        with pytest.raises(InvalidArgumentError, match="data must be bytes"):
            await storage.write("a", data)  # type: ignore[arg-type]
    assert sent.names == []


@BOTH
async def test_what_is_stored_is_a_copy_of_any_kind_of_bytes(storage: MongoDBStorage) -> None:
    buffer = bytearray(b"12345")
    writing = asyncio.ensure_future(storage.write("a", buffer))
    await asyncio.sleep(0)
    buffer[:] = b"54321"
    await writing
    await storage.write("b", memoryview(b"xyz")[1:])
    assert (await storage.read("a"), await storage.read("b")) == (b"12345", b"yz")
    assert type(await storage.read("a")) is bytes


# What it costs.


async def test_each_operation_on_a_value_within_a_document_is_one_command(
    storage: MongoDBStorage, sent: CommandLog
) -> None:
    await storage.write("a/b", b"1")
    await storage.write("a/b", b"2")
    assert await storage.read("a/b") == b"2"
    assert await storage.list("a/") == ["a/b"]
    await storage.delete("a/b")
    assert sent.names == ["update", "update", "find", "find", "delete"]


async def test_listing_reads_no_more_than_the_keys_it_returns(server: str, database: str, values: Database) -> None:
    sent: list[dict[str, Any]] = []

    class Log(CommandLog):
        def started(self, event: monitoring.CommandStartedEvent) -> None:
            sent.append(dict(event.command))

    keys = [f"s{number // 10}/k{number % 10}" for number in range(200)]
    values["agent_storage"].insert_many([{"_id": key, "size": 1, "data": b"x"} for key in keys])
    async with MongoDBStorage(server, database, event_listeners=[Log()]) as storage:
        assert await storage.list("s1/") == [f"s1/k{number}" for number in range(10)]
        assert await storage.namespace("s1").list("k") == [f"k{number}" for number in range(10)]
    for find in (each for each in sent if "find" in each):
        assert "$regex" not in str(find)
        asked = {name: find[name] for name in ("find", "filter", "projection", "sort")}
        explained = values.command("explain", asked, verbosity="executionStats")
        assert explained["executionStats"]["totalDocsExamined"] == 0
        assert explained["executionStats"]["totalKeysExamined"] <= 11


# Values of any size.


@BOTH
async def test_a_value_of_any_size(storage: MongoDBStorage, values: Database) -> None:
    for size in (0, 1, 4 * MEGABYTE, 4 * MEGABYTE + 1):
        data = content("value", size)
        await storage.write("big/value", data)
        assert await storage.read("big/value") == data
        assert nothing_but(values, *["big/value"] * (size > 4 * MEGABYTE))
        await storage.delete("big/value")
        assert await storage.read("big/value") is None
        assert nothing_but(values)


async def test_a_standard_gridfs_client_reads_a_large_value(storage: MongoDBStorage, values: Database) -> None:
    data = content("value", 5 * MEGABYTE)
    await storage.write("big/value", data)
    bucket = gridfs.GridFSBucket(values, "agent_storage_blobs")
    assert bucket.open_download_stream_by_name("big/value").read() == data
    stored = values["agent_storage"].find_one({"_id": "big/value"}) or {}
    assert bucket.open_download_stream(stored["file"]).read() == data
    assert stored["size"] == len(data)


async def test_the_bucket_has_the_indexes_of_gridfs(
    own_storage: MongoDBStorage, values: Database, small_files: None
) -> None:
    await own_storage.write("a", bytes(101))
    await own_storage.close_async()
    assert "filename_1_uploadDate_1" in values["agent_storage_blobs.files"].index_information()
    assert values["agent_storage_blobs.chunks"].index_information()["files_id_1_n_1"]["unique"]


@BOTH
async def test_replacing_leaves_nothing_of_what_was_there(
    storage: MongoDBStorage, values: Database, small_files: None
) -> None:
    await storage.write("other", bytes(200))
    for before, after in itertools.product((b"", b"small", bytes(500)), (b"", b"small", bytes(300), None)):
        await storage.write("key", before)
        if after is None:
            await storage.delete("key")
        else:
            await storage.write("key", after)
        assert await storage.read("key") == after, before
        assert nothing_but(values, "other", *["key"] * (len(after or b"") > 100)), before


# Whole, whatever happens meanwhile.


@BOTH
async def test_readers_see_the_old_value_or_the_new_one(
    storage: MongoDBStorage, own_storage: MongoDBStorage, small_files: None
) -> None:
    versions = [content("a", 500), b"small", content("b", 700), content("c", 300)]

    async def read() -> set[bytes | None]:
        seen = set()
        while not written.is_set():
            seen.add(await storage.read("key"))
        return seen

    await own_storage.write("key", versions[0])
    written = asyncio.Event()
    readers = [asyncio.ensure_future(read()) for _ in range(2)]
    for number in range(8):
        await own_storage.write("key", versions[number % 4])
    written.set()
    seen = set().union(*await asyncio.gather(*readers))
    assert seen <= set(versions)
    assert len(seen) > 1


@BOTH
async def test_of_many_writers_one_wins_and_nothing_of_the_others_stays(
    storage: MongoDBStorage,
    own_storage: MongoDBStorage,
    values: Database,
    small_files: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_values, "ROUNDS", 200)
    versions = [content(str(number), 150 + number) if number % 3 else b"%d" % number for number in range(12)]
    one, other = storage, own_storage
    await asyncio.gather(*((one, other)[n % 2].write("key", data) for n, data in enumerate(versions)))
    data = await one.read("key")
    assert data in versions
    assert nothing_but(values, *["key"] * (len(data or b"") > 100))
    await asyncio.gather(*((one, other)[n % 2].delete("key") for n in range(6)))
    assert nothing_but(values)


CRASHES = """
import asyncio, os, signal, sys
from pymongo import monitoring
from mongodb_session_manager import (MongoDBStorage)
from mongodb_session_manager._storage import gridfs as _blobs
from mongodb_session_manager._store import values as _values

_values.INLINE_LIMIT, _blobs.CHUNK, _blobs.BATCH = 100, 64, 3
(uri,) = sys.argv[1:]

class Bomb(monitoring.CommandListener):
    left = -1
    def tick(self, event):
        if event.command_name in ("hello", "ping", "endSessions", "createIndexes"):
            return
        Bomb.left -= 1
        if Bomb.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    started = succeeded = tick
    def failed(self, event): ...

def act(database, operation, key, after):
    with MongoDBStorage(uri, database, event_listeners=[Bomb()]) as storage:
        asyncio.run(storage.delete(key) if operation == "delete" else storage.write(key, after))

for line in sys.stdin:
    database, operation, key, size, ticks = line.split()
    if not (child := os.fork()):
        Bomb.left = int(ticks)
        act(database, operation, key, b"n" * int(size))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print("died" if os.WIFSIGNALED(status) else f"ended {os.WEXITSTATUS(status)}", flush=True)
"""


@pytest.fixture(scope="module")
def crash(server: str) -> Iterator[Callable[..., str]]:
    """Run an operation in a process that kills itself at its nth sending or receiving; tell how it ended."""
    with interpreter.start(CRASHES, server) as process:

        def run(database: str, operation: str, key: str, size: int, ticks: int) -> str:
            process.stdin.write(f"{database} {operation} {key} {size} {ticks}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        yield run
        process.stdin.close()
        assert process.wait() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(("before", "after"), [(250, 300), (250, 5), (5, 250), (None, 250), (250, None)])
async def test_a_writer_killed_between_any_two_commands(
    request: pytest.FixtureRequest,
    crash: Callable[..., str],
    storage: MongoDBStorage,
    database: str,
    values: Database,
    small_files: None,
    monkeypatch: pytest.MonkeyPatch,
    before: int | None,
    after: int | None,
) -> None:
    old, new = (None if size is None else letter * size for letter, size in ((b"o", before), (b"n", after)))
    outcomes, seen = [], []
    stride = 1 if request.config.getoption("full_adversity") else 3
    ticks = itertools.count(random.randint(1, stride), stride)
    while not outcomes or outcomes[-1] == "died":
        if old is None:
            await storage.delete("key")
        else:
            await storage.write("key", old)
        operation = "delete" if after is None else "write"
        outcomes.append(crash(database, operation, "key", after or 0, next(ticks)))
        seen.append(await storage.read("key"))
    assert outcomes[-1] == "ended 0"
    assert {*seen} <= {old, new}
    assert seen == sorted(seen, key=lambda value: value == new)  # first the old one, then the new one
    assert len(outcomes) > 6 // stride
    # What the dead left behind goes when it is old enough that nobody can be at work on it.
    monkeypatch.setattr(_blobs, "ABANDONED_AFTER", -_blobs.ABANDONED_AFTER)
    for number in range(3):
        await storage.write(f"more {number % 2}", bytes(200))
    assert await storage.read("key") == new
    assert nothing_but(values, "more 0", "more 1", *["key"] * (len(new or b"") > 100))


async def test_a_file_whose_switch_never_came_gets_its_name_back(
    storage: MongoDBStorage, values: Database, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    await storage.write("key", bytes(200))
    values["agent_storage_blobs.files"].update_many({}, {"$unset": {"filename": ""}})
    monkeypatch.setattr(_blobs, "ABANDONED_AFTER", -_blobs.ABANDONED_AFTER)
    await storage.write("other", bytes(200))
    assert await storage.read("key") == bytes(200)
    assert nothing_but(values, "key", "other")


async def test_a_writer_that_slept_too_long_gives_up(
    storage: MongoDBStorage, values: Database, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    await storage.write("key", b"old")
    monkeypatch.setattr(_blobs, "WRITING_TIME", -_blobs.WRITING_TIME)
    with pytest.raises(DatabaseTimeoutError):
        await storage.write("key", bytes(200))
    assert await storage.read("key") == b"old"


def command_on(name: str, collection: str) -> bytes:
    """Return bytes that no command but this one on this collection holds."""
    return command(name) + struct.pack("<i", len(collection) + 1) + collection.encode() + b"\0"


@pytest.fixture(scope="module")
def alone(standalone: str) -> Iterator[Database]:
    """A database on a server that is no replica set, where the driver itself sends nothing again."""
    with pymongo.MongoClient[dict[str, Any]](standalone) as client:
        yield client[name := f"test_{uuid.uuid4().hex}"]
        client.drop_database(name)


@pytest.fixture(scope="module")
def cut_off(standalone: str, alone: Database) -> Iterator[tuple[Proxy, MongoDBStorage]]:
    """A proxy, and a storage behind it."""
    with Proxy(standalone) as proxy, MongoDBStorage(proxy.uri, alone.name) as storage:
        yield proxy, storage


@pytest.mark.parametrize("size", alternating(5, 500))
@pytest.mark.parametrize("after", alternating(5, 500, None))
@pytest.mark.parametrize("part", alternating("", "_blobs.files", "_blobs.chunks"))
async def test_a_lost_reply_does_not_lose_the_value(
    alone: Database,
    cut_off: tuple[Proxy, MongoDBStorage],
    small_files: None,
    size: int,
    after: int | None,
    part: str,
) -> None:
    for name in alone.list_collection_names():
        alone[name].delete_many({})
    proxy, storage = cut_off
    proxy.reset()
    await storage.write("key", b"o" * size)
    for name in ("insert", "update", "delete"):
        proxy.drop_after_request(command_on(name, f"agent_storage{part}"))
    if after is None:
        await storage.delete("key")
    else:
        await storage.write("key", b"n" * after)
    assert await storage.read("key") == (None if after is None else b"n" * after)
    assert nothing_but(alone, *["key"] * ((after or 0) > 100))
    assert proxy.dropped >= 1 or (part and max(size, after or 0) == 5)


@BOTH
async def test_a_damaged_value_is_an_error(storage: MongoDBStorage, values: Database, small_files: None) -> None:
    await storage.write("key", bytes(500))
    values["agent_storage_blobs.chunks"].delete_one({"n": 1})
    values["agent_sessions_content"].delete_one({"_id.n": 1})
    with pytest.raises(DatabaseError, match="not complete"):
        await storage.read("key")


async def test_a_cancelled_write_completes(own_storage: MongoDBStorage, values: Database, small_files: None) -> None:
    writing = asyncio.ensure_future(own_storage.write("key", bytes(500)))
    await asyncio.sleep(0.005)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await own_storage.close_async()  # waits for it
    assert nothing_but(values, "key")


# Errors.


async def test_no_server_is_a_storage_error() -> None:
    async with MongoDBStorage("mongodb://127.0.0.1:9", serverSelectionTimeoutMS=50) as storage:
        for operation in (storage.read("a"), storage.write("a", b""), storage.delete("a"), storage.list("")):
            with pytest.raises(StorageError) as failed:
                await operation
            assert isinstance(failed.value, DatabaseUnavailableError)
            assert isinstance(failed.value, ConnectionError)


@BOTH
async def test_a_refusal_of_the_server_is_a_storage_error(server: str, storage: MongoDBStorage) -> None:
    with fail_point(server, failCommands=["update"], errorCode=13), pytest.raises(StorageError, match="code 13"):
        await storage.write("a", b"secret")


async def test_after_closing(server: str, database: str) -> None:
    storage = MongoDBStorage(server, database)
    view = storage.namespace("a")
    await view.close_async()
    await view.write("b", b"1")  # closing a view closes nothing
    await storage.close_async()
    await storage.close_async()
    for each in (storage, view):
        with pytest.raises(StorageError) as refused:
            await each.read("a/b")
        assert isinstance(refused.value, SessionClosedError)


def test_names_are_checked(server: str) -> None:
    for options in ({"collection_name": ""}, {"collection_name": 5}, {"database_name": "a\0b"}):
        with pytest.raises(ConfigurationError):
            MongoDBStorage(server, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"'aplication_name'.*collection_name"):
        MongoDBStorage(server, aplication_name="a")
    assert "(agent_sessions.agent_storage," in repr(MongoDBStorage(server, None, None))


def test_nothing_shows_the_password() -> None:
    storage = MongoDBStorage("mongodb://me:secret@127.0.0.1:9/d")
    assert repr(storage) == "MongoDBStorage(d.agent_storage, <Connection owned, open>)"


# From any loop.


async def test_from_many_loops_and_threads_without_a_thread_of_its_own(server: str, database: str) -> None:
    def work(number: int) -> bytes | None:
        async def run() -> bytes | None:
            await storage.write(f"key {number}", b"%d" % number)
            return await storage.read(f"key {number}")

        return asyncio.run(run())

    async with MongoDBStorage(server, database) as storage:
        await storage.write("key", b"")
        results = await asyncio.gather(*(asyncio.to_thread(work, number) for number in range(8)))
        assert results == [b"%d" % number for number in range(8)]
        ours = [thread.name for thread in threading.enumerate() if thread.name.startswith("mongodb-session-manager-io")]
        assert ours == ["mongodb-session-manager-io"]


# PyMongo looks at files when an AsyncMongoClient is first used.
@pytest.mark.parametrize("kind", [AsyncIOMotorClient, pytest.param(AsyncMongoClient, marks=pytest.mark.may_block)])
async def test_over_a_borrowed_client(server: str, database: str, small_files: None, kind: type[Any]) -> None:
    client = kind(server)
    async with MongoDBStorage(database_name=database, client=client) as storage:
        await storage.write("a", bytes(500))
        assert await asyncio.to_thread(lambda: asyncio.run(storage.read("a"))) == bytes(500)
        assert await storage.list() == ["a"]
        await storage.delete("a")
    await client.admin.command("ping")  # still open
    closing = client.close()
    if closing is not None:
        await closing


@pytest.mark.may_block
async def test_a_blocked_loop_is_an_error_rather_than_a_deadlock(
    server: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mongodb_session_manager._io.portal.START_TIMEOUT", 0.3)
    client: AsyncMongoClient[Any] = AsyncMongoClient(server)
    storage = MongoDBStorage(database_name=database, client=client)
    await storage.write("a", b"1")
    with pytest.raises(EventLoopError, match="blocks it"):
        Agent(model=ScriptedModel(), session_manager=SnapshotSessionManager("s", storage=storage))
    assert await storage.read("a") == b"1"
    made = await asyncio.to_thread(
        Agent, model=ScriptedModel(), session_manager=SnapshotSessionManager("s", storage=storage)
    )
    assert made.messages == []
    await client.close()


# From a factory.


async def test_a_factorys_storage_shares_its_client(
    factory: MongoDBSessionManagerFactory, values: Database, commands: CommandLog
) -> None:
    storage = factory.create_storage()
    other = factory.create_storage("other", database_name=values.name)
    assert commands.names == []
    await storage.write("a", b"1")
    await other.write("a", b"2")
    assert commands.names == ["update", "update"]
    assert [values[name].find_one({"_id": "a"})["data"] for name in ("agent_storage", "other")] == [b"1", b"2"]
    storage.close()
    assert await other.read("a") == b"2"
    with pytest.raises(ConfigurationError, match="sessions"):
        factory.create_storage("agent_sessions")
    await factory.close_async()
    with pytest.raises(SessionClosedError):
        await other.read("a")


# With Strands.


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


RESUME = """
import asyncio, sys
from strands.experimental.context_manager import ContextManager, Offload
from strands.session import SnapshotSessionManager
from mongodb_session_manager import MongoDBStorage
from support import agent

uri, database = sys.argv[1:]
with MongoDBStorage(uri, database) as storage:
    resumed = agent(SnapshotSessionManager("s", storage=storage))
    print(resumed.state.get("seen"))
    print(resumed("What is my name?"))
"""


def test_an_agent_resumes_in_another_process(server: str, database: str, storage: MongoDBStorage) -> None:
    first = agent(SnapshotSessionManager("s", storage=storage), "Hello!", state={"seen": 1})
    first("My name is Ada.")
    shown, _ = interpreter.run(RESUME, server, database)
    assert shown.split("\n")[:2] == ["1", "Your name is Ada."]
    again = agent(SnapshotSessionManager("s", storage=storage))
    assert texts(again.messages) == ["My name is Ada.", "Hello!", "What is my name?", "Your name is Ada."]


@pytest.mark.may_block  # Strands blocks the loop on which an agent is constructed
@pytest.mark.parametrize("save", ["message", "invocation"])
async def test_an_async_agent_with_tools_and_checkpoints(storage: MongoDBStorage, values: Database, save: Any) -> None:
    manager = SnapshotSessionManager(
        "s", storage=storage, save_latest_on=save, snapshot_trigger=lambda *, agent_data, **_: True
    )
    first = agent(manager, {"tool": "add", "input": {"a": 1, "b": 2}}, "Three.", "Four.", tools=[add])
    await first.invoke_async("1 + 2?")
    await first.invoke_async("2 + 2?")
    checkpoints = await manager.list_snapshot_ids(first)
    assert len(checkpoints) == 2
    resumed = agent(SnapshotSessionManager("s", storage=storage), tools=[add])
    assert resumed.messages == first.messages
    assert await manager.restore_snapshot(resumed, snapshot_id=checkpoints[0])
    assert texts(resumed.messages)[-1] == "Three."
    await manager.delete_session()
    assert values["agent_storage"].count_documents({}) == 0


def test_a_snapshot_beyond_16_megabytes(storage: MongoDBStorage, values: Database) -> None:
    manager = SnapshotSessionManager("s", storage=storage)
    first = agent(manager)
    document: Any = {"name": "d", "format": "txt", "source": {"bytes": bytes(13 * MEGABYTE)}}
    first.messages.append({"role": "user", "content": [{"text": "Look."}, {"document": document}]})
    asyncio.run(manager.save_snapshot(first, is_latest=True))
    resumed = agent(SnapshotSessionManager("s", storage=storage))
    assert resumed.messages == first.messages
    (file,) = files(values)
    assert file["length"] > 16 * MEGABYTE


@pytest.mark.filterwarnings("ignore:context_window_limit is not set")
def test_an_agents_own_storage_keeps_its_session_and_what_it_offloads(storage: MongoDBStorage) -> None:
    """Without storage of their own, the session manager and the context manager take the agent's."""
    offload = Offload.truncate("tool_results", {"preview_tokens": 10}).when(threshold=100)

    @tool
    def report() -> str:
        """Return much."""
        return "word " * 2000

    def make(*replies: Any) -> Agent:
        context = ContextManager(strategies=[offload])
        return agent(SnapshotSessionManager("s"), *replies, storage=storage, context_manager=context, tools=[report])

    first = make({"tool": "report", "input": {}}, "Done.")
    first("Report.")
    keys = asyncio.run(storage.list(""))
    assert "session/s/scopes/agent/agent/snapshots/snapshot_latest.json" in keys
    offloaded = [key for key in keys if key.startswith("context/s/scopes/agent/agent/")]
    kept = [asyncio.run(storage.read(key)) or b"" for key in offloaded]
    assert any(b"word " * 2000 in value for value in kept)
    resumed = make()
    assert resumed.messages == first.messages
    assert "word " * 2000 not in str(resumed.messages)


@BOTH
def test_a_view_given_to_strands_is_its_whole_prefix(storage: MongoDBStorage) -> None:
    agent(SnapshotSessionManager("s", storage=storage.namespace("mine")), "Hello!")("Hi.")
    assert asyncio.run(storage.list("")) == ["mine/s/scopes/agent/agent/snapshots/snapshot_latest.json"]
