"""What tests of attachments share: files of some sizes, and what is in GridFS."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pymongo
from strands import Agent
from strands.types.session import SessionMessage

from mongodb_session_manager import (
    MongoDBSessionManagerFactory,
)
from support import agent

Driver = pymongo.MongoClient[dict[str, Any]]


KIB, MIB = 1024, 1024 * 1024


FILES, CHUNKS = "agent_sessions_attachments.files", "agent_sessions_attachments.chunks"


ROOT = Path(__file__).parent


def content(size: int, seed: int = 0) -> bytes:
    """Bytes that differ from place to place, so that no two chunks are alike."""
    return random.Random(seed).randbytes(size)


SMALL, LARGE, ANOTHER = content(10 * KIB, 1), content(300 * KIB, 2), content(300 * KIB, 4)
LARGER = content(4 * MIB + KIB, 3)
"""Three chunks; `LARGE` and `ANOTHER` are one each, `SMALL` stays in its message."""


def image(data: bytes) -> Any:
    return {"image": {"format": "png", "source": {"bytes": data}}}


def document(data: bytes) -> Any:
    return {"document": {"format": "pdf", "name": "report", "source": {"bytes": data}}}


def asking(*blocks: Any) -> list[Any]:
    return [{"text": "what is this?"}, *blocks]


def conversation(live: Agent) -> list[Any]:
    """What an agent's messages say."""
    return [(message["role"], message["content"]) for message in live.messages]


def restored(factory: MongoDBSessionManagerFactory, session_id: str = "s") -> list[Any]:
    """What a new manager restores."""
    with factory.create_session_manager(session_id) as manager:
        return conversation(agent(manager))


def ids(driver: Driver, database: str, collection: str = FILES, session_id: str = "s") -> list[Any]:
    """The ids of what a session has in GridFS."""
    found = driver[database][collection].find({"session_id": session_id}, {"_id": 1}).sort("_id", 1)
    return [document["_id"] for document in found]


def hashes(driver: Driver, database: str, session_id: str = "s") -> list[str]:
    """The content of the files that a session has in GridFS; each is complete, and there are no other chunks."""
    files = ids(driver, database, FILES, session_id)
    chunks = [chunk["file"] for chunk in ids(driver, database, CHUNKS, session_id)]
    assert {str(file) for file in files} == {str(file) for file in chunks}
    return sorted(file["sha256"] for file in files)


def of(*blobs: bytes) -> list[str]:
    return sorted(map(sha256, blobs))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def said(*blocks: Any, message_id: int = 0) -> SessionMessage:
    return SessionMessage({"role": "user", "content": [{"text": "see"}, *blocks]}, message_id)


def redacted(message_id: int = 0) -> SessionMessage:
    message = said(message_id=message_id)
    message.redact_message = {"role": "user", "content": [{"text": "[gone]"}]}
    return message
