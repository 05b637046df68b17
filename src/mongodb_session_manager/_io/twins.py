"""Methods that call an asynchronous method on its event loop, and docstrings that twins share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ..errors import raise_alone
from .portal import Portal

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Caller(Protocol):
    """An object that gives access to an asynchronous one from any thread and any event loop."""

    _async: Any

    @property
    def _portal(self) -> Portal: ...


def blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """Return a method with the parameters of `method` that calls it on the asynchronous object, and waits."""
    name, check = method.__name__, _checks(_signature(method))

    def call(self: Caller, /, *args: P.args, **kwargs: P.kwargs) -> T:
        check(call, self, *args, **kwargs)
        twin: Callable[..., Coroutine[Any, Any, T]] = getattr(self._async, name)
        return self._portal.call(twin, *args, **kwargs)

    return _like(method, call)


def awaitable(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Return a coroutine function that can be awaited on any event loop, where `method` needs its own."""
    name, check = method.__name__, _checks(_signature(method))

    async def run(self: Caller, /, *args: P.args, **kwargs: P.kwargs) -> T:
        check(run, self, *args, **kwargs)
        twin: Callable[..., Coroutine[Any, Any, T]] = getattr(self._async, name)
        return await self._portal.run(twin, *args, **kwargs)

    return _like(method, run)


@cache
def _signature(method: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a method; its annotations are evaluated in the method's module, not in the twin's."""
    return inspect.signature(method, eval_str=True)


def _checks(signature: inspect.Signature) -> Callable[..., None]:
    """Return what refuses wrong arguments where they are passed, and names the method that was called."""

    def check(called: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise_alone(TypeError(f"{called.__qualname__}() {error}"))

    return check


def _like(method: Callable[..., Any], twin: F) -> F:
    """Give a twin the docstring and the parameters of a method.

    There is no `__wrapped__`: FastAPI would take a method that waits for a coroutine function, and await its result.
    """
    shown: Any = twin
    shown.__name__, shown.__doc__ = method.__name__, method.__doc__
    shown.__signature__ = signature = _signature(method)
    shown.__annotations__ = {
        name: signature.return_annotation if name == "return" else signature.parameters[name].annotation
        for name in method.__annotations__
    }
    return twin


def finish_twins(target: type, origin: type | None = None) -> None:
    """Give methods without a docstring that of their twin in `origin`; without it, `name_async` gets that of `name`.

    What `blocking` and `awaitable` have made gets the name that it has in the class.
    """
    for name, method in vars(target).items():
        if not inspect.isfunction(method) or name.startswith("_"):
            continue
        if method.__module__ == __name__:
            method.__module__, method.__name__ = target.__module__, name
            method.__qualname__ = f"{target.__qualname__}.{name}"
        if not method.__doc__:
            twin = getattr(origin, name) if origin is not None else getattr(target, name.removesuffix("_async"))
            method.__doc__ = twin.__doc__
