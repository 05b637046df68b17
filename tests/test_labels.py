"""Titles and tags: how sessions get them, what changes them, and that they stay as they are."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from strands.types.session import Session, SessionType

from fix_finding import START, Stored, session
from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    InvalidArgumentError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionNotFoundError,
    StateTooLargeError,
)
from support import CommandLog, agent

pytestmark = pytest.mark.anyio


def labels(target: Any, session_id: str = "s") -> tuple[str | None, tuple[str, ...]]:
    summary = target.get_session_summary(session_id)
    return summary.title, summary.tags


def test_a_title_and_tags_are_set_when_a_session_is_created(
    factory: MongoDBSessionManagerFactory, stored: Stored
) -> None:
    with factory.create_session_manager("s", title="Trip", tags=["red", "blue", "red"]) as manager:
        agent(manager, "hello")("hi")
    assert labels(factory) == ("Trip", ("red", "blue"))
    factory.create_session_manager("s", title="Other", tags=["green"]).close()
    assert labels(factory) == ("Trip", ("red", "blue")), "an existing session keeps its own"
    document = stored.find_one({"_id": "s"}) or {}
    assert (document["title"], document["tags"]) == ("Trip", ["red", "blue"])


def test_what_is_not_given_stays(factory: MongoDBSessionManagerFactory, commands: CommandLog, stored: Stored) -> None:
    with factory.create_session_manager("s", owner="ada", title="Trip", tags=["red"]) as manager:
        agent(manager, "hello")("hi")
    before = stored.find_one({"_id": "s"}) or {}
    commands.clear()
    factory.update_session("s", title="Journey")
    assert commands.names == ["update"]
    assert labels(factory) == ("Journey", ("red",))
    factory.update_session("s", tags=["blue", "green", "blue"])
    assert labels(factory) == ("Journey", ("blue", "green"))
    factory.update_session("s", title=None)
    assert labels(factory) == (None, ("blue", "green"))
    factory.update_session("s", title="", tags=())
    assert labels(factory) == ("", ())
    factory.update_session("s", title=None, tags=None)
    after = stored.find_one({"_id": "s"}) or {}
    assert after.pop("updated_at") >= before.pop("updated_at")
    del before["title"], before["tags"]
    assert after == before


def test_an_owner_is_a_guard_and_never_a_change(repository: MongoDBSessionRepository, stored: Stored) -> None:
    stored.insert_many([session("s", owner="ada", title="Trip"), session("old", title="Old")])
    repository.update_session("s", title="Journey", owner="ada")
    for session_id, owner in (("s", "bob"), ("old", "bob"), ("absent", "bob")):
        with pytest.raises(SessionNotFoundError):
            repository.update_session(session_id, title="mine", owner=owner)
        with pytest.raises(SessionNotFoundError):
            repository.update_session(session_id, owner=owner)
    assert [(each["title"], each.get("owner")) for each in stored.find({}, sort=[("_id", 1)])] == [
        ("Old", None),
        ("Journey", "ada"),
    ]
    repository.update_session("old")  # changes nothing
    with pytest.raises(SessionNotFoundError):
        repository.update_session("absent")
    assert stored.find_one({"_id": "old"}) == session("old", title="Old")


NO_LABELS: list[tuple[str, Any]] = [
    ("title", 5),
    ("title", ["Trip"]),
    ("title", {"$set": 1}),
    ("title", "\ud800"),
    ("title", "x" * 1001),
    ("tags", "red"),
    ("tags", b"red"),
    ("tags", {"red": 1}),
    ("tags", 5),
    ("tags", ["red", 5]),
    ("tags", ["red", ""]),
    ("tags", ["red\0"]),
    ("tags", [{"$ne": 1}]),
    ("tags", ["x" * 201]),
    ("tags", [f"tag {n}" for n in range(101)]),
]


def test_what_cannot_be_used_is_named_and_nothing_is_sent(
    factory: MongoDBSessionManagerFactory, commands: CommandLog
) -> None:
    for name, value in NO_LABELS:
        options: dict[str, Any] = {name: value}
        with pytest.raises(InvalidArgumentError, match=name):
            factory.update_session("s", **options)
        with pytest.raises(InvalidArgumentError, match=name):
            factory.create_session_manager("s", **options)
        assert commands.names == [], options


def test_the_longest_labels_fit(repository: MongoDBSessionRepository) -> None:
    repository.create_session(Session("s", SessionType.AGENT))
    tags = [f"{n:03}" + "é" * 197 for n in range(100)]
    repository.update_session("s", title="é" * 1000, tags=tags)
    assert labels(repository) == ("é" * 1000, tuple(tags))
    assert [each.session_id for each in repository.list_sessions(tags=tags).sessions] == ["s"]


def test_fields_that_an_application_has_stored_are_kept(repository: MongoDBSessionRepository, stored: Stored) -> None:
    """It might have used these names before the library did."""
    theirs = {"title": {"en": "Trip"}, "tags": "red", "owner": {"id": 7}}
    stored.insert_one(session("s", **theirs))
    summary = repository.get_session_summary("s")
    assert (summary.owner, summary.title, summary.tags) == (None, None, ())
    repository.open_session("s")
    assert {name: (stored.find_one({"_id": "s"}) or {})[name] for name in theirs} == theirs
    for owner in ("ada", "7"):
        with pytest.raises(SessionNotFoundError):
            repository.open_session("s", owner=owner)
        with pytest.raises(SessionNotFoundError):
            repository.claim_session("s", owner)
    stored.update_one({"_id": "s"}, {"$set": {"tags": ["red", 5]}})
    assert repository.get_session_summary("s").tags == ("red",)
    repository.update_session("s", title="Trip", tags=["blue"])
    assert labels(repository) == ("Trip", ("blue",))


def test_a_session_that_is_renamed_expires_later(server: str, database: str, stored: Stored) -> None:
    with MongoDBSessionRepository(server, database, session_ttl=timedelta(days=1)) as repository:
        repository.create_session(Session("s", SessionType.AGENT))
        stored.update_one({"_id": "s"}, {"$set": {"expires_at": (stored.find_one({}) or {})["updated_at"] + HOUR}})
        repository._async._store.expiry.forget("s")
        before = stored.find_one({"_id": "s"}) or {}
        repository.update_session("s", title="Trip")
        after = stored.find_one({"_id": "s"}) or {}
        assert after["expires_at"] - before["expires_at"] > timedelta(hours=20)


HOUR = timedelta(hours=1)


@pytest.mark.usefixtures("large")
def test_a_title_for_which_there_is_no_room(repository: MongoDBSessionRepository, stored: Stored) -> None:
    stored.insert_one(session("s", metadata={"full": "x" * (16 * 1024 * 1024 - 400)}, created_at=START))
    with pytest.raises(StateTooLargeError, match="title"):
        repository.update_session("s", title="x" * 1000)


async def test_the_async_twins(server: str, database: str) -> None:
    async with AsyncMongoDBSessionRepository(server, database, owner="ada") as repository:
        await repository.open_session("s")
        await repository.update_session("s", title="Trip", tags=["red"])
        summary = await repository.get_session_summary("s")
        assert (summary.session_id, summary.owner, summary.title, summary.tags) == ("s", "ada", "Trip", ("red",))
        await repository.claim_session("s", "ada")
    async with MongoDBSessionManagerFactory(server, database) as factory:
        await factory.update_session_async("s", title=None, owner="ada")
        assert (await factory.get_session_summary_async("s")).title is None
        with pytest.raises(SessionNotFoundError):
            await factory.claim_session_async("s", "bob")
