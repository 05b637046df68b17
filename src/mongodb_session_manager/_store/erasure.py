"""`Erasure`: deletes all sessions of an owner, a few at a time, and counts what is left of them.

A step finds some sessions of the owner in any state: live and expired ones, unfinished copies, and deletions that were
interrupted. It deletes them as `Deletion` does, and then counts the parts that remain of them. Parts that another
process has stored in the meantime are removed, too. The erasure ends with the step that finds no session, so it
includes sessions that are created while it runs.

An erasure keeps no state on the server. The document of a session names its owner until the parts are removed, so a
further erasure finds every session that an interrupted one has left behind.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, NamedTuple, TypedDict

from .._format.dates import to_iso
from .._format.labels import guard
from .._format.layout import OUTSIDE
from .._io.portal import Portal
from ..errors import InvalidArgumentError, MongoDBSessionError, raise_alone
from .deletion import Removed
from .sessions import naming_session
from .store import SessionStore

AT_ONCE = 8
"""The number of sessions that a step deletes, concurrently."""

_ROUNDS = 4
"""The maximum number of counts while other processes store new parts."""

_OF_OWNER = "session documents with this owner"
_OF_SESSIONS = "documents whose _id begins with the incarnation of an erased session, or with its id, as in 1.0.0"


class ErasureProgress(NamedTuple):
    """A session that was erased.

    Attributes:
        done: The number of sessions that the call has erased, including this one.
        total: The number of sessions that the owner had when the call began, or `done` if that is larger.
        session_id: The session.
    """

    done: int
    total: int
    session_id: str


class ErasureCheck(TypedDict):
    """A check of a collection after the removal.

    Attributes:
        looked_for: The documents that were counted.
        found: Their number.
    """

    looked_for: str
    found: int


class ErasureReceipt(TypedDict):
    """The result of `erase_owner`, as plain data that `json.dumps` accepts.

    It covers one call. Sessions that an interrupted call has erased are not in the receipt of the next one.

    Attributes:
        owner: The owner.
        database: The database of the sessions.
        started_at: The beginning by the server's clock, ISO 8601 in UTC.
        finished_at: The end by the server's clock, ISO 8601 in UTC.
        sessions: The ids of the erased sessions, in the order of their removal.
        removed: The number of removed documents by collection. After a lost connection, or if another process removes
            the same session, the numbers can be too small.
        verified: The check of each collection after the removal.
    """

    owner: str
    database: str
    started_at: str
    finished_at: str
    sessions: list[str]
    removed: dict[str, int]
    verified: dict[str, ErasureCheck]


class Erasure:
    """A running erasure. Each `pull` is a complete step, so stopping between two steps leaks nothing.

    Raises:
        InvalidArgumentError: `progress` is not callable.
    """

    def __init__(self, store: SessionStore, owner: str, progress: Callable[[ErasureProgress], object] | None) -> None:
        if progress is not None and not callable(progress):
            raise InvalidArgumentError(f"progress must be callable, not {type(progress).__name__}")
        self.progress = progress or _ignore
        self._store = store
        self._collection = store.collection
        self._owner = owner
        self._begun: datetime | None = None
        self._ended: datetime | None = None
        self._total = 0
        self._session_ids: list[str] = []
        names = [self._collection.name, *(self._collection.part(suffix).name for suffix in OUTSIDE)]
        self._removed: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._left: Counter[str] = Counter(dict.fromkeys(names, 0))

    async def pull(self) -> list[ErasureProgress] | None:
        """Erase some sessions; return `None` if there are none.

        Raises:
            MongoDBSessionError: A session was not erased completely. The error names it.
        """
        async with self._store.connection.operation():
            if self._begun is None:
                self._begun = self._store.connection.now()
                self._store.ensure_indexes()
                self._total = await self._collection.count({"owner": self._owner})
            found = await self._collection.find(guard(self._owner), {"_id": 1}, limit=AT_ONCE)
            if not found:
                self._ended = self._store.connection.now()
                return None
            outcomes = await asyncio.gather(*(self._erase(each["_id"]) for each in found), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
            removed = [outcome for outcome in outcomes if isinstance(outcome, Removed)]
            await self._verify(removed)
        return [self._done(each.places[0].session_id) for each in removed]

    async def _erase(self, session_id: Any) -> Removed | None:
        try:
            return await self._store.deletion.remove_matching(session_id, guard(self._owner))
        except MongoDBSessionError as error:
            raise_alone(naming_session(error, session_id, "was not erased completely"))

    async def _verify(self, removed: list[Removed]) -> None:
        deletion, places = self._store.deletion, [place for each in removed for place in each.places]
        for each in removed:
            self._removed.update(each.counts)
        for number in range(_ROUNDS if places else 0):
            left = await deletion.count_parts(places)
            if not any(left.values()) or number == _ROUNDS - 1:
                self._left.update(left)
                return
            for place in places:
                self._removed.update(await deletion.remove_parts(place))

    def _done(self, session_id: Any) -> ErasureProgress:
        self._session_ids.append(str(session_id))  # an application can have stored another type
        done = len(self._session_ids)
        return ErasureProgress(done, max(done, self._total), self._session_ids[-1])

    def receipt(self) -> ErasureReceipt:
        sessions = self._collection.name
        return {
            "owner": self._owner,
            "database": self._collection.database,
            "started_at": to_iso(self._begun),
            "finished_at": to_iso(self._ended),
            "sessions": self._session_ids,
            "removed": dict(self._removed),
            "verified": {
                name: {"looked_for": _OF_OWNER if name == sessions else _OF_SESSIONS, "found": found}
                for name, found in self._left.items()
            },
        }


async def erase(portal: Portal, erasure: Erasure) -> ErasureReceipt:
    """Carry out an erasure on the portal's loop; `progress` is called and awaited on the running loop."""
    while (done := await portal.run(erasure.pull)) is not None:
        for each in done:
            if inspect.isawaitable(waiting := erasure.progress(each)):
                await waiting
    return erasure.receipt()


def erase_blocking(portal: Portal, erasure: Erasure) -> ErasureReceipt:
    """Carry out an erasure; `progress` is called on this thread and awaited on the portal's loop."""
    while (done := portal.call(erasure.pull)) is not None:
        for each in done:
            if inspect.isawaitable(waiting := erasure.progress(each)):
                portal.call(_wait_for, waiting)
    return erasure.receipt()


async def _wait_for(waiting: Awaitable[object]) -> None:
    await waiting


def _ignore(progress: ErasureProgress) -> None: ...
