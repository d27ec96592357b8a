"""A search log as the report reads it: costs counted as the search counts them, and the evaluations that compare."""

from __future__ import annotations

import math

import pytest

from longrope.errors import LongRopeError
from longrope.report.tables import improvements
from longrope.report.trace import read_trace
from tests.report import runs

PROVENANCE = runs.scaling(best_loss=4.15).provenance


def read(tmp_path, rows, provenance=PROVENANCE):
    path = tmp_path / "search.jsonl"
    runs.write_log(path, rows)
    return read_trace(path, provenance)


def test_an_evolution(tmp_path):
    trace = read(tmp_path, runs.evolution())
    assert (trace.evaluations, trace.token_passes) == (80, 80 * 3 * 2048)  # three texts, and no baselines
    assert [point.token_passes for point in trace.progress] == [3 * 2048 * n for n in range(1, 81)]
    assert set(trace.baselines) == {"none", "pi", "ntk", "ntk-critical", "dynamic-ntk", "yarn"}
    losses = [point.loss for point in trace.improvements]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == min(point.loss for point in trace.progress if not math.isnan(point.loss))


def test_a_gradient_search(tmp_path):
    trace = read(tmp_path, runs.descent())
    # A stage: three races on 2 texts, 12 steps on one text forward and backward, three validations on 3 texts.
    stage = 3 * 2 + 12 * 3 + 3 * 3
    assert trace.token_passes == stage * (512 + 1024 + 2048) + 3 * 2048
    assert set(trace.series) == {("validation", length) for length in (512, 1024, 2048)} | {("search", 2048)}
    assert [point.loss for point in trace.progress] == [4.12]


def test_a_repeated_request_costs_nothing(tmp_path):
    """The factors and their gradient on the same text are two requests."""
    row = {"length": 2048, "factors": [1.0], "split": "search", "samples": [0]}
    trace = read(tmp_path, [(row, 4.0, False), (row, 4.0, True), (row, 4.0, False), (row, 4.0, True)])
    assert (trace.evaluations, trace.token_passes) == (4, (1 + 3) * 2048)


def test_a_raced_search(tmp_path):
    """Candidates are scored text by text; those scored on all three count, with the mean over them."""
    first, second, third = ({"steps": [n], "start_tokens": 0} for n in range(3))
    rows = [(one | {"samples": [0]}, loss, False) for one, loss in ((first, 4.0), (second, 4.2), (third, 5.0))]
    rows += [(one | {"samples": [1]}, loss, False) for one, loss in ((first, 4.4), (second, 4.1))]
    rows += [(one | {"samples": [2]}, loss, False) for one, loss in ((first, 4.8), (second, 4.0))]
    trace = read(tmp_path, rows)
    assert (trace.evaluations, trace.token_passes) == (7, 7 * 2048)
    assert [(point.evaluations, point.loss) for point in trace.progress] == [
        (6, pytest.approx(4.4)),
        (7, pytest.approx(4.1)),
    ]


def test_requests_after_the_search_are_not_its_cost(tmp_path):
    rows = [*runs.evolution(), ({"steps": [1], "split": "other"}, 0.1, False)]
    assert read(tmp_path, rows).token_passes == 80 * 3 * 2048


def test_the_result_is_what_the_search_chose(tmp_path):
    trace = read(tmp_path, runs.evolution())
    assert trace.improvements[-1].loss < trace.result == 4.15


@pytest.mark.parametrize("other", [False, True])
def test_the_table_of_improvements_repeats_no_loss(tmp_path, other):
    """Losses that four decimals do not tell apart are one line, in every series; another series may have it again."""
    losses = [4.2, 4.10004, 4.10003, 4.3, 4.10001, 4.05, 4.05]
    rows = [({"factors": [n], "length": 2048, "split": "search"}, loss, False) for n, loss in enumerate(losses)]
    rows += [
        ({"factors": [n], "length": 2048, "split": "validation"}, loss, False)
        for n, loss in enumerate([4.2, 4.2, 4.1, 4.2])
    ]
    table = improvements(read(tmp_path, rows), other)
    shown = [(line.cells[1].text.partition(",")[0], line.cells[2].text) for line in table.lines]
    searched = [("search", loss) for loss in ("4.2000", "4.1000", "4.0500")]
    validated = [("validation", loss) for loss in ("4.2000", "4.1000", "4.2000")]
    assert shown == (validated + searched if other else searched)


def test_what_cannot_be_counted_is_not(tmp_path):
    trace = read(tmp_path, runs.evolution(), {})
    assert not trace.counted
    assert trace.evaluations == 80


def test_a_damaged_log_is_refused(tmp_path):
    path = tmp_path / "search.jsonl"
    runs.write_log(path, runs.evolution())
    whole = path.read_text("utf-8")
    path.write_text(whole.replace('"loss": ', '"loss": 1', 1), "utf-8")
    with pytest.raises(LongRopeError, match="damaged in line 2"):
        read_trace(path, PROVENANCE)
    path.write_text(whole[:-20], "utf-8")
    with pytest.raises(LongRopeError, match="cut off"):
        read_trace(path, PROVENANCE)
    path.write_text('{"schema": "longrope.search/1", "target_length": null}\n', "utf-8")
    with pytest.raises(LongRopeError, match="expected the settings and evaluations of a search, found others"):
        read_trace(path, PROVENANCE)
