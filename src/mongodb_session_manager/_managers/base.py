"""The base of both session managers: Strands' session logic over a unit of work, and when recorded changes are flushed.

A callback per event runs Strands' own methods, which record changes, and then awaits one flush on the loop of the
client. No code here does I/O on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress
from typing import Any, Unpack

from strands import Agent
from strands.bidi.hooks.events import BidiAgentStopEvent
from strands.hooks import (
    AfterInvocationEvent,
    AgentInitializedEvent,
    BeforeInvocationEvent,
    HookRegistry,
    MessageAddedEvent,
    MessageUpdatedEvent,
)
from strands.types.agent import LocalAgent
from strands.types.content import Message
from strands.types.session import SessionMessage

from .._format.dates import now
from .._format.ids import checked_id
from .._io.loop import ExitOrder, close_at_exit
from .._io.portal import running_loop
from .._io.threads import compute
from .._notifications.notify import DRAIN_TIMEOUT, drain
from ..errors import (
    AgentNotFoundError,
    EncodingError,
    EventLoopError,
    InvalidArgumentError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionClosedError,
)
from .capture import capture_config, capture_metrics, guardrail_event
from .flusher import Flusher
from .multi_agents import OrchestratorSessionManager
from .options import Configuration, ManagerOptions
from .restoring import RESTORE_ERRORS, restore_error
from .unit_of_work import UnitOfWork
from .user_hooks import Hook

logger = logging.getLogger(__name__)

_FIRST, _LAST = -math.inf, math.inf
"""Orders of callbacks: before and after those of all other hook providers."""

_FINAL_MESSAGE_DELAY = 0.1
"""Seconds that the final message of a turn waits for the end of the invocation, to be sent with its metrics.

A user's hook, a middleware or a slow client can delay that end.
"""


def _is_final(message: Message) -> bool:
    """Return whether a message ends a turn: a message of the assistant that calls no tool."""
    return message["role"] == "assistant" and not any("toolUse" in block for block in message["content"])


def _follows_its_own_id(message: Message, agent: LocalAgent) -> bool:
    """Return whether an agent's last two messages have the same tracking id: the last one did not replace the other."""
    if len(agent.messages) < 2 or agent.messages[-1] is not message:
        return False
    return agent.messages[-2].get("tracking_id") == message.get("tracking_id")


