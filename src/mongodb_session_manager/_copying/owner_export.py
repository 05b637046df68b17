"""Exporting all sessions of an owner, one after the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from .._format.labels import guard
from .._format.layout import live_at
from .._store.sessions import naming_session
from .._store.store import SessionStore
from ..errors import MongoDBSessionError, SessionNotFoundError, raise_alone
from .exports import Export


class OwnerExport:
    """A running export of the sessions of an owner, oldest first; see `Export`."""

    def __init__(self, store: SessionStore, owner: str) -> None:
        self._store = store
        self._owner = owner
        self._pending = self._lines()

    async def pull(self) -> list[str]:
        return await anext(self._pending, [])

    async def _lines(self) -> AsyncGenerator[list[str], None]:
        for session_id in await self._session_ids():
            export, has_begun = Export(self._store, session_id, self._owner), False
            try:
                while lines := await export.pull():
                    has_begun = True
                    yield lines
            except MongoDBSessionError as error:
                if isinstance(error, SessionNotFoundError) and not has_begun:
                    continue  # it was deleted, or has expired
                raise_alone(naming_session(error, session_id, "was not exported"))

    async def _session_ids(self) -> list[Any]:
        async with self._store.connection.operation():
            self._store.ensure_indexes()
            condition = {**guard(self._owner), **live_at(self._store.connection.now())}
            sort = [("created_at", 1), ("_id", 1)]
            return [each["_id"] for each in await self._store.collection.find(condition, {"_id": 1}, sort=sort)]
