"""docs/python.md: its code runs, and its table of names is that of the docstrings."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import python_names
from tests.pages import run_python


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_python("docs/python.md", tmp_path) == 7
    said = capsys.readouterr().out
    assert "EvalResults of tiny" in said
    assert "expected a target length above the model's window of 256 tokens, found 8" in said


def test_the_table_is_that_of_the_docstrings() -> None:
    (found,) = python_names.TABLE.findall(python_names.PAGE.read_text("utf-8"))
    assert found == python_names.table(), "run: python scripts/python_names.py"
