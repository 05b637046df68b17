"""Processor time that importing the package adds to a fresh process that imports Strands."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile

from ._bench import Bench
from ._results import Budget, Cell, Finding, Spread

_BASE = "strands"
_PROGRAMS = {
    _BASE: "import strands",
    "strands, then the driver": "import strands, pymongo",
    "strands, then the package": "import strands, mongodb_session_manager",
}
_BUDGET_MS = 100
_REPORT = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"


async def measure(bench: Bench) -> Finding:
    """Import in fresh processes, alternating, with compiled modules in a cache of their own."""
    rounds = 1 if bench.quick else 10
    bench.begin(len(_PROGRAMS) * rounds)
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = cache

        async def sample(name: str) -> float:
            return await _user_ms(_PROGRAMS[name], environment)

        for name in () if bench.quick else _PROGRAMS:
            await sample(name)  # compiles the modules
        found = await bench.rounds(list(_PROGRAMS), rounds, sample)
    # Other processes only ever add to the time, so the minimum is the cost.
    added = {name: min(times) - min(found[_BASE]) for name, times in found.items()}
    rows: list[dict[str, Cell]] = [
        {"imports": name, "user time, ms": Spread.of(times), "added, ms": added[name]} for name, times in found.items()
    ]
    budget = Budget.at_most("import time added to Strands", _BUDGET_MS, added["strands, then the package"], " ms")
    return Finding("Import", {"processes of each": rounds}, rows, [budget])


async def _user_ms(program: str, environment: dict[str, str]) -> float:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program + _REPORT, env=environment, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"could not run {program!r}: exit status {process.returncode}")
    return float(output) * 1e3
