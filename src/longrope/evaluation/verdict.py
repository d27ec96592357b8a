"""The verdict of an evaluation: the best method at each length within the standard error, and the difference to the
original model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longrope.evaluation.results import HEADLINES, EvalRow, mean_and_stderr
from longrope.rope.baselines import CHECKPOINT, ORIGINAL
from longrope.units import format_length

LOWER_IS_BETTER = frozenset({"perplexity", "nll"})
ROUNDING = 1e-9
_NAMES = {
    "perplexity": "perplexity {:.2f}",
    "passkey": "{:.1%} of the passkeys",
    "needle": "{:.1%} of the needles",
    "ruler": "RULER score {:.1f}",
    "retention": "{:.1%} of the original model's next tokens",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """A value and its standard error, None where one trial gives none; `losses` of each text, where there are any."""

    value: float
    stderr: float | None = None
    losses: Mapping[str, float] | None = None

    @classmethod
    def of(cls, row: EvalRow) -> Measured:
        """That of one row."""
        return cls(row.value, row.stderr, row.losses)


Cells = Mapping[str, Mapping[int, Measured]]
"""method -> length -> the number that stands for a suite."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best method and its value; `alike`: the others that are `alike` with it, best first."""

    best: str
    value: float
    alike: tuple[str, ...]

    @property
    def winners(self) -> frozenset[str]:
        """The best method and those alike."""
        return frozenset((self.best, *self.alike))


def headline_cells(rows: Sequence[EvalRow], suite: str) -> Cells:
    """The numbers of `HEADLINES` with their standard errors; of needles those of all depths together, of anything else
    that was measured twice the one of more trials.
    """
    kept = [row for row in rows if row.suite == suite and row.metric == HEADLINES[suite]]
    if suite == "ruler":
        kept = [row for row in kept if row.detail.get("task") == "mean"]
    cells: dict[str, dict[int, Measured]] = {}
    for name, length in dict.fromkeys((row.scaling, row.length) for row in kept):
        same = [row for row in kept if (row.scaling, row.length) == (name, length)]
        measured = Measured.of(max(same, key=lambda row: row.trials))
        trials = sum(row.trials for row in same)
        if len(same) > 1 and suite == "needle" and trials > 1:
            value = math.fsum(row.value * row.trials for row in same) / trials
            measured = Measured(value, math.sqrt(value * (1 - value) / (trials - 1)))  # as of one row of so many
        cells.setdefault(name, {})[length] = measured
    return cells


def alike(first: Measured, second: Measured) -> bool:
    """True if two values differ by no more than the standard error of their difference.

    Of losses on the same texts that is the error of the mean of the differences, text by text: texts differ by far more
    than methods do. Else it is √(a² + b²) of the standard errors a and b, which errs on the side of "alike"; all of n
    against all but one of n are exactly that far apart.
    """
    ours, theirs = first.losses or {}, second.losses or {}
    if len(ours) > 1 and ours.keys() == theirs.keys():
        mean, error = mean_and_stderr([ours[text] - theirs[text] for text in ours])
        return abs(mean) <= (error or 0.0)
    return abs(first.value - second.value) <= math.hypot(first.stderr or 0.0, second.stderr or 0.0) * (1 + ROUNDING)


def rank_methods(values: Mapping[str, Measured], *, lower_is_better: bool) -> Ranking | None:
    """Rank at least two methods; None for fewer, or where no value is finite."""
    finite = {name: one for name, one in values.items() if math.isfinite(one.value)}
    if len(values) < 2 or not finite:
        return None
    sign = 1 if lower_is_better else -1
    order = sorted(finite, key=lambda name: sign * finite[name].value)
    best = finite[order[0]]
    return Ranking(order[0], best.value, tuple(name for name in order[1:] if alike(finite[name], best)))


def best_by_length(cells: Cells, suite: str) -> dict[int, Ranking]:
    """The ranking at every length with two methods or more."""
    found = {}
    for length in dict.fromkeys(length for by_length in cells.values() for length in by_length):
        values = {name: by_length[length] for name, by_length in cells.items() if length in by_length}
        ranking = rank_methods(values, lower_is_better=HEADLINES[suite] in LOWER_IS_BETTER)
        if ranking is not None:
            found[length] = ranking
    return found


def original_method(names: Sequence[str], own: str) -> str | None:
    """The method among `names` that is the model before it was extended; None where there is none beside `own`."""
    return next((name for name in (ORIGINAL, CHECKPOINT, "none") if name in names and name != own), None)


def verdict(cells: Cells, suite: str, own: str, labels: Mapping[str, str] | None = None) -> list[str]:
    """One sentence on the best method at the longest length, and one on `own` against the original model.

    `labels`: the names to print of methods. Empty where one method alone was measured.
    """
    labels, rankings = labels or {}, best_by_length(cells, suite)
    if not rankings:
        return []
    longest = max(rankings)
    best = rankings[longest]
    name, value = labels.get(best.best, best.best), _NAMES[suite].format(best.value)
    others = ", ".join(labels.get(other, other) for other in best.alike)
    says = f"Best at {format_length(longest)} tokens: {name}, {value}"
    if len(best.alike) == sum(longest in by_length for by_length in cells.values()) - 1:
        says = f"No difference at {format_length(longest)} tokens beyond its standard error: {name}, {others}, {value}"
    elif best.alike:
        says += f"; within the standard error of the difference: {others}"
    lines = [says + "."]
    original = original_method(list(cells), own)
    if original is not None and own in cells:
        changes = [
            f"{_change(cells[own][length].value, cells[original][length].value, suite)} at {format_length(length)}"
            for length in cells[own]
            if length in cells[original]
        ]
        shown = labels.get(own, own)
        lines.append(f"{shown} against the original model ({original}): {', '.join(changes)}.")
    return lines


def _change(value: float, reference: float, suite: str) -> str:
    """The change of perplexity in per cent, of shares and scores in points."""
    if not (math.isfinite(value) and math.isfinite(reference)):
        return "not finite"
    if suite == "perplexity":
        return f"{100 * (value / reference - 1):+.1f}%".replace("-", "−")
    points = value - reference if suite == "ruler" else 100 * (value - reference)
    return f"{points:+.1f} points".replace("-", "−")
