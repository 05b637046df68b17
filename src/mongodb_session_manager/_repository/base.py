"""`RepositoryMethods`: the base class of the groups of methods of the repository."""

from __future__ import annotations

from .._format.labels import checked_owner
from .._store.store import SessionStore


class RepositoryMethods:
    """A group of methods of the repository; they use the store, and no other group."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._connection = store.connection

    def _owner(self, owner: str | None) -> str | None:
        """Return the owner whose sessions a method may use: its argument, or the owner of the repository.

        Raises:
            InvalidArgumentError: `owner` is not a valid owner.
        """
        return self._store.owner if owner is None else checked_owner(owner)
