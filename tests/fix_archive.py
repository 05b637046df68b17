"""What tests of long sessions share: short limits, messages that say their number, what is stored where."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import bson
import pymongo
from bson import ObjectId
from bson.raw_bson import RawBSONDocument
from pymongo.collection import Collection
from pymongo.monitoring import CommandListener
from strands import tool
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from mongodb_session_manager import MongoDBSessionManagerFactory, MongoDBSessionRepository
from mongodb_session_manager._format.buckets import Head, Limits, cut, merge
from mongodb_session_manager._format.changes import AppendMessage
from mongodb_session_manager._format.documents import stored_message
from mongodb_session_manager._format.ids import agent_key
from mongodb_session_manager._format.retention import UNDATED
from support import agent, bson_of, eventually, texts

Stored = Collection[dict[str, Any]]


Driver = pymongo.MongoClient[dict[str, Any]]


MOMENT = "2026-11-22T12:00:00+00:00"


SECRET = "my card is 4111-1111"


SMALL: dict[str, Any] = {"max_embedded_messages": 8}


def said(message_id: int, text: str | None = None, role: str | None = None) -> SessionMessage:
    role = role or ("user", "assistant")[message_id % 2]
    body: Any = {
        "role": role,
        "content": [{"text": f"text {message_id}" if text is None else text}],
        "tracking_id": f"t{message_id}",
    }
    return SessionMessage(body, message_id, None, MOMENT, MOMENT)


def redacted(message_id: int, text: str = "[redacted]") -> SessionMessage:
    message = said(message_id, SECRET)
    message.redact_message = {"role": "user", "content": [{"text": text}]}
    return message


def told(messages: list[SessionMessage]) -> list[str]:
    return texts([message.to_message() for message in messages])


def expected(count: int, begin: int = 0) -> list[str]:
    return [f"text {n}" for n in range(begin, count)]


def with_agent(stored: Stored, agent_id: str) -> dict[str, Any]:
    """Return the session document with the one agent."""
    (document,) = stored.find({"_id": "s"}, {"incarnation": 1, f"agents.{agent_key(agent_id)}": 1})
    return document


def head(stored: Stored, agent_id: str = "agent") -> dict[str, Any]:
    found: dict[str, Any] = with_agent(stored, agent_id)["agents"][agent_key(agent_id)]
    return found


def document_size(stored: Stored) -> int:
    """Return the size of the session document in bytes."""
    (found,) = stored.aggregate([{"$match": {"_id": "s"}}, {"$project": {"size": {"$bsonSize": "$$ROOT"}}}])
    size: int = found["size"]
    return size


def archive_of(stored: Stored) -> Stored:
    return stored.database["agent_sessions_archive"]


def everything(stored: Stored, agent_id: str = "agent") -> list[str]:
    """Read what is stored, without the library: the valid buckets in order, then the head."""
    session = with_agent(stored, agent_id)
    document = session["agents"][agent_key(agent_id)]
    condition = {"_id.incarnation": session["incarnation"], "_id.agent": agent_key(agent_id)}
    buckets = sorted(archive_of(stored).find(condition), key=lambda bucket: bucket["_id"]["first"])
    valid = [bucket for bucket in buckets if bucket["_id"]["first"] < document.get("archived", 0)]
    return texts([message for part in [*valid, document] for message in part["messages"]])


def settled(stored: Stored, limit: int = 8, agent_id: str = "agent") -> None:
    """Wait until the head is within its limit."""
    eventually(lambda: len(head(stored, agent_id)["messages"]) <= limit)


def idle(of: MongoDBSessionRepository | MongoDBSessionManagerFactory) -> None:
    """Wait until nothing runs in the background."""
    connection = (of._async if isinstance(of, MongoDBSessionRepository) else of)._connection
    eventually(lambda: not connection._tasks)


@contextmanager
def started(
    server: str, database: str, listener: CommandListener | None = None, **options: Any
) -> Iterator[MongoDBSessionRepository]:
    """Yield the repository of a process that has sent the commands that it sends once."""
    with MongoDBSessionRepository(
        server, database, event_listeners=[] if listener is None else [listener], **options
    ) as repository:
        repository.list_sessions()
        idle(repository)
        yield repository


def in_database(driver: Driver, database: str, text: str = "card is 4111") -> bool:
    names = driver[database].list_collection_names()
    assert "agent_sessions" in names
    return any(text.encode() in batch for name in names for batch in bson_of(driver[database][name]))


def emptied(stored: Stored) -> Stored:
    """Remove what earlier tests have stored, also in the collections of archives and attachments."""
    for name in stored.database.list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}}):
        stored.database[name].delete_many({})
    return stored


def documents_of(stored: Stored) -> dict[str, list[Any]]:
    """Return what is stored, by collection, so that other tests begin with it."""
    names = stored.database.list_collection_names(filter={"name": {"$regex": r"^(?!system\.)"}})
    return {name: found for name in names if (found := list(stored.database[name].find()))}


def store_again(stored: Stored, documents: dict[str, list[Any]], renamed: Mapping[str, str] | None = None) -> None:
    """Store documents again, each session with a new incarnation, so that it is another one for every client.

    Args:
        stored: The sessions.
        documents: The documents, by collection.
        renamed: New ids of sessions, as long as the old ones, which must occur nowhere else.
    """
    new = {each["incarnation"].binary: ObjectId().binary for each in documents["agent_sessions"]}
    new |= {before.encode(): after.encode() for before, after in (renamed or {}).items()}

    def renewed(document: Any) -> RawBSONDocument:
        data = bson.encode(document)
        for before, after in new.items():
            data = data.replace(before, after)
        return RawBSONDocument(data)

    for name, found in documents.items():
        stored.database[name].insert_many(map(renewed, found))


def begin(repository: MongoDBSessionRepository, agent_id: str = "agent") -> None:
    repository.create_session(Session("s", SessionType.AGENT, MOMENT, MOMENT))
    repository.create_agent("s", SessionAgent(agent_id, {}, {}, {}, MOMENT, MOMENT))


def append(repository: MongoDBSessionRepository, *message_ids: int, agent_id: str = "agent") -> None:
    for message_id in message_ids:
        repository.create_message("s", agent_id, said(message_id))


def appends(message_ids: Iterable[int], text: str = "text {}", agent_id: str = "agent") -> list[AppendMessage]:
    """The changes that append messages, to be stored with `apply` in one command."""
    return [AppendMessage(agent_id, stored_message(said(n, text.format(n)), n)) for n in message_ids]


def talk(factory: MongoDBSessionManagerFactory, turns: int, **options: Any) -> None:
    """Let an agent of the session "s" answer q0, q1, ... with a0, a1, ..."""
    with factory.create_session_manager("s") as manager:
        one = agent(manager, *[f"a{n}" for n in range(turns)], **options)
        for n in range(turns):
            one(f"q{n}")


def said_in(turns: int) -> list[str]:
    return [text for n in range(turns) for text in (f"q{n}", f"a{n}")]


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"It rains in {city}."


FIVES = [range(first, end) for first, end in itertools.pairwise((0, 9, 14, 19, 24, 29, 30))]
"""The ids of 30 messages; whoever appends one part after the other makes buckets of five messages."""


class Other:
    """Another process that moves messages, one command at a time."""

    def __init__(self, stored: Stored, limit: int = 8) -> None:
        self.stored, self.limits = stored, Limits(limit, 2**20)
        document = head(stored)
        self.head = Head.of(
            {
                "created_at": document["created_at"],
                "archived": document.get("archived", 0),
                "revision": document.get("revision", 0),
                "next_message_id": document["next_message_id"],
                "count": len(document["messages"]),
                "bytes": 0,
                "removed": 0,
                "session": stored.find_one({"_id": "s"}),
            }
        )
        self.step = self.limits.step(self.head)

    def merge(self) -> None:
        self.stored.aggregate(merge("s", "agent", self.head, self.step, "agent_sessions_archive", UNDATED))

    def cut(self) -> bool:
        statement = cut("s", "agent", self.head, self.step, UNDATED)
        return bool(self.stored.update_one(statement.filter, statement.update).matched_count)
