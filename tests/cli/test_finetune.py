"""`longrope finetune`: what it prints, what it leaves, and that wrong input is one line and no work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ran
from tests.train.runs import open_fresh, write_texts, yarn_scaling

QUICK = ("--length", "256", "--steps", "2", "--batch", "1", "--learning-rate", "1e-3", "--warmup", "0")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("cli") / "texts")


@pytest.fixture(scope="module")
def scaling(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scaling") / "scaling.json"
    yarn_scaling(open_fresh(checkpoint)).save(path)
    return path


@pytest.fixture
def finetune(cli: Callable[..., Ran], checkpoint: Path, scaling: Path, sources: Path) -> Callable[..., Ran]:
    return lambda *more: cli("finetune", checkpoint, "--scaling", scaling, "--data", sources, *QUICK, *more)


def test_a_run_and_what_follows_it(finetune: Callable[..., Ran], cli: Callable[..., Ran], tmp_path: Path) -> None:
    out = tmp_path / "run"
    ran = finetune("--mix", "pieces:0.5,long:0.5", "-o", out)
    assert ran.code == 0, ran.err
    assert "2 steps, tokens: pieces 256, long 256" in ran.out
    assert "transformers cannot express: the attention factor 1 of the short window" in ran.out
    where, line = ran.err.splitlines()
    assert where == "computing on cpu in float32"
    assert "train: 1 of 2 steps, " in line
    assert "tokens/s" in line
    exported = cli("export", out, "--to", "hf", "--allow-lossy", "-o", tmp_path / "exported")
    assert exported.code == 0, exported.err
    assert json.loads((tmp_path / "exported/config.json").read_text())["max_position_embeddings"] == 256


def test_texts_that_were_trained_on_are_refused_by_eval(
    finetune: Callable[..., Ran], cli: Callable[..., Ran], sources: Path, tmp_path: Path
) -> None:
    ran = finetune("-o", tmp_path / "run", "--json")
    assert ran.code == 0, ran.err
    summary: dict[str, Any] = json.loads(ran.out)
    assert len(summary["curve"]) == 2
    model = summary["checkpoint"]
    arguments = ("--lengths", "64", "--samples", "1", "-o", tmp_path / "eval.json")
    seen = cli("eval", model, "--scaling", summary["scaling"], "--data", sources, *arguments)
    assert seen.code == 2
    assert "has seen" in seen.err or "has not seen" in seen.err
    seen = cli("eval", model, "--data", sources, *arguments)  # the weights alone say it too
    assert seen.code == 2


def test_tensorboard_and_trainer_arguments(finetune: Callable[..., Ran], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "more.json").write_text('{"adam_epsilon": 1e-6}')
    ran = finetune("-o", tmp_path / "run", "--log-dir", tmp_path / "logs", "--trainer", tmp_path / "more.json")
    assert ran.code == 0, ran.err
    assert list((tmp_path / "logs").glob("events.*"))
    summary = json.loads((tmp_path / "run/finetune.json").read_text())
    assert summary["settings"]["trainer"] == {"adam_epsilon": 1e-6}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--length", "1k"), "this scaling reaches 256 tokens"),
        (("--device", "tpu"), "expected --device cpu or cuda, or auto"),
        (("--adapter",), "add --lora RANK"),
        (("--trainer", "no.json"), "--trainer: cannot read"),
        (("--resume",), "there is no run in"),
        (("--offload",), "on a CPU there is nothing to move"),
    ],
)
def test_wrong_input(finetune: Callable[..., Ran], tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    ran = finetune("-o", tmp_path / "run", *more)
    assert message in ran.refusal
    assert not (tmp_path / "run").exists()


def test_the_trainers_file_must_be_an_object(finetune: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    ran = finetune("-o", tmp_path / "run", "--trainer", tmp_path / "list.json")
    assert "expected a JSON object" in ran.refusal


def test_an_output_with_something_in_it(finetune: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ran = finetune("-o", tmp_path)
    assert "not empty" in ran.refusal


def test_a_tracker_gets_the_losses_through_the_integration_of_transformers(
    finetune: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    losses: list[float] = []

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **more: Any) -> None:
            losses.extend(value for name, value in logs.items() if name == "loss")

    monkeypatch.setattr("longrope.trackers.find_spec", lambda name: name)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Recorder)
    assert finetune("--report-to", "trackio", "-o", tmp_path / "run").code == 0
    curve = json.loads((tmp_path / "run" / "finetune.json").read_text())["curve"]
    assert losses == pytest.approx([step["loss"] for step in curve])
    assert "expected wandb or trackio" in finetune("--report-to", "mlflow", "-o", tmp_path / "other").refusal
