"""How each kind of hook is called from each kind of manager."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any, Protocol

from .._io.loop import io_portal, portal_to
from .._io.portal import Portal
from ..errors import ConfigurationError


class Hook(Protocol):
    """A function that is called around every use of a session's metadata or around every new feedback.

    The caller gets its return value. The operation happens only if the hook calls `original_func`. The hook can be
    `def` or `async def`, with either manager. In a `def` hook, `original_func` waits and returns the result. In an
    `async def` hook, and in an awaitable that a `def` hook returns, `original_func` returns an awaitable.

    | hook | action | keyword argument |
    |---|---|---|
    | metadata | `"update"` | `metadata`: the values to set, by key |
    | metadata | `"delete"` | `keys`: the keys to remove |
    | metadata | `"get"` | none |
    | feedback | `"add"` | `feedback`: the feedback to append |
    """

    def __call__(
        self, original_func: Callable[..., Any], action: str, session_id: str, /, *args: Any, **kwargs: Any
    ) -> Any:
        """Perform the operation by calling `original_func` with the keyword argument."""


Operation = Callable[..., Coroutine[Any, Any, Any]]


def checked_hook(hook: object, name: str) -> None:
    if hook is not None and not callable(hook):
        raise ConfigurationError(f"{name} must be a function, not {type(hook).__name__}")


_waits: ContextVar[bool | None] = ContextVar("mongodb_session_manager_original_waits", default=None)
"""Whether `original_func` waits in the current hook; `None` outside of hooks and in a thread that a hook started.

