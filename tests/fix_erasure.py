"""Sessions of an owner among those of others, and what a scan of every collection finds of the owner."""

from __future__ import annotations

import asyncio
from typing import Any

import pymongo
from bson import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo.database import Database

from fix_archive import documents_of, emptied
from fix_deletion import COUNT, fill, wait_for_moves
from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository
from support import eventually, texts

Driver = pymongo.MongoClient[dict[str, Any]]

ADA = "ada-7f3a91"
"""An owner; the ids and texts of the sessions of the owner begin with it."""

OWNERS = {f"{ADA}-1": ADA, f"{ADA}-2": ADA, f"{ADA}-3": ADA, "bob-1": "bob", "free-1": None}
"""The owner of each session."""

HERS = [session_id for session_id, owner in OWNERS.items() if owner == ADA]

SMALL: dict[str, Any] = {"max_embedded_messages": 8, "max_inline_attachment_bytes": 1000}


def fill_all(server: str, database: Database[dict[str, Any]], owners: dict[str, str | None] = OWNERS) -> None:
    """Store sessions, each with archived messages, with attachments, and with values in its storage."""
    with MongoDBSessionRepository(server, database.name, **SMALL) as repository:
        for session_id, owner in owners.items():
            fill(repository, session_id, text=f"{owner} said")
            if owner is not None:
                repository.claim_session(session_id, owner)
            wait_for_moves(database["agent_sessions"], session_id)
        eventually(lambda: not repository._async._connection._tasks)
    with MongoDBSessionManagerFactory(server, database.name) as factory:
        for session_id, owner in owners.items():
            storage = factory.create_session_manager(session_id, owner=owner).storage
            for key in ("own", f"context/{session_id}/scopes/agent/agent/{owner} said3_0"):
                asyncio.run(storage.write(key, f"{owner} said".encode() * 10))


def prepared(server: str, database: Database[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the documents of the sessions of `OWNERS`, by collection."""
    stored = emptied(database["agent_sessions"])
    fill_all(server, database)
    return documents_of(stored)


def documents_by(database: Database[dict[str, Any]], *texts: str, of_owner: bool) -> dict[str, list[bytes]]:
    """Return the documents that contain one of the texts anywhere, or all others, as bytes by collection."""
    raw: CodecOptions[Any] = CodecOptions(document_class=RawBSONDocument)
    found = {
        name: [
            data
            for document in database[name].with_options(raw).find({}, sort=[("_id", 1)])
            if any(text.encode() in (data := bytes(document.raw)) for text in texts) is of_owner
        ]
        for name in sorted(database.list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}}))
    }
    return {name: documents for name, documents in found.items() if documents}


def left(database: Database[dict[str, Any]], owner: str = ADA) -> dict[str, int]:
    """Return the number of documents of an owner by collection."""
    return {name: len(found) for name, found in documents_by(database, owner, of_owner=True).items()}


def others(database: Database[dict[str, Any]], owner: str = ADA) -> dict[str, list[bytes]]:
    return documents_by(database, owner, of_owner=False)


def check_listed(repository: MongoDBSessionRepository, owner: str = ADA) -> list[str]:
    """Check that every listed session of an owner is whole; return the ids."""
    listed = [each.session_id for each in repository.list_sessions(owner=owner).sessions]
    for session_id in listed:
        messages = repository.list_messages(session_id, "agent", owner=owner)
        assert len(messages) == COUNT
        assert len({*texts([message.to_message() for message in messages])}) == COUNT
        assert sum("image" in block for message in messages for block in message.message["content"]) == 2
    return listed
