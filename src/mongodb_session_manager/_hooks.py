"""Users' hooks around metadata and feedback, and how each kind of hook is called from each kind of manager.

A hook is called as `hook(original_func, action, session_id, **kwargs)` and returns what the caller gets. A metadata
hook sees the actions `"update"` (`metadata=`), `"delete"` (`keys=`) and `"get"`, a feedback hook `"add"`
(`feedback=`). What it does not do with `original_func` does not happen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol, runtime_checkable

import anyio
import anyio.from_thread
import anyio.to_thread
from anyio.lowlevel import RunVar

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
    return await _in_thread(partial(hook, waiting, action, session_id, **argument))


_THREADS = 40
"""`def` hooks that run at once on an event loop, for each depth."""

_depth: ContextVar[int] = ContextVar("mongodb_session_manager_hook_depth", default=0)
_limiters: RunVar[dict[int, anyio.CapacityLimiter]] = RunVar("mongodb_session_manager_hook_limiters")


async def _in_thread(call: Callable[[], Any]) -> Any:
    # Hooks within hooks have threads of their own: hooks that call the manager again would wait for each other's.
    depth = _depth.get()
    limiters = _limiters.get({})
    _limiters.set(limiters)
    limiter = limiters.setdefault(depth, anyio.CapacityLimiter(_THREADS))
    token = _depth.set(depth + 1)
    try:
        return await anyio.to_thread.run_sync(call, limiter=limiter)
    finally:
        _depth.reset(token)


@runtime_checkable
class HeldHook(Protocol):
    """A hook that keeps something open for the managers and factories that use it, and closes it with the last."""

    def hold(self, user: object) -> None:
        """Take note of a user."""

    async def let_go(self, user: object) -> None:
        """Take note that a user is gone."""


def hold(user: object, *hooks: object) -> None:
    """Tell hooks that a manager or factory uses them."""
    for hook in hooks:
        if isinstance(hook, HeldHook):
            hook.hold(user)


async def let_go(user: object, *hooks: object) -> None:
    """Tell hooks that a manager or factory uses them no more."""
    for hook in hooks:
        if isinstance(hook, HeldHook):
            await hook.let_go(user)


def chain_hooks(*hooks: Hook | None) -> Hook:
    """Return one hook that calls several, the first outermost: its `original_func` is the second, and so on.

    `def` and `async def` hooks may be mixed; then the `def` hooks run in threads. `None` is left out.

    Raises:
        ConfigurationError: One of them is no function.
    """
    for hook in hooks:
        checked_hook(hook, "a chained hook")
    chained = [hook for hook in hooks if hook is not None]
    return _AsyncChain(chained) if any(map(_is_async, chained)) else _Chain(chained)


class _ChainBase:
    def __init__(self, hooks: list[Hook]) -> None:
        self.hooks = hooks

    def __repr__(self) -> str:
        return f"chain_hooks({', '.join(map(repr, self.hooks))})"

    def hold(self, user: object) -> None:
        hold(user, *self.hooks)

    async def let_go(self, user: object) -> None:
        await let_go(user, *self.hooks)


def _argument(given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what the next hook is given: what this one passed to its `original_func`, by position or by name."""
    return {**given, **dict(zip(given, args, strict=False)), **kwargs}


class _Chain(_ChainBase):
    """`def` hooks, on the thread of the caller."""

    def __call__(self, original_func: Callable[..., Any], action: str, session_id: str, **argument: Any) -> Any:
        return self._call(0, original_func, action, session_id, argument)

    def _call(self, place: int, original: Callable[..., Any], action: str, session_id: str, argument: Any) -> Any:
        if place == len(self.hooks):
            return original(**argument)

        def following(*args: Any, **kwargs: Any) -> Any:
            return self._call(place + 1, original, action, session_id, _argument(argument, args, kwargs))

        return self.hooks[place](following, action, session_id, **argument)


class _AsyncChain(_ChainBase):
    """Hooks of both kinds, on the event loop of the caller."""

    async def __call__(self, original_func: Operation, action: str, session_id: str, **argument: Any) -> Any:
        return await self._call(0, original_func, action, session_id, argument)

    async def _call(self, place: int, original: Operation, action: str, session_id: str, argument: Any) -> Any:
        if place == len(self.hooks):
            return await original(**argument)

        async def following(*args: Any, **kwargs: Any) -> Any:
            return await self._call(place + 1, original, action, session_id, _argument(argument, args, kwargs))

        hook = self.hooks[place]
        if _is_async(hook):
            return await hook(following, action, session_id, **argument)

        def waiting(*args: Any, **kwargs: Any) -> Any:
            return anyio.from_thread.run(partial(following, *args, **kwargs))

        return await _in_thread(partial(hook, waiting, action, session_id, **argument))
