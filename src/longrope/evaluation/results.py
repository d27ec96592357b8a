"""The results of an evaluation: rows of numbers, how they were measured, and the JSON file that holds both."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from longrope.checks import shown
from longrope.errors import LongRopeError
from longrope.models.finite import remedy
from longrope.provenance import record
from longrope.storage import json_ready, read_json, write_json_atomic

SCHEMA = "longrope.eval/1"
OWN = "longrope"
"""The name of the scaling in question in rows, where it comes from no file."""
LABELS = {OWN: "this scaling"}
"""Names of rows to show otherwise: a search method has that name too."""
HEADLINES = {
    "perplexity": "perplexity",
    "passkey": "accuracy",
    "needle": "accuracy",
    "ruler": "score",
    "retention": "top1_agreement",
}
"""suite -> its metric in a small table; needles: the mean over depths, RULER: the mean over tasks."""


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One number: `value` of `metric` for the method `scaling` at `length` tokens, its standard error over `trials`.

    `stderr` is None where one trial gives none. `detail` says which part of the suite the number is about: a task, a
    depth, the positions from–to; it is empty for a number about all of it. `losses`, of a perplexity: the mean loss of
    each text in nats, by the SHA-256 of its tokens, so that methods can be compared text by text.
    """

    suite: str
    scaling: str
    length: int
    metric: str
    value: float
    stderr: float | None
    trials: int
    detail: dict[str, Any] = field(default_factory=dict, hash=False)
    losses: dict[str, float] | None = field(default=None, hash=False)

    def to_json(self) -> dict[str, Any]:
        """The fields by name, without `losses` where there are none."""
        found = asdict(self)
        return found if self.losses is not None else {name: found[name] for name in found if name != "losses"}


