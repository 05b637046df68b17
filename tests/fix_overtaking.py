"""Letting something happen between two commands of a repository."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any


def overtake(target: Any, method: str, action: Callable[[], Awaitable[object]], *, after: bool = False) -> None:
    """Await `action` before, or after, each call of an asynchronous method of an object."""
    original = getattr(target, method)

    async def overtaken(*args: Any, **kwargs: Any) -> Any:
        if not after:
            await action()
        result = await original(*args, **kwargs)
        if after:
            await action()
        return result

    setattr(target, method, overtaken)
