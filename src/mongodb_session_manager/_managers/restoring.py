"""The view of an agent that Strands restores, and the error for a state that cannot be restored."""

from __future__ import annotations

from traceback import walk_tb
from typing import Any

from strands.types.exceptions import SessionException

from .._format.ids import agent_key
from ..errors import DatabaseError, MongoDBSessionError

# Functions of Strands that restore one part of an agent.
_RESTORED_IN = {
    "_validate_json_serializable": "agent_data.state",
    "initialize_internal_state": "agent_data._internal_state",
    "restore_from_session": "agent_data.conversation_manager_state",
}

RESTORE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SessionException)
"""Errors that Strands raises for a state that it cannot restore."""


class WithoutStorage:
    """A view of an agent without its storage; all other attributes are read from the agent and set on it."""

    storage = None

    def __init__(self, agent: object) -> None:
        self.__dict__["_agent"] = agent

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["_agent"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_agent"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_agent"], name, value)


def restore_error(session_id: str, agent_id: str, error: Exception) -> DatabaseError | None:
    """Return an error that names the session and the field, without the text of `error`, which can quote content.

    `None` means an error with another cause.
    """
    names = [frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)]
    field = next((field for name, field in _RESTORED_IN.items() if name in names), "messages")
    is_initialized_twice = isinstance(error, SessionException) and field == "messages"
    if is_initialized_twice or isinstance(error, MongoDBSessionError):
        return None
    return DatabaseError(
        f"session {session_id!r}: the field 'agents.{agent_key(agent_id)}.{field}' cannot be restored "
        f"({type(error).__name__} in {names[-1]})"
    )
