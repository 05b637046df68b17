"""Large values: measured before they are encoded, and encoded and decoded in a thread, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

from .codec import MAX_NESTING

P = ParamSpec("P")
T = TypeVar("T")

LARGE: Final = 64 * 1024
"""A value of more bytes is encoded in a thread; encoding this number takes some milliseconds if the value is dense."""

_ELEMENT = 2  # bytes of an element without its name: its type and the end of the name
_CONTAINER = 5  # bytes of a document or array without elements: its length and its end
_NUMBER = 4


def least_size(value: object, limit: int) -> int:
    """Return a lower bound of the size of a value in BSON; counting stops beyond `limit`.

    Nothing is copied. The length of a list counts before its elements, so that a huge list is not walked through.
    """
    size = 0
    level = [value]
    for _ in range(MAX_NESTING + 2):  # a value that contains itself has no end
        below: list[Any] = []
        for found in level:
            kind = type(found)
            if kind is int or kind is float:
                size += _NUMBER
            elif kind is str or kind is bytes:
                size += len(found)  # type: ignore[arg-type]
            elif isinstance(found, dict):
                size += _CONTAINER + _ELEMENT * dict.__len__(found)
                size += sum(len(key) for key in dict.keys(found) if type(key) is str)
                if size > limit:
                    return size
                below += dict.values(found)
            elif isinstance(found, list | tuple | set | frozenset):
                size += _CONTAINER + _ELEMENT * len(found) + _digits(len(found))
                if size > limit:
                    return size
                below += found
            elif hasattr(kind, "__dataclass_fields__"):  # Strands' agents and messages
                below.append(getattr(found, "__dict__", None))
            if size > limit:
                return size
        if not below:
            break
        level = below
    return size


def _digits(count: int) -> int:
    """Return how many digits the numbers below `count` have together: they name the elements of an array."""
    digits, first = 0, 1
    while first < count:
        digits += count - first
        first *= 10
    return digits + bool(count)


def is_large(value: object) -> bool:
    """Return whether a value is so large that it must be encoded in a thread."""
    return least_size(value, LARGE) > LARGE


async def compute(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(*args, **kwargs)`, computed in a thread if an argument is large."""
    if not any(map(is_large, args)):
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
