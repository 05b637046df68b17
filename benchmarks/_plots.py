"""Plots of a run, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ._report import Run
from ._results import Cell, Finding, Spread

_STYLE: Any = {
    "svg.hashsalt": "benchmarks",  # equal numbers give an equal file
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(run: Run, directory: Path) -> Iterator[Path]:
    """Plot every finding for which there is a plot into a directory; yield the files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, finding in run.findings.items():
        if (picture := _PICTURES.get(name)) is not None:
            path = directory / f"{name}.svg"
            with mpl.rc_context(_STYLE):
                figure = Figure(figsize=(9, 3.6), layout="constrained")
                picture(figure, finding)
                note = f"{run.date}, {run.machine['processor']}, {run.machine['cores']} cores"
                figure.supxlabel(note, fontsize=7, color="gray")
                figure.savefig(path, metadata={"Date": None})
            yield path


def _commands(figure: Figure, finding: Finding) -> None:
    axes = figure.subplots()
    names = list(finding.rows[0])[1:]
    for number, name in enumerate(names):
        places = [row + (number - 1) * 0.27 for row in range(len(finding.rows))]
        bars = axes.barh(places, [_middle(row.get(name)) for row in finding.rows], 0.25, label=name)
        axes.bar_label(bars, fontsize=7, fmt=lambda value: f"{value:.0f}" if value else "")
    axes.set_yticks(range(len(finding.rows)), [str(row["case"]) for row in finding.rows])
    axes.invert_yaxis()
    axes.set_xlabel("commands")
    axes.legend(frameon=False)


def _latency(figure: Figure, finding: Finding) -> None:
    for axes, column in zip(figure.subplots(1, 2), ("opening, ms", "turn, ms"), strict=True):
        _lines(axes, finding, "round trip, ms", column, "contender")
        axes.set_xlabel("round trip to the server, ms")
        axes.set_ylabel(column)
    axes.legend(frameon=False, fontsize=7)


def _first_token(figure: Figure, finding: Finding) -> None:
    for axes, column in zip(figure.subplots(1, 2), ("new agent, ms", "live agent, ms"), strict=True):
        _lines(axes, finding, "round trip, ms", column, "contender")
        axes.set_xlabel("round trip to the server, ms")
        axes.set_ylabel(f"first token, {column}")
    axes.legend(frameon=False, fontsize=7)


def _processor(figure: Figure, finding: Finding) -> None:
    axes = figure.subplots()
    _bars(axes, [str(row["way"]) for row in finding.rows], [row["processor, ms"] for row in finding.rows], "%.2f")
    axes.set_xlabel("processor time, ms")


def _line(figure: Figure, finding: Finding) -> None:
    rows = [row for row in finding.rows if row["gap p99, ms"] is not None]
    axes = figure.subplots()
    _bars(axes, [f"{row['case']},\n{row['line']}" for row in rows], [row["gap p99, ms"] for row in rows], "%.0f")
    axes.set_xlabel("from a release to the next turn, p99, ms")


def _streams(figure: Figure, finding: Finding) -> None:
    cases = list(dict.fromkeys(row["case"] for row in finding.rows))
    left, right = figure.subplots(1, 2, sharey=True)
    right.set_xscale("log")
    for axes, column in ((left, "× none"), (right, "lag p99, ms")):
        ticks, labels = [], []
        place = 1.0
        for number, case in enumerate(cases):
            left.text(0, place - 0.7, str(case), transform=left.get_yaxis_transform(), fontsize=8, weight="bold")
            for row in (row for row in finding.rows if row["case"] == case):
                axes.barh(place, _middle(row[column]), xerr=_errors([row[column]]), color=f"C{number}", capsize=2)
                ticks.append(place)
                labels.append(str(row["contender"]))
                place += 1
            place += 1
        axes.set_yticks(ticks, labels)
        axes.set_xlabel("turns/s, × no session manager" if column == "× none" else "event-loop lag p99, ms")
    left.set_ylim(place - 1, 0)
    figure.set_size_inches(9, 0.22 * place + 0.8)


def _growth(figure: Figure, finding: Finding) -> None:
    columns = (
        ("append, ms", "redact latest, ms", "redact oldest, ms"),
        ("reopen whole, ms", "reopen window, ms"),
        ("memory, KB", "memory, short session, KB"),
    )
    for axes, names in zip(figure.subplots(1, 3), columns, strict=True):
        for name in names:
            rows = [row for row in finding.rows if row[name] is not None]
            sizes = [_middle(row["messages"]) for row in rows]
            cells = [row[name] for row in rows]
            axes.errorbar(sizes, [_middle(cell) for cell in cells], _errors(cells), marker="o", ms=3, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.set_xlabel("messages of 4 KB")
        axes.legend(frameon=False, fontsize=7)


def _portal(figure: Figure, finding: Finding) -> None:
    axes = figure.subplots()
    _bars(axes, [str(row["way"]) for row in finding.rows], [row["each, µs"] for row in finding.rows], "%.0f")
    axes.set_xlabel("µs each")


_PICTURES: dict[str, Callable[[Figure, Finding], None]] = {
    "commands": _commands,
    "latency": _latency,
    "first_token": _first_token,
    "processor": _processor,
    "streams": _streams,
    "line": _line,
    "growth": _growth,
    "portal": _portal,
}


def _bars(axes: Axes, names: list[str], cells: list[Cell], shown: str) -> None:
    bars = axes.barh(names, [_middle(cell) for cell in cells], xerr=_errors(cells))
    axes.bar_label(bars, fmt=shown, padding=12, fontsize=7)
    axes.invert_yaxis()


def _lines(axes: Axes, finding: Finding, across: str, column: str, by: str) -> None:
    for number, name in enumerate(dict.fromkeys(row[by] for row in finding.rows)):
        rows = [row for row in finding.rows if row[by] == name and row[column] is not None]
        if not rows:
            continue
        cells = [row[column] for row in rows]
        xs = [_middle(row[across]) for row in rows]
        medians = [_middle(cell) for cell in cells]
        axes.errorbar(xs, medians, _errors(cells), marker="o", ms=3, color=f"C{number}", label=str(name))


def _middle(cell: Cell) -> float:
    if isinstance(cell, Spread):
        return cell.median
    return float(cell) if isinstance(cell, int | float) else 0.0


def _errors(cells: Iterable[Cell]) -> list[list[float]]:
    spreads = [cell if isinstance(cell, Spread) else Spread(0, 0, 0) for cell in cells]
    return [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]
