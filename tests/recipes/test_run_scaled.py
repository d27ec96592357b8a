"""A recipe for a model whose checkpoint states a scaling: it is trained on, measured and exported without a search."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from longrope.evaluation.results import EvalResults
from longrope.models.loading import LoadedModel, open_model
from longrope.recipes.run import run_recipe
from longrope.rope.scaling import RopeScaling
from tests.recipes.recipes import EVALUATE, EXPORT, SEARCH_4, TRAIN_4, recipe
from tests.train.runs import yarn_scaling


def test_trained_on_as_after_the_search(loaded: LoadedModel, tmp_path: Path) -> None:
    """A run that goes on from an exported checkpoint comes to the weights that one run would have come to."""
    whole = recipe(tmp_path, SEARCH_4, TRAIN_4, {**TRAIN_4, "seed": 1})
    run_recipe(loaded, whole, tmp_path / "whole")
    run_recipe(loaded, recipe(tmp_path, SEARCH_4, TRAIN_4, EXPORT), tmp_path / "first")
    exported = open_model(str(tmp_path / "first/03-export/checkpoint"))
    further = recipe(tmp_path, {**TRAIN_4, "seed": 1}, {**EVALUATE, "lengths": ["4x"]}, EXPORT)
    done = run_recipe(exported, further, tmp_path / "further")
    assert done.scaling.windows == RopeScaling.load(tmp_path / "whole/scaling.json").windows

    def weights(folder: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / folder / "checkpoint/model.safetensors")

    one, other = weights("whole/03-finetune-256"), weights("further/01-finetune-256")
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    assert not all(torch.equal(one[name], tensor) for name, tensor in weights("whole/02-finetune-256").items())


def test_measured_and_exported_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    """A recipe without training: the scaling beside the weights is the one that is measured and exported."""
    loaded = open_model(str(checkpoint))
    scaling = yarn_scaling(loaded)
    folder = tmp_path / "scaled"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    scaling.save(folder / "scaling.json")
    made = recipe(tmp_path, {**EVALUATE, "lengths": ["4x"], "against": []}, EXPORT)
    done = run_recipe(open_model(str(folder)), made, tmp_path / "run")
    assert done.scaling.windows == scaling.windows
    assert RopeScaling.load(tmp_path / "run/02-export/scaling.json").windows == scaling.windows
    assert EvalResults.load(tmp_path / "run/01-evaluate/eval.json").rows
