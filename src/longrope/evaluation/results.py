"""The row every suite returns, and the JSON file that a run of suites leaves. Not the cells of a run (cells.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.files import json_ready
from longrope.provenance import record

SCHEMA = "longrope.eval/1"


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One number: `value` of `metric` for `scaling` at `length` tokens, its standard error over `trials`.

    `stderr` is None where one trial gives none. `detail` is what further splits the number: a task, a depth, the
    positions from–to; empty where nothing does.
    """

    suite: str
    scaling: str
    length: int
    metric: str
    value: float
    stderr: float | None
    trials: int
    detail: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Evaluation:
    """Rows of an evaluation, and what is needed to repeat it."""

    rows: list[EvalRow]
    settings: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=record)
    """Versions, machine and command."""

    def to_json(self) -> dict[str, Any]:
        """The file's content; NaN and infinite values, which JSON has not, become null."""
        results = json_ready(rows_to_json(self.rows))
        return {"schema": SCHEMA, "settings": self.settings, "results": results, **self.provenance}


def rows_to_json(rows: Sequence[EvalRow]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def row_from_json(row: Any) -> EvalRow:
    """What `rows_to_json` made of one row. Raises LongRopeError, naming the field, for anything else.

    A null value is one that JSON could not hold, and comes back as NaN.
    """
    if not isinstance(row, dict) or row.keys() != {entry.name for entry in fields(EvalRow)}:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise LongRopeError(f"expected a row of {', '.join(entry.name for entry in fields(EvalRow))}; found {found}")
    values = dict(row)
    values["value"] = math.nan if row["value"] is None else row["value"]
    kinds: dict[str, Any] = {
        **dict.fromkeys(("suite", "scaling", "metric"), str),
        **dict.fromkeys(("length", "trials"), int),
        "value": (int, float),
        "stderr": (int, float, type(None)),
        "detail": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise LongRopeError(f"{name} of a row cannot be {values[name]!r}")
    return EvalRow(**values)


def load_evaluation(path: Path | str) -> Evaluation:
    """Read what `longrope eval -o` wrote.

    Raises LongRopeError, with the path, for a file that is not of this schema or lacks the settings it was measured
    with: a number that cannot be repeated is no result.
    """
    try:
        document = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise LongRopeError(f"cannot read the evaluation {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LongRopeError(f"{path} is no evaluation: expected JSON, found something else") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise LongRopeError(f"{path}: expected an evaluation of schema {SCHEMA!r}, found {schema!r}")
    settings, results = document.pop("settings", None), document.pop("results", None)
    if not isinstance(settings, dict) or not settings:
        raise LongRopeError(f"{path} does not say how it was measured: expected its settings, found none")
    if not isinstance(results, list):
        raise LongRopeError(f"{path}: expected a list of results, found none")
    del document["schema"]
    try:
        return Evaluation([row_from_json(row) for row in results], settings, document)
    except LongRopeError as error:
        raise LongRopeError(f"{path}: {error}") from error


def values_by_length(rows: Sequence[EvalRow], scaling: str, metric: str = "perplexity") -> dict[int, float]:
    """length -> value of one scaling, in the order measured."""
    return {row.length: row.value for row in rows if row.scaling == scaling and row.metric == metric}


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, its standard error: s/√n with the sample deviation s; None for one value)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)
