"""Evaluation as a whole: the same samples for all, seen texts refused, resumed runs equal to uninterrupted ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope.data.books import read_book
from longrope.errors import LongRopeError
from longrope.evaluation import suites_long
from longrope.evaluation.config import EvalConfig, HarnessTask
from longrope.evaluation.results import Evaluation, load_evaluation
from longrope.evaluation.run import cells_path, evaluate, seen_documents
from longrope.models.loading import LoadedModel, open_model
from longrope.rope.scaling import RopeScaling
from longrope.storage import write_json_atomic

BOOK = "book:les-miserables"
SMALL = EvalConfig(samples=2, trials=2, depths=2, ruler_tasks=("niah_single_1", "niah_single_2"))
LONG_SUITES = ("perplexity", "passkey", "needle", "ruler")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return open_model("tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of a book, short enough to be tokenised in no time."""
    folder = tmp_path_factory.mktemp("texts")
    whole = read_book("les-miserables").text
    for number in range(2):
        (folder / f"part{number}.txt").write_text(whole[number * 60_000 + 50_000 : number * 60_000 + 110_000], "utf-8")
    return [str(folder / f"part{number}.txt") for number in range(2)]


def scaling(loaded: LoadedModel, factor: float = 2.0, **provenance: Any) -> RopeScaling:
    pairs = loaded.geometry.pairs
    factors = [1.0] * (pairs // 2) + [factor] * (pairs - pairs // 2)
    return RopeScaling.extended(loaded.geometry, 512, factors, provenance=provenance)


def run(loaded: LoadedModel, texts: list[str], **more: Any) -> Evaluation:
    options: dict[str, Any] = {"suites": LONG_SUITES, "against": ["none"], "options": SMALL, "scaling_name": "found"}
    options |= {"scaling": scaling(loaded)} | more
    return evaluate(loaded, options.pop("lengths", [256, 320]), options.pop("data", texts), **options)


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, texts: list[str]) -> Evaluation:
    """A run that nothing stopped."""
    return run(loaded, texts)


def test_rows_of_every_suite_contender_and_length(whole: Evaluation) -> None:
    kinds = [(row.suite, row.scaling, row.metric) for row in whole.rows]
    names = ("none", "found")
    expected = {("perplexity", name, metric) for name in names for metric in ("perplexity", "nll")}
    expected |= {("passkey", name, "accuracy") for name in names}
    expected |= {("needle", name, metric) for name in names for metric in ("accuracy", "answer_logprob")}
    expected |= {("ruler", name, metric) for name in names for metric in ("score", "effective_length")}
    assert set(kinds) == expected
    suites = list(dict.fromkeys(row.suite for row in whole.rows))
    assert suites == list(LONG_SUITES)
    for suite in suites:  # the scaling in question is the last
        assert list(dict.fromkeys(row.scaling for row in whole.rows if row.suite == suite)) == list(names)
    depths = [row.detail for row in whole.rows if row.suite == "needle" and row.metric == "accuracy"]
    assert depths == [{"depth": 0.0}, {"depth": 1.0}] * 4
    tasks = [row.detail["task"] for row in whole.rows if row.metric == "score" and row.scaling == "found"]
    assert tasks == ["niah_single_1", "niah_single_2"] * 2 + ["mean", "mean"]


