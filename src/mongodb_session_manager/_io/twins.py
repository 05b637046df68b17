"""Docstrings that a synchronous and an asynchronous method share."""

from __future__ import annotations

import inspect


def copy_docstrings(target: type, origin: type | None = None) -> None:
    """Give the methods of a class that have no docstring the one of their twin.

    Args:
        target: The class.
        origin: The class with the twins, which have the same names. `None` gives `name_async` the docstring of `name`.
    """
    for name, method in vars(target).items():
        if inspect.isfunction(method) and not method.__doc__ and not name.startswith("_"):
            twin = getattr(origin, name) if origin is not None else getattr(target, name.removesuffix("_async"))
            method.__doc__ = twin.__doc__
