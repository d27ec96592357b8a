"""Fixtures of the tests about planning a search: a tiny model, texts for it, and plans of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longrope.models.apply import install, uninstall
from longrope.models.loading import Subject, open_model
from longrope.models.scaled import Installed
from longrope.rope.scaling import RopeScaling
from longrope.search.config import SearchOptions
from longrope.search.methods import Plan, plan
from longrope.search.search_data import prepare_texts
from tests.search.lengths import NEEDLE_LENGTH


@pytest.fixture(scope="module")
def subject(checkpoint: Path) -> Subject:
    return open_model(str(checkpoint))


@pytest.fixture(scope="module")
def installed(subject: Subject) -> Iterator[Installed]:
    yield install(subject.model, RopeScaling.original(subject.geometry))
    uninstall(subject.model)


@pytest.fixture(scope="module")
def source(texts: Path) -> list[str]:
    return [str(texts / "search.txt")]


@pytest.fixture
def planned(subject: Subject, installed: Installed, source: list[str]) -> Callable[..., Plan]:
    """`planned(method=…)`: the plan of these options for 512 tokens."""

    def make(target_length: int = NEEDLE_LENGTH, **options: Any) -> Plan:
        chosen = SearchOptions(**options)
        texts = prepare_texts(subject, source, target_length, chosen)
        return plan(subject, installed, texts, target_length, chosen)

    return make
