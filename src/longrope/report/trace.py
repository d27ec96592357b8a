"""The course of a search, evaluation by evaluation, read from its log: losses against the token passes they cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError, one_line
from longrope.search.evaluator import OTHER, SEARCH
from longrope.search.log import LogRow, read_log


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation on all texts of a split: the evaluations and token passes spent so far, and its loss.

    `token_passes` counts a forward once and a backward twice; repeated requests and the baselines are not counted.
    """

    evaluations: int
    token_passes: int
    loss: float


@dataclass(frozen=True)
class Trace:
    """A search log. `series` maps (split, window length) to the evaluations on all texts of it, in order.

    Losses of different splits or lengths do not compare. `result` is the loss of the chosen candidate on the search
    texts, which need not be the lowest: some methods choose on validation texts. `counted` is False where the number of
    texts is not recorded; `token_passes` are then 0 throughout.
    """

    target_length: int
    header: dict[str, Any]
    baselines: dict[str, float]
    series: dict[tuple[str, int], list[Point]]
    evaluations: int
    token_passes: int
    counted: bool
    result: float | None

    @property
    def final(self) -> tuple[str, int, str]:
        """Objective, target length and hash of the texts of the final loss: searches with the same ones compare."""
        hashes = self.header.get("samples_sha256")
        texts = hashes.get(f"{SEARCH} {self.target_length}") if isinstance(hashes, dict) else None
        return str(self.header.get("objective")), self.target_length, str(texts)

    @property
    def progress(self) -> list[Point]:
        """The evaluations that compare with the baselines: on the search texts, at the target length."""
        return self.series.get((SEARCH, self.target_length), [])

    @property
    def best_baseline(self) -> tuple[str, float] | None:
        """Name and loss of the best baseline; None where none was finite."""
        finite = {name: loss for name, loss in self.baselines.items() if math.isfinite(loss)}
        return min(finite.items(), key=lambda item: item[1]) if finite else None

    @property
    def improvements(self) -> list[Point]:
        """The evaluations of `progress` that were better than all before."""
        best, improved = math.inf, []
        for point in self.progress:
            if point.loss < best:
                best = point.loss
                improved.append(point)
        return improved


def read_trace(path: Path, provenance: Mapping[str, Any]) -> Trace:
    """Read the log at `path`. The number of its texts and its result come from the `provenance` of its scaling.

    Raises LongRopeError when the log is missing or damaged.
    """
    header, logged = read_log(path)
    if not path.read_bytes().endswith(b"\n"):
        raise LongRopeError(
            f"the last line of {path} is cut off", code="damaged-file", hint="finish the search with `resume=True`"
        )
    try:
        return _trace(header, logged, provenance)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise LongRopeError(
            f"{path} is damaged: expected the settings and evaluations of a search, found others ({one_line(error)})",
            code="damaged-file",
        ) from error


def _trace(header: dict[str, Any], logged: Sequence[LogRow], provenance: Mapping[str, Any]) -> Trace:
    """The course of the search that left this log."""
    target = int(header["target_length"])
    texts = _texts(provenance.get("data"))
    baselines: dict[str, float] = {}
    series: dict[tuple[str, int], list[Point]] = {}
    partial: dict[str, list[float]] = {}
    evaluations = passes = 0
    known: set[str] = set()  # requests: a repeated one was not computed again
    for entry in logged:
        row = dict(entry.request)
        if "baseline" in row:
            baselines[str(row["baseline"])] = entry.loss
            continue
        split, length, samples = row.get("split", SEARCH), int(row.get("length", target)), row.pop("samples", None)
        if split == OTHER:  # requested after the search
            continue
        count = texts.get((split, length), 0)
        rows = count if samples is None else len(samples)
        evaluations += 1
        request = f"{json.dumps(entry.request)} {entry.gradient is None}"
        if request not in known:
            known.add(request)
            passes += rows * length * (1 if entry.gradient is None else 3)
        loss: float | None = entry.loss
        if samples is not None:  # a raced candidate is scored text by text
            scored = partial.setdefault(json.dumps(row), [])
            scored += [entry.loss] * rows
            complete = len(scored) == count and entry.gradient is None
            loss = math.fsum(scored) / count if complete else None
        if loss is not None:
            series.setdefault((split, length), []).append(Point(evaluations, passes, loss))
    result = provenance.get("best_loss")
    chosen = float(result) if isinstance(result, int | float) else None
    return Trace(target, header, baselines, series, evaluations, passes, bool(texts), chosen)


def _texts(data: Any) -> Counter[tuple[str, int]]:
    """(split, length) -> number of texts, of the `samples` that a search leaves in its provenance."""
    samples = data.get("samples") if isinstance(data, dict) else None
    if not isinstance(samples, list):
        return Counter()
    return Counter((str(row.get("split")), int(row.get("length", 0))) for row in samples if isinstance(row, dict))
