"""Forking sessions: another one with the same beginning, from which an agent goes on."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pymongo
import pytest
from strands.agent.conversation_manager import SlidingWindowConversationManager, SummarizingConversationManager

from fix_archive import (
    FIVES,
    SMALL,
    Other,
    append,
    appends,
    begin,
    documents_of,
    expected,
    head,
    idle,
    redacted,
    said,
    said_in,
    settled,
    started,
    store_again,
    talk,
    told,
    weather,
)
from fix_copying import KIB, all_of, content, every_failure, left_of, same_content, with_image
from fix_legacy import conversation, old_agent, old_session
from fix_overtaking import AtCommand
from mongodb_session_manager import (
    AgentNotFoundError,
    AsyncMongoDBSessionRepository,
    AttachmentError,
    DatabaseError,
    InvalidArgumentError,
    MessageNotFoundError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionExistsError,
    SessionNotFoundError,
    demo,
)
from mongodb_session_manager.demo import Redaction
from support import CommandLog, agent, apply, eventually, fail_point, sampled, texts

Stored = pymongo.collection.Collection[dict[str, Any]]
Prepared = tuple[dict[str, list[Any]], ...]


@pytest.fixture(autouse=True)
def words_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_count_words", len)


@pytest.fixture(scope="module", autouse=True)
def chunks_are_small() -> Iterator[None]:
    """Store attachments in chunks of 64 KiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mongodb_session_manager._store.attachments.CHUNK_BYTES", 64 * KIB)
        yield


LIMITS: dict[str, Any] = {**SMALL, "max_inline_attachment_bytes": 1000}


@pytest.fixture(scope="module")
def logged_repository(server: str, shared_database: str) -> Iterator[tuple[MongoDBSessionRepository, CommandLog]]:
    log = CommandLog()
    with started(server, shared_database, log, **LIMITS) as repository:
        yield repository, log


@pytest.fixture
def commands(logged_repository: tuple[MongoDBSessionRepository, CommandLog]) -> CommandLog:
    """The commands of the repository."""
    log = logged_repository[1]
    log.clear()
    return log


@pytest.fixture
def repository(
    database: str, logged_repository: tuple[MongoDBSessionRepository, CommandLog], commands: CommandLog
) -> Iterator[MongoDBSessionRepository]:
    repository = logged_repository[0]
    yield repository
    idle(repository)


@pytest.fixture(scope="module")
def small_factory(server: str, shared_database: str) -> Iterator[MongoDBSessionManagerFactory]:
    with MongoDBSessionManagerFactory(server, shared_database, **LIMITS) as factory:
        yield factory


