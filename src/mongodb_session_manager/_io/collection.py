"""How commands reach a collection of sessions: sent again after a lost connection, its indexes seen to."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import reprlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar

from pymongo import IndexModel
from pymongo.errors import PyMongoError

from .._format.changes import Update
from .._format.documents import Document
from .._format.ids import agent_key, checked_id
from .._format.layout import live_at
from .._format.malformed import MalformedField, malformed_fields
from ..errors import (
    AgentNotFoundError,
    ConfigurationError,
    DatabaseError,
    InvalidArgumentError,
    MongoDBSessionError,
    SessionNotFoundError,
    raise_alone,
)
from .connection import AsyncCollection, Connection
from .driver_errors import UNSUPPORTED, driver_errors, may_be_sent_again, may_have_been_applied
from .loop import Portal

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSES = (0.05, 0.2, 0.8)
"""Seconds before a command is sent again after a lost connection, shortened at random by up to half."""

_RETRY_REFUSED = 600.0
"""Seconds after which an opening tries again to build an index that the server refused."""

_DROPPED = {26, 215, 276}
"""Server error codes of a build that ended because its collection was dropped."""

_PASSING = {None, *_DROPPED}
"""Codes of transient failures of an index build; `None` stands for an error without a code."""

_ALIKE = {13, 8000, *_PASSING}
"""Codes of failures that affect all indexes alike, such as missing privileges: building each alone does not help."""

_indexed: dict[object, dict[tuple[object, ...], float]] = {}
"""When to build an index again (`inf` for never), by server or client, then by database, collection and fields.

