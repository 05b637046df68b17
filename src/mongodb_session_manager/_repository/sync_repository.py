"""The repository for synchronous callers: each method hands its call to the I/O loop and waits."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from bson import ObjectId
from pymongo.collection import Collection
from pymongo.database import Database
from strands.session.session_repository import SessionRepository
from strands.types.session import Session, SessionAgent, SessionMessage

from .._copying.imports import feed_blocking
from .._format.attachment_refs import MAX_INLINE_ATTACHMENT_BYTES
from .._format.buckets import MAX_EMBEDDED_BYTES, MAX_EMBEDDED_MESSAGES
from .._format.changes import Change
from .._format.documents import Document
from .._format.multi_agents import MultiAgentWrite
from .._io.drivers import Client, SyncClient
from .._io.portal import Portal
from ..errors import MongoDBSessionError
from .async_repository import AsyncMongoDBSessionRepository
from .listing import Order, SessionPage
from .metadata import AgentConfigDict, UsageReport

if TYPE_CHECKING:
    from strands.multiagent import MultiAgentBase


class MongoDBSessionRepository(SessionRepository):
    """The synchronous twin of `AsyncMongoDBSessionRepository`: same arguments, same methods, same errors.

    Its methods may be called from any thread. They block it: on a thread that runs an event loop, use the twin.

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
        self._async = AsyncMongoDBSessionRepository(
            connection_string,
            database_name,
            collection_name,
            client=client,
            application_name=application_name,
            metadata_fields=metadata_fields,
            max_inline_attachment_bytes=max_inline_attachment_bytes,
            max_embedded_messages=max_embedded_messages,
            max_embedded_bytes=max_embedded_bytes,
            session_ttl=session_ttl,
            **client_options,
        )

    @property
    def client(self) -> SyncClient:
        """A synchronous client on the repository's connections, for the caller's own commands.

        Raises:
            ConfigurationError: The repository was given a `pymongo.AsyncMongoClient`.
            SessionClosedError: The repository is closed.
        """
        return self._async._connection.synchronous_client()

    @property
    def database(self) -> Database[dict[str, Any]]:
        """The database of the sessions, on the synchronous client."""
        return self.client[self._async._database_name]

    @property
    def collection(self) -> Collection[dict[str, Any]]:
        """The collection of the sessions, on the synchronous client."""
        return self.database[self._async._collection_name]

    @property
    def _portal(self) -> Portal:
        return self._async.portal

    def __repr__(self) -> str:
        return repr(self._async).replace("Async", "", 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is under way and close the client, if it is the repository's own. Idempotent."""
        self._async._connection.close_blocking()

    def ping(self) -> None:
        """Raise unless the server answers.

        Raises:
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        """
        self._portal.call(self._async.ping)

    def open_session(self, session_id: str) -> Document:
        """Return what restoring a session needs, from one command that creates the session if it is new.

        The document holds everything but metadata, feedbacks, guardrail events, the metrics of messages, and the
        messages that the agents' conversation managers have removed; `first` is the position of an agent's first
        message in it. Archived messages that restoring needs come with a second command, and attachments of messages
        with one more. One more command numbers the messages of an agent that a version before 1.0 has written to, and
        moves fields that 1.0.0 has stored elsewhere.

        Raises:
            AttachmentError: An attachment is missing or damaged.
        """
        return self._portal.call(self._async.open_session, session_id)

    def apply(
        self, session_id: str, changes: Iterable[Change], incarnation: ObjectId | None = None
    ) -> dict[str, MongoDBSessionError]:
        """Store recorded changes exactly once; in one command, unless another writer interferes.

        Args:
            session_id: The session.
            changes: The recorded changes, oldest first.
            incarnation: The incarnation of the session that was opened; `None` writes to the session that has the id
                now.

        Returns:
            By agent id, why that agent's changes could not be stored: `SessionConflictError`, `AgentNotFoundError`,
            `MessageNotFoundError`, `SessionNotFoundError` or `MessageTooLargeError`. The changes of all other agents
            are stored. With `StateTooLargeError` the agent's messages are stored too, unless the error is `pending`.

        Raises:
            MongoDBSessionError: It is unknown whether the changes are stored. The same changes can be applied again.
        """
        return self._portal.call(self._async.apply, session_id, changes, incarnation)

    def create_session(self, session: Session, **kwargs: Any) -> Session:
        """Create a session.

        Raises:
            SessionExistsError: There is one of that id.
        """
        return self._portal.call(self._async.create_session, session, **kwargs)

    def read_session(self, session_id: str, **kwargs: Any) -> Session | None:
        """Return a session, `None` if there is none of that id."""
        return self._portal.call(self._async.read_session, session_id, **kwargs)

    def delete_session(self, session_id: str, **kwargs: Any) -> bool:
        """Delete a session: its document, its archived messages and its attachments.

        The first command removes the content of the document. If the call is interrupted after that, the session does
        not exist any more. A call with the same id, or a process that opens its first session in the collection a
        minute later or more, removes the rest. A manager that has the session open gets `SessionNotFoundError` from its
        next write.

        Args:
            session_id: The session.
            **kwargs: Accepted because Strands' own repositories do; unused.

        Returns:
            Whether the session existed. `False` also for a session that has expired, and for an id that is being
            imported or forked; that copy continues.

        Raises:
            InvalidArgumentError: `session_id` is not a valid id.
        """
        return self._portal.call(self._async.delete_session, session_id, **kwargs)

    def create_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Create an agent without messages; one that exists already is left as it is.

        Raises:
            SessionNotFoundError: The session does not exist.
            StateTooLargeError: The session's document has no room for its state; the earlier one stays.
        """
        self._portal.call(self._async.create_agent, session_id, session_agent, **kwargs)

    def read_agent(self, session_id: str, agent_id: str, **kwargs: Any) -> SessionAgent | None:
        """Return an agent, `None` if the session holds none of that id.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        return self._portal.call(self._async.read_agent, session_id, agent_id, **kwargs)

    def update_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        """Store an agent's state; its creation date and configuration stay.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
            StateTooLargeError: The session's document has no room for its state; the earlier one stays.
        """
        self._portal.call(self._async.update_agent, session_id, session_agent, **kwargs)

    def create_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        """Append a message, whose `message_id` must follow the last one's; the first message can have any id.

        Raises:
            InvalidArgumentError: The message's id is not an int >= 0 and < 2**31.
            SessionConflictError: The message's id does not follow that of the agent's last message.
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
            MessageTooLargeError: The message holds more, beside its attachments, than can be stored.
            StateTooLargeError: Other parts than messages fill the session's document.
        """
        self._portal.call(self._async.create_message, session_id, agent_id, session_message, **kwargs)

    def read_message(self, session_id: str, agent_id: str, message_id: int, **kwargs: Any) -> SessionMessage | None:
        """Return a message, `None` if the agent holds none of that id.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
            AttachmentError: An attachment is missing or damaged.
        """
        return self._portal.call(self._async.read_message, session_id, agent_id, message_id, **kwargs)

    def update_message(self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any) -> None:
        """Replace the content of a stored message; with `redact_message`, nothing of the original is kept.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
            MessageNotFoundError: The agent holds no message of that id.
            MessageTooLargeError: The message holds more, beside its attachments, than can be stored.
        """
        self._portal.call(self._async.update_message, session_id, agent_id, session_message, **kwargs)

    def list_messages(
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
        return self._portal.call(self._async.list_messages, session_id, agent_id, limit, offset, **kwargs)

    def create_multi_agent(self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any) -> None:
        """Store a graph or swarm; one that exists already is left as it is.

        Raises:
            SessionNotFoundError: The session does not exist.
            EncodingError: Its state cannot be stored.
            StateTooLargeError: Its state is larger than the session's document has room for.
        """
        self._portal.call(self._async.create_multi_agent, session_id, multi_agent, **kwargs)

    def read_multi_agent(self, session_id: str, multi_agent_id: str, **kwargs: Any) -> dict[str, Any] | None:
        """Return the state of a graph or swarm, `None` if the session holds none of that id.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        return self._portal.call(self._async.read_multi_agent, session_id, multi_agent_id, **kwargs)

    def update_multi_agent(self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any) -> None:
        """Store the state of a graph or swarm, whatever is there.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such graph or swarm.
            EncodingError: Its state cannot be stored.
            StateTooLargeError: Its state is larger than the session's document has room for.
        """
        self._portal.call(self._async.update_multi_agent, session_id, multi_agent, **kwargs)

    def apply_multi_agent(
        self, session_id: str, write: MultiAgentWrite, incarnation: ObjectId | None = None
    ) -> MongoDBSessionError | None:
        """Store a recorded state exactly once; in one command, unless another writer interferes.

        Args:
            session_id: The session.
            write: The recorded state.
            incarnation: The incarnation of the session that was opened; `None` writes to the session that has the id
                now.

        Returns:
            Why it can never be stored: `SessionConflictError`, `SessionNotFoundError`, `AgentNotFoundError` or
            `StateTooLargeError`; `None` once it is stored.

        Raises:
            MongoDBSessionError: It is unknown whether the state is stored. The same write may be applied again.
        """
        return self._portal.call(self._async.apply_multi_agent, session_id, write, incarnation)

    def update_metadata(self, session_id: str, metadata: dict[str, Any]) -> None:
        """Set the given keys of a session's metadata and keep the others.

        Args:
            session_id: The session.
            metadata: Values by key; `a.b` sets `b` within `a`. Dates are stored as BSON dates: UTC, milliseconds.

        Raises:
            InvalidArgumentError: A key cannot be set.
            EncodingError: A value cannot be stored.
            StateTooLargeError: The session's document has no room for it.
            SessionNotFoundError: The session does not exist.
        """
        self._portal.call(self._async.update_metadata, session_id, metadata)

    def get_metadata(self, session_id: str) -> dict[str, Any]:
        """Return `{"metadata": {...}}`, or `{}` if the session does not exist."""
        return self._portal.call(self._async.get_metadata, session_id)

    def delete_metadata(self, session_id: str, keys: list[str]) -> None:
        """Remove keys from a session's metadata; unknown keys are no error.

        Raises:
            InvalidArgumentError: `keys` is not a list of keys.
            SessionNotFoundError: The session does not exist.
        """
        self._portal.call(self._async.delete_metadata, session_id, keys)

    def add_feedback(self, session_id: str, feedback: dict[str, Any]) -> None:
        """Append feedback, with the present as `created_at`.

        Args:
            session_id: The session.
            feedback: Any keys; `rating` (`"up"`, `"down"`) and `comment` are the usual ones. Dates are stored as BSON
                dates: UTC, milliseconds.

        Raises:
            InvalidArgumentError: `feedback` is not a dict.
            EncodingError: A value cannot be stored.
            StateTooLargeError: The session's document has no room for it.
            SessionNotFoundError: The session does not exist.
        """
        self._portal.call(self._async.add_feedback, session_id, feedback)

    def get_application_name(self, session_id: str) -> str | None:
        """Return the name that the session was created with, `None` if it has none.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        return self._portal.call(self._async.get_application_name, session_id)

    def get_feedbacks(self, session_id: str) -> list[dict[str, Any]]:
        """Return a session's feedback, oldest first.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        return self._portal.call(self._async.get_feedbacks, session_id)

    def get_agent_config(self, session_id: str, agent_id: str) -> AgentConfigDict | None:
        """Return an agent's model, system prompt and prompt metadata, `None` if the session holds no such agent.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        return self._portal.call(self._async.get_agent_config, session_id, agent_id)

    def list_agents(self, session_id: str) -> list[AgentConfigDict]:
        """Return the configuration of every agent of a session.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        return self._portal.call(self._async.list_agents, session_id)

    def update_agent_config(
        self,
        session_id: str,
        agent_id: str,
        model: str | None = None,
        system_prompt: str | None = None,
        prompt_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Set what is not `None` of an agent's configuration; it stays until it is set again, whatever the agent runs.

        Raises:
            InvalidArgumentError: An argument is of the wrong type.
            StateTooLargeError: The session's document has no room for it.
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
        """
        self._portal.call(self._async.update_agent_config, session_id, agent_id, model, system_prompt, prompt_metadata)

    def get_message_count(self, session_id: str, agent_id: str) -> int:
        """Return how many messages an agent has ever stored, counted by the server.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
        """
        return self._portal.call(self._async.get_message_count, session_id, agent_id)

    def get_usage(self, session_id: str) -> UsageReport:
        """Return the running totals of a session's agents.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        return self._portal.call(self._async.get_usage, session_id)

    def list_sessions(
        self,
        application_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        created_after: datetime | None = None,
        updated_after: datetime | None = None,
        order: Order = "-updated_at",
        limit: int = 50,
        cursor: str | None = None,
    ) -> SessionPage:
        """Return a page of the sessions that meet every criterion, without loading a message.

        A page reads no more than it returns, and one session to know if there are others, if at most one of
        `application_name` and the `metadata_fields` is asked for, and of the dates only that of `order`. A session
        that is written to between two pages ordered by `updated_at` moves in the list.

        Args:
            application_name: The name it got at its creation; `None` for any.
            metadata: Values by key, `a.b` for `b` within `a`; where a list is stored, one of its elements will do.
            created_after: Created later than this; without a zone it is UTC.
            updated_after: Written to later than this; without a zone it is UTC.
            order: By which date, `-` for the latest first; sessions of the same date by id.
            limit: At most so many, up to 1000.
            cursor: The `next_cursor` of the page before; the other arguments must be the same.

        Raises:
            InvalidArgumentError: An argument cannot be used, or holds an operator in the place of a value.
        """
        return self._portal.call(
            self._async.list_sessions, application_name, metadata, created_after, updated_after, order, limit, cursor
        )

    def count_sessions(
        self,
        application_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        created_after: datetime | None = None,
        updated_after: datetime | None = None,
    ) -> int:
        """Return how many sessions meet every criterion.

        Args:
            application_name: The name it got at its creation; `None` for any.
            metadata: Values by key, `a.b` for `b` within `a`; where a list is stored, one of its elements will do.
            created_after: Created later than this; without a zone it is UTC.
            updated_after: Written to later than this; without a zone it is UTC.

        Raises:
            InvalidArgumentError: An argument cannot be used, or holds an operator in the place of a value.
        """
        return self._portal.call(self._async.count_sessions, application_name, metadata, created_after, updated_after)

    def session_exists(self, session_id: str) -> bool:
        """Return whether a session with that id exists.

        Raises:
            InvalidArgumentError: `session_id` is not a valid id.
        """
        return self._portal.call(self._async.session_exists, session_id)

    def export_session(self, session_id: str) -> Generator[str, None, None]:
        """Yield a session as lines of JSON, which `import_session` reads; the user guide describes them.

        Memory does not grow with the session. The session can be written to meanwhile: the export holds the messages
        that were stored when the first line was requested, each once, as it is when the export reaches it. A message
        that was redacted before that is exported redacted, without its attachments. Stopping early leaks no cursor.

        Raises:
            SessionNotFoundError: The session does not exist, or was removed meanwhile.
            AttachmentError: An attachment is missing or damaged.
        """
        export = self._async._export(session_id)
        while lines := self._portal.call(export.pull):
            yield from lines

    def import_session(self, stream: Iterable[str | bytes], session_id: str | None = None) -> str:
        """Store an exported session and return its id; the session is invisible until it is complete.

        The stream can come from an untrusted source. An import that fails, is refused or is cancelled leaves no
        session. The incomplete copy of a killed process is invisible, and other processes remove it when its lease of a
        minute is over. The session and its messages keep their dates. With `session_ttl`, the session has its whole
        time to live ahead when the import is complete.

        Args:
            stream: The lines that `export_session` yielded: an open file, or an iterable or asynchronous iterable of
                `str` or `bytes`. Its items can be lines, or chunks that are cut anywhere. Asynchronous code reads a
                file or a plain iterable in threads, so that the event loop does not wait for it.
            session_id: The id of the new session; `None` for the id it was exported with.

        Raises:
            InvalidArgumentError: The stream is damaged, truncated, or not an exported session of a known version; the
                message names the line.
            SessionExistsError: A session with that id exists and stays unchanged, or another copy into it is under way.
            SessionConflictError: Another process has removed the copy, because its lease was over.
            MessageTooLargeError: The session does not fit into documents of MongoDB.
        """
        return feed_blocking(self._portal, self._async._import(session_id), stream)

    def fork_session(self, session_id: str, new_id: str, at_message: int | Mapping[str, int] | None = None) -> None:
        """Create a session with the same content, or with its beginning, to try another continuation.

        Messages and attachments are copied on the server. Messages keep their dates and ids; `created_at` of the fork
        is the current time. The fork has the metadata of the session, the guardrail events and running totals of its
        own messages, and no feedback, which was given for another continuation.

        A cut agent has its current state, without pending interrupts and without the state of its model. Its
        conversation manager shows as many messages as now, if the fork has that many; a summary that covers later
        messages is removed. Orchestrators have their current states. The fork of an expiring session expires, too.

        The session stays unchanged, except that a session of an earlier version is migrated as if it was opened.

        Args:
            session_id: The session.
            new_id: The id of the fork.
            at_message: The id of the last message of the fork. For a session with several agents, a mapping of agent
                ids to message ids; agents that it does not name are not cut. `None` copies everything.

        Raises:
            InvalidArgumentError: An argument is invalid, or `at_message` is one id for several agents.
            SessionNotFoundError: The session does not exist, or was removed meanwhile.
            SessionExistsError: The session `new_id` exists and stays unchanged, or another copy into it is under way.
            SessionConflictError: Another process has removed the copy, because its lease was over.
            AgentNotFoundError: The session has no agent that `at_message` names.
            MessageNotFoundError: The agent has no message with that id.
            AttachmentError: An attachment is missing.
        """
        self._portal.call(self._async.fork_session, session_id, new_id, at_message)

    def write_back(self, session_id: str) -> None:
        """Write the archived messages and the attachments of a session back into its document.

        Versions 0.5 to 0.9 then restore the whole session. Call it when no process of this version writes to the
        session any more: the next append that exceeds the limits moves old messages to the archive again, and the next
        large attachment goes to GridFS.

        The session is written back as a whole or not at all. Messages that are appended, replaced or redacted
        meanwhile are kept. If the call is interrupted, another call removes left-over buckets and attachments. A
        session that is written back already stays as it is.

        Args:
            session_id: The session.

        Raises:
            InvalidArgumentError: `session_id` is not a valid id.
            SessionNotFoundError: The session does not exist.
            StateTooLargeError: The document would exceed 16 MiB; the session stays as it is.
            AttachmentError: An attachment is missing or damaged; the session stays as it is.
            DatabaseError: An archived message is missing, or other writers changed the session again and again.
        """
        self._portal.call(self._async.write_back, session_id)
