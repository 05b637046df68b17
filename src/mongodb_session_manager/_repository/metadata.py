"""The methods for metadata, feedback, and the configuration and usage of agents.

Each method is one command. None of them changes `next_message_id`, so none conflicts with the conversation. With an
`owner`, they treat a session of another owner, or of none, as if it did not exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypedDict

from pymongo import ReturnDocument

from .._format.codec import MARKER, decode
from .._format.documents import USAGE, Document, usable_numbers
from .._format.expressions import array_at, entries_at, number_at
from .._format.ids import agent_id_of, agent_key, checked_id
from .._format.labels import guard
from .._format.malformed import log_malformed, usable_agents, usable_field
from .._format.metadata import (
    checked_feedback,
    checked_keys,
    decode_all,
    decode_values,
    encoded_config,
    encoded_feedback,
    encoded_metadata,
    leads_into_marked,
    unset_keys,
)
from .._format.sizes import of_agent
from .._format.statements import Update
from .._io.connection import Connection
from .._io.drivers import AsyncCollection
from .._io.requested_fields import StoredFields, requested_by_callers
from .._io.threads import compute
from .._store.expiry import matched
from .._store.sessions import missing_session
from ..errors import AgentNotFoundError, InvalidArgumentError
from .base import RepositoryMethods

_CONFIG = ("model", "system_prompt", "prompt_metadata")
_MAX_AHEAD = timedelta(minutes=1)  # a later date comes from a wrong clock


class AgentConfig(TypedDict):
    """The configuration of an agent."""

    agent_id: str
    model: str | None
    system_prompt: str | None
    prompt_metadata: dict[str, Any] | None


class UsageReport(TypedDict):
    """The running totals of a session.

    Each value has `inputTokens`, `outputTokens`, `totalTokens`, `cacheReadInputTokens`, `cacheWriteInputTokens`,
    `latencyMs` (milliseconds), `invocations` and `toolCalls`.

    Attributes:
        agents: The totals by agent id.
        total: The totals of all agents.
    """

    agents: dict[str, dict[str, int]]
    total: dict[str, int]


_latest: dict[object, datetime] = {}
"""The latest date of feedback, by the identity of the connection."""


def _unique_moment(connection: Connection) -> datetime:
    """Return the server's time, later than any earlier result, so that equal feedback entries have different dates."""
    moment, latest = connection.now(), _latest.get(connection.identity)
    if latest is not None and moment <= latest < moment + _MAX_AHEAD:
        moment = latest + timedelta(milliseconds=1)
    _latest[connection.identity] = moment
    return moment


