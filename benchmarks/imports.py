"""Processor time that importing the package adds to a fresh process that imports Strands."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile

from ._bench import Bench
from ._results import Budget, Cell, Finding, Spread

_IMPORTS = {"strands": "Strands", "pymongo": "the driver", "mongodb_session_manager": "the rest of the package"}
_BUDGET_MS = 100
# One process imports all of them, so that the speed of the machine at that moment is the same for each.
_PROGRAM = f"""
import time
for name in {tuple(_IMPORTS)}:
    begun = time.process_time()
    __import__(name)
    print(time.process_time() - begun)
"""


async def measure(bench: Bench) -> Finding:
    """Import in fresh processes, with compiled modules in a cache of their own."""
    rounds = 1 if bench.quick else 15
    bench.begin(rounds)
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = cache
        if not bench.quick:
            await _imported(environment)  # compiles the modules
        found = []
        for _ in range(rounds):
            found.append(await _imported(environment))
            bench.step()
    rows: list[dict[str, Cell]] = [
        {"imports": name, "processor time, ms": Spread.of(times)}
        for name, times in zip(_IMPORTS.values(), zip(*found, strict=True), strict=True)
    ]
    # Other processes only ever add to the time, so the minimum is the cost.
    added = min(driver + package for _, driver, package in found)
    budget = Budget.at_most("import time added to Strands, minimum", _BUDGET_MS, added, " ms")
    return Finding("Import", {"processes": rounds}, rows, [budget])


async def _imported(environment: dict[str, str]) -> list[float]:
    """Return the milliseconds of each import in a new process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PROGRAM, env=environment, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"could not import the package: exit status {process.returncode}")
    return [float(line) * 1e3 for line in output.split()]
