"""NaN and infinity are never a result: every verb that computes names dtype and length and what to try, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import longrope as lr
from longrope.evaluation.results import SCHEMA
from longrope.models.loading import open_model
from tests.checkpoints import save_checkpoint
from tests.conftest import Ran
from tests.train.runs import open_fresh, yarn_scaling

DAMAGED = r"the weight model.layers.0.mlp.down_proj.weight holds NaN or infinity itself"
OVERFLOW = "try --dtype bfloat16 or --dtype float32: numbers beyond 65,504 overflow in float16"


def poisoned(folder: Path, poison: str) -> Path:
    """A checkpoint whose activations overflow in float16 and in nothing else, or with one weight that is NaN."""
    path = save_checkpoint(folder / poison)
    weights = load_file(path / "model.safetensors")
    for name in weights:
        if poison == "fp16" and ("up_proj" in name or "gate_proj" in name):
            weights[name] *= 3e4
    if poison == "nan":
        weights["model.layers.0.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("poisoned")
    return {poison: poisoned(folder, poison) for poison in ("fp16", "nan")}


@pytest.fixture(scope="module")
def scaling(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scaling") / "yarn.json"
    yarn_scaling(open_fresh(checkpoint)).save(path)
    return path


@pytest.mark.parametrize("suite", ["perplexity", "passkey", "needle", "ruler", "retention"])
def test_eval(cli: Callable[..., Ran], broken: dict[str, Path], texts: Path, suite: str, tmp_path: Path) -> None:
    length = 64 if suite == "retention" else 1024
    data = () if suite in ("passkey", "ruler") else ("--data", texts / "other.txt")
    data += (
        "--samples",
        "1",
        "--trials",
        "2",
        "--depths",
        "2",
        "--suite",
        suite,
        "-o",
        tmp_path / "eval.json",
    )
    data += () if suite == "retention" else ("--lengths", length)
    if suite == "ruler":
        data += ("--ruler-tasks", "niah_single_1")
    found = cli("eval", broken["fp16"], "--dtype", "float16", *data).refusal
    method = "original" if suite == "retention" else "none"
    assert f"{suite} of {method} at {length} tokens: the" in found
    assert "not finite (NaN or infinity) at" in found
    assert f"in float16; {OVERFLOW}" in found
    assert not (tmp_path / "eval.json").exists()
    assert list(tmp_path.iterdir()) == []
    found = cli("eval", broken["nan"], *data).refusal
    assert f"in float32: {DAMAGED} in float32; the checkpoint is damaged" in found


@pytest.mark.parametrize("method", ["gradient", "longrope", "longrope2", "cma", "hybrid"])
def test_search(cli: Callable[..., Ran], broken: dict[str, Path], texts: Path, method: str, tmp_path: Path) -> None:
    length = "512" if method == "longrope2" else "128"  # its needles need room
    given = ("--target-length", length, "--samples", "1", "--method", method, "--data", texts / "search.txt")
    found = cli("search", broken["fp16"], "--dtype", "float16", *given, "-o", tmp_path / "a").refusal
    assert "the losses of none, pi, ntk, " in found
    assert f"are all not finite (NaN or infinity) at {length} tokens in float16; {OVERFLOW}" in found
    found = cli("search", broken["nan"], *given, "-o", tmp_path / "b").refusal
    assert f"at {length} tokens in float32: {DAMAGED}" in found
    assert list(tmp_path.iterdir()) == []


def test_a_search_whose_gradients_alone_are_broken(
    checkpoint: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result would be a closed form under the name of a search."""
    from longrope.search.objective import PerplexityObjective

    whole = PerplexityObjective.loss_and_gradient
    monkeypatch.setattr(
        PerplexityObjective,
        "loss_and_gradient",
        lambda self, *given: (whole(self, *given)[0], (float("nan"),) * len(whole(self, *given)[1])),
    )
    config = lr.SearchConfig(method="gradient", steps=3, samples=1, continuation=False)
    with pytest.raises(lr.LongRopeError, match=r"none of 3 gradients at 128 .* in float32; try") as caught:
        lr.search_scaling(str(checkpoint), target_length=128, data=texts / "search.txt", config=config)
    assert caught.value.code == "not-finite"


