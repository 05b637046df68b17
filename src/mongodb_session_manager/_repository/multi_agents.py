"""The methods for the states of Strands' graphs and swarms."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from bson import ObjectId

from .._format.codec import decode
from .._format.documents import Document
from .._format.ids import checked_id
from .._format.labels import guard
from .._format.malformed import MalformedField
from .._format.multi_agents import (
    MultiAgentWrite,
    compile_overwrite,
    compile_write,
    encode_state,
    first_write,
    path_of,
    reconcile_write,
)
from .._format.sizes import of_multi_agent
from .._format.statements import Update
from .._io.threads import compute
from .._store.expiry import matched
from .._store.lease import Lease
from .._store.lease_guard import LeaseGuard, matched_with_lease
from .._store.sessions import ROUNDS
from ..errors import AgentNotFoundError, DatabaseError, MongoDBSessionError, SessionNotFoundError, StateTooLargeError
from .base import RepositoryMethods

if TYPE_CHECKING:
    from strands.multiagent import MultiAgentBase


class MultiAgentMethods(RepositoryMethods):
    """The methods for the states of graphs and swarms."""

    async def create_multi_agent(
        self, session_id: str, multi_agent: MultiAgentBase, *, owner: str | None = None, **kwargs: Any
    ) -> None:
        """Store a new graph or swarm; an existing one stays unchanged.

        Raises:
            SessionNotFoundError: The session does not exist.
            EncodingError: Its state cannot be stored.
            StateTooLargeError: The session document has no room for its state.
        """
        checked_id(session_id, "session_id")
        wanted = self._owner(owner)
        write = await compute(first_write, multi_agent.id, multi_agent.serialize_state(), uuid.uuid4().hex)
        async with self._connection.operation():
            update = _guarded(compile_write(session_id, write._replace(moment=self._connection.now())), wanted)
            if not await self._store_state(multi_agent.id, update, write.state):
                await self._store.sessions.get(session_id, {"_id": 1}, wanted)

    async def read_multi_agent(
        self, session_id: str, multi_agent_id: str, *, owner: str | None = None, **kwargs: Any
    ) -> dict[str, Any] | None:
        """Return the state of a graph or swarm, or `None` if the session has no such graph or swarm.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        stored = await self._find_state(session_id, self._owner(owner), multi_agent_id, "state")
        return None if stored is None else await compute(decode, stored.get("state"))

    async def update_multi_agent(
        self, session_id: str, multi_agent: MultiAgentBase, *, owner: str | None = None, **kwargs: Any
    ) -> None:
        """Replace the state of a graph or swarm.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session has no such graph or swarm.
            EncodingError: Its state cannot be stored.
            StateTooLargeError: The session document has no room for its state.
        """
        checked_id(session_id, "session_id")
        wanted = self._owner(owner)
        state = await compute(encode_state, multi_agent.serialize_state())
        async with self._connection.operation():
            moment, writer = self._connection.now(), uuid.uuid4().hex
            update = _guarded(compile_overwrite(session_id, multi_agent.id, state, writer, moment), wanted)
            if not await self._store_state(multi_agent.id, update, state):
                stored = await self._find_state(session_id, wanted, multi_agent.id, "writer")
                if stored is None:
                    raise AgentNotFoundError(f"session {session_id!r} has no multi-agent {multi_agent.id!r}")

    async def _apply_multi_agent(
        self,
        session_id: str,
        write: MultiAgentWrite,
        incarnation: ObjectId | None = None,
        lease: Lease | None = None,
        releases: bool = False,
    ) -> MongoDBSessionError | None:
        """Store a recorded state exactly once, in one command unless another writer interferes.

        Args:
            session_id: The session.
            write: The recorded state.
            incarnation: The incarnation of the session that was opened; `None` writes to the session that has the id
                now.
            lease: The lease of the manager, which must hold it or take it; `None` writes regardless of leases.
            releases: Whether the statement releases the lease.

        Returns:
            `None` if the state is stored, else the error of a state that cannot be stored: `SessionConflictError`,
            `SessionNotFoundError`, `AgentNotFoundError` or `StateTooLargeError`.

        Raises:
            MongoDBSessionError: It is unknown whether the state is stored. The same write can be applied again.
        """
        checked_id(session_id, "session_id")
        rest: MultiAgentWrite | None = write
        guard = None if lease is None else LeaseGuard(lease, releases)
        async with self._connection.operation():
            for _ in range(ROUNDS):
                if rest is None:
                    return None
                try:
                    rest = rest._replace(moment=self._connection.now())
                    update = compile_write(session_id, rest, incarnation)
                    if await self._store_state(rest.multi_agent_id, update, rest.state, guard):
                        return None
                    found = await self._store.sessions.get(session_id, {"incarnation": 1, "lease": 1})
                    if incarnation is not None and found.get("incarnation") != incarnation:
                        raise SessionNotFoundError(f"session {session_id!r} no longer exists")
                    stored = await self._find_state(session_id, None, write.multi_agent_id, "revision", "writer")
                except (StateTooLargeError, SessionNotFoundError) as error:
                    return error
                lost = None if guard is None else guard.check_lost(found)
                try:
                    rest = reconcile_write(rest, stored)
                except MongoDBSessionError as error:
                    return lost or error
                if rest is not None and guard is not None and (refusal := lost or await guard.wait(found)) is not None:
                    return refusal
        raise DatabaseError(f"session {session_id!r} kept changing while it was written: try again later")

    async def _store_state(
        self, multi_agent_id: str, update: Update, state: Any, guard: LeaseGuard | None = None
    ) -> bool:
        command: Any = matched
        if guard is not None:
            update = guard.added_to(update, self._connection.now())
            command = matched_with_lease if guard.takes else matched
        stored = await self._store.room.store_part(update, of_multi_agent(multi_agent_id), state, command)
        if stored and guard is not None:
            guard.confirm(stored if guard.takes else None)
        return bool(stored)

    async def _find_state(
        self, session_id: str, owner: str | None, multi_agent_id: str, *fields: str
    ) -> Document | None:
        path = path_of(multi_agent_id)
        found: Any = await self._store.sessions.get(session_id, {f"{path}.{field}": 1 for field in fields}, owner)
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
            if found is None:
                return None
        if not isinstance(found, dict):
            raise MalformedField(path, found, dict).error(session_id)
        stored: Document = found
        return stored


def _guarded(update: Update, owner: str | None) -> Update:
    return update._replace(filter={**update.filter, **guard(owner)})
