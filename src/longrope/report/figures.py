"""Figures of a run, each as PNG and SVG: the factors by rotary pair, and perplexity by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longrope.evaluation.results import EvalRow, values_by_length
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window

# Okabe and Ito's palette: distinct for every common kind of colour vision.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_T = TypeVar("_T")
_SIZE = (7.0, 4.2)
_DPI = 120


def _new(title: str) -> tuple[Figure, Axes]:
    # A Figure of its own, without pyplot: no global state, no display needed.
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(paths[0], metadata={"Software": None})
    # A fixed salt and no date: the same numbers give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "longrope"}):
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def factors_figure(path: Path, geometry: RopeGeometry, windows: Mapping[str, Window], highlight: str) -> list[Path]:
    """λ by rotary pair for each named window, `highlight` drawn boldest; the critical dimension as a line."""
    figure, axes = _new("Rescale factors by rotary pair")
    pairs = range(geometry.pairs)
    for index, (name, window) in enumerate(_first(windows, highlight)):
        bold = name == highlight
        axes.plot(
            pairs,
            window.factors,
            label=name,
            color=_COLOURS[index % len(_COLOURS)],
            linewidth=2.4 if bold else 1.2,
            linestyle="-" if bold else "--",
            marker="o" if bold else None,
            markersize=3,
            zorder=3 if bold else 2,
        )
    critical = geometry.critical_dim()
    axes.axvline(critical, color="#444444", linewidth=1, linestyle=":")
    axes.annotate(
        f"critical dimension {critical}",
        (critical, 1),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=8,
        va="bottom",
    )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("rotary pair i (0 = highest frequency)")
    axes.set_ylabel("rescale factor λ")
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def perplexity_figure(path: Path, rows: Sequence[EvalRow], original_length: int, highlight: str) -> list[Path]:
    """Perplexity by length for each scaling of `rows`, with the original window as a line."""
    figure, axes = _new("Perplexity by context length, held-out books")
    names = dict.fromkeys(row.scaling for row in rows)
    for index, (name, _) in enumerate(_first(names, highlight)):
        values = values_by_length(rows, name)
        bold = name == highlight
        axes.plot(
            list(values),
            list(values.values()),
            label=name,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=6 if bold else 4,
            linewidth=2.4 if bold else 1.2,
            linestyle="-" if bold else "--",
            zorder=3 if bold else 2,
        )
    axes.axvline(original_length, color="#444444", linewidth=1, linestyle=":")
    axes.annotate(
        f"original window {original_length}",
        (original_length, 0.98),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        va="top",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("perplexity")
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def _first(items: Mapping[str, _T], highlight: str) -> list[tuple[str, _T]]:
    """The items with `highlight` first, so that its colour is always the same."""
    return sorted(items.items(), key=lambda item: item[0] != highlight)
