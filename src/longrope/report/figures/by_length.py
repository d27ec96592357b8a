"""Measurements by context length (perplexity, passkey accuracy, RULER's score) or by position: a line per method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from longrope.evaluation.results import EvalRow
from longrope.report.figures.canvas import (
    hover,
    legend,
    length_axis,
    line_style,
    log_values,
    new_figure,
    note,
    window_line,
)
from longrope.report.numbers import count, wilson, with_error
from longrope.report.styles import Shown, light

Errors = Callable[[EvalRow], tuple[float, float]]


def perplexity_figure(rows: Sequence[EvalRow], shown: Shown, original_length: int | None) -> Figure:
    """Perplexity, both axes logarithmic, bars of one standard error."""
    figure = _figure(rows, shown, original_length, "perplexity", standard_error)
    log_values(
        figure.axes[0], [row.value + side for row in rows for side in (0.0, -(row.stderr or 0), row.stderr or 0)]
    )
    return figure


def accuracy_figure(rows: Sequence[EvalRow], shown: Shown, original_length: int | None) -> Figure:
    """Shares in per cent with their 95 % intervals."""
    figure = _figure(rows, shown, original_length, "exact answers (%)", interval, 100.0)
    figure.axes[0].set_ylim(-4, 108)
    return figure


def score_figure(rows: Sequence[EvalRow], shown: Shown, original_length: int | None, threshold: float | None) -> Figure:
    """Scores from 0 to 100, bars of one standard error, and the threshold of the effective length as a line."""
    figure = _figure(rows, shown, original_length, "mean score (0 to 100)", standard_error)
    axes = figure.axes[0]
    axes.set_ylim(-4, 108)
    if threshold is not None:
        axes.axhline(threshold, color=light("quiet"), linewidth=0.9, linestyle="-.", zorder=1)
        at = (1.0, threshold)
        note(axes, f"threshold {threshold:g}", at, (0, 2), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    return figure


def position_figure(rows: Sequence[EvalRow], shown: Shown, original_length: int | None) -> Figure:
    """Mean NLL of each bucket of positions (`detail` has `from` and `to`), drawn at the bucket's last position.

    A line that goes on falling beyond the original window uses far context.
    """
    ends = [replace(row, length=int(row.detail["to"])) for row in rows]
    ends.sort(key=lambda row: row.length)
    label = "position in the text, up to"
    return _figure(ends, shown, original_length, "loss (nats per token)", standard_error, xlabel=label)


def standard_error(row: EvalRow) -> tuple[float, float]:
    error = row.stderr if row.stderr is not None and math.isfinite(row.stderr) else 0.0
    return error, error


def interval(row: EvalRow) -> tuple[float, float]:
    low, high = wilson(row.value, row.trials)
    return row.value - low, high - row.value


def _figure(
    rows: Sequence[EvalRow],
    shown: Shown,
    original_length: int | None,
    ylabel: str,
    errors: Errors,
    scale: float = 1.0,
    xlabel: str = "context length",
) -> Figure:
    figure, axes = new_figure()
    handles, labels = [], []
    for name, method in shown.items():
        own = sorted(
            (row for row in rows if row.scaling == name and math.isfinite(row.value)), key=lambda row: row.length
        )
        if not own:
            continue
        bars = [[scale * max(0.0, errors(row)[side]) for row in own] for side in (0, 1)]
        drawn = axes.errorbar(
            [row.length for row in own],
            [scale * row.value for row in own],
            yerr=bars,
            elinewidth=0.8,
            **line_style(method),
        )
        for row in own:
            value = with_error(scale * row.value, None if row.stderr is None else scale * row.stderr, row.trials)
            hover(axes, row.length, scale * row.value, f"{method.label}, {count(row.length)} tokens: {value}")
        handles.append(drawn[0])
        labels.append(method.label)
    lengths = [row.length for row in rows]
    length_axis(axes, [*lengths, *([original_length] if original_length else [])], xlabel)
    window_line(axes, original_length)
    axes.set_ylabel(ylabel)
    legend(figure, handles, labels)
    return figure
