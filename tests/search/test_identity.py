"""The identity of a search changes with everything that changes its evaluations or its report, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longrope.models.loading import LoadedModel
from longrope.models.scaled import ScaledModel
from longrope.search.config import EVOLUTION, SearchConfig
from longrope.search.search_data import prepare_texts
from tests.search.conftest import Planned, planned_over

CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("longrope", {"method": "longrope2", "objective": "perplexity"}),
    ("longrope", {"max_factor": 3.0}),
    ("gradient", {"max_factor": 3.0}),
    ("hybrid", {"start_tokens": "8"}),
    ("cma", {"start_tokens": "search"}),
    ("longrope", {"objective": "needle"}),
    ("longrope", {"samples": 3}),
    ("longrope", {"seed": 1}),
    ("longrope", {"attention_factor": "1"}),
    ("longrope", {"attention_factor": "1.5"}),
    ("longrope", {"population": 16}),
    ("longrope", {"iterations": 3}),
    ("longrope", {"patience": 2}),
    ("longrope", {"start_tokens": "4"}),
    ("longrope", {"start_tokens": "search"}),
    ("longrope2", {"seed": 1}),
    ("longrope2", {"objective": "perplexity"}),
    ("longrope2", {"needle_depth": "start"}),
    ("longrope2", {"population": 16}),
    ("longrope2", {"iterations": 3}),
    ("gradient", {"seed": 1}),
    ("gradient", {"samples": 3}),
    ("gradient", {"steps": 5}),
    ("gradient", {"knots": 5}),
    ("gradient", {"knots": 6}),
    ("gradient", {"learning_rate": 0.2}),
    ("gradient", {"continuation": False}),
    ("gradient", {"learn_attention_factor": True}),
    ("gradient", {"attention_factor": "yarn"}),
    ("gradient", {"patience": 2}),
    ("longrope", {"racing": True}),
    ("longrope2", {"racing": True}),
    ("longrope", {"critical_dim": 3}),
    ("longrope2", {"critical_dim": 3}),
    ("gradient", {"critical_dim": 3}),
    ("hybrid", {"method": "gradient"}),
    ("hybrid", {"seed": 1}),
    ("hybrid", {"steps": 5}),
    ("hybrid", {"knots": 5}),
    ("hybrid", {"evaluations": 33}),
    ("cma", {"seed": 1}),
    ("cma", {"samples": 3}),
    ("cma", {"knots": 5}),
    ("cma", {"knots": 0}),
    ("cma", {"evaluations": 33}),
    ("cma", {"patience": 2}),
    ("cma", {"attention_factor": "yarn"}),
]


@pytest.mark.parametrize(("method", "change"), CHANGES)
def test_identity_changes_with_whatever_changes_the_search(
    planned: Callable[..., Planned], method: str, change: dict[str, Any]
) -> None:
    few = {"population": 8, "iterations": 2} if method in EVOLUTION else {}
    options = {"method": method, "samples": 2} | few
    before, again, after = (planned(**given).identity for given in (options, options, options | change))
    assert json.dumps(before) == json.dumps(again)
    assert json.dumps(before) != json.dumps(after)


def test_identity_changes_with_length_texts_and_model(
    planned: Callable[..., Planned], loaded: LoadedModel, scaled: ScaledModel, texts: Path
) -> None:
    options = SearchConfig(samples=2)
    before = planned(256, samples=2).identity
    assert planned(512, samples=2).identity != before
    other = prepare_texts(loaded, [str(texts / "other.txt")], 256, options)
    assert planned_over(loaded, scaled, other, 256, options).identity != before
    # Another base leaves texts, settings and stages of a gradient search as they are.
    chosen = SearchConfig(method="gradient", samples=1)
    found = prepare_texts(loaded, [str(texts / "search.txt")], 256, chosen)
    rebased = replace(loaded, geometry=replace(loaded.geometry, base=20_000.0))
    identities = [planned_over(one, scaled, found, 256, chosen).identity for one in (loaded, rebased)]
    assert identities[0] != identities[1]
