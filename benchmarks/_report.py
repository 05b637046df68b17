"""Output of a run as JSON, as terminal tables and as Markdown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ._results import Finding, shown


@dataclass(frozen=True)
class Run:
    """The results of one run.

    Attributes:
        date: The day, as `2026-11-22`.
        quick: Whether the run checked only that the measures work.
        machine: See `_machine.describe`.
        findings: The results, by the name of the measure.
    """

    date: str
    quick: bool
    machine: dict[str, Any]
    findings: dict[str, Finding]

    def write(self, path: Path) -> None:
        """Write the run to a JSON file."""
        found = {name: finding.as_json() for name, finding in self.findings.items()}
        document = {"date": self.date, "quick": self.quick, "machine": self.machine, "measures": found}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run from a JSON file."""
        document = json.loads(path.read_text(encoding="utf-8"))
        findings = {name: Finding.from_json(finding) for name, finding in document["measures"].items()}
        return cls(document["date"], document["quick"], document["machine"], findings)


def print_tables(run: Run, console: Console) -> None:
    """Print every finding, then the budgets."""
    for finding in run.findings.values():
        table = Table(title=finding.title, title_justify="left")
        for name in finding.rows[0]:
            table.add_column(name, justify="left" if isinstance(finding.rows[0][name], str) else "right")
        for row in finding.rows:
            table.add_row(*(shown(row.get(name)) for name in finding.rows[0]))
        console.print(table)
    table = Table("budget", "limit", "measured", "met", title="Budgets", title_justify="left")
    for finding in run.findings.values():
        for budget in finding.budgets:
            kept = "[green]yes" if budget.kept else "[red]no"
            table.add_row(budget.what, budget.promised, shown(budget.measured), kept)
    if table.row_count:
        console.print(table)


def markdown(run: Run) -> str:
    """Return the run as Markdown: the machine, the budgets, then every table."""
    lines = [f"Measured on {run.date}. Numbers with a range are: median of the rounds (lowest–highest).", ""]
    lines += ["; ".join(f"{name}: {value}" for name, value in run.machine.items()) + ".", ""]
    budgets = [budget for finding in run.findings.values() for budget in finding.budgets]
    if budgets:
        lines += ["| budget | limit | measured | met |", "|---|---|---|---|"]
        lines += [
            f"| {budget.what} | {budget.promised} | {shown(budget.measured)} | {'yes' if budget.kept else '**no**'} |"
            for budget in budgets
        ]
    for finding in run.findings.values():
        names = list(finding.rows[0])
        marks = ["---" if isinstance(finding.rows[0][name], str) else "---:" for name in names]
        lines += ["", f"### {finding.title}", "", f"| {' | '.join(names)} |", f"|{'|'.join(marks)}|"]
        lines += [f"| {' | '.join(shown(row.get(name)) for name in names)} |" for row in finding.rows]
    return "\n".join(lines) + "\n"
