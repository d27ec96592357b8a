"""`longrope extend --recipe`: the plan first, then the stages; one line for wrong input, and nothing left by it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ran
from tests.recipes.recipes import EVALUATE, RECOVER, SEARCH_4, STAGES, TRAIN_4, write_recipe

QUICK = (SEARCH_4, {"stage": "evaluate", "lengths": ["4x"], "samples": 1})


@pytest.fixture
def extend(cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path) -> Callable[..., Ran]:
    """`extend(stages, …)`: with that recipe, on the random model unless another is given, into tmp_path/run."""

    def call(stages: Any, *more: object, model: object = checkpoint, out: object = tmp_path / "run") -> Ran:
        path = write_recipe(tmp_path, *stages)
        return cli("extend", *([] if model is None else [model]), "--recipe", path, "-o", out, *more)

    return call


def test_a_dry_run_is_the_plan_alone(extend: Callable[..., Ran], tmp_path: Path) -> None:
    ran = extend(STAGES, "--dry-run")
    assert ran.code == 0, ran.err
    for title in ("search 256", "search 1k", "finetune 512", "recover 64, 128", "evaluate", "export hf", "to do"):
        assert title in ran.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "recipe.yaml", "texts.txt"]


def test_the_plan_as_json(extend: Callable[..., Ran], tmp_path: Path) -> None:
    ran = extend((SEARCH_4, RECOVER), "--dry-run", "--json")
    found = json.loads(ran.out)
    assert [row["title"] for row in found["steps"]] == ["search 256", "recover 64, 128"]
    assert all(row.keys() == {"title", "tokens", "flops", "seconds", "detail", "finished"} for row in found["steps"])
    assert not (tmp_path / "run").exists()


def test_no_plan_is_printed_above_an_error(extend: Callable[..., Ran], texts: Path) -> None:
    same = texts / "search.txt"
    ran = extend((SEARCH_4, EVALUATE), "--data", same, "--eval-data", same)
    assert (ran.code, ran.out) == (2, "")


def test_a_run_and_what_goes_on_with_it(extend: Callable[..., Ran], tmp_path: Path) -> None:
    ran = extend(QUICK)
    assert ran.code == 0, ran.err
    assert ran.out.index("to do") < ran.out.index("scaling: ")  # the plan comes first
    assert "1/2 search 256" in ran.err
    assert f"report:  {tmp_path / 'run/report.html'}" in ran.out
    assert "perplexity" in ran.out
    planned = extend(QUICK, "--dry-run")
    assert planned.out.count("finished") == 2
    again = extend(QUICK, "--resume", "--json")  # which is what the command does in any case
    assert again.code == 0, again.err
    assert again.err == ""
    assert json.loads(again.out)["stages"].keys() == {"01-search-256", "02-evaluate"}


def test_the_embedded_model_is_the_recipes(extend: Callable[..., Ran], cli: Callable[..., Ran], tmp_path: Path) -> None:
    assert "is for any model; give a MODEL" in extend(QUICK, model=None).refusal
    path = write_recipe(tmp_path, {**SEARCH_4, "target": "2x"}, model="tiny", data=[], eval_data=[])
    ran = cli("extend", "--recipe", path, "--dry-run", "-o", tmp_path / "run")
    assert ran.code == 0, ran.err
    assert "on tiny, 256 tokens" in ran.out
    assert "search 512" in ran.out


def test_target_length_moves_the_longest_target_and_rounds_are_said(cli, checkpoint, tmp_path):
    path = write_recipe(tmp_path, SEARCH_4, {**TRAIN_4, "steps": 200})
    ran = cli("extend", checkpoint, "--recipe", path, "--target-length", "128", "--dry-run", "-o", tmp_path / "run")
    assert ran.code == 0, ran.err
    assert "finetune 128: rounds over its texts: long" in ran.out
    assert "longrope: warning: finetune 128 goes" in ran.err
    assert "times through its texts of the part long, above 4" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--samples", 5), "with --recipe every stage has its own settings: write --samples into the recipe"),
        (("--dtype", "bfloat16", "--lengths", "1k"), "write --lengths, --dtype into the recipe"),
        (("--workers", 2), "write --workers into the recipe"),
        (("--target-length", "64"), "the 64 tokens that the model is trained for"),
        (("--device", "abacus"), "abacus"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_options_that_a_recipe_has_no_use_for(
    extend: Callable[..., Ran], tmp_path: Path, more: tuple[object, ...], says: str
) -> None:
    ran = extend(QUICK, *more)
    assert says in (ran.err if "--data" in more else ran.refusal)
    assert ran.code == 2
    assert not (tmp_path / "run").exists()


def test_wrong_recipes(extend: Callable[..., Ran], cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path) -> None:
    assert "unknown key 'sample'" in extend(({**SEARCH_4, "sample": 1},)).refusal
    assert "stage 1 (evaluate): there is no search before it" in extend((EVALUATE,)).refusal
    assert "there is no recipe 'slow'" in cli("extend", checkpoint, "--recipe", "slow").refusal
    assert "names no texts to search" in cli("extend", checkpoint, "--recipe", "quick", "-o", tmp_path / "run").refusal
    ran = cli("extend", checkpoint, "--recipe", "quick", "--eval-data", tmp_path / "other.txt", "--data", "book:none")
    assert ran.code == 2
    assert "--dry-run prints the plan of a --recipe" in cli("extend", checkpoint, "--dry-run").refusal
    assert not (tmp_path / "run").exists()


def test_texts_that_are_too_short(extend: Callable[..., Ran], tmp_path: Path) -> None:
    ran = extend(({**SEARCH_4, "target": "16k"},))
    assert ran.code == 2
    assert ran.err.startswith("longrope: error: stage 1 (search): need 1 samples of 16383 consecutive tokens")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_and_one_of_another_run(extend: Callable[..., Ran], tmp_path: Path) -> None:
    stages = (SEARCH_4,)
    assert extend(stages).code == 0
    assert "was begun with other settings" in extend(({**SEARCH_4, "samples": 2},)).refusal
    assert "differs in model" in extend(stages, model="tiny").refusal
    with (tmp_path / "run/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process runs a recipe in" in extend(stages).refusal
