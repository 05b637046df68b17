"""The Strands tool through which a model reads and writes the metadata of its session."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from strands import tool
from strands.interrupt import InterruptException
from strands.types.tools import AgentTool

from .._format.metadata import checked_keys, checked_metadata, is_within
from .._io.requested_fields import ACTED_ON
from .._notifications.notification import describe
from ..errors import EncodingError, InvalidArgumentError, raise_alone

logger = logging.getLogger(__name__)

_KEYS = {"type": "array", "items": {"type": "string"}, "description": "the keys to read or to remove"}
_METADATA = {"type": "object", "description": "the keys to set, with their values"}
_SCHEMA = {
    "type": "object",
    "properties": {
        "action": {"type": "string", "enum": ["get", "set", "update", "delete"]},
        "metadata": _METADATA,
        "keys": _KEYS,
    },
    "required": ["action"],
}
_READ_ONLY_SCHEMA = {
    "type": "object",
    "properties": {"action": {"type": "string", "enum": ["get"]}, "keys": _KEYS},
    "required": ["action"],
}

_DESCRIPTION = """Read and change the metadata of this conversation, which outlives it.

Args:
    action: "get" reads, "set" or "update" sets the keys of metadata and keeps the others, "delete" removes keys.
    metadata: For "set" and "update": an object of the keys to set. A dot in a key sets a nested key.
    keys: For "delete": a list of the keys to remove. For "get": only these keys; all without it.
"""
_READ_ONLY_DESCRIPTION = """Read the metadata of this conversation, which outlives it.

Args:
    action: "get".
    keys: Only these keys; all without it.
"""


class _Request(NamedTuple):
    action: str
    metadata: dict[str, Any]
    keys: list[str] | None


class MetadataPolicy(NamedTuple):
    """The permissions of a model.

    `allowed_keys` are the keys that it may see and change, with everything within them; `None` allows all, but those in
    `ACTED_ON` cannot be changed.
    """

    read_only: bool = False
    allowed_keys: tuple[str, ...] | None = None

    @classmethod
    def checked(cls, read_only: bool, allowed_keys: Sequence[str] | None) -> MetadataPolicy:
        return cls(read_only, None if allowed_keys is None else tuple(checked_keys(allowed_keys, "allowed_keys")))

    def request(self, action: Any, metadata: Any, keys: Any) -> _Request:
        """Return the request that a model sends, or raise `InvalidArgumentError` if it is not valid or not allowed."""
        name = str(action).strip().lower()
        if name not in ("get", "set", "update", "delete"):
            raise InvalidArgumentError("action must be get, set, update or delete")
        if self.read_only and name != "get":
            raise InvalidArgumentError("metadata can only be read here")
        metadata, keys = _from_json(metadata, "metadata"), _from_json(keys, "keys")
        if name in ("set", "update"):
            if not metadata:
                raise InvalidArgumentError(f"{name} needs metadata, an object of the keys to set")
            self._check_writable(checked_metadata(metadata))
            return _Request("update", metadata, None)
        if name == "delete" and not keys:
            raise InvalidArgumentError("delete needs keys, a list of the keys to remove")
        listed = None if keys is None else checked_keys(keys)
        if name == "delete":
            self._check_writable(listed)
        else:
            self._check_allowed(listed or ())
        return _Request(name, {}, listed)

    def _check_writable(self, keys: Any) -> None:
        self._check_allowed(keys)
        for key in keys:
            if self.allowed_keys is None and _folded(key.split(".")[0]) in ACTED_ON:
                raise InvalidArgumentError(f"the key {key!r} cannot be changed here")

    def _check_allowed(self, keys: Any) -> None:
        for key in keys:
            if self.allowed_keys is not None and not any(is_within(key, allowed) for allowed in self.allowed_keys):
                raise InvalidArgumentError(f"the key {key!r} is not one of {', '.join(self.allowed_keys)}")

    def visible(self, metadata: dict[str, Any], keys: list[str] | None) -> dict[str, Any]:
        wanted = keys if keys is not None else self.allowed_keys
        if wanted is None:
            return metadata
        found = ((key, _at(metadata, key)) for key in wanted)
        return {key: value for key, value in found if value is not _ABSENT}


_ABSENT = object()


def _at(metadata: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(metadata, dict) or part not in metadata:
            return _ABSENT
        metadata = metadata[part]
    return metadata


def _folded(name: str) -> str:
    """Return a name without differences of case, surrounding spaces and Unicode forms."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise_alone(InvalidArgumentError(f"{name} is not valid JSON"))


def _answer(request: _Request, result: Any, policy: MetadataPolicy) -> str:
    if request.action == "update":
        return f"Metadata updated: {', '.join(request.metadata)}."
    if request.action == "delete":
        return f"Metadata deleted: {', '.join(request.keys or ())}."
    visible = policy.visible((result or {}).get("metadata", {}), request.keys)
    if not visible:
        return "There is no metadata."
    shown = json.dumps(_plain(visible), ensure_ascii=False)
    return f"Metadata: {shown.encode(errors='replace').decode()}"


def _failure(error: Exception) -> str:
    """Return the tool's answer for an error, with its text only if the model can correct the cause."""
    if isinstance(error, InterruptException):
        raise error
    if isinstance(error, InvalidArgumentError | EncodingError):
        return f"Error: {error}"
    logger.warning("tool=<manage_metadata>, error=<%s> | answered with an error", describe(error))
    return f"Error: the metadata could not be used ({type(error).__name__})"


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case str() | int() | float() | None:
            return value
        case _:
            return str(value)


class Operations(NamedTuple):
    """The methods of a manager that use metadata."""

    get: Callable[[], Any]
    update: Callable[[dict[str, Any]], Any]
    delete: Callable[[list[str]], Any]

    def perform(self, request: _Request) -> Any:
        if request.action == "update":
            return self.update(request.metadata)
        if request.action == "delete":
            return self.delete(request.keys or [])
        return self.get()


def _tool(policy: MetadataPolicy, function: Callable[..., Any]) -> AgentTool:
    description, schema = (_READ_ONLY_DESCRIPTION, _READ_ONLY_SCHEMA) if policy.read_only else (_DESCRIPTION, _SCHEMA)
    return tool(name="manage_metadata", description=description, inputSchema=schema)(function)


def blocking_tool(policy: MetadataPolicy, operations: Operations) -> AgentTool:
    def manage_metadata(action: str, metadata: Any = None, keys: Any = None) -> str:
        try:
            request = policy.request(action, metadata, keys)
            return _answer(request, operations.perform(request), policy)
        except Exception as error:
            return _failure(error)

    return _tool(policy, manage_metadata)


def async_tool(policy: MetadataPolicy, operations: Operations) -> AgentTool:
    async def manage_metadata(action: str, metadata: Any = None, keys: Any = None) -> str:
        try:
            request = policy.request(action, metadata, keys)
            return _answer(request, await operations.perform(request), policy)
        except Exception as error:
            return _failure(error)

    return _tool(policy, manage_metadata)
