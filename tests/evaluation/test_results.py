"""The evaluation file: its schema, what comes back from it, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalResults, EvalRow, mean_and_stderr, row_from_json
from longrope.storage import write_json_atomic
from tests.evaluation.tiny import refused

ROWS = (
    EvalRow("perplexity", "none", 256, "perplexity", 55.1, 3.5, 10),
    EvalRow("perplexity", "none", 256, "nll", 4.0, None, 1, {"from": 1, "to": 32}),
    EvalRow("needle", "yarn", 512, "answer_logprob", -0.1 - 0.2, 0.0, 30, {"depth": 1 / 3}),
)


def written(path: Path, **changes: Any) -> Path:
    document = EvalResults(ROWS, {"seed": 1}).to_json() | changes
    write_json_atomic(path, {key: value for key, value in document.items() if value is not ...})
    return path


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    EvalResults(ROWS, {"seed": 1}).save(tmp_path / "eval.json")
    found = EvalResults.load(tmp_path / "eval.json")
    assert found.rows == ROWS  # floats bit for bit
    assert found.settings == {"seed": 1}
    assert {"versions", "machine", "command"} <= found.provenance.keys()
    assert json.loads((tmp_path / "eval.json").read_text())["schema"] == "longrope.eval/1"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_neither_saved_nor_read(tmp_path: Path, value: float) -> None:
    """Releases before this one wrote null for it; a report on such a file names it."""
    row = EvalRow("perplexity", "yarn", 256, "perplexity", value, value, 10)
    results = EvalResults((row,), {"seed": 1, "dtype": "torch.float16"})
    said = r"perplexity of yarn \(perplexity\) at 256 tokens in float16 is not finite; measure it again: .*bfloat16"
    with pytest.raises(LongRopeError, match=said) as caught:
        results.save(tmp_path / "eval.json")
    assert caught.value.code == "not-finite"
    (tmp_path / "eval.json").write_text(json.dumps(results.to_json()))
    with pytest.raises(LongRopeError, match=rf"eval\.json: the {said}") as caught:
        EvalResults.load(tmp_path / "eval.json")
    assert caught.value.code == "not-finite"
    assert "\n" not in str(caught.value)


def test_rows_are_hashable_whatever_their_detail() -> None:
    assert len({*ROWS, *ROWS}) == 3
    assert ROWS[0].detail == {}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"schema": ...}, "other-schema"),
        ({"schema": "longrope.eval/2"}, "other-schema"),
        ({"settings": ...}, "damaged-file"),
        ({"settings": {}}, "damaged-file"),
        ({"settings": [1]}, "damaged-file"),
        ({"results": ...}, "damaged-file"),
        ({"results": [{"suite": "perplexity"}]}, "damaged-file"),
        ({"results": [1]}, "damaged-file"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    with refused(code, str(tmp_path / "eval.json")):
        EvalResults.load(written(tmp_path / "eval.json", **changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [("suite", 3), ("length", "256"), ("trials", 1.5), ("value", "high"), ("stderr", "low"), ("detail", []),
     ("length", True)],
)  # fmt: skip
def test_rows_with_wrong_fields_are_refused(name: str, value: Any) -> None:
    row = {"suite": "a", "scaling": "b", "length": 1, "metric": "c", "value": 1.0, "stderr": None, "trials": 1}
    with refused("damaged-file", f"{name} of a row cannot be"):
        row_from_json(row | {"detail": {}} | {name: value})


def test_losses_of_texts_come_back_and_files_without_them_are_read() -> None:
    row = EvalRow("perplexity", "yarn", 256, "perplexity", 20.0, 1.0, 2, losses={"a1": 2.9, "b2": 3.1})
    assert row_from_json(row.to_json()) == row
    assert "losses" not in EvalRow("perplexity", "yarn", 256, "perplexity", 20.0, 1.0, 2).to_json()
    for losses in ([2.9], {"a1": "2.9"}, {"a1": math.nan}, {"a1": True}):
        with refused("damaged-file", "losses of a row cannot be"):
            row_from_json(row.to_json() | {"losses": losses})


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text("# results")
    with refused("damaged-file"):
        EvalResults.load(tmp_path / "eval.json")
    with refused("missing-file"):
        EvalResults.load(tmp_path / "none.json")


def several() -> EvalResults:
    """Two lengths of two methods, with what no headline counts: the loss by position, RULER's single tasks."""
    rows = [
        EvalRow("perplexity", "none", 256, "perplexity", 55.1, 3.5, 10),
        EvalRow("perplexity", "none", 256, "nll", 4.0, None, 1, {"from": 1, "to": 32}),
        EvalRow("perplexity", "none", 512, "perplexity", math.nan, None, 10),
        EvalRow("perplexity", "longrope", 512, "perplexity", 48.25, 3.0, 10),
        EvalRow("needle", "none", 256, "accuracy", 1.0, 0.0, 3, {"depth": 0.0}),
        EvalRow("needle", "none", 256, "answer_logprob", -0.5, 0.0, 3, {"depth": 0.0}),
        EvalRow("needle", "none", 256, "accuracy", 0.0, 0.0, 1, {"depth": 1.0}),
        EvalRow("ruler", "none", 256, "score", 10.0, 0.0, 3, {"task": "vt"}),
        EvalRow("ruler", "none", 256, "score", 60.0, 0.0, 6, {"task": "mean"}),
        EvalRow("retention", "none", 256, "acc,none", 0.5, 0.0, 3, {"task": "arc"}),
    ]
    return EvalResults(tuple(rows), {"model": "tiny"})


def test_a_small_table_of_each_suite() -> None:
    results = several()
    assert results.headline("needle") == {"none": {256: 0.75}}  # the mean over needles, however many at each depth
    assert results.headline("ruler") == {"none": {256: 60.0}}
    assert str(results).splitlines() == [
        "EvalResults of tiny: 10 rows",
        "perplexity   256    512",
        "  none      55.1    nan",
        "  longrope     –  48.25",
        "needle accuracy   256",
        "  none           0.75",
        "ruler score  256",
        "  none        60",
    ]
    assert str(EvalResults((), {})) == repr(EvalResults((), {})) == "EvalResults: 0 rows"


def test_as_a_pandas_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    frame = several().to_frame()
    assert len(frame) == 10
    assert list(frame.columns[:7]) == ["suite", "scaling", "length", "metric", "value", "stderr", "trials"]
    needles = frame[(frame["suite"] == "needle") & (frame["metric"] == "accuracy")]
    assert list(needles["depth"]) == [0.0, 1.0]
    assert EvalResults((), {}).to_frame().empty
    monkeypatch.setitem(sys.modules, "pandas", None)
    with refused("missing-dependency", "pip install pandas"):
        several().to_frame()


def test_standard_error_of_a_mean() -> None:
    assert mean_and_stderr([2.0]) == (2.0, None)
    assert mean_and_stderr([1.0, 1.0, 0.0, 0.0]) == (0.5, pytest.approx(math.sqrt((4 * 0.25 / 3) / 4)))
