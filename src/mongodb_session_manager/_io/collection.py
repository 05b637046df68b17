"""`Collection`: sends commands, again after a lost connection, and raises the errors of this package."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from pymongo.errors import PyMongoError

from .._format.documents import Document
from ..errors import DatabaseError, MongoDBSessionError
from .connection import Connection
from .driver_errors import UNSUPPORTED, driver_errors, may_be_sent_again, may_have_been_applied
from .drivers import AsyncCollection, run_pipeline

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSES = (0.05, 0.2, 0.8)
"""Seconds before a command is sent again after a lost connection, shortened at random by up to half."""


class Collection:
    def __init__(self, connection: Connection, database: str, name: str) -> None:
        self.connection = connection
        self.database = database
        self.name = name

    def __repr__(self) -> str:
        return f"{self.database}.{self.name}"

    def part(self, suffix: str) -> Collection:
        return Collection(self.connection, self.database, f"{self.name}{suffix}")

    async def send(self, command: Callable[[AsyncCollection], Awaitable[T]]) -> T:
        """Send a command that can be sent twice; send it again after a lost connection.

        Raises:
            DuplicateKeyError: That of `driver_errors`.
            MongoDBSessionError: The command failed.
        """
        connection = self.connection
        try:
            with driver_errors(account=partial(connection.account, self.database)) as attempts:
                collection = await connection.collection(self.database, self.name)
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
        except DatabaseError as error:
            if str(error).startswith(UNSUPPORTED):
                with suppress(MongoDBSessionError):
                    version = await connection.server_version() or "of an unknown version"
                    described = f"the server, MongoDB {version}, does not support"
                    error.args = (str(error).replace(UNSUPPORTED, described, 1),)
            raise

    async def find_one(self, condition: Document, projection: Mapping[str, Any] | None = None) -> Document | None:
        return await self.send(lambda collection: collection.find_one(condition, projection))

    async def find(self, condition: Document, projection: Document | None = None, **options: Any) -> list[Document]:
        return await self.send(lambda collection: collection.find(condition, projection, **options).to_list())

    async def aggregate(self, pipeline: Sequence[Document]) -> list[Document]:
        """Return the result of an aggregation; it is empty if the aggregation stores its result."""
        return await self.send(lambda collection: run_pipeline(collection, pipeline))

    async def insert_one(self, document: Document) -> None:
        """Insert a document, or raise `DuplicateKeyError`."""
        await self.send(lambda collection: collection.insert_one(document))

    async def update_one(self, condition: Document, update: Document | list[Document]) -> bool:
        return bool((await self.send(lambda collection: collection.update_one(condition, update))).matched_count)

    async def update_many(self, condition: Document, update: Document) -> None:
        await self.send(lambda collection: collection.update_many(condition, update))

    async def delete_one(self, condition: Document) -> bool:
        return bool((await self.send(lambda collection: collection.delete_one(condition))).deleted_count)

    async def delete_many(self, condition: Document) -> int:
        """Return the number of deleted documents; after a lost connection, those of an earlier attempt do not count."""
        return int((await self.send(lambda collection: collection.delete_many(condition))).deleted_count)

    async def count(self, condition: Document) -> int:
        return await self.send(lambda collection: collection.count_documents(condition))
