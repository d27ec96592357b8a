"""The progress of searches: the best loss so far against its cost, with the baselines as lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from longrope.report.figures.canvas import HEIGHT, WIDTH, hover, legend, log_ticks, note, plain, thinned
from longrope.report.styles import MethodStyle, Shown, light
from longrope.report.trace import Point, Trace
from longrope.search.evaluator import SEARCH
from longrope.units import format_length

_MOST_DOTS = 1200
_WORTH_A_PANEL = 0.5  # of the whole range: a gain of the search that takes less gets a panel of its own

Entries = dict[str, Line2D]


def search_figure(traces: Mapping[str, Trace], shown: Shown) -> Figure:
    """Best loss so far of each search, by method, and the baselines of the first one.

    With one search its evaluations are dots, and its losses on other texts or windows are a thin line of their own.
    With several, costs differ by orders of magnitude: the x axis is logarithmic. Where the baselines lie far apart, a
    second panel shows the range between the best loss and the best baseline.
    """
    everything = list(traces.values())
    counted = all(trace.counted for trace in everything)
    scale, named = _scale(everything) if counted else (1, "")
    whole = frame(everything)
    near = _near(everything, whole)
    frames = [whole] if near is None else [whole, near]
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.9 * (len(frames) - 1)), layout="constrained")
    panels = figure.subplots(len(frames), 1, sharex=True, squeeze=False)[:, 0]
    entries: Entries = {}
    for axes, limits in zip(panels, frames, strict=True):
        plain(axes)
        entries = _baselines(axes, everything[0], shown, whole)
        for name, trace in reversed(list(traces.items())):
            entries = _search(axes, trace, shown[name], counted, scale, alone=len(traces) == 1) | entries
        axes.set_ylim(*limits)
        axes.yaxis.set_major_formatter("{x:.5g}")
        axes.set_ylabel("loss (nats/token)")
        if len(traces) > 1 and counted:
            log_ticks(axes, "x")
    panels[-1].set_xlabel(f"token passes{named}" if counted else "evaluations")
    legend(figure, list(entries.values()), list(entries))
    return figure


def frame(traces: Sequence[Trace]) -> tuple[float, float]:
    """Lowest and highest loss to show: those of the results and the baselines, not of every failed candidate.

    The unscaled model's loss may be far above everything else; it does not set the frame unless it is alone.
    """
    baselines = {name: loss for trace in traces for name, loss in trace.baselines.items()}
    levels = [loss for name, loss in baselines.items() if name != "none"] or list(baselines.values())
    results = [trace.result for trace in traces if trace.result is not None]
    improved = [point.loss for trace in traces for point in trace.improvements]
    return _with_margin([*levels, *results, *improved, *_lowest(traces)])


def _lowest(traces: Sequence[Trace]) -> list[float]:
    """The lowest losses that are drawn: of one search also those on other texts and windows."""
    if len(traces) == 1:
        return [min(point.loss for point in points) for points in traces[0].series.values()]
    return [trace.improvements[-1].loss for trace in traces if trace.improvements]


def _near(traces: Sequence[Trace], whole: tuple[float, float]) -> tuple[float, float] | None:
    """The range between the best losses found and the best baseline, where that is worth a panel of its own."""
    baseline, found = traces[0].best_baseline, [trace.result for trace in traces if trace.result is not None]
    if baseline is None or not found or min(found) >= baseline[1]:
        return None
    if not any(len(trace.improvements) > 2 for trace in traces):
        return None
    low, high = _with_margin([*_lowest(traces), baseline[1] + 0.2 * (baseline[1] - min(found))])
    return (low, high) if high - low < _WORTH_A_PANEL * (whole[1] - whole[0]) else None


def _with_margin(values: Iterable[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    margin = 0.05 * (max(finite) - min(finite) or 1.0)
    return min(finite) - margin, max(finite) + margin


def outside(trace: Trace) -> tuple[int, list[str]]:
    """The number of evaluations above the frame of `trace` alone, or not finite, and the baselines there."""
    _, high = frame([trace])
    above = sum(not point.loss <= high for point in trace.progress)
    return above, [name for name, loss in trace.baselines.items() if not loss <= high]


def _baselines(axes: Axes, trace: Trace, shown: Shown, limits: tuple[float, float]) -> Entries:
    """A line per loss; baselines of the same loss share it (dynamic NTK at the target length is NTK-aware)."""
    by_loss: dict[float, list[MethodStyle]] = {}
    for name, loss in trace.baselines.items():
        if name in shown and limits[0] <= loss <= limits[1]:
            by_loss.setdefault(loss, []).append(shown[name])
    return {
        " = ".join(method.label for method in same): axes.axhline(
            loss, color=light(same[0].tone), linewidth=1.2, linestyle=same[0].line, zorder=2
        )
        for loss, same in by_loss.items()
    }


def _search(axes: Axes, trace: Trace, method: MethodStyle, counted: bool, scale: int, *, alone: bool) -> Entries:
    colour = light(method.tone)
    entries: Entries = {}

    def xs(points: Sequence[Point]) -> list[float]:
        return [(point.token_passes if counted else point.evaluations) / scale for point in points]

    if best := trace.improvements:
        ends = xs([*best, trace.progress[-1]])
        losses = [point.loss for point in best] + [best[-1].loss]
        (line,) = axes.step(ends, losses, where="post", color=colour, linewidth=2.0, zorder=4)
        entries[f"{method.label}, best so far"] = line
        for point, x in zip(best, xs(best), strict=True):
            at = f"evaluation {point.evaluations:,}" + (f", {point.token_passes:,} token passes" if counted else "")
            hover(axes, x, point.loss, f"{method.label}, {at}: best loss {point.loss:.4f}")
        if trace.result is not None:
            axes.plot(ends[-1:], [trace.result], method.marker, color=colour, markersize=6, zorder=5)
    if not alone:
        return entries
    if len(trace.progress) > 1:
        chosen = [trace.progress[index] for index in thinned(len(trace.progress), _MOST_DOTS)]
        ys = [point.loss for point in chosen]
        (dots,) = axes.plot(xs(chosen), ys, ".", color=colour, markersize=3.5, markeredgewidth=0, alpha=0.45, zorder=3)
        entries["one evaluation"] = dots
    for (split, length), points in trace.series.items():
        if (split, length) != (SEARCH, trace.target_length):
            ys = [point.loss for point in points]
            (line,) = axes.plot(xs(points), ys, ".:", color=colour, linewidth=0.9, markersize=4, zorder=3)
            entries[f"{split} texts by window"] = line
            note(axes, format_length(length), (xs(points)[0], ys[0]), (0, 5))
    return entries


def _scale(traces: Iterable[Trace]) -> tuple[int, str]:
    """The unit of token passes, and its name."""
    most = max((points[-1].token_passes for trace in traces for points in trace.series.values()), default=0)
    for size, word in ((10**12, "trillions"), (10**9, "billions"), (10**6, "millions"), (10**3, "thousands")):
        if most >= size:
            return size, f" ({word})"
    return 1, ""
