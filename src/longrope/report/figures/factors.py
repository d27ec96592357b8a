"""Rescale factors by rotary pair, against the closed forms and the critical dimensions."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from longrope.report.figures.canvas import hover, legend, line_style, mark, new_figure
from longrope.report.styles import Shown, light
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window

_FADED = 0.55


def factors_figure(
    geometry: RopeGeometry,
    windows: Mapping[str, Window],
    shown: Shown,
    further: Mapping[str, Window],
    real_critical_dim: int | None,
) -> Figure:
    """λ by rotary pair. `windows` is by method; `further` are more windows of the run's own scaling, by label.

    Lines stand at d_tcd, and at d_rcd where a search found one.
    """
    figure, axes = new_figure()
    pairs = range(geometry.pairs)
    own = next((method.tone for method in shown.values() if method.own), "vermilion")
    handles, labels = [], []
    for name, method in shown.items():
        if name not in windows:
            continue
        style = line_style(method) | {"markersize": 3.0}
        if not method.own:
            style["marker"] = ""
        (line,) = axes.plot(pairs, windows[name].factors, **style)
        if method.own:
            for pair, factor in enumerate(windows[name].factors):
                hover(axes, pair, factor, f"{method.label}, pair {pair}: λ {factor:.4g}")
        handles.append(line)
        labels.append(method.label)
    for text, window in further.items():
        (line,) = axes.plot(pairs, window.factors, color=light(own), alpha=_FADED, linewidth=1.2, linestyle=(0, (4, 2)))
        handles.append(line)
        labels.append(text)
    theoretical = geometry.critical_dim()
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.7)  # room for the names of the lines
    mark(axes, theoretical, f"critical dimension {theoretical}", level=0 if real_critical_dim is None else 1)
    if real_critical_dim is not None:
        mark(axes, real_critical_dim, f"real critical dimension {real_critical_dim}", line="-.")
    axes.set_xlabel("rotary pair i (0 turns fastest)")
    axes.set_ylabel("rescale factor λ")
    legend(figure, handles, labels)
    return figure
