"""lm-eval on a model with a scaling applied: a local task with local data, no network."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from longrope.evaluation import harness as module
from longrope.evaluation.config import HarnessTask
from longrope.evaluation.harness import OPEN_LLM, Harness
from longrope.models.scoring import token_nll
from longrope.rope.baselines import Method, closed_form_method
from longrope.rope.scaling import Window
from tests.evaluation.embedded import WINDOW, book, geometry, none, tiny, tiny_tokenizer
from tests.evaluation.tiny import refused

TEXTS = [book().text[at : at + 500] for at in (1000, 9000, 22_000)]


def write_task(folder: Path, name: str, rows: list[dict], **settings: object) -> str:
    """A task of lm-eval on disk; the path of its YAML file."""
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task | settings))  # JSON is YAML
    return str(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def rolling(tmp_path_factory: pytest.TempPathFactory) -> HarnessTask:
    """The bits per byte of three texts."""
    path = write_task(
        tmp_path_factory.mktemp("rolling"),
        "own_texts",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    return HarnessTask(path)


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> HarnessTask:
    """Which of two words goes on a text, with two solved examples."""
    rows = [{"text": text[:80], "options": [text[80:110], text[109:79:-1]], "label": 0} for text in TEXTS * 2]
    path = write_task(
        tmp_path_factory.mktemp("choices"),
        "own_choices",
        rows,
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_target="{{label}}",
        doc_to_choice="{{options}}",
        target_delimiter="",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    return HarnessTask(path, 2)


@pytest.fixture(scope="module")
def harness(rolling: HarnessTask, choices: HarnessTask) -> Harness:
    return Harness([rolling, choices])


def test_the_applied_scaling_is_what_lm_eval_measures(
    harness: Harness, rolling: HarnessTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits per byte against our own scoring of the same texts, for two windows."""
    monkeypatch.setattr(module, "_RESAMPLINGS", 0)  # its processes take seconds
    for method in (none(), closed_form_method("pi", geometry(), 4 * WINDOW)):
        (row,) = harness.measure(tiny(), tiny_tokenizer(), rolling, method, length=WINDOW)
        nll, size = 0.0, 0
        with tiny().using(method.window(WINDOW)) as model, torch.no_grad():
            for text in TEXTS:
                # lm-eval puts a BOS in front of what the tokenizer gives, BOS or not, and scores all behind it.
                ids = [tiny_tokenizer().bos_token_id, *tiny_tokenizer()(text).input_ids]
                nll += float(token_nll(model, torch.tensor([ids])).sum())
                size += len(text.encode())
        assert row.value == pytest.approx(nll / size / math.log(2), rel=1e-4)
        assert (row.suite, row.scaling, row.length, row.trials) == ("retention", method.name, WINDOW, 3)
        assert row.metric == "bits_per_byte,none"
        assert row.detail == {"task": "own_texts", "higher_is_better": False}
    assert tiny().rotaries[0].pinned is None


def test_shots_limit_and_standard_error(harness: Harness, choices: HarnessTask, capfd) -> None:
    (row,) = harness.measure(tiny(), tiny_tokenizer(), choices, none(), length=WINDOW, limit=5, batch_size=2)
    assert row.metric == "acc,none"
    assert row.detail == {"task": "own_choices", "shots": 2, "higher_is_better": True}
    assert row.trials == 5
    assert row.value == 1.0
    assert row.stderr == 0.0
    assert tiny_tokenizer().pad_token is None  # lm-eval had a copy
    assert capfd.readouterr().err == ""


def test_logits_that_are_not_finite_are_no_result(harness: Harness, choices: HarnessTask) -> None:
    """lm-eval would compare NaN with NaN, and call the first choice right."""
    with refused("not-finite", "the logits are not finite", "in float"):
        broken = Method("broken", lambda length: Window(length, (1.0,) * geometry().pairs, attention_factor=1e300))
        harness.measure(tiny(), tiny_tokenizer(), choices, broken, length=WINDOW, limit=1)
    assert not tiny().model._forward_hooks


def test_what_cannot_be_run_says_why(harness: Harness, rolling: HarnessTask, tmp_path: Path) -> None:
    path = write_task(tmp_path, "broken", [{"text": "a"}], output_type="loglikelihood_rolling", doc_to_target="{{b}}")
    with refused("runtime-fault", "lm-eval cannot run", "broken.yaml: "):
        harness.measure(tiny(), tiny_tokenizer(), HarnessTask(path), none(), length=WINDOW)
    with refused("invalid-setting", "lm-eval has no task 'none.yaml'"):
        Harness([HarnessTask("none.yaml")])
    with refused("invalid-setting"):
        Harness([rolling, HarnessTask(str(tmp_path / "other.yml"))])


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with refused("missing-dependency", 'pip install "longrope[eval]"'):
        Harness([HarnessTask("hellaswag")])


@pytest.mark.slow
def test_lm_eval_has_the_preconfigured_tasks() -> None:
    assert [str(task) for task in OPEN_LLM] == ["arc_challenge:25", "hellaswag:10", "mmlu:5", "truthfulqa_mc2:0"]
    Harness(list(OPEN_LLM))
