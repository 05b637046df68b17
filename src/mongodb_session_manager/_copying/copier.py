"""`Copier`: exports, imports, forks, rewinds and writes back the sessions of a store."""

from __future__ import annotations

from .._format.ids import checked_id
from .._io.portal import Portal
from .._store.store import SessionStore
from .exports import Export
from .forks import Forker
from .imports import Import, feed, feed_blocking
from .owner_export import OwnerExport
from .rewind import Rewinder
from .write_back import WriteBack


class Copier:
    def __init__(self, store: SessionStore) -> None:
        self._store = store

    def export(self, session_id: str, owner: str | None) -> Export:
        return Export(self._store, session_id, owner)

    def export_owner(self, owner: str) -> OwnerExport:
        return OwnerExport(self._store, owner)

    def _import(self, session_id: str | None, owner: str | None) -> Import:
        return Import(self._store, None if session_id is None else checked_id(session_id, "session_id"), owner)

    async def import_session(self, portal: Portal, stream: object, session_id: str | None, owner: str | None) -> str:
        return await feed(portal, self._import(session_id, owner), stream)

    def import_blocking(self, portal: Portal, stream: object, session_id: str | None, owner: str | None) -> str:
        return feed_blocking(portal, self._import(session_id, owner), stream)

    async def fork(self, session_id: str, new_id: str, at_message: object, owner: str | None) -> None:
        await Forker(self._store).fork(session_id, new_id, at_message, owner)

    async def rewind(self, session_id: str, at_message: object, keep_as: str | None, owner: str | None) -> None:
        await Rewinder(self._store).rewind(session_id, at_message, keep_as, owner)

    async def write_back(self, session_id: str, owner: str | None) -> None:
        await WriteBack(self._store).write_back(session_id, owner)
