"""What a session document is: its keys and paths, and how Strands' dataclasses become documents and back. Pure.

_id, session_id          the session id
application_name         str | null
session_type             "AGENT"
created_at, updated_at   BSON dates, UTC
metadata, feedbacks, guardrail_events
agents.<agent key>
    agent_data           fields of Strands' SessionAgent + model, system_prompt, prompt_metadata
    created_at, updated_at   when it came into this session; `agent_data` says when it was made
    next_message_id      the id the next message gets; absent in documents of versions before 1.0
    archived, revision   see `_buckets`; absent where nothing was moved, or replaced
    config_set           names of the configuration fields that a user has set; 1.0.0 kept it in `agent_data`
    messages             [{message, message_id, redact_message, created_at, updated_at, attachments?,
                           event_loop_metrics?}]
                         `event_loop_metrics.message_usage` is the usage of the message; 1.0.0 kept it in `usage`
attachments_generation   from which on attachments may be added, see `_attachments`, and which life of a session of
                         this id it is, see `_beside`; absent for 0
session_ttl, kept_until, keep_until
                         of a session that expires, see `_beside`
multi_agents.<key>       see `_multi_agents`
copy_of                  what an imported session or a fork was made from: {session_id, at, by}
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NotRequired, TypedDict

from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from ._codec import decode, encode
from .errors import InvalidArgumentError, raise_alone

_MESSAGE_DEPTH = 6  # document, agents, key, messages, element, message
_STATE_DEPTH = 5  # document, agents, key, agent_data, field

USAGE = (
    "inputTokens",
    "outputTokens",
    "totalTokens",
    "cacheReadInputTokens",
    "cacheWriteInputTokens",
    "latencyMs",
    "invocations",
    "toolCalls",
)
"""The running totals of an agent, as Strands and Bedrock name them; `latencyMs` in milliseconds."""

RESTORED = ("message", "message_id", "redact_message", "created_at", "updated_at", "attachments")
"""The fields of a stored message that restoring an agent needs."""

MESSAGE_USAGE = "message_usage"
"""The field of a message's `event_loop_metrics` that holds the usage of this message alone.

The original removes `event_loop_metrics` before it builds a `SessionMessage`, which takes no unknown field.
"""

Document = dict[str, Any]
"""A document or a part of one, as the driver takes and gives it."""


class StoredMessage(TypedDict):
    """An element of `messages`."""

    message: Document
    message_id: int
    redact_message: Document | None
    created_at: datetime
    updated_at: datetime
    attachments: NotRequired[list[Any]]
    event_loop_metrics: NotRequired[Document]
    guardrail_event: NotRequired[Document]


class StoredAgent(TypedDict):
    """A value of `agents`."""

    agent_data: Document
    created_at: datetime
    updated_at: datetime
    next_message_id: int
    archived: NotRequired[int]
    revision: NotRequired[int]
    config_set: NotRequired[list[str]]
    usage: NotRequired[Document]
    messages: list[StoredMessage]


class StoredSession(TypedDict):
    """A document of the collection."""

    _id: str
    session_id: str
    application_name: str | None
    session_type: str
    created_at: datetime
    updated_at: datetime
    metadata: Document
    feedbacks: list[Document]
    guardrail_events: list[Document]
    agents: dict[str, StoredAgent]
    attachments_generation: int
    session_ttl: NotRequired[int]


def checked_id(value: object, name: str) -> str:
    """Return `value` if it can be the id of a session or an agent.

    Raises:
        InvalidArgumentError: It is not a non-empty `str` that MongoDB can hold.
    """
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be a str, not {type(value).__name__}")
    if not value:
        raise InvalidArgumentError(f"{name} must not be empty")
    if "\0" in value:
        raise InvalidArgumentError(f"{name} must not hold a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise_alone(InvalidArgumentError(f"{name} must be valid Unicode without lone surrogates"))
    return value


def checked_message_id(value: object) -> int:
    """Return `value` if it can be the id of a message.

    Raises:
        InvalidArgumentError: It is not a whole number from 0.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidArgumentError("message_id must be an int from 0")
    return value


def agent_key(agent_id: str) -> str:
    """Return the key of an agent: its id, with `%`, `.` and `$` percent-encoded."""
    return re.sub(r"[%.$]", lambda match: f"%{ord(match[0]):02X}", checked_id(agent_id, "agent_id"))


def agent_id_of(key: str) -> str:
    """Return the agent id of a key; the inverse of `agent_key`."""
    return re.sub(r"%(25|2E|24)", lambda match: chr(int(match[1], 16)), key)


def now() -> datetime:
    """Return the present as MongoDB stores it: UTC, whole milliseconds."""
    return _to_milliseconds(datetime.now(UTC))


def to_date(value: str | datetime | None) -> datetime:
    """Return the BSON date of an ISO string or datetime; one without a zone is UTC, `None` is the present."""
    if value is None:
        return now()
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return _to_milliseconds(moment)


