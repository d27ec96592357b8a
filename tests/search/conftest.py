"""Fixtures of the tests about planning a search: a tiny model, texts for it, and plans of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.loading import LoadedModel, open_model
from longrope.models.scaled import ScaledModel
from longrope.rope.scaling import RopeScaling
from longrope.search.config import SearchConfig
from longrope.search.methods import Plan, plan
from longrope.search.search_data import prepare_texts
from tests.search.lengths import NEEDLE_LENGTH


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return open_model(str(checkpoint))


@pytest.fixture(scope="module")
def scaled(loaded: LoadedModel) -> Iterator[ScaledModel]:
    yield apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
    remove_scaling(loaded.model)


@pytest.fixture(scope="module")
def source(texts: Path) -> list[str]:
    return [str(texts / "search.txt")]


@pytest.fixture
def planned(loaded: LoadedModel, scaled: ScaledModel, source: list[str]) -> Callable[..., Plan]:
    """`planned(method=…)`: the plan of these options for 512 tokens."""

    def make(target_length: int = NEEDLE_LENGTH, **options: Any) -> Plan:
        chosen = SearchConfig(**options)
        texts = prepare_texts(loaded, source, target_length, chosen)
        return plan(loaded, scaled, texts, target_length, chosen)

    return make
