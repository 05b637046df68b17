"""Feedback: a list that only grows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pymongo.collection import Collection

from fix_kinds import KINDS, Blocking, repositories_of_kinds, session_of_kind
from mongodb_session_manager import (
    EncodingError,
    InvalidArgumentError,
    MongoDBSessionManagerFactory,
    SessionNotFoundError,
)
from support import CommandLog, agent

Stored = Collection[dict[str, Any]]


@pytest.fixture(scope="module")
def repository_of_kind(
    server: str, shared_database: str, shared_factory: Callable[[], tuple[Any, CommandLog]]
) -> Iterator[Callable[[str], Blocking]]:
    with repositories_of_kinds(server, shared_database, shared_factory()[1]) as repository_of_kind:
        yield repository_of_kind


@pytest.fixture(params=KINDS)
def session(
    request: pytest.FixtureRequest,
    factory: MongoDBSessionManagerFactory,
    commands: CommandLog,
    repository_of_kind: Callable[[str], Blocking],
) -> Iterator[Blocking]:
    with session_of_kind(request.param, factory, repository_of_kind) as session:
        commands.clear()
        yield session


def without_dates(feedbacks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in feedback.items() if key != "created_at"} for feedback in feedbacks]


def test_feedback_is_listed_oldest_first(session: Blocking, stored: Stored) -> None:
    assert session.get_feedbacks() == []
    session.add_feedback({"rating": "up", "comment": "Nice."})
    session.add_feedback({"rating": "down"})
    session.add_feedback({})
    expected = [{"rating": "up", "comment": "Nice."}, {"rating": "down"}, {}]
    assert without_dates(session.get_feedbacks()) == expected
    assert without_dates(stored.find_one({"_id": "s"})["feedbacks"]) == expected


def test_created_at_is_a_date_in_utc(session: Blocking, stored: Stored) -> None:
    session.add_feedback({"rating": "up"})
    (created_at,) = [feedback["created_at"] for feedback in session.get_feedbacks()]
    assert isinstance(created_at, datetime)
    assert created_at.utcoffset() == timedelta(0)
    assert stored.find_one({"_id": "s"})["feedbacks"][0]["created_at"] == created_at
    assert stored.count_documents({"feedbacks.created_at": {"$type": "date"}}) == 1


def test_created_at_is_when_it_was_added_whatever_is_given(session: Blocking, stored: Stored) -> None:
    given = {"rating": "up", "created_at": datetime(1999, 1, 1, tzinfo=UTC)}
    opened = stored.find_one({"_id": "s"})["updated_at"]
    session.add_feedback(given)
    (feedback,) = session.get_feedbacks()
    assert opened <= feedback["created_at"]
    assert given == {"rating": "up", "created_at": datetime(1999, 1, 1, tzinfo=UTC)}


def test_any_dict_is_feedback(session: Blocking) -> None:
    feedback = {
        "": 0,
        "$set": {"metadata": 1},
        "a.b": {"$ref": "x", "$id": 1},
        "$[]": [{"$each": []}],
        "\0": b"\x00",
        "\ud83d": "half \ud83d",
        7: 2**70,
        (1, 2): (3, {4}),
        "__msm__": "int",
        "comment": "x" * 100_000,
        "nested": {"when": datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=2)))},
    }
    session.add_feedback(feedback)
    session.add_feedback({"__msm__": "int", "v": "7"})
    expected = {**feedback, "nested": {"when": datetime(2026, 1, 2, 1, tzinfo=UTC)}}
    assert without_dates(session.get_feedbacks()) == [expected, {"__msm__": "int", "v": "7"}]
    assert all(isinstance(entry["created_at"], datetime) for entry in session.get_feedbacks())


def test_each_call_is_one_command(session: Blocking, commands: CommandLog) -> None:
    session.add_feedback({"rating": "up"})
    session.get_feedbacks()
    assert commands.names == ["update", "find"]


def test_adding_changes_nothing_else(session: Blocking, stored: Stored) -> None:
    before = stored.find_one({"_id": "s"})
    session.add_feedback({"rating": "up"})
    after = stored.find_one({"_id": "s"})
    # Each client reads the clock of the server for itself, to within a round trip.
    assert after.pop("updated_at") >= before.pop("updated_at") - timedelta(seconds=1)
    assert (len(before.pop("feedbacks")), len(after.pop("feedbacks"))) == (0, 1)
    assert after == before


def test_what_is_no_feedback_is_refused(session: Blocking, stored: Stored, commands: CommandLog) -> None:
    for feedback, kind in (("up", "str"), (None, "NoneType"), ([{"rating": "up"}], "list"), (1, "int")):
        with pytest.raises(InvalidArgumentError, match=f"feedback must be a dict, not {kind}"):
            session.add_feedback(feedback)
    with pytest.raises(EncodingError, match="cannot store"):
        session.add_feedback({"comment": object()})
    assert commands.names == []
    assert stored.find_one({"_id": "s"})["feedbacks"] == []


def test_feedback_without_an_end_is_refused(session: Blocking, commands: CommandLog) -> None:
    endless: dict[str, Any] = {}
    endless["self"] = [endless]
    with pytest.raises(EncodingError, match="cannot store"):
        session.add_feedback(endless)
    assert commands.names == []


def test_without_the_session(session: Blocking, stored: Stored) -> None:
    stored.delete_one({"_id": "s"})
    with pytest.raises(SessionNotFoundError, match="session 's' does not exist"):
        session.add_feedback({"rating": "up"})
    with pytest.raises(SessionNotFoundError, match="session 's' does not exist"):
        session.get_feedbacks()
    assert stored.count_documents({"_id": "s"}) == 0


def test_a_document_of_old_without_feedbacks_has_none(session: Blocking, stored: Stored) -> None:
    stored.update_one({"_id": "s"}, {"$unset": {"feedbacks": ""}})
    assert session.get_feedbacks() == []
    session.add_feedback({"rating": "up"})
    assert without_dates(session.get_feedbacks()) == [{"rating": "up"}]


@pytest.mark.anyio
async def test_many_tasks_add_feedback(factory: MongoDBSessionManagerFactory) -> None:
    managers = [await factory.create_session_manager_async("s") for _ in range(3)]
    await asyncio.gather(*(managers[number % 3].add_feedback({"number": number}) for number in range(20)))
    feedbacks = await managers[0].get_feedbacks()
    assert sorted(feedback["number"] for feedback in feedbacks) == list(range(20))


def test_many_threads_add_feedback(factory: MongoDBSessionManagerFactory) -> None:
    manager = factory.create_session_manager("s")
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda number: manager.add_feedback({"number": number}), range(20)))
    assert sorted(feedback["number"] for feedback in manager.get_feedbacks()) == list(range(20))


def test_feedback_between_turns_is_no_conflict(factory: MongoDBSessionManagerFactory, stored: Stored) -> None:
    manager, aside = factory.create_session_manager("s"), factory.create_session_manager("s")
    live = agent(manager, "one", "two")
    live("a")
    aside.add_feedback({"rating": "up"})
    live("b")
    manager.add_feedback({"rating": "down"})
    live("c")
    document = stored.find_one({"_id": "s"})
    assert len(document["agents"]["agent"]["messages"]) == 6
    assert without_dates(document["feedbacks"]) == [{"rating": "up"}, {"rating": "down"}]
