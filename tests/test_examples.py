"""The scripts under examples/ run, on the embedded model with a small budget, and stay short."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "examples"
SMALL: dict[str, dict[str, Any]] = {
    "compare_baselines": {"ratio": 2, "samples": 1},
    "extend_in_memory": {"length": 512, "texts": 1, "steps": 1, "samples": 1, "knots": 4},
    "serve_export": {},
}


def main_of(name: str) -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[..., None] = module.main
    return main


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main_of(name)(**SMALL[name])
    said = capsys.readouterr().out
    expected = {
        "compare_baselines": ("perplexity", "mine", "yarn"),
        "extend_in_memory": ("RopeScaling(256 → 512 tokens", "yarn", "It was the best of times", "ExportResult"),
        "serve_export": ("reloaded: 2048 tokens, longrope", "It was the best of times", "vllm serve extended"),
    }
    assert [part for part in expected[name] if part not in said] == []


def test_examples_are_short_and_all_of_them_run() -> None:
    assert sorted(SMALL) == sorted(path.stem for path in FOLDER.glob("*.py"))
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 40


def test_the_notebook_runs_and_shows_its_outputs(tmp_path: Path) -> None:
    stored = nbformat.read(FOLDER / "first_steps.ipynb", 4)
    codes = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in codes)
    small = {"steps=10, samples=2": "steps=1, samples=1", "samples=5": "samples=1", "target = 1024": "target = 512"}
    for cell in codes:
        for written, budget in {**small, "512, 1024]": "512]"}.items():
            cell.source = cell.source.replace(written, budget)
        cell.outputs = []
    NotebookClient(stored, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [output.get("text", "") for cell in codes for output in cell.outputs]
    assert any("EvalResults of tiny" in text for text in said)
    assert any(text.startswith("transformers 5: exact\n") for text in said)
