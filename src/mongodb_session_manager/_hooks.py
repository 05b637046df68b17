"""Users' hooks around metadata and feedback, and how each kind of hook is called from each kind of manager.

A hook is called as `hook(original_func, action, session_id, **kwargs)` and returns what the caller gets. A metadata
hook sees the actions `"update"` (`metadata=`), `"delete"` (`keys=`) and `"get"`, a feedback hook `"add"`
(`feedback=`). What it does not do with `original_func` does not happen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from ._loop import Portal
from .errors import ConfigurationError

Hook = Callable[..., Any]
Operation = Callable[..., Coroutine[Any, Any, Any]]


def checked_hook(hook: object, name: str) -> None:
    """Refuse what cannot be called.

    Raises:
        ConfigurationError: `hook` is neither a function nor `None`.
    """
    if hook is not None and not callable(hook):
        raise ConfigurationError(f"{name} must be a function, not {type(hook).__name__}")


def _is_async(hook: Hook) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(getattr(hook, "__call__", None))  # noqa: B004


def call_hooked(
    portal: Portal, hook: Hook | None, operation: Operation, action: str, session_id: str, **argument: Any
) -> Any:
    """Run an operation from synchronous code, through the hook if there is one.

    A `def` hook runs on the calling thread, an `async def` hook on the I/O loop.

    Args:
        portal: The way to the I/O loop.
        hook: The user's hook.
        operation: A method of the asynchronous repository.
        action: What the hook is told happens.
        session_id: The first argument of the operation.
        **argument: The other one.
    """

    def original(*args: Any, **kwargs: Any) -> Any:
        return portal.call(operation, session_id, *args, **kwargs)

    if hook is None:
        return original(**argument)
    if _is_async(hook):
        return portal.call(partial(hook, partial(operation, session_id), action, session_id, **argument))
    return hook(original, action, session_id, **argument)


async def run_hooked(
    portal: Portal, hook: Hook | None, operation: Operation, action: str, session_id: str, **argument: Any
) -> Any:
    """Run an operation from asynchronous code, through the hook if there is one.

    An `async def` hook runs in the caller's task, a `def` hook in a thread, from which its `original_func` waits.

    Args:
        portal: The way to the I/O loop.
        hook: The user's hook.
        operation: A method of the asynchronous repository.
        action: What the hook is told happens.
        session_id: The first argument of the operation.
        **argument: The other one.
    """
    original = partial(portal.run, operation, session_id)
    if hook is None:
        return await original(**argument)
    if _is_async(hook):
        return await hook(original, action, session_id, **argument)
    waiting = partial(portal.call, operation, session_id)
    # Not of anyio's 40 threads: hooks that call the manager again would wait for each other's.
    limiter = anyio.CapacityLimiter(1)
    return await anyio.to_thread.run_sync(partial(hook, waiting, action, session_id, **argument), limiter=limiter)
