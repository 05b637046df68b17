"""What a session carries beside its conversation: metadata, feedback, the configuration and the usage of its agents.

Each method is one command. None of them touches `next_message_id`, so none makes a conversation write conflict.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypedDict

from pymongo import ReturnDocument

from ._changes import Update
from ._codec import decode, encode
from ._commands import SessionCollection
from ._documents import USAGE, Document, agent_id_of, agent_key, checked_id, now
from ._stored_fields import asked_for
from .errors import AgentNotFoundError, InvalidArgumentError, SessionNotFoundError

_CONFIG = ("model", "system_prompt", "prompt_metadata")
_VALUE_DEPTH = 2  # document, metadata or agent_data, value


class AgentConfigDict(TypedDict):
    """How an agent is configured."""

    agent_id: str
    model: str | None
    system_prompt: str | None
    prompt_metadata: dict[str, Any] | None


class UsageReport(TypedDict):
    """Running totals of a session.

    Both hold `inputTokens`, `outputTokens`, `totalTokens`, `cacheReadInputTokens`, `cacheWriteInputTokens`,
    `latencyMs` (milliseconds), `invocations` and `toolCalls`.

    Attributes:
        agents: By agent id.
        total: Of all agents.
    """

    agents: dict[str, dict[str, int]]
    total: dict[str, int]


def checked_metadata(metadata: object, name: str = "metadata") -> dict[str, Any]:
    """Return `metadata` if its keys can be set.

    Raises:
        InvalidArgumentError: It is not a dict, or a key cannot be one.
    """
    if not isinstance(metadata, dict):
        raise InvalidArgumentError(f"{name} must be a dict, not {type(metadata).__name__}")
    _checked_paths(metadata, name)
    return metadata


def checked_keys(keys: object, name: str = "keys") -> list[str]:
    """Return `keys` if they can be deleted.

    Raises:
        InvalidArgumentError: It is not a list of keys.
    """
    if isinstance(keys, str | bytes | Mapping) or not isinstance(keys, Iterable):
        raise InvalidArgumentError(f"{name} must be a list of str, not {type(keys).__name__}")
    listed = list(keys)
    _checked_paths(listed, name)
    return listed


def checked_feedback(feedback: object) -> dict[str, Any]:
    """Return `feedback` if it is a dict.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not isinstance(feedback, dict):
        raise InvalidArgumentError(f"feedback must be a dict, not {type(feedback).__name__}")
    return feedback


def _checked_paths(paths: Iterable[object], name: str) -> None:
    split = []
    for path in paths:
        if not isinstance(path, str):
            raise InvalidArgumentError(f"{name} holds a key that is not a str but {type(path).__name__}")
        parts = path.split(".")
        if "\0" in path or any(not part or part.startswith("$") for part in parts):
            raise InvalidArgumentError(
                f"{name} holds the key {path!r}: a key must not be empty, hold NUL, or have a segment between dots "
                "that is empty or begins with $"
            )
        try:
            path.encode()
        except UnicodeEncodeError:
            raise InvalidArgumentError(f"{name} holds a key with a lone surrogate") from None
        split.append(parts)
    split.sort()
    for shorter, longer in itertools.pairwise(split):
        if longer[: len(shorter)] == shorter:
            raise InvalidArgumentError(f"{name} holds {'.'.join(shorter)!r} and, within it, {'.'.join(longer)!r}")


