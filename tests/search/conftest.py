"""Fixtures of the tests about preparing a search: a tiny model, texts for it, and searches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from longrope.models.loading import LoadedModel
from longrope.models.scaled import ScaledModel
from longrope.search.config import SearchConfig
from longrope.search.methods import PreparedSearch, build, identity
from longrope.search.objective import SampledObjective
from longrope.search.ray_evaluator import ray_session
from longrope.search.search_data import Texts, objectives_over, prepare_texts
from tests.search.lengths import NEEDLE_LENGTH


@dataclass(frozen=True)
class Planned:
    """A prepared search, its objectives, and the header of its log."""

    prepared: PreparedSearch
    objectives: Mapping[tuple[str, int], SampledObjective]
    identity: dict[str, Any]

    @property
    def method(self) -> Callable[..., Any]:
        return self.prepared.run.func  # type: ignore[attr-defined, no-any-return]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the method, by name."""
        return self.prepared.run.keywords  # type: ignore[attr-defined, no-any-return]


def planned_over(
    loaded: LoadedModel, scaled: ScaledModel, texts: Texts, target_length: int, config: SearchConfig
) -> Planned:
    """The search of `config` over `texts`."""
    objectives = objectives_over(scaled, texts)
    prepared = build(loaded, objectives, target_length, config)
    return Planned(prepared, objectives, identity(prepared, loaded, texts, target_length, config))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One Ray cluster of 5 CPUs for all tests: started here, and gone at the end. The module `ray`."""
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    with ray_session(cpus=5):
        assert ray.is_initialized()
        yield ray
    assert not ray.is_initialized()


@pytest.fixture
def planned(loaded: LoadedModel, scaled: ScaledModel, source: list[str]) -> Callable[..., Planned]:
    """`planned(method=…)`: the search of this config for 512 tokens."""

    def make(target_length: int = NEEDLE_LENGTH, **config: Any) -> Planned:
        chosen = SearchConfig(**config)
        texts = prepare_texts(loaded, source, target_length, chosen)
        return planned_over(loaded, scaled, texts, target_length, chosen)

    return make
