"""Evaluation as a whole: the same samples for all, seen texts refused, resumed runs equal to uninterrupted ones."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope.data.books import read_book
from longrope.data.sources import read_all
from longrope.evaluation import harness, passkey
from longrope.evaluation.config import SUITE_NAMES, EvalConfig, HarnessTask
from longrope.evaluation.held_out import seen_documents
from longrope.evaluation.perplexity import perplexity
from longrope.evaluation.results import EvalResults, values_by_length
from longrope.evaluation.run import SUITES, evaluate, log_path
from longrope.locked import log_lines, with_checksum
from longrope.models.apply import applied_scaling, apply_scaling, remove_scaling
from longrope.models.loading import LoadedModel, open_model
from longrope.rope.scaling import RopeScaling
from tests.evaluation.tiny import Steps, refused

SMALL = EvalConfig(samples=2, trials=1, depths=2, ruler_tasks=("niah_single_1", "niah_single_2"))
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


def run(loaded: LoadedModel, texts: list[str], **more: Any) -> EvalResults:
    options: dict[str, Any] = {"suites": LONG_SUITES, "baselines": ["none"], "config": SMALL, "lengths": [256, 320]}
    return evaluate(loaded, **(options | {"data": texts, "scaling": scaling(loaded)} | more))


@pytest.fixture(scope="module")
def finished(loaded: LoadedModel, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("run") / "eval.json"
    run(loaded, texts, output=output)
    return output


@pytest.fixture(scope="module")
def whole(finished: Path) -> EvalResults:
    return EvalResults.load(finished)


def test_rows_of_every_suite_method_and_length(whole: EvalResults) -> None:
    kinds = [(row.suite, row.scaling, row.metric) for row in whole.rows]
    names = ("none", "longrope")
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
    tasks = [row.detail["task"] for row in whole.rows if row.metric == "score" and row.scaling == "longrope"]
    assert tasks == ["niah_single_1", "niah_single_2"] * 2 + ["mean", "mean"]


def test_settings_say_everything(whole: EvalResults, loaded: LoadedModel, texts: list[str]) -> None:
    settings = whole.settings
    assert settings["lengths"] == [256, 320]
    assert settings["original_length"] == 256
    assert settings["documents"] == ["part0.txt", "part1.txt"]
    assert len(settings["document_sha256"]) == 2
    assert settings["suites"]["needle"] == {"trials": 1, "depths": 2, "needles_per_document": 2, "digits": 7}
    assert settings["suites"]["ruler"]["tasks"] == ["niah_single_1", "niah_single_2"]
    assert set(settings["samples_sha256"]) == {
        f"{suite} {length}"
        for suite in ("perplexity", "passkey", "needle", "ruler niah_single_1", "ruler niah_single_2")
        for length in (256, 320)
    }
    assert "seen_documents" not in settings
    assert run(loaded, texts, suites="passkey").rows == tuple(row for row in whole.rows if row.suite == "passkey")
    assert tuple(SUITES) == SUITE_NAMES


def test_inside_the_window_a_portable_scaling_is_the_model(whole: EvalResults) -> None:
    """The same samples, bit for bit: at 256 tokens both methods compute the same."""
    own, none = (
        [row.value for row in whole.rows if row.scaling == name and row.length == 256 and row.suite != "ruler"]
        for name in ("longrope", "none")
    )
    assert own == none
    far = {row.scaling: row.value for row in whole.rows if row.metric == "perplexity" and row.length == 320}
    assert far["longrope"] != far["none"]


def test_resumed_equals_uninterrupted(
    loaded: LoadedModel, texts: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log of any number of finished tasks is gone on with; here, three passkey tasks of four are left."""
    real, calls = passkey.measure_passkeys, []
    monkeypatch.setattr(passkey, "measure_passkeys", lambda *args, **more: calls.append(args) or real(*args, **more))
    output, whole = tmp_path / "eval.json", EvalResults.load(finished)
    lines = log_path(finished).read_text().splitlines(keepends=True)
    log_path(output).write_text("".join(line for line in lines if '"suite": "passkey"' not in line or line == lines[5]))
    steps = Steps()
    again = run(loaded, texts, output=output, resume=True, callbacks=steps)
    assert again.rows == whole.rows == EvalResults.load(output).rows
    assert again.settings == whole.settings
    assert len(calls) == 3
    assert steps.taken == steps.announced > 0
    assert sorted(log_path(output).read_text().splitlines()) == sorted(log_path(finished).read_text().splitlines())
    output.unlink()
    assert run(loaded, texts, output=output, resume=True).rows == whole.rows
    assert len(calls) == 3  # nothing is left to measure


