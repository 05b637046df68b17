"""Old and new versions write to one session: the original appends without a message number that anybody checks."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pymongo
import pytest
from pymongo.collection import Collection
from strands.types.session import SessionAgent, SessionMessage

from fix_archive import documents_of, emptied, store_again
from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository
from mongodb_session_manager.errors import MessageNotFoundError, SessionConflictError
from support import CommandLog, agent, eventually, message_ids, texts

Stored = Collection[dict[str, Any]]

_clock = itertools.count(1)


def told(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"text": text}]}


class OldWriter:
    """Sends what the original (0.9) sends, and counts for itself, from what it last read."""

    def __init__(self, stored: Stored, session_id: str = "s", agent_id: str = "agent") -> None:
        self.stored, self.session_id, self.path = stored, session_id, f"agents.{agent_id}"
        self.agent_id = agent_id
        self.restore()

    def restore(self) -> None:
        """Read the agent as the original does; its next id follows the message with the latest date."""
        document = self.stored.find_one({"_id": self.session_id}, {self.path: 1})
        assert document is not None
        old = document["agents"][self.agent_id]
        SessionAgent(**without(old["agent_data"], AGENT_CONFIG))
        removed = old["agent_data"]["conversation_manager_state"].get("removed_message_count", 0)
        found = sorted(old["messages"], key=lambda message: message["created_at"])[removed:]
        self.messages = [SessionMessage(**without(message, MESSAGE_FIELDS)) for message in found]
        self.next_id = self.messages[-1].message_id + 1 if self.messages else 0

    def say(self, text: str, role: str = "user") -> None:
        moment = datetime.now(UTC)
        message = {
            "message": {**told(text, role), "tracking_id": f"old-{next(_clock)}"},
            "message_id": self.next_id,
            "redact_message": None,
            "created_at": moment,
            "updated_at": moment,
        }
        dates = {f"{self.path}.updated_at": moment, "updated_at": moment}
        self.stored.update_one({"_id": self.session_id}, {"$push": {f"{self.path}.messages": message}, "$set": dates})
        self.next_id += 1

    def turn(self, question: str, answer: str) -> None:
        self.say(question)
        self.say(answer, "assistant")
        self.sync()

    def sync(self) -> None:
        """Replace the whole of `agent_data`, then set metrics and configuration, as `sync_agent` of the original."""
        moment = datetime.now(UTC)
        data = {
            "agent_id": self.agent_id,
            "state": {},
            "conversation_manager_state": {"__name__": "SlidingWindowConversationManager", "removed_message_count": 0},
            "_internal_state": {},
            "created_at": moment,
            "updated_at": moment,
        }
        self.stored.update_one({"_id": self.session_id}, {"$set": {f"{self.path}.agent_data": data}})
        metrics = f"{self.path}.messages.$.event_loop_metrics"
        self.stored.update_one(
            {"_id": self.session_id, f"{self.path}.messages.message_id": self.next_id - 1},
            {"$set": {f"{metrics}.accumulated_metrics": {"latencyMs": 5}, f"{metrics}.tool_usage": {}}},
        )
        self.stored.update_one({"_id": self.session_id}, {"$set": {f"{self.path}.agent_data.model": "old"}})


AGENT_CONFIG = ("model", "system_prompt", "prompt_metadata")
MESSAGE_FIELDS = ("event_loop_metrics", "guardrail_event", "latency_ms", "input_tokens", "output_tokens")
"""What the original removes before it calls the constructors."""


def without(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def said(stored: Stored, session_id: str = "s") -> list[str]:
    document = stored.find_one({"_id": session_id})
    assert document is not None
    return texts(document["agents"]["agent"]["messages"])


def ids(stored: Stored, session_id: str = "s") -> list[int]:
    document = stored.find_one({"_id": session_id})
    assert document is not None
    return message_ids(document)


def next_id(stored: Stored, session_id: str = "s") -> int:
    document = stored.find_one({"_id": session_id})
    assert document is not None
    number: int = document["agents"]["agent"]["next_message_id"]
    return number


def one_turn(factory: MongoDBSessionManagerFactory, question: str, answer: str, session_id: str = "s") -> Any:
    with factory.create_session_manager(session_id) as manager:
        live = agent(manager, answer)
        live(question)
    return live


@pytest.fixture(scope="module")
def two_turns(
    shared_factory: Callable[[], tuple[MongoDBSessionManagerFactory, CommandLog]],
    shared_database: str,
    driver: pymongo.MongoClient[dict[str, Any]],
) -> dict[str, list[Any]]:
    """The documents of a session of two turns."""
    stored = emptied(driver[shared_database]["agent_sessions"])
    for question, answer in (("one", "first"), ("two", "second")):
        one_turn(shared_factory()[0], question, answer)
    return documents_of(stored)


def put_ids(stored: Stored, *numbers: Any, following: Any = None) -> None:
    """Give the stored messages other ids; `None` takes it away."""
    paths = {f"agents.agent.messages.{position}.message_id": number for position, number in enumerate(numbers)}
    unset = {path: "" for path, number in paths.items() if number is None}
    sets = {"agents.agent.next_message_id": following, **paths}
    sets = {path: value for path, value in sets.items() if value is not None}
    stored.update_one({"_id": "s"}, {"$set": sets, **({"$unset": unset} if unset else {})})


# Opening.


def test_a_message_of_an_old_process_is_followed_and_not_doubled(
    factory: MongoDBSessionManagerFactory, stored: Stored, commands: CommandLog
) -> None:
    one_turn(factory, "one", "first")
    OldWriter(stored).turn("two", "second")
    commands.clear()
    live = one_turn(factory, "three", "third")
    assert texts(live.messages) == ["one", "first", "two", "second", "three", "third"]
    assert ids(stored) == [0, 1, 2, 3, 4, 5]
    assert next_id(stored) == 6
    assert commands.names.count("update") == 3  # the numbers, and the turn
    commands.clear()
    factory.create_session_manager("s").close()
    assert commands.names == ["findAndModify"]


def test_ids_that_two_versions_gave_at_once_are_told_apart(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    one_turn(factory, "one", "first")
    old = OldWriter(stored)
    one_turn(factory, "two", "second")
    old.turn("three", "third")
    assert ids(stored) == [0, 1, 2, 3, 2, 3]
    live = one_turn(factory, "four", "fourth")
    assert texts(live.messages) == ["one", "first", "two", "second", "three", "third", "four", "fourth"]
    assert ids(stored) == list(range(8))


@pytest.mark.parametrize(
    ("numbers", "following", "expected", "then"),
    [
        ([0, 1, 1, 2], 3, [0, 1, 2, 3], 4),
        ([1, 2, 3, 4], 5, [1, 2, 3, 4], 5),
        ([1, 2, 3, 4], 4, [1, 2, 3, 4], 5),
        ([0, 7, 9, 20], 21, [0, 7, 9, 20], 21),
        ([0, 7, 7, 20], 21, [0, 7, 8, 20], 21),
        ([3, 2, 1, 0], 4, [3, 4, 5, 6], 7),
        ([0, 1, 2, 3], 2, [0, 1, 2, 3], 4),
        ([0, 1, 2, 3], 9, [0, 1, 2, 3], 4),
        ([None, None, None, None], 4, [0, 1, 2, 3], 4),
        ([0, None, 5, None], 6, [0, 1, 5, 6], 7),
        (["0", -1, 2.5, 3], 4, [0, 1, 2, 3], 4),
        ([0, 1, 2, 2**40], 4, [0, 1, 2, 3], 4),
    ],
)
def test_whatever_ids_are_stored_opening_makes_them_a_sequence(
    two_turns: dict[str, list[Any]],
    factory: MongoDBSessionManagerFactory,
    stored: Stored,
    commands: CommandLog,
    numbers: list[Any],
    following: int,
    expected: list[int],
    then: int,
) -> None:
    store_again(stored, two_turns)
    put_ids(stored, *numbers, following=following)
    factory.create_session_manager("s").close()
    assert ids(stored) == expected
    assert next_id(stored) == then
    assert said(stored) == ["one", "first", "two", "second"]
    commands.clear()
    live = one_turn(factory, "three", "third")
    assert texts(live.messages) == ["one", "first", "two", "second", "three", "third"]
    assert ids(stored) == [*expected, then, then + 1]
    assert commands.names == ["findAndModify", "update", "update"]


def test_messages_that_a_window_has_removed_are_numbered_too(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    for number in range(4):
        one_turn(factory, f"q{number}", f"a{number}")
    put_ids(stored, 0, 1, 0, 1, 2, 3, 4, 5, following=6)
    removed = "agents.agent.agent_data.conversation_manager_state.removed_message_count"
    stored.update_one({"_id": "s"}, {"$set": {removed: 6}})
    live = one_turn(factory, "more", "answer")
    assert texts(live.messages) == ["q3", "a3", "more", "answer"]
    assert ids(stored) == list(range(10))


def test_an_old_process_that_does_not_see_the_archive_begins_at_zero(
    server: str, database: str, stored: Stored, driver: pymongo.MongoClient[dict[str, Any]]
) -> None:
    with MongoDBSessionManagerFactory(server, database, max_embedded_messages=4) as factory:
        for number in range(5):
            one_turn(factory, f"q{number}", f"a{number}")
        eventually(lambda: stored.find_one({"_id": "s"})["agents"]["agent"].get("archived"))
        old = OldWriter(stored)
        old.next_id = 0
        old.turn("old", "older")
        live = one_turn(factory, "new", "newer")
        assert texts(live.messages)[-4:] == ["old", "older", "new", "newer"]
        assert len(live.messages) == 14
        eventually(lambda: len(ids(stored)) <= 4)
    with MongoDBSessionRepository(server, database) as repository:
        found = repository.list_messages("s", "agent")
        assert [message.message_id for message in found] == list(range(14))
        assert repository.read_message("s", "agent", 10).message["content"] == [{"text": "old"}]


def test_an_agent_that_an_old_process_stored_under_another_key_is_left_as_it_is(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with factory.create_session_manager("s") as manager:
        agent(manager, "first", agent_id="50%")("one")
    theirs = {"agent_data": {"agent_id": "50%"}, "messages": []}
    stored.update_one({"_id": "s"}, {"$set": {"agents.50%": theirs}})
    with factory.create_session_manager("s") as manager:
        live = agent(manager, "second", agent_id="50%")
        live("two")
    assert texts(live.messages) == ["one", "first", "two", "second"]
    assert stored.find_one({"_id": "s"})["agents"]["50%"] == theirs


# A manager that is open while an old process writes.


def test_a_live_manager_goes_on_and_its_redaction_hits_its_own_message(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with factory.create_session_manager("s") as manager:
        live = agent(manager, "first", "second")
        live("one")
        OldWriter(stored).turn("old", "older")
        live("two")
        assert ids(stored) == [0, 1, 2, 3, 2, 3]
        manager.redact_latest_message(told("[gone]", "assistant"), live)
    assert said(stored) == ["one", "first", "old", "older", "two", "[gone]"]
    again = one_turn(factory, "three", "third")
    assert texts(again.messages) == ["one", "first", "old", "older", "two", "[gone]", "three", "third"]
    assert ids(stored) == list(range(8))


def test_a_redaction_finds_its_message_after_it_was_given_another_id(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with factory.create_session_manager("s") as manager:
        live = agent(manager, "first", "second")
        live("one")
        OldWriter(stored).say("old")
        live("two")
        factory.create_session_manager("s").close()
        assert ids(stored) == [0, 1, 2, 3, 4]
        manager.redact_latest_message(told("[gone]", "assistant"), live)
        events = stored.find_one({"_id": "s"})["agents"]["agent"]["messages"]
        assert [("guardrail_event" in message) for message in events] == [False] * 4 + [True]
    assert said(stored) == ["one", "first", "old", "two", "[gone]"]


def test_a_redaction_never_hits_a_message_that_took_the_place_of_its_own(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with factory.create_session_manager("s") as manager:
        live = agent(manager, "first")
        live("one")
        stored.update_one({"_id": "s"}, {"$pop": {"agents.agent.messages": 1}})
        old = OldWriter(stored)
        old.say("old")
        assert ids(stored) == [0, 1]
        with pytest.raises(MessageNotFoundError):
            manager.redact_latest_message(told("[gone]", "assistant"), live)
    assert said(stored) == ["one", "old"]


def test_a_lost_acknowledgement_is_recognised_beside_a_doubled_id(server: str, stored: Stored) -> None:
    from support import fail_point

    with (
        # The driver waits for a heartbeat after this error: ten seconds by default.
        MongoDBSessionManagerFactory(server, stored.database.name, heartbeatFrequencyMS=500) as factory,
        factory.create_session_manager("s") as manager,
    ):
        live = agent(manager, "first", "second", "third")
        live("one")
        old = OldWriter(stored)
        old.say("old")
        error = {"code": 91, "errmsg": "gone"}
        with fail_point(server, failCommands=["update"], writeConcernError=error, times=2):
            live("two")
        live("three")
    assert said(stored) == ["one", "first", "old", "two", "second", "three", "third"]


def test_no_bucket_gets_doubled_ids(
    server: str, database: str, stored: Stored, driver: pymongo.MongoClient[dict[str, Any]]
) -> None:
    with MongoDBSessionManagerFactory(server, database, max_embedded_messages=8) as factory:
        with factory.create_session_manager("s") as manager:
            live = agent(manager, *"abcdef")
            live("1")
            old = OldWriter(stored)
            old.next_id = 0
            old.turn("old", "older")
            for text in "23456":
                live(text)
        assert driver[database]["agent_sessions_archive"].count_documents({}) == 0
        again = one_turn(factory, "7", "g")
        assert len(again.messages) == 16
        eventually(lambda: len(ids(stored)) <= 8)
    with MongoDBSessionRepository(server, database) as repository:
        found = repository.list_messages("s", "agent")
    assert [message.message_id for message in found] == list(range(16))


# The repository.


@pytest.fixture
def doubled(two_turns: dict[str, list[Any]], factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    store_again(stored, two_turns)
    old = OldWriter(stored)
    old.next_id = 2  # as it was after the first turn
    old.turn("three", "third")
    assert ids(stored) == [0, 1, 2, 3, 2, 3]


@pytest.mark.usefixtures("doubled")
def test_the_repository_redacts_the_message_it_has_read(repository: MongoDBSessionRepository, stored: Stored) -> None:
    wanted = said(stored)
    for position in (3, 5, 0, 4, 2, 1):  # of messages with one id, once the first one and once the second one first
        message = repository.list_messages("s", "agent")[position]
        message.redact_message = told(f"[gone {position}]")
        repository.update_message("s", "agent", message)
        wanted[position] = f"[gone {position}]"
        assert said(stored) == wanted


@pytest.mark.usefixtures("doubled")
def test_a_message_that_is_only_known_by_its_id_is_the_one_that_reading_returns(
    repository: MongoDBSessionRepository, stored: Stored
) -> None:
    read = repository.read_message("s", "agent", 2)
    assert read is not None
    assert texts([read.message]) == ["two"]
    repository.update_message("s", "agent", SessionMessage(told("changed"), 2))
    assert said(stored) == ["one", "first", "changed", "second", "three", "third"]


@pytest.mark.usefixtures("doubled")
def test_the_repository_appends_behind_all(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    following = repository.list_messages("s", "agent")[-1].message_id + 1
    repository.create_message("s", "agent", SessionMessage(told("four"), following))
    factory.create_session_manager("s").close()
    assert ids(stored) == list(range(7))
    assert said(stored)[-2:] == ["third", "four"]


def test_the_repository_does_not_double_an_id_that_an_old_process_gave(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored
) -> None:
    one_turn(factory, "one", "first")
    OldWriter(stored).say("old")
    with pytest.raises(SessionConflictError):
        repository.create_message("s", "agent", SessionMessage(told("four"), 2))
    repository.create_message("s", "agent", SessionMessage(told("four"), 3))
    assert ids(stored) == [0, 1, 2, 3]


@pytest.mark.parametrize("first", [0, 1, 7])
def test_the_messages_of_the_repository_may_begin_at_any_id(
    factory: MongoDBSessionManagerFactory, repository: MongoDBSessionRepository, stored: Stored, first: int
) -> None:
    with factory.create_session_manager("s") as manager:
        manager.sync_agent(agent(manager))
    repository.create_message("s", "agent", SessionMessage(told("one"), first))
    for wrong in (first, first + 2):
        with pytest.raises(SessionConflictError):
            repository.create_message("s", "agent", SessionMessage(told("two"), wrong))
    repository.create_message("s", "agent", SessionMessage(told("two"), first + 1))
    live = one_turn(factory, "three", "third")
    assert texts(live.messages) == ["one", "two", "three", "third"]
    assert ids(stored) == [first, first + 1, first + 2, first + 3]


# Copies.


@pytest.mark.usefixtures("doubled")
def test_an_export_of_doubled_ids_can_be_imported(repository: MongoDBSessionRepository, stored: Stored) -> None:
    lines = "".join(repository.export_session("s"))
    assert repository.import_session(io.StringIO(lines), "copy") == "copy"
    assert ids(stored, "copy") == list(range(6))
    assert said(stored, "copy") == said(stored)
    assert ids(stored) == [0, 1, 2, 3, 2, 3]


def test_an_export_of_ids_doubled_in_the_archive_can_be_imported(
    server: str, database: str, stored: Stored, driver: pymongo.MongoClient[dict[str, Any]]
) -> None:
    with MongoDBSessionManagerFactory(server, database, max_embedded_messages=4) as factory:
        for number in range(5):
            one_turn(factory, f"q{number}", f"a{number}")
        eventually(lambda: stored.find_one({"_id": "s"})["agents"]["agent"].get("archived"))
    archive = driver[database]["agent_sessions_archive"]
    archive.update_many({}, {"$set": {"messages.1.message_id": 0}})
    with MongoDBSessionRepository(server, database) as repository:
        assert repository.import_session(io.StringIO("".join(repository.export_session("s"))), "copy") == "copy"
        found = repository.list_messages("copy", "agent")
        assert [message.message_id for message in found] == list(range(10))
        # And a change of one of them is a change of one.
        second = repository.list_messages("s", "agent")[1]
        second.redact_message = told("[gone]")
        repository.update_message("s", "agent", second)
        shown = texts([message.to_message() for message in repository.list_messages("s", "agent")])
        assert shown[:3] == ["q0", "[gone]", "q1"]


@pytest.mark.usefixtures("doubled")
def test_a_fork_ends_at_the_message_it_should(repository: MongoDBSessionRepository, stored: Stored) -> None:
    repository.fork_session("s", "fork", 4)
    assert said(stored, "fork") == ["one", "first", "two", "second", "three"]
    assert ids(stored) == list(range(6))


# The deployment as a whole.


def test_a_rolling_deployment_loses_doubles_and_overwrites_nothing(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    sessions = [f"s{number}" for number in range(6)]
    expected: dict[str, list[str]] = {session: [] for session in sessions}
    old: dict[str, OldWriter] = {}
    for session in sessions:
        one_turn(factory, "begin", "begun", session)
        expected[session] += ["begin", "begun"]
        old[session] = OldWriter(stored, session)
    for turn in range(5):
        for number, session in enumerate(sessions):
            question, answer = f"q{turn}", f"a{turn}"
            if (turn + number) % 2:
                writer = old[session]
                if number % 3 == 0:  # a process that reads before each request; others keep counting
                    writer.restore()
                writer.turn(question, answer)
            else:
                with factory.create_session_manager(session) as manager:
                    live = agent(manager, answer)
                    live(question)
                    if turn % 3 == 0:
                        answer = f"[redacted {turn}]"
                        manager.redact_latest_message(told(answer, "assistant"), live)
            expected[session] += [question, answer]
    for session in sessions:
        live = one_turn(factory, "end", "ended", session)
        expected[session] += ["end", "ended"]
        assert texts(live.messages) == expected[session]
        assert said(stored, session) == expected[session]
        assert ids(stored, session) == list(range(14))
        assert next_id(stored, session) == 14


def test_a_live_manager_through_a_rolling_deployment(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    expected = []
    with factory.create_session_manager("s") as manager:
        live = agent(manager, *(f"a{turn}" for turn in range(6)))
        live("begin")
        expected += ["begin", "a0"]
        old = OldWriter(stored)
        for turn in range(1, 6):
            old.turn(f"old{turn}", f"older{turn}")
            live(f"q{turn}")
            manager.redact_latest_message(told(f"[redacted {turn}]", "assistant"), live)
            expected += [f"old{turn}", f"older{turn}", f"q{turn}", f"[redacted {turn}]"]
    assert said(stored) == expected
    again = one_turn(factory, "end", "ended")
    assert texts(again.messages) == [*expected, "end", "ended"]
    assert ids(stored) == list(range(len(expected) + 2))
