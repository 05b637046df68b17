"""The contenders: the library with each client, Strands' own managers on local files, and no manager."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient
from strands.session import FileSessionManager, SessionManager, SnapshotSessionManager
from strands.storage import LocalFileStorage

from mongodb_session_manager import AsyncMongoDBSessionManager, MongoDBSessionManagerFactory

DATABASE = "benchmarks"

NONE = "none"
LIBRARY = "library"
OVERLAP = "library, overlapping"
PER_INVOCATION = "library, per invocation"
MOTOR = "library, client=Motor"
PYMONGO = "library, client=PyMongo async"
FILE = "FileSessionManager"
SNAPSHOT = "SnapshotSessionManager"

DESCRIPTIONS = {
    NONE: "no session manager",
    LIBRARY: "a factory with its own client (Motor, on the library's I/O thread), save_on=message",
    OVERLAP: "the same with save_on=overlap",
    PER_INVOCATION: "the same with save_on=invocation",
    MOTOR: "a factory with the application's AsyncIOMotorClient, on the application's event loop",
    PYMONGO: "a factory with the application's AsyncMongoClient, on the application's event loop",
    FILE: "Strands' FileSessionManager on local files",
    SNAPSHOT: "Strands' SnapshotSessionManager on local files, with its default: one snapshot per invocation",
}


@dataclass(frozen=True)
class Contender:
    """One way to store sessions.

    Attributes:
        name: One of the names above.
        open: Opens a session in the way of an asynchronous web handler.
    """

    name: str
    open: Callable[[str], Awaitable[SessionManager[Any] | None]]

    @asynccontextmanager
    async def session(self, session_id: str) -> AsyncIterator[SessionManager[Any] | None]:
        """Open a session, and close it at the end."""
        manager = await self.open(session_id)
        try:
            yield manager
        finally:
            if isinstance(manager, AsyncMongoDBSessionManager):
                await manager.close()


@asynccontextmanager
async def contender(name: str, uri: str, **options: Any) -> AsyncIterator[Contender]:
    """Set up a contender, connect its client and build its indexes.

    Args:
        name: The name of the contender.
        uri: The connection string; not used by contenders without MongoDB.
        **options: Options of the library's factory, or of the client if the contender has its own.
    """
    async with contextlib.AsyncExitStack() as stack:
        if name == NONE:
            yield Contender(name, _nothing)
            return
        if name in (FILE, SNAPSHOT):
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmarks-"))
            yield Contender(name, _in_files(name, directory))
            return
        factory = await stack.enter_async_context(_factory(name, uri, options, stack))
        async with await factory.create_session_manager_async("warm-up"):
            pass
        yield Contender(name, factory.create_session_manager_async)


def _factory(
    name: str, uri: str, options: dict[str, Any], stack: contextlib.AsyncExitStack
) -> MongoDBSessionManagerFactory:
    if name == MOTOR:
        motor: AsyncIOMotorClient[Any] = AsyncIOMotorClient(uri, **options)
        stack.callback(motor.close)
        return MongoDBSessionManagerFactory(client=motor, database_name=DATABASE)
    if name == PYMONGO:
        client: AsyncMongoClient[Any] = AsyncMongoClient(uri, **options)
        stack.push_async_callback(client.close)
        return MongoDBSessionManagerFactory(client=client, database_name=DATABASE)
    if name in (OVERLAP, PER_INVOCATION):
        options = {**options, "save_on": "overlap" if name == OVERLAP else "invocation"}
    return MongoDBSessionManagerFactory(uri, DATABASE, **options)


async def _nothing(session_id: str) -> None:
    return None


def _in_files(name: str, directory: str) -> Callable[[str], Awaitable[SessionManager[Any]]]:
    async def open(session_id: str) -> SessionManager[Any]:
        if name == FILE:
            return FileSessionManager(session_id, storage_dir=directory)
        return SnapshotSessionManager(session_id, storage=LocalFileStorage(directory))

    return open