def test_a_result_on_other_samples_is_refused(
    loaded: LoadedModel, texts: list[str], finished: Path, tmp_path: Path
) -> None:
    """Samples may differ though all settings agree: another version of the code may draw them."""
    output = tmp_path / "eval.json"
    lines = log_path(finished).read_text().splitlines(keepends=True)
    (_, line), wrong = log_lines((lines[0] + lines[1]).encode())
    assert wrong is None
    log_path(output).write_text(
        lines[0] + with_checksum(line.replace('"samples_sha256": "', '"samples_sha256": "0')) + "\n"
    )
    with refused("other-run", "on other samples"):
        run(loaded, texts, output=output, resume=True)


def test_what_is_stopped_has_kept_what_it_finished(
    loaded: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = passkey.measure_passkeys, []

    def stopping(*args: Any, **more: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(passkey, "measure_passkeys", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(loaded, texts, suites="passkey", output=tmp_path / "eval.json")
    assert len(log_path(tmp_path / "eval.json").read_text().splitlines()) == 1 + 2
    assert not (tmp_path / "eval.json").exists()
    assert applied_scaling(loaded.model) is None


def test_another_runs_log_is_refused_before_anything_is_measured(
    loaded: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "eval.json"
    options = {"suites": "passkey", "lengths": [256, 320], "output": output}
    run(loaded, texts, **options)
    before = log_path(output).read_bytes()
    output.unlink()
    for change, differing in (
        ({"seed": 1}, "seed"),
        ({"scaling": scaling(loaded, 3.0)}, "against_sha256, scaling_sha256"),
        ({"config": EvalConfig(trials=3)}, "suites"),
        ({"lengths": [256]}, "lengths"),
        ({"baselines": ["pi"]}, "against"),
    ):
        with refused("other-run", f"of another evaluation: {differing} differ"):
            run(loaded, texts, **(options | {"resume": True} | change))
    with refused("output-exists", "`resume=True`"):
        run(loaded, texts, **options)
    assert log_path(output).read_bytes() == before
    with refused("not-resumable", "`output`"):
        run(loaded, texts, resume=True)


def test_a_finished_evaluation_that_is_resumed_is_left_as_it_is(
    loaded: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "eval.json"
    options = {"suites": "passkey", "lengths": [256, 320], "output": output}
    done = run(loaded, texts, **options)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with refused("output-exists"):
        run(loaded, texts, **options)
    assert run(loaded, texts, **options, resume=True).rows == done.rows
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for old, new in (('"metric": "accuracy"', '"metric": "recall"'), ('"seed": 0', '"seed": 1'), ("{", "")):
        output.write_text(before[output].decode().replace(old, new, 1))
        with refused("damaged-file", str(output), "put it back, or move it to another place"):
            run(loaded, texts, **options, resume=True)
        output.write_bytes(before[output])


def test_a_link_to_nothing_is_something(loaded: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "eval.json").symlink_to(tmp_path / "elsewhere.json")
    with refused("output-exists"):
        run(loaded, texts, output=tmp_path / "eval.json")
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


_KILLED = """
import os, signal, sys
from longrope.cli.main import run
from longrope.evaluation.task_log import TaskLog
real, calls = TaskLog.append, []
def append(self, result):
    real(self, result)
    calls.append(result)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
TaskLog.append = append
run(sys.argv[1:])
"""


@pytest.mark.slow
def test_kill_9_and_the_same_command_with_resume(tmp_path: Path, cli: Callable[..., Any]) -> None:
    def arguments(name: str) -> list[str]:
        return [
            "eval", "tiny", "--suite", "passkey", "--lengths", "256,320", "--against", "none,pi", "--trials", "1",
            "-o", str(tmp_path / name),
        ]  # fmt: skip

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments("eval.json")], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "eval.json").exists()
    kept = log_path(tmp_path / "eval.json")
    assert kept.name == "eval.cells.jsonl"
    assert len(kept.read_text().splitlines()) == 1 + 3
    assert cli(*arguments("eval.json")).code == 2  # nothing is overwritten
    assert cli(*arguments("eval.json"), "--resume").code == 0
    assert cli(*arguments("whole.json")).code == 0
    resumed, uninterrupted = (json.loads((tmp_path / name).read_text()) for name in ("eval.json", "whole.json"))
    for key in ("schema", "settings", "results", "versions", "machine"):
        assert resumed[key] == uninterrupted[key]


def test_texts_that_were_seen_are_refused_unless_allowed(loaded: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    hashes = [document.sha256 for document in read_all(texts)]
    searched = scaling(loaded, data={"document_sha256": hashes[:1]})
    trained = scaling(loaded, training={"stages": [{"data": {"document_sha256": {"part1.txt": hashes[1]}}}]})
    for one, name in ((searched, "part0.txt"), (trained, "part1.txt")):
        with refused("seen-texts", f"{name}; ", "`allow_seen=True`"):
            run(loaded, texts, scaling=one, suites="perplexity")
        with refused("seen-texts", name):
            perplexity(loaded, data=texts, lengths=256, scaling=one)
    searched.save(tmp_path / "other.json")
    other = {"baselines": [str(tmp_path / "other.json")], "suites": "perplexity", "lengths": [256]}
    with refused("seen-texts", "part0.txt"):
        run(loaded, texts, **other)
    allowed = run(loaded, texts, **other, allow_seen=True)
    assert allowed.settings["seen_documents"] == ["part0.txt"]
    assert "has seen: part0.txt" in allowed.settings["warnings"][0]
    assert "warnings" not in run(loaded, texts[1:], **other, allow_seen=True).settings
    # A suite without texts has none to be refused.
    assert run(loaded, [], scaling=searched, suites="passkey", lengths=256).settings["documents"] == []


def test_provenance_that_cannot_be_read_is_not_taken_for_unseen(loaded: LoadedModel) -> None:
    assert seen_documents(None) == seen_documents(scaling(loaded)) == []
    for data in ([], "a", {"files": []}, {"document_sha256": "ab"}, {"document_sha256": [1]}):
        with refused("damaged-file", "should list the SHA-256 of its data"):
            seen_documents(scaling(loaded, data=data))


# Arguments of the Python functions: a model of transformers, scalings as objects, lengths as text.


@pytest.fixture
def applied(loaded: LoadedModel) -> Iterator[RopeScaling]:
    """A scaling that the caller has applied to the model."""
    own = scaling(loaded, 3.0)
    apply_scaling(loaded.model, own)
    yield own
    remove_scaling(loaded.model)


def test_a_loaded_model_keeps_the_scaling_that_its_caller_applied(
    loaded: LoadedModel, texts: list[str], applied: RopeScaling
) -> None:
    """Without `scaling` it is what is measured; with one it is put back."""
    once = {"data": texts, "lengths": "320", "config": EvalConfig(samples=1)}
    found = evaluate(loaded.model, loaded.tokenizer, **once, baselines={"mine": scaling(loaded), "again": applied})
    values = {row.scaling: row.value for row in found.rows if row.metric == "perplexity"}
    assert list(values) == ["mine", "again", "longrope"]
    assert values["longrope"] == values["again"] != values["mine"]
    other = evaluate(loaded.model, loaded.tokenizer, **once, scaling=scaling(loaded), scaling_name="other")
    assert {row.scaling: row.value for row in other.rows if row.metric == "perplexity"} == {"other": values["mine"]}
    assert applied_scaling(loaded.model) is applied


@pytest.mark.parametrize("place", ["", "moved"])
def test_a_model_without_a_folder(loaded: LoadedModel, texts: list[str], tmp_path: Path, place: str) -> None:
    """It was built in memory, or its folder has moved since: nothing is recorded beside it."""
    model = copy.deepcopy(loaded.model)
    model.name_or_path = str(tmp_path / place) if place else ""
    once: dict[str, Any] = {"data": texts, "lengths": 256}
    expected = perplexity(loaded, **once, samples=1)
    assert perplexity(model, loaded.tokenizer, **once, samples=1) == expected
    found = evaluate(model, loaded.tokenizer, **once, config=EvalConfig(samples=1), baselines="original")
    assert values_by_length(found.rows, "original") == values_by_length(found.rows, "none") == expected


def test_training_mode_comes_back(loaded: LoadedModel, texts: list[str]) -> None:
    model = copy.deepcopy(loaded.model).train()
    frozen = model.model.layers[0].eval()
    once: dict[str, Any] = {"data": texts, "lengths": 256}
    perplexity(model, loaded.tokenizer, **once, samples=1)
    assert model.training
    original = copy.deepcopy(model)
    evaluate(model, loaded.tokenizer, **once, config=EvalConfig(samples=1), baselines="original", original=original)
    again = replace(loaded, model=model)
    model.train()
    frozen.eval()
    perplexity(again, **once, samples=1)
    assert model.training
    assert original.training
    assert not any(module.training for module in frozen.modules())


def test_baselines_may_be_scalings_paths_and_names(loaded: LoadedModel, tmp_path: Path) -> None:
    path, other = tmp_path / "own.json", tmp_path / "other.json"
    scaling(loaded).save(path)
    scaling(loaded, 1.5).save(other)
    quick: dict[str, Any] = {"suites": "passkey", "lengths": 256, "config": EvalConfig(trials=1)}
    found = evaluate(loaded, **quick, baselines=["pi", other, scaling(loaded, 3.0), scaling(loaded, 4.0)], scaling=path)
    assert [row.scaling for row in found.rows] == ["pi", str(other), "scaling-1", "scaling-2", str(path)]
    assert found.settings["against"] == ["pi", str(other), "scaling-1", "scaling-2"]


def test_perplexity_alone_gives_the_numbers_of_its_suite(whole: EvalResults, texts: list[str]) -> None:
    found = perplexity("tiny", data=texts, lengths=[256, 320], samples=2)
    assert found == values_by_length(whole.rows, "none")
    with refused("invalid-setting", "`stride`"):
        perplexity("tiny", data=texts, lengths=256, stride=256)


def test_retention_compares_short_texts_with_the_original_model(loaded: LoadedModel, texts: list[str]) -> None:
    found = run(loaded, texts, suites="retention", lengths=[], baselines="pi")
    rows = {(row.scaling, row.metric): row.value for row in found.rows}
    assert list(dict.fromkeys(row.scaling for row in found.rows)) == ["original", "pi", "longrope"]
    assert rows["original", "top1_agreement"] == rows["longrope", "top1_agreement"] == 1.0
    assert rows["original", "perplexity"] == rows["longrope", "perplexity"] < rows["pi", "perplexity"]
    assert rows["pi", "top1_agreement"] < 0.9
    assert {row.length for row in found.rows} == {256}


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HarnessTask:
    """A task file with two solved examples, and in lm-eval's place one result."""
    asked = HarnessTask(str(tmp_path / "own.yaml"), 2)
    Path(asked.name).write_text("task: own")

    class Answers:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def measure(self, _scaled: Any, _tokenizer: Any, task: HarnessTask, method: Any, **more: Any) -> list[Any]:
            found = {"results": {"own": {"acc,none": 0.5}}, "n-samples": {"own": {"effective": 3}}}
            return harness._rows(found, task, method.name, more["length"])

    monkeypatch.setattr(harness, "Harness", Answers)
    return asked


def test_another_version_of_a_task_file_is_another_evaluation(
    loaded: LoadedModel, texts: list[str], benchmark: HarnessTask, tmp_path: Path
) -> None:
    output, config = tmp_path / "eval.json", EvalConfig(samples=2, tasks=(benchmark,))
    options: dict[str, Any] = {"suites": "retention", "baselines": [], "lengths": (), "config": config}
    run(loaded, texts, **options, output=output)
    output.unlink()
    Path(benchmark.name).write_text("task: own\ndescription: other")
    with refused("other-run", "suites differ"):
        run(loaded, texts, **options, output=output, resume=True)


def test_a_benchmark_of_two_suites_is_measured_once(
    loaded: LoadedModel, texts: list[str], benchmark: HarnessTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other numbers of solved examples it is another measurement."""
    monkeypatch.setattr(harness, "OPEN_LLM", (benchmark,))
    config = EvalConfig(samples=2, tasks=(benchmark, replace(benchmark, shots=0)))
    found = run(loaded, texts, suites=("retention", "open-llm"), baselines=[], lengths=(), config=config)
    details = [row.detail for row in found.rows if row.metric == "acc,none" and row.scaling == "longrope"]
    assert details == [{"task": "own", "shots": 2}, {"task": "own", "shots": 0}]


def test_the_original_may_be_another_model(loaded: LoadedModel, texts: list[str]) -> None:
    before = open_model("tiny")
    with torch.no_grad():
        before.model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    options = {"suites": ("retention", "passkey"), "lengths": [256], "baselines": "original"}
    rows = run(loaded, texts, **options, original=before.model).rows
    agreement = {row.scaling: row.value for row in rows if row.metric == "top1_agreement"}
    assert agreement["original"] == 1.0
    assert agreement["longrope"] < 1.0
    alone = evaluate(before, data=texts, suites="retention", config=SMALL)
    ours = next(row for row in rows if (row.scaling, row.metric) == ("original", "perplexity"))
    theirs = next(row for row in alone.rows if (row.scaling, row.metric) == ("none", "perplexity"))
    assert ours.value == theirs.value
    assert [row.scaling for row in rows if row.suite == "passkey"] == ["original", "longrope"]


def test_the_original_may_be_the_model_itself(loaded: LoadedModel, texts: list[str]) -> None:
    options = {"suites": "perplexity", "lengths": 320, "baselines": "original"}
    assert run(loaded, texts, **options, original=loaded.model).rows == run(loaded, texts, **options).rows


def test_what_cannot_be_measured_is_refused_first(loaded: LoadedModel, texts: list[str], checkpoint: Path) -> None:
    own = scaling(loaded)
    fail = EvalConfig(ruler_tasks=("vt", "niah_single_1", "cwe"))
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"suites": ["magic"]}, "invalid-setting", "found magic"),
        ({"suites": []}, "invalid-setting", "found none"),
        ({"suites": "retention"}, "invalid-setting", "inside the original window"),
        ({"lengths": ["1k"]}, "", "reaches 512 tokens"),
        ({"config": EvalConfig(tasks=(HarnessTask("hellaswag"),))}, "invalid-setting", "belong to the suite retention"),
        ({"suites": "ruler", "config": fail}, "too-short-length", "`ruler_tasks` of niah_single_1, or"),
        ({"suites": "needle", "config": EvalConfig(trials=500)}, "", "2500"),
        ({"suites": "passkey", "lengths": [80, 256]}, "too-short-length", "passkey prompts of at least"),
        ({"suites": "ruler", "config": EvalConfig(qa_file=Path("none.json"))}, "missing-file", "none.json"),
        (
            {"suites": "retention", "lengths": (), "config": EvalConfig(tasks=("none.yaml",))},
            "invalid-setting",
            "lm-eval",
        ),
        ({"baselines": "none.json"}, "", "none.json"),
        ({"baselines": ["found"]}, "unknown-baseline", "found 'found'"),
        ({"baselines": {"yarn": own}}, "invalid-setting", "another name"),
        ({"baselines": {"longrope": own}}, "invalid-setting", "compared with itself"),
        ({"baselines": "checkpoint"}, "invalid-setting", "leave 'checkpoint' out"),
        ({"baselines": "second-pi"}, "invalid-setting", "leave 'second-pi' out"),
        ({"original": str(checkpoint)}, "other-tokenizer", "to have the tokenizer of tiny"),
    ]
    for change, code, fragment in cases:
        steps = Steps()
        with refused(code, fragment):
            run(loaded, texts, **change, callbacks=steps)
        assert steps == Steps()


def test_ids_without_an_embedding_are_refused(loaded: LoadedModel, checkpoint: Path, texts: list[str]) -> None:
    mixed = replace(open_model(str(checkpoint)), tokenizer=loaded.tokenizer)
    for suite in LONG_SUITES:
        with refused("", "makes token id", "its model knows"):
            evaluate(mixed, lengths=256, data=texts, suites=suite, config=SMALL)
