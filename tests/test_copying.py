"""Exporting sessions and importing them: all of it, nothing twice, whatever happens meanwhile, in little memory."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import threading
import tracemalloc
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bson
import pymongo
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymongo import monitoring
from strands import tool
from strands.types.session import Session, SessionAgent, SessionMessage

from fix_archive import (
    MOMENT,
    SMALL,
    append,
    appends,
    begin,
    documents_of,
    expected,
    redacted,
    said,
    settled,
    store_again,
    told,
)
from fix_codec import values
from fix_copying import KIB, MIB, all_of, content, copying, every_failure, left_of, same_content, with_image
from fix_legacy import conversation, old_agent, old_session
from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    AttachmentError,
    DatabaseError,
    DatabaseUnavailableError,
    EncodingError,
    InvalidArgumentError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionExistsError,
    SessionNotFoundError,
    demo,
)
from mongodb_session_manager._format.buckets import Step, taken
from mongodb_session_manager._format.changes import AppendMessage, Change
from mongodb_session_manager._format.documents import stored_message
from mongodb_session_manager.demo import Redaction
from orchestrators import node, pipeline
from support import CommandLog, agent, alternating, apply, eventually, fail_point, texts

Stored = pymongo.collection.Collection[dict[str, Any]]


@pytest.fixture(autouse=True)
def words_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_count_words", len)


class Cursors(CommandLog):
    """The commands that were sent, and the cursors that they left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: set[int] = set()

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        if "cursor" in event.reply:
            self.open.add(event.reply["cursor"]["id"])
            self.open.discard(0)


LIMITS: dict[str, Any] = {**SMALL, "max_inline_attachment_bytes": 1000}


@pytest.fixture(scope="module")
def logged_repository(server: str, shared_database: str) -> Iterator[tuple[MongoDBSessionRepository, Cursors]]:
    cursors = Cursors()
    with MongoDBSessionRepository(server, shared_database, event_listeners=[cursors], **LIMITS) as repository:
        repository.list_sessions()
        eventually(lambda: not repository._async._connection._tasks)
        yield repository, cursors


@pytest.fixture
def cursors(logged_repository: tuple[MongoDBSessionRepository, Cursors]) -> Cursors:
    """The commands of the repository, and the cursors that they left open."""
    cursors = logged_repository[1]
    cursors.clear()
    cursors.open.clear()
    return cursors


@pytest.fixture
def repository(
    database: str, logged_repository: tuple[MongoDBSessionRepository, Cursors]
) -> Iterator[MongoDBSessionRepository]:
    repository = logged_repository[0]
    yield repository
    eventually(lambda: not repository._async._connection._tasks)


@pytest.fixture(scope="module")
def long_documents(server: str, driver: pymongo.MongoClient[dict[str, Any]]) -> Iterator[dict[str, list[Any]]]:
    """The documents of a session of 30 messages, most of them archived."""
    database = f"test_{uuid.uuid4().hex}"
    stored = driver[database]["agent_sessions"]
    with MongoDBSessionRepository(server, database, **SMALL) as repository:
        begin(repository)
        for message_id in range(30):
            append(repository, message_id)
            settled(stored)
    yield documents_of(stored)
    driver.drop_database(database)


@pytest.fixture
def long(
    repository: MongoDBSessionRepository, stored: Stored, long_documents: dict[str, list[Any]]
) -> MongoDBSessionRepository:
    """A repository with a session of 30 messages, most of them archived."""
    store_again(stored, long_documents)
    return repository


def kinds(lines: list[str]) -> list[str]:
    return [next(iter(json.loads(line))) for line in lines]


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"It rains in {city}."


# All of it.


