"""What a session document is: its keys and paths, and how Strands' dataclasses become documents and back. Pure.

_id, session_id          the session id
application_name         str | null
session_type             "AGENT"
created_at, updated_at   BSON dates, UTC
metadata, feedbacks, guardrail_events
agents.<agent key>
    agent_data           fields of Strands' SessionAgent + model, system_prompt, prompt_metadata
    created_at, updated_at   in forks of 1.0.0, the date of the fork; `agent_data` holds the date of creation
    next_message_id      the id the next message gets; absent in documents of versions before 1.0
    archived, revision   see `_buckets`; absent where nothing was moved, or replaced
    config_set           names of the configuration fields that a user has set; 1.0.0 kept it in `agent_data`
    messages             [{message, message_id, redact_message, created_at, updated_at, attachments?,
                           event_loop_metrics?}]
                         `event_loop_metrics.message_usage` is the usage of the message; 1.0.0 kept it in `usage`
incarnation              an ObjectId; the ids of all parts outside the document begin with it, see `_layout`
time_to_live, expires_at of a session that expires, see `_retention`
state, state_by, state_until
                         of a session that is being copied or deleted, see `_deletion`
removed_attachments      references of replaced messages, until the files are removed, see `_attachments`
migrating, moved         of a session of 1.0.0 whose migration is not complete, see `_migration`
multi_agents.<key>       see `_multi_agents`
copy_of                  the origin of an imported session or a fork: {session_id, at}
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar

from bson import ObjectId
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from ..errors import DatabaseError, InvalidArgumentError, raise_alone
from .codec import decode, encode

T = TypeVar("T")

_MESSAGE_DEPTH = 6  # document, agents, key, messages, element, message
_STATE_DEPTH = 5  # document, agents, key, agent_data, field
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_SECONDS = 10**11  # the year 5138; a larger number is milliseconds

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
    archive_revision: NotRequired[int]
    stale_below: NotRequired[int]
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
    incarnation: ObjectId
    time_to_live: NotRequired[int]
    expires_at: NotRequired[datetime]


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
        InvalidArgumentError: It is not an int >= 0 that MongoDB can hold.
    """
    return checked_count(value, "message_id")


def checked_count(value: object, name: str) -> int:
    """Return `value` if it is a number of messages.

    Raises:
        InvalidArgumentError: It is not an int >= 0 that MongoDB can hold.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgumentError(f"{name} must be an int >= 0, not {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise InvalidArgumentError(f"{name} must be an int >= 0 and < 2**63")
    return int(value)


def agent_key(agent_id: str) -> str:
    """Return the key of an agent: its id, with `%`, `.` and `$` percent-encoded."""
    return re.sub(r"[%.$]", lambda match: f"%{ord(match[0]):02X}", checked_id(agent_id, "agent_id"))


def agent_id_of(key: str) -> str:
    """Return the agent id of a key; the inverse of `agent_key`."""
    return re.sub(r"%(25|2E|24)", lambda match: chr(int(match[1], 16)), key)


def now() -> datetime:
    """Return the present as MongoDB stores it: UTC, whole milliseconds."""
    return to_milliseconds(datetime.fromtimestamp(time.time(), UTC))


def to_date(value: object) -> datetime:
    """Return the BSON date of an ISO string or datetime; one without a zone is UTC, `None` is the current time.

    Raises:
        InvalidArgumentError: It is not a date.
    """
    if value is None:
        return now()
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        if not isinstance(moment, datetime):
            raise InvalidArgumentError(f"a date must be an ISO 8601 string or a datetime, not {type(value).__name__}")
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise_alone(InvalidArgumentError("a date must be within the years 1 to 9999 in UTC"))
    except ValueError as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise_alone(InvalidArgumentError("a date must be an ISO 8601 string or a datetime, not another text"))
    return to_milliseconds(moment)


def date_from(value: object) -> datetime:
    """Return a stored date. A number is the time since 1970 (seconds or milliseconds); no date is the current time.

    Versions before 1.0, and manual repairs of their documents, stored dates in several forms.
    """
    if type(value) is datetime and value.tzinfo is UTC:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return to_milliseconds(_EPOCH + timedelta(seconds=value if abs(value) < _MOST_SECONDS else value / 1000))
        except (ValueError, OverflowError):
            return now()
    try:
        return to_date(value)
    except InvalidArgumentError:
        return now()


def as_date(value: object) -> object:
    """Return a stored value as a date if it is one, else unchanged."""
    try:
        return to_date(value) if isinstance(value, str | datetime) else value
    except InvalidArgumentError:
        return value


def to_milliseconds(moment: datetime) -> datetime:
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def to_iso(value: object) -> str:
    """Return the ISO string, in UTC, of a stored date."""
    return date_from(value).isoformat()


def new_session(session_id: str, application_name: str | None, moment: datetime) -> StoredSession:
    """Return the document of a session in which nothing has happened."""
    return {
        "_id": session_id,
        "session_id": session_id,
        "incarnation": ObjectId(),
        "application_name": application_name,
        "session_type": SessionType.AGENT.value,
        "created_at": moment,
        "updated_at": moment,
        "metadata": {},
        "feedbacks": [],
        "guardrail_events": [],
        "agents": {},
    }


def session_from(document: Mapping[str, Any]) -> Session:
    """Return Strands' view of a session document; a `session_type` that Strands does not know is `AGENT`."""
    return Session(
        session_id=document["_id"],
        session_type=SessionType.AGENT,
        created_at=to_iso(document.get("created_at")),
        updated_at=to_iso(document.get("updated_at")),
    )


