"""Copies of sessions end as other sessions do, and deleting leaves alone what is still being copied."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
import pytest

from mongodb_session_manager import DatabaseTimeoutError, MongoDBSessionRepository
from mongodb_session_manager import _copies as copies
from test_deletion import EVERYWHERE, ID, SMALL, fill, is_whole, traces, wait_for_moves

Driver = pymongo.MongoClient[dict[str, Any]]
Stored = pymongo.collection.Collection[dict[str, Any]]

COPY = "copy-c0ffee"


@pytest.fixture
def repository(server: str, database: str) -> Iterator[MongoDBSessionRepository]:
    with MongoDBSessionRepository(server, database, **SMALL) as repository:
        yield repository


@pytest.fixture
def expiring(server: str, database: str) -> Iterator[MongoDBSessionRepository]:
    with MongoDBSessionRepository(server, database, **SMALL, session_ttl=timedelta(days=8)) as repository:
        yield repository


def fork(repository: MongoDBSessionRepository) -> None:
    repository.fork_session(ID, COPY)


def export_and_import(repository: MongoDBSessionRepository) -> None:
    repository.import_session(list(repository.export_session(ID)), COPY)


def rest_of(stored: Stored, session_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for suffix, path in (
        ("_archive", "_id.session_id"),
        ("_attachments.files", "_id.session_id"),
        ("_attachments.chunks", "_id.file.session_id"),
    ):
        found += stored.database[f"agent_sessions{suffix}"].find({path: session_id})
    return found


def check_kept(stored: Stored) -> None:
    """What is beside a copy that expires is never to go before it."""
    document = stored.find_one({"_id": COPY})
    assert document is not None
    rest = rest_of(stored, COPY)
    assert len(rest) > 5
    assert all(document["updated_at"] <= document["kept_until"] <= each["expires_from"] for each in rest)


@pytest.mark.parametrize("copy", [fork, export_and_import])
def test_a_copy_is_deleted_without_a_trace_and_alone(
    repository: MongoDBSessionRepository, stored: Stored, driver: Driver, database: str, copy: Any
) -> None:
    fill(repository)
    wait_for_moves(stored)
    copy(repository)
    assert is_whole(repository, COPY)
    assert repository.delete_session(ID)
    assert is_whole(repository, COPY)
    stored.update_one({"_id": COPY}, {"$unset": {"copy_of": ""}})  # which names the session
    assert traces(driver, database) == set()
    assert traces(driver, database, COPY) == EVERYWHERE
    assert repository.delete_session(COPY)
    assert traces(driver, database, COPY) == set()


@pytest.mark.parametrize("copy", [fork, export_and_import])
def test_a_copy_into_a_collection_that_expires_does_so_with_all_that_belongs_to_it(
    repository: MongoDBSessionRepository, expiring: MongoDBSessionRepository, stored: Stored, copy: Any
) -> None:
    fill(repository)
    wait_for_moves(stored)
    copy(expiring)
    document = stored.find_one({"_id": COPY})
    assert document is not None
    assert document["session_ttl"] == 8 * 24 * 3600
    assert datetime.now(UTC) - document["updated_at"] < timedelta(minutes=5)
    assert {each["expires_from"] for each in rest_of(stored, COPY)} == {document["updated_at"] + timedelta(days=1)}
    assert document["kept_until"] == document["keep_until"] == document["updated_at"] + timedelta(days=1)
    assert "session_ttl" not in stored.find_one({"_id": ID})
    expiring.update_metadata(COPY, {"n": 1})
    check_kept(stored)


def test_a_fork_of_a_session_that_expires_does_so_too(
    repository: MongoDBSessionRepository, expiring: MongoDBSessionRepository, stored: Stored
) -> None:
    fill(expiring)
    wait_for_moves(stored)
    fork(repository)
    document = stored.find_one({"_id": COPY})
    assert document is not None
    assert document["session_ttl"] == 8 * 24 * 3600
    check_kept(stored)


@pytest.mark.parametrize("was_there", [False, True])
def test_deleting_leaves_alone_what_is_being_copied(
    repository: MongoDBSessionRepository, stored: Stored, driver: Driver, database: str, was_there: bool
) -> None:
    fill(repository)
    wait_for_moves(stored)
    lines = list(repository.export_session(ID))

    def slowly() -> Iterator[str]:
        for number, line in enumerate(lines):
            if number == len(lines) - 2:
                if was_there:
                    fill(repository, COPY, "other")
                repository.delete_session(COPY)
            yield line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mongodb_session_manager._imports._LINES", 1)
        repository.import_session(slowly(), COPY)
    assert is_whole(repository, COPY)
    repository.delete_session(COPY)
    repository.delete_session(ID)
    assert traces(driver, database, COPY) == set()


def test_what_a_copy_has_left_long_ago_is_deleted(
    repository: MongoDBSessionRepository, stored: Stored, driver: Driver, database: str
) -> None:
    fill(repository)
    wait_for_moves(stored)
    lines = list(repository.export_session(ID))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mongodb_session_manager._imports._LINES", 1)
        patch.setattr(copies, "now", lambda: datetime.now(UTC) - timedelta(days=2))
        patch.setattr(copies.Copy, "abandon", _nothing)
        with pytest.raises(DatabaseTimeoutError, match="took longer than 12:00:00"):
            repository.import_session(_began_two_days_ago(lines, patch), COPY)
    assert traces(driver, database, COPY) == EVERYWHERE - {"agent_sessions"}
    assert not repository.delete_session(COPY)
    assert traces(driver, database, COPY) == set()
    assert is_whole(repository)


def _began_two_days_ago(lines: list[str], patch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from lines[:-1]
    patch.setattr(copies, "now", lambda: datetime.now(UTC))
    yield lines[-1]


async def _nothing(copy: copies.Copy) -> None: ...
