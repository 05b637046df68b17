"""Checks of the parts of a session before they are imported. Pure.

The stream can come from an untrusted source. A part is accepted if the functions that list, open, restore and export a
session can use it unchanged. Unknown fields are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import NoneType
from typing import Any

from strands import Agent
from strands.agent.conversation_manager import (
    NullConversationManager,
    SlidingWindowConversationManager,
    SummarizingConversationManager,
)
from strands.agent.state import AgentState

from .._format.attachment_refs import attached, references_of
from .._format.codec import MARKER, decode_own, encode
from .._format.dates import to_date
from .._format.documents import (
    MAX_NUMBER,
    MESSAGE_DEPTH,
    MESSAGE_USAGE,
    STATE_DEPTH,
    STATE_FIELDS,
    Document,
    agent_from,
    is_number,
    is_restorable,
    message_from,
    usable_internal_state,
)
from .._format.labels import checked_owner
from .._format.malformed import malformed_fields
from .._format.sizes import stored_size
from .._format.view import View
from ..errors import EncodingError, InvalidArgumentError, raise_alone

NOT_COPIED = frozenset(
    {"_id", "session_id", "agents", "copy_of", "incarnation", "removed_attachments", "lease"}
    | {"state", "state_by", "state_until", "time_to_live", "expires_at", "migrating", "moved"}
    | {"has_content", "removed_content"}
    | {"attachments_generation", "session_ttl", "kept_until", "keep_until"}  # of 1.0.0
)
"""Fields of a session document that are not copied; a copy has its own values, or none."""

AGENT_NOT_COPIED = frozenset(
    {"messages", "archived", "revision", "archive_revision", "stale_below", "next_message_id", "rewound"}
)
"""Fields of an agent's sub-document that are not copied; a copy has its own values."""

_MAX_SHOWN = 2**20
"""The maximum number of stored messages in the items of an imported view."""

_MANAGERS = (NullConversationManager, SlidingWindowConversationManager, SummarizingConversationManager)


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise InvalidArgumentError(otherwise)


def checked_session(fields: Document) -> Document:
    """Return the copied fields of a session document, or raise `InvalidArgumentError`."""
    fields = {name: value for name, value in fields.items() if name not in NOT_COPIED}
    _check_names(fields, "the session")
    for field in malformed_fields({name: value for name, value in fields.items() if value is not None}):
        raise InvalidArgumentError(f"{field.path!r} must be a {field.kind.__name__}, not {type(field.value).__name__}")
    _check_kinds(fields, "", {"application_name": str, "session_type": str, "owner": str})
    _check_dates(fields, "")
    if fields.get("owner") is not None:
        checked_owner(fields["owner"])
    metadata = fields.get("metadata") or {}
    require(not any(key.startswith("$") for key in metadata), "metadata must not contain a key that begins with $")
    require(MARKER not in metadata, f"metadata must not contain the key {MARKER!r}, which marks encoded values")
    for name, value in fields.items():
        for part in value.values() if name in ("metadata", "multi_agents") and type(value) is dict else (value,):
            _decoded(part, name)
    for name in ("feedbacks", "guardrail_events"):
        for position, entry in enumerate(fields.get(name) or []):
            require(type(_decoded(entry, name)) is dict, f"{name}.{position} must be an object")
    _check_names(fields.get("multi_agents") or {}, "multi_agents")
    for stored in (fields.get("multi_agents") or {}).values():
        _check_multi_agent(stored)
    return fields


def checked_agent(fields: Document) -> Document:
    """Return the copied fields of an agent's sub-document, or raise `InvalidArgumentError`."""
    fields = {name: value for name, value in fields.items() if name not in AGENT_NOT_COPIED}
    _check_names(fields, "the agent")
    _check_kinds(fields, "", {"agent_data": dict, "usage": dict})
    data = fields.get("agent_data") or {}
    _check_names(data, "agent_data")
    _check_kinds(data, "agent_data.", {"model": str})
    for path, part in (("", fields), ("agent_data.", data)):
        _check_dates(part, path)
        names = part.get("config_set")
        require(
            names is None or (type(names) is list and all(type(name) is str for name in names)),
            f"{path}config_set must be a list of str",
        )
        for name, value in part.items():
            if part is data or name != "agent_data":
                _decoded(value, f"{path}{name}")
    _check_numbers(fields.get("usage"), "usage")
    prompt, prompt_metadata = (_decoded(data.get(name), name) for name in ("system_prompt", "prompt_metadata"))
    require(type(prompt) in (str, list, NoneType), "agent_data.system_prompt must be a str")
    require(type(prompt_metadata) in (dict, NoneType), "agent_data.prompt_metadata must be an object")
    for name in STATE_FIELDS:
        decoded = _decoded(data.get(name), f"agent_data.{name}")
        require(type(decoded) in (dict, NoneType), f"agent_data.{name} must be an object")
        _check_encodes(decoded, STATE_DEPTH, f"agent_data.{name}")
    _check_state(fields)
    if fields.get("view") is not None:
        _check_view(fields["view"])
    return fields


