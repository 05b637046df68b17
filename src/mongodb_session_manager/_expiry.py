"""Sessions that expire: keeping what stands beside them as long as them, and the TTL indexes that remove them.

`_beside` says what is stored and in which order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from pymongo import IndexModel

from ._beside import BESIDE, SLACK, beside
from ._changes import Update
from ._commands import Fields, SessionCollection, see_again, send, unseen
from ._connection import AsyncCollection, Connection, find_and_modify
from ._documents import Document
from ._driver_errors import is_refusal
from .errors import MongoDBSessionError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAMESPACE_NOT_FOUND = 26
_INDEX_BUILD_RUNS = 12587

_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds before an index is changed that could not be because others were being built."""

_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


class SessionExpiry(SessionCollection):
    """The part of the repository that keeps what stands beside a session, and has the server remove both."""

    _session_ttl: int | None

    async def _update_with(
        self, update: Update, command: Callable[[AsyncCollection, Update], Awaitable[T]]
    ) -> T | None:
        moment = self._connection.now()
        if update.expires_from is not None and update.expires_from < moment:
            return None  # it took so long to store what this adds that it would go before the session
        statement = _touching(update, moment, self._session_ttl)
        result = await super()._update_with(statement or update, command)
        # The same moment again, so that a renewal is long enough for it however long it takes.
        if not result and statement is not None and await self._renew(update.filter["_id"], moment):
            result = await super()._update_with(statement, command)
        return result

    async def _renew(self, session_id: str, moment: datetime) -> bool:
        """See that what stands beside a session is kept until `moment`; return `False` if there is nothing to see to.

        Where it is kept so long, that may have come too late for a statement that was sent before.
        """
        update = _announce(session_id, moment, self._session_ttl)
        announced = await self._send(
            lambda collection: find_and_modify(collection, update.filter, update.update, _ANNOUNCED)
        )
        if announced is None:
            return False
        if announced["kept_until"] < moment:
            until = announced["keep_until"]
            logger.debug("session_id=<%r>, until=<%s> | keeping what is stored beside the session", session_id, until)
            for suffix, condition in beside(session_id, announced.get("attachments_generation") or 0):
                await self._keep(suffix, condition, until)
            await super()._update_with(_reached(session_id, until), _matched)
        return True

    async def _keep(self, suffix: str, condition: Document, until: Any) -> None:
        kept = {"$max": {"expires_from": until}}
        await self._send(lambda collection: collection.update_many(condition, kept), f"{self._collection_name}{suffix}")

    def _ensure_indexes(self) -> None:
        super()._ensure_indexes()
        ttl = self._session_ttl
        if ttl is not None and unseen(self._connection, self._database_name, self._collection_name, [_seen(ttl)]):
            self._connection.start(ensure_expiry(self._connection, self._database_name, self._collection_name, ttl))


async def _matched(collection: AsyncCollection, update: Update) -> bool:
    return bool((await collection.update_one(update.filter, update.update)).matched_count)


# The statements.


def _touching(update: Update, moment: datetime, ttl: int | None) -> Update | None:
    """Return a statement that sets `updated_at` so that it matches only if what is beside the session is kept so long.

    Args:
        update: A statement for one session.
        moment: The present, which `updated_at` becomes.
        ttl: The seconds that the session must have, `None` if it need not expire.

    Returns:
        `None` if the statement does not set `updated_at`.
    """
    stages = update.update if isinstance(update.update, list) else [update.update]
    sets = stages[0].get("$set", {})
    if "updated_at" not in sets:
        return None
    condition: Document = {"kept_until": {"$not": {"$lt": moment}}}
    if ttl is not None:
        condition["session_ttl"] = {"$exists": True}
    stages = [{**stages[0], "$set": {**sets, "updated_at": moment}}, *stages[1:]]
    return update._replace(
        filter={**update.filter, "$and": [condition]},
        update=stages if isinstance(update.update, list) else stages[0],
    )


