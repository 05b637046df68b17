"""Sessions that version 1.0.0 has stored, for tests; `fixtures/v1.0.0/make.py` says how they were made."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pymongo
from bson import json_util
from pymongo.database import Database

from support import bson_of

HERE = Path(__file__).parent / "fixtures" / "v1.0.0"
EXPIRING = "v100-expiring"

EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text())
"""What 1.0.0 answers about each session: its configurations, messages, metadata, feedbacks and usage."""

UNFINISHED = ("v100-half-deleted", "v100-half-forked-1", "v100-half-imported-1")
"""Ids under which 1.0.0 left parts of a session without a document."""

OUTSIDE = ("_archive", "_attachments.files", "_attachments.chunks")


@cache
def _documents() -> dict[str, list[dict[str, Any]]]:
    """Return all documents by collection."""
    options = json_util.CANONICAL_JSON_OPTIONS.with_options(tz_aware=True, tzinfo=UTC)
    documents: dict[str, list[dict[str, Any]]] = {}
    for line in (HERE / "collections.jsonl").read_text().splitlines():
        found = json_util.loads(line, json_options=options)
        documents.setdefault(found["collection"], []).append(found["document"])
    return documents


def load(database: Database[dict[str, Any]], collection: str = "agent_sessions", age: timedelta = timedelta(0)) -> None:
    """Store all of it, with 1.0.0's indexes; the session that expires was last written to `age` ago."""
    indexes = json.loads((HERE / "indexes.json").read_text())
    for name in _documents():
        target = collection + name.removeprefix("agent_sessions")
        database.create_collection(target)
        if indexes[name]:
            wanted = [{key: value for key, value in index.items() if key != "v"} for index in indexes[name]]
            database.command({"createIndexes": target, "indexes": wanted})
    load_again(database, collection, age)


def load_again(
    database: Database[dict[str, Any]],
    collection: str = "agent_sessions",
    age: timedelta = timedelta(0),
    only: str | None = None,
) -> None:
    """Store all of it, or one session, in the place of what is there."""
    documents, later = _documents(), _since_expiring(age)
    for name in database.list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}}):
        database[name].delete_many({})
    for name, found in documents.items():
        wanted = [each for each in found if only in (None, _session_of(each))]
        moved = [_later(each, later) if _session_of(each) == EXPIRING else each for each in wanted]
        database[collection + name.removeprefix("agent_sessions")].insert_many(moved)


def load_as(database: Database[dict[str, Any]], session_id: str, new_id: str, age: timedelta | None = None) -> None:
    """Store one of the sessions under another id; with `age`, the session that expires, last written to `age` ago."""
    later = timedelta(0) if age is None else _since_expiring(age)
    options = json_util.CANONICAL_JSON_OPTIONS.with_options(tz_aware=True, tzinfo=UTC)
    for line in (HERE / "collections.jsonl").read_text().splitlines():
        if f'"{session_id}"' in line:
            found = json_util.loads(line.replace(f'"{session_id}"', json.dumps(new_id)), json_options=options)
            if _session_of(found["document"]) == new_id:
                database[found["collection"]].insert_one(_later(found["document"], later))


def export_of(session_id: str) -> list[str]:
    """Return the lines that 1.0.0 exported."""
    return (HERE / f"{session_id}.export.jsonl").read_text().splitlines(keepends=True)


def shown(expected: Iterable[dict[str, Any]]) -> list[str]:
    """Return the texts of messages in `EXPECTED`, as an agent restores them."""
    contents = [(message["redact_message"] or message["message"])["content"] for message in expected]
    return ["".join(block.get("text", "") for block in content) for content in contents]


def left_under_old_ids(database: Database[dict[str, Any]]) -> dict[str | None, list[Any]]:
    """Return the ids of everything outside the documents that is where 1.0.0 kept it, by session."""
    left: dict[str | None, list[Any]] = defaultdict(list)
    for suffix in OUTSIDE:
        for found in database[f"agent_sessions{suffix}"].find({}, {"_id": 1}):
            left[_session_of(found)].append(found["_id"])
    return left


def traces(database: Database[dict[str, Any]], *session_ids: str) -> set[str]:
    """Return the collections in which one of the ids occurs anywhere, as bytes of BSON."""
    return {
        name
        for name in database.list_collection_names()
        for batch in bson_of(database[name])
        if any(session_id.encode() in batch for session_id in session_ids)
    }


def all_that_is_stored(database: Database[dict[str, Any]]) -> dict[str, list[bytes]]:
    """Return every document of a database as bytes, by collection."""
    with pymongo.timeout(30):
        return {
            name: sorted(bson_of(database[name], sort=[("_id", 1)]))
            for name in sorted(database.list_collection_names())
        }


def _since_expiring(age: timedelta) -> timedelta:
    """Return the time from the last write to the session that expires until `age` ago."""
    written: datetime = next(each["updated_at"] for each in _documents()["agent_sessions"] if each["_id"] == EXPIRING)
    return datetime.now(UTC) - age - written


def _session_of(document: dict[str, Any]) -> str | None:
    found: Any = document["_id"]
    owner: str | None = (
        found if isinstance(found, str) else found.get("session_id") or found.get("file", {}).get("session_id")
    )
    return owner


def _later(value: Any, time: timedelta) -> Any:
    if isinstance(value, datetime):
        return value + time
    if isinstance(value, dict):
        return {key: _later(item, time) for key, item in value.items()}
    return [_later(item, time) for item in value] if isinstance(value, list) else value
