"""The session manager for synchronous callers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from strands.types.session import SessionMessage
from strands.types.tools import AgentTool

from .._format.attachment_refs import MAX_INLINE_ATTACHMENT_BYTES
from .._format.buckets import MAX_EMBEDDED_BYTES, MAX_EMBEDDED_MESSAGES
from .._format.ids import checked_id
from .._io.connection import Connection
from .._io.drivers import Client
from .._io.settings import Settings
from .._notifications.notify import DRAIN_TIMEOUT, in_the_name_of
from .._repository.metadata import AgentConfigDict, UsageReport, checked_feedback, checked_keys, checked_metadata
from ..errors import InvalidArgumentError
from .base import OPTIONS, ManagerOptions, SaveOn, SessionManagerBase, take_hooks
from .metadata_tool import MetadataPolicy, blocking_tool
from .user_hooks import Hook, Operation, call_hooked

P = ParamSpec("P")
T = TypeVar("T")


class MongoDBSessionManager(SessionManagerBase):
    """Keeps the agents of a session in MongoDB; for synchronous code, and for agents that run asynchronously.

    Constructing it opens the session: reads it, or creates it if it is new. One manager may serve several agents of
    its session, on any thread and any event loop. While an agent runs asynchronously nothing waits on its event loop;
    the manager's own methods, and constructing it, block the calling thread: in asynchronous code use
    `AsyncMongoDBSessionManager`.

    Args:
        session_id: The session; any non-empty text without NUL.
        connection_string: Where MongoDB is; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` takes the one named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        client: An `AsyncIOMotorClient`, `AsyncMongoClient` or `MongoClient` that the caller owns; it is never closed.
        application_name: Stored in the session if this manager creates it; never changed afterwards.
        metadata_fields: Fields of `metadata` that get an index each.
        metadata_hook: Called around every use of metadata, `def` or `async def`; `metadataHook` is the same.
        feedback_hook: Called around every new feedback, `def` or `async def`; `feedbackHook` is the same.
        save_on: `"message"` stores each message before the agent goes on, `"invocation"` all of a turn at its end.
        max_inline_attachment_bytes: Images, documents and videos of a message that together hold more bytes are kept
            in GridFS, in the bucket `<collection_name>_attachments`.
        max_embedded_messages: How many messages of an agent the session's document holds; older ones are archived.
        max_embedded_bytes: How many bytes of them it holds.
        session_ttl: The session expires, with archive and attachments, when nobody has written to it for this time. The
            value belongs to the session; another one applies from the next write on. With `None`, an expiring session
            keeps its value, and any other one does not expire.
        **client_options: Options of PyMongo's `MongoClient`, like `maxPoolSize`.

    Raises:
        ConfigurationError: An argument cannot be used.
        InvalidArgumentError: `session_id` cannot be one.
        DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
    """

    def __init__(
        self,
        session_id: str,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str | None = "agent_sessions",
        *,
        client: Client | None = None,
        application_name: str | None = None,
        metadata_fields: Sequence[str] | None = None,
        metadata_hook: Hook | None = None,
        feedback_hook: Hook | None = None,
        save_on: SaveOn | None = "message",
        max_inline_attachment_bytes: int | None = MAX_INLINE_ATTACHMENT_BYTES,
        max_embedded_messages: int | None = MAX_EMBEDDED_MESSAGES,
        max_embedded_bytes: int | None = MAX_EMBEDDED_BYTES,
        session_ttl: timedelta | None = None,
        **client_options: Any,
    ) -> None:
        checked_id(session_id, "session_id")
        options = ManagerOptions.checked(
            database_name=database_name,
            collection_name=collection_name,
            application_name=application_name,
            metadata_fields=metadata_fields,
            metadata_hook=metadata_hook,
            feedback_hook=feedback_hook,
            save_on=save_on,
            max_inline_attachment_bytes=max_inline_attachment_bytes,
            max_embedded_messages=max_embedded_messages,
            max_embedded_bytes=max_embedded_bytes,
            session_ttl=session_ttl,
            **take_hooks(client_options),
        )
        connection = Connection(Settings.checked(connection_string, client, client_options, OPTIONS))
        self._prepare(session_id, connection, options, owned=True)
        self._open_blocking()

    @classmethod
    def _over(cls, connection: Connection, session_id: str, options: ManagerOptions) -> Self:
        """Return a manager over a connection that somebody else closes."""
        manager = cls.__new__(cls)
        manager._prepare(session_id, connection, options, owned=False)
        manager._open_blocking()
        return manager

    def _open_blocking(self) -> None:
        portal = self._connection.portal
        try:
            portal.call(self._open)
        except BaseException:
            if self._owns_connection:
                portal.call(self._connection.aclose)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def flush(self) -> None:
        """Return when everything recorded so far is stored.

        Raises:
            MongoDBSessionError: What failed. After a lost connection the next flush tries again.
        """
        self._flush_blocking()

    def get_application_name(self) -> str | None:
        """Return the name the session got at its creation."""
        return self._unit.application_name

    def update_metadata(self, metadata: dict[str, Any]) -> Any:
        """Set the given keys of the session's metadata and keep the others.

        Args:
            metadata: Values by key; `a.b` sets `b` within `a`. Dates are stored as BSON dates: UTC, milliseconds.

        Returns:
            `None`, or what the metadata hook returns.

        Raises:
            InvalidArgumentError: A key cannot be set.
            EncodingError: A value cannot be stored.
        """
        checked_metadata(metadata)
        return self._metadata("update", self._repository.update_metadata, metadata=metadata)

    def get_metadata(self) -> Any:
        """Return `{"metadata": {...}}`, or `{}` if the session does not exist any more."""
        return self._metadata("get", self._repository.get_metadata)

    def delete_metadata(self, keys: list[str]) -> Any:
        """Remove keys from the session's metadata; unknown keys are no error.

        Returns:
            `None`, or what the metadata hook returns.

        Raises:
            InvalidArgumentError: `keys` is not a list of keys.
        """
        return self._metadata("delete", self._repository.delete_metadata, keys=checked_keys(keys))

    def get_metadata_tool(self, read_only: bool = False, allowed_keys: Sequence[str] | None = None) -> AgentTool:
        """Return the tool `manage_metadata`, through which a model reads and writes the session's metadata.

        Args:
            read_only: Whether the model may only read.
            allowed_keys: The keys it may see and change; `None` for all.

        Raises:
            InvalidArgumentError: `allowed_keys` is not a list of keys.
        """
        policy = MetadataPolicy.checked(read_only, allowed_keys)
        return blocking_tool(policy, self.get_metadata, self.update_metadata, self.delete_metadata)

    def add_feedback(self, feedback: dict[str, Any]) -> Any:
        """Append feedback, with the present as `created_at`.

        Args:
            feedback: Any keys; `rating` (`"up"`, `"down"`) and `comment` are the usual ones.

        Returns:
            `None`, or what the feedback hook returns.

        Raises:
            InvalidArgumentError: `feedback` is not a dict.
            EncodingError: A value cannot be stored.
        """
        hook, operation = self._options.feedback_hook, self._repository.add_feedback
        return self._hooked(hook, operation, "add", feedback=checked_feedback(feedback))

    def get_feedbacks(self) -> list[dict[str, Any]]:
        """Return the session's feedback, oldest first."""
        return self._ask(self._repository.get_feedbacks)

    def get_agent_config(self, agent_id: str) -> AgentConfigDict | None:
        """Return an agent's model, system prompt and prompt metadata, `None` if the session holds no such agent."""
        return self._ask(self._repository.get_agent_config, agent_id)

    def update_agent_config(
        self,
        agent_id: str,
        model: str | None = None,
        system_prompt: str | None = None,
        prompt_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Set what is not `None` of an agent's configuration; it stays until it is set again, whatever the agent runs.

        Raises:
            InvalidArgumentError: An argument is of the wrong type.
            AgentNotFoundError: The session holds no such agent.
        """
        self._ask(self._repository.update_agent_config, agent_id, model, system_prompt, prompt_metadata)
        self._keep_config(agent_id, model=model, system_prompt=system_prompt)

    def set_prompt_metadata(self, agent_id: str, prompt_metadata: dict[str, Any]) -> None:
        """Set an agent's prompt metadata; it stays until it is set again.

        Raises:
            InvalidArgumentError: `prompt_metadata` is not a dict.
            AgentNotFoundError: The session holds no such agent.
        """
        if not isinstance(prompt_metadata, dict):
            raise InvalidArgumentError(f"prompt_metadata must be a dict, not {type(prompt_metadata).__name__}")
        self.update_agent_config(agent_id, prompt_metadata=prompt_metadata)

    def list_agents(self) -> list[AgentConfigDict]:
        """Return the configuration of every agent of the session."""
        return self._ask(self._repository.list_agents)

    def get_message_count(self, agent_id: str) -> int:
        """Return how many messages an agent has ever stored, counted by the server.

        Raises:
            AgentNotFoundError: The session holds no such agent.
        """
        return self._ask(self._repository.get_message_count, agent_id)

    def list_messages(self, agent_id: str, limit: int | None = None, offset: int = 0) -> list[SessionMessage]:
        """Return messages of an agent with their ids and dates, oldest first, those it no longer holds too.

        Args:
            agent_id: The agent.
            limit: At most so many; `None` for all.
            offset: Leave out so many of the oldest.

        Raises:
            AgentNotFoundError: The session holds no such agent.
            AttachmentError: An attachment is missing or damaged.
        """
        return self._ask(self._stored_messages, agent_id, limit, offset)

    def get_usage(self) -> UsageReport:
        """Return the session's running totals, per agent and in all: tokens, latency, invocations and tool calls."""
        return self._ask(self._repository.get_usage)

    def _metadata(self, action: str, operation: Operation, **argument: Any) -> Any:
        return self._hooked(self._options.metadata_hook, operation, action, **argument)

    def _hooked(self, hook: Hook | None, operation: Operation, action: str, **argument: Any) -> Any:
        self._check_open()
        with in_the_name_of(self._connection):
            return call_hooked(self._connection.portal, hook, operation, action, self.session_id, **argument)

    def _ask(
        self, operation: Callable[Concatenate[str, P], Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return what the repository says of the session once everything recorded is stored."""
        self._check_open()
        self._send_blocking()
        return self._connection.portal.call(operation, self.session_id, *args, **kwargs)

    def close(self, *, notification_timeout: float = DRAIN_TIMEOUT) -> None:
        """Store what is recorded, deliver what hooks left behind, and close what the manager owns. Idempotent.

        Args:
            notification_timeout: Seconds to wait for the session's notifications. What is not delivered by then is
                logged by its name, and tried on as long as the process runs.

        Raises:
            MongoDBSessionError: What could not be stored, and was not raised before.
        """
        if self._closing is None or not self._closing.is_set():
            self._connection.portal.call(self._aclose, notification_timeout)
