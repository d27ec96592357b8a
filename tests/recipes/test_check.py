"""Checks before the first stage begins: texts, memory, devices, packages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel, open_model
from longrope.recipes import check as module
from longrope.recipes.check import check_recipe, stage_sources
from longrope.recipes.graph import steps
from longrope.recipes.run import run_recipe
from longrope.recipes.schema import Recipe
from longrope.rope.scaling import RopeScaling
from longrope.train.finetune import training_windows
from tests.recipes.recipes import (
    EVALUATE,
    EXPORT,
    FOLDERS,
    RECOVER,
    SEARCH_4,
    SEARCH_8,
    SEARCH_16,
    STAGES,
    TRAIN_4,
    recipe,
)
from tests.train.runs import training

NEEDLES = {"stage": "evaluate", "suites": ["needle"], "lengths": ["1x"]}


def check(loaded: LoadedModel, made: Recipe, **more: Any) -> None:
    check_recipe(loaded, made, steps(made, 64, loaded.context_length), **more)


def fails(loaded: LoadedModel, made: Recipe, **more: Any) -> str:
    with pytest.raises(LongRopeError) as error:
        check(loaded, made, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nothing_is_wrong_with_the_small_recipe(loaded: LoadedModel, tmp_path: Path) -> None:
    check(loaded, recipe(tmp_path, *STAGES))


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (
            [{**SEARCH_16, "target": "1M"}],
            "stage 1 (search): need 1 samples of 1048575 consecutive tokens of one docum",
        ),
        ([SEARCH_4, {**RECOVER, "samples": 5000}], "stage 2 (recover): need 5000 samples of 63 consecutive tokens"),
        ([SEARCH_4, {**TRAIN_4, "mix": "short:0.5,long:0.5"}], "stage 2 (finetune): "),
        ([SEARCH_4, {**TRAIN_4, "micro_batch": 10**6, "batch": 10**6}], "stage 2 (finetune): a step needs at least"),
        ([SEARCH_4, {**TRAIN_4, "offload": True}], "stage 2 (finetune): `offload` moves what a GPU"),
        ([SEARCH_4, {**TRAIN_4, "trainer": {"fsdp": True}}], "stage 2 (finetune): FSDP shards over several GPUs"),
        ([SEARCH_4, {**TRAIN_4, "trainer": {"fsdp": True}, "processes": 2}], "stage 2 (finetune): FSDP shards over"),
        ([SEARCH_4, {**TRAIN_4, "trainer": {"adam": 1}}], "stage 2 (finetune): the trainer's arguments cannot be used"),
        ([SEARCH_4, {**TRAIN_4, "trainer": {"seed": 1}}], "stage 2 (finetune): the trainer's argument seed is decided"),
        ([SEARCH_4, {**TRAIN_4, "length": "1x"}], "stage 2 (finetune): expected a `length` above the model's window"),
        ([SEARCH_4, {**EVALUATE, "lengths": ["2x"], "samples": 5000}], "stage 2 (evaluate): need 5000 samples of 127"),
        ([SEARCH_4, {**EVALUATE, "lengths": [], "against": ["nothing"]}], "stage 2 (evaluate): expected none, pi"),
        ([SEARCH_4, {**EVALUATE, "lengths": [], "against": ["no.json"]}], "stage 2 (evaluate): "),
        ([{**SEARCH_4, "data": ["no.txt"]}], "stage 1 (search): "),
    ],
)
def test_what_a_stage_would_stumble_on(
    loaded: LoadedModel, tmp_path: Path, stages: list[dict[str, Any]], says: str
) -> None:
    assert says in fails(loaded, recipe(tmp_path, *stages))


def test_adapters_need_less_than_weights(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is checked in the stage's dtype, for the trained weights; sharded only where they are."""
    checked: list[tuple[str, int, int]] = []

    def require_room(model: Any, *_: Any, shards: int, **__: Any) -> None:
        parameters = list(model.parameters())
        checked.append((str(parameters[0].dtype), sum(one.requires_grad for one in parameters), shards))

    monkeypatch.setattr(module, "require_room", require_room)
    for more in ({}, {"dtype": "float64"}, {"lora": {}}, {"processes": 2}):
        check(loaded, recipe(tmp_path, SEARCH_4, {**TRAIN_4, **more}))
    count = len(list(loaded.model.parameters()))
    expected = [("float32", count, 1), ("float64", count, 1), ("float32", 0, 1), ("float32", count, 1)]
    assert checked == [(f"torch.{dtype}", trained, shards) for dtype, trained, shards in expected]


def test_texts_that_were_seen_are_not_measured_on(loaded: LoadedModel, tmp_path: Path) -> None:
    made = recipe(tmp_path, SEARCH_4, {"stage": "evaluate", "samples": 1}, eval_data=["texts.txt"])
    assert "stage 2 (evaluate): expected evaluation texts that the search has not seen" in fails(loaded, made)