def test_a_session_comes_back_as_it_was(server: str, database: str, stored: Stored) -> None:
    options = {"max_embedded_messages": 4, "max_inline_attachment_bytes": 1000}
    image = content(3 * KIB)
    with MongoDBSessionManagerFactory(server, database, application_name="chat", **options) as factory:
        with factory.create_session_manager("s") as manager:
            replies = ["hi", {"tool": "weather", "input": {"city": "Oslo", "$date": 1, "a.b": 2}}, "rain", "a picture"]
            one = agent(manager, *replies, Redaction("[redacted]"), "still here", agent_id="a.b", tools=[weather])
            one.state.set("seen", {"$oid": "x", "n": 2**70, "list": [1.5, None]})
            for prompt in ("hello", "weather?"):
                one(prompt)
            one([{"text": "look"}, {"image": {"format": "png", "source": {"bytes": image}}}])
            one("my card is 4111")
            one("still there?")
            two = agent(manager, "two", agent_id="two", system_prompt="Be brief.")
            two("hello two")
            manager.update_metadata({"tier": "gold", "nested.key": [1, {"x": datetime(2026, 1, 1, tzinfo=UTC)}]})
            manager.add_feedback({"rating": "up", "comment": "nice"})
            manager.set_prompt_metadata("two", {"version": 3})
            pipeline(manager, node("first", "1"), node("second", "2"))("go")
        lines = list(factory.export_session("s"))
        assert factory.import_session(lines, "t") == "t"
        for session_id in "st":
            with factory.create_session_manager(session_id) as manager:
                resumed = agent(manager, agent_id="a.b", tools=[weather])
                graph = pipeline(manager, node("first"), node("second"))
                if session_id == "s":
                    original = (resumed.messages, resumed.state.get(), graph.serialize_state())
        assert (resumed.messages, resumed.state.get(), graph.serialize_state()) == original
        assert any(
            image == block["image"]["source"]["bytes"]
            for m in resumed.messages
            for block in m["content"]
            if "image" in block
        )
    with MongoDBSessionRepository(server, database) as repository:
        assert all_of(repository, "t") == all_of(repository, "s")
    before, after = (stored.find_one({"_id": session_id}) for session_id in "st")
    assert after["application_name"] == "chat"
    own = {"_id", "session_id", "agents", "incarnation", "removed_content"}
    assert {name: after[name] for name in before.keys() - own} == {name: before[name] for name in before.keys() - own}
    assert after.keys() - before.keys() == {"copy_of"}
    assert after["incarnation"] != before["incarnation"]
    assert after["copy_of"]["session_id"] == "s"
    assert before["agents"]["a%2Eb"]["archived"] > 4
    assert after["agents"]["a%2Eb"]["archived"] > 4


def test_a_session_of_old_comes_back(repository: MongoDBSessionRepository, stored: Stored) -> None:
    unnumbered = [{name: value for name, value in m.items() if name != "message_id"} for m in conversation()]
    stored.insert_one(old_session(agent=old_agent("agent", *conversation()), **{"50%": old_agent("50%", *unnumbered)}))
    lines = list(repository.export_session("s"))
    assert stored.find_one({"_id": "s"})["agents"].keys() == {"agent", "50%"}
    repository.import_session(lines, "t")
    copy = stored.find_one({"_id": "t"})
    assert copy["session_viewer_password"] == "correct horse"
    assert copy["agents"].keys() == {"agent", "50%25"}
    assert copy["agents"]["agent"]["colour"] == "red"
    assert copy["agents"]["agent"]["messages"] == conversation()
    assert copy["agents"]["50%25"]["messages"] == conversation()
    repository.open_session("s")
    assert all_of(repository, "t") == all_of(repository, "s")


bodies = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant"]),
        "content": st.lists(st.fixed_dictionaries({}, optional={"json": values, "$ref": values}), max_size=3),
    },
    optional={
        "metadata": st.fixed_dictionaries({"custom": values}),
        "$ref": values,
        "tracking_id": st.text(max_size=3),
    },
)


