"""Images, documents and videos of messages: kept in GridFS, once per message, and back as they were."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import gridfs
import pymongo
import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient
from strands import tool
from strands.types.session import Session, SessionAgent, SessionType

import interpreter
from fix_attachments import (
    ANOTHER,
    CHUNKS,
    FILES,
    KIB,
    LARGE,
    LARGER,
    MIB,
    SMALL,
    Driver,
    asking,
    content,
    conversation,
    document,
    hashes,
    ids,
    image,
    of,
    redacted,
    restored,
    said,
    sha256,
)
from mongodb_session_manager import (
    AsyncMongoDBSessionManager,
    AttachmentError,
    ConfigurationError,
    DatabaseError,
    MongoDBSessionManager,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    close_global_factory,
    create_mongodb_session_manager,
    create_mongodb_session_manager_async,
    demo,
    initialize_global_factory,
)
from mongodb_session_manager._store.attachments import CHUNK_BYTES
from mongodb_session_manager.demo import Redaction
from proxy import Proxy, command
from support import CommandLog, agent, alternating, eventually, fail_point, texts

MESSAGE_SAVED, OPEN = "update", "findAndModify"


@pytest.fixture(autouse=True)
def words_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the scripted model from writing out attachments to count their words."""
    monkeypatch.setattr(demo, "_count_words", len)


# There and back.


def test_a_turn_with_large_attachments(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str, stored: Any
) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, "a cat")
    live(asking(image(LARGE), document(LARGER), image(SMALL), image(LARGE)))
    assert conversation(live)[0] == ("user", asking(image(LARGE), document(LARGER), image(SMALL), image(LARGE)))
    assert restored(factory) == conversation(live)
    assert hashes(driver, database) == of(LARGE, LARGER, SMALL)
    session = stored.find_one({"_id": "s"})
    message = session["agents"]["agent"]["messages"][0]
    (file,) = (file for file in ids(driver, database) if file["sha256"] == sha256(LARGE))
    assert list(file) == ["incarnation", "sha256", "token"]
    assert file["incarnation"] == session["incarnation"]
    assert message["message"]["content"][1]["image"]["source"]["bytes"] == {
        "__msm__": "attachment",
        "v": f"{sha256(LARGE)}:{len(LARGE)}:{file['token']}",
    }
    assert "attachments" not in stored.find_one({"_id": "s"})["agents"]["agent"]["messages"][1]


@pytest.mark.anyio
async def test_an_asynchronous_turn_with_large_attachments(factory: MongoDBSessionManagerFactory) -> None:
    async with await factory.create_session_manager_async("s") as manager:
        live = agent(manager, "a cat")
        await live.invoke_async(asking(image(LARGE), document(ANOTHER)))
    async with await factory.create_session_manager_async("s") as manager:
        assert conversation(agent(manager)) == conversation(live)
    assert conversation(live)[0] == ("user", asking(image(LARGE), document(ANOTHER)))


@tool
def look() -> dict[str, Any]:
    """Take a picture."""
    return {"status": "success", "content": [{"text": "here"}, image(ANOTHER)]}


@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
def test_a_tool_that_returns_an_image(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str, save_on: str
) -> None:
    manager = factory.create_session_manager("s", save_on=save_on)
    live = agent(manager, {"tool": "look"}, "nice", tools=[look])
    live("look")
    (result,) = conversation(live)[2][1]
    assert result["toolResult"]["content"] == [{"text": "here"}, image(ANOTHER)]
    assert restored(factory) == conversation(live)
    assert hashes(driver, database) == of(ANOTHER)


def test_up_to_the_bound_attachments_stay_in_the_document(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str
) -> None:
    live = agent(factory.create_session_manager("s", max_inline_attachment_bytes=20 * KIB), "a", "b")
    live(asking(image(SMALL), image(content(10 * KIB, 9))))
    assert restored(factory) == conversation(live)
    assert hashes(driver, database) == []
    live(asking(image(SMALL), image(content(10 * KIB + 1, 9))))
    assert restored(factory) == conversation(live)
    assert len(hashes(driver, database)) == 2