def test_a_finished_stage_is_left_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    """Its texts may be gone."""
    made = recipe(tmp_path, {**SEARCH_4, "data": ["gone.txt"]}, TRAIN_4)
    fails(loaded, made)
    check(loaded, made, finished={FOLDERS[0]})


def test_texts_are_asked_for_where_they_are_read(loaded: LoadedModel, tmp_path: Path) -> None:
    made = recipe(tmp_path, SEARCH_4, {"stage": "evaluate", "suites": ["passkey"]}, NEEDLES, EXPORT, eval_data=[])
    search, passkey, needles, export = made.stages
    assert stage_sources(loaded.name, made, passkey) == stage_sources(loaded.name, made, export) == []
    assert stage_sources(loaded.name, made, search) == [str(tmp_path / "texts.txt")]
    assert stage_sources("tiny", made, needles)[0].startswith("book:")
    with pytest.raises(LongRopeError, match=r"no texts to evaluate .* on; give `eval_data`"):
        stage_sources(loaded.name, made, needles)


def test_training_is_on_one_kind_of_device(loaded: LoadedModel, tmp_path: Path) -> None:
    other = replace(loaded, options=loaded.options.replace(device="cuda:1"))
    assert "expected `device` cpu or cuda, or auto, found 'cuda:1'" in fails(other, recipe(tmp_path, SEARCH_4, TRAIN_4))


@pytest.mark.parametrize(
    ("package", "stages"),
    [
        ("ray", [{**SEARCH_4, "workers": 1}]),
        ("accelerate", [SEARCH_4, TRAIN_4]),
        ("gguf", [SEARCH_4, {"stage": "export", "to": "gguf"}]),
    ],
)
def test_packages_that_are_missing(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, stages: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else True)
    assert f"it needs {package}, which is not installed; pip install" in fails(loaded, recipe(tmp_path, *stages))


def test_nothing_is_made_where_texts_are_too_short(loaded: LoadedModel, tmp_path: Path) -> None:
    made = recipe(tmp_path / "long", {**SEARCH_4, "target": "1M"})
    with pytest.raises(LongRopeError, match=r"the longest texts\.txt with"):
        run_recipe(loaded, made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_window_is_trained_on(loaded: LoadedModel, tmp_path: Path) -> None:
    """Under the same scaling, from the weights of the training before."""
    done = run_recipe(loaded, recipe(tmp_path, SEARCH_4, TRAIN_4, {**TRAIN_4, "steps": 2, "seed": 1}), tmp_path / "run")
    first, second = (tmp_path / "run" / name for name in ("02-finetune-256", "03-finetune-256"))
    assert RopeScaling.load(second / "scaling.json").windows == RopeScaling.load(first / "scaling.json").windows
    assert done.scaling.windows == RopeScaling.load(second / "scaling.json").windows
    before, after = (load_file(folder / "checkpoint/model.safetensors") for folder in (first, second))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    trained = RopeScaling.load(second / "scaling.json").provenance["training"]
    assert [one["model"] for one in trained] == [str(first)]


def test_rows_may_be_shorter_than_the_window(loaded: LoadedModel, tmp_path: Path) -> None:
    """LongRoPE's Mistral: rows of 16k under the windows of 128k, then of 256k."""
    rows = {"length": "2x", "steps": 1}
    stages = (SEARCH_4, SEARCH_8, {**TRAIN_4, **rows}, {**TRAIN_4, "target": "8x", **rows})
    done = run_recipe(loaded, recipe(tmp_path / "short", *stages), tmp_path / "run")
    assert [window.max_length for window in done.scaling.windows] == [512]
    assert done.stages["04-finetune-512"]["tokens"] == {"long": 2 * 128}
    tuned = open_model(str(tmp_path / "run/04-finetune-512"))
    (window,) = done.scaling.windows
    assert training_windows(tuned, done.scaling, training(length=128)) == {"long": window}  # which is trained on
    other = replace(
        done.scaling, windows=(window, replace(window, max_length=1024))
    )  # a search for 1024 keeps the window
    with pytest.raises(LongRopeError, match=r"rows of 128 tokens reaches beyond the model's 512, found one of 512"):
        training_windows(tuned, other, training(length=128))
    other = replace(done.scaling, windows=(replace(window, attention_factor=1.5),))
    with pytest.raises(LongRopeError, match=r"rows of 128 tokens reaches beyond the model's 512, found one of 512"):
        training_windows(tuned, other, training(length=128))
    with pytest.raises(LongRopeError, match=r"skip to 512 tokens reaches beyond .* or give a larger `skip_to`"):
        training_windows(tuned, other, training(length=128, skip_to=512))
    with pytest.raises(LongRopeError, match="above the model's window of 64 tokens, found 64"):
        training_windows(tuned, done.scaling, training(length=64))