def as_date(value: object) -> object:
    """Return the date that a stored value is, if it is one, else the value."""
    try:
        return to_date(value) if isinstance(value, str | datetime) else value
    except (ValueError, OverflowError):
        return value


def _to_milliseconds(moment: datetime) -> datetime:
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def to_iso(value: str | datetime | None) -> str:
    """Return the ISO string, in UTC, of a stored date."""
    return to_date(value).isoformat()


def new_generation() -> int:
    """Return the generation a new session begins with: it is higher than any that an earlier one of its id had."""
    return time.time_ns() // 1000


def new_session(
    session_id: str, application_name: str | None, moment: datetime, ttl: int | None = None
) -> StoredSession:
    """Return the document of a session in which nothing has happened; `ttl` are seconds, `None` if it stays."""
    session: StoredSession = {
        "_id": session_id,
        "session_id": session_id,
        "application_name": application_name,
        "session_type": SessionType.AGENT.value,
        "created_at": moment,
        "updated_at": moment,
        "metadata": {},
        "feedbacks": [],
        "guardrail_events": [],
        "agents": {},
        "attachments_generation": new_generation(),
    }
    if ttl is not None:
        session["session_ttl"] = ttl
    return session


def session_from(document: Mapping[str, Any]) -> Session:
    """Return Strands' view of a session document."""
    return Session(
        session_id=document["_id"],
        session_type=SessionType(document.get("session_type", SessionType.AGENT)),
        created_at=to_iso(document.get("created_at")),
        updated_at=to_iso(document.get("updated_at")),
    )


def agent_state(agent: SessionAgent) -> Document:
    """Return the fields of `agent_data` that follow the agent, encoded."""
    return {
        "state": encode(agent.state, depth=_STATE_DEPTH, name="state"),
        "conversation_manager_state": encode(
            agent.conversation_manager_state, depth=_STATE_DEPTH, name="conversation_manager_state"
        ),
        "_internal_state": encode(agent._internal_state, depth=_STATE_DEPTH, name="_internal_state"),
        "updated_at": to_date(agent.updated_at),
    }


def new_agent(agent: SessionAgent) -> Document:
    """Return the sub-document of an agent that has no messages yet."""
    created_at = to_date(agent.created_at)
    return {
        "agent_data": {"agent_id": agent.agent_id, "created_at": created_at, **agent_state(agent)},
        "created_at": created_at,
        "updated_at": to_date(agent.updated_at),
        "next_message_id": 0,
        "messages": [],
    }


def agent_from(agent_id: str, stored: Mapping[str, Any]) -> SessionAgent:
    """Return Strands' view of a stored agent."""
    data = stored.get("agent_data") or {}
    return SessionAgent(
        agent_id=agent_id,
        state=decode(data.get("state") or {}),
        conversation_manager_state=decode(data.get("conversation_manager_state") or {}),
        _internal_state=decode(data.get("_internal_state") or {}),
        created_at=to_iso(data.get("created_at") or stored.get("created_at")),
        updated_at=to_iso(stored.get("updated_at") or data.get("updated_at")),
    )


def message_body(message: SessionMessage) -> Document:
    """Return the fields of a stored message that a replacement changes; a redaction leaves nothing of the original."""
    redacted = message.redact_message is not None
    return {
        "message": encode(message.to_message(), depth=_MESSAGE_DEPTH, name="message"),
        "redact_message": encode(message.redact_message, depth=_MESSAGE_DEPTH, name="redact_message")
        if redacted
        else None,
        "updated_at": to_date(message.updated_at),
    }


def stored_message(message: SessionMessage, message_id: int) -> StoredMessage:
    """Return the element of `messages` for a message."""
    body = message_body(message)
    stored: StoredMessage = {
        "message": body["message"],
        "message_id": message_id,
        "redact_message": body["redact_message"],
        "created_at": to_date(message.created_at),
        "updated_at": body["updated_at"],
    }
    if usage := message_usage(message.message):
        stored["event_loop_metrics"] = {MESSAGE_USAGE: usage}
    return stored


def message_usage(message: Mapping[str, Any]) -> Document:
    """Return what the model reported of the call that produced a message: tokens, and latencies in milliseconds.

    Strands attaches it to assistant messages (`metadata`); empty for others.
    """
    metadata = message.get("metadata") or {}
    reported = {**(metadata.get("usage") or {}), **(metadata.get("metrics") or {})}
    return {name: value for name, value in reported.items() if isinstance(value, int | float)}


def message_from(stored: Mapping[str, Any], position: int) -> SessionMessage:
    """Return Strands' view of a stored message; `position` is its id where a document of old holds none."""
    redacted = stored.get("redact_message")
    return SessionMessage(
        message=decode(stored["message"]),
        message_id=int(stored.get("message_id", position)),
        redact_message=decode(redacted) if redacted is not None else None,
        created_at=to_iso(stored.get("created_at")),
        updated_at=to_iso(stored.get("updated_at")),
    )