@pytest.fixture
def small(database: str, small_factory: MongoDBSessionManagerFactory) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory that archives what is older than eight messages."""
    yield small_factory
    idle(small_factory)


IMAGES = {3: content(65 * KIB, 3), 28: content(5000, 28)}


def thirty(
    repository: MongoDBSessionRepository, stored: Stored, images: dict[int, bytes], text: str = "text {}"
) -> dict[str, list[Any]]:
    """The documents of a session of 30 messages, of which 25 are archived in buckets of 5, by collection."""
    begin(repository)
    for part in FIVES:
        apply(repository, "s", appends(part, text))
        settled(stored)
    for n, image in images.items():
        repository.update_message("s", "agent", with_image(n, image))
    assert head(stored)["archived"] == 25
    documents = documents_of(stored)
    repository.delete_session("s")
    return documents


@pytest.fixture(scope="module")
def prepared(server: str, driver: pymongo.MongoClient[dict[str, Any]]) -> Iterator[Prepared]:
    """Sessions of 30 messages: one without images, one with two of them, of which one is archived, and another one."""
    database = f"test_{uuid.uuid4().hex}"
    stored = driver[database]["agent_sessions"]
    with MongoDBSessionRepository(server, database, **SMALL, max_inline_attachment_bytes=1000) as repository:
        yield (
            thirty(repository, stored, {}),
            thirty(repository, stored, IMAGES),
            thirty(repository, stored, dict.fromkeys(IMAGES, content(5000, 9)), "other"),
        )
    driver.drop_database(database)


@pytest.fixture
def long(repository: MongoDBSessionRepository, stored: Stored, prepared: Prepared) -> MongoDBSessionRepository:
    """A repository with a session of 30 messages, of which 25 are archived."""
    store_again(stored, prepared[0])
    return repository


def snapshot(stored: Stored) -> list[Any]:
    """Everything that is stored of the session."""
    database = stored.database
    return [
        list(database[name].find({"session_id": "s"}, sort=[("_id", 1)]))
        for name in sorted(database.list_collection_names())
    ]


# Everything.


def test_a_fork_is_the_same_session(
    small: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    with small.create_session_manager("s") as manager:
        one = agent(manager, *[f"a{n}" for n in range(7)], agent_id="a.b")
        one([{"text": "q0"}, {"image": {"format": "png", "source": {"bytes": content(100 * KIB)}}}])
        for n in range(1, 7):
            one(f"q{n}")
        two = agent(manager, Redaction("[redacted]"), agent_id="two", system_prompt="Be brief.")
        two("my card")
        manager.update_metadata({"tier": "gold"})
        manager.add_feedback({"rating": "up"})
    eventually(lambda: len(stored.find_one({"_id": "s"})["agents"]["a%2Eb"]["messages"]) <= 8)
    stored.update_one({"_id": "s"}, {"$set": {"session_viewer_password": "x"}})
    before = snapshot(stored)
    small.fork_session("s", "t")
    assert snapshot(stored) == before
    source, fork = all_of(repository, "s"), all_of(repository, "t")
    assert source.pop("feedbacks") != []
    assert fork.pop("feedbacks") == []
    assert fork["session"].pop("created_at") > source["session"].pop("created_at")
    del fork["session"]["updated_at"], source["session"]["updated_at"]
    assert fork == source
    document, original = stored.find_one({"_id": "t"}), stored.find_one({"_id": "s"})
    assert document["session_id"] == "t"
    assert document["session_viewer_password"] == "x"
    assert document["guardrail_events"] == original["guardrail_events"] != []
    assert document["copy_of"]["session_id"] == "s"
    assert document["copy_of"]["at"] == document["created_at"]


def test_a_fork_and_its_session_go_their_own_ways(small: MongoDBSessionManagerFactory) -> None:
    talk(small, 6)
    small.fork_session("s", "t")
    for session_id, reply in (("s", "here"), ("t", "there")):
        with small.create_session_manager(session_id) as manager:
            resumed = agent(manager, *[reply] * 5)
            assert texts(resumed.messages) == said_in(6)
            for _ in range(5):
                resumed("where?")
    for session_id, reply in (("s", "here"), ("t", "there")):
        with small.create_session_manager(session_id) as manager:
            assert texts(agent(manager).messages) == said_in(6) + ["where?", reply] * 5


def test_redacting_in_one_leaves_the_other(repository: MongoDBSessionRepository, stored: Stored) -> None:
    begin(repository)
    image = content(5000)
    apply(repository, "s", appends(range(20)))
    settled(stored)
    for message_id in (2, 19):
        repository.update_message("s", "agent", with_image(message_id, image))
    repository.fork_session("s", "t")
    repository.fork_session("t", "u")
    for message_id in (2, 19):
        repository.update_message("s", "agent", redacted(message_id))
        repository.update_message("u", "agent", redacted(message_id))
    assert left_of(stored, "s").count("agent_sessions_attachments.files") == 0
    messages = repository.list_messages("t", "agent")
    assert [messages[n].message["content"][1]["image"]["source"]["bytes"] for n in (2, 19)] == [image, image]
    for session_id in "su":
        assert [told(repository.list_messages(session_id, "agent"))[n] for n in (2, 19)] == ["[redacted]"] * 2


def test_what_an_application_has_stored_as_the_origin_of_a_session_is_replaced(
    repository: MongoDBSessionRepository, stored: Stored
) -> None:
    stored.insert_one(old_session(agent=old_agent("agent", *conversation())))
    for n, odd in enumerate(([], [1], "x", {"round": -1})):
        stored.update_one({"_id": "s"}, {"$set": {"copy_of": odd}})
        repository.fork_session("s", f"fork {n}")
        assert stored.find_one({"_id": f"fork {n}"})["copy_of"].keys() == {"session_id", "at"}, odd


def test_a_session_of_old_is_forked(repository: MongoDBSessionRepository, stored: Stored) -> None:
    unnumbered = [{name: value for name, value in m.items() if name != "message_id"} for m in conversation()]
    stored.insert_one(old_session(agent=old_agent("agent", *conversation()), **{"50%": old_agent("50%", *unnumbered)}))
    repository.fork_session("s", "t", {"50%": 3})
    fork = stored.find_one({"_id": "t"})
    assert fork["agents"]["agent"]["messages"] == conversation()
    assert fork["agents"]["50%25"]["messages"] == conversation()[:4]
    assert [fork["agents"][key]["next_message_id"] for key in ("agent", "50%25")] == [6, 4]
    assert stored.find_one({"_id": "s"})["agents"].keys() == {"agent", "50%25"}


# The beginning.


@pytest.mark.parametrize("last", sampled([0, 1, 4, 5, 6, 24, 25, 26, 29], 0, 6, 25, 29))
def test_a_fork_ends_with_a_message(long: MongoDBSessionRepository, stored: Stored, last: int) -> None:
    before = snapshot(stored)
    long.fork_session("s", "t", last)
    assert snapshot(stored) == before
    assert told(long.list_messages("t", "agent")) == expected(last + 1)
    assert [m.created_at for m in long.list_messages("t", "agent")] == [
        m.created_at for m in long.list_messages("s", "agent")
    ][: last + 1]
    assert long.get_message_count("t", "agent") == last + 1
    assert long.read_message("t", "agent", last).message == said(last).message
    assert long.read_message("t", "agent", last + 1) is None
    long.create_message("t", "agent", said(last + 1, f"other {last + 1}"))
    apply(long, "t", appends(range(last + 2, last + 22), "other {}"))
    eventually(lambda: len(stored.find_one({"_id": "t"})["agents"]["agent"]["messages"]) <= 8)
    assert told(long.list_messages("t", "agent")) == expected(last + 1) + [
        f"other {n}" for n in range(last + 1, last + 22)
    ]
    long.fork_session("t", "u", {"agent": last + 12})
    assert told(long.list_messages("u", "agent"))[-1] == f"other {last + 12}"
    assert snapshot(stored) == before


def test_an_agent_goes_on_from_a_fork(small: MongoDBSessionManagerFactory, stored: Stored) -> None:
    talk(small, 7)
    eventually(lambda: len(head(stored)["messages"]) <= 8)
    for turns in (1, 3, 6, 7):
        small.fork_session("s", fork := f"t{turns}", 2 * turns - 1)
        with small.create_session_manager(fork) as manager:
            resumed = agent(manager, "another answer")
            assert texts(resumed.messages) == said_in(turns)
            resumed("another question")
            assert manager.get_message_count("agent") == 2 * turns + 2
        with small.create_session_manager(fork) as manager:
            assert texts(agent(manager).messages) == [*said_in(turns), "another question", "another answer"]


def test_the_totals_are_those_of_the_messages(
    small: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    turns = range(1, 5)
    with small.create_session_manager("s") as manager:
        replies = [r for n in turns for r in ({"tool": "weather", "input": {"city": "Oslo"}}, f"a{n}")]
        one = agent(manager, *replies, tools=[weather])
        usage = {}
        for n in turns:
            one(f"q{n}")
            usage[n] = manager.get_usage()
    eventually(lambda: len(head(stored)["messages"]) <= 8)
    for n in turns:
        repository.fork_session("s", f"t{n}", 4 * n - 1)
        assert repository.get_usage(f"t{n}") == usage[n]
        assert usage[n]["total"]["toolCalls"] == n
        assert usage[n]["total"]["invocations"] == n


def test_several_agents_are_cut_by_name(
    small: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository
) -> None:
    with small.create_session_manager("s") as manager:
        for agent_id in ("a.b", "$two", "three"):
            one = agent(manager, "a0", "a1", agent_id=agent_id)
            one("q0")
            one("q1")
    with pytest.raises(
        InvalidArgumentError, match="has several agents: pass at_message as a dict of agent ids to message ids"
    ):
        repository.fork_session("s", "t", 1)
    with pytest.raises(AgentNotFoundError, match="has no agent 'four'"):
        repository.fork_session("s", "t", {"four": 1})
    assert not repository.session_exists("t")
    repository.fork_session("s", "t", {"a.b": 1, "$two": 2})
    counts = {agent_id: repository.get_message_count("t", agent_id) for agent_id in ("a.b", "$two", "three")}
    assert counts == {"a.b": 2, "$two": 3, "three": 4}
    repository.fork_session("s", "u", {})
    assert repository.get_message_count("u", "a.b") == 4


def test_a_message_that_is_not_there(long: MongoDBSessionRepository, stored: Stored) -> None:
    for last in (30, 31, 2**40):
        with pytest.raises(MessageNotFoundError, match=f"agent 'agent' has no message {last}"):
            long.fork_session("s", "t", last)
        assert left_of(stored, "t") == []


def test_what_is_no_message_id_is_refused(repository: MongoDBSessionRepository, commands: CommandLog) -> None:
    wrong: list[Any] = [-1, True, "1", 1.5, [1], {"agent": "1"}, {"agent": None}, {1: 1}, {"": 1}]
    for at_message in wrong:
        with pytest.raises(InvalidArgumentError):
            repository.fork_session("s", "t", at_message)
    assert commands.names == []


def test_what_is_no_session(long: MongoDBSessionRepository, stored: Stored) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^new_id must"):
        long.fork_session("s", {"$ne": None})  # type: ignore[arg-type]
    with pytest.raises(SessionNotFoundError, match="session 'x' does not exist"):
        long.fork_session("x", "t")
    before = snapshot(stored)
    for new_id in ("s", "there"):
        if new_id == "there":
            long.open_session("there")
        with pytest.raises(SessionExistsError, match=f"session '{new_id}' already exists"):
            long.fork_session("s", new_id)
    assert snapshot(stored) == before
    assert left_of(stored, "there") == ["agent_sessions"]


def test_guardrail_events_of_what_is_cut_off_are_left_behind(
    small: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with small.create_session_manager("s") as manager:
        one = agent(manager, Redaction("[redacted]"), "fine", Redaction("[redacted]"))
        for prompt in ("my card", "hello", "my card again"):
            one(prompt)
    small.fork_session("s", "t", 3)
    assert [event["message_id"] for event in stored.find_one({"_id": "s"})["guardrail_events"]] == [0, 4]
    assert [event["message_id"] for event in stored.find_one({"_id": "t"})["guardrail_events"]] == [0]


def test_attachments_of_what_is_cut_off_are_left_behind(repository: MongoDBSessionRepository, stored: Stored) -> None:
    begin(repository)
    apply(repository, "s", appends(range(20)))
    settled(stored)
    for message_id in (2, 3, 18, 19):
        repository.update_message("s", "agent", with_image(message_id, content(5000, message_id)))
    for session_id, last, count in (("t", 2, 1), ("u", 17, 2), ("v", 18, 3)):
        repository.fork_session("s", session_id, last)
        assert left_of(stored, session_id).count("agent_sessions_attachments.files") == count
        assert len(repository.list_messages(session_id, "agent")) == last + 1


# What the conversation manager shows.


def test_a_window_is_as_long_as_it_was(small: MongoDBSessionManagerFactory) -> None:
    talk(small, 6, conversation_manager=SlidingWindowConversationManager(window_size=4))
    for turns, shown in ((6, 4), (5, 4), (2, 4), (1, 2)):
        small.fork_session("s", fork := f"t{turns}", 2 * turns - 1)
        with small.create_session_manager(fork) as manager:
            resumed = agent(manager, "on", conversation_manager=SlidingWindowConversationManager(window_size=4))
            assert texts(resumed.messages) == said_in(turns)[-shown:]
            resumed("go on")
        with small.create_session_manager(fork) as manager:
            resumed = agent(manager, conversation_manager=SlidingWindowConversationManager(window_size=4))
            assert texts(resumed.messages)[-2:] == ["go on", "on"]
            assert resumed.conversation_manager.removed_message_count + len(resumed.messages) == 2 * turns + 2


def test_a_summary_stays_if_the_fork_holds_what_it_tells(small: MongoDBSessionManagerFactory) -> None:
    def manager_of() -> SummarizingConversationManager:
        return SummarizingConversationManager(summary_ratio=0.5, preserve_recent_messages=2)

    with small.create_session_manager("s") as manager:
        one = agent(manager, *[f"a{n}" for n in range(4)], "the summary", "a4", conversation_manager=manager_of())
        for n in range(4):
            one(f"q{n}")
        one.conversation_manager.reduce_context(one)
        one("q4")
    removed = one.conversation_manager.removed_message_count
    assert removed == 4
    small.fork_session("s", "later", 7)
    small.fork_session("s", "earlier", 1)
    with small.create_session_manager("later") as manager:
        assert texts(agent(manager, conversation_manager=manager_of()).messages) == [
            "the summary",
            "q2",
            "a2",
            "q3",
            "a3",
        ]
    with small.create_session_manager("earlier") as manager:
        resumed = agent(manager, "on", conversation_manager=manager_of())
        assert texts(resumed.messages) == ["q0", "a0"]
        resumed("go on")
        assert texts(resumed.messages) == ["q0", "a0", "go on", "on"]


def test_a_fork_may_end_with_a_tool_call(small: MongoDBSessionManagerFactory) -> None:
    with small.create_session_manager("s") as manager:
        agent(manager, {"tool": "weather", "input": {"city": "Oslo"}}, "It rains.", tools=[weather])("weather?")
    small.fork_session("s", "t", 1)
    with small.create_session_manager("t") as manager:
        resumed = agent(manager, "Never mind.", tools=[weather])
        assert str(resumed("forget it")).strip() == "Never mind."
    with small.create_session_manager("t") as manager:
        assert texts(agent(manager, tools=[weather]).messages)[-2:] == ["forget it", "Never mind."]


# In every world.


@pytest.mark.anyio
async def test_forks_asynchronously(small: MongoDBSessionManagerFactory, server: str, database: str) -> None:
    async with await small.create_session_manager_async("s") as manager:
        await agent(manager, "a0").invoke_async("q0")
    await small.fork_session_async("s", "t", at_message=0)
    async with AsyncMongoDBSessionRepository(server, database) as repository:
        await repository.fork_session("s", "u", {"agent": 0})
        for session_id in "tu":
            assert told(await repository.list_messages(session_id, "agent")) == ["q0"]


def test_what_a_fork_costs(long: MongoDBSessionRepository, stored: Stored, commands: CommandLog) -> None:
    long.open_session("short")
    archive = stored.database["agent_sessions_archive"]

    def buckets(session_id: str) -> int:
        return archive.count_documents({"session_id": session_id})

    commands.clear()
    long.fork_session("short", "t")
    begin, end = ["find", "insert"], ["find", "find", "update"]  # whether the session was rewound, or is gone
    assert commands.names == [*begin, "update", *end[1:]]
    commands.clear()
    long.fork_session("s", "u")
    assert commands.names == [*begin, *["find"] * buckets("s"), *["update"] * buckets("u"), "update", *end]
    commands.clear()
    long.fork_session("s", "v", 3)
    assert buckets("v") == 0
    assert commands.names == [*begin, *["find"] * buckets("s"), "update", *end]


# Faults, and others who write.


@pytest.mark.parametrize("last", [None, 27, 10])
def test_a_fork_may_stop_at_every_command(
    request: pytest.FixtureRequest,
    repository: MongoDBSessionRepository,
    stored: Stored,
    prepared: Prepared,
    server: str,
    database: str,
    last: int | None,
) -> None:
    store_again(stored, prepared[1])
    before = snapshot(stored)
    repository.fork_session("s", "expected", last)
    should = all_of(repository, "expected")
    del should["session"]

    def whole(other: MongoDBSessionRepository) -> None:
        found = all_of(other, "t")
        del found["session"]
        assert found == should
        names = [name for name in left_of(stored, "t") if name.startswith("agent_sessions_attachments")]
        assert len(names) == (3 if last in (10, 27) else 5)  # an entry and two chunks, an entry and one
        assert snapshot(stored) == before

    # Together, the three meet some commands, others in each run, and the last ones.
    numbers = [random.randrange(15), 15 + (None, 27, 10).index(last)]
    numbers = None if request.config.getoption("--full-adversity") else numbers
    every_failure(server, database, stored, lambda other: other.fork_session("s", "t", last), whole, 15, numbers)


def test_a_fork_survives_a_lost_connection(long: MongoDBSessionRepository, server: str, database: str) -> None:
    with MongoDBSessionRepository(server, database, appName="forking", retryReads=False, **SMALL) as other:
        other.session_exists("warm-up")
        for name, times in (("find", 1), ("find", 3), ("insert", 1), ("insert", 3), ("update", 1), ("update", 3)):
            with fail_point(server, failCommands=[name], appName="forking", times=times, closeConnection=True):
                other.fork_session("s", fork := f"{name} {times}")
            assert told(long.list_messages(fork, "agent")) == expected(30)


def test_forks_beside_a_writer_are_consistent(long: MongoDBSessionRepository, stored: Stored) -> None:
    done = threading.Event()

    def write() -> None:
        for message_id in range(30, 55):
            append(long, message_id)
        done.set()

    count = 0
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        while not done.is_set() or not count:
            long.fork_session("s", f"t{count}")
            count += 1
        writing.result()
    for n in range(count):
        found = told(long.list_messages(f"t{n}", "agent"))
        assert len(found) >= 30
        assert found == expected(len(found))


def test_of_several_forks_into_one_session_one_is_done(long: MongoDBSessionRepository, stored: Stored) -> None:
    together = threading.Barrier(4)

    def fork() -> str:
        together.wait()
        try:
            long.fork_session("s", "t")
        except SessionExistsError:
            return "refused"
        return "done"

    with ThreadPoolExecutor(4) as threads:
        outcomes = [each.result() for each in [threads.submit(fork) for _ in range(4)]]
    assert sorted(outcomes) == ["done", "refused", "refused", "refused"]
    same_messages = told(long.list_messages("t", "agent"))
    assert same_messages == expected(30)
    buckets = [bucket["_id"] for bucket in stored.database["agent_sessions_archive"].find({"session_id": "t"})]
    assert {bucket["incarnation"] for bucket in buckets} == {stored.find_one({"_id": "t"})["incarnation"]}


def test_a_session_whose_attachments_are_missing_is_not_forked(
    repository: MongoDBSessionRepository, stored: Stored
) -> None:
    begin(repository)
    repository.create_message("s", "agent", with_image(0, content(5000)))
    stored.database["agent_sessions_attachments.files"].delete_many({})
    with pytest.raises(AttachmentError, match="was not forked: it has attachments that are missing"):
        repository.fork_session("s", "t")
    assert left_of(stored, "t") == []


def test_a_session_whose_archive_has_a_hole_is_not_forked(long: MongoDBSessionRepository, stored: Stored) -> None:
    stored.database["agent_sessions_archive"].delete_one({"_id.first": {"$gt": 0}})
    with pytest.raises(DatabaseError, match=r"message \d+ is missing in its archive"):
        long.fork_session("s", "t")
    assert left_of(stored, "t") == []


def test_an_exported_fork_comes_back(long: MongoDBSessionRepository) -> None:
    long.fork_session("s", "t", 17)
    long.import_session(long.export_session("t"), "u")
    same_content(long, "u", "t")


@pytest.fixture(scope="module")
def at() -> AtCommand:
    return AtCommand()


@pytest.fixture(scope="module")
def forking(server: str, shared_database: str, at: AtCommand) -> Iterator[MongoDBSessionRepository]:
    """Another process, whose commands `at` awaits."""
    with started(server, shared_database, at, **SMALL) as repository:
        yield repository


def test_what_happens_just_before_the_fork_is_made_is_in_it(
    server: str, database: str, stored: Stored, forking: MongoDBSessionRepository, at: AtCommand
) -> None:
    image = content(5000)

    def move() -> None:
        other = Other(stored)
        other.merge()
        assert other.cut()

    with MongoDBSessionRepository(server, database, max_inline_attachment_bytes=1000) as repository:
        begin(repository)
        apply(repository, "s", appends(range(20)))
        for message_id in (3, 12):
            repository.update_message("s", "agent", with_image(message_id, image))
        acts: dict[str, Callable[[], object]] = {
            "append": lambda: repository.create_message("s", "agent", with_image(20, image[:-4])),
            "redact": lambda: repository.update_message("s", "agent", redacted(12)),
            "move": move,
            "redact in the archive": lambda: repository.update_message("s", "agent", redacted(3)),
        }
        for what, act in acts.items():
            at.before(0, act)
            forking.fork_session("s", what)
            assert at.act is at.error is None
            same_messages = repository.list_messages(what, "agent")
            assert same_messages == repository.list_messages("s", "agent")
            assert len(same_messages) == 21


def check_fork(
    repository: MongoDBSessionRepository,
    stored: Stored,
    last: int,
    allowed: list[dict[int, Any]],
    is_written_back: bool,
) -> None:
    """Each message of the fork is as it was or as it is, with its attachment, and nothing else is stored."""
    messages = repository.list_messages("t", "agent")
    assert [message.message_id for message in messages][: last + 1] == list(range(last + 1))
    for message in messages:
        n = message.message_id
        assert message.to_message() in [each[n].to_message() for each in allowed if n in each], n
    files = sum(len(message.message["content"]) > 1 for message in messages)
    stored_files = left_of(stored, "t").count("agent_sessions_attachments.files")
    assert stored_files == files or (is_written_back and stored_files < files)
    entries, chunks = (stored.database[f"agent_sessions_attachments.{name}"] for name in ("files", "chunks"))
    in_chunks = [chunk["files_id"] for chunk in chunks.find({"session_id": "t"}, {"files_id": 1})]
    assert all(entries.find_one({"_id": file}) for file in in_chunks), "chunks of a file that is not there are left"
    assert stored.count_documents({"state": {"$exists": True}}) == 0


EVENTS = ("append", "replace", "redact", "write back", "write back and go on", "delete", "again")


@pytest.mark.parametrize("what", EVENTS)
def test_whatever_happens_between_two_commands_of_a_fork(
    repository: MongoDBSessionRepository,
    forking: MongoDBSessionRepository,
    at: AtCommand,
    stored: Stored,
    prepared: Prepared,
    some: Callable[[Any, int], list[Any]],
    what: str,
) -> None:
    def go_on() -> None:
        apply(repository, "s", appends(range(30, 50)))
        settled(stored)

    acts: dict[str, Callable[[], object]] = {
        "append": go_on,
        "replace": lambda: [
            repository.update_message("s", "agent", with_image(n, content(5000, n + 1))) for n in IMAGES
        ],
        "redact": lambda: [repository.update_message("s", "agent", redacted(n)) for n in IMAGES],
        "write back": lambda: repository.write_back("s"),
        "write back and go on": lambda: [repository.write_back("s"), go_on()],
        "delete": lambda: repository.delete_session("s"),
        "again": lambda: [repository.delete_session("s"), store_again(stored, prepared[2])],
    }
    for last, number in some([(last, number) for last in (None, 28, 10) for number in range(20)], 2):
        store_again(stored, prepared[1])
        before = {message.message_id: message for message in repository.list_messages("s", "agent")}
        at.before(number, acts[what])
        try:
            forking.fork_session("s", "t", last)
            failed = False
        except SessionNotFoundError:
            failed = True
        happened, at.act = at.act is None, None
        print(what, last, number, happened, failed)
        assert at.error is None
        if failed:
            assert happened
            assert what in ("delete", "again")
            assert left_of(stored, "t") == []
        else:
            exists = repository.session_exists("s")
            after = {m.message_id: m for m in repository.list_messages("s", "agent")} if exists else {}
            check_fork(repository, stored, 29 if last is None else last, [before, after], "write back" in what)
            assert repository.delete_session("t")
        repository.delete_session("s")
        for name in stored.database.list_collection_names():
            assert stored.database[name].count_documents({}) == 0, name


# Documents that no version of this library has written, and damaged ones.


@pytest.mark.parametrize(
    "change",
    [
        {"$push": {"agents.agent.messages": "no message"}},
        {"$set": {"guardrail_events": [{"agent_id": ["agent"]}, {"agent_id": "agent", "message_id": 1}]}},
        {"$set": {"agents.agent.usage": {"inputTokens": "many", "toolCalls": 3}}},
        {"$set": {"agents.agent.usage": 3, "agents.agent.config_set": 3}},
        [{"$replaceWith": {"$mergeObjects": ["$$ROOT", {"$literal": {"$tag": 1, "my.tag": {"a": 1}}}]}}],
        {"$set": {"metadata": {str(n): n for n in range(30_000)}}},
    ],
    ids=["message", "event", "number", "usage", "names", "fields"],
)
def test_what_an_application_has_stored_is_forked(
    repository: MongoDBSessionRepository, stored: Stored, change: Any
) -> None:
    begin(repository)
    apply(repository, "s", appends(range(4)))
    stored.update_one({"_id": "s"}, change)
    session = stored.find_one({"_id": "s"})
    for new_id, last, count in (("t", None, None), ("u", 2, 3)):
        repository.fork_session("s", new_id, last)
        fork = stored.find_one({"_id": new_id})
        assert fork["agents"]["agent"]["messages"] == session["agents"]["agent"]["messages"][:count]
        for name in ("metadata", "guardrail_events", "$tag", "my.tag"):
            assert fork.get(name) == session.get(name)


def test_a_session_with_an_agent_that_is_no_object_is_not_forked(
    repository: MongoDBSessionRepository, stored: Stored
) -> None:
    begin(repository)
    stored.update_one({"_id": "s"}, {"$set": {"agents.other": 7}})
    with pytest.raises(DatabaseError, match=r"'agents\.other'"):
        repository.fork_session("s", "t")
    assert left_of(stored, "t") == []


def test_a_session_with_half_an_attachment_is_not_forked(repository: MongoDBSessionRepository, stored: Stored) -> None:
    begin(repository)
    repository.create_message("s", "agent", with_image(0, content(100 * KIB)))
    stored.database["agent_sessions_attachments.chunks"].delete_one({"n": 1})
    with pytest.raises(AttachmentError, match="was not forked: it has attachments that are missing"):
        repository.fork_session("s", "t")
    assert left_of(stored, "t") == []
