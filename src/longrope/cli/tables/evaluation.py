"""The results of an evaluation: a table for each suite, a row for each method, a column for each length or metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from longrope.cli.common import number, output, table

if TYPE_CHECKING:
    from longrope.evaluation.results import EvalRow


def show_evaluation(rows: Sequence[EvalRow]) -> None:
    """Print the results; the loss by position, single depths and RULER's single tasks are in the file only."""
    for suite, draw in _SUITES.items():
        own = [row for row in rows if row.suite == suite]
        if own:
            draw(own)


def _perplexity(rows: Sequence[EvalRow]) -> None:
    rows = [row for row in rows if row.metric == "perplexity"]
    trials = max(row.trials for row in rows)
    _by_length(f"Perplexity by context length, {trials} held-out samples (± standard error)", rows)


def _passkey(rows: Sequence[EvalRow]) -> None:
    percent = [(row.scaling, row.length, _percent(row.value, row.stderr)) for row in rows]
    _grid(f"Passkeys found by context length, % of {max(row.trials for row in rows)} (± standard error)", percent)


def _needle(rows: Sequence[EvalRow]) -> None:
    groups: dict[tuple[str, int], list[EvalRow]] = {}
    for row in rows:
        if row.metric == "accuracy":
            groups.setdefault((row.scaling, row.length), []).append(row)
    cells = []
    for (name, length), own in groups.items():
        trials = sum(row.trials for row in own)
        value = math.fsum(row.value * row.trials for row in own) / trials
        stderr = math.sqrt(value * (1 - value) / trials)
        cells.append((name, length, _percent(value, stderr)))
    counts = {sum(row.trials for row in own) for own in groups.values()}
    _grid(f"Needles found by context length, % of {max(counts)} at all depths (± standard error)", cells)


def _ruler(rows: Sequence[EvalRow]) -> None:
    """Print RULER's mean score by length, and the effective length of each scaling by each rule."""
    means = [row for row in rows if row.metric == "score" and row.detail["task"] == "mean"]
    tasks = {row.detail["task"] for row in rows if row.metric == "score"} - {"mean"}
    _by_length(f"RULER, mean score of {len(tasks)} tasks by context length (± standard error)", means)
    effective = [row for row in rows if row.metric == "effective_length"]
    rules = list(dict.fromkeys(row.detail["rule"] for row in effective))
    shown = table("Effective length, tokens (score at least)", ["scaling", *rules])
    cells = {
        (row.scaling, row.detail["rule"]): f"{row.value:.0f} ({number(row.detail['threshold'], 1)})"
        for row in effective
    }
    for name in dict.fromkeys(row.scaling for row in effective):
        shown.add_row(name, *(cells.get((name, rule), "–") for rule in rules))
    output.print(shown)


def _retention(rows: Sequence[EvalRow]) -> None:
    def column(row: EvalRow) -> str:
        return f"{row.detail['task']} {row.metric.partition(',')[0]}" if row.detail else row.metric.replace("_", " ")

    columns = list(dict.fromkeys(map(column, rows)))
    length = max(row.length for row in rows)
    shown = table(f"Short texts, original window of {length} tokens (± standard error)", ["scaling", *columns])
    cells = {
        (row.scaling, column(row)): _plus_minus(row, digits=3 if row.metric != "perplexity" else 2) for row in rows
    }
    for name in dict.fromkeys(row.scaling for row in rows):
        shown.add_row(name, *(cells.get((name, entry), "–") for entry in columns))
    output.print(shown)


def _by_length(title: str, rows: Sequence[EvalRow]) -> None:
    _grid(title, [(row.scaling, row.length, _plus_minus(row)) for row in rows])


def _grid(title: str, cells: Sequence[tuple[str, int, str]]) -> None:
    lengths = list(dict.fromkeys(length for _, length, _ in cells))
    shown = table(title, ["scaling", *map(str, lengths)])
    found = {(name, length): text for name, length, text in cells}
    for name in dict.fromkeys(name for name, _, _ in cells):
        shown.add_row(name, *(found.get((name, length), "–") for length in lengths))
    output.print(shown)


def _plus_minus(row: EvalRow, digits: int = 2) -> str:
    """The value, and its standard error where several texts give one."""
    value = number(row.value, digits)
    return value if row.stderr is None else f"{value} ± {number(row.stderr, digits)}"


def _percent(value: float, stderr: float | None) -> str:
    shown = number(100 * value, 1)
    return shown if stderr is None else f"{shown} ± {number(100 * stderr, 1)}"


_SUITES: dict[str, Callable[[Sequence[EvalRow]], None]] = {
    "perplexity": _perplexity,
    "passkey": _passkey,
    "needle": _needle,
    "ruler": _ruler,
    "retention": _retention,
}
