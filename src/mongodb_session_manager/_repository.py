"""The asynchronous core: every command that reaches MongoDB is sent from here."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError
from strands.types.session import Session, SessionAgent, SessionMessage

from ._annotations import SessionAnnotations
from ._changes import (
    AgentWrite,
    AppendMessage,
    Change,
    CreateAgent,
    ReplaceMessage,
    StoredView,
    Update,
    UpdateAgent,
    compile_update,
    fold,
    reconcile,
)
from ._connection import Client, Connection, Settings
from ._documents import (
    Document,
    agent_from,
    agent_key,
    agent_state,
    checked_id,
    checked_message_id,
    message_body,
    message_from,
    new_agent,
    new_session,
    next_message_id,
    now,
    session_from,
    stored_message,
    to_date,
)
from ._finding import SessionFinding
from .errors import (
    DatabaseError,
    InvalidArgumentError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionExistsError,
    SessionNotFoundError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ROUNDS = 8
"""How often a write may find the session changed under its hands before it gives up."""

_RESTORE: Document = {
    "session_id": 1,
    "application_name": 1,
    "session_type": 1,
    "created_at": 1,
    "updated_at": 1,
    # All agents, each message without its metrics: they grow with the conversation and nobody restores them.
    "agents": {
        "$arrayToObject": {
            "$map": {
                "input": {"$objectToArray": {"$ifNull": ["$agents", {}]}},
                "as": "agent",
                "in": {
                    "k": "$$agent.k",
                    "v": {
                        "agent_data": "$$agent.v.agent_data",
                        "created_at": "$$agent.v.created_at",
                        "updated_at": "$$agent.v.updated_at",
                        "next_message_id": "$$agent.v.next_message_id",
                        "messages": {
                            "$map": {
                                "input": {"$ifNull": ["$$agent.v.messages", []]},
                                "as": "message",
                                "in": {"$unsetField": {"field": "event_loop_metrics", "input": "$$message"}},
                            }
                        },
                    },
                },
            }
        }
    },
}


class AsyncMongoDBSessionRepository(SessionAnnotations, SessionFinding):
    """Sessions in a MongoDB collection, one document each.

    Every method is a coroutine on the event loop the repository was first used on. Methods named like those of
    `strands.session.SessionRepository` do what Strands says of them.

    Args:
        connection_string: Where MongoDB is; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` takes the one named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        client: An `AsyncIOMotorClient` or `AsyncMongoClient` that the caller owns; it is never closed.
        application_name: Stored in sessions that this repository creates.
        metadata_fields: Fields of `metadata` that get an index each.
        **client_options: Options of PyMongo's `MongoClient`, like `maxPoolSize`.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    def __init__(
        self,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str = "agent_sessions",
        *,
        client: Client | None = None,
        application_name: str | None = None,
        metadata_fields: Sequence[str] | None = None,
        **client_options: Any,
    ) -> None:
        connection = Connection(Settings.checked(connection_string, client, client_options))
        self._bind(connection, database_name, collection_name, application_name, metadata_fields)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._database_name}.{self._collection_name}, {self._connection!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Wait for what is under way and close the client, if it is the repository's own. Idempotent."""
        await self._connection.aclose()

    async def ping(self) -> None:
        """Raise unless the server answers.

        Raises:
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        await self._connection.ping()

    # The life of a session, in one command each.

    async def open_session(self, session_id: str) -> Document:
        """Return what restoring a session needs, from one command that creates the session if it is new.

        The document holds everything but metadata, feedbacks, guardrail events and the metrics of messages. Its
        first opening gives an agent of a version before 1.0 its `next_message_id`, in a second command.
        """
        checked_id(session_id, "session_id")
        fresh: dict[str, Any] = dict(new_session(session_id, self._application_name, now()))
        fresh.pop("_id")
        async with self._connection.operation():
            for _ in range(_ROUNDS):
                document = await self._create_or_read(session_id, fresh)
                agents: dict[str, Document] = document["agents"]
                unnumbered = [key for key, agent in agents.items() if agent.get("next_message_id") is None]
                if not unnumbered or await self._adopt(session_id, agents, unnumbered):
                    self._ensure_indexes()
                    return document
        raise DatabaseError(f"session {session_id!r} was changed again and again while it was opened")

    async def _create_or_read(self, session_id: str, fresh: Document) -> Document:
        for _ in range(_ROUNDS):
            try:
                document = await self._send(
                    lambda collection: collection.find_one_and_update(
                        {"_id": session_id},
                        {"$setOnInsert": fresh},
                        projection=_RESTORE,
                        upsert=True,
                        return_document=ReturnDocument.AFTER,
                    )
                )
            except DuplicateKeyError:
                continue  # another process created it in the same moment
            if document is not None:
                return document
        raise DatabaseError(f"session {session_id!r} could neither be read nor created")

    async def _adopt(self, session_id: str, agents: dict[str, Document], keys: Iterable[str]) -> bool:
        """Give agents of versions before 1.0 their `next_message_id`, unless somebody writes to them meanwhile.

        Those versions did not encode ids, so an agent whose id holds `%` or `$` moves to its key.
        """
        condition: Document = {"_id": session_id}
        adopted: Document = {}
        moved = []
        for old in keys:
            agent, new = agents[old], agent_key(old)
            messages = agent.get("messages") or []
            agent["next_message_id"] = next_message_id(messages)
            condition[f"agents.{old}"] = {"$exists": True}
            condition[f"agents.{old}.next_message_id"] = None
            condition[f"agents.{old}.messages"] = {"$size": len(messages)} if messages else {"$in": [None, []]}
            number = {"next_message_id": agent["next_message_id"]}
            adopted[f"agents.{new}"] = {"$mergeObjects": [f"$agents.{old}", number]}
            if new != old:
                condition[f"agents.{new}"] = {"$exists": False}
                moved.append(old)
        stages: list[Document] = [{"$set": adopted}]
        if moved:
            stages.append({"$unset": [f"agents.{old}" for old in moved]})
        for old in moved:
            agents[agent_key(old)] = agents.pop(old)
        return await self._update(Update(condition, stages, None))

    async def apply(self, session_id: str, changes: Iterable[Change]) -> dict[str, MongoDBSessionError]:
        """Store recorded changes, in one command unless another writer was there; exactly once, whatever gets lost.

        Returns:
            By agent id, why that agent's changes could not be stored: `SessionConflictError`, `AgentNotFoundError`,
            `MessageNotFoundError`, `SessionNotFoundError` or `MessageTooLargeError`. The changes of all other agents
            are stored.

        Raises:
            MongoDBSessionError: It is unknown whether the changes are stored. The same changes may be applied again.
        """
        checked_id(session_id, "session_id")
        refused: dict[str, MongoDBSessionError] = {}
        async with self._connection.operation():
            await self._write(session_id, fold(changes), refused)
        return refused

    async def _write(
        self, session_id: str, writes: dict[str, AgentWrite], refused: dict[str, MongoDBSessionError]
    ) -> None:
        for _ in range(_ROUNDS):
            if not writes:
                return
            try:
                if await self._update(compile_update(session_id, writes.values())):
                    return
            except MessageTooLargeError as error:
                if len(writes) == 1:
                    refused.update(dict.fromkeys(writes, error))
                else:  # let nobody suffer for another agent's message
                    for agent_id, write in writes.items():
                        await self._write(session_id, {agent_id: write}, refused)
                return
            writes = await self._remaining(session_id, writes, refused)
        raise DatabaseError(f"session {session_id!r} was changed again and again while it was written")

    async def _remaining(
        self, session_id: str, writes: Mapping[str, AgentWrite], refused: dict[str, MongoDBSessionError]
    ) -> dict[str, AgentWrite]:
        """Compare writes that matched nothing with what is stored; return those to send, note those refused."""
        fields = [
            f"agents.{agent_key(agent_id)}.{field}"
            for agent_id in writes
            for field in ("next_message_id", "messages.message_id", "messages.message", "messages.created_at")
        ]
        document = await self._find(session_id, dict.fromkeys(fields, 1))
        agents: dict[str, Document] = {} if document is None else document.get("agents", {})
        unnumbered = [key for key, agent in agents.items() if agent.get("next_message_id") is None]
        if unnumbered and not await self._adopt(session_id, agents, unnumbered):
            return dict(writes)
        remaining: dict[str, AgentWrite] = {}
        for agent_id, write in writes.items():
            if document is None:
                refused[agent_id] = SessionNotFoundError(f"session {session_id!r} does not exist any more")
                continue
            try:
                rest = reconcile(write, _view(agents.get(agent_key(agent_id))))
            except MongoDBSessionError as error:
                refused[agent_id] = error
            else:
                if rest is not None:
                    remaining[agent_id] = rest
        return remaining

    # Strands' own repository methods.

    async def create_session(self, session: Session, **kwargs: Any) -> Session:
        """Create a session.

        Raises:
            SessionExistsError: There is one of that id.
        """
        document = new_session(
            checked_id(session.session_id, "session_id"), self._application_name, to_date(session.created_at)
        )
        async with self._connection.operation():
            try:
                await self._send(lambda collection: collection.insert_one(document))
            except DuplicateKeyError as error:
                raise SessionExistsError(f"session {session.session_id!r} exists already") from error
            self._ensure_indexes()
        return session

    async def read_session(self, session_id: str, **kwargs: Any) -> Session | None:
        """Return a session, `None` if there is none of that id."""
        document = await self._find(session_id, {"session_type": 1, "created_at": 1, "updated_at": 1})
        return None if document is None else session_from(document)

    async def create_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Create an agent without messages; one that exists already is left as it is.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        await self._apply_one(session_id, CreateAgent(session_agent.agent_id, new_agent(session_agent)))

    async def read_agent(self, session_id: str, agent_id: str, **kwargs: Any) -> SessionAgent | None:
        """Return an agent, `None` if the session holds none of that id.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        key = agent_key(agent_id)
        names = ("agent_data", "created_at", "updated_at")
        document = await self._found(session_id, {f"agents.{key}.{name}": 1 for name in names})
        stored = document.get("agents", {}).get(key)
        return None if stored is None else agent_from(agent_id, stored)

    async def update_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Store an agent's state; its creation date and configuration stay.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
        """
        change = UpdateAgent(session_agent.agent_id, None, agent_state(session_agent), now())
        await self._apply_one(session_id, change)

    async def create_message(
        self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any
    ) -> None:
        """Append a message, whose `message_id` must be the one that follows the last.

        Raises:
            SessionConflictError: The agent has a message of that id already, or not yet the one before it.
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
        """
        message = stored_message(session_message, checked_message_id(session_message.message_id))
        await self._apply_one(session_id, AppendMessage(agent_id, message))

    async def read_message(
        self, session_id: str, agent_id: str, message_id: int, **kwargs: Any
    ) -> SessionMessage | None:
        """Return a message, `None` if the agent holds none of that id.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
        """
        checked_id(session_id, "session_id")
        path = f"agents.{agent_key(agent_id)}.messages"
        condition = {"_id": session_id, f"{path}.message_id": checked_message_id(message_id)}
        async with self._connection.operation():
            document = await self._send(lambda collection: collection.find_one(condition, {f"{path}.$": 1}))
            if document is None:
                await self._stored_agent(session_id, agent_id, {"created_at": 1})
                return None
        return message_from(document["agents"][agent_key(agent_id)]["messages"][0], message_id)

    async def update_message(
        self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any
    ) -> None:
        """Replace the content of a stored message; with `redact_message`, nothing of the original is kept.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
            MessageNotFoundError: The agent holds no message of that id.
        """
        fields = {**message_body(session_message), "updated_at": now()}
        message_id = checked_message_id(session_message.message_id)
        await self._apply_one(session_id, ReplaceMessage(agent_id, message_id, fields))

    async def list_messages(
        self, session_id: str, agent_id: str, limit: int | None = None, offset: int = 0, **kwargs: Any
    ) -> list[SessionMessage]:
        """Return messages of an agent, oldest first.

        Args:
            session_id: The session.
            agent_id: The agent.
            limit: At most so many; `None` for all.
            offset: Leave out so many of the oldest.
            **kwargs: Accepted because Strands may pass more one day; unused.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
        """
        if offset < 0 or (limit is not None and limit < 0):
            raise InvalidArgumentError("limit and offset must not be negative")
        if limit == 0:
            await self._stored_agent(session_id, agent_id, {"created_at": 1})
            return []
        wanted = {"messages": {"$slice": [offset, limit if limit is not None else 2**31 - 1]}, "created_at": 1}
        messages = (await self._stored_agent(session_id, agent_id, wanted)).get("messages", [])
        return [message_from(message, offset + position) for position, message in enumerate(messages)]

    async def _apply_one(self, session_id: str, change: Change) -> None:
        for error in (await self.apply(session_id, (change,))).values():
            raise error


def _view(stored: Mapping[str, Any] | None) -> StoredView | None:
    if stored is None:
        return None
    messages = stored.get("messages") or []
    by_id = {message.get("message_id", position): message for position, message in enumerate(messages)}
    return StoredView(stored["next_message_id"], by_id)