A context variable, and not an argument: a hook can pass `original_func` through its own functions to another hook or a
chain, and the innermost hook that calls it decides whether it waits.
"""


@contextmanager
def _original_that(waits: bool) -> Iterator[None]:
    token = _waits.set(waits)
    try:
        yield
    finally:
        _waits.reset(token)


def _unbound(hook: Hook) -> Hook:
    while isinstance(hook, partial):
        hook = hook.func
    return hook


def _is_async(hook: Hook) -> bool:
    hook = _unbound(hook)
    if isinstance(hook, _Chain):
        return any(map(_is_async, hook.hooks))
    return inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(getattr(hook, "__call__", None))  # noqa: B004


def _is_either(hook: Hook) -> bool:
    """Return whether a hook is synchronous or asynchronous as its `original_func` is, like the AWS hooks."""
    hook = _unbound(hook)
    if isinstance(hook, _Chain):
        return all(map(_is_either, hook.hooks))
    return getattr(hook, "waits_as_original_does", None) is True


def _original_waits(hook: Hook) -> bool:
    waits = _waits.get()
    return not _is_async(hook) if waits is None else waits


def _original(portal: Portal, hook: Hook, operation: Operation, session_id: str) -> Callable[..., Any]:
    def original(*args: Any, **kwargs: Any) -> Any:
        run = portal.call if _original_waits(hook) else portal.run
        return run(operation, session_id, *args, **kwargs)

    return original


async def _awaited(call: Callable[[], Any]) -> Any:
    with _original_that(waits=False):
        result = call()
        while inspect.isawaitable(result):
            result = await result
        return result


def _waited_for(result: Any, portal: Portal | None = None) -> Any:
    """Return the result of a `def` hook. Wait for an awaitable, on the loop of its future or else the I/O loop.

    Raises:
        EventLoopError: A future belongs to the event loop of the calling thread, or to one that does not run.
    """
    if not inspect.isawaitable(result):
        return result
    if asyncio.isfuture(result):
        portal = portal_to(result.get_loop())
    return (portal or io_portal()).call(_awaited, lambda: result)


def call_hooked(
    portal: Portal, hook: Hook | None, operation: Operation, action: str, session_id: str, **argument: Any
) -> Any:
    """Run an operation for a session from synchronous code, through the hook if there is one.

    A `def` hook runs on the calling thread. An `async def` hook runs on the I/O loop, and so does an awaitable that a
    `def` hook returns.
    """
    if hook is None:
        return portal.call(operation, session_id, **argument)
    call = partial(hook, _original(portal, hook, operation, session_id), action, session_id, **argument)
    if _is_async(hook):
        return portal.call(_awaited, call)
    with _original_that(waits=True):
        result = call()
    return _waited_for(result, portal)


async def run_hooked(
    portal: Portal, hook: Hook | None, operation: Operation, action: str, session_id: str, **argument: Any
) -> Any:
    """Run an operation for a session from asynchronous code, through the hook if there is one.

    An `async def` hook runs in the caller's task, a `def` hook in a thread, in which its `original_func` waits. An
    awaitable that a `def` hook returns is awaited in the caller's task.
    """
    if hook is None:
        return await portal.run(operation, session_id, **argument)
    original = _original(portal, hook, operation, session_id)
    return await _run(hook, partial(hook, original, action, session_id, **argument))


async def _run(hook: Hook, call: Callable[[], Any]) -> Any:
    return await (_awaited(call) if _is_async(hook) or _is_either(hook) else _threaded(call))


_hook_threads: ModuleType | None = None
"""The module that runs `def` hooks in threads, once it is imported; `sys.modules` has it earlier, incomplete."""


async def _threaded(call: Callable[[], Any]) -> Any:
    global _hook_threads
    if _hook_threads is None:  # importing AnyIO takes longer than an event loop should wait
        _hook_threads = await asyncio.to_thread(importlib.import_module, f"{__package__}.hook_threads")
    with _original_that(waits=True):
        result = await _hook_threads.in_thread(call)
    return await _awaited(lambda: result)


def chain_hooks(*hooks: Hook | None) -> Hook:
    """Return one hook that calls several: each one is the `original_func` of the hook before it.

    `def` and `async def` hooks can be mixed; `None` is left out. A hook can call the chain with its own
    `original_func`: in a `def` hook the call waits and returns the result, in an `async def` hook it returns an
    awaitable.

    Raises:
        ConfigurationError: A hook is not a function.
    """
    for hook in hooks:
        checked_hook(hook, "a chained hook")
    return _Chain([hook for hook in hooks if hook is not None])


class _Chain:
    """Hooks of any kind; each is the `original_func` of the hook before it."""

    def __init__(self, hooks: list[Hook]) -> None:
        self.hooks = hooks

    def __repr__(self) -> str:
        return f"chain_hooks({', '.join(map(repr, self.hooks))})"

    def __call__(self, original_func: Callable[..., Any], action: str, session_id: str, **argument: Any) -> Any:
        if not _original_waits(self):
            return self._run(0, original_func, action, session_id, argument)
        with _original_that(waits=True):
            return self._call(0, original_func, action, session_id, argument)

    def _call(self, place: int, original: Callable[..., Any], action: str, session_id: str, argument: Any) -> Any:
        if place == len(self.hooks):
            return _waited_for(original(**argument))
        hook = self.hooks[place]

        def following(*args: Any, **kwargs: Any) -> Any:
            call = partial(self._call, place + 1, original, action, session_id, _argument(argument, args, kwargs))
            return call() if _original_waits(hook) else _threaded(call)

        call = partial(hook, following, action, session_id, **argument)
        return io_portal().call(_awaited, call) if _is_async(hook) else _waited_for(call())

    async def _run(self, place: int, original: Callable[..., Any], action: str, session_id: str, argument: Any) -> Any:
        if place == len(self.hooks):
            return await _awaited(partial(original, **argument))
        hook = self.hooks[place]
        loop = asyncio.get_running_loop()

        def following(*args: Any, **kwargs: Any) -> Any:
            awaited = self._run(place + 1, original, action, session_id, _argument(argument, args, kwargs))
            # From any thread: a `def` hook can call it in its own thread.
            return asyncio.run_coroutine_threadsafe(awaited, loop).result() if _original_waits(hook) else awaited

        return await _run(hook, partial(hook, following, action, session_id, **argument))


def _argument(given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the next hook: those that this one passed to its `original_func`."""
    return {**given, **dict(zip(given, args, strict=False)), **kwargs}