def test_finetune(cli: Callable[..., Ran], broken: dict[str, Path], texts: Path, scaling: Path, tmp_path: Path) -> None:
    given = ("--scaling", scaling, "--length", "256", "--steps", "2", "--batch", "1", "--data", texts / "search.txt")
    found = cli("finetune", broken["fp16"], "--dtype", "float16", *given, "-o", tmp_path / "a").refusal
    assert "the loss of step 1 is not finite (nan), at 256 tokens in float16" in found
    assert OVERFLOW in found
    found = cli("finetune", broken["nan"], *given, "-o", tmp_path / "b").refusal
    assert f"training on rows of 256 tokens: {DAMAGED} in float32" in found
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_finite_ends_the_training(
    cli: Callable[..., Ran],
    checkpoint: Path,
    texts: Path,
    scaling: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss of the last step says nothing of the weights that its own gradient makes."""
    clip = torch.nn.utils.clip_grad_norm_

    def broken_clip(*given: object, **more: object) -> torch.Tensor:
        return clip(*given, **more) * float("nan")  # type: ignore[arg-type]

    monkeypatch.setattr(
        "accelerate.Accelerator.clip_grad_norm_", lambda self, *given, **more: broken_clip(*given, **more)
    )
    given = ("--scaling", scaling, "--length", "256", "--steps", "1", "--batch", "1", "--data", texts / "search.txt")
    found = cli("finetune", checkpoint, *given, "-o", tmp_path / "a").refusal
    assert "the gradient of step 1 is not finite (nan), at 256 tokens in float32" in found
    assert not list(tmp_path.rglob("checkpoint"))


def test_extend_and_export(
    cli: Callable[..., Ran], broken: dict[str, Path], texts: Path, scaling: Path, tmp_path: Path
) -> None:
    data = ("--data", texts / "search.txt", "--eval-data", texts / "other.txt", "--eval-samples", "1")
    found = cli("extend", broken["fp16"], "--dtype", "float16", "--target-length", "128", *data, "-o", tmp_path / "a")
    assert f"at 128 tokens in float16; {OVERFLOW}" in found.refusal
    found = cli("export", broken["nan"], "--scaling", scaling, "--to", "hf", "--allow-lossy", "-o", tmp_path / "b")
    assert f"in float32: {DAMAGED}" in found.refusal
    assert not (tmp_path / "b").exists()


def test_a_report_on_what_earlier_releases_measured(
    cli: Callable[..., Ran], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    path = tmp_path / "eval.json"
    data = ("--data", texts / "other.txt", "--samples", "1", "--lengths", "64", "-o", path)
    assert cli("eval", checkpoint, *data).code == 0
    document = json.loads(path.read_text())
    assert document["schema"] == SCHEMA
    document["results"][0]["value"] = None
    path.write_text(json.dumps(document))
    found = cli("report", path, "-o", tmp_path / "report.html").refusal
    assert (
        "eval.json: the perplexity of none (perplexity) at 64 tokens in float32 is not finite; measure it again"
        in found
    )
    assert not (tmp_path / "report.html").exists()


def test_python_functions(broken: dict[str, Path], texts: Path) -> None:
    loaded = open_model(str(broken["fp16"]), options=lr.LoadOptions(dtype="float16"))
    scaling = lr.yarn(loaded.model, 256)
    calls: list[Callable[[], object]] = [
        lambda: lr.perplexity(loaded, data=texts / "other.txt", lengths=64, samples=1),
        lambda: lr.evaluate(loaded, data=texts / "other.txt", lengths=128, scaling=scaling),
        lambda: lr.search_scaling(loaded, target_length=128, data=texts / "search.txt"),
        lambda: lr.generate(loaded.model, torch.arange(5, 69)[None], scaling, max_new_tokens=4),
        lambda: lr.generate(loaded.model, torch.arange(5, 69)[None], scaling, max_new_tokens=4, do_sample=True, seed=0),
    ]
    for call, length in zip(calls, (64, 128, 128, 64, 64), strict=True):
        with pytest.raises(lr.LongRopeError, match=rf"at {length} tokens in float16; try `dtype=bfloat16`") as caught:
            call()
        assert caught.value.code == "not-finite"