def checked_message(message: Document, message_id: int) -> tuple[Document, int]:
    """Return a stored message with its id, and its size in bytes; raise `InvalidArgumentError` if it is none."""
    message = {**message, "message_id": message_id}
    _check_names(message, "the message")
    kinds = {"usage": dict, "event_loop_metrics": dict, "guardrail_event": dict, "attachments": list}
    _check_kinds(message, "", kinds)
    _check_dates(message, "")
    references = references_of(message)
    listed = message.get("attachments") or []
    require(len(references) == len(listed), "attachments must contain references only")
    whole = attached(message, {str(reference): b"" for reference in references})
    for name, value in whole.items():
        _decoded(value, name)
    _check_numbers(message.get("usage"), "usage")
    metrics = message.get("event_loop_metrics") or {}
    _check_kinds(metrics, "event_loop_metrics.", {MESSAGE_USAGE: dict})
    _check_numbers(metrics.get(MESSAGE_USAGE), f"event_loop_metrics.{MESSAGE_USAGE}")
    for name in ("message", "redact_message"):
        if name == "message" or whole.get(name) is not None:
            _check_body(whole.get(name), name)
    return message, stored_size(message)


def _check_body(body: Any, name: str) -> None:
    found = message_from({"message": body}, 0)
    if found is None:
        raise InvalidArgumentError(f"{name} must have a role and a list of content")
    require(is_restorable(found), f"{name} contains content blocks or a tracking id that Strands cannot restore")
    require(_has_texts(found.message), f"{name} contains text that is not a str")
    _check_encodes(found.message, MESSAGE_DEPTH, name)


def _check_names(fields: Mapping[str, Any], what: str) -> None:
    require(
        all(key and not key.startswith("$") and "." not in key and key != MARKER for key in fields),
        f"{what} must not contain a field whose name is empty, begins with $ or contains a dot",
    )


