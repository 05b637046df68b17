"""A session with parts in every collection, and what is left of it: for tests of deletion, expiry and copies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pymongo
from pymongo.collection import Collection
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from mongodb_session_manager import MongoDBSessionRepository
from mongodb_session_manager._format.changes import AppendMessage
from mongodb_session_manager._format.documents import stored_message
from support import apply, bson_of, client_of, eventually, texts

Driver = pymongo.MongoClient[dict[str, Any]]
Stored = Collection[dict[str, Any]]

ID = "session-7f3a91"
MOMENT = "2026-11-22T12:00:00+00:00"
SMALL: dict[str, Any] = {"max_embedded_messages": 8, "max_inline_attachment_bytes": 1000}
PICTURE = bytes(range(256)) * 16
COUNT = 24


def said(message_id: int, picture: bytes | None = None, text: str = "text") -> SessionMessage:
    image: Any = {"image": {"format": "png", "source": {"bytes": picture}}}
    content: Any = [{"text": f"{text} {message_id}"}, *([image] if picture else [])]
    role: Any = ("user", "assistant")[message_id % 2]
    return SessionMessage(
        {"role": role, "content": content, "tracking_id": f"{text}{message_id}"}, message_id, None, MOMENT, MOMENT
    )


def fill(repository: MongoDBSessionRepository, session_id: str = ID, text: str = "text") -> None:
    """Make a session with messages in two buckets and more, and with attachments in both places."""
    repository.create_session(Session(session_id, SessionType.AGENT, MOMENT, MOMENT))
    repository.create_agent(session_id, SessionAgent("agent", {}, {}, {}, MOMENT, MOMENT))
    for first, end in itertools.pairwise((0, 2, 3, 10, 17, COUNT - 1, COUNT)):  # so that several buckets are made
        if first in (2, COUNT - 1):
            repository.create_message(session_id, "agent", said(first, text.encode() + PICTURE[first:], text))
        else:
            messages = [stored_message(said(n, text=text), n) for n in range(first, end)]
            apply(repository, session_id, [AppendMessage("agent", message) for message in messages])
    repository.update_metadata(session_id, {"colour": "red"})
    repository.add_feedback(session_id, {"rating": "up"})


def wait_for_moves(stored: Stored, session_id: str = ID) -> None:
    eventually(lambda: len(next(stored.find({"_id": session_id}))["agents"]["agent"]["messages"]) <= 8)


def is_whole(repository: MongoDBSessionRepository, session_id: str = ID, text: str = "text") -> bool:
    messages = repository.list_messages(session_id, "agent")
    pictures = [block for m in messages for block in m.message["content"] if "image" in block]
    return texts([m.to_message() for m in messages]) == [f"{text} {n}" for n in range(COUNT)] and len(pictures) == 2


def traces(driver: Driver, database: str, session_id: str = ID) -> set[str]:
    """The collections in which the id occurs anywhere, as bytes of BSON."""
    return {
        name
        for name in driver[database].list_collection_names()
        if any(session_id.encode() in batch for batch in bson_of(driver[database][name]))
    }


EVERYWHERE = {
    "agent_sessions",
    "agent_sessions_archive",
    "agent_sessions_attachments.files",
    "agent_sessions_attachments.chunks",
}


@contextmanager
def failing_after(uri: str, skipped: int, **data: Any) -> Iterator[None]:
    """Let the first so many of some commands pass, and none that follow."""
    with client_of(uri) as client:
        client.admin.command({"configureFailPoint": "failCommand", "mode": {"skip": skipped}, "data": data})
        try:
            yield
        finally:
            client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})
