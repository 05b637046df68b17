"""Rewinding sessions: the messages after a given one are removed in place, as in a fork that ends with it."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import given, settings
from hypothesis import strategies as st
from strands import tool
from strands.agent.conversation_manager import (
    NullConversationManager,
    SlidingWindowConversationManager,
    SummarizingConversationManager,
)
from strands.agent.conversation_manager.compression.pin_message import pin_message
from strands.types.session import SessionAgent

from fix_archive import (
    FIVES,
    SECRET,
    SMALL,
    Driver,
    Other,
    Stored,
    append,
    appends,
    archive_of,
    begin,
    documents_of,
    emptied,
    expected,
    head,
    idle,
    in_database,
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
from fix_copying import all_of, content, copying, fails_at, left_of, with_image
from fix_legacy import conversation, old_agent, old_session
from fix_overtaking import AtCommand
from mongodb_session_manager import (
    AgentNotFoundError,
    AsyncMongoDBSessionRepository,
    InvalidArgumentError,
    MessageNotFoundError,
    MongoDBSessionError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionBusyError,
    SessionConflictError,
    SessionExistsError,
    SessionNotFoundError,
)
from mongodb_session_manager._format.layout import Place
from mongodb_session_manager.demo import Redaction
from orchestrators import node, pipeline
from support import CommandLog, agent, alternating, apply, eventually, fail_point, sampled, texts

LIMITS: dict[str, Any] = {**SMALL, "max_inline_attachment_bytes": 1000}
IMAGES = {3: content(5000, 3), 17: content(5000, 17), 28: content(5000, 28)}


@pytest.fixture(scope="module")
def shared_small(server: str, shared_database: str) -> Iterator[MongoDBSessionManagerFactory]:
    with MongoDBSessionManagerFactory(server, shared_database, **LIMITS) as factory:
        yield factory


@pytest.fixture
def small(database: str, shared_small: MongoDBSessionManagerFactory) -> Iterator[MongoDBSessionManagerFactory]:
    """A factory that archives what is older than eight messages."""
    yield shared_small
    idle(shared_small)


@pytest.fixture(scope="module")
def shared_repository(server: str, shared_database: str) -> Iterator[tuple[MongoDBSessionRepository, CommandLog]]:
    log = CommandLog()
    with started(server, shared_database, log, **LIMITS) as repository:
        yield repository, log


@pytest.fixture
def repository(
    database: str, shared_repository: tuple[MongoDBSessionRepository, CommandLog]
) -> Iterator[MongoDBSessionRepository]:
    repository, log = shared_repository
    idle(repository)
    log.clear()
    yield repository
    idle(repository)


@pytest.fixture
def sent(shared_repository: tuple[MongoDBSessionRepository, CommandLog]) -> CommandLog:
    """The log of the commands of `repository`."""
    return shared_repository[1]


@pytest.fixture(scope="module")
def at() -> AtCommand:
    return AtCommand()


@pytest.fixture(scope="module")
def rewinding(server: str, shared_database: str, at: AtCommand) -> Iterator[MongoDBSessionRepository]:
    """Another process, whose commands `at` awaits."""
    with started(server, shared_database, at, **LIMITS) as repository:
        yield repository


@pytest.fixture(scope="module")
def stopping(server: str, shared_database: str) -> Iterator[MongoDBSessionRepository]:
    """Another process, the application `copying`, whose commands fail."""
    with copying(server, shared_database) as repository:
        repository.session_exists("warm-up")
        idle(repository)
        yield repository


@pytest.fixture(scope="module")
def two_turns(
    shared_factory: Callable[[], tuple[MongoDBSessionManagerFactory, CommandLog]], shared_database: str, driver: Driver
) -> dict[str, list[Any]]:
    stored = emptied(driver[shared_database]["agent_sessions"])
    talk(shared_factory()[0], 2)
    return documents_of(stored)


@pytest.fixture
def talked(factory: MongoDBSessionManagerFactory, stored: Stored, two_turns: dict[str, list[Any]]) -> None:
    """Store a session of two turns."""
    store_again(stored, two_turns)


@pytest.fixture(scope="module")
def documents(
    shared_database: str, shared_repository: tuple[MongoDBSessionRepository, CommandLog], driver: Driver
) -> dict[str, list[Any]]:
    """The documents of a session of 30 messages, three of them with an image; 25 messages are archived."""
    stored = emptied(driver[shared_database]["agent_sessions"])
    repository, _ = shared_repository
    begin(repository)
    for part in FIVES:
        for n in part:
            if n in IMAGES:
                repository.create_message("s", "agent", with_image(n, IMAGES[n]))
            else:
                append(repository, n)
        settled(stored)
    assert head(stored)["archived"] == 25
    return documents_of(stored)


@pytest.fixture
def long(
    repository: MongoDBSessionRepository, stored: Stored, documents: dict[str, list[Any]]
) -> MongoDBSessionRepository:
    store_again(stored, documents)
    return repository


def as_a_fork(repository: MongoDBSessionRepository, at_message: Any, *, keep_fork: bool = False) -> None:
    """Rewind the session, and see that everything that can be read of it is what a fork has."""
    feedbacks, created_at = repository.get_feedbacks("s"), repository.read_session("s").created_at
    repository.fork_session("s", "fork", at_message)
    repository.rewind_session("s", at_message)
    found, fork = all_of(repository, "s"), all_of(repository, "fork")
    assert found.pop("feedbacks") == feedbacks
    assert found["session"].pop("created_at") == created_at
    for each in (found, fork):
        for name in ("created_at", "updated_at", "feedbacks"):
            each["session"].pop(name, None)
        each.pop("feedbacks", None)
        for one in each["agents"].values():
            one.updated_at = None
    assert found == fork
    if not keep_fork:
        repository.delete_session("fork")


# The beginning of a conversation stays.


LASTS = [-1, 0, 4, 5, 24, 25, 26, 29]


@pytest.mark.parametrize("last", sampled(LASTS, -1, 4, 24, 26))
def test_a_session_ends_with_the_message(long: MongoDBSessionRepository, stored: Stored, last: int) -> None:
    if last >= 0:
        as_a_fork(long, last)
    else:
        long.rewind_session("s", -1)
    assert told(long.list_messages("s", "agent")) == expected(last + 1)
    assert long.get_message_count("s", "agent") == last + 1
    assert long.read_message("s", "agent", last + 1) is None
    images = sum(n <= last for n in IMAGES)
    files = [left_of(stored, "s").count(f"agent_sessions_attachments.{part}") for part in ("files", "chunks")]
    assert files == [images, images]
    assert all(bucket["_id"]["first"] < head(stored)["archived"] for bucket in archive_of(stored).find())
    assert "stale_below" not in head(stored)

    long.create_message("s", "agent", said(last + 1, f"other {last + 1}"))
    apply(long, "s", appends(range(last + 2, last + 32), "other {}"))
    settled(stored)
    assert told(long.list_messages("s", "agent")) == [
        *expected(last + 1),
        *(f"other {n}" for n in range(last + 1, last + 32)),
    ]
    for n in (0, last + 1, last + 31):
        assert long.read_message("s", "agent", n).message_id == n


def test_nothing_removed_is_left_in_the_database(long: MongoDBSessionRepository, driver: Driver, database: str) -> None:
    assert in_database(driver, database, "text 10")
    long.rewind_session("s", 9)
    for n in range(10, 30):
        assert not in_database(driver, database, f"text {n}")


def test_totals_and_guardrail_events_are_those_of_the_messages(
    small: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    turns = range(1, 7)
    with small.create_session_manager("s") as manager:
        replies = [r for n in turns for r in ({"tool": "weather", "input": {"city": "Oslo"}}, f"a{n}")]
        one = agent(manager, *replies, Redaction("[redacted]"), tools=[weather])
        usage = {}
        for n in turns:
            one(f"q{n}")
            usage[n] = manager.get_usage()
        one("my card")
    settled(stored)
    for n in (6, 4, 1):
        as_a_fork(repository, 4 * n - 1)
        assert repository.get_usage("s") == usage[n]
        assert stored.find_one({"_id": "s"})["guardrail_events"] == []


def test_earlier_guardrail_events_stay(small: MongoDBSessionManagerFactory, stored: Stored) -> None:
    with small.create_session_manager("s") as manager:
        for agent_id in ("agent", "other"):
            one = agent(manager, Redaction("[redacted]"), "fine", Redaction("[redacted]"), agent_id=agent_id)
            for prompt in ("my card", "hello", "my card again"):
                one(prompt)
    for last, kept in ((4, [("agent", 0), ("agent", 4)]), (3, [("agent", 0)])):
        small.rewind_session("s", {"agent": last})
        events = stored.find_one({"_id": "s"})["guardrail_events"]
        assert [(event["agent_id"], event["message_id"]) for event in events] == [*kept, ("other", 0), ("other", 4)]


def test_a_window_is_as_long_as_it_was(small: MongoDBSessionManagerFactory) -> None:
    def window() -> Any:
        return SlidingWindowConversationManager(window_size=4)

    talk(small, 6, conversation_manager=window())
    for turns, shown in ((5, 4), (2, 4), (1, 2)):
        small.rewind_session("s", 2 * turns - 1)
        with small.create_session_manager("s") as manager:
            resumed = agent(manager, "on", conversation_manager=window())
            assert texts(resumed.messages) == said_in(turns)[-shown:]
            resumed("go on")
        with small.create_session_manager("s") as manager:
            resumed = agent(manager, conversation_manager=window())
            assert texts(resumed.messages)[-2:] == ["go on", "on"]
            assert resumed.conversation_manager.removed_message_count + len(resumed.messages) == 2 * turns + 2


def test_a_summary_stays_while_the_session_holds_what_it_tells(small: MongoDBSessionManagerFactory) -> None:
    def manager_of() -> Any:
        return SummarizingConversationManager(summary_ratio=0.5, preserve_recent_messages=2)

    with small.create_session_manager("s") as manager:
        one = agent(manager, *[f"a{n}" for n in range(4)], "the summary", "a4", conversation_manager=manager_of())
        for n in range(4):
            one(f"q{n}")
        one.conversation_manager.reduce_context(one)
        one("q4")
    small.rewind_session("s", 7)
    with small.create_session_manager("s") as manager:
        live = agent(manager, conversation_manager=manager_of())
        assert texts(live.messages) == ["the summary", "q2", "a2", "q3", "a3"]
    small.rewind_session("s", 1)
    with small.create_session_manager("s") as manager:
        resumed = agent(manager, "on", conversation_manager=manager_of())
        assert texts(resumed.messages) == ["q0", "a0"]
        resumed("go on")
        assert texts(resumed.messages) == ["q0", "a0", "go on", "on"]


@pytest.mark.parametrize(
    ("kept", "at_message", "expected"),
    alternating(
        ([0, 2, 3, 6, 7], 7, ["q0", "q1", "a1", "q3", "a3"]),
        ([0, 2, 3, 6, 7], 6, ["q0", "q1", "a1", "q3"]),
        ([0, 2, 3, 6, 7], 2, ["q0", "q1"]),
        ([0, 2, 3, 6, 7], 1, ["q0", "a0"]),  # it is not live: the conversation as it was said
        ([3, 5, 0], 3, ["a1"]),
        ([0, 2], -1, []),
    ),
)
def test_edited_messages_are_restored_until_there(
    factory: MongoDBSessionManagerFactory, kept: list[int], at_message: int, expected: list[str]
) -> None:
    talk(factory, 4)
    with factory.create_session_manager("s") as manager:
        live = agent(manager)
        live.messages[:] = [live.messages[n] for n in kept]
        manager.sync_agent(live)
    factory.rewind_session("s", at_message)
    again = agent(factory.create_session_manager("s"), "later")
    assert texts(again.messages) == expected
    again("more")
    assert texts(agent(factory.create_session_manager("s")).messages) == [*expected, "more", "later"]


def test_a_pending_interrupt_is_removed_and_the_state_stays(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s") as manager:
        one = agent(manager, "a0", "a1", state={"language": "en"})
        one("q0")
        one._interrupt_state.activate()
        manager.sync_agent(one)
    factory.rewind_session("s", 0)
    with factory.create_session_manager("s") as manager:
        resumed = agent(manager, "again")
        assert not resumed._interrupt_state.activated
        assert resumed.state.get("language") == "en"
        assert texts(resumed.messages) == ["q0"]


@pytest.mark.usefixtures("talked")
def test_a_question_is_answered_again(factory: MongoDBSessionManagerFactory) -> None:
    factory.rewind_session("s", 2)
    with factory.create_session_manager("s") as manager:
        assert str(agent(manager, "another answer")()).strip() == "another answer"
    with factory.create_session_manager("s") as manager:
        assert texts(agent(manager).messages) == ["q0", "a0", "q1", "another answer"]
        messages = factory._portal.call(factory._async.list_messages, "s", "agent")
        assert [message.message_id for message in messages] == [0, 1, 2, 3]


@pytest.mark.usefixtures("talked")
def test_the_first_question_is_edited(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    factory.rewind_session("s", -1)
    with factory.create_session_manager("s") as manager:
        assert manager.get_usage()["total"]["totalTokens"] == 0
        live = agent(manager, "another answer")
        assert live.messages == []
        live("another question")
    assert texts(head(stored)["messages"]) == ["another question", "another answer"]


@pytest.mark.usefixtures("talked")
def test_metadata_feedback_and_dates_stay(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    with factory.create_session_manager("s") as manager:
        manager.update_metadata({"tier": "gold"})
        manager.add_feedback({"rating": "up", "message_id": 3})
    before = stored.find_one({"_id": "s"})
    factory.rewind_session("s", 1)
    after = stored.find_one({"_id": "s"})
    for name in ("metadata", "feedbacks", "created_at", "incarnation"):
        assert after[name] == before[name]
    assert after["updated_at"] > before["updated_at"]
    assert after["agents"]["agent"]["messages"] == before["agents"]["agent"]["messages"][:2]


def test_a_session_of_old_is_rewound(repository: MongoDBSessionRepository, stored: Stored) -> None:
    unnumbered = [{name: value for name, value in m.items() if name != "message_id"} for m in conversation()]
    stored.insert_one(old_session(agent=old_agent("agent", *conversation()), **{"50%": old_agent("50%", *unnumbered)}))
    repository.rewind_session("s", {"50%": 3})
    session = stored.find_one({"_id": "s"})
    assert session["agents"]["agent"]["messages"] == conversation()
    assert session["agents"]["50%25"]["messages"] == conversation()[:4]
    assert [session["agents"][key]["next_message_id"] for key in ("agent", "50%25")] == [6, 4]


def test_several_agents_are_cut_by_name(
    small: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository
) -> None:
    with small.create_session_manager("s") as manager:
        for agent_id in ("a.b", "$two", "three"):
            one = agent(manager, "a0", "a1", agent_id=agent_id)
            one("q0")
            one("q1")
    with small.create_session_manager("s") as manager:
        live = agent(manager, "a2", agent_id="three")
        with pytest.raises(InvalidArgumentError, match="has several agents: pass at_message as a dict"):
            repository.rewind_session("s", 1)
        with pytest.raises(AgentNotFoundError, match="has no agent 'four'"):
            repository.rewind_session("s", {"a.b": 1, "four": 1})
        with pytest.raises(MessageNotFoundError, match=r"agent '\$two' has no message 4"):
            repository.rewind_session("s", {"a.b": 1, "$two": 4})
        repository.rewind_session("s", {"a.b": 1, "$two": 2})
        live("q2")  # it was not rewound
    counts = {agent_id: repository.get_message_count("s", agent_id) for agent_id in ("a.b", "$two", "three")}
    assert counts == {"a.b": 2, "$two": 3, "three": 6}


def test_what_is_no_message_id_is_refused(repository: MongoDBSessionRepository, sent: CommandLog) -> None:
    bad: list[Any] = [None, {}, -2, True, "1", 1.5, [1], {"agent": "1"}, {"agent": None}, {1: 1}]
    for at_message in bad:
        with pytest.raises(InvalidArgumentError):
            repository.rewind_session("s", at_message)
    for wrong in ({"keep_as": ""}, {"keep_as": {"$ne": None}}):
        with pytest.raises(InvalidArgumentError, match="keep_as must"):
            repository.rewind_session("s", 1, **wrong)
    assert sent.names == []


def test_what_is_not_there(long: MongoDBSessionRepository, stored: Stored) -> None:
    before = snapshot(stored)
    for last in (30, 2**40):
        with pytest.raises(MessageNotFoundError, match=f"agent 'agent' has no message {last}"):
            long.rewind_session("s", last, keep_as="kept")
    with pytest.raises(SessionNotFoundError, match="session 'x' does not exist"):
        long.rewind_session("x", 1)
    assert snapshot(stored) == before


def snapshot(stored: Stored) -> list[Any]:
    """Everything that is stored, except the content of uses that a read makes."""
    return [
        list(stored.database[name].find(sort=[("_id", 1)])) for name in sorted(stored.database.list_collection_names())
    ]


# Agents that were loaded before.


@pytest.mark.parametrize("save_on", ["message", "overlap", "invocation"])
@pytest.mark.usefixtures("talked")
def test_an_agent_that_was_loaded_before_is_refused(
    factory: MongoDBSessionManagerFactory, stored: Stored, save_on: Any
) -> None:
    stale_manager = factory.create_session_manager("s", save_on=save_on)
    stale = agent(stale_manager, "late", "later")
    factory.rewind_session("s", 1)
    before = head(stored)
    with pytest.raises(SessionConflictError, match="agent 'agent': its conversation was rewound after this session"):
        stale("q2")
    assert head(stored) == before
    with pytest.raises(SessionConflictError):
        stale("q3")


@pytest.mark.usefixtures("talked")
def test_it_is_refused_when_the_conversation_is_as_long_again(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    managers = [factory.create_session_manager("s") for _ in range(4)]
    says, syncs, redacts, views = (agent(manager, "late") for manager in managers)
    factory.rewind_session("s", 1)
    with factory.create_session_manager("s") as manager:
        agent(manager, "other")("another")
    before = head(stored)
    assert before["next_message_id"] == 4
    with pytest.raises(SessionConflictError, match="rewound"):
        says("q2")
    syncs.state.set("language", "en")
    with pytest.raises(SessionConflictError, match="rewound"):
        managers[1].sync_agent(syncs)
    with pytest.raises(SessionConflictError, match="rewound"):
        managers[2].redact_latest_message({"role": "user", "content": [{"text": "[redacted]"}]}, redacts)
    views.messages.clear()
    with pytest.raises(SessionConflictError, match="rewound"):
        managers[3].close()
    assert head(stored) == before


@pytest.mark.usefixtures("talked")
def test_a_turn_that_is_under_way_is_refused(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:

    @tool
    def rewind() -> str:
        """Rewind."""
        factory.rewind_session("s", 0)
        return "rewound"

    one = agent(factory.create_session_manager("s"), {"tool": "rewind", "input": {}}, "late", tools=[rewind])
    with pytest.raises(SessionConflictError, match="rewound"):
        one("q2")
    assert texts(head(stored)["messages"]) == ["q0"]


@pytest.mark.usefixtures("talked")
def test_reloading_continues_after_a_rewind(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s") as manager:
        live = agent(manager, "other")
        factory.rewind_session("s", 1)
        manager.reload()
        assert texts(live.messages) == ["q0", "a0"]
        live("another")
    assert texts(agent(factory.create_session_manager("s")).messages) == ["q0", "a0", "another", "other"]


def test_an_agent_that_the_same_manager_has_created_is_refused(factory: MongoDBSessionManagerFactory) -> None:
    manager = factory.create_session_manager("s")
    live = agent(manager, "a0", "a1")
    live("q0")
    factory.rewind_session("s", -1)
    with factory.create_session_manager("s") as other:
        agent(other, "other")("another")
    with pytest.raises(SessionConflictError, match="rewound"):
        live("q1")


@pytest.mark.usefixtures("talked")
def test_an_orchestrator_that_was_loaded_before_is_refused(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with factory.create_session_manager("s") as manager:
        pipeline(manager, node("one", "1"), node("two", "2"))("the task")
    stale = pipeline(factory.create_session_manager("s"), node("one", "3"), node("two", "4"))
    state = stored.find_one({"_id": "s"})["multi_agents"]["pipeline"]["state"]
    factory.rewind_session("s", 1)
    assert stored.find_one({"_id": "s"})["multi_agents"]["pipeline"]["state"] == state
    with pytest.raises(SessionConflictError, match="multi-agent 'pipeline'"):
        stale("another task")
    with factory.create_session_manager("s") as manager:
        pipeline(manager, node("one", "5"), node("two", "6"))("another task")


# The lease.


@pytest.mark.usefixtures("talked")
def test_a_session_whose_lease_is_held_is_not_rewound(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionManagerFactory(server, database, on_busy="wait") as factory:
        with factory.create_session_manager("s") as manager:
            before = snapshot(stored)
            with pytest.raises(SessionBusyError, match="session 's' is busy: a manager has its turn"):
                factory.rewind_session("s", 1, keep_as="kept")
            assert snapshot(stored) == before
            stale = agent(manager, "late")
            stale("q2")
        factory.rewind_session("s", 3)
        assert texts(head(stored)["messages"]) == ["q0", "a0", "q1", "a1"]
        with factory.create_session_manager("s") as manager:
            agent(manager, "a2")("q2")
        later = factory.create_session_manager("s")
        live = agent(later, "a3", "late")
        live("q3")  # its turn is over: it does not hold the lease
        factory.rewind_session("s", 1)
        with pytest.raises(SessionConflictError, match="rewound"):
            live("q4")


def hold_lease(stored: Stored, seconds: float) -> None:
    until = datetime.now(UTC) + timedelta(seconds=seconds)
    lease = {"token": ObjectId(), "until": until, "fence": 99}
    stored.update_one({"_id": "s"}, {"$set": {"lease": lease}})


def test_a_lease_that_has_expired_holds_nobody_up(long: MongoDBSessionRepository, stored: Stored) -> None:
    hold_lease(stored, -1)
    long.rewind_session("s", 27)
    assert long.get_message_count("s", "agent") == 28


# A copy of everything.


@pytest.mark.parametrize("last", alternating(27, 10))
def test_what_came_after_stays_as_a_session(long: MongoDBSessionRepository, stored: Stored, last: int) -> None:
    messages = long.list_messages("s", "agent")
    long.rewind_session("s", last, keep_as="kept")
    assert long.list_messages("kept", "agent") == messages
    assert long.list_messages("s", "agent") == messages[: last + 1]
    assert stored.find_one({"_id": "kept"})["copy_of"]["session_id"] == "s"
    long.delete_session("s")
    assert long.list_messages("kept", "agent") == messages


def test_a_copy_into_a_session_that_exists_changes_nothing(long: MongoDBSessionRepository, stored: Stored) -> None:
    long.open_session("there")
    before = snapshot(stored)
    for keep_as in ("there", "s"):
        with pytest.raises(SessionExistsError, match=f"session '{keep_as}' already exists"):
            long.rewind_session("s", 27, keep_as=keep_as)
    assert snapshot(stored) == before


# In every world.


@pytest.mark.anyio
async def test_rewinds_asynchronously(factory: MongoDBSessionManagerFactory, server: str, database: str) -> None:
    async with await factory.create_session_manager_async("s") as manager:
        await agent(manager, "a0").invoke_async("q0")
    await factory.rewind_session_async("s", 0, keep_as="kept")
    async with AsyncMongoDBSessionRepository(server, database) as repository:
        assert told(await repository.list_messages("s", "agent")) == ["q0"]
        await repository.rewind_session("s", {"agent": -1})
        assert told(await repository.list_messages("s", "agent")) == []
        assert told(await repository.list_messages("kept", "agent")) == ["q0", "a0"]


def test_a_session_that_expires_is_used_by_a_rewind(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionManagerFactory(server, database, session_ttl=timedelta(hours=1)) as factory:
        talk(factory, 2)
        soon = datetime.now(UTC) + timedelta(minutes=1)
        stored.update_one({"_id": "s"}, {"$set": {"expires_at": soon}})
        factory.rewind_session("s", 1)
        assert stored.find_one({"_id": "s"})["expires_at"] > soon + timedelta(minutes=50)


def test_what_a_rewind_costs(long: MongoDBSessionRepository, stored: Stored, sent: CommandLog) -> None:
    def cost(*args: Any) -> list[str]:
        sent.clear()
        long.rewind_session("s", *args)
        return list(sent.names)

    plain = ["find", "findAndModify"]
    with_files = ["find", "find", "delete", "delete", "update"]
    assert cost(28) == plain
    assert cost(27) == [*plain, *with_files]
    assert cost(24) == plain
    in_archive = ["find", "find", "find", "findAndModify", "delete", "delete", "update"]
    assert cost(18) == in_archive
    assert cost(9) == [*in_archive, *with_files]
    assert cost(-1) == [*in_archive[1:], *with_files]


# Faults, and others who write.


def whole(repository: MongoDBSessionRepository, stored: Stored, last: int) -> None:
    """The session is rewound, and opening it leaves nothing of what was removed."""
    repository.open_session("s")
    idle(repository)
    assert told(repository.list_messages("s", "agent")) == expected(last + 1)
    images = sum(n <= last for n in IMAGES)
    assert left_of(stored, "s").count("agent_sessions_attachments.files") == images
    assert left_of(stored, "s").count("agent_sessions_attachments.chunks") == images
    document = stored.find_one({"_id": "s"})
    assert "stale_below" not in document["agents"]["agent"]
    assert "removed_attachments" not in document
    for bucket in archive_of(stored).find({"session_id": "s"}):
        assert bucket["_id"]["first"] < document["agents"]["agent"]["archived"]
    apply(repository, "s", appends(range(last + 1, last + 31)))
    settled(stored)
    assert told(repository.list_messages("s", "agent")) == expected(last + 31)


@pytest.mark.parametrize("keep_as", alternating(None, "t"))
@pytest.mark.parametrize("last", alternating(26, 10))
def test_a_rewind_may_stop_at_every_command(
    repository: MongoDBSessionRepository,
    stored: Stored,
    documents: dict[str, list[Any]],
    stopping: MongoDBSessionRepository,
    server: str,
    some: Callable[[Any, int], list[int]],
    last: int,
    keep_as: str | None,
) -> None:
    commands = {(None, 26): 7, (None, 10): 12, ("t", 26): 22, ("t", 10): 27}[keep_as, last]
    for number in [*some(range(commands - 1), 1), commands - 1]:
        store_again(emptied(stored), documents)
        messages = repository.list_messages("s", "agent")
        with fails_at(server, number, errorCode=8000), contextlib.suppress(MongoDBSessionError):
            stopping.rewind_session("s", last, keep_as=keep_as)
        is_rewound = head(stored)["next_message_id"] == last + 1
        is_kept = keep_as is not None and repository.session_exists("t")
        assert is_rewound or number < commands
        assert is_kept or keep_as is None or not is_rewound
        if is_kept:
            assert repository.list_messages("t", "agent") == messages
        if not is_rewound:
            assert repository.list_messages("s", "agent") == messages
            stopping.rewind_session("s", last, keep_as=None if is_kept else keep_as)
        if keep_as is not None:
            assert repository.list_messages("t", "agent") == messages
        whole(repository, stored, last)


@pytest.mark.parametrize(
    "names",
    alternating(["find"], ["findAndModify"], ["delete"], ["find", "findAndModify", "delete", "update"]),
    ids=",".join,
)
def test_a_rewind_survives_a_lost_connection(
    long: MongoDBSessionRepository, stopping: MongoDBSessionRepository, stored: Stored, server: str, names: list[str]
) -> None:
    with fail_point(server, failCommands=names, appName="copying", times=2, closeConnection=True):
        stopping.rewind_session("s", 10)
    whole(long, stored, 10)


@pytest.mark.parametrize("last", alternating(10, 26, -1))
def test_a_rewind_whose_acknowledgement_is_lost_is_made_once(
    long: MongoDBSessionRepository, stopping: MongoDBSessionRepository, stored: Stored, server: str, last: int
) -> None:
    error = {"code": 91, "errmsg": "the acknowledgement is lost"}
    lost: Any = {"writeConcernError": error, "errorLabels": ["RetryableWriteError"], "appName": "copying"}
    with fail_point(server, failCommands=["findAndModify"], times=2, **lost):
        stopping.rewind_session("s", last, keep_as="kept")
    assert told(long.list_messages("kept", "agent")) == expected(30)
    whole(long, stored, last)


def test_turns_and_rewinds_at_the_same_time_are_one_after_the_other(long: MongoDBSessionRepository) -> None:
    def rewind() -> None:
        for last in (25, 9, 3):
            while True:
                with contextlib.suppress(SessionConflictError):
                    long.rewind_session("s", last)
                    break

    appended = 0
    with ThreadPoolExecutor(1) as threads:
        rewinding = threads.submit(rewind)
        while not rewinding.done() and appended < 50:  # each one can refuse a rewind, which then takes longer
            number = long.get_message_count("s", "agent")
            appended += apply(long, "s", appends([number])) == {}
        rewinding.result()
    assert appended
    found = told(long.list_messages("s", "agent"))
    assert len(found) >= 4
    assert found == expected(len(found))
    assert long.get_message_count("s", "agent") == len(found)


def test_of_several_rewinds_each_is_whole(long: MongoDBSessionRepository, stored: Stored) -> None:
    together = threading.Barrier(4)

    def rewind(last: int) -> int | None:
        together.wait()
        try:
            long.rewind_session("s", last)
        except (SessionConflictError, MessageNotFoundError):
            return None
        return last

    with ThreadPoolExecutor(4) as threads:
        done = [last for last in threads.map(rewind, (5, 12, 26, 28)) if last is not None]
    assert done
    whole(long, stored, min(done))


def window(removed: int) -> dict[str, Any]:
    return {"__name__": "SlidingWindowConversationManager", "removed_message_count": removed, "model_call_count": 0}


def move(stored: Stored) -> None:
    other = Other(stored, 2)
    other.merge()
    other.cut()


@contextlib.contextmanager
def overtaken(at: AtCommand, act: Callable[[], object]) -> Iterator[None]:
    """Do something between the reads of the next rewind and its statement."""
    at.before(0, act, "findAndModify")
    yield
    assert at.act is at.error is None


@pytest.mark.parametrize("last", alternating(10, 26))
@pytest.mark.parametrize("keep_as", alternating(None, "t"))
def test_a_rewind_that_is_overtaken_is_refused(
    long: MongoDBSessionRepository,
    rewinding: MongoDBSessionRepository,
    at: AtCommand,
    stored: Stored,
    last: int,
    keep_as: str | None,
) -> None:
    def refused(error: type[MongoDBSessionError], act: Callable[[], object], count: int) -> None:
        with overtaken(at, act), pytest.raises(error):
            rewinding.rewind_session("s", last, keep_as=keep_as)
        assert len(long.list_messages("s", "agent")) == count
        assert left_of(stored, "t") == []

    unnumbered = {**head(stored)["messages"][-1], "message_id": 31}
    refused(SessionBusyError, lambda: hold_lease(stored, 60), 30)
    stored.update_one({"_id": "s"}, {"$unset": {"lease": ""}})
    refused(SessionConflictError, lambda: append(long, 30), 31)
    by_the_original = {"$push": {"agents.agent.messages": unnumbered}}
    refused(SessionConflictError, lambda: stored.update_one({"_id": "s"}, by_the_original), 32)


@pytest.mark.parametrize("last", alternating(10, 26))
def test_a_message_that_is_redacted_meanwhile_stays_redacted(
    long: MongoDBSessionRepository,
    rewinding: MongoDBSessionRepository,
    at: AtCommand,
    database: str,
    driver: Driver,
    stored: Stored,
    last: int,
) -> None:
    stored.database["agent_sessions_archive"].update_many(
        {"messages.message_id": 10}, {"$set": {"messages.$.message.content.0.text": SECRET}}
    )

    def redact() -> None:
        long.update_message("s", "agent", redacted(10))
        long.update_message("s", "agent", redacted(26))

    with overtaken(at, redact):
        rewinding.rewind_session("s", last)
    assert told(long.list_messages("s", "agent"))[10] == "[redacted]"
    assert not in_database(driver, database, SECRET)
    whole_redacted = [text if n not in (10, 26) else "[redacted]" for n, text in enumerate(expected(last + 1))]
    assert told(long.list_messages("s", "agent")) == whole_redacted


def test_with_a_copy_a_message_that_is_redacted_meanwhile_refuses_the_rewind(
    long: MongoDBSessionRepository, rewinding: MongoDBSessionRepository, at: AtCommand, stored: Stored
) -> None:
    for message_id in (28, 12):
        redact = functools.partial(long.update_message, "s", "agent", redacted(message_id))
        with overtaken(at, redact), pytest.raises(SessionConflictError):
            rewinding.rewind_session("s", 10, keep_as="t")
        assert len(long.list_messages("s", "agent")) == 30
        assert left_of(stored, "t") == []


def test_state_that_is_stored_meanwhile_is_cut(
    long: MongoDBSessionRepository, rewinding: MongoDBSessionRepository, at: AtCommand, stored: Stored
) -> None:
    def store() -> None:
        long.update_agent("s", SessionAgent("agent", {"language": "en"}, window(7), {}))
        view = {"after": 30, "items": [{"runs": [[0, 1], [20, 28]]}]}
        stored.update_one({"_id": "s"}, {"$set": {"agents.agent.view": view}})

    with overtaken(at, store):
        rewinding.rewind_session("s", 26)
    assert long.read_agent("s", "agent").conversation_manager_state == window(4)
    assert long.read_agent("s", "agent").state == {"language": "en"}
    assert head(stored)["view"] == {"after": 27, "items": [{"runs": [[0, 1], [20, 26]]}]}
    with overtaken(at, lambda: stored.update_one({}, {"$unset": {"agents.agent.view": ""}})):
        rewinding.rewind_session("s", 25)
    assert "view" not in head(stored)

    def store_state() -> None:
        long.update_agent("s", SessionAgent("agent", {}, window(2), {}))

    with overtaken(at, store_state):
        rewinding.rewind_session("s", 24)
    assert long.read_agent("s", "agent").conversation_manager_state == window(1)


def test_a_move_that_is_under_way_does_not_bring_messages_back(
    server: str, database: str, stored: Stored, repository: MongoDBSessionRepository
) -> None:
    with MongoDBSessionRepository(server, database) as large:
        begin(large)
        apply(large, "s", appends(range(20)))
        other = Other(stored)
        other.merge()
        large.rewind_session("s", 4)
        apply(large, "s", appends(range(5, 20), "other {}"))
        assert not other.cut()
        wanted = [*expected(5), *(f"other {n}" for n in range(5, 20))]
        assert told(large.list_messages("s", "agent")) == wanted
        append(repository, 20)  # its limits are lower
        settled(stored)
        assert told(large.list_messages("s", "agent")) == [*wanted, "text 20"]


def test_a_move_that_is_under_way_leaves_no_removed_message(
    long: MongoDBSessionRepository, driver: Driver, database: str, stored: Stored
) -> None:
    other = Other(stored, 2)
    other.merge()
    assert in_database(driver, database, "text 26")
    long.rewind_session("s", 25)
    assert not other.cut()
    place = Place("s", other.head.life.incarnation)
    long._portal.call(long._async._store.mover.remove_orphan, place, "agent", other.head)
    assert not in_database(driver, database, "text 26")


def test_what_an_interrupted_rewind_has_left_is_not_read_and_does_not_hold_files(
    long: MongoDBSessionRepository, stopping: MongoDBSessionRepository, server: str, stored: Stored
) -> None:
    with fails_at(server, 3, errorCode=8000):
        stopping.rewind_session("s", 10)
    assert "stale_below" in head(stored)
    assert [long.read_message("s", "agent", n) for n in (11, 17, 24, 29)] == [None] * 4
    with pytest.raises(MessageNotFoundError):
        long.update_message("s", "agent", redacted(17))
    assert left_of(stored, "s").count("agent_sessions_attachments.files") == 3
    long.update_message("s", "agent", redacted(10))
    assert left_of(stored, "s").count("agent_sessions_attachments.files") == 1
    assert told(long.list_messages("s", "agent")) == [*expected(10), "[redacted]"]
    long.open_session("s")
    eventually(lambda: "stale_below" not in head(stored))
    assert all(bucket["_id"]["first"] < head(stored)["archived"] for bucket in archive_of(stored).find())


GONE = (SessionNotFoundError, SessionConflictError, MessageNotFoundError)
EVENTS: dict[str, Any] = {
    "append": SessionConflictError,
    "replace": SessionConflictError,
    "redact": SessionConflictError,
    "move": (),
    "state": (),
    "write back": SessionConflictError,
    "rewind": (SessionConflictError, MessageNotFoundError),
    "delete": SessionNotFoundError,
    "again": GONE,
    "lease": SessionBusyError,
}
"""What happens, and the errors that a rewind can raise then."""


@pytest.mark.parametrize("what", EVENTS)
def test_whatever_happens_between_two_commands_of_a_rewind(
    repository: MongoDBSessionRepository,
    rewinding: MongoDBSessionRepository,
    at: AtCommand,
    stored: Stored,
    documents: dict[str, list[Any]],
    some: Callable[[Any, int], list[Any]],
    what: str,
) -> None:
    acts: dict[str, Callable[[], object]] = {
        "append": lambda: apply(repository, "s", appends(range(30, 50))),
        "replace": lambda: [repository.update_message("s", "agent", with_image(n, IMAGES[28])) for n in (3, 17)],
        "redact": lambda: [repository.update_message("s", "agent", redacted(n)) for n in (3, 17, 28)],
        "move": lambda: move(stored),
        "state": lambda: repository.update_agent("s", SessionAgent("agent", {"language": "en"}, window(7), {})),
        "write back": lambda: repository.write_back("s"),
        "rewind": lambda: repository.rewind_session("s", 20),
        "delete": lambda: repository.delete_session("s"),
        "again": lambda: [repository.delete_session("s"), begin(repository), append(repository, *range(12))],
        "lease": lambda: hold_lease(stored, 60),
    }
    cases = [(last, keep_as, n) for last in (26, 10) for keep_as in (None, "t") for n in range(25 if keep_as else 9)]
    for case in some(cases, 1):
        last, keep_as, number = case
        store_again(emptied(stored), documents)
        repository._async._store.mover.forget("s", "agent")
        before = {message.message_id: message.to_message() for message in repository.list_messages("s", "agent")}
        at.before(number, acts[what])
        refusal = None
        try:
            rewinding.rewind_session("s", last, keep_as=keep_as)
        except MongoDBSessionError as error:
            refusal = error
        happened, at.act = at.act is None, None
        print(what, case, happened, repr(refusal), repr(at.error))
        assert at.error is None or isinstance(at.error, GONE)
        assert refusal is None or (happened and isinstance(refusal, EVENTS[what]))
        check_copy(repository, what, before, refusal, keep_as)
        if repository.session_exists("s"):
            check_session(repository, stored, what, last, refusal)
        else:
            assert what == "delete"
            assert left_of(stored, "s") == []


def check_copy(
    repository: MongoDBSessionRepository, what: str, before: dict[int, Any], refusal: Any, keep_as: str | None
) -> None:
    """The copy holds everything; without a rewind, there is none, or the session is gone or has been rewound."""
    if keep_as is None:
        return
    if not repository.session_exists(keep_as):
        assert refusal is not None
        return
    assert refusal is None or what in ("rewind", "delete", "again")
    kept = {message.message_id: message.to_message() for message in repository.list_messages(keep_as, "agent")}
    if what in ("rewind", "again"):  # before the copy was made
        assert len(kept) in (30, 21, 12)
    elif what not in ("replace", "redact"):
        assert {n: kept[n] for n in before} == before


def check_session(
    repository: MongoDBSessionRepository, stored: Stored, what: str, last: int, refusal: MongoDBSessionError | None
) -> None:
    stored.update_one({"_id": "s"}, {"$unset": {"lease": ""}})
    found = repository.list_messages("s", "agent")
    assert [message.message_id for message in found] == list(range(len(found)))
    if refusal is None:
        others = {"rewind": {min(last, 20) + 1}, "again": {12}, "append": {last + 1}}
        assert len(found) in {last + 1, *others.get(what, ())}
    else:
        assert len(found) == {"rewind": 21, "again": 12, "append": 50}.get(what, 30)
    repository.open_session("s")
    idle(repository)
    if what == "redact":
        shown = [told([message]) for message in found if message.redact_message is not None]
        assert all(each == ["[redacted]"] for each in shown)
    files = [len(message.to_message()["content"]) > 1 for message in found]
    listed = left_of(stored, "s").count("agent_sessions_attachments.files")
    assert listed <= sum(files) if what == "write back" else listed == sum(files)
    assert "stale_below" not in head(stored)
    following = range(len(found), len(found) + 30)
    assert apply(repository, "s", appends(following, "more {}")) == {}
    settled(stored)
    assert told(repository.list_messages("s", "agent"))[following.start :] == [f"more {n}" for n in following]


@pytest.mark.parametrize("kind", ["export", "fork"])
def test_a_copy_that_is_made_during_a_rewind_holds_no_mixture(
    repository: MongoDBSessionRepository,
    rewinding: MongoDBSessionRepository,
    at: AtCommand,
    stored: Stored,
    documents: dict[str, list[Any]],
    some: Callable[[Any, int], list[int]],
    kind: str,
) -> None:
    def rewind_and_go_on() -> None:
        repository.rewind_session("s", 6)
        for first in range(7, 37, 5):
            apply(repository, "s", appends(range(first, first + 5), "other {}"))
            settled(stored)

    for number in some(range(15), 2):
        store_again(emptied(stored), documents)
        at.before(number, rewind_and_go_on)
        try:
            if kind == "fork":
                rewinding.fork_session("s", "t")
            else:
                lines = list(rewinding.export_session("s"))
                at.act = None
                repository.import_session(lines, "t")
        except SessionConflictError:
            assert kind == "export"
            continue
        at.act = None
        assert at.error is None
        found = told(repository.list_messages("t", "agent"))
        assert found in (expected(30), [*expected(7), *(f"other {n}" for n in range(7, 37))])


# Against a fork, as a model.

STEPS = ("say", "show", "use a tool", "redact", "pin", "leave out", "insert", "run a graph")


def live_agent(manager: Any, window_size: int | None, *replies: Any) -> Any:
    keeper = NullConversationManager() if window_size is None else SlidingWindowConversationManager(window_size)
    return agent(manager, *replies, tools=[weather], conversation_manager=keeper)


def take_step(manager: Any, window_size: int | None, step: str, number: int) -> None:
    if step == "run a graph":
        pipeline(manager, node("one", f"{number}"))(f"task {number}")
        return
    replies = {
        "use a tool": [{"tool": "weather", "input": {"city": "Oslo"}}, f"answer {number}"],
        "redact": [Redaction("[redacted]")],
    }
    one = live_agent(manager, window_size, *replies.get(step, [f"answer {number}"]))
    if step == "pin" and one.messages:
        pin_message(one.messages, 0)
    elif step == "leave out":
        del one.messages[2:4]
    elif step == "insert":
        one.messages.insert(0, {"role": "user", "content": [{"text": f"inserted {number}"}]})
    image = {"image": {"format": "png", "source": {"bytes": content(2000, number)}}}
    one([{"text": f"question {number}"}, *([image] if step == "show" else [])])


def shown_of(factory: MongoDBSessionManagerFactory, session_id: str, window_size: int | None) -> list[Any]:
    with factory.create_session_manager(session_id) as manager:
        one = live_agent(manager, window_size)
        return [one.messages, one.conversation_manager.get_state(), one.state.get()]


@settings(max_examples=settings.default.max_examples // 7)
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=6),
    places=st.lists(st.floats(0, 1), min_size=1, max_size=2),
    window_size=st.sampled_from([None, 2, 4]),
)
def test_a_rewound_session_is_as_a_fork(
    small: MongoDBSessionManagerFactory,
    repository: MongoDBSessionRepository,
    stored: Stored,
    steps: list[str],
    places: list[float],
    window_size: int | None,
) -> None:
    number = 0
    for place in places:
        for step in steps:
            number += 1
            with small.create_session_manager("s") as manager:
                take_step(manager, window_size, step, number)
        if "agent" not in stored.find_one({"_id": "s"})["agents"]:
            break
        idle(small)
        count = repository.get_message_count("s", "agent")
        as_a_fork(repository, min(int(place * count), count - 1), keep_fork=True)
        session, fork = (stored.find_one({"_id": session_id}) for session_id in ("s", "fork"))
        for name in ("guardrail_events", "metadata"):
            assert session[name] == fork[name]
        states = [{key: one["state"] for key, one in each.get("multi_agents", {}).items()} for each in (session, fork)]
        assert states[0] == states[1]
        assert shown_of(small, "s", window_size) == shown_of(small, "fork", window_size)
        for session_id in ("s", "fork"):
            with small.create_session_manager(session_id) as manager:
                take_step(manager, window_size, "use a tool", 1000)
        idle(small)
        told_by = [told(repository.list_messages(session_id, "agent")) for session_id in ("s", "fork")]
        assert told_by[0] == told_by[1]
        assert repository.get_usage("s") == repository.get_usage("fork")
        repository.delete_session("fork")
    repository.delete_session("s")
    for name in ("_archive", "_attachments.files", "_attachments.chunks"):
        assert stored.database[f"agent_sessions{name}"].count_documents({}) == 0