@dataclass(frozen=True, repr=False)
class EvalResults:
    """The rows of an evaluation, the settings that decide its numbers, and where, when and with which versions it ran.

    `print(results)` shows a small table, `to_frame()` gives a pandas table, `save` and `load` a JSON file.
    """

    rows: tuple[EvalRow, ...]
    settings: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=record)

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        results = json_ready([row.to_json() for row in self.rows])
        return {"schema": SCHEMA, "settings": self.settings, "results": results, **self.provenance}

    def require_finite(self) -> None:
        """Raise LongRopeError (`not-finite`) where a value is NaN or infinity, which no earlier version refused."""
        for row in self.rows:
            if not math.isfinite(row.value):
                dtype = str(self.settings.get("dtype", "an unknown dtype")).removeprefix("torch.")
                raise LongRopeError(
                    f"the {row.metric} of {row.scaling} ({row.suite}) at {row.length} tokens in {dtype} is not finite",
                    code="not-finite",
                    hint=f"measure it again: {remedy(dtype)}",
                )

    def save(self, path: Path | str) -> None:
        """Write the JSON to `path` in full or not at all.

        Raises LongRopeError when it cannot be written, or a value is not finite.
        """
        self.require_finite()
        write_json_atomic(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> EvalResults:
        """Read the file that `save`, `evaluate(output=…)` or `longrope eval -o` wrote.

        Raises LongRopeError, with the path, for a file that is not of this schema, lacks the settings it was measured
        with (a number that cannot be repeated is no result), or has values that are not finite.
        """
        return cls.from_json(read_json(Path(path)), str(path))

    @classmethod
    def from_json(cls, document: dict[str, Any], path: str) -> EvalResults:
        """The results in `document`, as `to_json` gives them. Raises LongRopeError as `load` does, naming `path`."""
        schema = document.get("schema")
        if schema != SCHEMA:
            raise LongRopeError(
                f"{path}: expected an evaluation of schema {SCHEMA!r}, found {schema!r}", code="other-schema"
            )
        settings, results = document.pop("settings", None), document.pop("results", None)
        if not isinstance(settings, dict) or not settings:
            raise LongRopeError(
                f"{path} does not say how it was measured: expected its settings, found none", code="damaged-file"
            )
        if not isinstance(results, list):
            raise LongRopeError(f"{path}: expected a list of results, found none", code="damaged-file")
        del document["schema"]
        try:
            found = cls(tuple(map(row_from_json, results)), settings, document)
            found.require_finite()
        except LongRopeError as error:
            raise error.within(path) from error
        return found

    def to_frame(self) -> Any:
        """A `pandas.DataFrame`: a line per row, a column per field and per key of `detail` (depth, task, from, …).

        Raises LongRopeError where pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError as error:
            raise LongRopeError(
                "tables of results need pandas", code="missing-dependency", hint="pip install pandas"
            ) from error
        lines = [asdict(row) for row in self.rows]
        for line in lines:
            line |= line.pop("detail")
            del line["losses"]
        return pandas.DataFrame(lines)

    def headline(self, suite: str) -> dict[str, dict[int, float]]:
        """method -> length -> the number that stands for `suite` (`HEADLINES`), in the order of the rows."""
        metric, kept = HEADLINES[suite], [row for row in self.rows if row.suite == suite]
        if suite == "ruler":
            kept = [row for row in kept if row.detail.get("task") == "mean"]
        table: dict[str, dict[int, float]] = {}
        for row in kept:
            if row.metric == metric and row.length not in table.setdefault(row.scaling, {}):
                same = [r for r in kept if (r.metric, r.scaling, r.length) == (metric, row.scaling, row.length)]
                table[row.scaling][row.length] = math.fsum(r.value * r.trials for r in same) / sum(
                    r.trials for r in same
                )
        return table

    def __repr__(self) -> str:
        name = self.settings.get("model")
        tables = [self._table(suite) for suite in dict.fromkeys(row.suite for row in self.rows) if suite in HEADLINES]
        head = f"EvalResults{f' of {name}' if name else ''}: {len(self.rows)} rows"
        return "\n".join([head, *(line for table in tables for line in table)])

    def _table(self, suite: str) -> list[str]:
        """One line of lengths and one per method; nothing where the suite has no headline (lm-eval's tasks alone)."""
        values = self.headline(suite)
        lengths = list(dict.fromkeys(length for by_length in values.values() for length in by_length))
        if not lengths:
            return []
        title = suite if suite == HEADLINES[suite] else f"{suite} {HEADLINES[suite]}"
        lines = [[title, *map(str, lengths)]]
        for name, by_length in values.items():
            lines.append([f"  {name}", *(f"{by_length[n]:.4g}" if n in by_length else "–" for n in lengths)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]


def row_from_json(row: Any) -> EvalRow:
    """The row in a dictionary of its fields. Raises LongRopeError, naming the field, for anything else.

    A null value is a number that JSON cannot hold; it becomes NaN.
    """
    names = [entry.name for entry in fields(EvalRow) if entry.name != "losses"]
    if not isinstance(row, dict) or row.keys() - {"losses"} != set(names):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise LongRopeError(
            f"expected a row of {', '.join(names)}; found {found}",
            code="damaged-file",
        )
    values = dict(row)
    values["value"] = math.nan if row["value"] is None else row["value"]
    kinds: dict[str, Any] = {
        **dict.fromkeys(("suite", "scaling", "metric"), str),
        **dict.fromkeys(("length", "trials"), int),
        "value": (int, float),
        "stderr": (int, float, type(None)),
        "detail": dict,
        **({"losses": dict} if "losses" in row else {}),
    }
    for name, kind in kinds.items():
        too_large = isinstance(values[name], int) and abs(values[name]) > sys.float_info.max
        if not isinstance(values[name], kind) or isinstance(values[name], bool) or too_large:
            raise LongRopeError(f"{name} of a row cannot be {shown(values[name])}", code="damaged-file")
    losses = values.get("losses") or {}
    if not all(type(loss) is float and math.isfinite(loss) for loss in losses.values()):
        raise LongRopeError(f"losses of a row cannot be {shown(losses)}", code="damaged-file")
    return EvalRow(**values)


def shown_measures(rows: Sequence[EvalRow]) -> list[tuple[str, str]]:
    """(task, metric) of each row of lm-eval's tasks, to show; ("", metric) of other rows.

    The task is `NAME:SHOTS` where it was measured with several numbers of solved examples, the metric `METRIC (FILTER)`
    where several filters of replies give one.
    """
    shots: dict[str, set[str]] = {}
    filters: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        task, (metric, _, chosen) = str(row.detail.get("task", "")), row.metric.partition(",")
        shots.setdefault(task, set()).add(str(row.detail.get("shots")))
        filters.setdefault((task, metric), set()).add(chosen)
    found = []
    for row in rows:
        task, (metric, _, chosen) = str(row.detail.get("task", "")), row.metric.partition(",")
        several, given = len(filters[task, metric]) > 1, row.detail.get("shots")
        name = task if given is None or len(shots[task]) == 1 else f"{task}:{given}"
        found.append((name, f"{metric} ({chosen})" if several else metric))
    return found


def values_by_length(rows: Sequence[EvalRow], scaling: str, metric: str = "perplexity") -> dict[int, float]:
    """length -> value of one method, in the order measured."""
    return {row.length: row.value for row in rows if row.scaling == scaling and row.metric == metric}


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, its standard error: s/√n with the sample deviation s; None for one value)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)