def test_settings_say_everything(whole: Evaluation, loaded: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    settings = whole.settings
    assert settings["lengths"] == [256, 320]
    assert settings["original_length"] == 256
    assert settings["documents"] == ["part0.txt", "part1.txt"]
    assert len(settings["document_sha256"]) == 2
    assert settings["suites"]["needle"] == {"trials": 2, "depths": 2, "needles_per_document": 2, "digits": 7}
    assert settings["suites"]["ruler"]["tasks"] == ["niah_single_1", "niah_single_2"]
    assert set(settings["samples_sha256"]) == {
        f"{suite} {length}"
        for suite in ("perplexity", "passkey", "needle", "ruler niah_single_1", "ruler niah_single_2")
        for length in (256, 320)
    }
    assert "seen_documents" not in settings
    write_json_atomic(tmp_path / "eval.json", whole.to_json())
    assert load_evaluation(tmp_path / "eval.json").rows == whole.rows
    assert run(loaded, texts, suites=("passkey",)).rows == [row for row in whole.rows if row.suite == "passkey"]


def test_inside_the_window_a_portable_scaling_is_the_model(whole: Evaluation) -> None:
    """The same samples, bit for bit: at 256 tokens both contenders compute the same."""
    own, none = (
        [row.value for row in whole.rows if row.scaling == name and row.length == 256 and row.suite != "ruler"]
        for name in ("found", "none")
    )
    assert own == none
    far = {row.scaling: row.value for row in whole.rows if row.metric == "perplexity" and row.length == 320}
    assert far["found"] != far["none"]


@pytest.mark.parametrize("stop_at", [0, 3])
def test_resumed_equals_uninterrupted(
    loaded: LoadedModel,
    texts: list[str],
    whole: Evaluation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    real, calls = suites_long.passkey.passkey, []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == stop_at + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(suites_long.passkey, "passkey", stopping)
    cells = tmp_path / "eval.cells.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(loaded, texts, cells=cells)
    assert len(cells.read_text().splitlines()) == 1 + 4 + stop_at
    steps: list[None] = []
    total: list[int] = []
    again = run(loaded, texts, cells=cells, resume=True, on_start=total.append, on_sample=lambda: steps.append(None))
    assert again.rows == whole.rows
    assert again.settings == whole.settings
    assert len(calls) == 4 + 1  # every cell once, and the one that was stopped
    assert len(steps) == total[0]
    assert run(loaded, texts, cells=cells, resume=True).rows == whole.rows
    assert len(calls) == 4 + 1  # nothing is left to measure


def test_another_runs_cells_are_refused_before_anything_is_measured(
    loaded: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    cells = tmp_path / "eval.cells.jsonl"
    run(loaded, texts, suites=("passkey",), cells=cells)
    before = cells.read_bytes()
    for change, differing in (
        ({"seed": 1}, "seed"),
        ({"scaling": scaling(loaded, 3.0)}, "against_sha256, scaling_sha256"),
        ({"options": EvalConfig(trials=3)}, "suites"),
        ({"lengths": [256]}, "lengths"),
        ({"against": ["pi"]}, "against"),
    ):
        with pytest.raises(LongRopeError, match=f"of another evaluation: {differing}"):
            run(loaded, texts, **({"suites": ("passkey",), "cells": cells, "resume": True} | change))
    with pytest.raises(LongRopeError, match="add --resume"):
        run(loaded, texts, suites=("passkey",), cells=cells)
    assert cells.read_bytes() == before
    with pytest.raises(LongRopeError, match="only a run with an output can be resumed"):
        run(loaded, texts, resume=True)


_KILLED = """
import os, signal, sys
from longrope.cli.main import run
from longrope.evaluation.results import CellLog
real, calls = CellLog.append, []
def append(self, cell):
    real(self, cell)
    calls.append(cell)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
CellLog.append = append
run(sys.argv[1:])
"""


def test_kill_9_and_the_same_command_with_resume(tmp_path: Path, cli: Callable[..., Any]) -> None:
    def arguments(name: str) -> list[str]:
        return [
            "eval", "tiny", "--suite", "passkey", "--lengths", "256,320", "--against", "none,pi", "--trials", "2",
            "-o", str(tmp_path / name),
        ]  # fmt: skip

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments("eval.json")], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "eval.json").exists()
    kept = cells_path(tmp_path / "eval.json")
    assert kept.name == "eval.cells.jsonl"
    assert len(kept.read_text().splitlines()) == 1 + 3
    assert cli(*arguments("eval.json")).code == 2  # nothing is overwritten
    assert cli(*arguments("eval.json"), "--resume").code == 0
    assert cli(*arguments("whole.json")).code == 0
    resumed, uninterrupted = (json.loads((tmp_path / name).read_text()) for name in ("eval.json", "whole.json"))
    for key in ("schema", "settings", "results", "versions", "machine"):
        assert resumed[key] == uninterrupted[key]


def test_texts_that_were_seen_are_refused_unless_told_so(loaded: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    from longrope.data.sources import read_all

    hashes = [document.sha256 for document in read_all(texts)]
    searched = scaling(loaded, data={"document_sha256": hashes[:1]})
    trained = scaling(loaded, training={"stages": [{"data": {"document_sha256": {"part1.txt": hashes[1]}}}]})
    for one, name in ((searched, "part0.txt"), (trained, "part1.txt")):
        with pytest.raises(LongRopeError, match=rf"{name}; evaluate on other documents, or add --allow-seen"):
            run(loaded, texts, scaling=one, suites=("perplexity",))
    searched.save(tmp_path / "other.json")
    other = {"against": [str(tmp_path / "other.json")], "suites": ("perplexity",), "lengths": [256]}
    with pytest.raises(LongRopeError, match=r"part0\.txt"):
        run(loaded, texts, **other)
    allowed = run(loaded, texts, **other, allow_seen=True)
    assert allowed.settings["seen_documents"] == ["part0.txt"]
    assert "has seen: part0.txt" in allowed.settings["warnings"][0]
    assert "warnings" not in run(loaded, texts[1:], **other, allow_seen=True).settings
    # A suite without texts has none to be refused.
    assert run(loaded, [], scaling=searched, suites=("passkey",)).settings["documents"] == []


def test_provenance_that_cannot_be_read_is_not_taken_for_unseen(loaded: LoadedModel) -> None:
    assert seen_documents(None) == seen_documents(scaling(loaded)) == []
    for data in ([], "a", {"files": []}, {"document_sha256": "ab"}, {"document_sha256": [1]}):
        with pytest.raises(LongRopeError, match="should list the SHA-256 of its data"):
            seen_documents(scaling(loaded, data=data))


def test_retention_holds_short_texts_against_the_original_model(loaded: LoadedModel, texts: list[str]) -> None:
    found = run(loaded, texts, suites=("retention",), lengths=[], against=["pi"])
    rows = {(row.scaling, row.metric): row.value for row in found.rows}
    assert list(dict.fromkeys(row.scaling for row in found.rows)) == ["original", "pi", "found"]
    assert rows["original", "top1_agreement"] == rows["found", "top1_agreement"] == 1.0
    assert rows["original", "perplexity"] == rows["found", "perplexity"] < rows["pi", "perplexity"]
    assert rows["pi", "top1_agreement"] < 0.9
    assert {row.length for row in found.rows} == {256}


def test_the_original_may_be_another_model(loaded: LoadedModel, texts: list[str]) -> None:
    before = open_model("tiny")
    with torch.no_grad():
        before.model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    options = {"suites": ("retention", "passkey"), "lengths": [256], "against": ["original"], "original": before}
    rows = run(loaded, texts, **options).rows
    agreement = {row.scaling: row.value for row in rows if row.metric == "top1_agreement"}
    assert agreement["original"] == 1.0
    assert agreement["found"] < 1.0
    alone = evaluate(before, [], texts, suites=["retention"], options=SMALL)
    ours = next(row for row in rows if (row.scaling, row.metric) == ("original", "perplexity"))
    theirs = next(row for row in alone.rows if (row.scaling, row.metric) == ("none", "perplexity"))
    assert ours.value == theirs.value
    assert [row.scaling for row in rows if row.suite == "passkey"] == ["original", "found"]


def test_what_cannot_be_measured_is_refused_first(loaded: LoadedModel, texts: list[str]) -> None:
    fail = EvalConfig(ruler_tasks=("vt", "niah_single_1", "cwe"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"suites": ["magic"]}, "expected suites of perplexity, passkey, .*, open-llm; found magic"),
        ({"suites": []}, "found none"),
        ({"lengths": []}, "expected lengths"),
        ({"suites": ["retention"]}, "measure inside the original window; leave the lengths out"),
        ({"lengths": [1024]}, "reaches 512 tokens"),
        ({"options": EvalConfig(tasks=(HarnessTask("hellaswag"),))}, "tasks belong to the suite retention"),
        (
            {"suites": ["ruler"], "options": fail},
            r"vt needs at least .*cwe needs at least .*measured is niah_single_1$",
        ),
        ({"suites": ["needle"], "options": EvalConfig(trials=500)}, "need 2500 samples"),
        ({"suites": ["passkey"], "lengths": [80, 256]}, "passkey prompts of at least"),
        ({"against": ["found"]}, "expected none, .*found 'found'"),
    ]
    for change, message in cases:
        steps: list[int] = []
        with pytest.raises(LongRopeError, match=message):
            run(loaded, texts, **change, on_start=steps.append)
        assert steps == []


@pytest.mark.parametrize("suite", LONG_SUITES)
def test_ids_without_an_embedding_are_refused(
    loaded: LoadedModel, checkpoint: Path, texts: list[str], suite: str
) -> None:
    mixed = replace(open_model(str(checkpoint)), tokenizer=loaded.tokenizer)
    with pytest.raises(LongRopeError, match=r"makes token id .* give the model's own"):
        evaluate(mixed, [256], texts, suites=[suite], options=SMALL)


@pytest.mark.parametrize(
    "wrong",
    [{"trials": 0}, {"depths": 0}, {"needles": 0}, {"samples": 0}, {"threshold": 0.0}, {"threshold": 101.0},
     {"share": 1.5}, {"ruler_tasks": ("magic",)}, {"ruler_tasks": ("qa_1",)}, {"task_limit": 0}],
)  # fmt: skip
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LongRopeError):
        EvalConfig(**wrong)


def test_ruler_tasks_come_in_rulers_order() -> None:
    assert EvalConfig(ruler_tasks=("vt", "niah_single_1")).chosen_ruler_tasks == ("niah_single_1", "vt")
    assert "qa_1" not in EvalConfig().chosen_ruler_tasks
    assert EvalConfig(qa_file=Path("qa.json")).chosen_ruler_tasks[-1] == "qa_1"
