"""A recipe for a model whose checkpoint states a scaling: it is trained on, measured and exported without a search."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longrope.errors import LongRopeError
from longrope.evaluation.held_out import seen_documents
from longrope.evaluation.results import EvalResults
from longrope.export.source import find_source, measured_stages
from longrope.models.checkpoint_files import RECORD
from longrope.models.loading import LoadedModel, open_model
from longrope.recipes.run import run_recipe
from longrope.rope.scaling import RopeScaling
from longrope.train.finetune import finetune
from tests.recipes.recipes import EVALUATE, EXPORT, SEARCH_4, SEARCH_8, TRAIN_4, TRAIN_8, recipe
from tests.train.runs import training, write_texts, yarn_scaling

INSIDE = {**EVALUATE, "lengths": ["4x"], "against": []}


@pytest.fixture(scope="module")
def runs(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`: two trainings in one run; `first`: a run with the first of them; `further`: one on from its export."""
    folder = tmp_path_factory.mktemp("runs")
    run_recipe(loaded, recipe(folder, SEARCH_4, TRAIN_4, {**TRAIN_4, "seed": 1}), folder / "whole")
    run_recipe(loaded, recipe(folder, SEARCH_4, TRAIN_4, EXPORT), folder / "first")
    further = recipe(folder, {**TRAIN_4, "seed": 1}, INSIDE, EXPORT)
    run_recipe(open_model(str(folder / "first/03-export/checkpoint")), further, folder / "further")
    return folder


@pytest.fixture
def extended(checkpoint: Path, tmp_path: Path) -> Path:
    """A model folder with a scaling.json beside its weights."""
    folder = tmp_path / "extended"
    shutil.copytree(checkpoint, folder)
    yarn_scaling(open_model(str(checkpoint))).save(folder / "scaling.json")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint/model.safetensors")


def test_trained_on_as_in_one_run(runs: Path) -> None:
    """A run that goes on from an exported checkpoint comes to the weights that one run would have come to."""
    assert (
        RopeScaling.load(runs / "further/scaling.json").windows == RopeScaling.load(runs / "whole/scaling.json").windows
    )
    one, other = weights(runs / "whole/03-finetune-256"), weights(runs / "further/01-finetune-256")
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    assert not all(torch.equal(one[name], tensor) for name, tensor in weights(runs / "whole/02-finetune-256").items())


def test_the_texts_of_both_trainings_are_known(runs: Path) -> None:
    """They are carried through the export: no evaluation on them, of the model or of a run that trains it on."""
    first = RopeScaling.load(runs / "first/scaling.json")
    tuned = runs / "further/01-finetune-256"
    assert set(seen_documents(first)) <= set(seen_documents(RopeScaling.load(tuned / "scaling.json"))) != set()
    again = recipe(runs, {**TRAIN_4, "seed": 2, "data": ["other.txt"]}, {**INSIDE, "data": ["texts.txt"]})
    for model in (runs / "first/03-export/checkpoint", tuned):
        with pytest.raises(
            LongRopeError, match=r"stage 2 \(evaluate\): expected evaluation texts that the search has not"
        ):
            run_recipe(open_model(str(model)), again, runs / "again")
        assert not (runs / "again").exists()


def test_weights_that_were_trained_on_are_no_export(runs: Path) -> None:
    exported, tuned = runs / "first/03-export/checkpoint", runs / "further/01-finetune-256/checkpoint"
    assert RECORD in json.loads((exported / "config.json").read_text())
    assert RECORD not in json.loads((tuned / "config.json").read_text())
    assert open_model(str(tuned)).checkpoint_scaling == RopeScaling.load(tuned / "scaling.json")


def test_the_card_of_a_recipes_export(runs: Path, loaded: LoadedModel) -> None:
    """It names the base model, every training once and in order, the method and the command of the search."""
    once, twice = (
        (runs / folder / "checkpoint/README.md").read_text() for folder in ("first/03-export", "further/03-export")
    )
    for card, trainings in ((once, 1), (twice, 2)):
        assert card.count("\n- 3 steps of rows of 256 tokens, mix long") == trainings
        assert "Nothing was trained" not in card
        assert ("Nothing had been measured" in card) == (card is once)
        assert f"# {Path(loaded.name).name}, fine-tuned, with" in card
        assert "\nMethod: longrope.\n" in card
        assert "\n- search and export: `" in card
    searched = recipe(runs / "searched", SEARCH_4, EXPORT)
    run_recipe(loaded, searched, runs / "untrained")
    assert "Nothing was trained" in (runs / "untrained/02-export/checkpoint/README.md").read_text()