@pytest.mark.own_database
def test_any_gridfs_client_reads_them(factory: MongoDBSessionManagerFactory, driver: Driver, database: str) -> None:
    agent(factory.create_session_manager("s"), "a cat")(asking(document(LARGER), image(LARGE)))
    bucket = gridfs.GridFSBucket(driver[database], "agent_sessions_attachments")
    for data in (LARGE, LARGER):
        (found,) = bucket.find({"filename": sha256(data)})
        assert found.length == len(data)
        assert bucket.open_download_stream(found._id).read() == data
        assert bucket.open_download_stream_by_name(sha256(data)).read() == data
    eventually(lambda: "files_id_1_n_1" in driver[database][CHUNKS].index_information())
    assert driver[database][CHUNKS].index_information()["files_id_1_n_1"]["unique"]


@pytest.mark.parametrize(
    ("kind", "sizes"), alternating(("sync", [6 * MIB] * 4), ("async", [24 * MIB])), ids=["four, sync", "one, async"]
)
def test_more_than_a_document_can_hold(
    factory: MongoDBSessionManagerFactory, stored: Any, sizes: list[int], kind: str
) -> None:
    blobs = [os.urandom(size) for size in sizes]
    prompt = asking(*map(document, blobs))
    if kind == "sync":
        with factory.create_session_manager("s") as manager:
            agent(manager, "long", "short")(prompt)
    else:

        async def turn() -> None:
            async with await factory.create_session_manager_async("s") as manager:
                await agent(manager, "long", "short").invoke_async(prompt)

        asyncio.run(turn())
    with factory.create_session_manager("s") as again:
        live = agent(again, "and on")
        assert conversation(live)[0] == ("user", prompt)
        live("go on")
    messages = stored.find_one({"_id": "s"})["agents"]["agent"]["messages"]
    assert texts(messages) == ["what is this?", "long", "go on", "and on"]


@asynccontextmanager
async def borrowed(driver_class: Any, server: str) -> AsyncIterator[Any]:
    client = driver_class(server)
    try:
        yield client
    finally:
        if isinstance(client, AsyncIOMotorClient):
            client.close()
        else:
            await client.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "driver_class", [AsyncIOMotorClient, pytest.param(AsyncMongoClient, marks=pytest.mark.may_block)]
)
async def test_a_borrowed_client(driver_class: Any, server: str, database: str, driver: Driver) -> None:
    async with borrowed(driver_class, server) as client:
        async with AsyncMongoDBSessionManager("s", database_name=database, client=client) as manager:
            live = agent(manager, {"tool": "look"}, "a cat", Redaction("[gone]"), tools=[look])
            await live.invoke_async(asking(image(LARGE)))
        async with AsyncMongoDBSessionManager("s", database_name=database, client=client) as manager:
            again = agent(manager, Redaction("[gone]"))
            assert conversation(again) == conversation(live)
            await again.invoke_async(asking(image(content(MIB, 5))))
    assert hashes(driver, database) == of(LARGE, ANOTHER)


# The repository.


@pytest.fixture(scope="module")
def repository_options() -> dict[str, Any]:
    return {"max_inline_attachment_bytes": 1000}


@pytest.fixture
def repository(repository: MongoDBSessionRepository) -> MongoDBSessionRepository:
    repository.create_session(Session("s", SessionType.AGENT))
    repository.create_agent("s", SessionAgent("agent", {}, {}))
    return repository


def test_the_repository_reads_them_back(repository: MongoDBSessionRepository, driver: Driver, database: str) -> None:
    messages = [said(image(SMALL), message_id=0), said(message_id=1), said(image(LARGE), image(SMALL), message_id=2)]
    for message in messages:
        repository.create_message("s", "agent", message)
    assert [found.message for found in repository.list_messages("s", "agent")] == [m.message for m in messages]
    assert [found.message for found in repository.list_messages("s", "agent", limit=1, offset=2)] == [
        messages[2].message
    ]
    for message in messages:
        found = repository.read_message("s", "agent", message.message_id)
        assert found is not None
        assert found.message == message.message
    opened = repository.open_session("s")["agents"]["agent"]["messages"]
    assert [element["message"] for element in opened] == [message.message for message in messages]
    assert hashes(driver, database) == of(SMALL, LARGE, SMALL)


