"""What a measure finds out, and how it is summed up. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Several measurements of one quantity, one per round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Sum up measurements."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])

    @classmethod
    def of_ratios(cls, values: Sequence[float], base: Sequence[float]) -> Spread:
        """Sum up how measurements relate to those of the same rounds that they are compared with."""
        return cls.of(value / other for value, other in zip(values, base, strict=True))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)}–{_short(self.high)})"


Cell = str | int | float | Spread | None


@dataclass(frozen=True)
class Budget:
    """What was promised of a quantity, and what it came to.

    Attributes:
        what: The quantity.
        promised: The promise, in words.
        measured: What it came to.
        kept: Whether that is what was promised.
    """

    what: str
    promised: str
    measured: Cell
    kept: bool

    @classmethod
    def at_most(cls, what: str, limit: float, measured: Spread | float, unit: str = "") -> Budget:
        """Compare a quantity, its median if there are several measurements, with an upper limit."""
        return cls(what, f"≤ {_short(limit)}{unit}", measured, _median(measured) <= limit)

    @classmethod
    def at_least(cls, what: str, limit: float, measured: Spread | float, unit: str = "") -> Budget:
        """Compare a quantity, its median if there are several measurements, with a lower limit."""
        return cls(what, f"≥ {_short(limit)}{unit}", measured, _median(measured) >= limit)


@dataclass(frozen=True)
class Finding:
    """What one measure found.

    Attributes:
        title: What was measured, in words.
        setting: How, by the name of each parameter.
        rows: One case each; all have the same columns. A column's name ends with its unit.
        budgets: The promises that this measure can judge.
    """

    title: str
    setting: dict[str, Any]
    rows: list[dict[str, Cell]]
    budgets: list[Budget] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the finding in the types that JSON has."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Finding:
        """Return the finding that `as_json` has turned into `stored`."""
        rows = [{name: _cell(value) for name, value in row.items()} for row in stored["rows"]]
        budgets = [Budget(**{**budget, "measured": _cell(budget["measured"])}) for budget in stored["budgets"]]
        return cls(stored["title"], stored["setting"], rows, budgets)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed."""
    found = sorted(values)
    return found[min(len(found) - 1, int(len(found) * percent / 100))]


def shown(cell: Cell) -> str:
    """Return a cell as text, numbers with as many digits as mean something."""
    if isinstance(cell, bool | str):
        return str(cell)
    if isinstance(cell, int | float):
        return _short(cell)
    return "" if cell is None else str(cell)


def _short(value: float) -> str:
    if isinstance(value, int) or value.is_integer():
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _median(measured: Spread | float) -> float:
    return measured.median if isinstance(measured, Spread) else measured


def _cell(stored: Any) -> Cell:
    return Spread(**stored) if isinstance(stored, dict) else stored
