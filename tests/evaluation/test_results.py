"""The evaluation file: its schema, what comes back from it, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalRow, Evaluation, load_evaluation, mean_and_stderr, row_from_json
from longrope.storage import write_json_atomic

ROWS = [
    EvalRow("perplexity", "none", 256, "perplexity", 55.1, 3.5, 10),
    EvalRow("perplexity", "none", 256, "nll", 4.0, None, 1, {"from": 1, "to": 32}),
    EvalRow("needle", "yarn", 512, "answer_logprob", -0.1 - 0.2, 0.0, 30, {"depth": 1 / 3}),
]


def written(path: Path, **changes: Any) -> Path:
    document = Evaluation(ROWS, {"seed": 1}).to_json() | changes
    write_json_atomic(path, {key: value for key, value in document.items() if value is not ...})
    return path


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    found = load_evaluation(written(tmp_path / "eval.json"))
    assert found.rows == ROWS  # floats bit for bit
    assert found.settings == {"seed": 1}
    assert {"versions", "machine", "command"} <= found.provenance.keys()
    assert json.loads((tmp_path / "eval.json").read_text())["schema"] == "longrope.eval/1"


def test_rows_without_a_number_come_back_as_nan(tmp_path: Path) -> None:
    for value in (math.nan, math.inf):
        rows = [EvalRow("perplexity", "none", 256, "perplexity", value, value, 10)]
        write_json_atomic(tmp_path / f"{value}.json", Evaluation(rows, {"seed": 1}).to_json())
        (row,) = load_evaluation(tmp_path / f"{value}.json").rows
        assert math.isnan(row.value)
        assert row.stderr is None


def test_rows_are_hashable_whatever_their_detail() -> None:
    assert len({*ROWS, *ROWS}) == 3
    assert ROWS[0].detail == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": ...}, "expected an evaluation of schema 'longrope.eval/1', found None"),
        ({"schema": "longrope.eval/2"}, "found 'longrope.eval/2'"),
        ({"settings": ...}, "does not say how it was measured"),
        ({"settings": {}}, "does not say how it was measured"),
        ({"settings": [1]}, "does not say how it was measured"),
        ({"results": ...}, "expected a list of results"),
        ({"results": [{"suite": "perplexity"}]}, "expected a row of suite, scaling, length"),
        ({"results": [1]}, "expected a row"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LongRopeError, match=message) as error:
        load_evaluation(written(tmp_path / "eval.json", **changes))
    assert str(tmp_path / "eval.json") in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("suite", 3), ("length", "256"), ("trials", 1.5), ("value", "high"), ("stderr", "low"), ("detail", []),
     ("length", True)],
)  # fmt: skip
def test_rows_with_wrong_fields_are_refused(name: str, value: Any) -> None:
    row = {"suite": "a", "scaling": "b", "length": 1, "metric": "c", "value": 1.0, "stderr": None, "trials": 1}
    with pytest.raises(LongRopeError, match=f"{name} of a row cannot be"):
        row_from_json(row | {"detail": {}} | {name: value})


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text("# results")
    with pytest.raises(LongRopeError, match="is no evaluation"):
        load_evaluation(tmp_path / "eval.json")
    with pytest.raises(LongRopeError, match="cannot read the evaluation"):
        load_evaluation(tmp_path / "none.json")


def test_standard_error_of_a_mean() -> None:
    assert mean_and_stderr([2.0]) == (2.0, None)
    assert mean_and_stderr([1.0, 1.0, 0.0, 0.0]) == (0.5, pytest.approx(math.sqrt((4 * 0.25 / 3) / 4)))
