"""Parts of every figure: its size, its axes, ticks that a person would choose, and a legend below.

The size is that of a phone's page: text stays legible there, and a desktop shows the figure a little larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from longrope.report.styles import MethodStyle, light
from longrope.units import format_length

WIDTH = 4.4  # inches
HEIGHT = 3.0
_LEGEND_ROW = 0.17
_LETTER, _HANDLE = 4.6, 36.0  # points: a letter of a legend, and the line and gaps beside it
_NARROW_RANGE = 4.0  # a logarithmic axis below this ratio gets evenly spaced numbers, a wider one these:
_STEPS = ((20.0, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)), (1e3, (1.0, 2.0, 5.0)), (math.inf, (1.0,)))


def new_figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one axes. It is a Figure of its own, without pyplot: no global state, no display needed."""
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05))
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """A grid behind the data and no frame above or right of it."""
    axes.grid(True, which="major")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)


def line_style(method: MethodStyle) -> dict[str, Any]:
    """Keyword arguments of `Axes.plot` and `Axes.errorbar` for a method."""
    return {
        "color": light(method.tone),
        "linestyle": method.line,
        "linewidth": 2.0 if method.own else 1.1,
        "marker": method.marker,
        "markersize": 5.0 if method.own else 4.0,
        "zorder": 3.0 if method.own else 2.0,
    }


def legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    """A legend below the axes in as many columns as fit; the figure grows by its rows."""
    if not labels:
        return
    columns = next(n for n in range(min(5, len(labels)), 0, -1) if n == 1 or _width(labels, n) <= WIDTH * 72)
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * rows)
    figure.legend(
        handles, labels, loc="outside lower left", ncols=columns, frameon=False, handlelength=2.4, columnspacing=1.4
    )


def _width(labels: Sequence[str], columns: int) -> float:
    """Points that a legend in `columns` columns takes, filled column by column as matplotlib does."""
    rows, longer = divmod(len(labels), columns)
    widths, start = 0.0, 0
    for column in range(columns):
        end = start + rows + (column < longer)
        widths += max(map(len, labels[start:end])) * _LETTER + _HANDLE
        start = end
    return widths


def length_axis(axes: Axes, lengths: Iterable[float], label: str) -> None:
    """A logarithmic x axis in tokens with a tick at every power of two of the range (every second, … when many)."""
    values = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    low, high = math.ceil(math.log2(values[0]) - 1e-9), math.floor(math.log2(values[-1]) + 1e-9)
    step = max(1, math.ceil((high - low + 1) / 9))
    ticks: list[float] = [2**power for power in range(low, high + 1, step)]
    # Lengths that are no powers of two are their own ticks where there are few of them.
    if len(ticks) < 2 or (len(values) <= 6 and not set(values) <= set(ticks)):
        ticks = values
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: format_length(round(value)))
    axes.set_xlabel(label + (" (tokens; k = 1,024)" if values[-1] >= 1024 else " (tokens)"))


def log_values(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic y axis over `values`."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    axes.set_yscale("log")
    if finite:
        low, high = min(finite), max(finite)
        axes.set_ylim(low / (high / low) ** 0.06 / 1.01, high * (high / low) ** 0.06 * 1.01)
        log_ticks(axes, "y")


def log_ticks(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with round numbers for the range that it shows, evenly spaced where that is narrow."""
    if which == "x":
        axes.set_xscale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    if high / low < _NARROW_RANGE:
        ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if tick > 0]
    else:
        steps = next(steps for most, steps in _STEPS if high / low < most)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def hover(axes: Axes, x: float, y: float, text: str) -> None:
    """A text that a browser shows over the point (x, y): an invisible marker, named in the figure's `hover_texts`."""
    named = hover_texts(axes.figure)
    key = f"hover-{len(named)}"
    named[key] = text
    axes.plot([x], [y], "o", markersize=9, alpha=0, zorder=9, gid=key, clip_on=False, scalex=False, scaley=False)


def hover_texts(figure: Any) -> dict[str, str]:
    """The texts of a figure by the id of their SVG group."""
    texts: dict[str, str] = figure.__dict__.setdefault("hover_texts", {})
    return texts


def window_line(axes: Axes, original_length: int | None) -> None:
    """A dotted line where the original window ends."""
    if original_length is not None:
        mark(axes, original_length, "original window")


def mark(axes: Axes, x: float, text: str, *, line: str = ":", level: int = 0) -> None:
    """A vertical line at `x`, named at its top; names of a higher `level` stand lower."""
    axes.axvline(x, color=light("quiet"), linewidth=0.9, linestyle=line, zorder=1)
    note(axes, text, (x, 1.0), (3, -2 - 10 * level), xycoords=("data", "axes fraction"), va="top")


def note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **more: Any) -> None:
    """Quiet small text, `offset` points away from `at`."""
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5, "color": light("quiet")}
    axes.annotate(text, at, xytext=offset, **style, **more)


def thinned(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` points, evenly spread, the last among them."""
    step = max(1, math.ceil(count / most))
    return np.arange((count - 1) % step, count, step)
