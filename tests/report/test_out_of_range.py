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
