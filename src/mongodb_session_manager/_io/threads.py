"""Computing with large values in a thread, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .._format.sizes import is_large

P = ParamSpec("P")
T = TypeVar("T")


async def compute(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(*args, **kwargs)`, computed in a thread if an argument is large."""
    if not any(map(is_large, args)):
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