def test_measured_and_exported_as_it_is(extended: Path, tmp_path: Path) -> None:
    """A recipe without training: the scaling beside the weights is the one that is measured and exported."""
    done = run_recipe(open_model(str(extended)), recipe(tmp_path, INSIDE, EXPORT), tmp_path / "run")
    windows = RopeScaling.load(extended / "scaling.json").windows
    assert done.scaling.windows == windows
    assert RopeScaling.load(tmp_path / "run/02-export/scaling.json").windows == windows
    assert EvalResults.load(tmp_path / "run/01-evaluate/eval.json").rows
    found = find_source(tmp_path / "run")
    assert found.model == str(extended)
    assert tuple(found.evidence) == EvalResults.load(tmp_path / "run/01-evaluate/eval.json").rows


def test_compared_with_the_model_as_it_came(extended: Path, tmp_path: Path) -> None:
    """`original` is the base model under its own scaling, whether the recipe trains it or not."""
    compared = {**EVALUATE, "lengths": ["4x"], "against": ["original", "checkpoint", "none"]}
    run_recipe(open_model(str(extended)), recipe(tmp_path, SEARCH_8, compared), tmp_path / "run")
    losses = {
        row.scaling: row.value
        for row in EvalResults.load(tmp_path / "run/02-evaluate/eval.json").rows
        if row.metric == "perplexity" and not row.detail
    }
    assert losses["original"] == losses["checkpoint"] != losses["none"]


def test_another_scaling_beside_the_weights_is_another_run(extended: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path, INSIDE)
    run_recipe(open_model(str(extended)), made, tmp_path / "run")
    scaling = RopeScaling.load(extended / "scaling.json")
    windows = (*scaling.windows[:-1], replace(scaling.windows[-1], attention_factor=1.5))
    replace(scaling, windows=windows).save(extended / "scaling.json")
    with pytest.raises(LongRopeError, match="differs in scaling_sha256"):
        run_recipe(open_model(str(extended)), made, tmp_path / "run")
    scaling.save(extended / "scaling.json")
    record = json.loads((tmp_path / "run/recipe.json").read_text())
    del record["scaling_sha256"]  # as before it was recorded
    (tmp_path / "run/recipe.json").write_text(json.dumps(record))
    run_recipe(open_model(str(extended)), made, tmp_path / "run")


def test_rows_under_an_earlier_window_are_refused_before_the_search(extended: Path, runs: Path, tmp_path: Path) -> None:
    """The scaling of a search keeps the windows that the model has, and short rows would be computed under those."""
    short = {**TRAIN_8, "length": "2x"}
    for model in (extended, runs / "further/01-finetune-256"):
        with pytest.raises(
            LongRopeError, match=r"stage 2 \(finetune\): expected rows that reach beyond 256 tokens.* 128"
        ):
            run_recipe(open_model(str(model)), recipe(tmp_path, SEARCH_8, short), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_run_that_was_moved_is_exported_with_its_own_weights(
    runs: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scaling names the place where it was trained, where another model may lie by now."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    texts = write_texts(tmp_path / "texts")
    finetune(
        checkpoint, scaling=yarn_scaling(open_model(str(checkpoint))), data=texts, output_dir="tuned", config=training()
    )
    shutil.copytree("tuned", tmp_path / "kept/tuned")
    assert find_source(tmp_path / "kept/tuned").model == str(tmp_path / "kept/tuned/checkpoint")
    shutil.copytree(runs / "whole", tmp_path / "kept/whole")
    assert find_source(tmp_path / "kept/whole").model == str(tmp_path / "kept/whole/03-finetune-256")


def test_a_card_has_what_was_measured_of_these_weights(runs: Path) -> None:
    """Not what was measured before they were trained on under the same scaling, nor of another one."""
    further, rows = runs / "further", EvalResults.load(runs / "further/02-evaluate/eval.json").rows
    scaling = RopeScaling.load(further / "scaling.json")
    assert rows == tuple(measured_stages(further, scaling, "01-finetune-256", "03-export"))
    assert rows == tuple(measured_stages(further, scaling))
    assert measured_stages(further, scaling, "03-export") == measured_stages(further, scaling, end="02-evaluate") == []
    other = replace(scaling, windows=(replace(scaling.windows[-1], attention_factor=1.5),))
    assert measured_stages(further, other) == []
