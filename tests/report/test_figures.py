"""Figures show the numbers they are given, with units on their axes and one colour per method."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from longrope.evaluation.results import EvalRow
from longrope.report.figures.by_length import accuracy_figure, perplexity_figure, position_figure, score_figure
from longrope.report.figures.factors import factors_figure
from longrope.report.figures.needles import needle_figure
from longrope.report.figures.search import outside, search_figure
from longrope.report.sections import closed_forms
from longrope.report.styles import OWN, TONES, light, method_styles
from longrope.report.svg import drawing
from longrope.report.trace import read_trace
from tests.report import runs

SHOWN = method_styles(["scaling.json", *(name for name in runs.METHODS if name != "scaling.json")])


@pytest.fixture(autouse=True)
def drawn():
    with drawing():
        yield


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def points(figure, colour, least=3):
    """x and y of the line of at least so many points in a colour, (2, N)."""
    lines = [line for line in figure.axes[0].lines if to_hex(line.get_color()) == colour]
    lines = [line for line in lines if len(line.get_xdata()) >= least]
    return np.array(lines[0].get_data(orig=False))


@pytest.mark.parametrize(
    ("draw", "suite", "metric", "ylabel", "scale"),
    [
        (perplexity_figure, "perplexity", "perplexity", "perplexity", 1.0),
        (accuracy_figure, "passkey", "accuracy", "exact answers (%)", 100.0),
    ],
)
def test_by_length(draw, suite, metric, ylabel, scale):
    rows = [row for row in runs.rows([suite]) if row.metric == metric]
    figure = draw(rows, SHOWN, 256)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert "tokens" in axes.get_xlabel()
    assert axes.get_ylabel() == ylabel
    assert set(labels(figure)) == {SHOWN[name].label for name in runs.METHODS}
    own = [(row.length, scale * row.value) for row in rows if row.scaling == "scaling.json"]
    np.testing.assert_allclose(points(figure, light("vermilion")).T, own)
    figure.draw_without_rendering()
    np.testing.assert_allclose(points(draw(rows[::-1], SHOWN, 256), light("vermilion")).T, own)  # lengths in any order
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["256", "512", "1k", "2k"]


def test_the_threshold_is_drawn():
    means = [row for row in runs.rows(["ruler"]) if row.detail.get("task") == "mean"]
    figure = score_figure(means, SHOWN, 256, 85.6)
    assert any(text.get_text() == "threshold 85.6" for text in figure.axes[0].texts)


def test_positions():
    rows = runs.rows(["position"])
    figure = position_figure(rows, SHOWN, 256)
    own = [(row.detail["to"], row.value) for row in rows if row.scaling == "yarn"]
    np.testing.assert_allclose(points(figure, light("ink")).T, own)
    assert figure.axes[0].get_ylabel() == "loss (nats per token)"


def test_what_is_not_finite_is_left_out():
    rows = [row for row in runs.rows(["perplexity"]) if row.scaling == "yarn"]
    broken = [replace(row, value=math.nan, stderr=None) for row in rows]
    figure = perplexity_figure([*broken[:2], *rows[2:]], SHOWN, 256)
    np.testing.assert_allclose(points(figure, light("ink"), 2).T, [(row.length, row.value) for row in rows[2:]])
    perplexity_figure(broken, SHOWN, 256).draw_without_rendering()  # an empty figure, and no error


def test_needles():
    rows = [row for row in runs.rows(["needle"]) if row.metric == "accuracy"]
    figure = needle_figure(rows, SHOWN)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == [one.label for one in SHOWN.values()]
    for name, one in SHOWN.items():
        own = {(row.detail["depth"], row.length): row.value for row in rows if row.scaling == name}
        grid = [[100 * own[depth, length] for length in runs.LENGTHS] for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
        mesh = panels[one.label].collections[0]
        np.testing.assert_allclose(mesh.get_array(), grid)
        assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 100)  # one scale for all panels
        written = [text.get_text() for text in panels[one.label].texts]
        assert written == [f"{value:.0f}" for row in grid for value in row]
    assert figure.axes[0].yaxis_inverted()  # the start of the text on top


def test_a_cell_that_was_not_measured_is_empty():
    rows = [row for row in runs.rows(["needle"]) if row.metric == "accuracy" and row.scaling == "yarn"]
    figure = needle_figure(rows[1:], {"yarn": SHOWN["yarn"]})
    assert len(figure.axes[0].texts) == len(rows) - 1


def test_factors():
    scaling = runs.scaling(3, critical_dim=10)
    windows = closed_forms(scaling) | {OWN: scaling.windows[-1]}
    shown = method_styles([OWN, *windows])
    figure = factors_figure(scaling.geometry, windows, shown, {"second": scaling.windows[1]}, 10)
    axes = figure.axes[0]
    assert labels(figure) == ["this scaling", "PI", "NTK-aware", "NTK-critical", "YaRN", "second"]
    np.testing.assert_allclose(points(figure, light("vermilion"))[1], scaling.windows[-1].factors)
    assert {text.get_text() for text in axes.texts} == {"critical dimension 13", "real critical dimension 10"}
    assert axes.get_yscale() == "log"


def test_a_search(tmp_path):
    runs.write_log(tmp_path / "search.jsonl", runs.evolution())
    trace = read_trace(tmp_path / "search.jsonl", runs.scaling(best_loss=4.131).provenance)
    shown = method_styles([OWN, *trace.baselines])
    figure = search_figure({OWN: trace}, shown)
    assert labels(figure) == [
        "this scaling, best so far",
        "one evaluation",
        "PI",
        "NTK-aware = dynamic NTK",  # the same at the target length
        "NTK-critical",
        "YaRN",
    ]
    wide, near = figure.axes
    assert near.get_xlabel() == "token passes (thousands)"
    assert wide.get_ylim()[1] > 4.8 > near.get_ylim()[1] > 4.19
    above, baselines = outside(trace)
    assert (above, baselines) == (2, ["none"])  # the one that failed, and the one of 9 nats


def test_a_search_that_found_nothing_better_has_one_panel(tmp_path):
    rows = [({"steps": [n]}, 5.0 - n / 100, False) for n in range(10)]
    runs.write_log(tmp_path / "search.jsonl", rows)
    trace = read_trace(tmp_path / "search.jsonl", runs.scaling(best_loss=4.131).provenance)
    figure = search_figure({OWN: trace}, method_styles([OWN, *trace.baselines]))
    assert len(figure.axes) == 1
    assert figure.axes[0].get_ylim()[0] < 4.19 < 4.91 < figure.axes[0].get_ylim()[1]


def test_several_searches(tmp_path):
    traces = {}
    for name, rows in (("one", runs.evolution()), ("two", runs.descent())):
        runs.write_log(tmp_path / name, rows)
        traces[name] = read_trace(tmp_path / name, runs.scaling(best_loss=4.131).provenance)
    figure = search_figure(traces, method_styles(["one", "two", "yarn"]))
    assert figure.axes[0].get_xscale() == "log"
    assert labels(figure) == ["one, best so far", "two, best so far", "YaRN"]
    figure.draw_without_rendering()
    assert len([label for label in figure.axes[-1].get_xticklabels() if label.get_text()]) >= 2


def test_colours_are_apart():
    """No two methods look the same: their colour, marker and line together are their own."""
    names = ["scaling.json", "other.json", "third.json", *SHOWN, "ntk", "ntk-critical", "dynamic-ntk", "checkpoint"]
    looks = [(one.tone, one.marker, one.line) for one in method_styles([*names, "yarn-rcd", "ntk-rcd"]).values()]
    assert len(set(looks)) == len(looks)
    assert {tone for tone, _, _ in looks} <= TONES.keys()


@pytest.mark.parametrize("depths", [1, 2, 3, 10])
@pytest.mark.parametrize("methods", [1, 2, 5])
def test_the_words_of_a_needle_figure_stay_inside_it_and_apart(depths, methods):
    names = list(SHOWN)[:methods]
    rows = [
        EvalRow("needle", name, length, "accuracy", 0.5, 0.1, 30, {"depth": place / max(1, depths - 1)})
        for name in names
        for length in runs.LENGTHS
        for place in range(depths)
    ]
    figure = needle_figure(rows, SHOWN)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    boxes = {}
    for text in (figure._supxlabel, figure._supylabel, *(axes.title for axes in figure.axes)):
        box = text.get_window_extent()
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= -1, text.get_text()
        boxes[text] = box
    assert not boxes[figure._supylabel].overlaps(boxes[figure._supxlabel])
