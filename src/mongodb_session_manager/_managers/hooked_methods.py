"""The methods of a factory for metadata and feedback, which do not open the session."""

from __future__ import annotations

from functools import partial
from typing import Any

from .._format.metadata import checked_feedback, checked_keys, checked_metadata
from .._io.connection import Connection
from .._io.twins import finish_twins
from .._notifications.notify import attributed_to
from .._repository.async_repository import SharedRepository
from .._store.sessions import missing_session
from .options import Options
from .user_hooks import Operation, call_hooked, run_hooked


class HookedMethods:
    """Methods that go through the factory's hooks, as those of a manager do, and each take one command.

    A hook can act before it calls `original_func`, or without calling it. So it is called only if the session exists
    and belongs to the owner, which takes a further command.
    """

    _async: SharedRepository
    _connection: Connection
    _options: Options

    def get_metadata(self, session_id: str, *, owner: str | None = None) -> Any:
        """Return `{"metadata": {...}}`, or `{}` if the session does not exist.

        Args:
            session_id: The session.
            owner: Only a session of this owner is read.

        Raises:
            InvalidArgumentError: An argument is invalid.
        """
        return self._hooked(self._async.get_metadata, "get", session_id, owner)

    async def get_metadata_async(self, session_id: str, *, owner: str | None = None) -> Any:
        return await self._run_hooked(self._async.get_metadata, "get", session_id, owner)

    def update_metadata(self, session_id: str, metadata: dict[str, Any], *, owner: str | None = None) -> Any:
        """Set keys of a session's metadata and keep the others, without opening the session.

        Args:
            session_id: The session.
            metadata: Values by key; `a.b` sets `b` within `a`. Dates are stored as BSON dates: UTC, milliseconds.
            owner: Only a session of this owner is changed.

        Returns:
            The result of the factory's metadata hook; `None` without one.

        Raises:
            InvalidArgumentError: A key cannot be set.
            EncodingError: A value cannot be stored.
            StateTooLargeError: The session document has no room for it.
            SessionNotFoundError: The session does not exist, or belongs to another owner.
        """
        argument = {"metadata": checked_metadata(metadata)}
        return self._hooked(self._async.update_metadata, "update", session_id, owner, **argument)

    async def update_metadata_async(
        self, session_id: str, metadata: dict[str, Any], *, owner: str | None = None
    ) -> Any:
        argument = {"metadata": checked_metadata(metadata)}
        return await self._run_hooked(self._async.update_metadata, "update", session_id, owner, **argument)

    def delete_metadata(self, session_id: str, keys: list[str], *, owner: str | None = None) -> Any:
        """Remove keys from a session's metadata, without opening the session; unknown keys are ignored.

        Args:
            session_id: The session.
            keys: The keys; `a.b` removes `b` within `a`.
            owner: Only a session of this owner is changed.

        Returns:
            The result of the factory's metadata hook; `None` without one.

        Raises:
            InvalidArgumentError: `keys` is not a list of keys.
            SessionNotFoundError: The session does not exist, or belongs to another owner.
        """
        return self._hooked(self._async.delete_metadata, "delete", session_id, owner, keys=checked_keys(keys))

    async def delete_metadata_async(self, session_id: str, keys: list[str], *, owner: str | None = None) -> Any:
        argument = {"keys": checked_keys(keys)}
        return await self._run_hooked(self._async.delete_metadata, "delete", session_id, owner, **argument)

    def add_feedback(self, session_id: str, feedback: dict[str, Any], *, owner: str | None = None) -> Any:
        """Append feedback to a session, stamped with the current time as `created_at`, without opening the session.

        Args:
            session_id: The session.
            feedback: Any keys; `rating` (`"up"`, `"down"`) and `comment` are the usual ones.
            owner: Only a session of this owner is changed.

        Returns:
            The result of the factory's feedback hook; `None` without one.

        Raises:
            InvalidArgumentError: `feedback` is not a dict.
            EncodingError: A value cannot be stored.
            StateTooLargeError: The session document has no room for it.
            SessionNotFoundError: The session does not exist, or belongs to another owner.
        """
        argument = {"feedback": checked_feedback(feedback)}
        return self._hooked(self._async.add_feedback, "add", session_id, owner, **argument)

    async def add_feedback_async(self, session_id: str, feedback: dict[str, Any], *, owner: str | None = None) -> Any:
        argument = {"feedback": checked_feedback(feedback)}
        return await self._run_hooked(self._async.add_feedback, "add", session_id, owner, **argument)

    def _hooked(self, operation: Operation, action: str, session_id: str, owner: str | None, **argument: Any) -> Any:
        portal, hook = self._connection.portal, self._options.hook_for(action)
        if hook is not None and not portal.call(self._async.session_exists, session_id, owner=owner):
            return _nothing(action, session_id)
        with attributed_to(self._connection):
            return call_hooked(portal, hook, partial(operation, owner=owner), action, session_id, **argument)

    async def _run_hooked(
        self, operation: Operation, action: str, session_id: str, owner: str | None, **argument: Any
    ) -> Any:
        portal, hook = self._connection.portal, self._options.hook_for(action)
        if hook is not None and not await portal.run(self._async.session_exists, session_id, owner=owner):
            return _nothing(action, session_id)
        with attributed_to(self._connection):
            return await run_hooked(portal, hook, partial(operation, owner=owner), action, session_id, **argument)


def _nothing(action: str, session_id: str) -> dict[str, Any]:
    """Return the result of an operation for a session that does not exist, or raise its error."""
    if action == "get":
        return {}
    raise missing_session(session_id)


finish_twins(HookedMethods)
