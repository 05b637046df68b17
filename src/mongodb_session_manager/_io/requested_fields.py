"""Give a hook the stored metadata after a change, without an extra command.

The asking follows the call, not its arguments: it reaches the repository through every other hook in between, and
changes nothing that any of them passes or returns.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

CONNECTION_ID = "connection_id"
"""The WebSocket connection that gets the metadata changes of a session."""

ACTED_ON = frozenset({CONNECTION_ID})
"""Every metadata key that the library acts on. A model must not write them, unless `allowed_keys` names them."""


class StoredFields:
    """Fields of `ACTED_ON` after a change of the metadata; `remove` removes one, unless its value has changed."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.values: dict[str, Any] = {}
        self.remove: Callable[[str, Any], Awaitable[None]] | None = None


_requested: ContextVar[tuple[StoredFields, ...]] = ContextVar("mongodb_session_manager_requested_fields", default=())


@contextmanager
def requesting(fields: StoredFields) -> Iterator[None]:
    """Make the metadata changes of this block fill in `fields`, with the same command."""
    token = _requested.set((*_requested.get(), fields) if fields.names else _requested.get())
    try:
        yield
    finally:
        _requested.reset(token)


def requested_by_callers() -> tuple[StoredFields, ...]:
    return _requested.get()
