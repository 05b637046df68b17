"""`RepositoryMethods`: the base class of the groups of methods of the repository."""

from __future__ import annotations

from .._store.store import SessionStore


class RepositoryMethods:
    """A group of methods of the repository; they use the store, and no other group."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._connection = store.connection
