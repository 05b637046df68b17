"""The check of an application's routes when it starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import fastapi.routing
from fastapi import FastAPI

from ..errors import ConfigurationError
from ._sessions import SessionOpener

# Versions of FastAPI without this function copy the routes of included routers into the application.
_flat = getattr(fastapi.routing, "iter_route_contexts", iter)


def check_routes(app: FastAPI) -> None:
    """Check that each route, of routers and mounted applications too, has the path parameters of its sessions.

    Raises:
        ConfigurationError: A route lacks a path parameter.
    """
    for path, parameters, dependant in _dependants(app.routes, "", frozenset()):
        for opener in _openers(dependant):
            if opener.path not in parameters:
                raise ConfigurationError(
                    f"route {path!r} opens a session but has no path parameter {opener.path!r}: add it to the path, or "
                    "name another one with session_dependency(path=...)"
                )


def _dependants(routes: Iterable[Any], prefix: str, outer: frozenset[str]) -> Iterator[tuple[str, frozenset[str], Any]]:
    """Yield the path, the names of the path parameters and FastAPI's `Dependant` of each route."""
    for route in _flat(routes):
        path = prefix + (getattr(route, "path", None) or "")
        parameters = outer.union(getattr(route, "param_convertors", ()))
        if (dependant := getattr(route, "dependant", None)) is not None:
            yield path, parameters, dependant
        else:  # a mounted application has routes; its own path parameter is the rest of the path
            yield from _dependants(getattr(route, "routes", None) or (), path, parameters - {"path"})


def _openers(dependant: Any) -> Iterator[SessionOpener]:
    if isinstance(dependant.call, SessionOpener):
        yield dependant.call
    for each in dependant.dependencies:
        yield from _openers(each)
