"""What an imported session and a fork have in common: a place of their own until they are complete.

A copy is written beside everything that is there, and its session document last: until then nobody sees anything of
it. Whatever it writes before is under a moment that no other copy into the same session has: it is the `created_at` of
its agents, which its buckets hold, and the generation of its attachments. To have it alone, and so that what it wrote
is found again if it does not come to its end, a copy leaves a note in `<collection>_archive`:

    _id          {session_id, copy: <moment>}
    by           who copies
    generation   of what it writes beside the session, by which a deletion of the session knows to leave that alone
    messages     []
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from ._archive import SessionArchive
from ._attachments import Attachments
from ._beside import COPYING_TIME, Keeping, kept_from, notes, within
from ._connection import AsyncCollection
from ._documents import Document, now
from ._driver_errors import DuplicateKeyError, is_refusal
from .errors import (
    DatabaseError,
    DatabaseTimeoutError,
    MessageTooLargeError,
    MongoDBSessionError,
    SessionExistsError,
    raise_alone,
)

logger = logging.getLogger(__name__)

_ROUNDS = 64
"""How many copies into one session may begin in the same millisecond."""


_NOT_YET = datetime(1970, 1, 1, tzinfo=UTC)


class Copy:
    """A session that is being written.

    Args:
        sessions: The collection it is written to.
        attachments: Their attachments.
        session_id: The new session.
    """

    def __init__(self, sessions: SessionCopies, attachments: Attachments, session_id: str) -> None:
        self.session_id = session_id
        self.moment = _NOT_YET
        self.expires_from: datetime | None = None
        self._ttl: int | None = None
        self._sessions = sessions
        self._attachments = attachments
        self._token = uuid.uuid4().hex
        self.has_begun = False
        self._may_be_there = False

    @property
    def generation(self) -> int:
        """The generation of what stands beside it: its moment, as `new_generation` counts."""
        return _generation(self.moment)

    @property
    def expiry(self) -> Document:
        """The fields of the session document that say when it expires; `_beside` explains them."""
        if self._ttl is None:
            return {}
        until = self.expires_from
        return {"session_ttl": self._ttl, "updated_at": self.moment, "kept_until": until, "keep_until": until}

    def origin(self, session_id: str) -> Document:
        """Return the field of the session document that says what it is a copy of."""
        return {"session_id": session_id, "at": self.moment, "by": self._token}

    async def begin(self, ttl: int | None) -> None:
        """Make sure of a moment that no other copy into the session has; to be called before anything is written.

        Args:
            ttl: Seconds after which the session is to expire, `None` if it stays.
        """
        self._ttl = ttl
        keeping = Keeping(None if ttl is None else timedelta(seconds=ttl))
        moment = now()
        for _ in range(_ROUNDS):
            self.moment, self.expires_from = moment, keeping.expires_from(moment)
            note = {"messages": [], "generation": self.generation, **kept_from(self.expires_from)}
            try:
                await self._archive(partial(_put_note, {"_id": self._note_id, "by": self._token}, note))
            except DuplicateKeyError:
                moment += timedelta(milliseconds=1)
            else:
                self.has_begun = True
                return
        raise DatabaseError(f"too many copies are made of session {self.session_id!r} at the same time")

    @property
    def _note_id(self) -> Document:
        return {"session_id": self.session_id, "copy": self.moment}

    async def _archive(self, command: Callable[[AsyncCollection], Awaitable[Any]]) -> Any:
        return await self._sessions._send(command, self._sessions._archive_name)

    async def put_bucket(self, bucket: Document) -> None:
        """Store a bucket."""
        bucket = {**bucket, "generation": self.generation, **kept_from(self.expires_from)}
        await self._archive(lambda archive: archive.replace_one({"_id": bucket["_id"]}, bucket, upsert=True))

    async def commit(self, command: Callable[[AsyncCollection], Awaitable[Any]]) -> None:
        """Send the command that inserts the session document.

        Raises:
            SessionExistsError: There is another session of that id.
            DatabaseTimeoutError: It was begun too long ago.
        """
        if now() - self.moment > COPYING_TIME / 2:
            raise DatabaseTimeoutError(f"copying session {self.session_id!r} took longer than {COPYING_TIME / 2}")
        sent = 0

        def count(collection: AsyncCollection) -> Awaitable[Any]:
            nonlocal sent
            sent += 1
            return command(collection)

        self._may_be_there = True
        try:
            await self._sessions._send(count)
        except DuplicateKeyError:  # it may be ours, if an acknowledgement was lost
            if not await self.is_there():
                raise_alone(SessionExistsError(f"session {self.session_id!r} exists already"))
        except MongoDBSessionError as error:
            self._may_be_there = not (isinstance(error, MessageTooLargeError) or (is_refusal(error) and sent == 1))
            raise

    async def is_there(self) -> bool:
        """Tell whether the session document is there."""
        condition = {"_id": self.session_id, "copy_of.by": self._token}
        found = await self._sessions._send(lambda collection: collection.find_one(condition, {"_id": 1}))
        self._may_be_there = found is not None
        return self._may_be_there

    async def finish(self) -> None:
        """Remove the notes, and what copies have left that did not come to their end; the session is there.

        What fails is left to the next copy; nobody sees it.
        """
        try:
            for moment in await self._archive(self._other_moments):
                await self._remove(moment)
            await self._archive(lambda archive: archive.delete_one({"_id": self._note_id}))
        except MongoDBSessionError as error:
            logger.warning("session_id=<%r>, error=<%s> | left-overs of copies not removed", self.session_id, error)

    async def _other_moments(self, archive: AsyncCollection) -> list[datetime]:
        found = archive.find({"_id": notes(self.session_id), "by": {"$ne": self._token}}, {"_id": 1})
        return [note["_id"]["copy"] async for note in found]

    async def abandon(self) -> None:
        """Remove what was written, unless the session may be there; raises nothing that the server says."""
        if not self.has_begun or self._may_be_there:
            return
        try:
            await self._remove(self.moment)
        except MongoDBSessionError as error:
            logger.warning("session_id=<%r>, error=<%s> | an unfinished copy was not removed", self.session_id, error)

    async def _remove(self, moment: datetime) -> None:
        session_id = self.session_id
        buckets = {"_id": within(session_id, "agent"), "_id.since": moment}
        await self._archive(lambda archive: archive.delete_many(buckets))
        await self._attachments.drop_generation(session_id, _generation(moment))
        await self._archive(lambda archive: archive.delete_one({"_id": {"session_id": session_id, "copy": moment}}))


def _generation(moment: datetime) -> int:
    return round(moment.timestamp() * 1000) * 1000


async def _put_note(condition: Document, note: Document, archive: AsyncCollection) -> None:
    await archive.update_one(condition, {"$set": note}, upsert=True)


class SessionCopies(SessionArchive):
    """The part of the repository that copies are made with."""

    _attachments: Attachments

    def _copy(self, session_id: str) -> Copy:
        return Copy(self, self._attachments, session_id)
