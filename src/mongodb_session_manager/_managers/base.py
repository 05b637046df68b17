"""The base of both session managers: Strands' session logic over a unit of work, and when recorded changes are flushed.

A callback per event runs Strands' own methods, which record changes, and then awaits one flush on the loop of the
client. No code here does I/O on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress
from functools import partial
from typing import Any, cast

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
from .._storage.session_storage import SessionStorage
from ..errors import (
    AgentNotFoundError,
    EncodingError,
    EventLoopError,
    InvalidArgumentError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionBusyError,
)
from .capture import capture_base, capture_config, capture_metrics, guardrail_event
from .lifecycle import SessionLifecycle
from .restoring import RESTORE_ERRORS, WithoutStorage, restore_error
from .turns import can_be_changed

logger = logging.getLogger(__name__)

_FIRST, _LAST = -math.inf, math.inf
"""Orders of callbacks: before and after those of all other hook providers."""


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


class SessionManagerBase(SessionLifecycle):
    """Everything but how the caller waits."""

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
        self._register_multi_agent_hooks(registry, each_node=self._options.save_on != "invocation")

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
        with work.restoring(agent):
            self._restore(agent, **kwargs)
        work.keep_malformed_state(agent)
        if isinstance(agent, Agent):
            self._synced.discard(agent.agent_id)
            if (offset := work.agent(agent.agent_id).corrected_offset) is not None:
                agent.conversation_manager.removed_message_count = offset
        else:
            work.start_invocation(agent.agent_id)  # no event marks the start of a bidirectional agent's invocation
            self._turns.use_lease(agent.agent_id)
        work.release(agent)
        work.record_config(agent.agent_id, capture_config(agent))
        self._agents[agent.agent_id] = agent

    def _restore(self, agent: LocalAgent, **kwargs: Any) -> None:
        """Let Strands restore an agent; if it cannot, raise an error that names the session and the field."""
        is_stored = self._unit.is_stored(agent.agent_id)
        try:
            self._session.for_strands(super().initialize, self._without_own_storage(agent), **kwargs)
            return
        except RESTORE_ERRORS as error:
            failure = restore_error(self.session_id, agent.agent_id, error) if is_stored else None
            if failure is None:
                raise
        raise failure

    def _without_own_storage(self, agent: LocalAgent) -> LocalAgent:
        """Return the agent without the session's own storage, about which Strands' session logic would warn."""
        storage = getattr(agent, "storage", None)
        is_own = isinstance(storage, SessionStorage) and storage.session is self._session_storage.session
        return cast(LocalAgent, WithoutStorage(agent)) if is_own else agent

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
        self._session.for_strands(super().append_message, message, agent, **kwargs)
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
        self._session.for_strands(super().redact_latest_message, redact_message, agent, **kwargs)
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
        self._session.for_strands(super().sync_agent, agent, **kwargs)
        work.agent(agent.agent_id).stored.keep(len(agent.messages))
        if isinstance(agent, Agent):
            self._synced.add(agent.agent_id)
            if agent.agent_id not in self._turns.running:
                work.record_view(agent, capture_base(agent))
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
            is_due = self._is_due(event.message, agent)
            with self._flusher.recording(agent):
                self._append_added(event.message, agent)
                if is_due or not _is_final(event.message):
                    self.sync_agent(agent)
            if is_due:
                if self._may_overlap(event.message, agent):
                    self._start_flush()
                else:
                    await self._flush(agent.agent_id)
            elif _is_final(event.message):
                # The end of the invocation follows, and records the state.
                self._turns.delay(agent.agent_id, partial(self._flush_final, agent))
        except MongoDBSessionError as error:
            self._turns.stop(agent.agent_id, error)
            raise
        except asyncio.CancelledError:
            self._turns.stop_waiting()
            raise

    def _flush_final(self, agent: LocalAgent) -> None:
        """Start to store a final message whose invocation does not end soon."""
        # The end of the invocation raises the error again.
        with suppress(MongoDBSessionError), self._flusher.recording(agent):
            self.sync_agent(agent)
        self._start_flush()

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
        self._turns.release_lease(event.agent.agent_id)
        await self._flush(event.agent.agent_id)

    async def _on_before_invocation(self, event: BeforeInvocationEvent) -> None:
        agent_id = event.agent.agent_id
        await self._turns.begin(agent_id, is_stored_first=bool(event.messages))
        self._unit.start_invocation(agent_id)

    async def _on_invocation_ended(self, event: AfterInvocationEvent) -> None:
        """Store the turn. A failure is raised after the other callbacks: they can release resources."""
        agent = event.agent
        self._turns.end(agent.agent_id)
        try:
            try:
                with self._flusher.recording(agent):
                    self.sync_agent(agent)
                self._unit.record_metrics(agent.agent_id, capture_metrics(agent))
            finally:
                self._turns.release_or_pause_lease(event, is_first=True)
                await self._flusher.flush(self._unit)
        except MongoDBSessionError as error:
            self._turns.stop(agent.agent_id, error)

    async def _on_after_invocation(self, event: AfterInvocationEvent) -> None:
        try:
            await self._finish_invocation(event)
        except SessionBusyError:
            if not self._turns.is_cancelled:
                raise
            # Otherwise the caller gets the cancellation.

    async def _finish_invocation(self, event: AfterInvocationEvent) -> None:
        agent = event.agent
        if (stopped := self._turns.stopped_by(agent.agent_id)) is not None:
            # The changes can be stored by now, but the turn was stopped, and Strands might have wrapped the reason.
            self._turns.release_or_pause_lease(event)
            if self._turns.keeps_lease_until(event):
                self._start_flush()  # releases the lease
            raise stopped
        if can_be_changed(event):
            with self._flusher.recording(agent):
                self.sync_agent(agent)
        self._turns.release_or_pause_lease(event)
        await self._flush(agent.agent_id)

    def _is_due(self, message: Message, agent: LocalAgent) -> bool:
        """Return whether a message is flushed now, and not with the end of the invocation."""
        if not isinstance(agent, Agent):
            return True  # there is no event for the end of its invocations
        saves_messages = self._options.save_on != "invocation"
        if agent.agent_id not in self._turns.running:
            return _is_final(message) or saves_messages  # there is no event for the end of a direct tool call
        return saves_messages and not _is_final(message)

    def _may_overlap(self, message: Message, agent: LocalAgent) -> bool:
        """Return whether the model can be called while a message is stored.

        The first write of a turn that takes the lease is awaited: if another manager has its turn, no model is called.
        """
        return (
            self._options.save_on == "overlap"
            and message["role"] == "user"
            and agent.agent_id in self._turns.running
            and self._turns.is_certain
        )

    async def _flush(self, agent_id: str | None = None) -> None:
        """Wait until every recorded change is stored; raise the error of a failed write, of one agent or of all."""
        await self._flusher.flush(self._unit)
        self._unit.raise_refused(agent_id)

    def _start_flush(self) -> None:
        with suppress(EventLoopError):  # closing, or the next flush, raises it
            self._flusher.start(self._unit)

    async def _list_messages(
        self, session_id: str, agent_id: str, limit: int | None, offset: int, newest_first: bool, before: int | None
    ) -> list[SessionMessage]:
        return await self._repository.list_messages(
            session_id, agent_id, limit, offset, newest_first=newest_first, before=before
        )

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

    def _record_last_changes(self) -> None:
        """Record the changes of agents since their last turn."""
        if self._closed or self._work is None:
            return
        for agent_id, agent in tuple(self._agents.items()):
            if not isinstance(agent, Agent) or self._work.is_refused(agent_id):
                continue
            is_ending = self._turns.is_delayed(agent_id)  # for example, a stream that was not read to its end
            if agent_id in self._turns.running and not is_ending:
                continue
            if is_ending or agent_id in self._synced or self._work.has_other_state(agent):
                with self._flusher.recording(agent):
                    self.sync_agent(agent)
            else:
                self._work.record_view(agent, capture_base(agent))
