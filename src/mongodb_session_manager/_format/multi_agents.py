"""The orchestrators of a session, Strands' graphs and swarms, and the statements that store them. Pure.

multi_agents.<key>       the key is the orchestrator's id, encoded as the id of an agent
    state                the result of its `serialize_state`
    revision             the number of changes of its state
    writer               the token of the open session that stored this revision
    created_at, updated_at

An orchestrator has no messages to count, so a write matches the revision that it follows. Each open session has its own
`writer`, which distinguishes a write whose acknowledgement was lost from another writer's.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from bson import ObjectId

from ..errors import AgentNotFoundError, MongoDBSessionError, SessionConflictError, StateTooLargeError, again
from .codec import decode, encode
from .dates import now
from .documents import Document
from .ids import agent_id_of, agent_key, checked_id
from .malformed import MalformedField
from .statements import Update

_STATE_DEPTH = 4  # document, multi_agents, key, state


class MultiAgentWrite(NamedTuple):
    """The new state of an orchestrator; `expected` is the stored revision, or `None` to create the orchestrator."""

    multi_agent_id: str
    state: Any
    revision: int
    expected: int | None
    writer: str
    moment: datetime


def path_of(multi_agent_id: str) -> str:
    return f"multi_agents.{agent_key(checked_id(multi_agent_id, 'multi_agent_id'))}"


def encode_state(state: Any) -> Any:
    return encode(state, depth=_STATE_DEPTH, name="state")


def first_write(multi_agent_id: str, state: Any, writer: str) -> MultiAgentWrite:
    checked_id(multi_agent_id, "multi_agent_id")
    return MultiAgentWrite(multi_agent_id, encode_state(state), 0, None, writer, now())


def compile_write(session_id: str, write: MultiAgentWrite, incarnation: ObjectId | None = None) -> Update:
    path = path_of(write.multi_agent_id)
    fields = {"state": write.state, "revision": write.revision, "writer": write.writer, "updated_at": write.moment}
    if write.expected is None:
        condition: Document = {path: {"$exists": False}}
        sets: Document = {path: {**fields, "created_at": write.moment}}
    else:
        condition = {f"{path}.revision": write.expected}
        sets = {f"{path}.{name}": value for name, value in fields.items()}
    if incarnation is not None:
        condition["incarnation"] = incarnation
    return Update({"_id": session_id, **condition}, {"$set": {**sets, "updated_at": write.moment}}, None)


def compile_overwrite(session_id: str, multi_agent_id: str, state: Any, writer: str, moment: datetime) -> Update:
    """Return the statement that overwrites the stored state with an encoded one, once for each `writer`."""
    path = path_of(multi_agent_id)
    sets = {f"{path}.state": state, f"{path}.writer": writer, f"{path}.updated_at": moment, "updated_at": moment}
    condition = {"_id": session_id, path: {"$exists": True}, f"{path}.writer": {"$ne": writer}}
    return Update(condition, {"$set": sets, "$inc": {f"{path}.revision": 1}}, None)


def reconcile_write(write: MultiAgentWrite, stored: Mapping[str, Any] | None) -> MultiAgentWrite | None:
    """Return the write to send after a write matched nothing, or `None` if the write is stored already.

    Raises:
        SessionConflictError: Another writer has stored a state; the write is not stored.
        AgentNotFoundError: The orchestrator no longer exists.
    """
    if stored is None:
        if write.expected is None:
            return write
        raise AgentNotFoundError(f"the session no longer has multi-agent {write.multi_agent_id!r}")
    revision = stored["revision"]
    # A writer never stores a revision twice. At revision 0 it does not matter which writer created the orchestrator.
    is_ours = stored["writer"] == write.writer or (write.expected is None and revision == 0)
    if not is_ours and revision != write.expected:
        raise SessionConflictError(
            f"multi-agent {write.multi_agent_id!r}: another writer stored its revision {revision} after this session "
            f"was loaded, so revision {write.revision} was not stored; open the session with a new manager and build "
            "the multi-agent again"
        )
    return None if revision == write.revision else write._replace(expected=revision)


class _Known:
    def __init__(self, newest: MultiAgentWrite, stored: int | None) -> None:
        self.newest = newest
        self.stored = stored
        self.refusal: MongoDBSessionError | None = None
        self.refusal_reported = False

    @property
    def is_settled(self) -> bool:
        return self.refusal is not None or self.stored == self.newest.revision


class MultiAgents:
    """The orchestrators of one open session. A state replaces the previous one, so only the newest is kept and sent."""

    def __init__(self, stored: Any, session_id: str = "") -> None:
        self._session_id = session_id
        self._writer = uuid.uuid4().hex
        self._known: dict[str, _Known] = {}
        self._malformed = MalformedField("multi_agents", stored, dict) if not isinstance(stored, dict | None) else None
        self._unusable: dict[str, MalformedField] = {}
        for key, value in stored.items() if type(stored) is dict else ():
            multi_agent_id = agent_id_of(key)
            revision = value.get("revision") if type(value) is dict else None
            if not isinstance(revision, int) or "state" not in value:
                self._unusable[multi_agent_id] = MalformedField(f"multi_agents.{key}", value, dict)
                continue
            newest = MultiAgentWrite(multi_agent_id, value["state"], revision, revision, self._writer, now())
            self._known[multi_agent_id] = _Known(newest, revision)

    def read(self, multi_agent_id: str) -> dict[str, Any] | None:
        """Return the newest state of an orchestrator, if there is one; raise `DatabaseError` if it is malformed."""
        if (field := self._unusable.get(multi_agent_id, self._malformed)) is not None:
            raise field.error(self._session_id)
        known = self._known.get(checked_id(multi_agent_id, "multi_agent_id"))
        return None if known is None else decode(known.newest.state)

    def is_current(self, multi_agent_id: str) -> bool:
        """Return whether the newest known state of an orchestrator is stored or pending, and was not refused."""
        known = self._known.get(checked_id(multi_agent_id, "multi_agent_id"))
        return known is not None and known.refusal is None

    def create(self, multi_agent_id: str, state: Any) -> None:
        self._known[multi_agent_id] = _Known(first_write(multi_agent_id, state, self._writer), None)

    def update(self, multi_agent_id: str, state: Any) -> None:
        """Record the state of an orchestrator, unless it is unchanged and stored.

        Raises:
            AgentNotFoundError: The orchestrator does not exist.
            MongoDBSessionError: An earlier state was refused for another reason than its size.
        """
        known = self._known.get(multi_agent_id)
        if known is None:
            raise AgentNotFoundError(f"the session has no multi-agent {multi_agent_id!r}")
        if known.refusal is not None and not isinstance(known.refusal, StateTooLargeError):
            self.raise_refusal(multi_agent_id)
        encoded, newest = encode_state(state), known.newest
        if encoded != newest.state:
            known.newest = newest._replace(state=encoded, revision=newest.revision + 1, moment=now())
        known.refusal = None

    @property
    def is_settled(self) -> bool:
        return all(known.is_settled for known in tuple(self._known.values()))

    def pending(self) -> list[MultiAgentWrite]:
        """Return the newest states that are not stored; at most one flush can call this at a time."""
        return [
            known.newest._replace(expected=known.stored)
            for known in tuple(self._known.values())
            if not known.is_settled
        ]

    def settle(self, write: MultiAgentWrite, refusal: MongoDBSessionError | None) -> None:
        known = self._known[write.multi_agent_id]
        if refusal is None:
            known.stored = write.revision
        else:
            known.refusal, known.refusal_reported = refusal, False

    def raise_refusal(self, multi_agent_id: str | None = None, *, unreported: bool = False) -> None:
        """Raise the error with which the state of an orchestrator, or of any one, was refused.

        With `unreported`, an error that was raised before is not raised again.
        """
        for candidate, known in tuple(self._known.items()):
            if (
                multi_agent_id in (None, candidate)
                and known.refusal is not None
                and not (unreported and known.refusal_reported)
            ):
                known.refusal_reported = True
                raise again(known.refusal)
