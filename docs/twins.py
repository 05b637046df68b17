"""A Griffe extension: twins share a docstring in the API reference, as `copy_docstrings` does it at run time."""

from __future__ import annotations

from typing import Any

import griffe

SYNCHRONOUS = ("MongoDBSessionManager", "MongoDBSessionRepository")


class Twins(griffe.Extension):
    """Copies docstrings from `AsyncX.name` to `X.name`, and from `name` to `name_async`."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Copy the docstrings once the package is loaded."""
        for name in SYNCHRONOUS:
            self._copy(pkg[name], pkg[f"Async{name}"])
        self._copy(pkg["MongoDBSessionManagerFactory"], pkg["MongoDBSessionManagerFactory"])

    def _copy(self, target: griffe.Class, origin: griffe.Class) -> None:
        for name, method in target.members.items():
            if method.is_function and method.docstring is None and not name.startswith("_"):
                twin = origin.all_members[name.removesuffix("_async") if target is origin else name]
                method.docstring = twin.docstring
