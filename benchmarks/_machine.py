"""The machine and the versions of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import pymongo

_PACKAGES = ("mongodb-session-manager", "strands-agents", "motor", "pymongo")


def describe(uri: str) -> dict[str, str | int | float]:
    """Return the machine, the system and the versions of the packages and the server.

    Args:
        uri: The server's connection string.
    """
    client: pymongo.MongoClient[dict[str, Any]]
    with pymongo.MongoClient(uri) as client:
        server = client.server_info()["version"]
    described: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory, GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "mongod": server,
        "load average at the start": round(os.getloadavg()[0], 2),
    }
    return described | {name: importlib.metadata.version(name) for name in _PACKAGES}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