# Odd values. A stored value with another type than its field has is read as the default and kept unchanged.

_SESSION_TYPES: Mapping[str, type] = {
    "metadata": dict,
    "feedbacks": list,
    "guardrail_events": list,
    "agents": dict,
    "multi_agents": dict,
}
_AGENT_TYPES: Mapping[str, type] = {"agent_data": dict, "messages": list, "usage": dict}
_BLOCKS = ("toolUse", "toolResult")
_MOST_COUNTED = 2**62  # the server refuses sums beyond 64 bits; NaN compares as not below


def usable(kind: type[T], value: object) -> T:
    """Return a stored value if it has the type of its field, else an empty value of that type."""
    return value if type(value) is kind else kind()


def usable_numbers(values: object) -> dict[str, Any]:
    """Return the numbers of a stored object that the server can increment, by name."""
    numbers: dict[str, Any] = values if type(values) is dict else {}
    return {name: number for name, number in numbers.items() if _is_number(number)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= _MOST_COUNTED


class OddField(NamedTuple):
    """A field of a session document that holds a value of the wrong type."""

    path: str
    value: Any
    kind: type

    def error(self, session_id: str) -> DatabaseError:
        """Return the error for a caller that needs the field."""
        return DatabaseError(
            f"session {session_id!r} holds a {type(self.value).__name__} in the field {self.path!r}, where a "
            f"{self.kind.__name__} is needed: correct or remove it"
        )


def odd_fields(document: Mapping[str, Any]) -> Iterator[OddField]:
    """Yield the fields of a session document that cannot be written into."""
    yield from _odd(document, "", _SESSION_TYPES)
    agents, multi_agents = document.get("agents"), document.get("multi_agents")
    for key, agent in agents.items() if type(agents) is dict else ():
        if type(agent) is not dict:
            yield OddField(f"agents.{key}", agent, dict)
            continue
        yield from _odd(agent, f"agents.{key}.", _AGENT_TYPES)
        data, usage = agent.get("agent_data"), agent.get("usage")
        if type(data) is dict and type(data.get("config_set", [])) is not list:
            yield OddField(f"agents.{key}.agent_data.config_set", data["config_set"], list)
        for name, number in usage.items() if type(usage) is dict else ():
            if not _is_number(number):
                yield OddField(f"agents.{key}.usage.{name}", number, int)
    for key, stored in multi_agents.items() if type(multi_agents) is dict else ():
        if type(stored) is not dict:
            yield OddField(f"multi_agents.{key}", stored, dict)


def _odd(fields: Mapping[str, Any], path: str, types: Mapping[str, type]) -> Iterator[OddField]:
    for name, kind in types.items():
        if name in fields and type(fields[name]) is not kind:
            yield OddField(f"{path}{name}", fields[name], kind)


def unusable_agents(document: Mapping[str, Any]) -> dict[str | None, OddField]:
    """Return, by agent id, the fields that prevent restoring and writing an agent; `None` stands for all agents.

    The document must have been read with `ODD_AGENTS` and `odd_messages`.
    """
    odd: list[Document] = document.get("odd_agents") or []
    found = {
        None if entry["k"] is None else agent_id_of(entry["k"]): OddField(
            "agents" if entry["k"] is None else f"agents.{entry['k']}", entry["v"], dict
        )
        for entry in odd
        if entry.get("v") is not None
    }
    for key, agent in document["agents"].items():
        for name, value, kind in (
            ("messages", agent.get("odd_messages"), list),
            ("agent_data", agent.get("agent_data"), dict),
            ("next_message_id", agent.get("next_message_id"), int),
        ):
            if value is not None and not isinstance(value, kind):
                found[agent_id_of(key)] = OddField(f"agents.{key}.{name}", value, kind)
    return found


def array_at(path: str) -> Document:
    """Return the aggregation expression for an array; another value is read as an empty array."""
    return {"$cond": [{"$isArray": [path]}, path, []]}


def number_at(path: str) -> Document:
    """Return the aggregation expression for a whole number; another value is read as 0."""
    return {"$cond": [{"$in": [{"$type": path}, ["int", "long"]]}, path, 0]}


def entries_at(path: str, *, odd: bool = False) -> Document:
    """Return the aggregation expression for the fields of an object that are objects; with `odd`, for all others."""
    entries = {"$objectToArray": {"$cond": [{"$eq": [{"$type": path}, "object"]}, path, {}]}}
    is_object = {"$eq": [{"$type": "$$this.v"}, "object"]}
    return {"$filter": {"input": entries, "cond": {"$not": [is_object]} if odd else is_object}}


def size_at(message: str) -> Document:
    """Return the aggregation expression for the size in bytes of an element of `messages`."""
    return {"$bsonSize": {"$cond": [{"$eq": [{"$type": message}, "object"]}, message, {"m": message}]}}


ODD_AGENTS: Document = {
    "$cond": [
        {"$in": [{"$type": "$agents"}, ["object", "missing", "null"]]},
        entries_at("$agents", odd=True),
        [{"k": None, "v": "$agents"}],
    ]
}
"""The aggregation expression for the odd values in `agents`; `k` is `null` if `agents` itself is odd."""


def odd_at(path: str, kind: str) -> Document:
    """Return the aggregation expression for a value of another type than `kind`, which is "object" or "array"."""
    return {"$cond": [{"$in": [{"$type": path}, [kind, "missing", "null"]]}, "$$REMOVE", path]}


STATE_FIELDS = ("state", "conversation_manager_state", "_internal_state")
_INTERNAL = ("interrupt_state", "model_state")


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
    data: Document = usable(dict, stored.get("agent_data"))
    state, manager_state, internal_state = (usable(dict, decode(data.get(name))) for name in STATE_FIELDS)
    return SessionAgent(
        agent_id=agent_id,
        state=state,
        conversation_manager_state=manager_state,
        _internal_state=usable_internal_state(internal_state),
        created_at=to_iso(data.get("created_at") or stored.get("created_at")),
        updated_at=to_iso(stored.get("updated_at") or data.get("updated_at")),
    )


def usable_internal_state(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a decoded `_internal_state` that Strands can restore."""
    return {name: value for name, value in stored.items() if name not in _INTERNAL or _is_internal(name, value)}


def _is_internal(name: str, value: Any) -> bool:
    if type(value) is not dict:
        return False
    return name != "interrupt_state" or (
        "activated" in value and type(value.get("context")) is dict and type(value.get("interrupts")) is dict
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


def message_from(stored: Any, position: int) -> SessionMessage | None:
    """Return Strands' view of a stored message, `None` if there is nothing that can be shown.

    `position` is its id if an old document holds none. A redacted message with an unusable replacement is not shown:
    its original must stay hidden.
    """
    if type(stored) is not dict:
        return None
    message, redacted = _content_from(stored.get("message")), stored.get("redact_message")
    if message is None or (redacted is not None and (redacted := _content_from(redacted)) is None):
        return None
    return SessionMessage(
        message=message,
        message_id=message_id_of(stored, position),
        redact_message=redacted,
        created_at=to_iso(stored.get("created_at")),
        updated_at=to_iso(stored.get("updated_at")),
    )


def message_id_of(stored: Any, position: int) -> int:
    """Return the id of an element of `messages`, or its position if it holds no id."""
    message_id = stored.get("message_id") if type(stored) is dict else None
    if isinstance(message_id, float) and message_id.is_integer():
        message_id = int(message_id)
    if not isinstance(message_id, int) or type(message_id) is bool or not 0 <= message_id < 2**63:
        return position
    return int(message_id)


def _content_from(stored: Any) -> Any:
    """Return a decoded message, `None` if it is not one; content that is text becomes one block."""
    message = decode(stored)
    if type(message) is not dict or type(message.get("role")) is not str:
        return None
    content = message.get("content")
    if type(content) is str:
        message["content"] = [{"text": content}]
    elif not isinstance(content, list | tuple):
        return None
    return message


def restorable(message: SessionMessage) -> SessionMessage | None:
    """Return a message with those of its blocks that Strands can go on from, `None` if there is none."""
    for shown in _shown(message):
        content = shown["content"]
        if not all(map(_is_block, content)):
            shown["content"] = [block for block in content if _is_block(block)]
            if not shown["content"]:
                return None
        if type(shown.get("tracking_id", "")) is not str:
            del shown["tracking_id"]
    return message


def is_restorable(message: SessionMessage) -> bool:
    """Return whether Strands can restore a message unchanged."""
    return all(
        all(map(_is_block, shown["content"])) and type(shown.get("tracking_id", "")) is str for shown in _shown(message)
    )


def _shown(message: SessionMessage) -> list[Any]:
    return [shown for shown in (message.message, message.redact_message) if shown is not None]


def _is_block(block: Any) -> bool:
    return type(block) is dict and not any(
        name in block
        and (
            type(block[name]) is not dict
            or type(block[name].get("toolUseId")) is not str
            or type(block[name].get("name", "")) is not str
        )
        for name in _BLOCKS
    )


def removed_messages(stored: Mapping[str, Any]) -> int:
    """Return how many of an agent's oldest messages its conversation manager has removed, and restoring leaves out."""
    data = stored.get("agent_data")
    state = decode(data.get("conversation_manager_state")) if type(data) is dict else None
    removed = state.get("removed_message_count") if type(state) is dict else None
    return removed if type(removed) is int and 0 <= removed < 2**31 else 0


def stored_removed(agent: str) -> Document:
    """Return the aggregation expression for `removed_messages`; `agent` is the path of the agent, with `$`."""
    removed = number_at(f"{agent}.agent_data.conversation_manager_state.removed_message_count")
    return {"$max": [removed, 0]}


def to_restore(agent: str) -> Document:
    """Return the aggregation expression for the messages of an agent that `removed_messages` leaves.

    If the stored count is greater than the number of messages, these are all messages. `agent` is the path of the
    agent, with `$`.
    """
    return {"$slice": [array_at(f"{agent}.messages"), _left_out(agent), 2**31 - 1]}


def ids_left_out(agent: str) -> Document:
    """Return the aggregation expression for the ids of the messages in the head that `to_restore` leaves out.

    The other ids are read with their messages: in a result of at most 16 MiB there is no room for every id twice.
    """
    return ids_of({"$slice": [array_at(f"{agent}.messages"), _left_out(agent)]})


NO_MESSAGE: list[Any] = []
"""Represents, in lists of ids, an element of `messages` that is no message. It is kept unchanged and has no id."""


def ids_of(messages: Any) -> Document:
    """Return the aggregation expression for the ids of `messages`; each as `stored_id` returns it."""
    is_message = {"$eq": [{"$type": "$$this"}, "object"]}
    stored = {"$cond": [is_message, {"$ifNull": ["$$this.message_id", None]}, NO_MESSAGE]}
    return {"$map": {"input": messages, "in": stored}}


def stored_id(message: object) -> Any:
    """Return the id of an element of `messages` as it is stored, `None` for a message without one."""
    return message.get("message_id") if isinstance(message, dict) else NO_MESSAGE


def restored(message: str) -> Document:
    """Return the aggregation expression for the fields of an element of `messages` that restoring needs."""
    fields = {name: f"{message}.{name}" for name in RESTORED}
    return {"$cond": [{"$eq": [{"$type": message}, "object"]}, fields, NO_MESSAGE]}


def _left_out(agent: str) -> Document:
    removed = {"$subtract": [stored_removed(agent), number_at(f"{agent}.archived")]}
    count = {"$size": array_at(f"{agent}.messages")}
    return {"$cond": [{"$gt": [removed, count]}, 0, {"$max": [removed, 0]}]}


def with_ids(messages: str, ids: Sequence[int]) -> Document:
    """Return the aggregation expression for `messages` with these ids; other elements are kept unchanged."""
    message = {"$arrayElemAt": [messages, "$$at"]}
    merged = {"$mergeObjects": [message, {"message_id": {"$arrayElemAt": [{"$literal": list(ids)}, "$$at"]}}]}
    numbered = {"$cond": [{"$eq": [{"$type": message}, "object"]}, merged, message]}
    return {"$map": {"input": {"$range": [0, len(ids)]}, "as": "at", "in": numbered}}


def numbered(ids: Sequence[Any], archived: int = 0, following: Any = None) -> tuple[list[Any], int]:
    """Return the ids that the messages of a head must have, and the id that follows them.

    Ids increase strictly, gaps are allowed. A message gets another id only if its id is invalid, or not greater than
    the id before it. That happens if a version before 1.0, which keeps its own counter, has also written.

    Args:
        ids: As stored, `None` for a message without one.
        archived: The number of messages below the head.
        following: The stored `next_message_id`; every archived message has an id below it.
    """
    last = archived - 1
    if archived and is_message_id(following) and not any(is_message_id(each) and each > last for each in ids):
        last = max(last, following - 1)
    sequence = []
    for position, each in enumerate(ids, archived):
        if each == NO_MESSAGE:
            sequence.append(each)
            continue
        last = following_id(each, position, last)
        sequence.append(last)
    return sequence, last + 1


def following_id(stored: Any, position: int, last: int) -> int:
    """Return the id of the message at `position`, which follows the id `last`; `stored` is its stored id."""
    return int(stored) if is_message_id(stored) and stored > last else max(position, last + 1)


def is_message_id(value: object) -> bool:
    """Return whether a stored value is the id of a message."""
    is_number = (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )
    return is_number and 0 <= value < 2**31  # type: ignore[operator]


def is_numbered(numbers: Mapping[str, Any]) -> bool:
    """Return whether the ids of an agent's head, as `head_numbers` brings them, need no change."""
    ids, following = numbers["ids"], numbers.get("next_message_id")
    return type(following) is int and numbered(ids, int(numbers["archived"]), following) == (ids, following)


def is_of_old(agent: Mapping[str, Any]) -> bool:
    """Return whether a loaded agent must be migrated: its ids, or the place of `config_set`."""
    return "odd_messages" not in agent and (not is_numbered(agent) or has_old_config_set(agent))


def has_old_config_set(agent: Mapping[str, Any]) -> bool:
    """Return whether `config_set` is where 1.0.0 kept it."""
    data = agent.get("agent_data")
    return type(data) is dict and type(data.get("config_set")) is list


def config_set(agent: Mapping[str, Any]) -> set[str]:
    """Return the names of the configuration fields of a stored agent that a user has set."""
    old = agent["agent_data"]["config_set"] if has_old_config_set(agent) else None
    places = (agent.get("config_set"), old)
    return {name for place in places if isinstance(place, list) for name in place if isinstance(name, str)}


def stored_config_set(agent: str) -> Document:
    """Return the aggregation expression for `config_set`; `agent` is the path of the agent, with `$`."""
    return {"$setUnion": [array_at(f"{agent}.config_set"), array_at(f"{agent}.agent_data.config_set")]}
