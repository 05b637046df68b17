"""The sessions of an owner as one stream of lines, which can be imported again session by session."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import ObjectId

from fix_archive import store_again
from fix_copying import all_of
from fix_erasure import ADA, HERS, SMALL, prepared
from fix_finding import START, Stored, session
from mongodb_session_manager import (
    AsyncMongoDBSessionRepository,
    AttachmentError,
    InvalidArgumentError,
    MongoDBSessionManagerFactory,
    MongoDBSessionRepository,
    SessionNotFoundError,
    split_export,
)
from support import CommandLog

Driver = pymongo.MongoClient[dict[str, Any]]


@pytest.fixture(scope="module")
def documents(server: str, shared_database: str, driver: Driver) -> dict[str, list[Any]]:
    return prepared(server, driver[shared_database])


@pytest.fixture
def full(documents: dict[str, list[Any]], stored: Stored) -> Stored:
    store_again(stored, documents)
    return stored


@pytest.fixture(scope="module")
def repository_options() -> dict[str, Any]:
    return SMALL


def without_times(lines: list[str]) -> list[str]:
    """Return lines without those that say when they were exported."""
    return [line for line in lines if not line.startswith(('{"format"', '{"end"'))]


def test_what_was_exported_and_erased_can_be_imported_again(
    full: Stored, repository: MongoDBSessionRepository, tmp_path: Path
) -> None:
    before = {session_id: all_of(repository, session_id) for session_id in HERS}
    lines = list(repository.export_owner(ADA))
    assert any(line.startswith('{"content"') for line in lines)
    (tmp_path / "ada.jsonl").write_text("".join(lines))
    repository.erase_owner(ADA)
    with (tmp_path / "ada.jsonl").open() as file:
        assert [repository.import_session(lines, owner=ADA) for lines in split_export(file)] == HERS
    assert {session_id: all_of(repository, session_id) for session_id in HERS} == before
    again = without_times(list(repository.export_owner(ADA)))
    assert list(map(json.loads, again)) == list(map(json.loads, without_times(lines)))
    assert [each.session_id for each in repository.list_sessions(owner=ADA, order="created_at").sessions] == HERS


def test_each_session_is_exported_as_by_itself(
    server: str, full: Stored, repository: MongoDBSessionRepository, factory: MongoDBSessionManagerFactory
) -> None:
    """By every method that exports an owner."""

    async def listed(lines: AsyncIterator[str]) -> list[str]:
        return [line async for line in lines]

    async def of_an_async_repository() -> list[str]:
        async with AsyncMongoDBSessionRepository(server, full.database.name) as target:
            return await listed(target.export_owner(ADA))

    alone = [line for session_id in HERS for line in repository.export_session(session_id)]
    for lines in (
        list(repository.export_owner(ADA)),
        list(factory.export_owner(ADA)),
        asyncio.run(of_an_async_repository()),
        asyncio.run(listed(factory.export_owner_async(ADA))),
    ):
        assert without_times(lines) == without_times(alone)
        assert [json.loads(line)["session_id"] for line in lines if line.startswith('{"format"')] == HERS
        assert len(lines) == len(alone)


def test_nobodys_export_is_empty(full: Stored, repository: MongoDBSessionRepository) -> None:
    assert list(repository.export_owner("carol")) == []
    assert list(split_export([])) == []


def test_the_oldest_session_comes_first_and_one_without_a_date_is_not_forgotten(
    stored: Stored, repository: MongoDBSessionRepository
) -> None:
    undated = session("undated", owner=ADA)
    del undated["created_at"]
    later = session("a", owner=ADA, created_at=START.replace(year=2027))
    stored.insert_many([later, undated, session("b", owner=ADA), session("c", owner=ADA, state="own")])
    state = {"state": "deleting", "state_until": START}
    stored.insert_one({"_id": "gone", "owner": ADA, "incarnation": ObjectId(), **state})
    found = [json.loads(next(lines))["session_id"] for lines in split_export(repository.export_owner(ADA))]
    assert found == ["undated", "b", "c", "a"]


def test_a_reader_that_stops_early_has_cost_what_it_has_read(
    factory: MongoDBSessionManagerFactory, commands: CommandLog, stored: Stored
) -> None:
    stored.insert_many(session(f"s{number}", owner=ADA) for number in range(50))
    lines = factory.export_owner(ADA)
    assert commands.names == []
    assert json.loads(next(lines))["session_id"] == "s0"
    lines.close()
    assert commands.names == ["find", "find"]


# Sessions that change meanwhile.


def test_a_session_that_is_deleted_before_it_is_reached_is_left_out(
    full: Stored, repository: MongoDBSessionRepository
) -> None:
    export = repository.export_owner(ADA)
    lines = [next(export)]
    repository.delete_session(HERS[1])
    lines += export
    assert [json.loads(line)["session_id"] for line in lines if line.startswith('{"format"')] == [HERS[0], HERS[2]]


def test_an_error_names_the_session_that_disappears_within_the_export(
    full: Stored, repository: MongoDBSessionRepository
) -> None:
    export = repository.export_owner(ADA)
    next(export)
    repository.delete_session(HERS[0])
    with pytest.raises(SessionNotFoundError, match=f"session '{HERS[0]}'"):
        list(export)


def test_an_error_names_the_session_that_cannot_be_exported(full: Stored, repository: MongoDBSessionRepository) -> None:
    incarnation = full.find_one({"_id": HERS[1]})["incarnation"]  # type: ignore[index]
    full.database["agent_sessions_attachments.chunks"].delete_many({"_id.file.incarnation": incarnation})
    lines: list[str] = []
    with pytest.raises(AttachmentError, match=f"session '{HERS[1]}'"):
        lines.extend(repository.export_owner(ADA))
    full.update_one({"_id": HERS[0]}, {"$set": {"metadata": "malformed"}})
    with pytest.raises(Exception, match=f"^(?!.*session.*session).*'{HERS[0]}'"):
        list(repository.export_owner(ADA))


# Dividing the lines.

SESSIONS = [
    ['{"format": "f", "session_id": "a"}\n', '{"session": {}}\n', '{"end": {"agents": 0}}\n'],
    ['{"format": "f", "session_id": "b"}\n', '{"session": {"end": {}}}\n', ' { "end" : {"agents": 0}}\n'],
    ['{"format": "f", "session_id": "c"}\n', '{"message": {"content": "{\\"end\\": 1}"}}\n', '{"end":{}}'],
]
LINES = [line for lines in SESSIONS for line in lines]


def test_lines_are_divided_after_the_last_of_each_session() -> None:
    assert list(map(list, split_export(LINES))) == SESSIONS
    assert list(map(list, split_export(line.encode() for line in LINES))) == [
        [line.encode() for line in lines] for lines in SESSIONS
    ]


def test_blank_lines_are_skipped_and_lines_need_no_line_feed() -> None:
    spaced = ["\n", *(part for line in LINES for part in (line.strip(), " \r\n"))]
    assert list(map(list, split_export(spaced))) == [[line.strip() for line in lines] for lines in SESSIONS]


def test_what_is_not_read_is_skipped() -> None:
    assert [next(lines) for lines in split_export(LINES)] == [lines[0] for lines in SESSIONS]
    assert len(list(split_export(LINES))) == len(SESSIONS)


def test_lines_are_read_when_they_are_needed() -> None:
    read = []
    sessions = split_export(read.append(line) or line for line in LINES)  # type: ignore[func-returns-value]
    assert read == []
    next(next(sessions))
    assert read == LINES[:1]


def test_a_truncated_export_is_refused_at_its_last_session(full: Stored, repository: MongoDBSessionRepository) -> None:
    lines = list(repository.export_owner(ADA))[:-3]
    repository.erase_owner(ADA)
    imported = []
    with pytest.raises(InvalidArgumentError, match="truncated"):
        imported.extend(repository.import_session(each) for each in split_export(lines))
    assert sorted(each.session_id for each in repository.list_sessions(owner=ADA).sessions) == HERS[:2]


def test_a_session_that_exists_can_be_skipped(full: Stored, repository: MongoDBSessionRepository) -> None:
    """An import that is refused has read a part of its lines."""
    lines = list(repository.export_owner(ADA))
    repository.delete_session(HERS[1])
    imported = []
    for each in split_export(lines):
        try:
            imported.append(repository.import_session(each))
        except ValueError:
            continue
    assert imported == [HERS[1]]
