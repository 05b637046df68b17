"""The session manager for asynchronous callers: no method of it, nor opening it, blocks an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from strands.types.session import SessionMessage
from strands.types.tools import AgentTool

from .._format.metadata import checked_feedback, checked_keys, checked_metadata
from .._notifications.notify import DRAIN_TIMEOUT, attributed_to
from .._repository.metadata import AgentConfig, UsageReport
from .._store.lease_queue import Caller
from ..errors import SessionClosedError
from .base import SessionManagerBase, checked_prompt_metadata
from .metadata_tool import MetadataPolicy, Operations, async_tool
from .user_hooks import Operation, run_hooked

P = ParamSpec("P")
T = TypeVar("T")


class AsyncMongoDBSessionManager(SessionManagerBase):
    """Keeps the agents of a session in MongoDB, without blocking an event loop.

    Open it with `async with`, or with `create_mongodb_session_manager_async(...)`. `Agent(session_manager=...)` then
    restores from the loaded data and sends no command. One manager can serve several agents of its session,
    asynchronous and synchronous ones, on any thread and any event loop.

    Args:
        session_id: Any non-empty text without NUL.
        connection_string: The connection string of MongoDB; `None` reads the environment variable `MONGODB_URI`.
        database_name: `None` uses the database named in the connection string, else `"agent_sessions"`.
        collection_name: The collection of the sessions.
        **options: `ManagerOptions` documents them.

    Raises:
        ConfigurationError: An argument is invalid or an option is unknown.
        InvalidArgumentError: `session_id` is not a valid id.
    """

    async def open(self) -> Self:
        """Read the session, or create it if it is new; does nothing if it is open already.

        Raises:
            DatabaseUnavailableError: No server answered within `serverSelectionTimeoutMS`.
            SessionBusyError: Another manager has its turn, see `on_busy`.
            SessionClosedError: The manager is closed.
        """
        if self._closed:
            raise SessionClosedError(f"session {self.session_id!r} is closed: open it with a new manager")
        if self._work is None:
            portal, caller = self._connection.portal, Caller()
            try:
                await portal.run(self._open, caller)
            except BaseException:
                self._stop_opening(caller)
                if self._owns_connection:
                    portal.submit(self._connection.aclose)
                raise
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def flush(self) -> None:
        """Wait until every recorded change is stored.

        Raises:
            MongoDBSessionError: A change could not be stored. After a lost connection the next flush tries again.
        """
        await self._flush()

    async def reload(self) -> None:
        """Read the session again, for agents that stay in memory while other workers continue the session.

        It flushes, and then reads the session in one command, as opening does. Every agent, graph and swarm of this
        manager that is still in use is restored, as a new one would be: messages, state and conversation manager.
        Changes that were not recorded are replaced; `sync_agent(agent)` before the call records them. Changes that were
        refused are dropped: after a `SessionConflictError`, reload and repeat the request.

        Raises:
            SessionConflictError: An agent, graph or swarm is in the middle of a turn. Nothing has changed.
            SessionBusyError: Another manager has its turn, see `on_busy`. No agent has changed.
            SessionNotFoundError: The session was deleted.
            StateTooLargeError: Messages are still pending, because other parts fill the session's document.
            DatabaseError: A stored agent cannot be restored.
        """
        self._check_reloadable()
        portal, caller = self._connection.portal, Caller()
        try:
            work = await portal.run(self._read_again, caller)
        except asyncio.CancelledError:
            self._stop_opening(caller)
            raise
        self._continue_with(work)

    async def get_application_name(self) -> str | None:
        """Return the application name that was stored when the session was created."""
        return self._unit.application_name

    async def update_metadata(self, metadata: dict[str, Any]) -> Any:
        """Set keys of the session's metadata and keep the others.

        Args:
            metadata: Values by key; `a.b` sets `b` within `a`. Dates are stored as BSON dates: UTC, milliseconds.

        Returns:
            The result of the metadata hook; `None` without one.

        Raises:
            InvalidArgumentError: A key cannot be set.
            EncodingError: A value cannot be stored.
        """
        return await self._hooked(self._repository.update_metadata, "update", metadata=checked_metadata(metadata))

    async def get_metadata(self) -> Any:
        """Return `{"metadata": {...}}`, or `{}` if the session no longer exists."""
        return await self._hooked(self._repository.get_metadata, "get")

    async def delete_metadata(self, keys: list[str]) -> Any:
        """Remove keys from the session's metadata; unknown keys are ignored.

        Returns:
            The result of the metadata hook; `None` without one.

        Raises:
            InvalidArgumentError: `keys` is not a list of keys.
        """
        return await self._hooked(self._repository.delete_metadata, "delete", keys=checked_keys(keys))

    def get_metadata_tool(self, read_only: bool = False, allowed_keys: Sequence[str] | None = None) -> AgentTool:
        """Return the tool `manage_metadata`, with which a model reads and writes the session's metadata.

        Args:
            read_only: Whether the model may only read.
            allowed_keys: The keys that the model may see and change; `None` allows all.

        Raises:
            InvalidArgumentError: `allowed_keys` is not a list of keys.
        """
        operations = Operations(self.get_metadata, self.update_metadata, self.delete_metadata)
        return async_tool(MetadataPolicy.checked(read_only, allowed_keys), operations)

    async def add_feedback(self, feedback: dict[str, Any]) -> Any:
        """Append feedback, stamped with the current time as `created_at`.

        Args:
            feedback: Any keys; `rating` (`"up"`, `"down"`) and `comment` are the usual ones.

        Returns:
            The result of the feedback hook; `None` without one.

        Raises:
            InvalidArgumentError: `feedback` is not a dict.
            EncodingError: A value cannot be stored.
        """
        return await self._hooked(self._repository.add_feedback, "add", feedback=checked_feedback(feedback))

    async def get_feedbacks(self) -> list[dict[str, Any]]:
        """Return the session's feedback, oldest first."""
        return await self._ask(self._repository.get_feedbacks)

    async def get_agent_config(self, agent_id: str) -> AgentConfig | None:
        """Return an agent's model, system prompt and prompt metadata; `None` if the session has no such agent."""
        return await self._ask(self._repository.get_agent_config, agent_id)

    async def update_agent_config(
        self,
        agent_id: str,
        model: str | None = None,
        system_prompt: str | None = None,
        prompt_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Set an agent's configuration. `None` keeps a value.

        Values set here stay until they are set again, even if the agent runs with another model or system prompt.

        Raises:
            InvalidArgumentError: An argument has the wrong type.
            AgentNotFoundError: The session has no such agent.
        """
        await self._ask(self._update_agent_config, agent_id, model, system_prompt, prompt_metadata)

    async def set_prompt_metadata(self, agent_id: str, prompt_metadata: dict[str, Any]) -> None:
        """Set an agent's prompt metadata, which stays until it is set again.

        Raises:
            InvalidArgumentError: `prompt_metadata` is not a dict.
            AgentNotFoundError: The session has no such agent.
        """
        await self.update_agent_config(agent_id, prompt_metadata=checked_prompt_metadata(prompt_metadata))

    async def list_agents(self) -> list[AgentConfig]:
        """Return the configuration of every agent of the session."""
        return await self._ask(self._repository.list_agents)

    async def get_message_count(self, agent_id: str) -> int:
        """Return the number of all messages that an agent has ever stored, counted by the server.

        Raises:
            AgentNotFoundError: The session has no such agent.
        """
        return await self._ask(self._repository.get_message_count, agent_id)

    async def list_messages(
        self,
        agent_id: str,
        limit: int | None = None,
        offset: int = 0,
        *,
        newest_first: bool = False,
        before: int | None = None,
    ) -> list[SessionMessage]:
        """Return messages of an agent with their ids and dates, oldest first.

        Messages that the agent's conversation manager has removed are included.

        Args:
            agent_id: The agent.
            limit: The maximum number of messages; `None` returns all.
            offset: The number of messages to skip at the beginning of the list.
            newest_first: Whether the list begins with the newest message.
            before: Only messages with a lower id than this one. To page from the end, pass the id of the last message
                of the previous page.

        Raises:
            AgentNotFoundError: The session has no such agent.
            AttachmentError: An attachment is missing or damaged.
        """
        return await self._ask(self._list_messages, agent_id, limit, offset, newest_first, before)

    async def get_usage(self) -> UsageReport:
        """Return the session's totals of tokens, latency, invocations and tool calls, by agent and overall."""
        return await self._ask(self._repository.get_usage)

    async def close(self, *, notification_timeout: float = DRAIN_TIMEOUT) -> None:
        """Flush, deliver pending notifications, and close the connection if the manager owns it. Idempotent.

        Args:
            notification_timeout: Seconds to wait for the session's notifications. Undelivered ones are logged by name;
                their delivery continues while the process runs.

        Raises:
            MongoDBSessionError: A change could not be stored, and no earlier call has raised the error.
        """
        if self._closing is None or not self._closing.is_set():
            try:
                self._record_last_changes()
            finally:
                await self._connection.portal.run(self._aclose, notification_timeout)

    async def _hooked(self, operation: Operation, action: str, **argument: Any) -> Any:
        """Call an operation of the repository through the hook for the action."""
        self._check_open()
        portal, hook = self._connection.portal, self._options.hook_for(action)
        with attributed_to(self._connection):
            return await run_hooked(portal, hook, operation, action, self.session_id, **argument)

    async def _ask(
        self, operation: Callable[Concatenate[str, P], Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Flush, then call an operation of the repository for this session."""
        self._check_open()
        await self._flusher.flush(self._unit)
        return await self._connection.portal.run(operation, self.session_id, *args, **kwargs)