def test_a_replaced_message_leaves_nothing_behind(
    repository: MongoDBSessionRepository, driver: Driver, database: str
) -> None:
    repository.create_message("s", "agent", said(image(SMALL), image(LARGE)))
    repository.create_message("s", "agent", said(image(SMALL), message_id=1))
    repository.update_message("s", "agent", said(image(ANOTHER)))
    assert hashes(driver, database) == of(SMALL, ANOTHER)
    assert "removed_attachments" not in driver[database]["agent_sessions"].find_one()
    redacted = said(image(ANOTHER))
    redacted.redact_message = {"role": "user", "content": [{"text": "[gone]"}]}
    repository.update_message("s", "agent", redacted)
    assert hashes(driver, database) == of(SMALL)
    found = repository.list_messages("s", "agent")
    assert [message.to_message()["content"] for message in found] == [
        [{"text": "[gone]"}],
        [{"text": "see"}, image(SMALL)],
    ]


def test_replacing_a_message_in_a_session_without_attachments_leaves_no_trace_of_any(
    repository: MongoDBSessionRepository, stored: Any
) -> None:
    repository.create_message("s", "agent", said())
    repository.update_message("s", "agent", said({"text": "more"}))
    document = stored.find_one({"_id": "s"})
    assert "removed_attachments" not in document
    assert "attachments" not in document["agents"]["agent"]["messages"][0]


# What it costs.


def names(commands: CommandLog) -> list[str]:
    """The commands without that which builds the index of the chunks, once per process."""
    return [name for name in commands.names if name != "createIndexes"]


def test_commands(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, "1", "2", "3")
    live("no attachments")
    commands.clear()
    live(asking(document(LARGER)))
    assert names(commands) == ["insert", "insert", "insert", "insert", "update", "update"]
    commands.clear()
    live("no attachments")
    assert names(commands) == ["update", "update"]


