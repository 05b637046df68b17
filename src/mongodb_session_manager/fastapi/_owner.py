"""The check of the owner that an application's dependency returns."""

from __future__ import annotations

from ..errors import ConfigurationError


def checked_owner(owner: object) -> str:
    """Return the result of an owner's dependency if it is a str; `None` would allow the sessions of all owners.

    Raises:
        ConfigurationError: It is not a str.
    """
    if not isinstance(owner, str):
        raise ConfigurationError(
            f"the owner's dependency must return the owner's id, a str, and returned {type(owner).__name__}: raise "
            "HTTPException(401) for a request without an owner"
        )
    return owner
