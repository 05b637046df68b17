"""`Deletion`: deletes sessions, and finishes the deletions and abandoned copies of other processes.

A session document that is not live has a `state`:

    state         "copying" (a fork or an import fills it) or "deleting"
    owner         of the session
    state_by      a token of the call that deletes the session
    state_until   the end of its lease, by the server's clock

A deletion replaces the document with these fields, removes the parts of the session, and then the document. The steps
are idempotent, so any process can finish a deletion at any time. A copy whose lease has expired is abandoned: any
process can delete it. A call with the same id finishes the deletion of a session or an abandoned copy. Each process
also searches for unfinished sessions once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from bson import ObjectId

from .._format.documents import Document
from .._format.labels import guard
from .._format.layout import UNFINISHED, Place, is_unfinished, live_at
from .._format.retention import Life
from .._io.drivers import find_and_modify
from .._io.indexes import unseen
from ..errors import MongoDBSessionError, SessionConflictError, SessionExistsError
from .expiry import Expiry
from .sessions import Sessions

logger = logging.getLogger(__name__)

LEASE = timedelta(seconds=60)
"""How long a copy can go without renewing its lease before another process deletes it.

The search for unfinished sessions ignores deletions that began later than this.
"""

_PAUSES = (0.05, 1.0)
"""The first and the longest pause, in seconds, between two queries for a session that is being copied."""

_STATE: Document = dict.fromkeys(
    ("incarnation", "migrating", "state", "state_by", "state_until", "time_to_live", "expires_at"), 1
)

_SEARCH = ("state", "state_until")
"""A key in the register of ensured indexes: the search for unfinished sessions runs once per process and collection."""


class Removed(NamedTuple):
    """The places of the parts of a deleted session, and the number of deleted documents by collection."""

    places: list[Place]
    counts: Counter[str]


class Deletion:
    def __init__(self, sessions: Sessions, expiry: Expiry) -> None:
        self._sessions = sessions
        self._collection = sessions.collection
        self._connection = sessions.connection
        self._expiry = expiry

    async def delete(self, session_id: str, owner: str | None = None) -> bool:
        async with self._connection.operation():
            if await self.delete_matching(session_id, {**guard(owner), **live_at(self._connection.now())}):
                return True
            if owner is not None:
                await self._finish_own(session_id, owner)
                return False
            await self._finish(session_id)
            if await self._find_state(session_id) is None:
                await self.remove_parts(Place(session_id, None))
        return False

    async def delete_matching(self, session_id: str, condition: Document) -> bool:
        """Delete a session and its parts if a condition matches its document; return whether it did."""
        return await self.remove_matching(session_id, condition) is not None

    async def remove_matching(self, session_id: str, condition: Document) -> Removed | None:
        """Delete a session as `delete_matching` does; return what was removed."""
        token = uuid.uuid4().hex
        if type(session_id) is str:  # an application can have stored an id that is not hashable
            self._expiry.forget(session_id, condition.get("owner"))
        state = {
            "_id": "$_id",
            "session_id": {"$literal": session_id},
            "incarnation": "$incarnation",
            "owner": "$owner",
            "migrating": "$migrating",
            "state": "deleting",
            "state_by": token,
            "state_until": self._connection.now() + LEASE,
        }
        query = {"_id": session_id, **condition}
        marked = await self._collection.send(
            lambda sessions: find_and_modify(sessions, query, [{"$replaceWith": state}], _STATE)
        )
        if marked is None:  # or an acknowledgement was lost
            marked = await self._collection.find_one({"_id": session_id, "state_by": token}, _STATE)
        return None if marked is None else await self._finish_deletion(session_id, marked)

    async def _finish_deletion(self, session_id: str, marked: Document) -> Removed:
        places = [Place(session_id, incarnation) for incarnation in (*incarnations_of(marked), None)]
        counts = Counter({self._collection.name: 1})
        for place in places:
            counts.update(await self.remove_parts(place))
        await self._collection.delete_one({"_id": session_id, "state": "deleting", "state_by": marked["state_by"]})
        return Removed(places, counts)

    async def remove_parts(self, place: Place) -> Counter[str]:
        """Remove the parts of a session at a place; return their number by collection."""
        counts: Counter[str] = Counter()
        for suffix, condition in place.outside():
            part = self._collection.part(suffix)
            counts[part.name] = await part.delete_many(condition)
        return counts

    async def count_parts(self, places: Sequence[Place]) -> Counter[str]:
        """Return the number of parts at places by collection; each collection is read with one command."""
        ranges: dict[str, list[Document]] = {}
        for place in places:
            for suffix, condition in place.outside():
                ranges.setdefault(suffix, []).append(condition)
        counts: Counter[str] = Counter()
        for suffix, conditions in ranges.items():
            part = self._collection.part(suffix)
            counts[part.name] = await part.count({"$or": conditions})
        return counts

    async def _find_state(self, session_id: str, owner: str | None = None) -> Document | None:
        return await self._collection.find_one({"_id": session_id, **guard(owner)}, _STATE)

    async def _finish_own(self, session_id: str, owner: str) -> None:
        """Finish an interrupted deletion of a session of an owner."""
        if (found := await self._find_state(session_id, owner)) is not None:
            await self._finish(session_id, found)

    async def _finish(self, session_id: str, found: Document | None = None) -> Document | None:
        """Finish a deletion; delete an abandoned copy, or an expired session.

        Return the state of the document that remains, or `None`.
        """
        found = found or await self._find_state(session_id)
        if found is None:
            return None
        if (unfinished := is_unfinished(found)) and found["state"] == "deleting":
            await self._finish_deletion(session_id, found)
            return None
        moment, names = self._connection.now(), ("incarnation", "state", "state_by", "state_until")
        is_abandoned = unfinished and found["state_until"] < moment
        life = Life.of(found)
        has_expired = life.time_to_live is not None and life.expires_at is not None and life.expires_at <= moment
        if not is_abandoned and not (has_expired and not unfinished):
            return found
        if not await self.delete_matching(session_id, {name: found.get(name) for name in (*names, "expires_at")}):
            return await self._find_state(session_id)
        logger.info("session_id=<%r> | removed an expired session or an abandoned copy", session_id)
        return None

    async def free_id(self, session_id: str, seconds: float = 0.0) -> None:
        """Free an id for a new session: finish a deletion, or delete an abandoned copy or an expired session.

        Wait at most `seconds` for a copy whose lease has not expired.

        Raises:
            SessionExistsError: There is a live session with that id.
            SessionConflictError: The session is still being imported or forked.
        """
        end, pause = time.monotonic() + seconds, _PAUSES[0]
        while (found := await self._finish(session_id)) is not None:
            if not is_unfinished(found):
                raise SessionExistsError(f"session {session_id!r} already exists")
            if time.monotonic() >= end:
                raise SessionConflictError(
                    f"session {session_id!r} is being imported or forked: repeat the request later"
                )
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _PAUSES[1])

    def search_unfinished(self) -> None:
        """Finish deletions and copies whose lease has expired, in the background and once per process."""
        if unseen(self._collection, [_SEARCH]):
            self._connection.start(self._finish_unfinished())

    async def _finish_unfinished(self) -> None:
        try:
            async with self._connection.operation():
                over = {**UNFINISHED, "state_until": {"$lt": self._connection.now()}}
                for document in await self._collection.find(over, _STATE):
                    await self._finish(document["_id"], document)
        except MongoDBSessionError as error:
            logger.warning("error=<%s> | the search for unfinished deletions and copies failed", error)


def incarnations_of(document: Document) -> list[ObjectId]:
    """Return the incarnations in the ids of a session's parts: its own, and those of its migrations."""
    migrating = document.get("migrating")
    found = [document.get("incarnation"), *(migrating if isinstance(migrating, list) else [])]
    return list(dict.fromkeys(each for each in found if isinstance(each, ObjectId)))
