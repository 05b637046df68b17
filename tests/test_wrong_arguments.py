"""An argument that cannot be used is refused with an error of ours, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pymongo
import pytest
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from mongodb_session_manager import (
    InvalidArgumentError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionExistsError,
)
from proxy import Proxy, command
from support import CommandLog, agent, fail_point

Documents = pymongo.collection.Collection[dict[str, Any]]

NO_COUNTS = [-1, 2**63, 10**30, -(2**63) - 1, True, 1.0, float("nan"), "1", [1], {"$gt": 0}, b"1"]
NO_TEXTS = [5, b"x", ["x"], {"$ne": None}, True, "\ud800"]
NO_DATES = [
    5,
    "2024-01-01",
    True,
    {"$gt": 0},
    datetime.max.replace(tzinfo=timezone(timedelta(hours=-5))),
    datetime.min.replace(tzinfo=timezone(timedelta(hours=5))),
]
NO_OFFSETS = [*NO_COUNTS, None]


@pytest.fixture
def repository(server: str, database: str, commands: CommandLog) -> Iterator[MongoDBSessionRepository]:
    with MongoDBSessionRepository(server, database, event_listeners=[commands]) as repository:
        yield repository


def holding_itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["a"] = [value]
    return value


def deep() -> Any:
    value: Any = "x"
    for _ in range(5000):
        value = [value]
    return value


def message(message_id: Any) -> SessionMessage:
    return SessionMessage({"role": "user", "content": [{"text": "x"}]}, message_id)


CALLS: dict[str, tuple[Callable[[MongoDBSessionRepository, Any], object], list[Any]]] = {
    "limit of messages": (lambda r, value: r.list_messages("s", "agent", limit=value), NO_COUNTS),
    "offset of messages": (lambda r, value: r.list_messages("s", "agent", offset=value), NO_OFFSETS),
    "limit of sessions": (lambda r, value: r.list_sessions(limit=value), [*NO_OFFSETS, 0, 1001]),
    "order of sessions": (lambda r, value: r.list_sessions(order=value), [*NO_TEXTS, None, "x", "updated_at "]),
    "cursor": (lambda r, value: r.list_sessions(cursor=value), [*NO_TEXTS, "x", "é", "e30", "W10"]),
    "application name": (lambda r, value: r.list_sessions(application_name=value), NO_TEXTS),
    "application name counted": (lambda r, value: r.count_sessions(application_name=value), NO_TEXTS),
    "metadata": (lambda r, value: r.list_sessions(metadata=value), [5, "x", ["x"], {5: 1}, {"": 1}, {"$or": []}]),
    "metadata value": (
        lambda r, value: r.list_sessions(metadata={"a": value}),
        [holding_itself(), [holding_itself()], deep(), {"$ne": 1}, [{"$gt": 1}], object()],
    ),
    "metadata value counted": (lambda r, value: r.count_sessions(metadata={"a": value}), [holding_itself(), object()]),
    "created after": (lambda r, value: r.list_sessions(created_after=value), NO_DATES),
    "updated after": (lambda r, value: r.count_sessions(updated_after=value), NO_DATES),
    "message id read": (lambda r, value: r.read_message("s", "agent", value), NO_OFFSETS),
    "message id stored": (lambda r, value: r.create_message("s", "agent", message(value)), [*NO_OFFSETS, 2**31]),
    "message id updated": (lambda r, value: r.update_message("s", "agent", message(value)), NO_OFFSETS),
    "end of a fork": (lambda r, value: r.fork_session("s", "f", value), [-1, 2**63, True, 1.0, "1", [1], {"a": "1"}]),
    "date of a session": (
        lambda r, value: r.create_session(Session("n", SessionType.AGENT, value)),
        [value for value in NO_DATES if value != "2024-01-01"] + ["garbage", ""],
    ),
    "date of an agent": (
        lambda r, value: r.create_agent("s", SessionAgent("n", {}, {}, {}, value)),
        [value for value in NO_DATES if value != "2024-01-01"] + ["garbage", ""],
    ),
}


@pytest.mark.parametrize(("call", "values"), CALLS.values(), ids=CALLS)
def test_an_argument_that_cannot_be_used_is_refused(
    repository: MongoDBSessionRepository,
    commands: CommandLog,
    call: Callable[[MongoDBSessionRepository, Any], object],
    values: list[Any],
) -> None:
    for value in values:
        try:
            with pytest.raises(InvalidArgumentError):
                call(repository, value)
        except BaseException as error:
            error.add_note(type(value).__name__)
            raise
    assert commands.names == []


def test_an_offset_beyond_everything_is_none(repository: MongoDBSessionRepository) -> None:
    repository.create_session(Session("s", SessionType.AGENT))
    repository.create_agent("s", SessionAgent("agent", {}, {}))
    repository.create_message("s", "agent", message(0))
    assert repository.list_messages("s", "agent", offset=2**63 - 1) == []
    assert len(repository.list_messages("s", "agent", limit=2**63 - 1)) == 1
    assert repository.list_messages("s", "agent", limit=2**63 - 1, offset=2**63 - 1) == []
    assert repository.read_message("s", "agent", 2**63 - 1) is None


def test_the_messages_of_an_open_session_are_counted_in_whole_numbers(factory: MongoDBSessionManagerFactory) -> None:
    with factory.create_session_manager("s") as manager:
        agent(manager)
    with factory.create_session_manager("s") as manager:
        for value in NO_COUNTS:
            for arguments in ({"limit": value}, {"offset": value}):
                with pytest.raises(InvalidArgumentError):
                    manager.session_repository.list_messages("s", "agent", **arguments)


def test_a_filter_that_holds_a_value_twice_is_none_that_holds_itself(repository: MongoDBSessionRepository) -> None:
    shared = {"x": [1]}
    repository.create_session(Session("s", SessionType.AGENT))
    repository.update_metadata("s", {"a": {"b": shared, "c": shared}})
    assert repository.count_sessions(metadata={"a": {"b": shared, "c": shared}}) == 1
    with pytest.raises(InvalidArgumentError, match="operator"):
        repository.count_sessions(metadata={"a": [shared, {"b": [shared, {"$ne": 1}]}]})


@pytest.mark.parametrize("kind", ["server", pytest.param("standalone", marks=pytest.mark.own_database)])
def test_a_created_session_whose_acknowledgement_is_lost_is_created(
    request: pytest.FixtureRequest, database: str, kind: str
) -> None:
    uri = request.getfixturevalue(kind)
    with Proxy(uri) as proxy, MongoDBSessionRepository(proxy.uri, database) as repository:
        repository.ping()
        proxy.drop_after_request(command("insert"), times=2)
        created = repository.create_session(Session("s", SessionType.AGENT))
        assert created.session_id == "s"
        assert repository.read_session("s") is not None
        with pytest.raises(SessionExistsError):
            repository.create_session(Session("s", SessionType.AGENT, created.created_at))


@pytest.mark.own_database
def test_a_session_of_somebody_else_is_not_taken_for_ones_own(standalone: str, database: str) -> None:
    with MongoDBSessionRepository(standalone, database) as repository:
        session = Session("s", SessionType.AGENT, datetime.now(UTC).isoformat())
        repository.create_session(session)
        with (
            fail_point(standalone, failCommands=["insert"], closeConnection=True, times=2),
            pytest.raises(SessionExistsError),
        ):
            repository.create_session(session)


def test_a_wrong_call_names_the_method_that_was_called(repository: MongoDBSessionRepository) -> None:
    wrong: Any = repository
    for call in (lambda: wrong.get_metadata(), lambda: wrong.get_metadata("a", "b"), lambda: wrong.get_metadata(x=1)):
        with pytest.raises(TypeError, match=r"^MongoDBSessionRepository\.get_metadata\(\) "):
            call()
