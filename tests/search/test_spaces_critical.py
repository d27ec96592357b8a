"""LongRoPE2's space: Algorithm 1's first population, mutation and crossover that stay inside, and d_rcd found."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry
from longrope.rope.presets import preset
from longrope.search.config import Below
from longrope.search.evolution import Evolution, EvolutionSettings
from longrope.search.spaces import CriticalCandidate, CriticalSpace

PHI3 = RopeGeometry(rotary_dim=96, base=10_000.0, original_length=2048)
RATIOS = (1.5, 2.0, 4.6875, 8.0, 64.0, 512.0)


def space_of(geometry: RopeGeometry, ratio: float, below: Below = "ntk", low: int = 0) -> CriticalSpace:
    return CriticalSpace(
        pairs=geometry.pairs,
        ratio=ratio,
        first=geometry.critical_dim(10),
        last=geometry.critical_dim(),
        below=below,
        low=low,
    )


SPACE = space_of(PHI3, 16.0)


@st.composite
def spaces(draw: st.DrawFn) -> CriticalSpace:
    pairs = draw(st.sampled_from([1, 2, 16, 48, 64]))
    first = draw(st.integers(0, pairs - 1))
    return CriticalSpace(
        pairs=pairs,
        ratio=draw(st.sampled_from(RATIOS)),
        first=first,
        last=draw(st.integers(first, pairs - 1)),
        below=draw(st.sampled_from(["ntk", "yarn", "ramp"])),
        low=draw(st.integers(0, pairs - 1)),
    )


def any_candidate(space: CriticalSpace, rng: np.random.Generator) -> CriticalCandidate:
    dim = int(rng.integers(space.first, space.last + 1))
    low, high = space.bounds
    steps = np.sort(rng.integers(low, high + 1, space.pairs - dim))
    begin = {"ntk": None, "yarn": max(min(space.low, dim - 1), 0), "ramp": int(rng.integers(0, max(dim, 1)))}
    return CriticalCandidate(dim, tuple(steps.tolist()), begin[space.below])


def check_inside(space: CriticalSpace, candidate: CriticalCandidate) -> None:
    """Bounds, order and length from d_rcd on, the rule of the space below it, plain integers for JSON."""
    dim, factors = candidate.critical_dim, candidate.factors
    assert space.first <= dim <= space.last
    assert all(type(value) is int for value in (dim, *candidate.steps))
    assert len(factors) == space.pairs
    assert len(candidate.steps) == space.pairs - dim
    assert all(space.ratio - 1e-9 <= factor <= 2 * space.ratio + 1e-9 for factor in factors[dim:])
    assert all(left <= right for left, right in pairwise(factors))
    assert dim == 0 or factors[0] == 1.0
    if space.below == "ntk":
        assert candidate.low is None
        for pair in range(dim):
            assert factors[pair] == pytest.approx(factors[dim] ** (pair / dim), rel=1e-12)
        return
    low = candidate.low
    assert type(low) is int
    assert 0 <= low <= max(dim - 1, 0)
    assert space.below == "ramp" or low == max(min(space.low, dim - 1), 0)
    for pair in range(dim):
        share = max(pair - low, 0) / (dim - low)
        assert 1 / factors[pair] == pytest.approx(1 - share * (1 - 1 / factors[dim]), rel=1e-12)


def test_the_papers_critical_dimensions() -> None:
    llama3 = space_of(RopeGeometry(rotary_dim=128, base=500_000.0, original_length=8192), 16.0)
    assert (llama3.first, llama3.last) == (24, 35)
    assert SPACE.last == 31


def test_below_the_critical_dimension_the_base_is_the_implied_one() -> None:
    """λ_i = (base'/base)^(2i/d) of one base', chosen so that λ is s' at d_rcd (LongRoPE2, Algorithm 1)."""
    candidate = CriticalCandidate(25, (1850,) * (48 - 25))
    implied = 10_000.0 * 18.5 ** (96 / (2 * 25))
    expected = RopeGeometry(rotary_dim=96, base=implied, original_length=2048).periods / PHI3.periods
    np.testing.assert_allclose(candidate.factors[:25], expected[:25], rtol=1e-12)
    np.testing.assert_allclose(candidate.factors[25:], 18.5, rtol=0)
    assert candidate.factors[25] == pytest.approx(expected[25])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("below", ["ntk", "yarn"])
def test_the_first_population_has_the_corner_rising_tails_and_mutations(ratio: float, below: Below) -> None:
    """s' = s for every d_rcd; then, in turn, tails that rise by 0.1 a pair (up to 2s) and samples mutated."""
    space = space_of(PHI3, ratio, below, low=4)
    dims = list(range(space.first, space.last + 1))
    population = space.initial(64, 0.3, np.random.default_rng(0))
    assert len(set(population)) == len(population) == 64
    for candidate in population:
        check_inside(space, candidate)
    low, high = space.bounds
    corner, rest = population[: len(dims)], population[len(dims) :]
    assert [candidate.critical_dim for candidate in corner] == dims
    assert all(set(candidate.steps) == {low} for candidate in corner)
    assert {candidate.critical_dim for candidate in rest} == set(dims)
    rising = [one for one in rest if list(one.steps) == risen(one, high)]
    assert len(rising) >= len(rest) // 3
    levels = [candidate.steps[0] for candidate in rising]
    assert max(levels) - min(levels) > 0.5 * (high - low)
    others = [one for one in rest if one not in rising]
    for candidate in others:  # most genes keep the one s' that was drawn
        assert np.unique(candidate.steps, return_counts=True)[1].max() > 0.3 * len(candidate.steps)
    assert sum(len(set(one.steps)) > 1 for one in others) > len(others) // 3


def risen(candidate: CriticalCandidate, high: int) -> list[int]:
    """The tail that rises by 0.1 a pair from the candidate's λ at d_rcd."""
    return [min(candidate.steps[0] + 10 * place, high) for place in range(len(candidate.steps))]


def test_the_corner_of_a_ramp_begins_at_several_pairs() -> None:
    """At YaRN's pair, right before d_rcd (λ = 1 below it) and half way; the other candidates anywhere."""
    space = space_of(PHI3, 16.0, "ramp", low=4)
    dims = range(space.first, space.last + 1)
    population = space.initial(128, 0.3, np.random.default_rng(0))
    for candidate in population:
        check_inside(space, candidate)
    corner = {(one.critical_dim, one.low) for one in population if set(one.steps) == {1600}}
    assert corner >= {(dim, low) for dim in dims for low in (4, dim - 1, (4 + dim - 1) // 2)}
    assert len({one.low for one in population if len(set(one.steps)) > 1}) > 3


def test_the_authors_table_is_within_reach() -> None:
    """Distance to the released LLaMA3-8B table, d_rcd 33, of the whole search: docs/experiments.md has more seeds."""
    geometry = RopeGeometry(rotary_dim=128, base=500_000.0, original_length=8192)
    goal = np.log(preset("longrope2_llama3_8b_128k").windows[-1].factors)
    space = space_of(geometry, 16.0)

    def loss(candidate: CriticalCandidate) -> float:
        return float(np.sqrt(np.mean((np.log(candidate.factors) - goal) ** 2)))

    found = []
    for seed in range(4):
        first = space.initial(64, 0.3, np.random.default_rng(seed))
        optimizer = Evolution(space, first, EvolutionSettings(seed=seed))
        while not optimizer.done:
            optimizer.tell([loss(candidate) for candidate in optimizer.ask()])
        assert optimizer.incumbent is not None
        found.append((optimizer.incumbent[0].critical_dim, optimizer.incumbent[1]))
    assert all(31 <= dim <= 33 for dim, _ in found)
    assert max(error for _, error in found) < 0.03


@pytest.mark.parametrize("count", [2, 4, 7])
def test_a_small_first_population_spans_the_critical_dimensions(count: int) -> None:
    dims = [candidate.critical_dim for candidate in SPACE.initial(count, 0.3, np.random.default_rng(0))]
    assert len(set(dims)) == count
    assert {SPACE.first, SPACE.last} <= set(dims)
    assert max(np.diff(sorted(dims))) <= math.ceil((SPACE.last - SPACE.first) / (count - 1))


def test_a_small_space_gives_what_it_has() -> None:
    space = CriticalSpace(pairs=2, ratio=1.01, first=1, last=1)  # 101 … 202
    population = space.initial(500, 0.3, np.random.default_rng(0))
    assert len(population) == len(set(population)) == 102


def test_a_first_population_repeats_by_seed() -> None:
    def population(seed: int) -> list[CriticalCandidate]:
        return SPACE.initial(64, 0.3, np.random.default_rng(seed))

    assert population(0) == population(0) != population(1)


@pytest.mark.parametrize(("ratio", "bounds"), [(4.6875, (469, 937)), (8.0, (800, 1600)), (1.001, (101, 200))])
def test_bounds_are_inside_s_and_2s(ratio: float, bounds: tuple[int, int]) -> None:
    assert CriticalSpace(pairs=16, ratio=ratio, first=2, last=5).bounds == bounds


@given(space=spaces(), seed=st.integers(0, 2**32 - 1), probability=st.floats(0.01, 1.0))
@settings(max_examples=300, deadline=None)
def test_operators_stay_inside(space: CriticalSpace, seed: int, probability: float) -> None:
    rng = np.random.default_rng(seed)
    first, second = any_candidate(space, rng), any_candidate(space, rng)
    check_inside(space, first)
    mutant = space.mutate(first, probability, rng)
    check_inside(space, mutant)
    assert mutant.critical_dim == first.critical_dim
    child = space.cross(first, second, rng)
    check_inside(space, child)
    assert child.critical_dim in (first.critical_dim, second.critical_dim)
    assert set(child.steps) <= set(first.steps) | set(second.steps)
    assert child.low in {parent.low for parent in (first, second) if parent.critical_dim == child.critical_dim}


def test_mutation_reaches_the_bounds_and_spares_the_rest() -> None:
    rng = np.random.default_rng(0)
    parent = CriticalCandidate(25, tuple(range(1850, 3000, 50)))
    mutants = [SPACE.mutate(parent, 0.3, rng) for _ in range(300)]
    steps = np.array([mutant.steps for mutant in mutants])
    assert steps[:, 0].min() < 1700  # s = 16
    assert steps[:, -1].max() > 3100  # 2s
    assert (steps == parent.steps).mean() == pytest.approx(0.7, abs=0.05)


def test_crossover_takes_from_both_parents() -> None:
    rng = np.random.default_rng(0)
    low, high = CriticalCandidate(24, (1700,) * 24), CriticalCandidate(30, (3000,) * 18)
    children = [SPACE.cross(low, high, rng) for _ in range(200)]
    dims = [child.critical_dim for child in children]
    assert dims.count(24) == pytest.approx(100, abs=30)
    share = np.mean([step == 1700 for child in children for step in child.steps])
    assert share == pytest.approx(0.5, abs=0.05)
    # With one parent, and with itself, nothing new can come: pairs below the higher d_rcd take its gene there.
    assert SPACE.cross(high, high, rng) == high
    same = CriticalCandidate(24, (3000,) * 24)
    assert {SPACE.cross(same, high, rng) for _ in range(20)} == {same, high}


@pytest.mark.parametrize("true_dim", [20, 25, 29])
def test_evolution_finds_a_critical_dimension_below_the_theoretical_one(true_dim: int) -> None:
    """Squared distance of log λ to factors with d_rcd < d_tcd = 31 and somewhat more than s beyond it."""
    at = np.minimum(np.arange(48) / true_dim, 1.0)
    goal = at * math.log(1.15 * 16) + np.clip(np.arange(48) - true_dim, 0, None) * 0.01

    def loss(candidate: CriticalCandidate) -> float:
        return float(np.mean((np.log(candidate.factors) - goal) ** 2))

    seeds = SPACE.initial(64, 0.3, np.random.default_rng(3))
    optimiser = Evolution(SPACE, seeds, EvolutionSettings(iterations=25, seed=3))
    while not optimiser.done:
        optimiser.tell([loss(candidate) for candidate in optimiser.ask()])
    best, found = optimiser.incumbent
    check_inside(SPACE, best)
    assert abs(best.critical_dim - true_dim) <= 1
    assert found < 0.2 * min(map(loss, seeds))
    assert found < 5e-4


@pytest.mark.parametrize("below", ["ntk", "yarn", "ramp"])
def test_critical_dimension_zero_has_nothing_below_it(below: Below) -> None:
    space = CriticalSpace(pairs=4, ratio=2.0, first=0, last=1, below=below)
    whole, part = space.initial(2, 0.3, np.random.default_rng(0))
    assert (whole.critical_dim, part.critical_dim) == (0, 1)
    assert whole.factors == (whole.steps[0] / 100,) * 4
    assert part.factors == (1.0,) + (part.steps[0] / 100,) * 3
    for child in (
        space.mutate(whole, 1.0, np.random.default_rng(0)),
        space.cross(whole, part, np.random.default_rng(0)),
    ):
        check_inside(space, child)


def test_rows_and_windows_are_the_candidate() -> None:
    candidate = CriticalCandidate(1, (250, 260))
    assert candidate.to_row() == {"critical_dim": 1, "steps": [250, 260]}
    assert CriticalCandidate(1, (250, 260), 0).to_row() == {"critical_dim": 1, "low": 0, "steps": [250, 260]}
    window = candidate.window(512, 1.1)
    assert (window.max_length, window.factors, window.attention_factor) == (512, (1.0, 2.5, 2.6), 1.1)
    assert window.start_tokens == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 1.0},
        {"ratio": 0.5},
        {"ratio": math.nan},
        {"ratio": math.inf},
        {"first": -1},
        {"first": 7},
        {"last": 16},
    ],
)
def test_spaces_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(LongRopeError, match="ratio above 1 and critical dimensions among the pairs") as error:
        CriticalSpace(**({"pairs": 16, "ratio": 4.0, "first": 2, "last": 6} | wrong))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
