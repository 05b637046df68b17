"""The asynchronous core: every command that reaches MongoDB is sent from here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Self, TypeVar

from bson import ObjectId
from pymongo import ReturnDocument
from strands.types.session import Session, SessionAgent, SessionMessage

from .._copying.copying import SessionCopying
from .._copying.write_back import SessionWriteBack
from .._format.attachment_refs import MAX_INLINE_ATTACHMENT_BYTES, checked_inline_bytes, replacement, set_aside
from .._format.buckets import MAX_EMBEDDED_BYTES, MAX_EMBEDDED_MESSAGES, Limits, head_numbers
from .._format.changes import (
    AppendMessage,
    Change,
    CreateAgent,
    Identity,
    ReplaceMessage,
    UpdateAgent,
)
from .._format.dates import now, to_date
from .._format.documents import (
    Document,
    agent_from,
    agent_state,
    message_body,
    message_from,
    needs_upgrade,
    new_agent,
    new_session,
    removed_messages,
    session_from,
    stored_message,
)
from .._format.expressions import (
    MALFORMED_AGENTS,
    array_at,
    entries_at,
    ids_left_out,
    malformed_at,
    number_at,
    restored,
    to_restore,
)
from .._format.ids import (
    agent_id_of,
    agent_key,
    checked_count,
    checked_id,
    checked_message_id,
    is_message_id,
    stored_id,
)
from .._format.layout import ARCHIVE, OF_V1, Place, live_at
from .._format.malformed import MalformedField, log_malformed, messages_from, usable_field
from .._format.retention import LIFE, Life, checked_ttl, next_date
from .._io.collection import given
from .._io.connection import AsyncCollection, Client, Connection, Settings
from .._io.driver_errors import DuplicateKeyError
from .._io.threads import compute
from .._store.archive import WrittenBackError, present
from .._store.attachments import Attachments
from .._store.migration import HAS_PARTS, is_of_v1
from .._store.writes import ROUNDS
from ..errors import (
    AttachmentError,
    DatabaseError,
    InvalidArgumentError,
    MongoDBSessionError,
    SessionExistsError,
)
from .listing import SessionFinding
from .metadata import SessionAnnotations
from .multi_agents import MultiAgentStates

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ALL = 2**31 - 1

_PATIENCE = 10.0
"""How many seconds opening waits for a session that is being imported or forked."""

_OPTIONS = (
    *("connection_string", "database_name", "collection_name", "client", "application_name", "metadata_fields"),
    *("max_inline_attachment_bytes", "max_embedded_messages", "max_embedded_bytes", "session_ttl"),
)

_RESTORE: Document = {
    "session_id": 1,
    "application_name": 1,
    "session_type": 1,
    "created_at": 1,
    "updated_at": 1,
    "multi_agents": 1,
    **LIFE,
    "removed_attachments": 1,
    **dict.fromkeys(OF_V1, 1),
    "has_parts": {"$and": [{"$eq": [{"$type": "$incarnation"}, "missing"]}, HAS_PARTS]},
    "malformed_agents": MALFORMED_AGENTS,
    # All agents, each message without its metrics, which no restored agent needs.
    "agents": {
        "$arrayToObject": {
            "$map": {
                "input": entries_at("$agents"),
                "as": "agent",
                "in": {
                    "k": "$$agent.k",
                    "v": {
                        "agent_data": "$$agent.v.agent_data",
                        "config_set": "$$agent.v.config_set",
                        "updated_at": "$$agent.v.updated_at",
                        "usage": "$$agent.v.usage",
                        "malformed_messages": malformed_at("$$agent.v.messages", "array"),
                        **head_numbers("$$agent.v"),
                        "ids": ids_left_out("$$agent.v"),
                        "messages": {
                            "$map": {
                                "input": to_restore("$$agent.v"),
                                "as": "message",
                                "in": restored("$$message"),
                            }
                        },
                    },
                },
            }
        }
    },
}


class AsyncMongoDBSessionRepository(
    SessionAnnotations, MultiAgentStates, SessionFinding, SessionCopying, SessionWriteBack
):
    """Sessions in a MongoDB collection, one document each.

    Every method is a coroutine on the event loop the repository was first used on. Methods named like those of
    `strands.session.SessionRepository` do what Strands says of them.

    Args:
        connection_string: Where MongoDB is; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` takes the one named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        client: An `AsyncIOMotorClient`, `AsyncMongoClient` or `MongoClient` that the caller owns; it is never closed.
        application_name: Stored in sessions that this repository creates.
        metadata_fields: Fields of `metadata` that get an index each.
        max_inline_attachment_bytes: Images, documents and videos of a message that together hold more bytes are kept
            in GridFS, in the bucket `<collection_name>_attachments`.
        max_embedded_messages: How many messages of an agent the session's document holds; older ones are archived.
        max_embedded_bytes: How many bytes of them it holds.
        session_ttl: Sessions expire, with archive and attachments, when nobody has written to them for this time. Each
            session has its own value; another one applies from the next write on. With `None`, expiring sessions keep
            their values, and all others do not expire.
        **client_options: Options of PyMongo's `MongoClient`, like `maxPoolSize`.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    def __init__(
        self,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str | None = "agent_sessions",
        *,
        client: Client | None = None,
        application_name: str | None = None,
        metadata_fields: Sequence[str] | None = None,
        max_inline_attachment_bytes: int | None = MAX_INLINE_ATTACHMENT_BYTES,
        max_embedded_messages: int | None = MAX_EMBEDDED_MESSAGES,
        max_embedded_bytes: int | None = MAX_EMBEDDED_BYTES,
        session_ttl: timedelta | None = None,
        **client_options: Any,
    ) -> None:
        connection = Connection(Settings.checked(connection_string, client, client_options, _OPTIONS))
        self._bind(
            connection,
            database_name,
            collection_name,
            application_name,
            metadata_fields,
            max_inline_attachment_bytes=max_inline_attachment_bytes,
            max_embedded_messages=max_embedded_messages,
            max_embedded_bytes=max_embedded_bytes,
            session_ttl=session_ttl,
        )

    def _bind(
        self,
        *args: Any,
        max_inline_attachment_bytes: int | None = None,
        max_embedded_messages: int | None = None,
        max_embedded_bytes: int | None = None,
        session_ttl: timedelta | None = None,
    ) -> None:
        super()._bind(*args)
        self._session_ttl = checked_ttl(session_ttl)
        self._max_inline = checked_inline_bytes(given(max_inline_attachment_bytes, MAX_INLINE_ATTACHMENT_BYTES))
        self._attachments = Attachments(self._connection, self._database_name, self._collection_name)
        self._limits = Limits.checked(
            given(max_embedded_messages, MAX_EMBEDDED_MESSAGES), given(max_embedded_bytes, MAX_EMBEDDED_BYTES)
        )
        self._archive_name = f"{self._collection_name}{ARCHIVE}"
        self._heads = {}
        self._lives = {}

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

        The document holds everything but metadata, feedbacks, guardrail events, the metrics of messages, and the
        messages that the agents' conversation managers have removed; `first` is the position of an agent's first
        message in it. Archived messages that restoring needs come with a second command, and attachments of messages
        with one more. One more command numbers the messages of an agent that a version before 1.0 has written to, and
        moves fields that 1.0.0 has stored elsewhere.

        Raises:
            AttachmentError: An attachment is missing or damaged.
        """
        checked_id(session_id, "session_id")
        missing: tuple[str, ...] = ()
        async with self._connection.operation():
            for _ in range(ROUNDS):
                document = await self._create_or_read(session_id)
                # The result of the driver's own second attempt at an upsert has no computed fields.
                if document.get("has_parts") or document.keys() & OF_V1:
                    await self._migrate(session_id)
                    continue
                agents: dict[str, Document] = document["agents"]
                for key in [key for key in agents if not key or "." in key]:
                    log_malformed(session_id, "agents", key)
                    del agents[key]
                for agent in agents.values():
                    agent["ids"] += map(stored_id, agent["messages"])
                of_old = [key for key, agent in agents.items() if needs_upgrade(agent)]
                gained = {} if not is_of_v1(document) else {"incarnation": ObjectId()}
                if not await self._adopt(session_id, agents, of_old, gained):
                    continue
                document |= gained
                self._learn(session_id, document)
                self._ensure_indexes()
                place = Place(session_id, document["incarnation"])
                try:
                    await self._restore_archived(place, agents)
                    await self._restore_attachments(place, document)
                except WrittenBackError:
                    continue
                except AttachmentError as error:
                    if error.references == missing:
                        raise
                    missing = error.references  # their messages can have been replaced since: read again
                    continue
                if removed := document.pop("removed_attachments", None):
                    self._connection.start(self._finish_removal(place, removed))
                return document
        raise DatabaseError(f"session {session_id!r} was changed again and again while it was opened")

    async def _finish_removal(self, place: Place, listed: Any) -> None:
        """Remove the attachments of replaced messages; log a failure."""
        try:
            async with self._connection.operation():
                await self._remove_removed(place, listed if isinstance(listed, list) else [])
        except MongoDBSessionError as error:
            logger.warning(
                "session_id=<%r>, error=<%s> | attachments of replaced messages not removed, the next opening tries "
                "again",
                place.session_id,
                error,
            )

    async def _restore_archived(self, place: Place, agents: dict[str, Document]) -> None:
        """Put before the messages of each agent those archived ones that restoring it needs."""
        session_id = place.session_id
        wanted = {}
        for key, agent in agents.items():
            self._head(session_id, key).learn(agent)
            removed, archived = removed_messages(agent), agent["archived"]
            agent["first"] = archived + agent["count"] - len(agent["messages"])
            if removed > archived + agent["count"]:
                removed = 0  # the stored count is wrong: restoring logs a warning and restores all messages
            if removed < archived:
                wanted[key] = (agent.get("created_at"), removed, archived)
                agent["first"] = removed
        if not wanted:
            return
        for key, buckets in (await self._buckets(place, wanted)).items():
            _, begin, end = wanted[key]
            messages = present(buckets, begin, end)
            if missing := end - begin - len(messages):
                await self._raise_if_written_back(place, wanted)
                logger.warning(
                    "session_id=<%r>, agent=<%r>, missing=<%d> | restoring an agent without messages that are missing "
                    "in the archive",
                    session_id,
                    key,
                    missing,
                )
            agents[key]["messages"] = messages + agents[key]["messages"]

    async def _create_or_read(self, session_id: str) -> Document:
        """Return the live session with an id; create it if there is none.

        Raises:
            SessionConflictError: The session is being imported or forked.
        """
        for _ in range(ROUNDS):
            fresh: dict[str, Any] = dict(self._new_session(session_id, self._connection.now()))
            del fresh["_id"]
            try:
                document = await self._send(
                    lambda collection: collection.find_one_and_update(
                        {"_id": session_id, **live_at(fresh["created_at"])},  # noqa: B023
                        {"$setOnInsert": fresh},  # noqa: B023
                        projection=_RESTORE,
                        upsert=True,
                        return_document=ReturnDocument.AFTER,
                    )
                )
            except DuplicateKeyError:  # it is not live, or another process created it at the same time
                with suppress(SessionExistsError):
                    await self._finish_other(session_id, _PATIENCE)
                continue
            if document is not None:
                return document
        raise DatabaseError(f"session {session_id!r} could neither be read nor created")

    def _new_session(self, session_id: str, moment: datetime) -> Document:
        document: Document = dict(new_session(session_id, self._application_name, moment))
        if (seconds := self._session_ttl) is not None:
            date = next_date(self._connection.now(), seconds)
            document |= {"time_to_live": seconds, "expires_at": date, "updated_at": self._connection.now()}
        return document

    async def _restore_attachments(self, place: Place, document: Document) -> None:
        """Put attachments back into all messages of a document."""
        messages = {agent_id_of(key): agent["messages"] for key, agent in document["agents"].items()}
        await self._attachments.restore(place, messages)

    # Strands' own repository methods.

    async def create_session(self, session: Session, **kwargs: Any) -> Session:
        """Create a session.

        Raises:
            SessionExistsError: There is one of that id.
        """
        session_id, sent = checked_id(session.session_id, "session_id"), 0
        moment = to_date(session.created_at)
        document: Document = {}

        async def insert(collection: AsyncCollection) -> None:
            nonlocal sent
            sent += 1
            await collection.insert_one(document)

        async with self._connection.operation():
            document = self._new_session(session_id, moment)
            for _ in range(ROUNDS):
                try:
                    await self._send(insert)
                    break
                except DuplicateKeyError:
                    # It can be this session, stored by an attempt whose acknowledgement was lost.
                    found = await self._find(session_id, {"incarnation": 1}) if sent > 1 else None
                    if found is not None and found.get("incarnation") == document["incarnation"]:
                        break
                await self._finish_other(session_id, _PATIENCE)
            else:
                raise DatabaseError(f"session {session_id!r} could not be created")
            self._learn(session_id, document)
            self._ensure_indexes()
        return session

    async def read_session(self, session_id: str, **kwargs: Any) -> Session | None:
        """Return a session, `None` if there is none of that id."""
        fields = dict.fromkeys(("session_type", "created_at", "updated_at", *OF_V1), 1)
        document = await self._find(session_id, {**LIFE, **fields})
        if document is None:
            return None
        if not is_of_v1(document):
            self._learn(session_id, document)
        return session_from(document)

    async def create_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Create an agent without messages; one that exists already is left as it is.

        Raises:
            SessionNotFoundError: The session does not exist.
            StateTooLargeError: The session's document has no room for its state; the earlier one stays.
        """
        document = await compute(new_agent, session_agent)
        await self._apply_one(session_id, CreateAgent(session_agent.agent_id, document))

    async def read_agent(self, session_id: str, agent_id: str, **kwargs: Any) -> SessionAgent | None:
        """Return an agent, `None` if the session holds none of that id.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        key = agent_key(agent_id)
        names = ("agent_data", "created_at", "updated_at")
        document = await self._found(session_id, {f"agents.{key}.{name}": 1 for name in names})
        agents: Document = usable_field(dict, document.get("agents"), session_id, "agents")
        stored = agents.get(key)
        if not isinstance(stored, dict | None):
            raise MalformedField(f"agents.{key}", stored, dict).error(session_id)
        return None if stored is None else await compute(agent_from, agent_id, stored)

    async def update_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Store an agent's state; its creation date and configuration stay.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
            StateTooLargeError: The session's document has no room for its state; the earlier one stays.
        """
        state = await compute(agent_state, session_agent)
        async with self._connection.operation():
            change = UpdateAgent(session_agent.agent_id, None, state, self._connection.now())
            await self._apply_one(session_id, change)

    async def create_message(
        self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any
    ) -> None:
        """Append a message, whose `message_id` must follow the last one's; the first message can have any id.

        Raises:
            InvalidArgumentError: The message's id is not an int >= 0 and < 2**31.
            SessionConflictError: The message's id does not follow that of the agent's last message.
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
            MessageTooLargeError: The message holds more, beside its attachments, than can be stored.
            StateTooLargeError: Other parts than messages fill the session's document.
        """
        message_id = checked_message_id(session_message.message_id)
        if not is_message_id(message_id):  # the next opening would renumber the message
            raise InvalidArgumentError("message_id of a new message must be an int >= 0 and < 2**31")
        message = await compute(stored_message, session_message, message_id)
        await self._apply_one(session_id, AppendMessage(agent_id, set_aside(message, self._max_inline), by_id=True))

    async def read_message(
        self, session_id: str, agent_id: str, message_id: int, **kwargs: Any
    ) -> SessionMessage | None:
        """Return a message, `None` if the agent holds none of that id.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
            AttachmentError: An attachment is missing or damaged.
        """
        checked_id(session_id, "session_id")
        missing: tuple[str, ...] = ()
        async with self._connection.operation():
            while True:
                message = await self._stored_message(session_id, agent_id, checked_message_id(message_id))
                if message is None:
                    return None
                messages = [message]
                try:
                    await self._attachments.restore(await self._place_of(session_id, message), {agent_id: messages})
                    break
                except AttachmentError as error:
                    if error.references == missing:
                        raise
                    missing = error.references
        found = await compute(message_from, messages[0], message_id)
        if found is None:
            raise MalformedField(f"agents.{agent_key(agent_id)}.messages", message.get("message"), dict).error(
                session_id
            )
        return found

    async def update_message(
        self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any
    ) -> None:
        """Replace the content of a stored message; with `redact_message`, nothing of the original is kept.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
            MessageNotFoundError: The agent holds no message of that id.
            MessageTooLargeError: The message holds more, beside its attachments, than can be stored.
        """
        checked_id(session_id, "session_id")
        checked_id(agent_id, "agent_id")
        message_id = checked_message_id(session_message.message_id)
        fields = replacement({**(await compute(message_body, session_message)), "updated_at": now()}, self._max_inline)
        given = Identity(to_date(session_message.created_at), session_message.message.get("tracking_id"))
        await self._apply_one(session_id, ReplaceMessage(agent_id, message_id, fields, given, by_id=True))

    async def list_messages(
        self, session_id: str, agent_id: str, limit: int | None = None, offset: int = 0, **kwargs: Any
    ) -> list[SessionMessage]:
        """Return messages of an agent, oldest first; elements of `messages` that are no messages are left out.

        Args:
            session_id: The session.
            agent_id: The agent.
            limit: At most so many; `None` for all.
            offset: Leave out so many of the oldest.
            **kwargs: Accepted because Strands may pass more one day; unused.

        Raises:
            InvalidArgumentError: `limit` or `offset` is not an int >= 0.
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
            AttachmentError: An attachment is missing or damaged.
        """
        offset = min(checked_count(offset, "offset"), _ALL)
        limit = None if limit is None else min(checked_count(limit, "limit"), _ALL)
        path = f"$agents.{agent_key(agent_id)}"
        position = number_at(f"{path}.archived")
        begin = {"$max": [0, {"$subtract": [offset, position]}]}
        count = {
            "$min": [
                _ALL,
                {"$subtract": [{"$subtract": [offset + (_ALL if limit is None else limit), position]}, begin]},
            ]
        }
        sliced = {"$slice": [array_at(f"{path}.messages"), begin, {"$max": [1, count]}]}
        created_at = f"{path}.created_at"
        wanted = {
            "created_at": created_at,
            "archived": position,
            "messages": {"$cond": [{"$gt": [count, 0]}, sliced, []]},
            "incarnation": "$incarnation",
        }
        missing: tuple[str, ...] = ()
        async with self._connection.operation():
            for _ in range(ROUNDS):
                stored = await self._stored_agent(session_id, agent_id, wanted)
                archived = stored["archived"] if limit is None else min(stored["archived"], offset + limit)
                key, place = agent_key(agent_id), Place(session_id, Life.of(stored).incarnation)
                which = (stored.get("created_at"), offset, archived)
                try:
                    older = (await self._archived(place, {key: which}))[key] if offset < archived else []
                    messages = older + stored["messages"]
                    await self._attachments.restore(place, {agent_id: messages})
                    break
                except WrittenBackError:
                    continue
                except AttachmentError as error:
                    if error.references == missing:
                        raise
                    missing = error.references  # their messages can have been replaced since: read again
            else:
                raise DatabaseError(f"session {session_id!r} was changed again and again while it was read")
        return await compute(_messages_of, messages, offset, session_id, agent_id)

    async def _apply_one(self, session_id: str, change: Change) -> None:
        for error in (await self.apply(session_id, (change,))).values():
            raise error


def _messages_of(stored: Sequence[Any], first: int, session_id: str, agent_id: str) -> list[SessionMessage]:
    found = messages_from(stored, first, session_id, agent_id, restoring=False)
    return [message for message, _ in found if message is not None]
