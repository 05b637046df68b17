"""Results of a measure and their statistics. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Measurements of one quantity, one per round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of measurements."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])

    @classmethod
    def of_ratios(cls, values: Sequence[float], base: Sequence[float]) -> Spread:
        """Return the spread of the ratios to the base measurements of the same rounds."""
        return cls.of(value / other for value, other in zip(values, base, strict=True))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)}–{_short(self.high)})"


Cell = str | int | float | Spread | None


@dataclass(frozen=True)
class Budget:
    """A limit of a quantity, and its measurement.

    Attributes:
        what: The quantity.
        promised: The limit, as text.
        measured: The measurement.
        kept: Whether the measurement is within the limit.
    """

    what: str
    promised: str
    measured: Cell
    kept: bool

    @classmethod
    def at_most(cls, what: str, limit: float, measured: Spread | float, unit: str = "") -> Budget:
        """Compare a quantity with an upper limit; of several measurements, the median counts."""
        return cls(what, f"≤ {_short(limit)}{unit}", measured, _median(measured) <= limit)

    @classmethod
    def at_least(cls, what: str, limit: float, measured: Spread | float, unit: str = "") -> Budget:
        """Compare a quantity with a lower limit; of several measurements, the median counts."""
        return cls(what, f"≥ {_short(limit)}{unit}", measured, _median(measured) >= limit)


@dataclass(frozen=True)
class Finding:
    """The results of one measure.

    Attributes:
        title: The title of the table.
        setting: The parameters, by name.
        rows: One row per case, all with the same columns. The name of a column ends with its unit.
        budgets: The budgets that this measure can check.
    """

    title: str
    setting: dict[str, Any]
    rows: list[dict[str, Cell]]
    budgets: list[Budget] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the finding as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Finding:
        """Return the finding of the result of `as_json`."""
        rows = [{name: _cell(value) for name, value in row.items()} for row in stored["rows"]]
        budgets = [Budget(**{**budget, "measured": _cell(budget["measured"])}) for budget in stored["budgets"]]
        return cls(stored["title"], stored["setting"], rows, budgets)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile of the values: `percent` of them do not exceed it."""
    found = sorted(values)
    return found[min(len(found) - 1, int(len(found) * percent / 100))]


def shown(cell: Cell) -> str:
    """Return a cell as text, numbers with their significant digits."""
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
