"""`Turns`: the invocations of a manager's agents, or of its orchestrators, and the lease that they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from strands.hooks import AfterInvocationEvent

from .._io.connection import Connection
from .._store.lease import Lease
from ..errors import MongoDBSessionError
from .flusher import Flusher

_HARMLESS = ("strands.agent.", "strands.event_loop.", "strands.models.")
"""The modules of Strands whose callbacks do not change the stored parts of an agent at the end of an invocation."""

_FINAL_MESSAGE_DELAY = 0.1
"""Seconds that the final message of a turn waits for the end of the invocation, to be sent with its metrics.

A hook of the application, middleware or a slow client can delay that end.
"""


class Turns:
    """The running invocations, by the id of their agent or orchestrator.

    Args:
        kind: Distinguishes agents from orchestrators with the same id.
        lease: The lease of the manager; `None` without one.
        connection: Its connection.
        flusher: Flushes its changes.

    Attributes:
        running: The ids of the agents or orchestrators whose invocations run.
    """

    def __init__(self, kind: str, lease: Lease | None, connection: Connection, flusher: Flusher) -> None:
        self.running: set[str] = set()
        self._kind = kind
        self._lease = lease
        self._connection = connection
        self._flusher = flusher
        self._stopped: dict[str, MongoDBSessionError] = {}
        self._delayed: dict[str, asyncio.TimerHandle] = {}

    async def begin(self, owner_id: str, *, is_stored_first: bool) -> None:
        """Begin an invocation. Take the lease, unless storing a message takes it before a model or tool is called."""
        self.use_lease(owner_id)
        if self._lease is not None and not is_stored_first and not self._lease.is_held:
            try:
                await self._connection.portal.run(self._flusher.take_lease, self._lease)
            except BaseException:
                self.stop_waiting()
                self.release_lease(owner_id)
                raise
        self.running.add(owner_id)
        self._stopped.pop(owner_id, None)

    def end(self, owner_id: str) -> None:
        """End an invocation; `release_lease` or `release_or_pause_lease` must follow."""
        self.running.discard(owner_id)
        if (delayed := self._delayed.pop(owner_id, None)) is not None:
            delayed.cancel()

    def delay(self, owner_id: str, start_flush: Callable[[], None]) -> None:
        """Start a flush after `_FINAL_MESSAGE_DELAY`, unless the invocation ends before."""
        self._delayed[owner_id] = asyncio.get_running_loop().call_later(_FINAL_MESSAGE_DELAY, start_flush)

    def is_delayed(self, owner_id: str) -> bool:
        """Return whether an invocation has appended its final message and has not ended."""
        return owner_id in self._delayed

    def stop(self, owner_id: str, error: MongoDBSessionError) -> None:
        """Keep the error that stops an invocation, because Strands can wrap or only log it."""
        self._stopped.setdefault(owner_id, error)

    def stopped_by(self, owner_id: str) -> MongoDBSessionError | None:
        """Remove and return the error that has stopped an invocation."""
        return self._stopped.pop(owner_id, None)

    # The lease.

    def use_lease(self, owner_id: str) -> None:
        """Make the next write take the lease."""
        if self._lease is not None:
            self._lease.begin((self._kind, owner_id))

    def release_lease(self, owner_id: str) -> None:
        """Make the next flush release the lease, unless other invocations run."""
        if self._lease is not None:
            self._lease.end((self._kind, owner_id))

    def release_or_pause_lease(self, event: AfterInvocationEvent, *, is_first: bool = False) -> None:
        """Make the next flush release the lease, unless other callbacks follow or the agent continues at once."""
        if self._lease is None:
            return
        if _continues(event) or (is_first and can_be_changed(event)):
            self._lease.pause()
        else:
            self.release_lease(event.agent.agent_id)

    def keeps_lease_until(self, event: AfterInvocationEvent) -> bool:
        """Return whether the lease is released by the last callback of an invocation, and not by the first one."""
        return self._lease is not None and can_be_changed(event)

    def stop_waiting(self) -> None:
        """Refuse the writes that wait for the lease, because the invocation was cancelled."""
        if self._lease is not None:
            self._lease.stop_waiting()

    @property
    def is_cancelled(self) -> bool:
        """Whether the invocation was cancelled while its writes waited."""
        return self._lease is not None and self._lease.is_cancelled

    @property
    def is_certain(self) -> bool:
        """Whether no other manager can have taken the lease; always true without a lease."""
        return self._lease is None or self._lease.is_certain


def can_be_changed(event: AfterInvocationEvent) -> bool:
    """Return whether callbacks that can change the agent run between the first and the last one of its manager."""
    agent = event.agent
    modules = (getattr(callback, "__module__", None) or "" for callback in agent.hooks.get_callbacks_for(event))
    is_cleared: bool = agent.model.stateful  # by Strands, because the server of the model keeps the conversation
    return is_cleared or not all(module.startswith((*_HARMLESS, __package__)) for module in modules)


def _continues(event: AfterInvocationEvent) -> bool:
    """Return whether the agent continues at once, at the request of a callback or a background task."""
    ends = event.result is not None and event.result.stop_reason in ("end_turn", "stop_sequence")
    return event.resume is not None or (ends and getattr(event, "_continuation_state", None) is not None)
