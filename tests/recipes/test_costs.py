"""The costs of a recipe's stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.recipes.costs import Rates, recipe_costs
from longrope.recipes.graph import steps
from tests.recipes.recipes import SEARCH_4, SEARCH_8, recipe


def test_the_plan_counts_every_suite(loaded: LoadedModel, tmp_path: Path) -> None:
    suites = ["perplexity", "passkey", "needle", "ruler", "retention"]
    options = {"samples": 2, "trials": 3, "depths": 4, "needles": 1, "ruler_tasks": ["niah_single_1", "vt"]}
    more = {"lengths": [256], "against": ["none", "original"]}
    made = recipe(tmp_path / "suites", SEARCH_4, {"stage": "evaluate", "suites": suites, **more, **options})
    _, cost = recipe_costs(loaded, steps(made, 64, 64), Rates(1e9, 1e9))
    assert cost.tokens == 3 * 256 * (2 + 3 + 3 * 4 + 3 * 2) + 3 * 64 * 2 * 2
    sliding = recipe(
        tmp_path / "sliding", SEARCH_4, {"stage": "evaluate", "lengths": [64, 256], "samples": 1, "stride": 32}
    )
    _, cost = recipe_costs(loaded, steps(sliding, 64, 64), Rates(1e9, 1e9))
    assert cost.tokens == 256 + 64 * (1 + 192 // 32)


def test_a_plan_names_the_stage_that_cannot_be(loaded: LoadedModel, tmp_path: Path) -> None:
    made = recipe(tmp_path / "wrong", SEARCH_4, {**SEARCH_8, "attention_factor": "large"})
    with pytest.raises(LongRopeError, match=r"stage 2 \(search\): expected an `attention_factor`"):
        recipe_costs(loaded, steps(made, 64, 64), Rates(1e9, 1e9))
