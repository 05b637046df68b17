"""Methods that call an asynchronous method on its event loop, and docstrings that twins share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from .portal import Portal

P = ParamSpec("P")
T = TypeVar("T")


class Caller(Protocol):
    """An object that gives access to an asynchronous one from any thread and any event loop."""

    _async: Any

    @property
    def _portal(self) -> Portal: ...


def blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """Return a method with the parameters of `method` that calls it on the asynchronous object, and waits."""

    @wraps(method)
    def call(self: Caller, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._portal.call(method, self._async, *args, **kwargs)

    return call


def awaitable(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Return a coroutine function that can be awaited on any event loop, where `method` needs its own."""

    @wraps(method)
    async def run(self: Caller, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._portal.run(method, self._async, *args, **kwargs)

    return run


def copy_docstrings(target: type, origin: type | None = None) -> None:
    """Give methods without a docstring that of their twin in `origin`; without it, `name_async` gets that of `name`."""
    for name, method in vars(target).items():
        if inspect.isfunction(method) and not method.__doc__ and not name.startswith("_"):
            twin = getattr(origin, name) if origin is not None else getattr(target, name.removesuffix("_async"))
            method.__doc__ = twin.__doc__
