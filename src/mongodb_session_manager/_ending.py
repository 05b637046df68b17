"""Ending sessions: a session is deleted with all that stands beside it.

The document goes first, so that a session is either whole or gone, and then the rest; `_beside` says how what belongs
to it is told from what belongs to a later session of the same id. Whoever is writing to a session meanwhile finds it
gone, and removes again what it has stored beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ._beside import ARCHIVE, COPYING_TIME, beside, notes
from ._commands import SessionCollection
from ._connection import AsyncCollection
from ._documents import Document, checked_id, new_generation, now


class SessionEnding(SessionCollection):
    """The part of the repository that deletes sessions."""

    async def delete_session(self, session_id: str, **kwargs: Any) -> bool:
        """Delete a session: its document, its archived messages and its attachments.

        If it is interrupted, the session is whole or gone, and calling it again removes what is left. A manager that
        has the session open gets `SessionNotFoundError` from its next write. A session that is created with the same
        id meanwhile keeps everything.

        Args:
            session_id: The session.
            **kwargs: Accepted because Strands' own repositories do; unused.

        Returns:
            Whether the session was there. What was left of one that was deleted before is removed all the same.

        Raises:
            InvalidArgumentError: `session_id` cannot be one.
        """
        checked_id(session_id, "session_id")
        begin = new_generation()  # no session that is created from now on begins with a lower one
        async with self._connection.operation():
            generation, was_there = await self._delete_document(session_id)
            copies = await self._copies_under_way(session_id)
            await self._remove_rest(session_id, begin if generation is None else generation, copies)
        return was_there

    async def _delete_document(self, session_id: str) -> tuple[int | None, bool]:
        """Delete the document of a session; return its generation, `None` if it was gone, and whether it was seen."""
        was_there = False
        while True:
            found = await self._find(session_id, {"attachments_generation": 1})
            if found is None:
                return None, was_there
            was_there = True
            generation = found.get("attachments_generation")
            condition = {"_id": session_id, "attachments_generation": generation}
            deleted = await self._send(partial(_delete_one, condition))
            if deleted:
                return generation or 0, True

    async def _copies_under_way(self, session_id: str) -> list[int]:
        """Return the generations of copies into a session that are not complete yet."""
        condition = {"_id": notes(session_id), "_id.copy": {"$gt": now() - COPYING_TIME}}
        found = await self._send(
            lambda archive: archive.find(condition, {"generation": 1}).to_list(), f"{self._collection_name}{ARCHIVE}"
        )
        return [note["generation"] for note in found]

    async def _remove_rest(self, session_id: str, generation: int, excepted: Sequence[int]) -> None:
        """Remove what stands beside a session that is gone, and is not of a later or excepted generation."""
        for suffix, condition in beside(session_id, generation, excepted):
            await self._remove_some(suffix, condition)

    async def _remove_some(self, suffix: str, condition: Document) -> None:
        await self._send(lambda collection: collection.delete_many(condition), f"{self._collection_name}{suffix}")


async def _delete_one(condition: Document, collection: AsyncCollection) -> bool:
    return bool((await collection.delete_one(condition)).deleted_count)
