"""The results of an evaluation: for each suite a verdict and a table, a row a method, a column a length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longrope.cli.common import number, output, say, show_table
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.evaluation.results import EvalRow
    from longrope.evaluation.verdict import Measured

_LONGEST_NAME = 30
_TITLES = {
    "perplexity": "Perplexity by context length, {} held-out samples (± standard error)",
    "passkey": "Passkeys found by context length, % of {} (± standard error)",
    "needle": "Needles found by context length, % of {} at all depths (± standard error)",
    "ruler": "RULER, mean score by context length, {} samples of each task (± standard error)",
}


def show_evaluation(rows: Sequence[EvalRow]) -> None:
    """Print the results, the scaling in question last; losses by position, depths and single tasks of RULER are in the
    file only."""
    marked = False
    suites = [suite for suite in (*_TITLES, "retention") if any(row.suite == suite for row in rows)]
    for place, suite in enumerate(suites):
        if place:
            output.print()
        own = [row for row in rows if row.suite == suite]
        marked |= _retention(own) if suite == "retention" else _by_length(suite, own)
        if suite == "ruler":
            _effective_lengths(own)
    if marked:
        by_text = " (text by text, so less than ±)" if any(row.losses for row in rows) else ""
        says = "* the best of its column, and those that differ from it by no more than the standard error of the"
        say(f"{says} difference{by_text}", "  ")


def _by_length(suite: str, rows: Sequence[EvalRow]) -> bool:
    """Print verdict and table of a suite; True if something is marked as the best."""
    from longrope.evaluation.verdict import best_by_length, headline_cells, verdict

    cells = headline_cells(rows, suite)
    labels = _labels(list(cells))
    rankings = best_by_length(cells, suite)
    for line in verdict(cells, suite, rows[-1].scaling, labels):
        say(line, "  ")
    lengths = list(dict.fromkeys(length for by_length in cells.values() for length in by_length))
    as_text = _percent if suite in ("passkey", "needle") else _plus_minus
    lines = []
    for name, by_length in cells.items():
        texts = []
        for length in lengths:
            best = rankings[length].winners if length in rankings else frozenset()
            texts.append(_marked(as_text(by_length.get(length)), name in best, bool(rankings)))
        lines.append([labels[name], *texts])
    title = _TITLES[suite].format(_trials(suite, rows))
    say(title)
    show_table(["method", *map(format_length, lengths)], lines)
    return bool(rankings)


def _trials(suite: str, rows: Sequence[EvalRow]) -> int:
    """The samples behind a number: of needles those of all depths together."""
    from longrope.evaluation.results import HEADLINES

    kept = [row for row in rows if row.metric == HEADLINES[suite]]
    if suite != "needle":
        return max(row.trials for row in kept)
    groups = {(row.scaling, row.length): 0 for row in kept}
    for row in kept:
        groups[row.scaling, row.length] += row.trials
    return max(groups.values())


def _effective_lengths(rows: Sequence[EvalRow]) -> None:
    """Print the effective length of each method by each rule."""
    effective = [row for row in rows if row.metric == "effective_length"]
    rules = list(dict.fromkeys(row.detail["rule"] for row in effective))
    cells = {
        (row.scaling, row.detail["rule"]): f"{row.value:.0f} ({number(row.detail['threshold'], 1)})"
        for row in effective
    }
    labels = _labels(list(dict.fromkeys(row.scaling for row in effective)))
    lines = [[label, *(cells.get((name, rule), "–") for rule in rules)] for name, label in labels.items()]
    say("Effective length, tokens (score at least)")
    show_table(["method", *rules], lines)


def _retention(rows: Sequence[EvalRow]) -> bool:
    """Print short-context quality: a column for each metric and benchmark; True if something is marked as the best."""
    from longrope.evaluation.results import shown_measures
    from longrope.evaluation.verdict import LOWER_IS_BETTER, Measured, rank_methods

    columns: dict[str, list[EvalRow]] = {}
    for row, (task, metric) in zip(rows, shown_measures(rows), strict=True):
        columns.setdefault(f"{task} {metric}" if task else metric.replace("_", " "), []).append(row)
    labels = _labels(list(dict.fromkeys(row.scaling for row in rows)))
    texts: dict[str, list[str]] = {name: [] for name in labels}
    for own in columns.values():
        cells, metric = {row.scaling: Measured.of(row) for row in own}, own[0].metric
        higher = own[0].detail.get("higher_is_better", metric not in LOWER_IS_BETTER)
        ranking = rank_methods(cells, lower_is_better=not higher)
        for name in texts:
            cell = _plus_minus(cells.get(name), 2 if metric == "perplexity" else 3)
            texts[name].append(_marked(cell, ranking is not None and name in ranking.winners, len(labels) > 1))
    say(f"Short texts, original window of {max(row.length for row in rows)} tokens (± standard error)")
    show_table(["method", *columns], [[labels[name], *cells] for name, cells in texts.items()])
    return len(labels) > 1


def _labels(names: Sequence[str]) -> Mapping[str, str]:
    """The names to print: of a long path its last parts, where these are enough to tell it from the others."""
    from longrope.evaluation.results import LABELS

    short = {name: LABELS.get(name, _shortened(name)) for name in names}
    return {name: label if list(short.values()).count(label) == 1 else name for name, label in short.items()}


def _shortened(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    parts = Path(name).parts
    kept = 1
    while kept < len(parts) and len("…/" + "/".join(parts[-kept - 1 :])) <= _LONGEST_NAME:
        kept += 1
    return "…/" + "/".join(parts[-kept:])


def _marked(text: str, best: bool, marks: bool) -> str:
    """The text of a cell with the mark of the best, or the room of the mark."""
    return text + ("*" if best else " ") if marks else text


def _plus_minus(measured: Measured | None, digits: int = 2) -> str:
    """The value, and its standard error where several texts give one."""
    if measured is None:
        return "–"
    value = number(measured.value, digits)
    return value if measured.stderr is None else f"{value} ± {number(measured.stderr, digits)}"


def _percent(measured: Measured | None) -> str:
    if measured is None:
        return "–"
    shown = number(100 * measured.value, 1)
    return shown if measured.stderr is None else f"{shown} ± {number(100 * measured.stderr, 1)}"
