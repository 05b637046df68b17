"""Building the indexes of a collection, in the background and once per process."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from pymongo import IndexModel

from .._format.documents import Document
from ..errors import MongoDBSessionError
from .collection import Collection

logger = logging.getLogger(__name__)

Fields = tuple[str, ...]
"""The fields of an index, in their order, ascending."""

_RETRY_REFUSED = 600.0
"""Seconds after which an opening tries again to build an index that the server refused."""

_DROPPED = {26, 215, 276}
"""Server error codes of a build that ended because its collection was dropped."""

_PASSING = {None, *_DROPPED}
"""Codes of transient failures of an index build; `None` means an error without a code."""

_ALIKE = {13, 8000, *_PASSING}
"""Codes of failures that affect all indexes alike, such as missing privileges: building each one separately does not
help."""

_indexed: dict[object, dict[tuple[object, ...], float]] = {}
"""When to build an index again (`inf` for never), by server or client, then by database, collection and fields.

Clients live on event loops of several threads, so nothing iterates over all of it.
"""

_logged: set[tuple[object, ...]] = set()
"""The missing indexes that were logged: server or client, database, collection, fields."""

_MAX_INDEXES = 63
"""The maximum number of indexes that MongoDB allows for a collection, without the index of `_id`."""

DATES = ("updated_at", "created_at")
"""The dates by which a list can be sorted."""

_OPTIONS: dict[Fields, Document] = {
    ("state",): {"partialFilterExpression": {"state": {"$exists": True}}},
    ("expires_at",): {"expireAfterSeconds": 0},
    ("files_id", "n"): {"unique": True},
    ("block_id",): {"partialFilterExpression": {"block_id": {"$exists": True}}},
    ("tags",): {"partialFilterExpression": {"tags": {"$exists": True}}},
    **{("owner", date, "_id"): {"partialFilterExpression": {"owner": {"$exists": True}}} for date in DATES},
}
"""The options of the indexes that have any."""


def session_indexes(metadata_fields: Sequence[str]) -> list[Fields]:
    """Return the indexes of a collection of sessions.

    Each field has an index; each field by which a list can be filtered also has one with each date. The server refuses
    more than 64 indexes, so with many metadata fields the last ones have no index with the dates.
    """
    narrowed = ["application_name", *(f"metadata.{field}" for field in metadata_fields)]
    indexes: list[Fields] = [("state",), ("created_at",), ("updated_at",), ("session_id",), ("tags",)]
    indexes += [("owner", date, "_id") for date in DATES]
    indexes += [(path,) for path in narrowed]
    for date in DATES:
        indexes += [(date, "_id"), *((path, date, "_id") for path in narrowed)]
    return indexes[:_MAX_INDEXES]


def ensure_indexes(collection: Collection, wanted: Iterable[Fields], **options: Any) -> None:
    """Build missing indexes in the background, once per process; `options` are further ones of all of them."""
    if missing := unseen(collection, wanted):
        collection.connection.start(_build_indexes(collection, missing, options))


def unseen(collection: Collection, wanted: Iterable[Fields]) -> list[Fields]:
    """Return the indexes of a collection that this process has not ensured yet, and register them as ensured."""
    connection = collection.connection
    seen = _indexed.get(connection.identity)
    if seen is None:
        seen = _indexed.setdefault(connection.identity, {})
        connection.when_client_is_collected(_forget)
    moment, keys = time.monotonic(), {fields: _key(collection, fields) for fields in wanted}
    missing = [fields for fields, key in keys.items() if seen.get(key, moment) <= moment]
    seen.update(dict.fromkeys((keys[fields] for fields in missing), math.inf))
    return missing


def see_again(collection: Collection, fields: Iterable[Fields], after: float = 0.0) -> None:
    seen = _indexed.get(collection.connection.identity, {})
    seen.update(dict.fromkeys((_key(collection, each) for each in fields), time.monotonic() + after))


def _key(collection: Collection, fields: Fields) -> tuple[object, ...]:
    return collection.database, collection.name, fields


def _forget(identity: object) -> None:
    _indexed.pop(identity, None)
    _logged.difference_update([key for key in tuple(_logged) if key[0] == identity])


async def _build_indexes(collection: Collection, wanted: Sequence[Fields], options: Document) -> None:
    """Build indexes with one command, or one by one if the server refuses it; log each missing index once."""
    missing = await _build(collection, wanted, options)
    if len(wanted) > 1 and any(error.code not in _ALIKE for error in missing.values()):
        missing = {}
        for fields in wanted:
            missing |= await _build(collection, [fields], options)
    refused = [fields for fields, error in missing.items() if error.code not in _PASSING]
    see_again(collection, missing.keys() - refused)
    see_again(collection, refused, after=_RETRY_REFUSED)
    keys = {fields: (collection.connection.identity, *_key(collection, fields)) for fields in wanted}
    unlogged = [fields for fields, why in missing.items() if keys[fields] not in _logged and why.code not in _DROPPED]
    _logged.difference_update(keys[fields] for fields in wanted if fields not in missing)
    _logged.update(keys[fields] for fields in unlogged)
    if unlogged:
        logger.warning(
            "collection=<%r>, indexes=<%s> | indexes not built: queries are slow without them, and without expires_at "
            "nothing expires",
            repr(collection),
            ", ".join(f"{'+'.join(fields)}: {missing[fields]}" for fields in unlogged),
        )


async def _build(
    collection: Collection, wanted: Sequence[Fields], options: Document
) -> dict[Fields, MongoDBSessionError]:
    indexes = [IndexModel([(field, 1) for field in fields], **_OPTIONS.get(fields, {}), **options) for fields in wanted]
    try:
        await collection.send(lambda driver: driver.create_indexes(indexes))
    except MongoDBSessionError as error:
        return dict.fromkeys(wanted, error)
    return {}