def _announce(session_id: str, moment: datetime, ttl: int | None) -> Update:
    """Return the statement that begins a renewal of a session that is not kept until `moment`.

    If `ttl` is given, a session that does not expire yet does from then on.
    """
    seconds: Any = "$session_ttl" if ttl is None else ttl
    until = {"$add": [moment, {"$toLong": {"$multiply": [seconds, 1000 / SLACK]}}]}
    kept_until = {"$ifNull": ["$kept_until", _NEVER]}
    is_kept = {"$gte": [kept_until, moment]}
    sets = {
        "session_ttl": {"$cond": [is_kept, "$session_ttl", seconds]},
        "keep_until": {"$cond": [is_kept, "$keep_until", {"$max": ["$keep_until", until]}]},
        "kept_until": kept_until,
    }
    may_lapse: Document = {"session_ttl": {"$exists": True}, "kept_until": {"$exists": True}}
    condition = may_lapse if ttl is None else {"$or": [may_lapse, {"session_ttl": None}]}
    return Update({"_id": session_id, **condition}, [{"$set": sets}], None)


_ANNOUNCED: Document = {"kept_until": 1, "keep_until": 1, "attachments_generation": 1}
"""What has to be known of a session after `_announce`."""


def _reached(session_id: str, until: datetime) -> Update:
    """Return the statement that ends a renewal."""
    condition = {"_id": session_id, "keep_until": {"$gte": until}}
    return Update(condition, {"$max": {"kept_until": until}}, None)


# The indexes.

_OF_SESSIONS = IndexModel(
    [("updated_at", 1)],
    name="session_ttl",
    partialFilterExpression={"session_ttl": {"$exists": True}},
    expireAfterSeconds=0,
)
_OF_REST = IndexModel([("expires_from", 1)], name="expires_from", expireAfterSeconds=0)


def _seen(seconds: int) -> Fields:
    return ("session_ttl", str(seconds))


async def ensure_expiry(connection: Connection, database: str, name: str, seconds: int) -> None:
    """Have the server remove sessions that expire, and what is beside them, after so many seconds."""
    rest = [(f"{name}{suffix}", _OF_REST) for suffix in BESIDE]
    try:
        before = await _found(connection, database, name, _OF_SESSIONS)
        # Whatever an end half-way leaves, nothing beside a session goes earlier than its document.
        is_shorter = before is not None and seconds < before.get("expireAfterSeconds", 0)
        collections = [(name, _OF_SESSIONS), *rest] if is_shorter else [*rest, (name, _OF_SESSIONS)]
        for where, index in collections:
            await _ensure_ttl(connection, database, where, index, seconds)
    except MongoDBSessionError as error:
        if not is_refusal(error) or error.code == _INDEX_BUILD_RUNS:
            see_again(connection, database, name, [_seen(seconds)])
        logger.warning(
            "collection=<%r>, error=<%s> | TTL indexes not built, sessions will not expire as configured", name, error
        )


async def _found(connection: Connection, database: str, name: str, wanted: IndexModel) -> Document | None:
    """Return the index of the same fields and condition as the wanted one, whatever it is called."""
    try:
        answer = await send(
            connection, database, name, lambda collection: collection.database.command("listIndexes", name)
        )
    except MongoDBSessionError as error:
        if error.code == _NAMESPACE_NOT_FOUND:
            return None
        raise
    for index in answer["cursor"]["firstBatch"]:
        if all(index.get(part) == wanted.document.get(part) for part in ("key", "partialFilterExpression")):
            found: Document = index
            return found
    return None


async def _ensure_ttl(connection: Connection, database: str, name: str, wanted: IndexModel, seconds: int) -> None:
    there = await _found(connection, database, name, wanted)
    if there is None:
        index = IndexModel(
            list(wanted.document["key"].items()),
            **{key: value for key, value in wanted.document.items() if key not in ("key", "expireAfterSeconds")},
            expireAfterSeconds=seconds,
        )
        await send(connection, database, name, lambda collection: collection.create_indexes([index]))
        return
    before = there.get("expireAfterSeconds")
    if before != seconds:
        await _change_index(connection, database, name, {"name": there["name"], "expireAfterSeconds": seconds})
        logger.info(
            "collection=<%r>, before=<%s>, seconds=<%s> | what was not written to for so long is removed now",
            name,
            before,
            seconds,
        )


async def _change_index(connection: Connection, database: str, name: str, change: Document) -> None:
    async def command(collection: AsyncCollection) -> None:
        await collection.database.command("collMod", name, index=change)

    for pause in _PAUSES:
        try:
            return await send(connection, database, name, command)
        except MongoDBSessionError as error:
            if error.code != _INDEX_BUILD_RUNS:
                raise
        await asyncio.sleep(pause)
    return await send(connection, database, name, command)
