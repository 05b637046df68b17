"""A Griffe extension: twins share parameters and docstrings in the API reference, as they do at run time."""

from __future__ import annotations

import copy
from typing import Any

import griffe

SYNCHRONOUS = ("MongoDBSessionManager", "MongoDBSessionRepository")


class Twins(griffe.Extension):
    """Copies docstrings from `AsyncX.name` to `X.name`, and from `name` to `name_async`; shows `blocking(f)` as `f`."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Copy the docstrings once the package is loaded."""
        for name in (*SYNCHRONOUS, "MongoDBSessionManagerFactory"):
            self._declare(pkg[name].final_target, pkg["AsyncMongoDBSessionRepository"])
        for name in SYNCHRONOUS:
            self._copy(pkg[name], pkg[f"Async{name}"])
        for factory in (pkg["MongoDBSessionManagerFactory"], pkg["_managers.hooked_methods.HookedMethods"]):
            self._copy(factory, factory)

    def _copy(self, target: griffe.Class, origin: griffe.Class) -> None:
        for name, method in target.members.items():
            if method.is_function and method.docstring is None and not name.startswith("_"):
                twin = origin.all_members[name.removesuffix("_async") if target is origin else name]
                method.docstring = twin.docstring

    def _declare(self, target: griffe.Class, origin: griffe.Class) -> None:
        for name, member in list(target.members.items()):
            value = member.value if member.is_attribute else None
            if isinstance(value, griffe.ExprCall) and str(value.function) in ("blocking", "awaitable"):
                function = copy.copy(origin.all_members[str(value.arguments[0]).rpartition(".")[2]].final_target)
                function.name, function.lineno = name, member.lineno
                function.labels = {"async"} if str(value.function) == "awaitable" else set()
                target.set_member(name, function)