def test_commands_of_a_resumed_session(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    agent(factory.create_session_manager("s"), "1")(asking(document(ANOTHER)))
    commands.clear()
    live = agent(factory.create_session_manager("s"), "2")
    assert names(commands) == [OPEN, "find"]
    commands.clear()
    live(asking(image(LARGE)))
    assert names(commands) == ["insert", "insert", "update", "update"]


def test_several_attachments_are_read_by_one_query(factory: MongoDBSessionManagerFactory, commands: CommandLog) -> None:
    live = agent(factory.create_session_manager("s"), "1", "2")
    live(asking(*(image(content(300 * KIB, seed)) for seed in range(10, 15))))
    live(asking(image(content(CHUNK_BYTES + 1, 20))))
    commands.clear()
    assert restored(factory) == conversation(live)
    assert [name for name in commands.names if name != "getMore"] == [OPEN, "find"]


@pytest.mark.own_database
def test_a_query_for_several_needs_no_sorting(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str
) -> None:
    agent(factory.create_session_manager("s"), "1")(asking(image(LARGE), image(LARGER)))
    driver[database].command("profile", 2)
    restored(factory)
    driver[database].command("profile", 0)
    (query,) = driver[database]["system.profile"].find({"op": "query", "ns": f"{database}.{CHUNKS}"})
    assert "hasSortStage" not in query
    assert query["docsExamined"] == query["nreturned"] == 4


@pytest.mark.anyio
async def test_hashing_leaves_every_event_loop_alone(
    factory: MongoDBSessionManagerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    original = hashlib.sha256

    def noting(data: bytes = b"", **options: Any) -> Any:
        if len(data) > 100 * KIB:
            threads.add(threading.current_thread().name)
        return original(data, **options)

    monkeypatch.setattr(hashlib, "sha256", noting)
    async with await factory.create_session_manager_async("s") as manager:
        await agent(manager, "1").invoke_async(asking(image(ANOTHER)))
    async with await factory.create_session_manager_async("s") as manager:
        agent(manager)
    assert threads
    assert not threads & {threading.current_thread().name, "mongodb-session-manager-io"}


# Interrupted, twice at once, lost on the way.

KILLED = """
import os, signal, sys
from pymongo import monitoring
from strands import Agent
import fix_attachments as t
from mongodb_session_manager.demo import ScriptedModel
from mongodb_session_manager import MongoDBSessionManager

class KillAtInsert(monitoring.CommandListener):
    left = int(sys.argv[3])
    def started(self, event): pass
    def failed(self, event): pass
    def succeeded(self, event):
        if event.command_name == "insert":
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)

manager = MongoDBSessionManager("s", sys.argv[1], sys.argv[2], event_listeners=[KillAtInsert()])
live = Agent(model=ScriptedModel(["1"]), agent_id="agent", session_manager=manager, callback_handler=None)
live(t.asking(t.document(t.LARGER)))
"""


@pytest.mark.parametrize("inserts", alternating(1, 2, 3, 4))
def test_a_process_killed_in_the_middle_of_an_upload(
    factory: MongoDBSessionManagerFactory, server: str, database: str, driver: Driver, inserts: int
) -> None:
    with interpreter.start(KILLED, server, database, inserts) as process:
        assert process.wait() == -signal.SIGKILL
    assert len(ids(driver, database, CHUNKS)) == min(inserts, 3)
    assert len(ids(driver, database)) == (inserts == 4)
    assert restored(factory) == []
    live = agent(factory.create_session_manager("s"), "1")
    live(asking(document(LARGER)))
    assert restored(factory) == conversation(live)
    assert factory.delete_session("s")
    assert ids(driver, database, CHUNKS) == ids(driver, database) == []


def test_the_same_content_by_several_at_once(
    server: str, database: str, factory: MongoDBSessionManagerFactory, driver: Driver
) -> None:
    barrier = threading.Barrier(4)

    def turn(number: int) -> list[Any]:
        with MongoDBSessionManager("s", server, database) as manager:
            live = agent(manager, "1", agent_id=f"agent-{number}")
            barrier.wait(30)
            live(asking(document(ANOTHER), image(LARGE)))
            return conversation(live)

    with ThreadPoolExecutor(4) as threads:
        conversations = list(threads.map(turn, range(4)))
    with factory.create_session_manager("s") as manager:
        for number in range(4):
            assert conversation(agent(manager, agent_id=f"agent-{number}")) == conversations[number]
    assert hashes(driver, database) == of(*[LARGE, ANOTHER] * 4)


@pytest.mark.parametrize("lost", alternating("acknowledgement", "command"))
@pytest.mark.parametrize(
    "match", alternating(command("insert"), command("update"), FILES.encode()), ids=["chunk", "message", "file"]
)
def test_lost_on_the_way(server: str, database: str, driver: Driver, lost: str, match: bytes) -> None:
    with Proxy(server) as proxy, MongoDBSessionManagerFactory(proxy.uri, database) as factory:
        live = agent(factory.create_session_manager("s"), "1", "2")
        live("first")
        drop = proxy.drop_after_request if lost == "acknowledgement" else proxy.drop_before_request
        drop(match)
        live(asking(document(ANOTHER), image(LARGE)))
        assert proxy.dropped == 1
        assert restored(factory) == conversation(live)
    assert len(ids(driver, database, CHUNKS)) == 2
    assert len(ids(driver, database)) == 2


def test_an_upload_that_fails_is_made_good_by_the_next_flush(
    factory: MongoDBSessionManagerFactory, server: str, stored: Any
) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, "1", "2")
    live("first")
    with fail_point(server, failCommands=["insert"], errorCode=8000, times=2), pytest.raises(DatabaseError):
        live(asking(document(ANOTHER)))
    assert [message["message_id"] for message in stored.find_one({"_id": "s"})["agents"]["agent"]["messages"]] == [0, 1]
    manager.flush()
    assert restored(factory) == conversation(live)


# Missing and damaged.


def drop_a_chunk(chunks: Any) -> None:
    chunks.delete_one({"n": 1})


def drop_all(chunks: Any) -> None:
    chunks.delete_many({})


def change_a_byte(chunks: Any) -> None:
    found = chunks.find_one({"n": 1})
    chunks.update_one({"_id": found["_id"]}, {"$set": {"data": b"\0" + found["data"][1:]}})


def empty_a_chunk(chunks: Any) -> None:
    chunks.update_one({"n": 1}, {"$set": {"data": b""}})


TWO_CHUNKS = content(CHUNK_BYTES + KIB, 6)


@pytest.mark.parametrize("damage", [drop_a_chunk, drop_all, change_a_byte, empty_a_chunk])
def test_a_damaged_attachment_is_an_error(
    repository: MongoDBSessionRepository, driver: Driver, database: str, damage: Callable[[Any], None]
) -> None:
    repository.create_message("s", "agent", said())
    repository.create_message("s", "agent", said(document(TWO_CHUNKS), message_id=1))
    repository.create_message("s", "agent", said(image(SMALL), message_id=2))
    damage(driver[database][CHUNKS])
    reads: list[Callable[[], Any]] = [
        lambda: repository.read_message("s", "agent", 1),
        lambda: repository.list_messages("s", "agent"),
        lambda: repository.open_session("s"),
    ]
    for read in reads:
        with pytest.raises(AttachmentError) as raised:
            read()
        assert "'s': message 1 of agent 'agent'" in str(raised.value)
        assert sha256(TWO_CHUNKS) in str(raised.value)
    assert repository.list_messages("s", "agent", limit=1)[0].message == said().message


# Documents that others have written.


def test_bytes_in_documents_of_earlier_versions(factory: MongoDBSessionManagerFactory, stored: Any) -> None:
    lookalike = {"__msm__": "attachment", "v": f"{sha256(LARGE)}:{len(LARGE)}:0"}
    contents = [
        [image(LARGE)],
        [{"image": {"format": "png", "source": {"bytes": {"__bytes_encoded__": True, "data": "AAEC"}}}}],
        [{"text": "x", "kept": lookalike}],
    ]
    stored.insert_one(
        {
            "_id": "s",
            "session_id": "s",
            "session_type": "AGENT",
            "agents": {
                "agent": {
                    "agent_data": {"agent_id": "agent", "state": {}, "conversation_manager_state": {}},
                    "messages": [
                        {"message": {"role": "user", "content": said}, "message_id": number}
                        for number, said in enumerate(contents)
                    ],
                }
            },
        }
    )
    with MongoDBSessionRepository(factory._connection.settings.connection_string, stored.database.name) as repository:
        repository.open_session("s")
        found = [message.message["content"] for message in repository.list_messages("s", "agent")]
    assert found == [contents[0], [image(b"\0\1\2")], contents[2]]


# Redacted.


@pytest.mark.parametrize("save_on", alternating("message", "invocation"))
def test_a_redaction_removes_the_attachment(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str, save_on: str
) -> None:
    live = agent(factory.create_session_manager("s", save_on=save_on), "1", Redaction("[gone]"), "2")
    live(asking(image(LARGE)))
    live(asking(image(LARGE), document(ANOTHER)))
    assert hashes(driver, database) == of(LARGE)
    live(asking(image(LARGE), document(ANOTHER)))
    assert hashes(driver, database) == of(LARGE, LARGE, ANOTHER)
    assert restored(factory) == conversation(live)
    assert conversation(live)[2][1] == [{"text": "[gone]"}]


@pytest.mark.anyio
async def test_an_asynchronous_redaction_removes_the_attachment(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str
) -> None:
    async with await factory.create_session_manager_async("s") as manager:
        live = agent(manager, Redaction("[gone]"))
        await live.invoke_async(asking(image(LARGE)))
    assert hashes(driver, database) == []
    async with await factory.create_session_manager_async("s") as manager:
        assert conversation(agent(manager)) == conversation(live)
    assert conversation(live)[0][1] == [{"text": "[gone]"}]


def test_a_redaction_leaves_the_same_content_of_other_messages(
    factory: MongoDBSessionManagerFactory, driver: Driver, database: str
) -> None:
    agent(factory.create_session_manager("s"), "1", agent_id="other")(asking(image(LARGE)))
    agent(factory.create_session_manager("t"), "1")(asking(image(ANOTHER)))
    live = agent(factory.create_session_manager("s"), Redaction("[gone]"), "1")
    live(asking(image(LARGE), image(ANOTHER)))
    assert hashes(driver, database) == of(LARGE)
    assert hashes(driver, database, "t") == of(ANOTHER)
    assert restored(factory, "t")[0][1] == asking(image(ANOTHER))


@pytest.mark.parametrize("where", ["head", "archive"])
def test_a_redaction_leaves_what_another_message_refers_to(
    server: str, database: str, stored: Any, driver: Driver, where: str
) -> None:
    """1.0.0 has stored the same content once for all messages of a session."""
    with MongoDBSessionRepository(server, database, max_embedded_messages=4) as repository:
        repository.create_session(Session("s", SessionType.AGENT))
        for agent_id in ("agent", "other"):
            repository.create_agent("s", SessionAgent(agent_id, {}, {}))
        repository.create_message("s", "agent", said(image(LARGE)))
        repository.create_message("s", "other", said())
        share(driver, database)
        message = stored.find_one()["agents"]["agent"]["messages"][0]
        stored.update_one({"_id": "s"}, {"$set": {"agents.other.messages.0": message}})
        if where == "archive":
            for message_id in range(1, 6):
                repository.create_message("s", "other", said(message_id=message_id))
            eventually(lambda: stored.find_one()["agents"]["other"].get("archived"))
        repository.update_message("s", "agent", redacted())
        assert hashes(driver, database) == of(LARGE)
        assert repository.read_message("s", "other", 0).message["content"] == [{"text": "see"}, image(LARGE)]
        repository.update_message("s", "other", redacted())
        assert hashes(driver, database) == []


def share(driver: Driver, database: str) -> None:
    """Give the one file there is, and the message that refers to it, the token that 1.0.0 would have given."""
    (file,) = driver[database][FILES].find()
    token = file["_id"]["token"]
    for collection, field in ((FILES, "_id"), (CHUNKS, "_id.file")):
        for found in driver[database][collection].find({f"{field}.token": token}):
            driver[database][collection].delete_one({"_id": found["_id"]})
            new = {**file["_id"], "token": "7"}
            found["_id"] = new if collection == FILES else {**found["_id"], "file": new}
            driver[database][collection].insert_one(found | ({"files_id": new} if "files_id" in found else {}))
    sessions = driver[database]["agent_sessions"]
    message = sessions.find_one()["agents"]["agent"]["messages"][0]
    (reference,) = message["attachments"]
    new_reference = reference.replace(token, "7")
    message["attachments"] = [new_reference]
    message["message"]["content"][1]["image"]["source"]["bytes"]["v"] = new_reference
    sessions.update_one({"_id": "s"}, {"$set": {"agents.agent.messages.0": message}})


def test_a_redaction_without_attachments_sends_nothing_more(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    live = agent(factory.create_session_manager("s"), "1", Redaction("[gone]"))
    live(asking(image(LARGE)))
    commands.clear()
    live("harmless")
    # The redaction takes the answer along, if that is there before it is sent.
    assert names(commands) in (["update", "findAndModify"], ["update", "findAndModify", "update"])


@pytest.mark.parametrize("deletes", [1, 2])
def test_a_removal_that_is_interrupted_is_made_good_by_the_next_flush(
    factory: MongoDBSessionManagerFactory, server: str, driver: Driver, database: str, stored: Any, deletes: int
) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, "1")
    live(asking(image(LARGE), document(ANOTHER)))
    with MongoDBSessionManagerFactory(server, database, retryWrites=False) as other:
        redacting = agent(other.create_session_manager("s"), Redaction("[gone]"), agent_id="second")
        with pytest.raises(DatabaseError):
            fail_at_delete(server, deletes, lambda: redacting(asking(image(LARGE), image(SMALL))))
        files, chunks = (
            {each["sha256"] for each in found}
            for found in (ids(driver, database), [chunk["file"] for chunk in ids(driver, database, CHUNKS)])
        )
        assert (sha256(SMALL) in files, sha256(SMALL) in chunks) == (deletes == 1, True)
        assert len(stored.find_one()["removed_attachments"]) == 2
        redacting.messages.clear()
        redacting("go on")
    assert hashes(driver, database) == of(LARGE, ANOTHER)
    assert {chunk["file"]["sha256"] for chunk in ids(driver, database, CHUNKS)} == {sha256(LARGE), sha256(ANOTHER)}
    assert restored(factory) == conversation(live)


def fail_at_delete(server: str, number: int, call: Callable[[], object]) -> None:
    """Have all of the `number`th deletes and those after it fail until `call` is over."""
    with pymongo.MongoClient(server) as client:
        data = {"failCommands": ["delete"], "errorCode": 8000}
        mode = {"skip": number - 1}
        client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})
        try:
            call()
        finally:
            client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


