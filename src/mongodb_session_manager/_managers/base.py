"""The base of both session managers: Strands' session logic over a unit of work, and when recorded changes are flushed.

A callback per event runs Strands' own methods, which record changes, and then awaits one flush on the loop of the
client. No code here does I/O on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Hashable
from contextlib import suppress
from typing import Any, Unpack
from weakref import WeakValueDictionary

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
from .._format.documents import Document
from .._format.ids import checked_id
from .._io.loop import ExitOrder, close_at_exit
from .._io.portal import running_loop
from .._io.threads import compute
from .._notifications.notify import DRAIN_TIMEOUT, drain
from .._store.lease import Lease
from .._store.lease_queue import Caller
from ..errors import (
    AgentNotFoundError,
    EncodingError,
    EventLoopError,
    InvalidArgumentError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionBusyError,
    SessionClosedError,
)
from .capture import capture_base, capture_config, capture_metrics, guardrail_event
from .flusher import Flusher
from .open_session import OpenSession
from .options import Configuration, ManagerOptions
from .reloading import ReloadableSessionManager
from .restoring import RESTORE_ERRORS, restore_error
from .unit_of_work import UnitOfWork
from .user_hooks import Hook

logger = logging.getLogger(__name__)

_FIRST, _LAST = -math.inf, math.inf
"""Orders of callbacks: before and after those of all other hook providers."""

_HARMLESS = ("strands.agent.", "strands.event_loop.", "strands.models.")
"""The modules of Strands whose callbacks do not change what is stored of an agent at the end of an invocation."""

_FINAL_MESSAGE_DELAY = 0.1
"""Seconds that the final message of a turn waits for the end of the invocation, to be sent with its metrics.