@settings(max_examples=settings.default.max_examples // 3)
@given(st.lists(bodies, max_size=4), st.dictionaries(st.text(max_size=3), st.lists(st.integers()), max_size=2))
def test_whatever_can_be_stored_comes_back(
    repository: MongoDBSessionRepository, stored: Stored, messages: list[Any], state: dict[str, Any]
) -> None:
    for session_id in ("s", "t"):
        stored.delete_one({"_id": session_id})
    stored.database["agent_sessions_archive"].delete_many({})
    repository.create_session(Session("s", "AGENT", MOMENT, MOMENT))
    try:
        repository.create_agent("s", SessionAgent("agent", state, {}, {}, MOMENT, MOMENT))
    except EncodingError:
        return
    changes: list[Change] = []
    for body in messages * 3:  # more than the head holds
        with suppress(EncodingError):
            message = stored_message(SessionMessage(body, len(changes), None, MOMENT, MOMENT), len(changes))
            changes.append(AppendMessage("agent", message))
    apply(repository, "s", changes)
    repository.import_session(repository.export_session("s"), "t")
    assert repr(repository.list_messages("t", "agent")) == repr(repository.list_messages("s", "agent"))
    assert repr(repository.read_agent("t", "agent")) == repr(repository.read_agent("s", "agent"))
    assert repository.get_message_count("t", "agent") == len(changes)


def test_an_imported_session_goes_on(
    long: MongoDBSessionRepository, server: str, database: str, stored: Stored
) -> None:
    state = {"__name__": "SlidingWindowConversationManager", "removed_message_count": 0}
    stored.update_one({"_id": "s"}, {"$set": {"agents.agent.agent_data.conversation_manager_state": state}})
    long.import_session(long.export_session("s"), "t")
    with MongoDBSessionManagerFactory(server, database, **SMALL) as factory:
        with factory.create_session_manager("t") as manager:
            resumed = agent(manager, *["more"] * 5)
            assert texts(resumed.messages) == expected(30)
            for _ in range(5):
                resumed("go on")
        with factory.create_session_manager("t") as manager:
            assert texts(agent(manager).messages) == expected(30) + ["go on", "more"] * 5
    assert told(long.list_messages("s", "agent")) == expected(30)
    long.update_message("t", "agent", redacted(3))
    assert told(long.list_messages("t", "agent"))[3] == "[redacted]"


def test_the_head_of_an_imported_session_is_bounded(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionRepository(server, database, max_embedded_messages=1000) as repository:
        begin(repository)
        apply(repository, "s", appends(range(500)))
    with MongoDBSessionRepository(server, database, **SMALL) as repository:
        repository.import_session(repository.export_session("s"), "t")
        assert told(repository.list_messages("t", "agent")) == expected(500)
        assert told(repository.list_messages("t", "agent", limit=9, offset=100)) == expected(109, 100)
        assert repository.read_message("t", "agent", 7).message == said(7).message
    head = stored.find_one({"_id": "t"})["agents"]["agent"]
    assert len(head["messages"]) <= 8
    buckets = list(stored.database["agent_sessions_archive"].find({"session_id": "t"}).sort("_id", 1))
    assert [bucket["_id"]["first"] for bucket in buckets[1:]] == [bucket["last"] + 1 for bucket in buckets[:-1]]
    assert buckets[-1]["last"] + 1 == head["archived"]


def test_many_large_heads_fit_into_one_document(
    server: str, database: str, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mongodb_session_manager._copying.builder.MAX_DOCUMENT_BYTES", 2 * MIB)
    with MongoDBSessionRepository(server, database, max_embedded_bytes=MIB) as repository:
        repository.create_session(Session("s", "AGENT", MOMENT, MOMENT))
        for agent_id in "abc":
            repository.create_agent("s", SessionAgent(agent_id, {}, {}, {}, MOMENT, MOMENT))
        lines = list(repository.export_session("s"))
        end = json.loads(lines.pop())["end"]
        for position in (4, 3, 2):
            for message_id in reversed(range(7)):
                lines.insert(position + 1, _message_line(message_id, "x" * (MIB // 8)))
        lines.append(json.dumps({"end": {**end, "messages": 21, "sha256": None}}).replace(', "sha256": null', ""))
        repository.import_session(lines, "t")
        for agent_id in "abc":
            assert [m.message_id for m in repository.list_messages("t", agent_id)] == list(range(7))
    assert sum(len(each["messages"]) for each in stored.find_one({"_id": "t"})["agents"].values()) <= 15


@pytest.mark.usefixtures("large")
def test_a_session_whose_document_is_full_comes_back(server: str, database: str, stored: Stored) -> None:
    body = {"role": "user", "content": [{"text": "x" * (MIB // 2)}]}
    messages = [{"message_id": n, "message": body, "redact_message": None} for n in range(8)]
    with MongoDBSessionRepository(server, database, max_embedded_bytes=8 * MIB) as repository:
        repository.create_session(Session("s", "AGENT", MOMENT, MOMENT))
        document = stored.find_one({"_id": "s"})
        few = {"agent_data": {"agent_id": "few"}, "messages": messages, "next_message_id": 8}
        many = {f"{n}": {"agent_data": {"agent_id": f"{n}"}, "messages": [], "next_message_id": 0} for n in range(500)}
        names = [f"f{n:02}" for n in range(12)]
        document |= {"agents": {"few": few, **many}, "metadata": dict.fromkeys(names, "")}
        filling = 16 * MIB - len(bson.encode(document))
        values = ["y" * (filling * (n + 1) // 12 - filling * n // 12) for n in range(12)]
        document["metadata"] = dict(zip(names, values, strict=True))
        stored.replace_one({"_id": "s"}, document)
        assert list(stored.aggregate([{"$project": {"size": {"$bsonSize": "$$ROOT"}}}])) == [
            {"_id": "s", "size": 16 * MIB}
        ]
        repository.import_session(repository.export_session("s"), "imported")
        assert [m.message_id for m in repository.list_messages("imported", "few")] == list(range(8))
        assert len(repository.list_agents("imported")) == 501
        repository.fork_session("s", "t")
        assert [m.message_id for m in repository.list_messages("t", "few")] == list(range(8))
    assert stored.count_documents({}) == 3
    assert list(stored.aggregate([{"$group": {"_id": "$metadata"}}, {"$count": "different"}])) == [{"different": 1}]


def _message_line(message_id: int, text: str) -> str:
    body = {"role": "user", "content": [{"text": text}]}
    return json.dumps({"message": {"message_id": message_id, "message": body, "redact_message": None}})


# Streams.


def test_a_stream_may_be_anything_that_has_lines(
    long: MongoDBSessionRepository, tmp_path: Path, server: str, database: str
) -> None:
    lines = list(long.export_session("s"))
    path = tmp_path / "s.jsonl"
    path.write_text("".join(lines))
    with gzip.open(tmp_path / "s.gz", "wt") as zipped:
        zipped.writelines(lines)
    with path.open() as text, path.open("rb") as binary, gzip.open(tmp_path / "s.gz") as unzipped:
        streams = [
            text,
            binary,
            unzipped,
            io.StringIO("".join(lines)),
            lines,
            iter(lines),
            path.read_bytes().split(b"\n"),
        ]
        for n, stream in enumerate(streams):
            assert long.import_session(stream, f"t{n}") == f"t{n}"  # type: ignore[arg-type]
            assert told(long.list_messages(f"t{n}", "agent")) == expected(30)


@pytest.mark.anyio
async def test_a_stream_may_be_asynchronous(long: MongoDBSessionRepository, server: str, database: str) -> None:
    lines = await asyncio.to_thread(lambda: list(long.export_session("s")))

    async def stream() -> AsyncIterator[bytes]:
        for line in lines:
            await asyncio.sleep(0)
            yield line.encode()

    async with (
        AsyncMongoDBSessionRepository(server, database) as repository,
        MongoDBSessionManagerFactory(server, f"{database}") as factory,
    ):
        assert await repository.import_session(stream(), "t1") == "t1"
        assert await repository.import_session(lines, "t2") == "t2"
        assert await repository.import_session(repository.export_session("s"), "t3") == "t3"
        assert await factory.import_session_async(stream(), "t4") == "t4"
        assert await factory.import_session_async(factory.export_session_async("s"), "t5") == "t5"
        assert await factory.import_session_async(iter(lines), "t6") == "t6"
        assert await repository.import_session(factory.export_session_async("s"), "t7") == "t7"
        for n in range(1, 8):
            assert told(await repository.list_messages(f"t{n}", "agent")) == expected(30)


def test_the_id_is_the_one_it_was_exported_with(
    long: MongoDBSessionRepository, server: str, database: str, driver: pymongo.MongoClient[Any]
) -> None:
    try:
        with MongoDBSessionRepository(server, f"{database}_b") as other:
            assert other.import_session(long.export_session("s")) == "s"
            assert all_of(other, "s") == all_of(long, "s")
    finally:
        driver.drop_database(f"{database}_b")


@pytest.mark.parametrize("stream", ["text", b"bytes", {}, 7, None, Path("s.jsonl")], ids=repr)
def test_what_has_no_lines_is_refused(repository: MongoDBSessionRepository, stream: Any, cursors: Cursors) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^stream must be an open file, or an iterable"):
        repository.import_session(stream)
    assert cursors.names == []


@pytest.mark.parametrize("bad", [{"$ne": None}, "", "a\0b", 7, ["s"], "\ud83d"], ids=repr)
def test_what_is_no_id_is_refused(repository: MongoDBSessionRepository, cursors: Cursors, bad: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^session_id must"):
        repository.import_session([], bad)
    with pytest.raises(InvalidArgumentError, match=r"^session_id must"):
        list(repository.export_session(bad))
    assert cursors.names == []


# Little memory, and nothing left open.


def test_a_long_session_takes_little_memory(server: str, database: str, stored: Stored) -> None:
    """Many lines go from one session to another through a bounded piece of memory."""
    count, text = 144, "x" * 64 * KIB
    with MongoDBSessionRepository(server, database, max_embedded_bytes=64 * KIB) as repository:
        begin(repository)
        for n in range(0, count, 16):
            apply(repository, "s", appends(range(n, n + 16), text))
            settled(stored)
        tracemalloc.start()
        try:
            read = 0

            def lines() -> Iterator[str]:
                nonlocal read
                for line in repository.export_session("s"):
                    read += len(line)
                    yield line

            repository.import_session(lines(), "t")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert repository.get_message_count("t", "agent") == count
    assert read > 9 * MIB
    assert peak < 9 * MIB


def test_a_large_attachment_takes_little_memory(repository: MongoDBSessionRepository) -> None:
    begin(repository)
    image = content(15 * MIB)
    repository.create_message("s", "agent", with_image(0, image))
    repository.create_message("s", "agent", with_image(1, image))
    longest, pieces = 0, 0
    tracemalloc.start()
    try:

        def lines() -> Iterator[str]:
            nonlocal longest, pieces
            for line in repository.export_session("s"):
                longest, pieces = max(longest, len(line)), pieces + line.startswith('{"attachment"')
                yield line

        repository.import_session(lines(), "t")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert longest <= MIB
    assert pieces == 30  # once, though two messages refer to it
    assert peak < 14 * MIB
    for message in repository.list_messages("t", "agent"):
        assert message.message["content"][1]["image"]["source"]["bytes"] == image


def test_no_command_leaves_a_cursor(long: MongoDBSessionRepository, cursors: Cursors) -> None:
    cursors.clear()
    exported = long.export_session("s")
    assert [next(exported) for _ in range(5)]
    exported.close()
    assert cursors.names == ["find", "find"]
    assert list(exported) == []
    assert len(list(long.export_session("s"))) == 34
    assert "getMore" not in cursors.names
    assert cursors.open == set()


@pytest.mark.anyio
async def test_an_iterator_that_is_cancelled_or_closed_leaves_nothing(
    long: MongoDBSessionRepository, server: str, database: str, cursors: Cursors
) -> None:
    slow = {"failCommands": ["find"], "blockConnection": True, "blockTimeMS": 500, "appName": "slow"}
    async with MongoDBSessionManagerFactory(server, database, event_listeners=[cursors], appName="slow") as factory:
        exported = factory.export_session_async("s")
        assert kinds([await anext(exported)]) == ["format"]
        await exported.aclose()

        def slowly() -> Any:
            return fail_point(server, **slow, times=100)

        context = slowly()
        await asyncio.to_thread(context.__enter__)
        try:
            pull = asyncio.ensure_future(anext(factory.export_session_async("s")))
            await asyncio.to_thread(eventually, lambda: cursors.names.count("find") > 1)
            pull.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pull
        finally:
            await asyncio.to_thread(context.__exit__, None, None, None)
        assert await factory.session_exists_async("s")
    assert cursors.open == set()
    assert factory._connection._operations == 0


@pytest.mark.anyio
async def test_the_repository_itself_can_be_stopped(long: MongoDBSessionRepository, server: str, database: str) -> None:
    async with AsyncMongoDBSessionRepository(server, database) as repository:
        async for line in repository.export_session("s"):
            assert line
            break


# While others write.


def test_what_is_written_meanwhile_is_neither_missing_nor_there(long: MongoDBSessionRepository, stored: Stored) -> None:
    exported = long.export_session("s")
    lines = [next(exported)]
    for first in range(30, 60, 6):
        apply(long, "s", appends(range(first, first + 6)))
        settled(stored)
    lines += exported
    long.import_session(lines, "t")
    assert told(long.list_messages("t", "agent")) == expected(30)
    assert told(long.list_messages("s", "agent")) == expected(60)


def test_exports_beside_a_writer_are_consistent(long: MongoDBSessionRepository) -> None:
    done = threading.Event()

    def write() -> None:
        for message_id in range(30, 55):
            append(long, message_id)
        done.set()

    exports: list[list[str]] = []
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        while not done.is_set() or not exports:
            exports.append(list(long.export_session("s")))
        writing.result()
    for n, lines in enumerate(random.sample(exports, min(4, len(exports)))):
        long.import_session(lines, f"t{n}")
        found = told(long.list_messages(f"t{n}", "agent"))
        assert found == expected(len(found))
        assert len(found) >= 30


def redact(repository: MongoDBSessionRepository, message_id: int) -> None:
    repository.update_message("s", "agent", redacted(message_id))


@pytest.mark.parametrize("pulled", alternating(1, 4, 7, 5))
def test_a_redaction_meanwhile_is_exported_whole_or_not_at_all(
    repository: MongoDBSessionRepository, stored: Stored, pulled: int
) -> None:
    begin(repository)
    repository.create_message("s", "agent", said(0))
    repository.create_message("s", "agent", with_image(1, content(3 * MIB)))
    apply(repository, "s", appends(range(2, 12)))
    settled(stored)
    assert stored.find_one({"_id": "s"})["agents"]["agent"]["archived"] > 1
    exported = repository.export_session("s")
    lines = [next(exported) for _ in range(pulled)]  # 4 come before the attachment
    redact(repository, 1)
    lines += exported
    assert repository.import_session(lines, "t") == "t"
    assert told(repository.list_messages("t", "agent")) == ["text 0", "[redacted]", *expected(12, 2)]
    assert left_of(stored, "t").count("agent_sessions_attachments.chunks") == 0


def test_a_redaction_after_the_message_was_exported_is_too_late(repository: MongoDBSessionRepository) -> None:
    begin(repository)
    image = content(5 * MIB)
    repository.create_message("s", "agent", with_image(0, image))
    exported = repository.export_session("s")
    lines = [next(exported) for _ in range(14)]
    assert kinds(lines[-1:]) == ["message"]
    redact(repository, 0)
    repository.import_session([*lines, *exported], "t")
    (message,) = repository.list_messages("t", "agent")
    assert message.message["content"][1]["image"]["source"]["bytes"] == image


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_attachment_is_not_exported(
    repository: MongoDBSessionRepository, stored: Stored, damage: str
) -> None:
    begin(repository)
    repository.create_message("s", "agent", with_image(0, content(5 * MIB)))
    chunks = stored.database["agent_sessions_attachments.chunks"]
    if damage == "missing":
        chunks.delete_one({"n": 1})
    else:
        chunks.update_one({"n": 1}, {"$set": {"data": b"x" * 2 * MIB}})
    with pytest.raises(AttachmentError, match=r"message 0 of agent 'agent' has a missing or dama"):
        list(repository.export_session("s"))


def test_what_does_not_exist_is_not_exported(repository: MongoDBSessionRepository) -> None:
    with pytest.raises(SessionNotFoundError, match="session 'x' does not exist"):
        next(repository.export_session("x"))


def test_a_session_that_is_deleted_meanwhile(long: MongoDBSessionRepository, stored: Stored) -> None:
    exported = long.export_session("s")
    next(exported)
    stored.delete_one({"_id": "s"})
    stored.database["agent_sessions_archive"].delete_many({})
    with pytest.raises(SessionNotFoundError):
        list(exported)


def test_a_message_that_is_missing(long: MongoDBSessionRepository, stored: Stored) -> None:
    stored.database["agent_sessions_archive"].delete_one({"_id.first": {"$gt": 0}})
    with pytest.raises(DatabaseError, match="is missing in its archive"):
        list(long.export_session("s"))


# What is refused leaves nothing.


@pytest.fixture(scope="module")
def exported(
    server: str, driver: pymongo.MongoClient[dict[str, Any]]
) -> Iterator[tuple[list[str], dict[str, list[Any]]]]:
    """An export with two buckets or more and two attachments, one of them archived, and the documents."""
    database = f"test_{uuid.uuid4().hex}"
    stored = driver[database]["agent_sessions"]
    with MongoDBSessionRepository(server, database, **LIMITS) as repository:
        begin(repository)
        for message_id in range(20):
            sizes = {1: 2 * MIB + 1000, 19: 5000}
            size = sizes.get(message_id)
            message = with_image(message_id, content(size, message_id)) if size else said(message_id)
            repository.create_message("s", "agent", message)
        settled(stored)
        lines = list(repository.export_session("s"))
    yield lines, documents_of(stored)
    driver.drop_database(database)


@pytest.fixture
def lines(stored: Stored, exported: tuple[list[str], dict[str, list[Any]]]) -> list[str]:
    """The export of a session that is there."""
    lines, documents = exported
    store_again(stored, documents)
    return lines


def test_a_damaged_stream_leaves_nothing(
    repository: MongoDBSessionRepository, lines: list[str], stored: Stored
) -> None:
    for number in (0, 1, 2, 5, 20, len(lines) - 1):
        damaged = [*lines[:number], lines[number][:-9], *lines[number + 1 :]]
        with pytest.raises(InvalidArgumentError, match=rf"^line {number + 1} cannot be imported: "):
            repository.import_session(damaged, "t")
        with pytest.raises(InvalidArgumentError, match=r"^the export is truncated: "):
            repository.import_session(lines[:number], "t")
        assert left_of(stored, "t") == []
    repository.import_session(lines, "t")
    same_content(repository, "t", "s")


def test_a_stream_that_fails_leaves_nothing(
    repository: MongoDBSessionRepository, lines: list[str], stored: Stored
) -> None:
    def stream() -> Iterator[str]:
        yield from lines[:-2]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        repository.import_session(stream(), "t")
    assert left_of(stored, "t") == []


def test_a_session_that_exists_is_left_as_it_is(
    repository: MongoDBSessionRepository, lines: list[str], stored: Stored
) -> None:
    before = stored.find_one({"_id": "s"})
    with pytest.raises(SessionExistsError, match="session 's' already exists"):
        repository.import_session(lines)
    assert stored.find_one({"_id": "s"}) == before
    assert len(repository.list_messages("s", "agent")) == 20


def test_a_session_that_is_created_meanwhile_is_left_as_it_is(
    repository: MongoDBSessionRepository, lines: list[str], stored: Stored
) -> None:
    def stream() -> Iterator[str]:
        yield lines[0]
        repository.create_session(Session("t", "AGENT", MOMENT, MOMENT))
        yield from lines[1:]

    with pytest.raises(SessionExistsError, match="session 't' already exists"):
        repository.import_session(stream(), "t")
    assert stored.find_one({"_id": "t"})["agents"] == {}
    assert left_of(stored, "t") == ["agent_sessions"]


def test_of_two_imports_into_one_session_one_is_done(
    repository: MongoDBSessionRepository, lines: list[str], stored: Stored
) -> None:
    together = threading.Barrier(4)

    def bring() -> str | Exception:
        together.wait()
        try:
            return repository.import_session(lines, "t")
        except SessionExistsError as error:
            return error

    with ThreadPoolExecutor(4) as threads:
        outcomes = [each.result() for each in [threads.submit(bring) for _ in range(4)]]
    assert outcomes.count("t") == 1
    same_content(repository, "t", "s")
    assert left_of(stored, "t").count("agent_sessions_attachments.files") == 2


@pytest.mark.anyio
async def test_a_cancelled_import_leaves_nothing(
    repository: MongoDBSessionRepository, lines: list[str], stored: Stored, server: str, database: str
) -> None:
    async with (
        AsyncMongoDBSessionRepository(server, database, **SMALL) as direct,
        MongoDBSessionManagerFactory(server, database, **SMALL) as factory,
    ):
        for start in (direct.import_session, factory.import_session_async):
            waiting = asyncio.Event()

            async def stream(waiting: asyncio.Event = waiting) -> AsyncIterator[str]:
                for line in lines[:-1]:
                    yield line
                waiting.set()
                await asyncio.Event().wait()

            task = asyncio.ensure_future(start(stream(), "t"))
            await waiting.wait()
            assert await asyncio.to_thread(left_of, stored, "t") != []
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(left_of, stored, "t") == []


def test_what_does_not_fit_is_refused(repository: MongoDBSessionRepository, stored: Stored) -> None:
    repository.create_session(Session("s", "AGENT", MOMENT, MOMENT))
    repository.create_agent("s", SessionAgent("agent", {}, {}, {}, MOMENT, MOMENT))
    lines = list(repository.export_session("s"))
    session = json.loads(lines[1])
    session["session"]["large"] = "x" * 17 * MIB
    with pytest.raises(
        InvalidArgumentError, match=r"^line 2 cannot be imported: it exceeds the maximum size of a MongoDB document"
    ):
        repository.import_session(
            [lines[0], json.dumps(session), lines[2], lines[3].split(', "sha256"')[0] + "}}"], "t"
        )
    assert left_of(stored, "t") == []


# Every command may be the one that fails.


def test_an_import_may_stop_at_every_command(
    request: pytest.FixtureRequest,
    repository: MongoDBSessionRepository,
    lines: list[str],
    stored: Stored,
    server: str,
    database: str,
) -> None:
    should = all_of(repository, "s")

    def whole(other: MongoDBSessionRepository) -> None:
        assert all_of(other, "t") == should
        left = left_of(stored, "t")
        assert left.count("agent_sessions_attachments.files") == 2
        assert left.count("agent_sessions_attachments.chunks") == 3

    log = CommandLog()
    with MongoDBSessionRepository(server, database, event_listeners=[log], **SMALL) as counting:
        counting.session_exists("warm-up")
        log.clear()
        counting.import_session(lines, "count")
    count = len([name for name in log.names if name != "createIndexes"])
    assert count > 10
    full = request.config.getoption("--full-adversity")
    numbers = range(count + 1) if full else [*random.sample(range(count - 2), 2), count - 2, count - 1, count]
    every_failure(server, database, stored, lambda other: other.import_session(lines, "t"), whole, count, numbers)


LOST = {"closeConnection": True}
UNACKNOWLEDGED = {
    "errorLabels": ["RetryableWriteError"],
    "writeConcernError": {"code": 6, "errmsg": "the write is done, its acknowledgement is lost"},
}


FAILURES = alternating(LOST, UNACKNOWLEDGED)


@pytest.mark.parametrize("failure", FAILURES, ids=["lost", "unacknowledged"])
@pytest.mark.parametrize("name", alternating("find", "update", "insert"))
def test_an_import_survives_a_lost_connection(
    repository: MongoDBSessionRepository,
    lines: list[str],
    stored: Stored,
    server: str,
    database: str,
    name: str,
    failure: dict[str, Any],
) -> None:
    with copying(server, database) as other:
        other.session_exists("warm-up")
        with fail_point(server, failCommands=[name], appName="copying", times=3, **failure):
            other.import_session(lines, "t")
        same_content(other, "t", "s")
    left = left_of(stored, "t")
    assert left.count("agent_sessions") == 1
    assert left.count("agent_sessions_attachments.files") == 2


@pytest.mark.parametrize("failure", FAILURES, ids=["lost", "unacknowledged"])
@pytest.mark.parametrize("how", alternating("import", "fork"))
def test_when_nobody_knows_whether_the_content_is_stored_nothing_is_left(
    long: MongoDBSessionRepository, stored: Stored, server: str, database: str, how: str, failure: dict[str, Any]
) -> None:
    lines = list(long.export_session("s"))
    with copying(server, database) as other:

        def copy() -> None:
            if how == "import":
                other.import_session(lines, "t")
            else:
                other.fork_session("s", "t")

        other.session_exists("warm-up")
        updating: dict[str, Any] = {"failCommands": ["update"], "namespace": f"{database}.agent_sessions"}
        with (
            fail_point(server, **updating, appName="copying", times=4, **failure),
            pytest.raises(DatabaseUnavailableError, match="unknown"),
        ):
            copy()
        assert not other.session_exists("t")
        assert left_of(stored, "t") == []
        copy()
        assert told(other.list_messages("t", "agent")) == expected(30)


@pytest.mark.parametrize(
    ("step", "count"),
    [(Step(3, 0, 9), 3), (Step(0, 450, 9), 5), (Step(2, 450, 9), 5), (Step(0, 900, 4), 4), (Step(0, 0, 9), 1)],
)
def test_a_copy_archives_as_many_messages_at_once_as_the_limits_ask_for(step: Step, count: int) -> None:
    assert taken([100] * 10, step) == count
