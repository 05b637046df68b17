"""The keys of a Strands `Storage`: their normal form, and ranges of them. Pure."""

from __future__ import annotations

import re

from ..errors import InvalidArgumentError
from .documents import Document
from .ids import checked_text

_STASH = "context"
"""The first segment of the keys of Strands' context manager; the second one is the session id."""

_BLOCK = re.compile(r"(?:.*/)?([^/]*)_[0-9]+", re.DOTALL)


def normalized_key(key: object) -> str:
    """Return a key in the form of Strands' path-based backends, or raise `InvalidArgumentError`."""
    normalized = _normalized(key, "key").strip("/")
    if not normalized:
        raise InvalidArgumentError("key must not be empty")
    return normalized


def normalized_prefix(prefix: object) -> str:
    """Return a prefix in the form of Strands' path-based backends; a trailing `/` is significant."""
    return _normalized(prefix, "prefix").lstrip("/")


def _normalized(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be a str, not {type(value).__name__}")
    if "\\" in value:
        raise InvalidArgumentError(f"{name} must not contain a backslash")
    if ".." in value.split("/"):
        raise InvalidArgumentError(f"{name} must not contain the segment '..'")
    return re.sub("/+", "/", checked_text(value, name))


def prefix_range(prefix: str) -> Document:
    """Return the range of the strings that begin with a prefix; MongoDB orders strings by code points."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return {"$gte": prefix}  # matches strings only
    last = ord(stem[-1]) + 1
    return {"$gte": prefix, "$lt": stem[:-1] + chr(0xE000 if last == 0xD800 else last)}


def block_id_of(key: str) -> str | None:
    """Return the id in a key of Strands' context manager: of a message, or of the tool call of a result.

    Such a key ends with `<id>_<index of the block>`. Other keys can have that form, too. Of an id that contains `/`, it
    is the part after the last one: the normal form of a key does not show where the id begins.
    """
    match = _BLOCK.fullmatch(key)
    return None if match is None else match[1]


def stash_prefix(session_id: str) -> str | None:
    """Return the prefix of the keys under which Strands' context manager stores the blocks of a session's messages.

    `None` if the session id cannot be part of a key.
    """
    try:
        return normalized_prefix(f"{_STASH}/{session_id}/")
    except InvalidArgumentError:
        return None


def copied_key(key: str, source: str, target: str) -> str:
    """Return the key of a value in a copy of its session; keys of the context manager contain the session id."""
    old, new = stash_prefix(source), stash_prefix(target)
    if old is None or new is None or not key.startswith(old):
        return key
    return new + key.removeprefix(old)