def with_dates(value: Any) -> Any:
    """Return the value with every datetime as a BSON date, so that it can be queried: UTC, whole milliseconds."""
    match value:
        case datetime():
            moment = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
            return moment.replace(microsecond=moment.microsecond // 1000 * 1000)
        case dict():
            return {key: with_dates(item) for key, item in value.items()}
        case list():
            return [with_dates(item) for item in value]
        case _:
            return value


class SessionAnnotations(SessionCollection):
    """The half of the repository that is not the conversation."""

    async def update_metadata(self, session_id: str, metadata: dict[str, Any]) -> None:
        """Set the given keys of a session's metadata and keep the others.

        Args:
            session_id: The session.
            metadata: Values by key; `a.b` sets `b` within `a`. Dates are stored as BSON dates: UTC, milliseconds.

        Raises:
            InvalidArgumentError: A key cannot be set.
            EncodingError: A value cannot be stored.
            SessionNotFoundError: The session does not exist.
        """
        sets = {
            f"metadata.{key}": encode(with_dates(value), depth=_VALUE_DEPTH + key.count("."))
            for key, value in checked_metadata(metadata).items()
        }
        await self._change_metadata(session_id, {"$set": {**sets, "updated_at": now()}})

    async def get_metadata(self, session_id: str) -> dict[str, Any]:
        """Return `{"metadata": {...}}`, or `{}` if the session does not exist."""
        document = await self._find(session_id, {"metadata": 1})
        return {} if document is None else {"metadata": decode(document.get("metadata") or {})}

    async def delete_metadata(self, session_id: str, keys: list[str]) -> None:
        """Remove keys from a session's metadata; unknown keys are no error.

        Raises:
            InvalidArgumentError: `keys` is not a list of keys.
            SessionNotFoundError: The session does not exist.
        """
        unset = {f"metadata.{key}": "" for key in checked_keys(keys)}
        update = {"$set": {"updated_at": now()}, **({"$unset": unset} if unset else {})}
        await self._change_metadata(session_id, update)

    async def add_feedback(self, session_id: str, feedback: dict[str, Any]) -> None:
        """Append feedback, with the present as `created_at`.

        Args:
            session_id: The session.
            feedback: Any keys; `rating` (`"up"`, `"down"`) and `comment` are the usual ones. Dates are stored as BSON
                dates: UTC, milliseconds.

        Raises:
            InvalidArgumentError: `feedback` is not a dict.
            EncodingError: A value cannot be stored.
            SessionNotFoundError: The session does not exist.
        """
        moment = now()
        entry = encode(with_dates({**checked_feedback(feedback), "created_at": moment}), depth=3)
        await self._change(session_id, {"$push": {"feedbacks": {"$each": [entry]}}, "$set": {"updated_at": moment}})

    async def get_feedbacks(self, session_id: str) -> list[dict[str, Any]]:
        """Return a session's feedback, oldest first.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        document = await self._found(session_id, {"feedbacks": 1})
        return [decode(entry) for entry in document.get("feedbacks") or []]

    async def get_agent_config(self, session_id: str, agent_id: str) -> AgentConfigDict | None:
        """Return an agent's model, system prompt and prompt metadata, `None` if the session holds no such agent.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        key = agent_key(agent_id)
        document = await self._found(session_id, {f"agents.{key}.agent_data.{name}": 1 for name in _CONFIG})
        stored = document.get("agents", {}).get(key)
        return None if stored is None else _config_from(agent_id, stored)

    async def list_agents(self, session_id: str) -> list[AgentConfigDict]:
        """Return the configuration of every agent of a session.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        agents = (await self._agents(session_id, "agent_data")).items()
        return [_config_from(agent_id_of(key), stored) for key, stored in agents]

    async def update_agent_config(
        self,
        session_id: str,
        agent_id: str,
        model: str | None = None,
        system_prompt: str | None = None,
        prompt_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Set what is not `None` of an agent's configuration; it stays until it is set again, whatever the agent runs.

        Raises:
            InvalidArgumentError: An argument is of the wrong type.
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
        """
        for name, value in (("model", model), ("system_prompt", system_prompt)):
            if value is not None and not isinstance(value, str):
                raise InvalidArgumentError(f"{name} must be a str, not {type(value).__name__}")
        if prompt_metadata is not None and not isinstance(prompt_metadata, dict):
            raise InvalidArgumentError(f"prompt_metadata must be a dict, not {type(prompt_metadata).__name__}")
        given = {"model": model, "system_prompt": system_prompt, "prompt_metadata": with_dates(prompt_metadata)}
        given = {name: value for name, value in given.items() if value is not None}
        path = f"agents.{agent_key(agent_id)}"
        sets = {f"{path}.agent_data.{name}": encode(value, depth=_VALUE_DEPTH + 2) for name, value in given.items()}
        update = {
            "$set": {**sets, "updated_at": now()},
            "$addToSet": {f"{path}.agent_data.config_set": {"$each": sorted(given)}},
        }
        checked_id(session_id, "session_id")
        async with self._connection.operation():
            if not await self._update(Update({"_id": session_id, path: {"$exists": True}}, update, None)):
                await self._found(session_id, {"created_at": 1})
                raise AgentNotFoundError(f"session {session_id!r} holds no agent {agent_id!r}")

    async def get_message_count(self, session_id: str, agent_id: str) -> int:
        """Return how many messages an agent has ever stored, counted by the server.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session holds no such agent.
        """
        path = f"$agents.{agent_key(agent_id)}"
        count = {
            "$cond": [{"$eq": [{"$type": path}, "object"]}, {"$size": {"$ifNull": [f"{path}.messages", []]}}, None]
        }
        messages: int | None = (await self._found(session_id, {"messages": count})).get("messages")
        if messages is None:
            raise AgentNotFoundError(f"session {session_id!r} holds no agent {agent_id!r}")
        return messages

    async def get_usage(self, session_id: str) -> UsageReport:
        """Return the running totals of a session's agents.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        stored = await self._agents(session_id, "usage")
        agents = {
            agent_id_of(key): {name: (agent.get("usage") or {}).get(name, 0) for name in USAGE}
            for key, agent in stored.items()
        }
        return {"agents": agents, "total": {name: sum(usage[name] for usage in agents.values()) for name in USAGE}}

    async def _agents(self, session_id: str, field: str) -> dict[str, Document]:
        """Return one field of every agent, by agent key."""
        entries = {"$objectToArray": {"$ifNull": ["$agents", {}]}}
        pair = {"k": "$$this.k", "v": {field: f"$$this.v.{field}"}}
        projection = {"agents": {"$arrayToObject": {"$map": {"input": entries, "in": pair}}}}
        agents: dict[str, Document] = (await self._found(session_id, projection))["agents"]
        return agents

    async def _change_metadata(self, session_id: str, update: Document) -> None:
        """Change metadata, and return fields of it in the same command to whoever asked."""
        if not (asked := asked_for()):
            return await self._change(session_id, update)
        checked_id(session_id, "session_id")
        projection = {f"metadata.{name}": 1 for fields in asked for name in fields.names}
        async with self._connection.operation():
            document = await self._send(
                lambda collection: collection.find_one_and_update(
                    {"_id": session_id}, update, projection=projection, return_document=ReturnDocument.AFTER
                )
            )
        if document is None:
            raise SessionNotFoundError(f"session {session_id!r} does not exist")
        metadata = document.get("metadata") or {}
        remove = partial(self._remove_unchanged, session_id)
        for fields in asked:
            fields.values = {name: decode(metadata[name]) for name in fields.names if name in metadata}
            fields.remove = partial(self.portal.run, remove)

    async def _remove_unchanged(self, session_id: str, name: str, value: Any) -> None:
        """Remove a field of a session's metadata, unless its value is another one by now."""
        path = f"metadata.{name}"
        async with self._connection.operation():
            await self._update(
                Update({"_id": session_id, path: value}, {"$unset": {path: ""}, "$set": {"updated_at": now()}}, None)
            )

    async def _change(self, session_id: str, update: Document) -> None:
        checked_id(session_id, "session_id")
        async with self._connection.operation():
            if not await self._update(Update({"_id": session_id}, update, None)):
                raise SessionNotFoundError(f"session {session_id!r} does not exist")


def _config_from(agent_id: str, stored: Mapping[str, Any]) -> AgentConfigDict:
    data = stored.get("agent_data") or {}
    model, system_prompt, prompt_metadata = (decode(data.get(name)) for name in _CONFIG)
    return {
        "agent_id": agent_id,
        "model": model,
        "system_prompt": system_prompt,
        "prompt_metadata": prompt_metadata,
    }
