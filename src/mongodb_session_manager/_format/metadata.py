"""Metadata, feedback and agent configurations: checks, encoding and decoding. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from ..errors import EncodingError, InvalidArgumentError, raise_alone
from .codec import MARKER, MAX_NESTING, decode, encode, subscript
from .dates import to_date
from .documents import Document
from .sizes import refuse_unstorable

_RESERVED = frozenset({MARKER, "__bytes_encoded__"})


_VALUE_DEPTH = 2  # document, metadata or agent_data, value

_MAX_SEGMENTS = 90
"""The maximum number of segments of a key; each is a level of the document, and `MAX_LEVELS` holds for all of them."""


def checked_metadata(metadata: object, name: str = "metadata") -> dict[str, Any]:
    if not isinstance(metadata, dict):
        raise InvalidArgumentError(f"{name} must be a dict, not {type(metadata).__name__}")
    _checked_paths(metadata, name)
    return metadata


def checked_keys(keys: object, name: str = "keys") -> list[str]:
    """Return valid keys to delete, each once, or raise `InvalidArgumentError`."""
    if isinstance(keys, str | bytes | Mapping) or not isinstance(keys, Iterable):
        raise InvalidArgumentError(f"{name} must be a list of str, not {type(keys).__name__}")
    listed: list[Any] = list(keys)
    with suppress(TypeError):  # the next line refuses unhashable keys
        listed = list(dict.fromkeys(listed))
    _checked_paths(listed, name)
    return listed


def checked_feedback(feedback: object) -> dict[str, Any]:
    if not isinstance(feedback, dict):
        raise InvalidArgumentError(f"feedback must be a dict, not {type(feedback).__name__}")
    return feedback


def _checked_paths(paths: Iterable[object], name: str) -> None:
    split = []
    for path in paths:
        if not isinstance(path, str):
            raise InvalidArgumentError(f"every key of {name} must be a str, not {type(path).__name__}")
        parts = path.split(".")
        if "\0" in path or any(not part or part.startswith("$") for part in parts):
            raise InvalidArgumentError(
                f"{name} contains the key {path!r}: a key must not be empty, contain NUL, or have a segment between "
                "dots that is empty or begins with $"
            )
        if len(parts) > _MAX_SEGMENTS:
            raise InvalidArgumentError(
                f"{name} contains a key of {len(parts)} segments between dots; at most {_MAX_SEGMENTS} are allowed"
            )
        if _RESERVED.intersection(parts):
            raise InvalidArgumentError(f"{name} contains the key {path!r}, a segment of which marks encoded values")
        try:
            path.encode()
        except UnicodeEncodeError:
            raise_alone(InvalidArgumentError(f"{name} contains a key with a lone surrogate"))
        split.append(parts)
    split.sort()
    for shorter, longer in itertools.pairwise(split):
        if longer[: len(shorter)] == shorter:
            raise InvalidArgumentError(f"{name} contains both {'.'.join(shorter)!r} and {'.'.join(longer)!r}")


def is_within(key: str, of: str) -> bool:
    return key == of or key.startswith(f"{of}.")


def name_of(key: str) -> str:
    """Return the name of a metadata value in errors: `metadata['a']['b']` for the key `a.b`."""
    return "metadata" + "".join(map(subscript, key.split(".")))


def encoded(value: Any, depth: int, name: str, *, arrays: bool = True, nesting: int = MAX_NESTING) -> Any:
    """Encode a value that users query: every datetime as a BSON date, UTC and whole milliseconds.

    With `arrays`, tuples and sets become arrays, so that queries find their elements; they come back as lists.
    """
    try:
        return encode(_queryable(value, arrays), depth=depth, name=name, nesting=nesting)
    except RecursionError:
        raise_alone(EncodingError("cannot store a value nested deeper than Python's stack allows here"))


def _queryable(value: Any, arrays: bool) -> Any:
    match value:
        case datetime():
            with suppress(InvalidArgumentError):  # the first or last day of the calendar, in another zone
                return to_date(value)
            return value
        case dict():
            return {key: _queryable(item, arrays) for key, item in value.items()}
        case list():
            return [_queryable(item, arrays) for item in value]
        case tuple() if arrays:
            return [_queryable(item, arrays) for item in value]
        case set() | frozenset() if arrays:
            return [_queryable(item, arrays) for item in sorted(value, key=_place)]
        case _:
            return value


def _place(member: Any) -> tuple[str, Any]:
    """Return the sort key of a member of a set, so that equal sets are stored as equal arrays."""
    if isinstance(member, bool | int | float):
        return "", member
    return type(member).__name__, member if isinstance(member, str | bytes) else repr(member)


def encoded_metadata(session_id: str, metadata: object) -> Document:
    if isinstance(metadata, dict):
        refuse_unstorable(session_id, "metadata", metadata)
    sets = {}
    for key, value in checked_metadata(metadata).items():
        levels = key.count(".")  # those of the key count as levels of the value, because an import reads both as one
        name, nesting = name_of(key), MAX_NESTING - levels
        sets[f"metadata.{key}"] = encoded(value, _VALUE_DEPTH + levels, name, nesting=nesting)
    return sets


def encoded_feedback(session_id: str, feedback: Document) -> Document:
    refuse_unstorable(session_id, "feedback", feedback)
    entry: Document = encoded(feedback, 3, "feedback", arrays=False)
    return entry


def encoded_config(session_id: str, part: str, config: Document) -> Document:
    refuse_unstorable(session_id, part, config)
    return {name: encoded(value, _VALUE_DEPTH + 2, name, arrays=False) for name, value in config.items()}


def decode_values(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {key: decode(value) for key, value in stored.items()}


def decode_all(stored: Iterable[Any]) -> list[Any]:
    return [decode(value) for value in stored]


def unset_keys(keys: Iterable[str]) -> Document:
    unset = {f"metadata.{key}": "" for key in keys}
    return {"$unset": unset} if unset else {}


def leads_into_marked(stored: Any, key: str) -> bool:
    """Return whether a part of a dotted key is stored in a marked form, which has no keys of the user."""
    for part in key.split(".")[:-1]:
        stored = stored.get(part) if isinstance(stored, dict) else None
        if isinstance(stored, dict) and MARKER in stored:
            return True
    return False