def test_content_that_somebody_has_removed_is_stored_again(
    factory: MongoDBSessionManagerFactory, server: str, database: str, driver: Driver
) -> None:
    live = agent(factory.create_session_manager("s"), "1", "2", "3", "4")
    with MongoDBSessionRepository(server, database) as repository:
        for number in range(3):
            live(asking(image(LARGE)))
            redacted = repository.list_messages("s", "agent")[2 * number]
            assert redacted.message["content"] == asking(image(LARGE))
            redacted.redact_message = {"role": "user", "content": [{"text": "[gone]"}]}
            repository.update_message("s", "agent", redacted)
            assert hashes(driver, database) == []
    live(asking(image(LARGE)))
    assert restored(factory)[6:] == conversation(live)[6:]
    assert hashes(driver, database) == of(LARGE)


def test_removing_while_others_append(server: str, database: str, factory: MongoDBSessionManagerFactory) -> None:
    """One agent stores and removes again and again what others store for good."""
    images = [image(content(2 * KIB, seed)) for seed in range(8)]
    options: dict[str, Any] = {"max_inline_attachment_bytes": 1000}
    stop = threading.Event()

    def redact() -> int:
        turns = 0
        with MongoDBSessionManager("s", server, database, **options) as manager:
            live = agent(manager, *[Redaction("[gone]")] * 100, agent_id="redacting")
            while not stop.is_set() and turns < 100:
                live(asking(*images))
                turns += 1
        return turns

    def append(number: int) -> list[Any]:
        with MongoDBSessionManager("s", server, database, **options) as manager:
            live = agent(manager, *[""] * len(images), agent_id=f"agent-{number}")
            for one in images:
                live(asking(one))
            return conversation(live)

    with ThreadPoolExecutor(3) as threads:
        redacting = threads.submit(redact)
        appending = [threads.submit(append, number) for number in range(2)]
        conversations = [future.result() for future in appending]
        stop.set()
        assert redacting.result() > 0
    with factory.create_session_manager("s") as manager:
        for number in range(2):
            assert conversation(agent(manager, agent_id=f"agent-{number}")) == conversations[number]


