"""`benchmarks/smollm2.py`: its commands are ones that the command line takes, and its tables say what was measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import smollm2, smollm2_tables
from longrope.evaluation.results import EvalResults, EvalRow


def test_its_commands_are_understood(cli, tmp_path: Path) -> None:
    """Each gets as far as the model, which is not there."""
    (tmp_path / "book.txt").write_text("text")
    (tmp_path / "other.txt").write_text("text")
    (tmp_path / "out").mkdir()
    subject = str(tmp_path / "no-model.gguf"), tmp_path, tmp_path / "out"
    found = [*smollm2.stages(*subject), *smollm2.more_stages(*subject)]
    assert len(found) == 2 * len(smollm2.SEARCHES) + 4 + 2 + 6
    for stage in found:
        result = cli(*stage.words)
        assert result.code == 2
        assert any(name in result.err for name in ("no-model.gguf", "scaling.json", "out/trained")), stage.words


def test_what_was_stopped_goes_on_and_what_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt").write_text("text")
    out, run = tmp_path / "out", []
    (out / "gradient").mkdir(parents=True)
    (out / "perplexity-gradient.json").write_text("{}")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command, check: run.append(command))
    smollm2.run("model.gguf", tmp_path, out)
    assert len(run) == 2 * len(smollm2.SEARCHES) - 1 + 4 + 2
    assert [command[-1] == "--resume" for command in run] == [True] + [False] * (len(run) - 1)


def _results(path: Path, losses: dict[str, list[float]]) -> None:
    rows = []
    for name, values in losses.items():
        mean = sum(values) / len(values)
        for length in (8192, 16384):
            by_text = {f"{length} {place}": value for place, value in enumerate(values)}
            row = EvalRow("perplexity", name, length, "perplexity", math.exp(mean), 1.0, 2, losses=by_text)
            rows.append(row)
        rows.append(EvalRow("perplexity", name, 16384, "nll", mean + 1, 0.1, 2, {"from": 8192, "to": 16384}))
    EvalResults(tuple(rows), {"model": "model"}).save(path)


def test_differences_are_those_of_the_same_texts(tmp_path: Path) -> None:
    _results(tmp_path / "perplexity-gradient.json", {"none": [4.0, 5.0], "yarn": [3.0, 4.0], "found": [2.98, 3.96]})
    found, provenance = smollm2_tables.read_perplexities(tmp_path)
    assert list(found) == ["none", "yarn", "gradient"]
    assert provenance["gradient"]["versions"]
    lines = smollm2_tables.perplexity_table(found, 16384, (8192,))
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| no scaling", "| YaRN", "| longrope, gradient"]
    assert lines[3].endswith("| – |")
    assert lines[4].endswith("| 32.14 ± 1.00 | 87.36 ± 8.74 | −0.0300 ± 0.0100 |")


def test_the_page_has_the_tables_of_the_results() -> None:
    root = Path(smollm2.__file__).parents[1]
    page = (root / "docs/smollm2.md").read_text("utf-8")
    for table in (root / "benchmarks/results/smollm2.md").read_text("utf-8").strip().split("\n\n"):
        assert table in page
