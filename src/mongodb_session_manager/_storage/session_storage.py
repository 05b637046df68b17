"""`manager.storage`: Strands' `Storage` whose values belong to a session."""

from __future__ import annotations

import builtins
from dataclasses import dataclass

from bson import ObjectId

from .._format.layout import Place
from .._store.store import SessionStore
from ..errors import SessionClosedError
from .storage import MongoDBStorage


@dataclass
class OfManager:
    """The session of a manager; `incarnation` is that of the opened session, `None` before it is opened."""

    session_id: str
    incarnation: ObjectId | None = None
    is_closed: bool = False


class SessionStorage(MongoDBStorage):
    """The storage of a session on the connection of its manager, which the manager closes."""

    def __init__(self, store: SessionStore, session: OfManager) -> None:
        self._connection = store.connection
        self._owns_connection = False
        self._content = store.content
        self._owner = store.owner
        self.session = session
        self._prefix = ""

    def __repr__(self) -> str:
        return f"<storage of session_id={self.session.session_id!r}, {self._connection!r}>"

    async def _place(self) -> Place:
        session = self.session
        if session.is_closed:
            raise SessionClosedError(f"session {session.session_id!r} is closed: open it with a new manager")
        if session.incarnation is None:
            return await self._content.place(session.session_id, self._owner)
        return Place(session.session_id, session.incarnation)

    async def _write(self, key: str, data: bytes) -> None:
        await self._content.write(await self._place(), key, data, self._owner)

    async def _read(self, key: str) -> bytes | None:
        return await self._content.read(await self._place(), key)

    async def _delete(self, key: str) -> None:
        await self._content.delete(await self._place(), key)

    async def _list(self, prefix: str) -> builtins.list[str]:
        return await self._content.keys(await self._place(), prefix)
