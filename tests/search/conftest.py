"""Fixtures of the tests about planning a search: a tiny model, texts for it, and plans of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from longrope.models.loading import LoadedModel
from longrope.models.scaled import ScaledModel
from longrope.search.config import SearchConfig
from longrope.search.methods import Plan, plan
from longrope.search.search_data import prepare_texts
from tests.search.lengths import NEEDLE_LENGTH


@pytest.fixture
def planned(loaded: LoadedModel, scaled: ScaledModel, source: list[str]) -> Callable[..., Plan]:
    """`planned(method=…)`: the plan of these options for 512 tokens."""

    def make(target_length: int = NEEDLE_LENGTH, **options: Any) -> Plan:
        chosen = SearchConfig(**options)
        texts = prepare_texts(loaded, source, target_length, chosen)
        return plan(loaded, scaled, texts, target_length, chosen)

    return make
