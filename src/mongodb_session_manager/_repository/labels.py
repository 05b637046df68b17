"""The methods for the labels of sessions: owner, title and tags."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType

from .._format.documents import Document
from .._format.ids import checked_id
from .._format.labels import NO_LIST, checked_owner, guard, label_changes
from .._format.statements import Update
from .._store.expiry import matched
from .._store.sessions import missing_session
from .base import RepositoryMethods


class LabelMethods(RepositoryMethods):
    async def update_session(
        self,
        session_id: str,
        *,
        title: str | EllipsisType | None = ...,
        tags: Sequence[str] | EllipsisType | None = ...,
        owner: str | None = None,
    ) -> None:
        """Change the title and the tags of a session, in one command; omitted arguments change nothing.

        Args:
            session_id: The session.
            title: At most 1,000 characters; `None` removes the title.
            tags: The new tags, which replace the stored ones: at most 100, of at most 200 characters each. `None` or
                an empty list removes them.
            owner: Only a session of this owner is changed. It does not change the owner; `claim_session` sets it.

        Raises:
            InvalidArgumentError: An argument is invalid.
            StateTooLargeError: The session document has no room for it.
            SessionNotFoundError: The session does not exist, or belongs to another owner.
        """
        changes, wanted = label_changes(title, tags), self._owner(owner)
        checked_id(session_id, "session_id")
        async with self._connection.operation():
            if not changes:
                await self._store.sessions.get(session_id, {"_id": 1}, wanted)
                return
            sets = {name: value for name, value in changes.items() if value is not None}
            removed = dict.fromkeys(changes.keys() - sets, "")
            update: Document = {"$set": {**sets, "updated_at": self._connection.now()}}
            if removed:
                update["$unset"] = removed
            statement = Update({"_id": session_id, **guard(wanted)}, update, None)
            if not await self._store.room.store_part(statement, " and ".join(sorted(changes)), sets, matched):
                raise missing_session(session_id)

    async def claim_session(self, session_id: str, owner: str) -> None:
        """Set the owner of a session that has none, such as one of an earlier version, in one command.

        It does not count as a use of the session: its date and its expiry stay. A session that already has this owner
        stays unchanged.

        Args:
            session_id: The session.
            owner: At most 1,024 bytes.

        Raises:
            InvalidArgumentError: An argument is invalid.
            SessionNotFoundError: The session does not exist, or belongs to another owner.
        """
        claimed = checked_owner(owner)
        condition = {"_id": checked_id(session_id, "session_id"), "owner": {"$in": [None, claimed]}, **NO_LIST}
        async with self._connection.operation():
            if not await self._store.sessions.update(Update(condition, {"$set": {"owner": claimed}}, None)):
                raise missing_session(session_id)
