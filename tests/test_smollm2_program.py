"""`benchmarks/smollm2.py`: its commands are ones that the command line takes, and its tables say what was measured."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import smollm2, smollm2_tables
from longrope.evaluation.results import EvalResults, EvalRow
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.log import LogRow, SearchLog


def test_its_commands_are_understood(cli, tmp_path: Path) -> None:
    """Each gets as far as the model, which is not there."""
    (tmp_path / "book.txt").write_text("text")
    (tmp_path / "other.txt").write_text("text")
    (tmp_path / "out").mkdir()
    subject = str(tmp_path / "no-model.gguf"), tmp_path, tmp_path / "out"
    found = [*smollm2.stages(*subject), *smollm2.more_stages(*subject), *smollm2.ramp_stages(*subject)]
    assert len(found) == 2 * len(smollm2.SEARCHES) + 4 + 2 + 5 + 2
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
    smollm2.run(smollm2.stages("model.gguf", tmp_path, out), out)
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


def test_the_best_start_of_a_search_that_was_stopped(tmp_path: Path) -> None:
    geometry = RopeGeometry(rotary_dim=4, base=1e4, original_length=8)
    folder = tmp_path / "gradient-32k"
    folder.mkdir()
    header = {"geometry": asdict(geometry), "target_length": 32}
    with SearchLog.create(folder / "search.jsonl", header) as log:
        rows: list[tuple[list[float], list[int] | None, float, tuple[float, ...] | None]] = [
            ([1.0, 4.0], [0], 3.0, None),
            ([1.0, 3.0], [0], 2.0, None),
            ([1.0, 2.0], None, 1.0, None),  # the end of a search, on all texts
            ([1.5, 2.0], [0], 0.5, (0.0, 0.0, 0.0)),
        ]
        for place, (factors, samples, loss, gradient) in enumerate(rows):
            request = {"factors": factors, "samples": samples, "attention_factor": 1.1}
            log.append(LogRow(place, place, request, loss, gradient))
    smollm2.best_ramp(tmp_path)
    scaling = RopeScaling.load(tmp_path / "ramp-32k/scaling.json")
    assert (scaling.geometry, scaling.windows[-1]) == (geometry, Window(32, (1.0, 3.0), 0, 1.1))
    assert (scaling.provenance["starts"], scaling.provenance["loss"]) == (2, 2.0)
