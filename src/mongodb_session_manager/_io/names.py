"""Checks of the names of databases, collections and indexed fields."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from ..errors import ConfigurationError, raise_alone

T = TypeVar("T")


def given(value: T | None, default: T) -> T:
    return default if value is None else value


def checked_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} must be a str, got {reprlib.repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise_alone(ConfigurationError(f"{name} must be text that UTF-8 can encode, got {reprlib.repr(value)}"))
    return value


_REFUSED = {"database_name": '/\\. "$\0', "collection_name": "$\0"}
_MAX_BYTES = {"database_name": 63, "collection_name": 170}
"""MongoDB allows 255 bytes for database, dot and collection, including suffixes such as `_attachments.chunks`."""


def checked_name(value: object, name: str) -> str:
    """Return a valid name of a database or collection, or raise `ConfigurationError` about the argument `name`."""
    text = checked_text(value, name)
    shown = reprlib.repr(text)
    if not text:
        raise ConfigurationError(f"{name} must be a non-empty str")
    if refused := [character for character in _REFUSED[name] if character in text]:
        raise ConfigurationError(f"{name} must not contain {refused[0]!r}, got {shown}")
    if len(text.encode()) > _MAX_BYTES[name]:
        raise ConfigurationError(f"{name} must have at most {_MAX_BYTES[name]} bytes, got {len(text.encode())}")
    if name == "collection_name" and (text.startswith((".", "system.")) or text.endswith(".") or ".." in text):
        raise ConfigurationError(f"{name} must not begin with 'system.', nor with a dot, nor end with one, got {shown}")
    return text


def checked_fields(fields: Sequence[str] | None) -> tuple[str, ...]:
    if fields is None:
        return ()
    if isinstance(fields, str | bytes | Mapping) or not isinstance(fields, Iterable):
        raise ConfigurationError(f"metadata_fields must be a list of field names, got {reprlib.repr(fields)}")
    fields = list(fields)
    for number, field in enumerate(fields):
        checked_text(field, f"metadata_fields[{number}]")
        if "\0" in field or any(not part or part.startswith("$") for part in field.split(".")):
            raise ConfigurationError(
                f"metadata_fields[{number}] must be the name of a field, got {reprlib.repr(field)}"
            )
    return tuple(dict.fromkeys(fields))
