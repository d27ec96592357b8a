"""Where a search on the knots starts: the best of its seeds, and of the ramps that a compass search tries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.rope.closed_forms import pair_that_turns, yarn
from longrope.rope.geometry import RopeGeometry
from longrope.search.evaluator import SEARCH, EvalRequest, EvalResult
from longrope.search.start import FINALISTS, MOST_RAMPS, Bounds, WindowStage, pick_start
from tests.search.slopes import SEEDS, STAGE
from tests.search.targets import TARGET_LENGTH

LLAMA = RopeGeometry(rotary_dim=128, base=500_000.0, original_length=8192)
LLAMA_LENGTH = 131_072


# --- seeds


def picked(stage: WindowStage, losses: list[float], samples: int = 2) -> tuple[list[list[EvalRequest]], str]:
    """The batches of requests, and the seed that is picked; `losses` are those of the seeds, on every text."""
    batches: list[list[EvalRequest]] = []
    windows = [stage.window(np.asarray(factors), 1.2, Bounds()) for factors in stage.seeds.values()]

    def evaluate(requests: Sequence[EvalRequest]) -> list[EvalResult]:
        batches.append(list(requests))
        return [EvalResult(losses[windows.index(request.window)]) for request in requests]

    name, factors = pick_start(evaluate, stage, stage.seeds, 1.2, samples, Bounds())
    assert factors.tolist() == np.asarray(stage.seeds[name]).tolist()
    return batches, name


@pytest.mark.parametrize(("samples", "there", "expected"), [(2, 4, (0, 1)), (1, 4, (0,)), (3, 2, (0, 1)), (9, 1, (0,))])
def test_all_seeds_are_compared_at_once_on_the_same_samples(
    samples: int, there: int, expected: tuple[int, ...]
) -> None:
    (requests,), _ = picked(replace(STAGE, samples=there), [1.0, 2.0, 3.0], samples)
    assert len(requests) == len(SEEDS)
    for request, seed in zip(requests, SEEDS.values(), strict=True):
        assert (request.split, request.samples, request.gradient) == (SEARCH, expected, False)
        assert (request.window.max_length, request.window.attention_factor) == (TARGET_LENGTH, 1.2)
        assert request.window.factors == tuple(seed.tolist())


@given(losses=st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf, -math.inf]), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_the_first_of_the_lowest_finite_losses_is_picked(losses: list[float]) -> None:
    seeds = {f"seed {place}": SEEDS["yarn"] * (1 + place) for place in range(len(losses))}
    batches, best = picked(replace(STAGE, seeds=seeds), losses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert best == list(seeds)[losses.index(min(finite)) if finite else 0]
    if len(losses) > FINALISTS:
        first, finals = batches
        assert {request.samples for request in first} == {(0,)}
        assert [request.samples for request in finals] == [(1,)] * FINALISTS


# --- ramps


def climbed(
    loss: Callable[[np.ndarray, int], float],
    *,
    geometry: RopeGeometry = LLAMA,
    length: int = LLAMA_LENGTH,
    seeds: dict[str, np.ndarray] | None = None,
    samples: int = 2,
    bounds: Bounds | None = None,
) -> tuple[list[list[EvalRequest]], str, np.ndarray]:
    """The batches of requests, and the start that is picked, where `loss` is that of factors on one text."""
    batches: list[list[EvalRequest]] = []

    def evaluate(requests: Sequence[EvalRequest]) -> list[EvalResult]:
        batches.append(list(requests))
        found = []
        for request in requests:
            assert request.samples is not None
            factors = np.array(request.window.factors)
            found.append(EvalResult(float(np.mean([loss(factors, text) for text in request.samples]))))
        return found

    ramp = partial(yarn, geometry, length, truncate=False)
    stage = WindowStage(length=length, seeds=seeds or {}, samples=samples, ramp=ramp)
    return batches, *pick_start(evaluate, stage, stage.seeds, 1.2, samples, bounds or Bounds())


def ramp_of(fast: float, slow: float) -> np.ndarray:
    return yarn(LLAMA, LLAMA_LENGTH, fast, slow, truncate=False)


def distance_to(goal: np.ndarray) -> Callable[[np.ndarray, int], float]:
    return lambda factors, text: float(np.mean((np.log(factors) - np.log(goal)) ** 2))


@pytest.mark.parametrize("fast", [4.0, 8.0, 32.0, 64.0])
@pytest.mark.parametrize("slow", [0.375, 0.6, 1.536])
def test_the_ramp_that_is_best_is_found_from_any_side(fast: float, slow: float) -> None:
    """Its factors are YaRN's, between the pairs that turn `fast` and `slow` times in L; a grid of these needs 64."""
    batches, name, factors = climbed(distance_to(ramp_of(fast, slow)))
    assert factors.tolist() == ramp_of(fast, slow).tolist()
    assert name == f"ramp, β_fast {fast:g}, β_slow {slow:.3g}"
    low, high = (pair_that_turns(LLAMA, turns, 8192) for turns in (fast, slow))
    assert (factors[: math.floor(low) + 1] == 1.0).all()
    assert (factors[math.ceil(high) :] == 16.0).all()
    assert [request.samples for request in batches[-1]] == [(1,)] * FINALISTS
    assert sum(map(len, batches[:-1])) <= MOST_RAMPS


