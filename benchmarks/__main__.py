"""Run the measures: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mongodb_session_manager.embedded import EmbeddedMongoDB

from . import _machine, commands, first_token, growth, imports, latency, line, portal, processor, streams
from ._bench import Bench
from ._report import Run, markdown, print_tables
from ._results import Finding

MEASURES: Mapping[str, Callable[[Bench], Awaitable[Finding]]] = {
    "commands": commands.measure,
    "latency": latency.measure,
    "first_token": first_token.measure,
    "processor": processor.measure,
    "streams": streams.measure,
    "line": line.measure,
    "growth": growth.measure,
    "portal": portal.measure,
    "imports": imports.measure,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the given measures and print the results; return the exit status.

    The status is 0 even if a budget is exceeded: people judge the numbers.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if unknown := set(options.measures) - set(MEASURES):
        parser.error(f"no such measure: {', '.join(sorted(unknown))}")
    # Output that is not a terminal gets lines as long as the tables are wide.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 190)
    if options.markdown is not None:
        print(markdown(Run.read(options.markdown)), end="")
        return 0
    run = _run(options.measures or list(MEASURES), options.quick, options.json, console)
    print_tables(run, console)
    if options.plots is not None:
        from ._plots import draw  # needs matplotlib, which the measures do not

        for path in draw(run, options.plots):
            console.print(f"wrote {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare the library with its alternatives, on an embedded server and a simulated network.",
    )
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"one of: {', '.join(MEASURES)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="only check that the measures work; the numbers are meaningless"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to this file")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="write the plots to this directory, as SVG")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="PATH",
        help="print a file that --json has written as Markdown, and measure nothing",
    )
    return parser


def _run(names: Sequence[str], quick: bool, path: Path | None, console: Console) -> Run:
    """Run measures; write the results to the path after each one, so that a failure loses none."""
    # Warnings of the driver would break the progress bars.
    logging.disable(logging.WARNING)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    findings: dict[str, Finding] = {}
    columns = TextColumn("{task.description:11}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress, EmbeddedMongoDB() as server:
        run = Run(today, quick, _machine.describe(server.connection_string), findings)
        tasks = {name: progress.add_task(name, start=False, total=None) for name in names}
        for name in names:
            bench = _bench(server, quick, progress, tasks[name])
            findings[name] = asyncio.run(_measured(MEASURES[name], bench))
            if path is not None:
                run.write(path)
    return run


def _bench(server: EmbeddedMongoDB, quick: bool, progress: Progress, task: TaskID) -> Bench:
    def begin(steps: int) -> None:
        progress.start_task(task)
        progress.update(task, total=steps)

    return Bench(server, quick, begin, lambda: progress.advance(task))


async def _measured(measure: Callable[[Bench], Awaitable[Finding]], bench: Bench) -> Finding:
    return await measure(bench)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
