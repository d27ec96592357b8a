"""The steps of a recipe: what each is given of the ones before it, and orders that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longrope.errors import LongRopeError
from longrope.recipes.graph import Step, steps
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
    TRAIN_8,
    recipe,
)


def planned(folder: Path, *stages: dict[str, Any], reach: int = 64, scaled: bool = False) -> list[Step]:
    return steps(recipe(folder, *stages), 64, reach, scaled=scaled)


def test_what_each_is_given(tmp_path: Path) -> None:
    made = planned(tmp_path, *STAGES)
    assert tuple(step.folder for step in made) == FOLDERS
    first, second, tuned_4, tuned_8, third, recovered, evaluated, _ = FOLDERS
    assert [(step.weights, step.scaling, step.factors) for step in made] == [
        (None, None, None),
        (None, first, None),
        (None, second, first),
        (tuned_4, tuned_4, second),
        (tuned_8, tuned_8, None),
        (tuned_8, third, None),
        (tuned_8, recovered, None),
        (tuned_8, recovered, None),
    ]
    assert [step.reads for step in made] == [
        (),
        (),
        (first,),
        (tuned_4, second),
        (tuned_8,),
        (tuned_8, third),
        (tuned_8, recovered),
        (tuned_8, recovered),
    ]
    assert [(step.trained_length, step.context_length) for step in made] == [
        (64, 64),
        (64, 256),
        (64, 512),
        (256, 256),
        (512, 512),
        (512, 1024),
        (512, 1024),
        (512, 1024),
    ]
    assert evaluated not in {step.scaling for step in made}
    assert [step.title for step in made][3:] == [
        "finetune 512",
        "search 1k",
        "recover 64, 128",
        "evaluate",
        "export hf",
    ]


def test_searches_after_the_last_fine_tuning_go_on_from_each_other(tmp_path: Path) -> None:
    further = {**SEARCH_16, "target": "32x"}
    *_, second, third = planned(tmp_path, SEARCH_4, SEARCH_8, TRAIN_4, TRAIN_8, SEARCH_16, further)
    tuned, found = FOLDERS[3], FOLDERS[4]
    assert [(step.continues, step.scaling, step.starts_at, step.reads) for step in (second, third)] == [
        (True, tuned, 512, (tuned,)),
        (True, found, 1024, (tuned, found)),
    ]
    # Those before it are each for a fine-tuning; without any, each is of the model as it came.
    for stages in ([SEARCH_4, TRAIN_4, SEARCH_8, SEARCH_16, TRAIN_8], [SEARCH_4, SEARCH_8, SEARCH_16]):
        searches = [step for step in planned(tmp_path, *stages) if step.title.startswith("search")]
        assert not any(step.continues for step in searches)
        assert [step.starts_at for step in searches[1:]] == ([256, 256] if TRAIN_4 in stages else [64, 64])


def test_a_model_that_reaches_further_already(tmp_path: Path) -> None:
    """Its first target lies beyond what it was trained for; ratios are of its original window."""
    (step,) = planned(tmp_path, SEARCH_8, reach=256)
    assert (step.trained_length, step.context_length, step.scaling) == (256, 256, None)
    with pytest.raises(LongRopeError, match=r"stage 1 \(search\): expected a target above the 256 tokens"):
        planned(tmp_path, SEARCH_4, reach=256)


def test_a_window_is_trained_on(tmp_path: Path) -> None:
    """With other texts or rows: the same factors, the weights of the training before."""
    *_, again, last = planned(tmp_path, SEARCH_4, TRAIN_4, TRAIN_4, SEARCH_8)
    assert (again.folder, again.weights, again.factors) == ("03-finetune-256", "02-finetune-256", "01-search-256")
    assert (again.trained_length, again.context_length) == (256, 256)
    assert (last.weights, last.scaling, last.starts_at) == ("03-finetune-256", "03-finetune-256", 256)


def test_a_model_with_a_scaling_of_its_own(tmp_path: Path) -> None:
    """It can be trained on, measured and exported without a search; any other window needs one."""
    inside = {**EVALUATE, "lengths": ["4x"]}
    given = [
        (step.weights, step.scaling, step.factors)
        for step in planned(tmp_path, inside, TRAIN_4, TRAIN_4, SEARCH_8, TRAIN_8, EXPORT, reach=256, scaled=True)
    ]
    tuned, again, searched, last = "02-finetune-256", "03-finetune-256", "04-search-512", "05-finetune-512"
    assert given == [
        (None, None, None),
        (None, None, None),
        (tuned, tuned, None),
        (again, again, None),
        (again, searched, searched),
        (last, last, None),
    ]
    with pytest.raises(LongRopeError, match=r"stage 1 \(finetune\): there is no search for 512 before it"):
        planned(tmp_path, TRAIN_8, reach=256, scaled=True)
    with pytest.raises(LongRopeError, match=r"stage 1 \(finetune\): expected a target above the 512 tokens"):
        planned(tmp_path, TRAIN_4, reach=512, scaled=True)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([TRAIN_4], r"stage 1 \(finetune\): there is no search for 256 before it"),
        ([SEARCH_8, TRAIN_4], r"stage 2 \(finetune\): there is no search for 256 before it"),
        ([SEARCH_4, SEARCH_8, TRAIN_8, TRAIN_4], r"stage 4 \(finetune\): expected a target above the 512 tokens"),
        (
            [SEARCH_8, SEARCH_4, TRAIN_8, TRAIN_4],
            r"stage 4 \(finetune\): expected a target above the 512 tokens.* order",
        ),
        ([SEARCH_8, TRAIN_8, SEARCH_4], r"stage 3 \(search\): expected a target above the 512 tokens"),
        (
            [SEARCH_8, TRAIN_8, {**SEARCH_16, "target": "32x"}, SEARCH_16],
            r"stage 4 \(search\): expected a target above the 2048 tokens that the search before it reaches",
        ),
        ([RECOVER], r"stage 1 \(recover\): there is no search before it"),
        ([EVALUATE, SEARCH_16], r"stage 1 \(evaluate\): there is no search before it"),
        ([EXPORT], r"stage 1 \(export\): there is no search before it"),
        ([SEARCH_4, EVALUATE], r"stage 2 \(evaluate\): expected lengths up to the 256 tokens.* found 1024"),
        ([SEARCH_4, {**RECOVER, "lengths": ["4x"]}], r"stage 2 \(recover\): expected lengths from the original window"),
        ([SEARCH_4, {**RECOVER, "lengths": [32]}], r"of 64 tokens, below the 256 .*; found 32"),
        ([SEARCH_4, RECOVER, SEARCH_8], r"stage 3 \(search\): the windows that stage 2 recovers would be lost"),
        ([SEARCH_4, RECOVER, TRAIN_4], r"stage 3 \(finetune\): the windows that stage 2 recovers would be lost"),
    ],
)
def test_orders_that_cannot_be(tmp_path: Path, stages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(LongRopeError, match=says) as error:
        planned(tmp_path, *stages)
    assert "\n" not in str(error.value)


def test_an_evaluation_inside_the_window_has_no_lengths(tmp_path: Path) -> None:
    assert planned(tmp_path, SEARCH_4, {"stage": "evaluate", "suites": ["retention"]})