def test_a_move_asks_only_for_neighbours_that_are_new() -> None:
    """One step down at the fast end: two to begin with, four around the better one, three others around the next."""
    batches, _, _ = climbed(distance_to(ramp_of(4.0, 0.6)), samples=1)
    assert [len(batch) for batch in batches] == [2, 4, 3]
    windows = [request.window for batch in batches for request in batch]
    assert len(set(windows)) == len(windows)
    expected = [(8, 0.6), (32, 0.96), (16, 0.6), (4, 0.6), (8, 0.96), (8, 0.375), (2, 0.6), (4, 0.96), (4, 0.375)]
    assert [list(window.factors) for window in windows] == [ramp_of(*turns).tolist() for turns in expected]


def test_a_model_whose_best_ramp_is_like_yarns_begins_there() -> None:
    batches, name, _ = climbed(distance_to(ramp_of(32.0, 0.96)), samples=1)
    assert [len(batch) for batch in batches] == [2, 4]
    assert name == "ramp, β_fast 32, β_slow 0.96"


def test_seeds_and_ramps_are_compared_and_the_other_texts_decide() -> None:
    """A seed that is worse on the first text, but among the best few, wins by the second."""
    goal = ramp_of(8.0, 0.6)
    seeds = {"near": goal**0.99, "far": goal**0.2}

    def loss(factors: np.ndarray, text: int) -> float:
        return float(np.mean((np.log(factors) - np.log(seeds["near"] if text else goal)) ** 2))

    batches, name, factors = climbed(loss, seeds=seeds)
    assert (name, factors.tolist()) == ("near", seeds["near"].tolist())
    assert [len(batch) for batch in batches] == [2, 2, 4, FINALISTS]
    assert climbed(loss, seeds=seeds, samples=1)[1] == "ramp, β_fast 8, β_slow 0.6"


def test_a_search_that_climbs_on_and_on_ends() -> None:
    calls = iter(range(1000))
    batches, _, _ = climbed(lambda factors, text: -float(next(calls)), samples=1)
    assert sum(map(len, batches)) == MOST_RAMPS


@pytest.mark.parametrize(("largest", "most"), [(1.0, 1), (3.0, MOST_RAMPS)])
def test_ramps_are_compared_inside_the_bound(largest: float, most: int) -> None:
    """Those that it makes equal are one."""
    batches, _, factors = climbed(lambda factors, text: -float(factors.sum()), samples=1, bounds=Bounds(largest))
    tried = [request.window.factors for batch in batches for request in batch]
    assert 1 <= len(tried) == len(set(tried)) <= most
    assert max(map(max, tried)) == factors.max() == largest


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_ramp_that_is_no_number_is_left(bad: float) -> None:
    """The first one too: its neighbours lead on."""
    first, goal = ramp_of(8.0, 0.6), ramp_of(32.0, 0.6)

    def loss(factors: np.ndarray, text: int) -> float:
        return bad if factors.tolist() == first.tolist() else distance_to(goal)(factors, text)

    assert climbed(loss)[2].tolist() == goal.tolist()
    assert climbed(lambda factors, text: bad, samples=1)[1] == "ramp, β_fast 8, β_slow 0.6"


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(1, 64),
    base=st.sampled_from([100.0, 10_000.0, 5e5, 1e7]),
    original=st.sampled_from([16, 256, 8192, 131_072]),
    ratio=st.sampled_from([1, 2, 16, 512]),
    seed=st.integers(0, 9),
)
def test_no_ramp_is_tried_twice_whatever_the_model(
    pairs: int, base: float, original: int, ratio: int, seed: int
) -> None:
    """Where pairs are few, or none turns often, neighbours become equal: then there is less to try."""
    geometry = RopeGeometry(rotary_dim=2 * pairs, base=base, original_length=original)
    rng = np.random.default_rng(seed)
    batches, _, factors = climbed(
        lambda factors, text: float(rng.normal()), geometry=geometry, length=ratio * original, samples=1
    )
    tried = [request.window.factors for batch in batches for request in batch]
    assert 1 <= len(tried) <= MOST_RAMPS
    assert len(set(tried)) == len(tried)
    assert (np.diff(factors) >= 0).all()
    assert 1.0 <= factors[0] <= factors[-1] <= ratio + 1e-9
    if ratio == 1:
        assert tried == [(1.0,) * pairs]