Clients live on event loops of several threads, so nothing iterates over all of it.
"""

_told: set[tuple[object, ...]] = set()
"""The missing indexes that were logged: server or client, database, collection, fields."""

_MOST_INDEXES = 63
"""What MongoDB allows for a collection, without the index of `_id`."""

Fields = tuple[str, ...]
"""The fields of an index, in their order, ascending."""


class SessionCollection:
    """A collection of sessions on a connection: what both halves of the repository send goes through here."""

    _connection: Connection

    @classmethod
    def _over(
        cls,
        connection: Connection,
        database_name: str | None,
        collection_name: str | None,
        application_name: str | None,
        metadata_fields: Sequence[str] | None,
        **options: Any,
    ) -> Self:
        """Return a repository over a connection that somebody else closes."""
        repository = cls.__new__(cls)
        repository._bind(connection, database_name, collection_name, application_name, metadata_fields, **options)
        return repository

    def _bind(
        self,
        connection: Connection,
        database_name: str | None,
        collection_name: str | None,
        application_name: str | None,
        metadata_fields: Sequence[str] | None,
    ) -> None:
        self._connection = connection
        self._database_name = checked_name(connection.database_name(database_name), "database_name")
        self._collection_name = checked_name(given(collection_name, "agent_sessions"), "collection_name")
        if application_name is not None:
            _checked_text(application_name, "application_name")
        self._application_name = application_name
        self._metadata_fields = _checked_fields(metadata_fields)
        self._indexes = session_indexes(self._metadata_fields)

    @property
    def portal(self) -> Portal:
        """The way to the event loop of this repository for callers on other threads and loops."""
        return self._connection.portal

    async def _find(self, session_id: str, projection: Document) -> Document | None:
        checked_id(session_id, "session_id")
        async with self._connection.operation():
            condition = {"_id": session_id, **live_at(self._connection.now())}
            return await self._send(lambda collection: collection.find_one(condition, projection))

    async def _found(self, session_id: str, projection: Document) -> Document:
        document = await self._find(session_id, projection)
        if document is None:
            raise SessionNotFoundError(f"session {session_id!r} does not exist")
        return document

    async def _stored_agent(self, session_id: str, agent_id: str, fields: Document) -> Document:
        """Return values of aggregation expressions by name, for an agent that must be there."""
        is_there = {"$eq": [{"$type": f"$agents.{agent_key(agent_id)}"}, "object"]}
        document = await self._found(session_id, {"_id": 0, "agent": {"$cond": [is_there, fields, None]}})
        stored: Document | None = document["agent"]
        if stored is None:
            raise AgentNotFoundError(f"session {session_id!r} holds no agent {agent_id!r}")
        return stored

    async def _update(self, update: Update) -> bool:
        """Send an update statement; return whether it matched."""

        async def send(collection: AsyncCollection, update: Update) -> bool:
            result = await collection.update_one(update.filter, update.update, array_filters=update.array_filters)
            return bool(result.matched_count)

        return bool(await self._update_with(update, send))

    async def _update_with(
        self, update: Update, command: Callable[[AsyncCollection, Update], Awaitable[T]]
    ) -> T | None:
        """Send an update statement with a command whose result is false if it matched nothing."""
        try:
            return await self._send(lambda collection: command(collection, update))
        except (DatabaseError, InvalidArgumentError):
            if not await self._clear_nulls(update):
                raise
        return await self._send(lambda collection: command(collection, update))

    async def _clear_nulls(self, update: Update) -> bool:
        """Remove each `null` that a refused statement writes into; return whether there was one.

        Raises:
            DatabaseError: The statement writes into a field that holds a value of another type.
        """
        stages = update.update if isinstance(update.update, list) else [update.update]
        written = {path for stage in stages for fields in stage.values() for path in fields}
        session_id = update.filter["_id"]
        odd = [
            field
            for field in await self._malformed_fields(session_id)
            if any(path == field.path or path.startswith(f"{field.path}.") for path in written)
        ]
        for field in odd:
            if field.value is not None:
                raise field.error(session_id)
        if not odd:
            return False
        nulls = {field.path: "" for field in odd}
        condition = {"_id": session_id, **dict.fromkeys(nulls)}
        await self._send(lambda collection: collection.update_one(condition, {"$unset": nulls}))
        return True

    async def _malformed_fields(self, session_id: str) -> list[MalformedField]:
        return list(malformed_fields(await self._find(session_id, {}) or {}))

    async def _raise_odd(self, session_id: str) -> None:
        """Raise the error for the first field of a session that cannot be written into, if there is one."""
        for field in await self._malformed_fields(session_id):
            if field.value is not None:
                raise field.error(session_id)

    async def _send(self, command: Callable[[AsyncCollection], Awaitable[T]], name: str | None = None) -> T:
        """Send a command that may be sent twice, again after a lost connection, and raise our errors.

        It goes to the collection of that `name`, by default the one of the sessions.
        """
        return await send(self._connection, self._database_name, name or self._collection_name, command)

    def _ensure_indexes(self) -> None:
        """Build missing indexes in the background, once per process."""
        ensure_indexes(self._connection, self._database_name, self._collection_name, self._indexes)


def session_indexes(metadata_fields: Sequence[str]) -> list[Fields]:
    """Return the indexes of a collection of sessions.

    Each field has an index; each field by which a list can be filtered also has one with each date. The server refuses
    more than 64 indexes, so with many metadata fields the last ones have no index with the dates.
    """
    narrowed = ["application_name", *(f"metadata.{field}" for field in metadata_fields)]
    indexes: list[Fields] = [("state",), ("created_at",), ("updated_at",), ("session_id",)]
    indexes += [(path,) for path in narrowed]
    for date in ("updated_at", "created_at"):
        indexes += [(date, "_id"), *((path, date, "_id") for path in narrowed)]
    return indexes[:_MOST_INDEXES]


async def send(
    connection: Connection, database: str, name: str, command: Callable[[AsyncCollection], Awaitable[T]]
) -> T:
    """Send a command that may be sent twice, again after a lost connection, and raise our errors.

    The driver's `DuplicateKeyError` is raised as that of `_driver_errors`.
    """
    try:
        return await _sent(connection, database, name, command)
    except DatabaseError as error:
        if str(error).startswith(UNSUPPORTED):
            with suppress(MongoDBSessionError):
                version = await connection.server_version() or "of an unknown version"
                error.args = (str(error).replace(UNSUPPORTED, f"the server, MongoDB {version}, does not support", 1),)
        raise


async def _sent(
    connection: Connection, database: str, name: str, command: Callable[[AsyncCollection], Awaitable[T]]
) -> T:
    with driver_errors(account=partial(connection.account, database)) as attempts:
        collection = await connection.collection(database, name)
        for pause in _PAUSES:
            try:
                async with connection.admission():
                    return await command(collection)
            except PyMongoError as error:
                if not may_be_sent_again(error):
                    raise
                attempts.unknown |= may_have_been_applied(error)
                logger.debug("error=<%s>, pause=<%s> | sending the command again", type(error).__name__, pause)
            # Outside of `except`: the driver's error must not become the context of a cancellation.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        async with connection.admission():
            return await command(collection)


_INDEX_OPTIONS: dict[Fields, Document] = {
    ("state",): {"partialFilterExpression": {"state": {"$exists": True}}},
    ("expires_at",): {"expireAfterSeconds": 0},
    ("files_id", "n"): {"unique": True},
}
"""The options of indexes, for those that have any."""


def ensure_indexes(connection: Connection, database: str, name: str, wanted: Iterable[Fields], **options: Any) -> None:
    """Build missing indexes of a collection in the background, once per process.

    Args:
        connection: The connection.
        database: The name of the database.
        name: The name of the collection.
        wanted: The fields of each index.
        **options: Options of the indexes in addition to their usual ones.
    """
    if missing := unseen(connection, database, name, wanted):
        connection.start(_build_indexes(connection, database, name, missing, options))


def unseen(connection: Connection, database: str, name: str, wanted: Iterable[Fields]) -> list[Fields]:
    """Return the indexes of a collection that this process has not ensured yet, and register them as ensured."""
    seen = _indexed.get(connection.identity)
    if seen is None:
        seen = _indexed.setdefault(connection.identity, {})
        connection.when_client_is_collected(_forget_indexes)
    moment = time.monotonic()
    missing = [fields for fields in wanted if seen.get((database, name, fields), moment) <= moment]
    seen.update(dict.fromkeys(((database, name, fields) for fields in missing), math.inf))
    return missing


def see_again(connection: Connection, database: str, name: str, fields: Iterable[Fields], after: float = 0.0) -> None:
    """Let the first opening after `after` seconds build indexes of a collection again."""
    seen = _indexed.get(connection.identity, {})
    seen.update(dict.fromkeys(((database, name, each) for each in fields), time.monotonic() + after))


async def _build_indexes(
    connection: Connection, database: str, name: str, wanted: Sequence[Fields], options: Document
) -> None:
    """Build indexes with one command, or one by one if the server refuses it; log each missing index once."""
    missing = await _build(connection, database, name, wanted, options)
    if len(wanted) > 1 and any(reason.code not in _ALIKE for reason in missing.values()):
        missing = {}
        for fields in wanted:
            missing |= await _build(connection, database, name, [fields], options)
    refused = [fields for fields, reason in missing.items() if reason.code not in _PASSING]
    see_again(connection, database, name, missing.keys() - refused)
    see_again(connection, database, name, refused, after=_RETRY_REFUSED)
    told = {fields: (connection.identity, database, name, fields) for fields in wanted}
    untold = [fields for fields, reason in missing.items() if told[fields] not in _told and reason.code not in _DROPPED]
    _told.difference_update(told[fields] for fields in wanted if fields not in missing)
    _told.update(told[fields] for fields in untold)
    if untold:
        logger.warning(
            "collection=<%r>, indexes=<%s> | indexes not built: queries are slow without them, and without expires_at "
            "nothing expires",
            f"{database}.{name}",
            ", ".join(f"{'+'.join(fields)}: {missing[fields].text}" for fields in untold),
        )


class _Missing(NamedTuple):
    """Why an index was not built."""

    text: str
    code: int | None


async def _build(
    connection: Connection, database: str, name: str, wanted: Sequence[Fields], options: Document
) -> dict[Fields, _Missing]:
    """Build indexes with one command; return the reasons, by index, if it failed."""
    indexes = [
        IndexModel([(field, 1) for field in fields], **_INDEX_OPTIONS.get(fields, {}), **options) for fields in wanted
    ]
    try:
        await send(connection, database, name, lambda collection: collection.create_indexes(indexes))
    except MongoDBSessionError as error:
        return dict.fromkeys(wanted, _Missing(str(error), error.code))
    return {}


def given(value: T | None, default: T) -> T:
    """Return the value of an option, or the default if it is `None`."""
    return default if value is None else value


def _checked_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} must be a str, got {reprlib.repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise_alone(ConfigurationError(f"{name} must be text that UTF-8 can encode, got {reprlib.repr(value)}"))
    return value


_REFUSED = {"database_name": '/\\. "$\0', "collection_name": "$\0"}
_MOST_BYTES = {"database_name": 63, "collection_name": 170}
"""MongoDB allows 255 bytes for database, dot and collection, including suffixes such as `_attachments.chunks`."""


def checked_name(value: object, name: str) -> str:
    """Return a valid name of a database or collection; `name` is the name of the argument.

    Raises:
        ConfigurationError: MongoDB would refuse it.
    """
    text = _checked_text(value, name)
    shown = reprlib.repr(text)
    if not text:
        raise ConfigurationError(f"{name} must be a non-empty str")
    if refused := [character for character in _REFUSED[name] if character in text]:
        raise ConfigurationError(f"{name} must not hold {refused[0]!r}, got {shown}")
    if len(text.encode()) > _MOST_BYTES[name]:
        raise ConfigurationError(f"{name} must have at most {_MOST_BYTES[name]} bytes, got {len(text.encode())}")
    if name == "collection_name" and (text.startswith((".", "system.")) or text.endswith(".") or ".." in text):
        raise ConfigurationError(f"{name} must not begin with 'system.', nor with a dot, nor end with one, got {shown}")
    return text


def _checked_fields(fields: Sequence[str] | None) -> tuple[str, ...]:
    if fields is None:
        return ()
    if isinstance(fields, str | bytes | Mapping) or not isinstance(fields, Iterable):
        raise ConfigurationError(f"metadata_fields must be a list of field names, got {reprlib.repr(fields)}")
    fields = list(fields)
    for number, field in enumerate(fields):
        _checked_text(field, f"metadata_fields[{number}]")
        if "\0" in field or any(not part or part.startswith("$") for part in field.split(".")):
            raise ConfigurationError(
                f"metadata_fields[{number}] must be the name of a field, got {reprlib.repr(field)}"
            )
    return tuple(dict.fromkeys(fields))


def _forget_indexes(identity: object) -> None:
    _indexed.pop(identity, None)
    _told.difference_update([told for told in tuple(_told) if told[0] == identity])
