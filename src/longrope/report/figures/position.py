"""Loss by position in a long text: a line that goes on falling beyond the original window uses far context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from longrope.evaluation.results import EvalRow
from longrope.report.figures.canvas import legend, length_axis, line_style, new_figure, window_line
from longrope.report.styles import MethodStyle


def position_figure(rows: Sequence[EvalRow], shown: Mapping[str, MethodStyle], original_length: int | None) -> Figure:
    """Mean NLL of each bucket of positions (`detail` has `from` and `to`), drawn at the bucket's last position."""
    figure, axes = new_figure()
    handles, labels = [], []
    for name, method in shown.items():
        own = sorted((row for row in rows if row.scaling == name), key=lambda row: int(row.detail["to"]))
        own = [row for row in own if math.isfinite(row.value)]
        if not own:
            continue
        drawn = axes.errorbar(
            [row.detail["to"] for row in own],
            [row.value for row in own],
            yerr=[row.stderr or 0.0 for row in own],
            elinewidth=0.8,
            **line_style(method),
        )
        handles.append(drawn[0])
        labels.append(method.label)
    ends = [row.detail["to"] for row in rows]
    length_axis(axes, [*ends, *([original_length] if original_length else [])], "position in the text, up to")
    window_line(axes, original_length)
    axes.set_ylabel("loss (nats per token)")
    legend(figure, handles, labels)
    return figure
