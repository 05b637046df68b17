"""The method that erases all sessions of an owner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .._format.labels import checked_owner
from .._io.loop import portal_to
from .._store.erasure import Erasure, ErasureProgress, ErasureReceipt, erase
from .base import RepositoryMethods


class ErasureMethods(RepositoryMethods):
    async def erase_owner(
        self, owner: str, *, progress: Callable[[ErasureProgress], object] | None = None
    ) -> ErasureReceipt:
        """Delete all sessions of an owner with everything that belongs to them, and return a receipt.

        Each session is deleted as `delete_session` does. Expired sessions, unfinished imports and forks, and
        interrupted deletions are deleted, too, and so are sessions that are created before the call ends. A manager
        that has one of the sessions open gets `SessionNotFoundError` at its next write.

        The call can be interrupted at any time, and repeated: a further call deletes the rest. If it is interrupted,
        every session that is still listed is complete. A cancelled call finishes the deletions that have begun, of at
        most eight sessions, in the background.

        Memory grows only with the number of sessions, because the receipt lists their ids.

        Args:
            owner: The owner; sessions of other owners, or of none, are not changed.
            progress: Called after each deleted session; if it returns an awaitable, that is awaited. An exception that
                it raises ends the call.

        Raises:
            InvalidArgumentError: `owner` is not a valid owner, or `progress` is not callable.
            MongoDBSessionError: A session was not deleted completely; the error names it. Sessions that the call has
                not reached stay complete.
        """
        erasure = Erasure(self._store, checked_owner(owner), progress)
        return await erase(portal_to(asyncio.get_running_loop()), erasure)
