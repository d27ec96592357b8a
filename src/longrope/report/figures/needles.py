"""Needles found by depth and length: one panel per method, all on one scale of colour, the number in every cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from longrope.evaluation.results import EvalRow
from longrope.report.figures.canvas import WIDTH, hover
from longrope.report.styles import Shown, light
from longrope.units import format_length

_COLUMNS = 2
_NARROW = 6  # more lengths than this and a panel takes the whole width
_CELL, _ABOVE, _BELOW = 0.21, 0.30, 0.55  # inches
_LOWEST = 0.55  # inches of a panel
_WHOLE_NAME = 2.3  # inches of a figure beside which the long name of the depths fits


def needle_figure(rows: Sequence[EvalRow], shown: Shown) -> Figure:
    """Draw the share of exact answers in per cent. Depth 0, the start of the text, is on top; cells not measured are
    empty."""
    lengths = sorted({row.length for row in rows})
    depths = sorted({float(row.detail["depth"]) for row in rows})
    names = [name for name in shown if any(row.scaling == name for row in rows)]
    across = 1 if len(lengths) > _NARROW or len(names) == 1 else _COLUMNS
    down = math.ceil(len(names) / across)
    panel = max(_CELL * len(depths), _LOWEST)  # room for the name of the depths beside few of them
    height = down * (panel + _ABOVE) + _BELOW
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    scale = colormaps["cividis"]
    for axes, name in zip(grid.flat, names, strict=False):
        values = np.full((len(depths), len(lengths)), np.nan)
        for row in rows:
            if row.scaling == name:
                values[depths.index(float(row.detail["depth"])), lengths.index(row.length)] = 100 * row.value
        axes.pcolormesh(values, cmap=scale, vmin=0, vmax=100, edgecolors=light("paper"), linewidth=1.0)
        for (y, x), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if value < 55 else "black"
                axes.text(x + 0.5, y + 0.5, f"{value:.0f}", color=colour, fontsize=7, ha="center", va="center")
                at = f"{format_length(lengths[x])} tokens, depth {100 * depths[y]:.0f} %"
                hover(axes, x + 0.5, y + 0.5, f"{shown[name].label}, {at}: {value:.0f} % found")
        axes.set_title(shown[name].label, fontsize=8.5, loc="left", pad=3)
        axes.set_xticks(np.arange(len(lengths)) + 0.5, [format_length(length) for length in lengths])
        axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{100 * depth:.0f}" for depth in depths])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    if not grid[0, 0].yaxis_inverted():
        grid[0, 0].invert_yaxis()  # shared: one call turns all panels
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    for axes in list(grid.flat)[max(0, len(names) - across) : len(names)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("context length (tokens; k = 1,024)", fontsize=8.5)
    long = height - _BELOW >= _WHOLE_NAME
    figure.supylabel("depth of the needle (% of the text)" if long else "depth (%)", fontsize=8.5)
    return figure