def removed_messages(stored: Mapping[str, Any]) -> int:
    """Return how many of an agent's oldest messages its conversation manager has removed, and restoring leaves out."""
    state = decode((stored.get("agent_data") or {}).get("conversation_manager_state") or {})
    removed = state.get("removed_message_count")
    return max(removed, 0) if type(removed) is int else 0


def stored_removed(agent: str) -> Document:
    """Return the aggregation expression for `removed_messages`; `agent` is the path of the agent, with `$`."""
    removed = f"{agent}.agent_data.conversation_manager_state.removed_message_count"
    return {"$cond": [{"$in": [{"$type": removed}, ["int", "long"]]}, {"$max": [removed, 0]}, 0]}


def to_restore(agent: str) -> Document:
    """Return the aggregation expression for the messages of an agent that `removed_messages` leaves.

    If the stored count is greater than the number of messages, all of them are left. `agent` is the path of the agent,
    with `$`.
    """
    messages = {"$ifNull": [f"{agent}.messages", []]}
    return {"$slice": [messages, _left_out(agent), 2**31 - 1]}


def ids_left_out(agent: str) -> Document:
    """Return the aggregation expression for the ids of the messages in the head that `to_restore` leaves out.

    Those of the others come with them: a document of 16 MiB has no room for an id twice.
    """
    messages = {"$slice": [{"$ifNull": [f"{agent}.messages", []]}, _left_out(agent)]}
    return {"$map": {"input": messages, "in": {"$ifNull": ["$$this.message_id", None]}}}


def _left_out(agent: str) -> Document:
    removed = {"$subtract": [stored_removed(agent), {"$ifNull": [f"{agent}.archived", 0]}]}
    count = {"$size": {"$ifNull": [f"{agent}.messages", []]}}
    return {"$cond": [{"$gt": [removed, count]}, 0, {"$max": [removed, 0]}]}


def with_ids(messages: str, ids: Sequence[int]) -> Document:
    """Return the aggregation expression for `messages` with these ids."""
    message = {"$arrayElemAt": [messages, "$$at"]}
    merged = {"$mergeObjects": [message, {"message_id": {"$arrayElemAt": [{"$literal": list(ids)}, "$$at"]}}]}
    return {"$map": {"input": {"$range": [0, len(ids)]}, "as": "at", "in": merged}}


def numbered(ids: Sequence[Any], archived: int = 0, following: Any = None) -> tuple[list[int], int]:
    """Return the ids that the messages of a head must have, and the id that follows them.

    Ids increase strictly, gaps are allowed. A message keeps its id if it can: only one whose id is not above the one
    before it, or is no id, gets another. That happens where a version before 1.0, which counts for itself, has written
    as well.

    Args:
        ids: As stored, `None` for a message without one.
        archived: The number of messages below the head.
        following: The stored `next_message_id`; whatever is archived has an id below it.
    """
    last = archived - 1
    if archived and is_message_id(following) and not any(is_message_id(each) and each > last for each in ids):
        last = max(last, following - 1)
    sequence = []
    for position, each in enumerate(ids, archived):
        last = int(each) if is_message_id(each) and each > last else max(position, last + 1)
        sequence.append(last)
    return sequence, last + 1


def is_message_id(value: object) -> bool:
    """Return whether a stored value is the id of a message."""
    is_number = (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )
    return is_number and 0 <= value < 2**31  # type: ignore[operator]


def is_numbered(numbers: Mapping[str, Any]) -> bool:
    """Return whether the ids of an agent's head, as `head_numbers` brings them, need no change."""
    ids, following = numbers["ids"], numbers.get("next_message_id")
    return bool(is_message_id(following) and numbered(ids, int(numbers["archived"]), following) == (ids, following))


def is_of_old(agent: Mapping[str, Any]) -> bool:
    """Return whether a loaded agent has to be brought into today's form: its ids, and the place of `config_set`."""
    return not is_numbered(agent) or "config_set" in (agent.get("agent_data") or {})


def config_set(agent: Mapping[str, Any]) -> set[str]:
    """Return the names of the configuration fields of a stored agent that a user has set."""
    places = (agent.get("config_set"), (agent.get("agent_data") or {}).get("config_set"))
    return {name for place in places if isinstance(place, list) for name in place if isinstance(name, str)}


def stored_config_set(agent: str) -> Document:
    """Return the aggregation expression for `config_set`; `agent` is the path of the agent, with `$`."""
    places = (f"{agent}.config_set", f"{agent}.agent_data.config_set")
    return {"$setUnion": [{"$cond": [{"$isArray": place}, place, []]} for place in places]}
