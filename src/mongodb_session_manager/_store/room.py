"""`Room`: storing parts of a session other than messages, and the error for a part that does not fit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from .._format.sizes import MAX_DOCUMENT_BYTES, PART_SIZES, size_of, too_large
from .._format.statements import Update
from .._io.drivers import AsyncCollection
from ..errors import MessageTooLargeError, StateTooLargeError
from .expiry import Expiry
from .mover import Mover
from .sessions import Sessions

T = TypeVar("T")


class Room:
    """Stores parts of sessions; moves messages into the archive if the session document has no room."""

    def __init__(self, sessions: Sessions, expiry: Expiry, mover: Mover) -> None:
        self._sessions = sessions
        self._expiry = expiry
        self._mover = mover

    async def store_part(
        self, update: Update, part: str, value: Any, command: Callable[[AsyncCollection, Update], Awaitable[T]]
    ) -> T | None:
        """Send a statement that stores a part of a session; the command and the result are those of `Expiry.update`.

        Raises:
            StateTooLargeError: There is no room.
        """
        session_id, owner = update.filter["_id"], update.filter.get("owner")
        while True:
            try:
                return await self._expiry.update(update, command)
            except MessageTooLargeError as error:
                refusal = error
            # The driver can refuse a statement without sending it, whether or not the session belongs to the owner.
            if owner is not None and await self._sessions.find(session_id, {"_id": 1}, owner) is None:
                return None
            if not await self._mover.make_room(session_id, refusal):
                raise await self.too_large(session_id, part, value, refusal)

    async def too_large(
        self, session_id: str, part: str, value: Any, refusal: MessageTooLargeError
    ) -> StateTooLargeError:
        size = size_of(value)
        document = None
        if size < MAX_DOCUMENT_BYTES:
            document = await self._sessions.collection.find_one({"_id": session_id}, PART_SIZES)
        error = too_large(session_id, part, size, document or {})
        error.code, error.code_name, error.operation = refusal.code, refusal.code_name, refusal.operation
        return error
