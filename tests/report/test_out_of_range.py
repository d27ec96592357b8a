"""Evaluation files with values out of range or of other types: a page or one line, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ran

ROW = {
    "suite": "perplexity",
    "scaling": "own",
    "length": 128,
    "metric": "perplexity",
    "value": 5.0,
    "stderr": 0.1,
    "trials": 3,
    "detail": {},
}
VALUES: tuple[Any, ...] = (
    0,
    -1,
    10**20,
    10**400,
    1e308,
    -1e308,
    None,
    "many",
    "$x^{",
    [],
    {},
    True,
    "<b>",
    "x" * 10_000,
)


@pytest.mark.parametrize("field", ROW)
def test_a_field_of_a_row(field: str, cli: Callable[..., Ran], tmp_path: Path) -> None:
    wrong = []
    for number, value in enumerate(VALUES):
        file = tmp_path / f"{number}.json"
        rows = [ROW, ROW | {"length": 256}, ROW | {"length": 512, field: value}]
        file.write_text(json.dumps({"schema": "longrope.eval/1", "settings": {"model": "m"}, "results": rows}))
        ran = cli("report", file, "-o", tmp_path / f"{number}.html")
        one_line = ran.err.startswith("longrope: error: ") and ran.err.count("\n") == 1
        if ran.code not in (0, 2) or (ran.code == 2 and not one_line):
            wrong.append((str(value)[:30], ran.code, ran.err[-300:]))
    assert not wrong


def lengths(suite: str, metric: str, value: float, **changes: Any) -> list[dict[str, Any]]:
    """Rows of two lengths."""
    return [ROW | {"suite": suite, "metric": metric, "value": value, "length": n} | changes for n in (128, 256)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (lengths("passkey", "accuracy", 5.0), "value of a row (passkey accuracy) cannot be 5.0"),
        (lengths("needle", "accuracy", 0.5), "a row (needle accuracy) needs 'depth' in its detail, found {}"),
        (lengths("needle", "accuracy", 0.5, detail={"depth": "deep"}), "needs 'depth'"),
        (lengths("needle", "accuracy", 0.5, detail={"depth": 0.5}, trials=0), "trials of a row"),
        (lengths("ruler", "score", 50.0), "needs 'task'"),
        (lengths("ruler", "score", 101.0, detail={"task": "mean"}), "value of a row"),
        (lengths("ruler", "effective_length", 128, detail={"rule": "absolute"}), "needs 'threshold'"),
        (lengths("perplexity", "nll", 2.0, detail={"from": 0}), "needs 'to'"),
        (lengths("perplexity", "perplexity", 0.0), "value of a row"),
    ],
)
def test_a_row_that_its_metric_cannot_have(
    rows: list[dict[str, Any]], said: str, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    file = tmp_path / "eval.json"
    file.write_text(json.dumps({"schema": "longrope.eval/1", "settings": {"model": "m"}, "results": rows}))
    ran = cli("report", file, "-o", tmp_path / "report.html")
    assert ran.code == 2, ran.err
    assert said in " ".join(ran.err.split())


def test_a_name_with_dollars_is_no_formula(cli: Callable[..., Ran], tmp_path: Path) -> None:
    file, page = tmp_path / "eval.json", tmp_path / "report.html"
    rows = lengths("passkey", "accuracy", 0.5, scaling="$x^{$")
    file.write_text(json.dumps({"schema": "longrope.eval/1", "settings": {"model": "m"}, "results": rows}))
    ran = cli("report", file, "-o", page)
    assert ran.code == 0, ran.err
    assert "$x^{$" in page.read_text("utf-8")