# The option.


@pytest.mark.parametrize("value", [-1, 15 * MIB + 1, True, "1000", 1.5])
@pytest.mark.parametrize(
    "make",
    [MongoDBSessionRepository, MongoDBSessionManagerFactory, initialize_global_factory],
    ids=["repository", "factory", "global factory"],
)
def test_a_bound_that_cannot_be_one(make: Callable[..., Any], value: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_inline_attachment_bytes must be an int from 0 to 15728640"):
        make("mongodb://nowhere", max_inline_attachment_bytes=value)


@pytest.mark.parametrize("make", [MongoDBSessionManager, AsyncMongoDBSessionManager, create_mongodb_session_manager])
def test_a_bound_that_cannot_be_one_for_a_manager(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match="max_inline_attachment_bytes"):
        make("s", "mongodb://nowhere", max_inline_attachment_bytes=-1)


@pytest.mark.parametrize("way", ["factory", "override", "global", "manager", "create", "create async"])
def test_the_bound_reaches_the_sessions(server: str, database: str, driver: Driver, way: str) -> None:
    bound: dict[str, Any] = {"max_inline_attachment_bytes": 1000}
    if way == "create async":

        async def turn() -> None:
            async with await create_mongodb_session_manager_async("s", server, database, **bound) as manager:
                await agent(manager, "1").invoke_async(asking(image(SMALL)))

        asyncio.run(turn())
    elif way in ("manager", "create"):
        make = MongoDBSessionManager if way == "manager" else create_mongodb_session_manager
        with make("s", server, database, **bound) as manager:
            agent(manager, "1")(asking(image(SMALL)))
    else:
        make_factory = initialize_global_factory if way == "global" else MongoDBSessionManagerFactory
        options, overrides = ({}, bound) if way == "override" else (bound, {})
        with (
            make_factory(server, database, **options) as made,
            made.create_session_manager("s", **overrides) as manager,
        ):
            agent(manager, "1")(asking(image(SMALL)))
        close_global_factory()
    assert hashes(driver, database) == of(SMALL)
