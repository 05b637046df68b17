"""`Sessions`: reading and updating session documents."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from .._format.documents import Document
from .._format.ids import agent_key, checked_id
from .._format.labels import guard
from .._format.layout import live_at
from .._format.malformed import malformed_fields
from .._format.statements import Update
from .._io.collection import Collection
from ..errors import AgentNotFoundError, AttachmentError, DatabaseError, ErrorT, SessionNotFoundError, again

T = TypeVar("T")

ROUNDS = 8
"""The number of attempts of a read or a write while the session changes."""


class ReadAgainError(Exception):
    """Parts of a session were moved elsewhere after its document was read."""


def missing_session(session_id: str) -> SessionNotFoundError:
    """Return the error for a session that does not exist, or that belongs to another owner."""
    return SessionNotFoundError(f"session {session_id!r} does not exist")


def naming_session(error: ErrorT, session_id: str, what: str) -> ErrorT:
    """Return a copy of an error whose message names the session, for operations on several sessions."""
    text = str(error)
    return again(error, text if f"session {session_id!r}" in text else f"session {session_id!r} {what}: {text}")


class Sessions:
    """The documents of a collection of sessions. Only live sessions are found."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.connection = collection.connection

    async def find(self, session_id: str, projection: Document, owner: str | None = None) -> Document | None:
        """Return fields of a session, which must belong to `owner` if one is given."""
        checked_id(session_id, "session_id")
        async with self.connection.operation():
            condition = {"_id": session_id, **guard(owner), **live_at(self.connection.now())}
            return await self.collection.find_one(condition, projection)

    async def get(self, session_id: str, projection: Document, owner: str | None = None) -> Document:
        document = await self.find(session_id, projection, owner)
        if document is None:
            raise missing_session(session_id)
        return document

    async def get_agent(self, session_id: str, agent_id: str, fields: Document, owner: str | None = None) -> Document:
        """Return values of aggregation expressions by name, for an agent.

        Raises:
            SessionNotFoundError: The session does not exist, or belongs to another owner.
            AgentNotFoundError: The session has no such agent.
        """
        is_there = {"$eq": [{"$type": f"$agents.{agent_key(agent_id)}"}, "object"]}
        document = await self.get(session_id, {"_id": 0, "agent": {"$cond": [is_there, fields, None]}}, owner)
        stored: Document | None = document["agent"]
        if stored is None:
            raise AgentNotFoundError(f"session {session_id!r} has no agent {agent_id!r}")
        return stored

    async def update(self, update: Update) -> bool:
        """Send a statement that does not count as a use of the session; return whether it matched.

        Statements that set `updated_at` are sent by `Expiry.update`.
        """
        return await self.collection.update_one({**update.filter, **live_at(self.connection.now())}, update.update)

    async def clear_nulls(self, update: Update) -> bool:
        """Remove each `null` that a refused statement writes into; return whether there was one.

        Raises:
            DatabaseError: The statement writes into a field that holds a value of another type.
        """
        stages = update.update if isinstance(update.update, list) else [update.update]
        written = {path for stage in stages for fields in stage.values() for path in fields}
        session_id = update.filter["_id"]
        odd = [
            field
            for field in malformed_fields(await self.find(session_id, {}, update.filter.get("owner")) or {})
            if any(path == field.path or path.startswith(f"{field.path}.") for path in written)
        ]
        for field in odd:
            if field.value is not None:
                raise field.error(session_id)
        if not odd:
            return False
        nulls = {field.path: "" for field in odd}
        await self.collection.update_one({"_id": session_id, **dict.fromkeys(nulls)}, {"$unset": nulls})
        return True

    async def raise_malformed(self, session_id: str) -> None:
        for field in malformed_fields(await self.find(session_id, {}) or {}):
            if field.value is not None:
                raise field.error(session_id)


async def read_consistently(session_id: str, read: Callable[[], Awaitable[T]]) -> T:
    """Return the result of a read that several commands make; read again if the session changed between them.

    A message whose attachments are missing might have been replaced since it was read.

    Raises:
        AttachmentError: The same attachments are missing when they are read again.
        DatabaseError: The session kept changing.
    """
    missing: tuple[str, ...] = ()
    for _ in range(ROUNDS):
        try:
            return await read()
        except ReadAgainError:
            continue
        except AttachmentError as error:
            if error.references == missing:
                raise
            missing = error.references
    raise DatabaseError(f"session {session_id!r} kept changing while it was read: try again later")
