"""Running `def` hooks in threads. Import it in a thread: it imports AnyIO."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any

import anyio
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

# AnyIO imports its larger part, the backend, on first use. A context of its own, because with sniffio, `anyio.run` sets
# a context variable that says that a loop runs, also in the contexts of threads.
Context().run(anyio.run, anyio.sleep, 0)

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
