"""Factors of a few free numbers: always in the space, invertible, and with the derivative that differences show."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.rope.factors import CLOSED_FORMS, ntk_aware, ntk_critical
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from longrope.search.parametrise import LARGEST, KnotFactors
from tests.search.targets import GEOMETRY, TARGET_LENGTH

UPPERS = (None, 1.01, 4.0, 9.0, 600.0)


@st.composite
def spaces(draw: st.DrawFn) -> KnotFactors:
    pairs = draw(st.sampled_from([2, 3, 16, 32, 48, 64]))
    knots = draw(st.sampled_from(sorted({2, min(8, pairs), pairs})))
    return KnotFactors(pairs, knots, draw(st.sampled_from(UPPERS)))


def drawn(space: KnotFactors, seed: int, spread: float, center: float = 0.0) -> np.ndarray:
    return center + spread * np.random.default_rng(seed).standard_normal(space.knots)


@given(space=spaces(), seed=st.integers(0, 2**32 - 1), spread=st.floats(0.0, 5.0), center=st.floats(-40.0, 4.0))
@settings(max_examples=300, deadline=None)
def test_any_numbers_are_factors(space: KnotFactors, seed: int, spread: float, center: float) -> None:
    factors = space.factors(drawn(space, seed, spread, center))
    assert factors.shape == (space.pairs,)
    assert factors.dtype == np.float64
    assert factors[0] >= 1.0
    assert (np.diff(factors) >= -1e-12 * factors[1:]).all()  # neighbours between two equal knots may round apart
    assert np.isfinite(factors).all()
    if space.upper is not None:
        assert factors[-1] <= space.upper


def test_the_largest_factor_is_what_a_window_holds() -> None:
    Window(8, (LARGEST,))
    with pytest.raises(LongRopeError, match="factors must lie in"):
        Window(8, (1.001 * LARGEST,))


@given(space=spaces(), center=st.floats(0.0, 1e300))
@settings(max_examples=100, deadline=None)
def test_numbers_however_large_are_factors_of_a_window(space: KnotFactors, center: float) -> None:
    """Steps that go on for ever reach what no window holds, and then what no number does."""
    factors = space.factors(np.full(space.knots, center / space.knots))
    Window(8, tuple(factors.tolist()))
    if center > 400:
        assert factors[-1] == (LARGEST if space.upper is None else pytest.approx(space.upper))


@pytest.mark.parametrize("upper", [upper for upper in UPPERS if upper is not None])
def test_an_upper_bound_is_approached_from_below(upper: float) -> None:
    space = KnotFactors(32, 8, upper)
    levels = [space.factors(np.full(8, value))[-1] for value in (-9.0, -8.0, -7.0, -6.0)]
    assert levels == sorted(set(levels))
    assert levels[-1] < upper
    assert space.factors(np.full(8, 50.0))[-1] == pytest.approx(upper)


@given(space=spaces(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_round_trip(space: KnotFactors, seed: int) -> None:
    """Exact where no increment is so small, and no factor so near the bound, that it would be moved."""
    least = math.log(math.expm1(0.05 / space.knots))
    theta = np.maximum(drawn(space, seed, 1.0, -2.5), least + 1e-6)
    if space.upper is not None:
        total = np.logaddexp(0.0, theta).sum() / math.log(space.upper)
        if total > 6.5:  # beyond 1 − e^−6.9 of ln(upper) the way back is cut
            return
    np.testing.assert_allclose(space.parameters(space.factors(theta)), theta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["none", "pi", "ntk", "ntk-critical", "yarn"])
@pytest.mark.parametrize("ratio", [2, 8, 32])
@pytest.mark.parametrize("rotary_dim", [64, 96, 128])
def test_closed_forms_come_back(name: str, ratio: int, rotary_dim: int) -> None:
    geometry = RopeGeometry(rotary_dim=rotary_dim, base=10_000.0, original_length=4096)
    factors, _ = CLOSED_FORMS[name](geometry, ratio * 4096)
    space = KnotFactors(geometry.pairs, geometry.pairs)
    np.testing.assert_allclose(space.factors(space.parameters(factors)), factors, rtol=0.052)


@pytest.mark.parametrize("knots", [2, 8, GEOMETRY.pairs])
def test_ntk_is_a_line_that_any_knots_hold(knots: int) -> None:
    for form in (ntk_aware, ntk_critical):
        factors, space = form(GEOMETRY, TARGET_LENGTH), KnotFactors(GEOMETRY.pairs, knots)
        np.testing.assert_allclose(space.factors(space.parameters(factors)), factors, rtol=0.052)


@pytest.mark.parametrize("upper", [2.0, 9.0])
def test_factors_outside_come_back_inside(upper: float) -> None:
    """Not monotone, below 1, at the bound and above it."""
    space = KnotFactors(6, 6, upper)
    factors = space.factors(space.parameters(np.array([0.3, 1.5, 1.2, upper, 2 * upper, 1.0])))
    assert 1.0 <= factors[0] < 1.1
    assert factors[1] == pytest.approx(1.5, rel=0.05)
    assert factors[2] == pytest.approx(factors[1], rel=0.05)
    assert 0.99 * upper < factors[3] <= factors[5] < upper


@pytest.mark.parametrize("upper", [None, 6.0, 40.0])
@pytest.mark.parametrize("knots", [2, 8, 32])
def test_pull_back_is_the_derivative(knots: int, upper: float | None) -> None:
    """d/dθ of Σ (log λ_i − g_i)²·w_i against central differences."""
    space, rng = KnotFactors(32, knots, upper), np.random.default_rng(knots)
    goal, weights = np.linspace(0.0, 2.0, 32), rng.random(32)

    def loss(theta: np.ndarray) -> float:
        return float((weights * (np.log(space.factors(theta)) - goal) ** 2).sum())

    for theta in (space.parameters(ntk_aware(GEOMETRY, 1024)), drawn(space, 1, 1.0, -3.0)):
        factors = space.factors(theta)
        gradient = space.pull_back(theta, 2 * weights * (np.log(factors) - goal) / factors)
        step = 1e-4 * np.eye(knots)
        # Richardson: the h² terms of two central differences cancel, what is left is far below 1e-6.
        coarse, fine = (
            np.array([(loss(theta + k * unit) - loss(theta - k * unit)) / (2e-4 * k) for unit in step]) for k in (2, 1)
        )
        np.testing.assert_allclose(gradient, (4 * fine - coarse) / 3, rtol=1e-6, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((32, 1), "2 to 32 knots for 32 rotary pairs, found 1"),
        ((32, 33), "found 33"),
        ((1, 1), "2 to 1 knots"),
        ((32, 8, 1.0), "above 1, found 1.0"),
        ((32, 8, -2.0), "found -2.0"),
        ((32, 8, math.nan), "found nan"),
    ],
)
def test_spaces_that_are_none_are_refused(arguments: tuple[int, ...], says: str) -> None:
    with pytest.raises(LongRopeError, match=says) as error:
        KnotFactors(*arguments)
    assert "\n" not in str(error.value)
