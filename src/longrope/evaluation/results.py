"""The row every suite returns, and the JSON file a run of suites leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One number: `value` of `metric` for `scaling` at `length` tokens, its standard error over `trials`.

    `stderr` is None where one trial gives none.
    """

    suite: str
    scaling: str
    length: int
    metric: str
    value: float
    stderr: float | None
    trials: int


def rows_to_json(rows: Sequence[EvalRow]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def values_by_length(rows: Sequence[EvalRow], scaling: str, metric: str = "perplexity") -> dict[int, float]:
    """length -> value of one scaling, in the order measured."""
    return {row.length: row.value for row in rows if row.scaling == scaling and row.metric == metric}
