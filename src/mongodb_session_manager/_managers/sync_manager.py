"""The session manager for synchronous callers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from strands.types.session import SessionMessage
from strands.types.tools import AgentTool

from .._format.metadata import checked_feedback, checked_keys, checked_metadata
from .._io.twins import finish_twins
from .._notifications.notify import DRAIN_TIMEOUT, attributed_to
from .._repository.metadata import AgentConfig, UsageReport
from .._store.lease_queue import Caller
from .async_manager import AsyncMongoDBSessionManager
from .base import SessionManagerBase, checked_prompt_metadata
from .metadata_tool import MetadataPolicy, Operations, blocking_tool
from .options import Configuration, ManagerOptions
from .user_hooks import Operation, call_hooked

P = ParamSpec("P")
T = TypeVar("T")


class MongoDBSessionManager(SessionManagerBase):
    """Keeps the agents of a session in MongoDB; for synchronous code, and for agents that run asynchronously.

    Constructing it opens the session: reads it, or creates it if it is new. One manager can serve several agents of
    its session, on any thread and any event loop. An agent that runs asynchronously does not wait on its event loop.
    The manager's own methods, and constructing it, block the calling thread: in asynchronous code, use
    `AsyncMongoDBSessionManager`.

    Args:
        session_id: Any non-empty text without NUL.
        connection_string: The connection string of MongoDB; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` uses the database named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        **options: `ManagerOptions` documents them.

    Raises:
        ConfigurationError: An argument is invalid or an option is unknown.
        InvalidArgumentError: `session_id` is not a valid id.
        DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
        SessionBusyError: Another manager has its turn, see `on_busy`.
    """

    def __init__(
        self,
        session_id: str,
        connection_string: str | None = None,
        database_name: str | None = None,
        collection_name: str | None = "agent_sessions",
        *,
        _shared: Configuration | None = None,
        **options: Unpack[ManagerOptions],
    ) -> None:
        super().__init__(session_id, connection_string, database_name, collection_name, _shared=_shared, **options)
        portal, caller = self._connection.portal, Caller()
        try:
            portal.call(self._open, caller)
        except BaseException:
            self._stop_opening(caller)
            if self._owns_connection:
                portal.call(self._connection.aclose)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def flush(self) -> None:
        self._flusher.flush_blocking(self._unit)
        self._unit.raise_refused()

    def reload(self) -> None:
        self._check_reloadable()
        caller = Caller()
        try:
            work = self._connection.portal.call(self._read_again, caller)
        except (KeyboardInterrupt, SystemExit):
            self._stop_opening(caller)
            raise
        self._continue_with(work)

    def get_application_name(self) -> str | None:
        return self._unit.application_name

    def update_metadata(self, metadata: dict[str, Any]) -> Any:
        return self._hooked(self._repository.update_metadata, "update", metadata=checked_metadata(metadata))

    def get_metadata(self) -> Any:
        return self._hooked(self._repository.get_metadata, "get")

    def delete_metadata(self, keys: list[str]) -> Any:
        return self._hooked(self._repository.delete_metadata, "delete", keys=checked_keys(keys))

    def get_metadata_tool(self, read_only: bool = False, allowed_keys: Sequence[str] | None = None) -> AgentTool:
        operations = Operations(self.get_metadata, self.update_metadata, self.delete_metadata)
        return blocking_tool(MetadataPolicy.checked(read_only, allowed_keys), operations)

    def add_feedback(self, feedback: dict[str, Any]) -> Any:
        return self._hooked(self._repository.add_feedback, "add", feedback=checked_feedback(feedback))

    def get_feedbacks(self) -> list[dict[str, Any]]:
        return self._ask(self._repository.get_feedbacks)

    def get_agent_config(self, agent_id: str) -> AgentConfig | None:
        return self._ask(self._repository.get_agent_config, agent_id)

    def update_agent_config(
        self,
        agent_id: str,
        model: str | None = None,
        system_prompt: str | None = None,
        prompt_metadata: dict[str, Any] | None = None,
    ) -> None:
        self._ask(self._update_agent_config, agent_id, model, system_prompt, prompt_metadata)

    def set_prompt_metadata(self, agent_id: str, prompt_metadata: dict[str, Any]) -> None:
        self.update_agent_config(agent_id, prompt_metadata=checked_prompt_metadata(prompt_metadata))

    def list_agents(self) -> list[AgentConfig]:
        return self._ask(self._repository.list_agents)

    def get_message_count(self, agent_id: str) -> int:
        return self._ask(self._repository.get_message_count, agent_id)

    def list_messages(
        self,
        agent_id: str,
        limit: int | None = None,
        offset: int = 0,
        *,
        newest_first: bool = False,
        before: int | None = None,
    ) -> list[SessionMessage]:
        return self._ask(self._list_messages, agent_id, limit, offset, newest_first, before)

    def get_usage(self) -> UsageReport:
        return self._ask(self._repository.get_usage)

    def close(self, *, notification_timeout: float = DRAIN_TIMEOUT) -> None:
        if self._closing is None or not self._closing.is_set():
            try:
                self._record_last_changes()
            finally:
                self._connection.portal.call(self._aclose, notification_timeout)

    def _hooked(self, operation: Operation, action: str, **argument: Any) -> Any:
        """Call an operation of the repository through the hook for the action."""
        self._check_open()
        portal, hook = self._connection.portal, self._options.hook_for(action)
        with attributed_to(self._connection):
            return call_hooked(portal, hook, operation, action, self.session_id, **argument)

    def _ask(
        self, operation: Callable[Concatenate[str, P], Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Flush, then call an operation of the repository for this session."""
        self._check_open()
        self._flusher.flush_blocking(self._unit)
        return self._connection.portal.call(operation, self.session_id, *args, **kwargs)


finish_twins(MongoDBSessionManager, AsyncMongoDBSessionManager)
