"""Running `def` hooks in threads. Import it in a thread: it imports AnyIO."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import anyio
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

anyio.run(anyio.sleep, 0)  # AnyIO imports its larger part, the backend, on first use

_THREADS = 40
"""The maximum number of concurrent `def` hooks of an event loop, for each depth of nesting."""

# A context variable, because a hook that calls the manager again passes nothing on.
_depth: ContextVar[int] = ContextVar("mongodb_session_manager_hook_depth", default=0)
_limiters: RunVar[dict[int, CapacityLimiter]] = RunVar("mongodb_session_manager_hook_limiters")


async def in_thread(call: Callable[[], Any]) -> Any:
    # Each depth has its own threads: a hook that calls the manager again must not wait for the threads of outer hooks.
    depth = _depth.get()
    limiters = _limiters.get({})
    _limiters.set(limiters)
    limiter = limiters.setdefault(depth, CapacityLimiter(_THREADS))
    token = _depth.set(depth + 1)
    try:
        return await to_thread.run_sync(call, limiter=limiter)
    finally:
        _depth.reset(token)
