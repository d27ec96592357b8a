"""The exhibits that compare several runs: every run's own scaling in the same figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longrope.evaluation.results import EvalRow
from longrope.report import tables
from longrope.report.collect import Run
from longrope.report.figures.by_length import accuracy_figure, perplexity_figure, score_figure
from longrope.report.figures.factors import factors_figure
from longrope.report.figures.search import search_figure
from longrope.report.numbers import BEST_NOTE, NOTHING, Cell, count
from longrope.report.sections import Exhibit, closed_forms, loss_unit
from longrope.report.styles import OWN, Shown, is_baseline, method_styles
from longrope.report.summary import headline, pooled
from longrope.report.svg import Drawing
from longrope.report.tables import Line, Table
from longrope.report.warnings import comparability
from longrope.rope.scaling import Window


def comparison(runs: Sequence[Run], shown: Shown) -> list[Exhibit]:
    """Exhibits of `runs` together; `shown` knows each run's own scaling by the run's name.

    Baselines are among them where all runs measured the same model on the same texts.
    """
    rows = [replace(row, scaling=run.name) for run in runs for row in run.rows if row.scaling == OWN]
    if not comparability(runs):
        rows += [row for row in runs[0].rows if is_baseline(row.scaling)]
    found = [_headlines(runs, shown), *_measures(rows, runs, shown), _search(runs, shown), _factors(runs, shown)]
    return [exhibit for exhibit in found if exhibit is not None]


def _headlines(runs: Sequence[Run], shown: Shown) -> Exhibit:
    columns = [
        {number.label: number.value for number in headline(run, {**shown, OWN: shown[run.name]})} for run in runs
    ]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    lines = tuple(Line(label, tuple(column.get(label, NOTHING) for column in columns)) for label in labels)
    table = Table("The headline of every run.", ("", *(run.name for run in runs)), lines)
    return Exhibit("compared", "Headline", "", None, (table,))


def _factors(runs: Sequence[Run], shown: Shown) -> Exhibit | None:
    """The factors of all runs in one figure; None where the rotary embeddings differ.

    Closed forms are drawn too where all runs have the same target.
    """
    scalings = {run.name: run.scaling for run in runs if run.scaling is not None}
    if len(scalings) < 2 or len({scaling.geometry for scaling in scalings.values()}) > 1:
        return None
    first = next(iter(scalings.values()))
    windows: dict[str, Window] = {name: scaling.windows[-1] for name, scaling in scalings.items()}
    if len({scaling.target_length for scaling in scalings.values()}) == 1:
        windows |= closed_forms(first)
    all_styles = {name: shown.get(name, one) for name, one in method_styles(windows).items()}
    return Exhibit(
        "compared-factors",
        "Rescale factors",
        "The factors of each run's longest window.",
        Drawing(factors_figure(first.geometry, windows, all_styles, {}, None)),
        (tables.factors(first.geometry, windows, all_styles, {}),),
        folded=True,
    )


def _search(runs: Sequence[Run], shown: Shown) -> Exhibit | None:
    """The searches in one figure; None where objective, target or texts differ."""
    traces = {run.name: run.trace for run in runs if run.trace is not None and run.trace.progress}
    if len(traces) < 2 or len({trace.final for trace in traces.values()}) > 1:
        return None
    unit = loss_unit(next(run for run in runs if run.name in traces))
    lines = tuple(
        Line(
            shown[name].label,
            (
                Cell(count(trace.evaluations)),
                Cell(count(trace.token_passes)) if trace.counted else NOTHING,
                Cell(f"{trace.result:.4f}") if trace.result is not None else NOTHING,
            ),
            shown[name].tone,
            strong=True,
        )
        for name, trace in traces.items()
    )
    return Exhibit(
        "compared-search",
        "The searches",
        f"Best loss so far, {unit}, against token passes. The axis of costs is logarithmic.",
        Drawing(search_figure(traces, shown)),
        (Table(f"Cost and loss of the result, {unit}.", ("run", "evaluations", "token passes", "loss"), lines),),
    )


def _measures(rows: Sequence[EvalRow], runs: Sequence[Run], shown: Shown) -> list[Exhibit]:
    """Figures by length of what at least two runs measured."""
    lengths = {run.original_length for run in runs}
    original = next(iter(lengths)) if len(lengths) == 1 else None
    error, range_ = "Bars and ±: one standard error.", "Bars and ranges: 95 % intervals."
    found = []
    for suite, metric, title, caption in (
        ("perplexity", "perplexity", "Perplexity by length", f"Perplexity of held-out texts. {error}"),
        ("passkey", "accuracy", "Passkey retrieval", f"Passkeys of five digits given back exactly. {range_}"),
        ("needle", "accuracy", "Needles by length", f"Needles found exactly, over all depths. {range_}"),
        ("ruler", "score", "RULER", f"RULER's mean score. {error}"),
    ):
        chosen = _by_length([row for row in rows if (row.suite, row.metric) == (suite, metric)])
        if len({row.scaling for row in chosen} & {run.name for run in runs}) < 2:
            continue
        show = tables.shown_value
        if metric == "perplexity":
            figure, show = perplexity_figure(chosen, shown, original), tables.shown_perplexity
        elif metric == "score":
            figure = score_figure(chosen, shown, original, None)
        else:
            figure, show = accuracy_figure(chosen, shown, original), tables.shown_share
        table = tables.by_length(chosen, shown, f"{caption} {BEST_NOTE}", show)
        found.append(Exhibit(f"compared-{suite}", title, caption, Drawing(figure), (table,)))
    return found


def _by_length(rows: Sequence[EvalRow]) -> list[EvalRow]:
    """One row per scaling and length: of RULER's tasks their mean, of needles all depths together."""
    groups: dict[tuple[str, int], list[EvalRow]] = {}
    for row in rows:
        if row.detail.get("task", "mean") == "mean":
            groups.setdefault((row.scaling, row.length), []).append(row)
    together = []
    for group in groups.values():
        if len(group) > 1:
            value, trials = pooled(group)
            group = [replace(group[0], value=value, trials=trials, stderr=None, detail={})]
        together += group
    return together