def _check_kinds(fields: Document, path: str, kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        value = fields.get(name)
        require(type(value) in (kind, NoneType), f"{path}{name} must be a {kind.__name__}, not {type(value).__name__}")


def _check_dates(fields: Document, prefix: str) -> None:
    for name in ("created_at", "updated_at"):
        value = fields.get(name)
        try:
            if type(value) not in (str, datetime, NoneType):
                raise ValueError
            to_date(value)
        except ValueError:
            raise_alone(InvalidArgumentError(f"{prefix}{name} must be a date"))


def _check_numbers(values: Any, name: str) -> None:
    require(type(values) in (dict, NoneType), f"{name} must be an object")
    for key, number in (values or {}).items():
        require(is_number(number), f"{name} must contain numbers from -2**62 to 2**62 only")
        require(bool(key) and not key.startswith("$") and "." not in key, f"{name} must contain names of fields only")


def _check_count(value: Any, most: int, name: str) -> None:
    is_int = isinstance(value, int) and type(value) is not bool
    require(is_int and 0 <= value <= most, f"{name} must be an int >= 0")


def _decoded(stored: Any, name: str) -> Any:
    try:
        return decode_own(stored)
    except EncodingError as error:
        raise_alone(InvalidArgumentError(f"{name}: {error}"))


def _check_encodes(value: Any, depth: int, name: str) -> None:
    try:
        encode(value, depth=depth, name=name)
    except EncodingError as error:
        raise_alone(InvalidArgumentError(str(error)))


def _is_message(value: Any) -> bool:
    found = message_from({"message": value}, 0)
    return found is not None and type(value["content"]) is list and is_restorable(found) and _has_texts(value)


def _has_texts(message: Mapping[str, Any]) -> bool:
    return all(type(block.get("text", "")) is str for block in message["content"])


def _check_state(fields: Document) -> None:
    agent = agent_from("agent", fields)
    internal = _decoded((fields.get("agent_data") or {}).get("_internal_state"), "")
    require(usable_internal_state(internal or {}) == (internal or {}), "agent_data._internal_state cannot be restored")
    if "interrupt_state" in (internal or {}):
        _check_interrupts(internal["interrupt_state"], "agent_data._internal_state.interrupt_state")
    bare = Agent.__new__(Agent)  # `initialize_internal_state` accepts an `Agent` only; a constructed one needs a model
    for name, restore in (
        ("state", lambda: AgentState(agent.state)),
        ("_internal_state", lambda: agent.initialize_internal_state(bare)),
        ("conversation_manager_state", lambda: _check_manager(agent.conversation_manager_state)),
    ):
        try:
            restore()
        except InvalidArgumentError:
            raise
        except Exception:
            raise_alone(InvalidArgumentError(f"agent_data.{name} cannot be restored"))


def _check_view(stored: Any) -> None:
    """Refuse a view that Strands cannot restore, or that shows more messages than an agent can have."""
    view = View.parse(stored)
    if view is None:
        raise InvalidArgumentError("view must contain the id of a message, and items")
    count = sum(last - first + 1 for item in view.items for first, last in item.as_stored().runs)
    require(count <= _MAX_SHOWN, f"view shows more than {_MAX_SHOWN} messages")
    for item in view.items:
        if item.message is not None:
            message, blocks = _decoded(item.message, "view"), item.content
            content = {} if blocks is None else {"content": [_decoded(b, "view") for b in blocks if type(b) is dict]}
            require(type(message) is dict, "view must contain messages")
            _check_body(encode({**message, **content}, depth=MESSAGE_DEPTH, name="view"), "view")


def _check_manager(state: Document) -> None:
    path = "agent_data.conversation_manager_state"
    _check_count(state.get("removed_message_count", 0), 2**31 - 1, f"{path}.removed_message_count")
    _check_count(state.get("model_call_count", 0), MAX_NUMBER, f"{path}.model_call_count")
    name, summary = state.get("__name__", ""), state.get("summary_message")
    require(type(name) is str, f"{path}.__name__ must be a str")
    require(summary is None or _is_message(summary), f"{path}.summary_message must be a message")
    for kind in _MANAGERS:
        if name == kind.__name__ and "removed_message_count" in state:
            kind().restore_from_session(state)


def _check_interrupts(state: Any, path: str) -> None:
    """Refuse malformed interrupts, which Strands would read only after it has restored the agent."""
    require(type(state) is dict and type(state.get("activated")) is bool, f"{path}.activated must be a bool")
    context, interrupts = state.get("context"), state.get("interrupts")
    require(type(context) is dict, f"{path}.context must be an object")
    require(
        type(interrupts) is dict
        and all(
            type(key) is str and type(each) is dict and type(each.get("id")) is str and type(each.get("name")) is str
            for key, each in interrupts.items()
        ),
        f"{path}.interrupts must contain interrupts",
    )
    pending = state.get("pending_tool_execution")
    if pending is None and "tool_use_message" in context:  # where earlier versions of Strands kept it
        pending = {
            "assistant_message": context["tool_use_message"],
            "completed_tool_results": context.get("tool_results", []),
        }
    if pending is None:
        return
    require(type(pending) is dict, f"{path}.pending_tool_execution must be an object")
    message, results = pending.get("assistant_message"), pending.get("completed_tool_results")
    require(
        _is_message(message)
        and all(type(block["toolUse"].get("name")) is str for block in message["content"] if "toolUse" in block),
        f"{path}.pending_tool_execution must contain a message",
    )
    require(
        isinstance(results, list | tuple)
        and all(type(each) is dict and type(each.get("toolUseId")) is str for each in results),
        f"{path}.pending_tool_execution must contain results of tools",
    )


def _check_multi_agent(stored: Document) -> None:
    _check_count(stored.get("revision"), MAX_NUMBER, "multi_agents: revision")
    require(type(stored.get("writer")) is str, "multi_agents: writer must be a str")
    _check_names(stored, "multi_agents")
    _check_dates(stored, "multi_agents: ")
    state = _decoded(stored.get("state"), "multi_agents: state")
    require(type(state) is dict, "multi_agents: state must be an object")
    internal = state.get("_internal_state")
    if "_internal_state" in state:
        require(
            type(internal) is dict and "interrupt_state" in internal,
            "multi_agents: state._internal_state must contain an interrupt_state",
        )
        _check_interrupts(internal.get("interrupt_state"), "multi_agents: state._internal_state.interrupt_state")
    task = state.get("current_task", "")
    require(
        type(task) is str or _is_message({"role": "user", "content": task}),
        "multi_agents: state.current_task must be a str or a list of content",
    )
    _check_results(state)
    _check_encodes(state, 4, "multi_agents: state")


def _check_results(part: Any) -> None:
    """Refuse malformed results of nodes, which Strands would read only when the orchestrator continues."""
    require(type(part) is dict, "multi_agents: a result must be an object")
    for name in ("accumulated_usage", "accumulated_metrics"):
        _check_numbers(part.get(name), f"multi_agents: {name}")
    for name in ("node_results", "results"):
        nodes = part.get(name) or {}
        require(type(nodes) is dict, f"multi_agents: {name} must be an object")
        for node in nodes.values():
            _check_results(node)
    result = part.get("result")
    if type(result) is dict:
        if result.get("type") == "agent_result":
            require(_is_message(result.get("message")), "multi_agents: a result must contain a message")
        _check_results(result)