A user's hook, a middleware or a slow client can delay that end.
"""


def _is_final(message: Message) -> bool:
    """Return whether a message ends a turn: a message of the assistant that calls no tool."""
    return message["role"] == "assistant" and not any("toolUse" in block for block in message["content"])


def _can_be_changed(event: AfterInvocationEvent) -> bool:
    """Return whether callbacks that can change the agent run between the first and the last one of its manager."""
    agent = event.agent
    modules = (getattr(callback, "__module__", None) or "" for callback in agent.hooks.get_callbacks_for(event))
    is_cleared: bool = agent.model.stateful  # by Strands, because the server of the model keeps the conversation
    return is_cleared or not all(module.startswith((*_HARMLESS, __package__)) for module in modules)


def _continues(event: AfterInvocationEvent) -> bool:
    """Return whether the agent continues at once, because a callback or a background task says so."""
    ends = event.result is not None and event.result.stop_reason in ("end_turn", "stop_sequence")
    return event.resume is not None or (ends and getattr(event, "_continuation_state", None) is not None)


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


class SessionManagerBase(ReloadableSessionManager):
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
        self._invoked, self._invoked_multi_agents = set(), set()
        self._synced = set()
        self._delayed: dict[str, asyncio.TimerHandle] = {}
        self._stopped: dict[str, MongoDBSessionError] = {}
        self._stopped_multi_agents = {}
        self._agents, self._orchestrators = WeakValueDictionary(), WeakValueDictionary()
        self._lease = configuration.lease(self._repository, self.session_id)
        self._flusher = Flusher(self.session_id, self._connection, self._repository, self._lease)

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

    async def _open(self, caller: Caller) -> None:
        """Load the session. Runs on the loop of the client."""
        async with self._flusher.lock():
            if self._work is not None:
                return
            try:
                work = await self._loaded(await self._repository._open(self.session_id, self._lease, caller))
                close_at_exit(self._aclose_at_exit, asyncio.get_running_loop(), ExitOrder.SESSIONS)
                self._session = OpenSession(work, self._repository, self._connection.portal, self._flusher)
                super().__init__(self.session_id, self._session)
                caller.check(self.session_id)
            except BaseException:
                await self._give_up()
                raise
            self._work = work

    async def _loaded(self, document: Document) -> UnitOfWork:
        inline = self._options.max_inline_attachment_bytes
        return await compute(UnitOfWork, self.session_id, document, inline, self._fetch_messages)

    async def _begin_turn(self, lease: Lease, turn: Hashable, *, is_stored_first: bool) -> None:
        """Begin an invocation; take the lease, unless a message is stored before a model or tool is called."""
        lease.begin(turn)
        if is_stored_first or lease.is_held:
            return
        try:
            await self._connection.portal.run(self._flusher.take_lease, lease)
        except BaseException:
            lease.stop_waiting()
            lease.end(turn)
            raise

    async def _give_up(self) -> None:
        """Release the lease, unless an invocation runs."""
        if self._lease is not None and not self._lease.has_turns:
            await self._lease.release()

    def _stop_opening(self, caller: Caller) -> None:
        """End an opening that its caller does not wait for any more, or that has failed."""
        if self._lease is not None:
            with suppress(EventLoopError):
                self._connection.portal.submit(self._leave, caller)

    async def _leave(self, caller: Caller) -> None:
        caller.leave()
        if self._work is not None:  # opened at the same moment
            await self._give_up()

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
            if (offset := work.corrected_offset(agent.agent_id)) is not None:
                agent.conversation_manager.removed_message_count = offset
        else:
            work.start_invocation(agent.agent_id)  # no event marks the start of a bidirectional agent's invocation
            if self._lease is not None:
                self._lease.begin(agent.agent_id)
        work.release(agent)
        work.record_config(agent.agent_id, capture_config(agent))
        self._agents[agent.agent_id] = agent

    def _restore(self, agent: LocalAgent, **kwargs: Any) -> None:
        """Let Strands restore an agent; if it cannot, raise an error that names the session and the field."""
        is_stored = self._unit.is_stored(agent.agent_id)
        try:
            self._session.for_strands(super().initialize, agent, **kwargs)
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
        work.keep_messages(agent.agent_id, len(agent.messages))
        if isinstance(agent, Agent):
            self._synced.add(agent.agent_id)
            if agent.agent_id not in self._invoked:
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
            with self._flusher.recording(agent):
                self._append_added(event.message, agent)
                self.sync_agent(agent)
            if self._is_due(event.message, agent):
                if self._may_overlap(event.message, agent):
                    self._start_flush()
                else:
                    await self._flush(agent.agent_id)
            elif _is_final(event.message):
                self._delayed[agent.agent_id] = asyncio.get_running_loop().call_later(
                    _FINAL_MESSAGE_DELAY, self._start_flush
                )
        except MongoDBSessionError as error:
            self._stopped[agent.agent_id] = error
            raise
        except asyncio.CancelledError:
            if self._lease is not None:
                self._lease.stop_waiting()
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
        if self._lease is not None:
            self._lease.end(event.agent.agent_id)
        await self._flush(event.agent.agent_id)

    async def _on_before_invocation(self, event: BeforeInvocationEvent) -> None:
        agent_id = event.agent.agent_id
        if self._lease is not None:
            await self._begin_turn(self._lease, agent_id, is_stored_first=bool(event.messages))
        self._invoked.add(agent_id)
        self._stopped.pop(agent_id, None)
        self._unit.start_invocation(agent_id)

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
                self._end_turn(event, is_first=True)
                await self._flusher.flush(self._unit)
        except MongoDBSessionError as error:
            self._stopped.setdefault(agent.agent_id, error)

    async def _on_after_invocation(self, event: AfterInvocationEvent) -> None:
        try:
            await self._finish_invocation(event)
        except SessionBusyError:
            if self._lease is None or not self._lease.is_cancelled:
                raise
            # Otherwise the caller gets the cancellation.

    async def _finish_invocation(self, event: AfterInvocationEvent) -> None:
        agent = event.agent
        stopped = self._stopped.pop(agent.agent_id, None)
        if stopped is not None:
            # The changes can be stored by now, but the turn was stopped, and Strands might have wrapped the reason.
            self._end_turn(event)
            if self._lease is not None and _can_be_changed(event):
                self._start_flush()  # releases the lease
            raise stopped
        with self._flusher.recording(agent):
            self.sync_agent(agent)
        self._end_turn(event)
        await self._flush(agent.agent_id)

    def _end_turn(self, event: AfterInvocationEvent, *, is_first: bool = False) -> None:
        """Have the next flush release the lease, unless other callbacks follow or the agent continues at once."""
        if self._lease is None:
            return
        if _continues(event) or (is_first and _can_be_changed(event)):
            self._lease.pause()
        else:
            self._lease.end(event.agent.agent_id)

    def _is_due(self, message: Message, agent: LocalAgent) -> bool:
        """Return whether a message is flushed now, and not with the end of the invocation."""
        if not isinstance(agent, Agent):
            return True  # there is no event for the end of its invocations
        saves_messages = self._options.save_on != "invocation"
        if agent.agent_id not in self._invoked:
            return _is_final(message) or saves_messages  # there is no event for the end of a direct tool call
        return saves_messages and not _is_final(message)

    def _may_overlap(self, message: Message, agent: LocalAgent) -> bool:
        """Return whether the model can be called while a message is stored.

        The first write of a turn that takes the lease is awaited: if another manager has its turn, no model is called.
        """
        return (
            self._options.save_on == "overlap"
            and message["role"] == "user"
            and agent.agent_id in self._invoked
            and (self._lease is None or self._lease.is_certain)
        )

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

    def _start_flush(self) -> None:
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

    def _record_last_changes(self) -> None:
        """Record the changes of agents since their last turn."""
        if self._closed or self._work is None:
            return
        for agent_id, agent in tuple(self._agents.items()):
            if not isinstance(agent, Agent) or agent_id in self._invoked or self._work.is_refused(agent_id):
                continue
            if agent_id in self._synced or self._work.has_other_state(agent):
                with self._flusher.recording(agent):
                    self.sync_agent(agent)
            else:
                self._work.record_view(agent, capture_base(agent))

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
            if self._lease is not None:
                self._lease.end_all()
            if self._flusher.is_due(self._work):
                await self._flusher.flush_here(self._work)
            self._work.raise_unreported_refusal()
