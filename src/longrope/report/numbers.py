"""Numbers as a person reads them: a value with its error to the digits that mean something, token counts, intervals.

Strings only; `tables.py` and `summary.py` give the numbers their meaning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FEW_TRIALS = 30
"""A number from fewer trials than this is marked: its standard error is itself poorly known."""
MARK = "†"
BEST = "★"
BEST_NOTE = f"{BEST} best of its column, and those that cannot be told from it."
_Z95 = 1.959963984540054  # standard normal, 97.5 %


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table: `text`, its uncertainty, whether it comes from fewer than FEW_TRIALS trials, and whether
    it is the best of its column or cannot be told from it."""

    text: str
    error: str = ""
    few: bool = False
    best: bool = False

    def __str__(self) -> str:
        return f"{self.text}{MARK * self.few}{f' {BEST}' * self.best}" + (f" {self.error}" if self.error else "")


NOTHING = Cell("–")
"""Not measured."""


def with_error(
    value: float, stderr: float | None, trials: int | None = None, unit: str = "", decimals: int | None = None
) -> Cell:
    """`value ± stderr`, rounded to two digits of the error, or to `decimals`; four digits where there is no error.

    >>> str(with_error(343.34, 44.71, 100))
    '343 ± 45'
    """
    few = trials is not None and trials < FEW_TRIALS
    if not math.isfinite(value):
        return Cell("not finite", few=few)
    if stderr is None or not math.isfinite(stderr) or stderr <= 0.0:
        return Cell(f"{fixed(value, 3 - _exponent(value)) if value else '0'}{unit}", few=few)
    digits = 1 - _exponent(stderr) if decimals is None else decimals
    return Cell(fixed(value, digits) + unit, f"± {fixed(stderr, digits)}", few)


def share(value: float, trials: int) -> Cell:
    """A share of `trials` in per cent with its 95 % interval, which stays honest at 0 and 100 %."""
    few = trials < FEW_TRIALS
    if not math.isfinite(value):
        return Cell("not finite", few=few)
    low, high = wilson(value, trials)
    return Cell(f"{fixed(100 * value, 1 if trials >= 200 else 0)} %", f"({100 * low:.0f}–{100 * high:.0f})", few)


def wilson(value: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share `value` of `trials` (Wilson 1927); (0, 1) for no trials."""
    if trials < 1:
        return 0.0, 1.0
    spread = _Z95**2 / trials
    centre = (value + spread / 2) / (1 + spread)
    half = math.sqrt(spread * value * (1 - value) + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def fixed(value: float, digits: int) -> str:
    """`value` with at most 4 decimals and thousands separated; `digits` below 0 round to tens, hundreds, …"""
    digits = min(digits, 4)
    return f"{round(value, digits) + 0.0:,.{max(digits, 0)}f}".replace("-", "−")


def count(value: int) -> str:
    """A whole number with thousands separated."""
    return f"{value:,}"


def amount(value: float) -> str:
    """A large number in words of three digits: 2162688 -> '2.16 million'."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def per_cent(value: float, reference: float) -> str:
    """The change from `reference` to `value` in per cent, with its sign."""
    change = 100 * (value / reference - 1)
    return f"{change:+.1f} %".replace("-", "−")


def listed(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0