def checked_prompt_metadata(prompt_metadata: object) -> dict[str, Any]:
    """Return `prompt_metadata` if it is a dict.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not isinstance(prompt_metadata, dict):
        raise InvalidArgumentError(f"prompt_metadata must be a dict, not {type(prompt_metadata).__name__}")
    return prompt_metadata


class SessionManagerBase(OrchestratorSessionManager):
    """Everything but how the caller waits."""

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
        self.session_id = checked_id(session_id, "session_id")
        configuration = _shared or Configuration.of(connection_string, database_name, collection_name, options)
        self._options = configuration.options
        self._connection = configuration.connection
        self._owns_connection = configuration.owns_connection
        self._repository = configuration.repository()
        self._work: UnitOfWork | None = None
        self._closed = False
        self._closing: asyncio.Event | None = None
        self._invoked: set[str] = set()
        self._delayed: dict[str, asyncio.TimerHandle] = {}
        self._stopped: dict[str, MongoDBSessionError] = {}
        self._stopped_multi_agents = {}
        self._flusher = Flusher(self.session_id, self._connection, self._repository)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "new" if self._work is None else "open"
        return f"<{type(self).__name__} session_id={self.session_id!r}, {state}>"

    @property
    def _unit(self) -> UnitOfWork:
        if self._work is None:
            raise SessionClosedError(
                f"session {self.session_id!r} is not open: use `async with manager:` or "
                "`await create_mongodb_session_manager_async(...)`"
            )
        return self._work

    async def _open(self) -> None:
        """Load the session. Runs on the loop of the client."""
        async with self._flusher.lock():
            if self._work is not None:
                return
            document = await self._repository.open_session(self.session_id)
            close_at_exit(self._aclose_at_exit, asyncio.get_running_loop(), ExitOrder.SESSIONS)
            inline = self._options.max_inline_attachment_bytes
            work = await compute(UnitOfWork, self.session_id, document, inline, self._fetch_messages)
            super().__init__(self.session_id, work)
            self._work = work

    # Strands' contract: always synchronous, and never waiting for I/O on a thread whose event loop runs.

    def register_hooks(self, registry: HookRegistry, **kwargs: Any) -> None:
        """Register the callbacks that store an agent or orchestrator."""
        registry.add_callback(AgentInitializedEvent, lambda event: self.initialize(event.agent))
        # Last: if another callback raises, there is neither an invocation nor an AfterInvocationEvent.
        registry.add_callback(BeforeInvocationEvent, self._on_before_invocation, order=_LAST)
        registry.add_callback(MessageAddedEvent, self._on_message_added)
        registry.add_callback(MessageUpdatedEvent, self._on_message_updated)
        # The first one stores the turn, even if other callbacks raise; the last one stores their changes.
        registry.add_callback(AfterInvocationEvent, self._on_invocation_ended, order=_FIRST)
        registry.add_callback(AfterInvocationEvent, self._on_after_invocation, order=_LAST)
        registry.add_callback(BidiAgentStopEvent, self._on_stop, order=_FIRST)
        self._register_multi_agent_hooks(registry, each_node=self._options.save_on == "message")

    def initialize(self, agent: LocalAgent, **kwargs: Any) -> None:
        """Restore an agent from the loaded session, or record it as new. Sends nothing.

        Raises:
            SessionException: This manager has initialized an agent with that id before.
            InvalidArgumentError: The agent's id is not valid.
            DatabaseError: The stored agent cannot be restored.
        """
        work = self._unit
        checked_id(agent.agent_id, "agent_id")
        work.prepare(agent)
        self._restore(agent, **kwargs)
        work.keep_malformed_state(agent)
        if isinstance(agent, Agent):
            if (offset := work.corrected_offset(agent.agent_id)) is not None:
                agent.conversation_manager.removed_message_count = offset
        else:
            work.start_invocation(agent.agent_id)  # no event marks the start of a bidirectional agent's invocation
        work.release(agent.agent_id)
        work.record_config(agent.agent_id, capture_config(agent))

    def _restore(self, agent: LocalAgent, **kwargs: Any) -> None:
        """Let Strands restore an agent; if it cannot, raise an error that names the session and the field."""
        is_stored = self._unit.is_stored(agent.agent_id)
        try:
            super().initialize(agent, **kwargs)
            return
        except RESTORE_ERRORS as error:
            failure = restore_error(self.session_id, agent.agent_id, error) if is_stored else None
            if failure is None:
                raise
        raise failure

    def append_message(self, message: Message, agent: LocalAgent, **kwargs: Any) -> None:
        """Append a message to the agent's stored conversation.

        Raises:
            AgentNotFoundError: This manager has not initialized the agent.
            EncodingError: A value in the message cannot be stored.
            MessageTooLargeError: The message is too large.
            SessionConflictError: Another writer has stored a message of the agent.
        """
        self._check_initialized(agent)
        self._unit.raise_refusal(agent.agent_id)
        if _follows_its_own_id(message, agent):
            self._unit.end_message(agent.agent_id)
        super().append_message(message, agent, **kwargs)
        self._recorded(agent)

    def redact_latest_message(
        self,
        redact_message: Message,
        agent: LocalAgent,
        action: str = "BLOCKED",
        stop_reason: str | None = None,
        guardrail_trace: Any = None,
        **kwargs: Any,
    ) -> None:
        """Replace the agent's latest message with `redact_message`, and store a guardrail event.

        Args:
            redact_message: The replacement; the original message is removed completely.
            agent: The agent.
            action: The action of the guardrail.
            stop_reason: The model's stop reason; see `GUARDRAIL_STOP_REASONS`.
            guardrail_trace: The trace of Amazon Bedrock; text that it quotes from the conversation is not stored.
            **kwargs: Accepted for later versions of Strands.
        """
        work = self._unit
        self._check_initialized(agent)
        event = guardrail_event(action, stop_reason, guardrail_trace, now())
        super().redact_latest_message(redact_message, agent, **kwargs)
        work.record_guardrail(agent.agent_id, event)
        self._recorded(agent)

    def sync_agent(self, agent: LocalAgent, **kwargs: Any) -> None:
        """Store the agent's state, if it has changed.

        An agent that was constructed without this manager and is new to the session is stored with its messages.
        """
        work = self._unit
        if not work.holds(checked_id(agent.agent_id, "agent_id")):
            self.initialize(agent)
        work.record_config(agent.agent_id, capture_config(agent))
        super().sync_agent(agent, **kwargs)
        self._recorded(agent)

    def _recorded(self, agent: LocalAgent) -> None:
        self._flusher.recorded(agent, self._unit, self._unit.raise_refused, agent.agent_id)

    def _check_initialized(self, agent: LocalAgent) -> None:
        if not self._unit.is_initialized(agent.agent_id):
            raise AgentNotFoundError(
                f"agent {agent.agent_id!r} was not initialized by this session manager: construct it with "
                "Agent(session_manager=manager), or call manager.initialize(agent) first"
            )

    async def _on_message_added(self, event: MessageAddedEvent[LocalAgent]) -> None:
        agent = event.agent
        try:
            with self._flusher.recording(agent):
                self._append_added(event.message, agent)
                self.sync_agent(agent)
            if self._is_due(event.message, agent):
                await self._flush(agent.agent_id)
            elif _is_final(event.message):
                self._delayed[agent.agent_id] = asyncio.get_running_loop().call_later(
                    _FINAL_MESSAGE_DELAY, self._start_delayed
                )
        except MongoDBSessionError as error:
            self._stopped[agent.agent_id] = error
            raise

    def _append_added(self, message: Message, agent: LocalAgent) -> None:
        """Append a message. Remove it from `agent.messages` if it cannot be stored, so that the agent can continue."""
        is_continuation = not _follows_its_own_id(message, agent) and self._unit.is_continuation(
            agent.agent_id, message
        )
        try:
            self.append_message(message, agent)
        except (EncodingError, MessageTooLargeError):
            # A continued message stays stored without the addition, which only the agent holds.
            if not is_continuation:
                for position in [n for n, added in enumerate(agent.messages) if added is message][-1:]:
                    del agent.messages[position]
            raise

    async def _on_message_updated(self, event: MessageUpdatedEvent[LocalAgent]) -> None:
        self._unit.record_replacement(event.agent.agent_id, event.tracking_id, event.message)
        await self._flush(event.agent.agent_id)

    async def _on_stop(self, event: BidiAgentStopEvent) -> None:
        with self._flusher.recording(event.agent):
            self.sync_agent(event.agent)
        await self._flush(event.agent.agent_id)

    def _on_before_invocation(self, event: BeforeInvocationEvent) -> None:
        self._invoked.add(event.agent.agent_id)
        self._stopped.pop(event.agent.agent_id, None)
        self._unit.start_invocation(event.agent.agent_id)

    async def _on_invocation_ended(self, event: AfterInvocationEvent) -> None:
        """Store the turn. A failure is raised after the other callbacks: they can release resources."""
        agent = event.agent
        self._invoked.discard(agent.agent_id)
        if (delayed := self._delayed.pop(agent.agent_id, None)) is not None:
            delayed.cancel()
        try:
            try:
                with self._flusher.recording(agent):
                    self.sync_agent(agent)
                self._unit.record_metrics(agent.agent_id, capture_metrics(agent))
            finally:
                await self._flusher.flush(self._unit)
        except MongoDBSessionError as error:
            self._stopped.setdefault(agent.agent_id, error)

    async def _on_after_invocation(self, event: AfterInvocationEvent) -> None:
        agent = event.agent
        stopped = self._stopped.pop(agent.agent_id, None)
        if stopped is not None:
            # The changes can be stored by now, but the turn was stopped, and Strands might have wrapped the reason.
            raise stopped
        with self._flusher.recording(agent):
            self.sync_agent(agent)
        await self._flush(agent.agent_id)

    def _is_due(self, message: Message, agent: LocalAgent) -> bool:
        """Return whether a message is flushed now, and not with the end of the invocation."""
        if not isinstance(agent, Agent):
            return True  # there is no event for the end of its invocations
        saves_messages = self._options.save_on == "message"
        if agent.agent_id not in self._invoked:
            return _is_final(message) or saves_messages  # there is no event for the end of a direct tool call
        return saves_messages and not _is_final(message)

    def _fetch_messages(self, agent_id: str, begin: int, end: int) -> list[SessionMessage]:
        """Read messages for Strands' synchronous constructor of an agent, which waits for them."""
        if running_loop() is self._connection.portal.loop:
            raise EventLoopError(
                f"the conversation manager of agent {agent_id!r} needs {end - begin} older messages, which were not "
                "loaded with the session and cannot be read on the event loop of the client: construct the agent in a "
                "thread, as in `await asyncio.to_thread(Agent, ...)`"
            )
        read = self._repository.list_messages
        return self._connection.portal.call(read, self.session_id, agent_id, end - begin, begin)

    async def _flush(self, agent_id: str | None = None) -> None:
        """Wait until every recorded change is stored; raise the error of a failed write, of one agent or of all."""
        await self._flusher.flush(self._unit)
        self._unit.raise_refused(agent_id)

    def _start_delayed(self) -> None:
        with suppress(EventLoopError):  # closing, or the next flush, raises it
            self._flusher.start(self._unit)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError(f"session {self.session_id!r} is closed: open it with a new manager")
        _ = self._unit

    def _hook_for(self, action: str) -> Hook | None:
        return self._options.feedback_hook if action == "add" else self._options.metadata_hook

    async def _list_messages(
        self, session_id: str, agent_id: str, limit: int | None, offset: int
    ) -> list[SessionMessage]:
        return await self._repository.list_messages(session_id, agent_id, limit, offset)

    async def _update_agent_config(
        self,
        session_id: str,
        agent_id: str,
        model: str | None,
        system_prompt: str | None,
        prompt_metadata: dict[str, Any] | None,
    ) -> None:
        await self._repository.update_agent_config(session_id, agent_id, model, system_prompt, prompt_metadata)
        given = {"model": model, "system_prompt": system_prompt}
        self._unit.keep_config(agent_id, [name for name, value in given.items() if value is not None])

    async def _aclose(self, notification_timeout: float = DRAIN_TIMEOUT) -> None:
        """Flush, deliver pending notifications, and close an owned connection. Runs on the loop of the client."""
        if self._closing is not None:
            await self._closing.wait()
            return
        self._closing = asyncio.Event()
        try:
            await self._close_work()
        finally:
            try:
                await drain(self._connection, notification_timeout, self.session_id)
            finally:
                try:
                    if self._owns_connection:
                        await self._connection.aclose()
                finally:
                    self._closing.set()

    async def _aclose_at_exit(self, seconds: float) -> None:
        """Flush when the interpreter ends; notifications and connections are closed later."""
        if self._closing is None:
            self._closing = asyncio.Event()
            try:
                await self._close_work()
            finally:
                self._closing.set()

    async def _close_work(self) -> None:
        self._closed = True
        if self._work is not None:
            self._work.close()
            if not self._work.is_settled:
                await self._flusher.flush_here(self._work)
            self._work.raise_unreported_refusal()