class MetadataMethods(RepositoryMethods):
    async def update_metadata(self, session_id: str, metadata: dict[str, Any], *, owner: str | None = None) -> None:
        """Set keys of a session's metadata and keep the others.

        Args:
            session_id: The session.
            metadata: Values by key; `a.b` sets `b` within `a`. Dates are stored as BSON dates: UTC, milliseconds.
            owner: Only a session of this owner is changed.

        Raises:
            InvalidArgumentError: A key is invalid.
            EncodingError: A value cannot be stored.
            StateTooLargeError: The session document has no room for it.
            SessionNotFoundError: The session does not exist.
        """
        sets = await compute(encoded_metadata, checked_id(session_id, "session_id"), metadata)
        wanted = self._owner(owner)
        while not await self._change_intact(session_id, metadata, {"$set": sets}, wanted):
            if any("." in key for key in metadata):  # else it was deleted and created again
                raise InvalidArgumentError(
                    "metadata contains a key with dots that leads into a stored value that has no keys"
                )

    async def get_metadata(self, session_id: str, *, owner: str | None = None) -> dict[str, Any]:
        """Return `{"metadata": {...}}`, or `{}` if the session does not exist."""
        document = await self._store.sessions.find(session_id, {"metadata": 1}, self._owner(owner))
        if document is None:
            return {}
        metadata: Document = usable_field(dict, document.get("metadata"), session_id, "metadata")
        return {"metadata": await compute(decode_values, metadata)}

    async def delete_metadata(self, session_id: str, keys: list[str], *, owner: str | None = None) -> None:
        """Remove keys from a session's metadata; unknown keys are ignored.

        Raises:
            InvalidArgumentError: `keys` is not a list of keys.
            SessionNotFoundError: The session does not exist.
        """
        wanted, owner = checked_keys(keys), self._owner(owner)
        while not await self._change_intact(session_id, wanted, unset_keys(wanted), owner):
            stored = (await self._store.sessions.get(session_id, {"metadata": 1}, owner)).get("metadata")
            wanted = [key for key in wanted if not leads_into_marked(stored, key)]

    async def add_feedback(self, session_id: str, feedback: dict[str, Any], *, owner: str | None = None) -> None:
        """Append feedback, stamped with the current time as `created_at`.

        Args:
            session_id: The session.
            feedback: Any keys; `rating` (`"up"`, `"down"`) and `comment` are the usual ones. Dates are stored as BSON
                dates: UTC, milliseconds.
            owner: Only a session of this owner is changed.

        Raises:
            InvalidArgumentError: `feedback` is not a dict.
            EncodingError: A value cannot be stored.
            StateTooLargeError: The session document has no room for it.
            SessionNotFoundError: The session does not exist.
        """
        allowed = guard(self._owner(owner))
        fields = {**checked_feedback(feedback), "created_at": self._connection.now()}
        entry = await compute(encoded_feedback, checked_id(session_id, "session_id"), fields)
        async with self._connection.operation():
            moment = _unique_moment(self._connection)
            if "created_at" in entry:
                entry["created_at"] = moment
            else:  # the date is inside a marked form
                entry = await compute(encoded_feedback, session_id, {**fields, "created_at": moment})
            # `$addToSet` adds it at most once, even if the command is sent again.
            update = {"$addToSet": {"feedbacks": entry}, "$set": {"updated_at": moment}}
            statement = Update({"_id": session_id, **allowed}, update, None)
            if not await self._store.room.store_part(statement, "feedback", entry, matched):
                raise missing_session(session_id)

    async def get_application_name(self, session_id: str, *, owner: str | None = None) -> str | None:
        """Return the application name of a session, or `None` if it has none.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        document = await self._store.sessions.get(session_id, {"application_name": 1}, self._owner(owner))
        name = document.get("application_name")
        return name if isinstance(name, str) else None

    async def get_feedbacks(self, session_id: str, *, owner: str | None = None) -> list[dict[str, Any]]:
        """Return a session's feedback, oldest first.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        document = await self._store.sessions.get(session_id, {"feedbacks": 1}, self._owner(owner))
        feedbacks: list[Any] = usable_field(list, document.get("feedbacks"), session_id, "feedbacks")
        if not all(type(entry) is dict for entry in feedbacks):
            log_malformed(session_id, "feedbacks", next(entry for entry in feedbacks if type(entry) is not dict))
        return await compute(decode_all, [entry for entry in feedbacks if type(entry) is dict])

    async def get_agent_config(self, session_id: str, agent_id: str, *, owner: str | None = None) -> AgentConfig | None:
        """Return an agent's model, system prompt and prompt metadata, or `None` if the session has no such agent.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        key = agent_key(agent_id)
        fields = {f"agents.{key}.agent_data.{name}": 1 for name in _CONFIG}
        document = await self._store.sessions.get(session_id, fields, self._owner(owner))
        stored = usable_agents(session_id, document).get(key)
        return None if stored is None else await compute(_config_from, session_id, agent_id, stored)

    async def list_agents(self, session_id: str, *, owner: str | None = None) -> list[AgentConfig]:
        """Return the configuration of every agent of a session.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        agents = (await self._agents(session_id, "agent_data", owner)).items()
        return [await compute(_config_from, session_id, agent_id_of(key), stored) for key, stored in agents]

    async def update_agent_config(
        self,
        session_id: str,
        agent_id: str,
        model: str | None = None,
        system_prompt: str | None = None,
        prompt_metadata: dict[str, Any] | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        """Set the values of an agent's configuration that are not `None`. They stay until they are set again.

        Raises:
            InvalidArgumentError: An argument is of the wrong type.
            StateTooLargeError: The session document has no room for it.
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session has no such agent.
        """
        for name, value in (("model", model), ("system_prompt", system_prompt)):
            if value is not None and not isinstance(value, str):
                raise InvalidArgumentError(f"{name} must be a str, not {type(value).__name__}")
        if prompt_metadata is not None and not isinstance(prompt_metadata, dict):
            raise InvalidArgumentError(f"prompt_metadata must be a dict, not {type(prompt_metadata).__name__}")
        fields = {"model": model, "system_prompt": system_prompt, "prompt_metadata": prompt_metadata}
        given = {name: value for name, value in fields.items() if value is not None}
        path = f"agents.{agent_key(agent_id)}"
        part = of_agent(" and ".join(given), agent_id)
        config = await compute(encoded_config, checked_id(session_id, "session_id"), part, given)
        sets = {f"{path}.agent_data.{name}": value for name, value in config.items()}
        wanted = self._owner(owner)
        async with self._connection.operation():
            update = {
                "$set": {**sets, "updated_at": self._connection.now()},
                "$addToSet": {f"{path}.config_set": {"$each": sorted(given)}},
            }
            change = Update({"_id": session_id, **guard(wanted), path: {"$exists": True}}, update, None)
            if not await self._store.room.store_part(change, part, sets, matched):
                await self._store.sessions.get(session_id, {"created_at": 1}, wanted)
                raise AgentNotFoundError(f"session {session_id!r} has no agent {agent_id!r}")

    async def get_message_count(self, session_id: str, agent_id: str, *, owner: str | None = None) -> int:
        """Return the number of all messages that an agent has stored, counted by the server.

        Raises:
            SessionNotFoundError: The session does not exist.
            AgentNotFoundError: The session has no such agent.
        """
        path = f"$agents.{agent_key(agent_id)}"
        count = {"$add": [number_at(f"{path}.archived"), {"$size": array_at(f"{path}.messages")}]}
        found = await self._store.sessions.get_agent(session_id, agent_id, {"messages": count}, self._owner(owner))
        return int(found["messages"])

    async def get_usage(self, session_id: str, *, owner: str | None = None) -> UsageReport:
        """Return the running totals of a session's agents.

        Raises:
            SessionNotFoundError: The session does not exist.
        """
        stored = await self._agents(session_id, "usage", owner)
        agents = {
            agent_id_of(key): {name: usable_numbers(agent.get("usage")).get(name, 0) for name in USAGE}
            for key, agent in stored.items()
        }
        return {"agents": agents, "total": {name: sum(usage[name] for usage in agents.values()) for name in USAGE}}

    async def _agents(self, session_id: str, field: str, owner: str | None) -> dict[str, Document]:
        entries = entries_at("$agents")
        pair = {"k": "$$this.k", "v": {field: f"$$this.v.{field}"}}
        projection = {"agents": {"$arrayToObject": {"$map": {"input": entries, "in": pair}}}}
        document = await self._store.sessions.get(session_id, projection, self._owner(owner))
        agents: dict[str, Document] = document["agents"]
        return agents

    async def _change_intact(self, session_id: str, keys: Iterable[str], update: Document, owner: str | None) -> bool:
        """Send an update of metadata; return `False` if a dotted key leads into a value stored in a marked form."""
        within = {key[:end] for key in keys for end, character in enumerate(key) if character == "."}
        intact = {f"metadata.{path}.{MARKER}": {"$exists": False} for path in sorted(within)}
        checked_id(session_id, "session_id")
        async with self._connection.operation():
            update = {**update, "$set": {**update.get("$set", {}), "updated_at": self._connection.now()}}
            statement = Update({"_id": session_id, **guard(owner), **intact}, update, None)
            asked = requested_by_callers()
            command: Any = partial(_update_and_return, asked) if asked else matched
            changed = await self._store.room.store_part(statement, "metadata", update["$set"], command)
            if changed and asked:
                await self._answer(session_id, owner, asked, changed)
            if not changed:
                await self._store.sessions.get(session_id, {"created_at": 1}, owner)
            return bool(changed)

    async def _answer(
        self, session_id: str, owner: str | None, asked: Iterable[StoredFields], document: Document
    ) -> None:
        metadata: Document = usable_field(dict, document.get("metadata"), session_id, "metadata")
        remove = partial(self._remove_unchanged, session_id, owner)
        for fields in asked:
            wanted = {name: metadata[name] for name in fields.names if name in metadata}
            fields.values = await compute(decode_values, wanted)
            fields.remove = partial(self._connection.portal.run, remove)

    async def _remove_unchanged(self, session_id: str, owner: str | None, name: str, value: Any) -> None:
        path = f"metadata.{name}"
        async with self._connection.operation():
            update = {"$unset": {path: ""}, "$set": {"updated_at": self._connection.now()}}
            statement = Update({"_id": session_id, **guard(owner), path: value}, update, None)
            await self._store.expiry.update(statement, matched)


async def _update_and_return(
    asked: Iterable[StoredFields], collection: AsyncCollection, update: Update
) -> Document | None:
    projection = {f"metadata.{name}": 1 for fields in asked for name in fields.names}
    return await collection.find_one_and_update(
        update.filter, update.update, projection=projection, return_document=ReturnDocument.AFTER
    )


def _config_from(session_id: str, agent_id: str, stored: Mapping[str, Any]) -> AgentConfig:
    path = f"agents.{agent_key(agent_id)}.agent_data"
    data: Document = usable_field(dict, stored.get("agent_data"), session_id, path)
    model, system_prompt, prompt_metadata = (decode(data.get(name)) for name in _CONFIG)
    return {"agent_id": agent_id, "model": model, "system_prompt": system_prompt, "prompt_metadata": prompt_metadata}
