"""The owner, the title and the tags of a session. Pure.

owner   the user to whom the session belongs; set once, absent in a session without an owner
title   absent in a session without a title
tags    a list without duplicates; absent if it would be empty

A guard is the condition on `owner` in each command of a caller who may only use the sessions of one owner. Such a
command treats a session of another owner, or of none, as if it did not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any

from ..errors import InvalidArgumentError
from .documents import Document
from .ids import checked_id, checked_text

MAX_OWNER_BYTES = 1024
MAX_TITLE = 1000
MAX_TAGS = 100
MAX_TAG = 200


def checked_owner(owner: object) -> str:
    """Return a valid owner, or raise `InvalidArgumentError`."""
    text = checked_id(owner, "owner")
    if len(text.encode()) > MAX_OWNER_BYTES:
        raise InvalidArgumentError(f"owner must have at most {MAX_OWNER_BYTES} bytes, got {len(text.encode())}")
    return str.__str__(text)


def checked_title(title: object) -> str:
    """Return a valid title, or raise `InvalidArgumentError`."""
    if not isinstance(title, str):
        raise InvalidArgumentError(f"title must be a str, not {type(title).__name__}")
    if len(title) > MAX_TITLE:
        raise InvalidArgumentError(f"title must have at most {MAX_TITLE} characters, got {len(title)}")
    return checked_text(str.__str__(title), "title")


def checked_tags(tags: object) -> list[str]:
    """Return valid tags without duplicates, or raise `InvalidArgumentError`."""
    if isinstance(tags, str) or not isinstance(tags, Sequence | set | frozenset):
        raise InvalidArgumentError(f"tags must be a list of str, not {type(tags).__name__}")
    found = list(dict.fromkeys(str.__str__(checked_id(tag, f"tags[{n}]")) for n, tag in enumerate(tags)))
    if longest := [tag for tag in found if len(tag) > MAX_TAG]:
        raise InvalidArgumentError(f"each of tags must have at most {MAX_TAG} characters, got {len(longest[0])}")
    if len(found) > MAX_TAGS:
        raise InvalidArgumentError(f"tags must have at most {MAX_TAGS} elements, got {len(found)}")
    return found


NO_LIST: Document = {"owner.0": {"$exists": False}}
"""The condition that `owner` is not a list. No index answers it."""


def guard(owner: str | None) -> Document:
    """Return the condition that a session belongs to an owner; `None` allows every session.

    A list that an application has stored as the owner does not match, even if it contains the owner.
    """
    return {} if owner is None else {"owner": owner, **NO_LIST}


def labels_of(owner: str | None, title: str | None = None, tags: Sequence[str] | None = None) -> Document:
    """Return the fields of a new session."""
    fields = {"owner": owner, "title": title, "tags": list(tags) if tags else None}
    return {name: value for name, value in fields.items() if value is not None}


def label_changes(
    title: str | EllipsisType | None, tags: Sequence[str] | EllipsisType | None
) -> dict[str, str | list[str] | None]:
    """Return the new labels of a session, `None` for one that is removed; `...` changes nothing."""
    changes: dict[str, str | list[str] | None] = {}
    if title is not ...:
        changes["title"] = None if title is None else checked_title(title)
    if tags is not ...:
        changes["tags"] = None if tags is None else checked_tags(tags) or None
    return changes


def owner_of(document: Mapping[str, Any]) -> str | None:
    """Return the owner of a session; an application might have stored another value in the field."""
    owner = document.get("owner")
    return owner if type(owner) is str else None


def title_of(document: Mapping[str, Any]) -> str | None:
    title = document.get("title")
    return title if type(title) is str else None


def tags_of(document: Mapping[str, Any]) -> tuple[str, ...]:
    tags = document.get("tags")
    return tuple(tag for tag in tags if type(tag) is str) if type(tags) is list else ()
