"""Factors around a seed: always in the space, the seed at 0, invertible, with the derivative that differences show."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.rope.closed_forms import CLOSED_FORMS, ntk_aware, yarn
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from longrope.search.config import LARGEST
from longrope.search.knots import KnotParametrisation, nearest_monotone, phase_scale, project
from tests.search.targets import GEOMETRY, TARGET_LENGTH

SEED = ntk_aware(GEOMETRY, TARGET_LENGTH)
REAL = RopeGeometry(rotary_dim=128, base=500_000.0, original_length=8192)


def around(seed: np.ndarray = SEED, knots: int | None = None, geometry: RopeGeometry = GEOMETRY) -> KnotParametrisation:
    return KnotParametrisation(seed, phase_scale(geometry), geometry.pairs if knots is None else knots)


# --- the scale


@pytest.mark.parametrize("geometry", [GEOMETRY, REAL])
def test_a_change_turns_the_angle_at_the_end_of_the_window_by_as_much(geometry: RopeGeometry) -> None:
    """From λ = 1, for every pair that turns in L at all: to first order one turn for every u = 1."""
    small = 1e-6
    turns = geometry.original_length / geometry.periods
    moved = turns - turns * np.exp(-small * phase_scale(geometry))
    inside = turns >= 1.0
    np.testing.assert_allclose(moved[inside], small, rtol=1e-5)
    assert (moved[~inside] < small).all()
    assert (phase_scale(geometry)[~inside] == 1.0).all()
    assert inside.sum() == geometry.critical_dim()


# --- the projection


def test_isotonic_regression_by_hand() -> None:
    ones = np.ones(4)
    np.testing.assert_array_equal(nearest_monotone(np.array([1.0, 2.0, 3.0, 4.0]), ones), [1, 2, 3, 4])
    np.testing.assert_array_equal(nearest_monotone(np.array([4.0, 3.0, 2.0, 1.0]), ones), [2.5] * 4)
    np.testing.assert_array_equal(nearest_monotone(np.array([1.0, 3.0, 2.0, 4.0]), ones), [1, 2.5, 2.5, 4])
    weights = np.array([1.0, 3.0, 1.0, 1.0])
    np.testing.assert_array_equal(nearest_monotone(np.array([1.0, 3.0, 2.0, 4.0]), weights), [1, 2.75, 2.75, 4])


@given(st.lists(st.tuples(st.floats(-9.0, 9.0), st.floats(0.1, 10.0)), min_size=1, max_size=7))
@settings(max_examples=200, deadline=None)
def test_isotonic_regression_is_the_nearest(pairs: list[tuple[float, float]]) -> None:
    """Against every way to cut the vector into pools: the nearest one is a vector of pool means."""
    values, weights = np.array(pairs).T
    found = nearest_monotone(values, weights)
    assert (np.diff(found) >= 0.0).all()
    best = math.inf
    for cuts in itertools.product([False, True], repeat=len(values) - 1):
        pools = np.split(np.arange(len(values)), np.flatnonzero(cuts) + 1)
        means = np.concatenate([np.full(len(p), np.average(values[p], weights=weights[p])) for p in pools])
        if (np.diff(means) >= 0.0).all():
            best = min(best, float((weights * (values - means) ** 2).sum()))
    assert float((weights * (values - found) ** 2).sum()) == pytest.approx(best, abs=1e-9)


# --- factors


@pytest.mark.parametrize("name", ["none", "pi", "ntk", "ntk-critical", "yarn"])
@pytest.mark.parametrize("ratio", [2, 8, 32])
@pytest.mark.parametrize("knots", [2, 12, None])
def test_at_0_is_the_seed_bit_for_bit(name: str, ratio: int, knots: int | None) -> None:
    seed, _ = CLOSED_FORMS[name](REAL, ratio * REAL.original_length)
    space = around(seed, knots, REAL)
    assert space.factors(np.zeros(space.knots)).tolist() == seed.tolist()


def test_pairs_that_do_not_move_keep_the_seeds_factor_bit_for_bit() -> None:
    space, numbers = around(), np.zeros(GEOMETRY.pairs)
    numbers[20] = 0.01
    changed = space.factors(numbers) != SEED
    assert np.flatnonzero(changed).tolist() == [20]


@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0.0, 1e4),
    knots=st.sampled_from([2, 8, 31, 32]),
    form=st.sampled_from([ntk_aware, yarn]),
)
@settings(max_examples=300, deadline=None)
def test_any_numbers_are_factors_of_a_window(seed: int, spread: float, knots: int, form) -> None:  # type: ignore[no-untyped-def]
    space = around(form(GEOMETRY, TARGET_LENGTH), knots)
    factors = space.factors(spread * np.random.default_rng(seed).standard_normal(knots))
    assert factors.shape == (GEOMETRY.pairs,)
    assert factors.dtype == np.float64
    assert factors[0] >= 1.0
    assert (np.diff(factors) >= 0.0).all()
    Window(8, tuple(factors.tolist()))


@pytest.mark.parametrize("size", [1e3, 1e300])
def test_numbers_however_large_end_where_windows_do(size: float) -> None:
    assert (around().factors(np.full(GEOMETRY.pairs, size))[-1], around().factors(np.full(32, -size))[-1]) == (
        LARGEST,
        1.0,
    )
    with pytest.raises(LongRopeError, match="factors must lie in"):
        Window(8, (1.001 * LARGEST,))


def test_factors_outside_come_in_first() -> None:
    """Not monotone, below 1, and beyond what a window holds."""
    outside = np.array([0.3, 1.5, 1.2, 7.0, 2e9, 1.0])
    assert project(outside).tolist() == [1.0, 1.5, 1.5, 7.0, LARGEST, LARGEST]
    space = KnotParametrisation(outside, np.ones(6), 6)
    assert space.factors(np.zeros(6)).tolist() == space.origin.tolist() == project(outside).tolist()


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.0, 2.0))
@settings(max_examples=100, deadline=None)
def test_round_trip(seed: int, spread: float) -> None:
    """With a knot for every pair the factors lead back to themselves; numbers do where the projection does not bind."""
    space = around()
    numbers = spread * np.random.default_rng(seed).standard_normal(GEOMETRY.pairs)
    factors = space.factors(numbers)
    np.testing.assert_allclose(space.factors(space.numbers(factors)), factors, rtol=1e-12)
    small = 0.005 * numbers + 0.05  # NTK rises by more than this moves
    np.testing.assert_allclose(space.numbers(space.factors(small)), small, rtol=0, atol=1e-10)


def test_knots_are_read_where_they_are() -> None:
    space, numbers = around(knots=4), np.array([0.1, 0.2, 0.15, 0.3])
    np.testing.assert_allclose(space.numbers(space.factors(numbers)), numbers, atol=1e-12)
    assert space.places.tolist() == [0, 10, 21, 31]


@pytest.mark.parametrize("knots", [2, 8, 32])
def test_pull_back_is_the_derivative(knots: int) -> None:
    """d/du of Σ w·(log λ − g)² against central differences, inside the space."""
    space, rng = around(knots=knots), np.random.default_rng(knots)
    goal, weights = np.linspace(0.0, 2.0, 32), rng.random(32)

    def loss(numbers: np.ndarray) -> float:
        return float((weights * (np.log(space.factors(numbers)) - goal) ** 2).sum())

    for numbers in (np.full(knots, 0.05), 0.05 + 0.005 * rng.standard_normal(knots)):
        factors = space.factors(numbers)
        gradient = space.vjp(factors, 2 * weights * (np.log(factors) - goal) / factors)
        sides = np.array([[loss(numbers + sign * 1e-5 * unit) for sign in (1, -1)] for unit in np.eye(knots)])
        np.testing.assert_allclose(gradient, (sides[:, 0] - sides[:, 1]) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("pairs", "knots"), [(32, 1), (32, 33), (2, 1)])
def test_knots_that_the_pairs_do_not_have_are_refused(pairs: int, knots: int) -> None:
    with pytest.raises(LongRopeError, match=f"2 to {pairs} knots for {pairs} rotary pairs, found {knots}") as error:
        KnotParametrisation(np.ones(pairs), np.ones(pairs), knots)
    assert "\n" not in str(error.value)


def test_one_pair_is_nothing_to_search_between() -> None:
    with pytest.raises(LongRopeError, match="at least 2 rotary pairs to search between, found 1"):
        KnotParametrisation(np.ones(1), np.ones(1), 1)


@given(u=st.lists(st.floats(-5, 5), min_size=8, max_size=8), largest=st.floats(1.0, 20.0))
def test_no_factor_is_larger_than_the_bound(u: list[float], largest: float) -> None:
    """The seed's neither; what lies below the bound is what it is without one."""
    seed, scale = np.geomspace(1, 16, 8), np.full(8, 0.5)
    bounded, free = KnotParametrisation(seed, scale, 8, largest), KnotParametrisation(seed, scale, 8)
    factors = bounded.factors(np.array(u))
    assert (np.diff(factors) >= 0).all()
    assert factors.min() >= 1
    assert factors.max() <= largest
    if max(seed.max(), free.factors(np.array(u)).max()) <= largest:
        np.testing.assert_array_equal(factors, free.factors(np.array(u)))
