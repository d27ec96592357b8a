"""Properties of the closed forms: identity at s = 1, uniform PI, monotone, bounds, critical dimensions, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.rope import closed_form_scalings
from longrope.rope import closed_forms as closed
from longrope.rope.closed_forms import CLOSED_FORMS, FloatArray
from longrope.rope.geometry import RopeGeometry
from tests.rope.test_geometry import LLAMA2_7B, LLAMA3_8B, MISTRAL, PHI3_MINI, geometries

ratios = st.floats(1.0, 1024.0)
REAL = [PHI3_MINI, LLAMA3_8B, LLAMA2_7B, MISTRAL]
ALL: dict[str, Callable[[RopeGeometry, float], FloatArray]] = {
    "pi": closed.pi,
    "ntk": closed.ntk_aware,
    "dynamic": closed.dynamic_ntk,
    "ntk-critical": closed.ntk_critical,
    "yarn": closed.yarn,
    "yarn-rcd": lambda geometry, target: closed.yarn(
        geometry, target, critical_dim=max(geometry.critical_dim() - 4, 1)
    ),
    "llama3": lambda geometry, target: closed.llama3(geometry, target / geometry.original_length),
}


@pytest.mark.parametrize("name", ALL)
@given(geometry=geometries)
def test_no_extension_is_the_identity(name: str, geometry: RopeGeometry) -> None:
    np.testing.assert_allclose(ALL[name](geometry, geometry.original_length), 1.0, rtol=1e-15)


@pytest.mark.parametrize("name", ALL)
@given(geometry=geometries, ratio=ratios)
def test_factors_are_monotone_and_start_no_lower_than_one(name: str, geometry: RopeGeometry, ratio: float) -> None:
    factors = ALL[name](geometry, ratio * geometry.original_length)
    assert factors.shape == (geometry.pairs,)
    assert np.all(np.isfinite(factors))
    assert np.all(factors >= 1 - 1e-12)
    assert np.all(np.diff(factors) >= -1e-12 * ratio)


@pytest.mark.parametrize("name", [name for name in ALL if name != "ntk-critical"])
@given(geometry=geometries, ratio=ratios)
def test_factors_never_exceed_the_ratio(name: str, geometry: RopeGeometry, ratio: float) -> None:
    assert np.all(ALL[name](geometry, ratio * geometry.original_length) <= ratio * (1 + 1e-12))


@given(geometries, ratios)
def test_pi_is_uniform(geometry: RopeGeometry, ratio: float) -> None:
    assert set(closed.pi(geometry, ratio * geometry.original_length)) == {
        ratio * geometry.original_length / geometry.original_length
    }


@given(geometries, ratios)
def test_ntk_aware_is_another_base(geometry: RopeGeometry, ratio: float) -> None:
    if geometry.rotary_dim < 4:
        return  # one pair turns with frequency 1 at any base
    base = geometry.base * ratio ** (geometry.rotary_dim / (geometry.rotary_dim - 2))
    other = RopeGeometry(rotary_dim=geometry.rotary_dim, base=base, original_length=geometry.original_length)
    factors = closed.ntk_aware(geometry, ratio * geometry.original_length)
    np.testing.assert_allclose(geometry.inv_freq / factors, other.inv_freq, rtol=1e-9)
    assert factors[-1] == pytest.approx(ratio)


@given(geometries, ratios, st.data())
def test_ntk_critical_is_the_ratio_at_the_critical_dimension(
    geometry: RopeGeometry, ratio: float, data: st.DataObject
) -> None:
    critical = data.draw(st.integers(1, geometry.pairs))
    assume((geometry.pairs - 1) / critical * math.log10(ratio) < 300)
    factors = closed.ntk_critical(geometry, ratio * geometry.original_length, critical)
    assert factors[0] == 1.0
    if critical < geometry.pairs:
        assert factors[critical] == pytest.approx(ratio, rel=1e-12)
    # Eq. 10: at least s from the critical dimension on
    assert np.all(factors[critical:] >= ratio * (1 - 1e-12))
    assert np.all(factors[:critical] <= ratio * (1 + 1e-12))


@pytest.mark.parametrize("geometry", REAL)
def test_ntk_critical_takes_the_theoretical_dimension(geometry: RopeGeometry) -> None:
    target = 16 * geometry.original_length
    factors = closed.ntk_critical(geometry, target)
    assert factors[geometry.critical_dim()] == pytest.approx(16)
    assert factors[-1] > 16
    np.testing.assert_array_equal(factors, closed.ntk_critical(geometry, target, geometry.critical_dim()))


@pytest.mark.parametrize("geometry", REAL)
def test_yarn_ramp_is_not_inverted(geometry: RopeGeometry) -> None:
    """High frequencies are left alone and low ones interpolated, with the turns inside L deciding which is which."""
    factors = closed.yarn(geometry, 16 * geometry.original_length)
    turns = geometry.original_length / geometry.periods
    often, seldom = turns > 40, turns < 0.9  # clear of the rounding of the bounds, 32 and 1
    assert often.sum() >= 10
    assert seldom.sum() >= 10
    np.testing.assert_array_equal(factors[often], 1.0)
    np.testing.assert_allclose(factors[seldom], 16.0, rtol=1e-12)
    between = factors[(turns < 31) & (turns > 1.1)]
    assert np.all((between > 1.0) & (between < 16.0))


@pytest.mark.parametrize("geometry", REAL)
def test_yarn_ramp_is_linear_in_the_inverse(geometry: RopeGeometry) -> None:
    inverse = 1 / closed.yarn(geometry, 16 * geometry.original_length)
    inside = inverse[(inverse < 1) & (inverse > 1 / 16 + 1e-12)]
    np.testing.assert_allclose(np.diff(inside, 2), 0, atol=1e-12)


def test_the_authors_yarn_is_linear_in_the_factor() -> None:
    """16.5 in the middle of the ramp of LLaMA2 for 32×, where YaRN has 1.94; the same ends."""
    target = 32 * LLAMA2_7B.original_length
    linear, plain = closed.yarn_linear(LLAMA2_7B, target), closed.yarn(LLAMA2_7B, target)
    inside = (plain > 1) & (plain < 32)
    np.testing.assert_array_equal(linear[~inside], plain[~inside])
    steps = np.diff(linear[inside])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-12)
    shares = (1 - 1 / plain[inside]) / (1 - 1 / 32)
    np.testing.assert_allclose(linear[inside], 1 + 31 * shares, rtol=1e-12)
    assert np.interp(0.5, shares, linear[inside]) == pytest.approx(16.5, abs=0.01)


@pytest.mark.parametrize("geometry", REAL)
def test_yarn_rcd(geometry: RopeGeometry) -> None:
    target = 16 * geometry.original_length
    theoretical = closed.yarn(geometry, target)
    np.testing.assert_array_equal(closed.yarn(geometry, target, critical_dim=geometry.critical_dim()), theoretical)
    for critical in (geometry.critical_dim() - 5, 3, 1):
        factors = closed.yarn(geometry, target, critical_dim=critical)
        np.testing.assert_allclose(factors[critical:], 16.0, rtol=1e-12)
        assert factors[critical - 1] < 16
        assert np.all(factors >= theoretical - 1e-12)
        assert factors[0] == 1.0


def test_dynamic_ntk_follows_the_length() -> None:
    for length in (1, 100, LLAMA2_7B.original_length):
        np.testing.assert_array_equal(closed.dynamic_ntk(LLAMA2_7B, length), 1.0)
    np.testing.assert_array_equal(closed.dynamic_ntk(LLAMA2_7B, 20000), closed.ntk_aware(LLAMA2_7B, 20000))


def test_registry() -> None:
    assert list(CLOSED_FORMS) == ["none", "pi", "ntk", "ntk-critical", "dynamic-ntk", "yarn"]
    target = 8 * LLAMA3_8B.original_length
    table = {name: form(LLAMA3_8B, target) for name, form in CLOSED_FORMS.items()}
    assert all(factors.shape == (64,) and factors.dtype == np.float64 for factors, _ in table.values())
    np.testing.assert_array_equal(table["none"][0], 1.0)
    np.testing.assert_array_equal(table["pi"][0], closed.pi(LLAMA3_8B, target))
    np.testing.assert_array_equal(table["ntk"][0], closed.ntk_aware(LLAMA3_8B, target))
    np.testing.assert_array_equal(table["dynamic-ntk"][0], closed.ntk_aware(LLAMA3_8B, target))
    np.testing.assert_array_equal(table["ntk-critical"][0], closed.ntk_critical(LLAMA3_8B, target))
    np.testing.assert_array_equal(table["yarn"][0], closed.yarn(LLAMA3_8B, target))
    assert {name: factor for name, (_, factor) in table.items() if factor != 1.0} == {
        "yarn": pytest.approx(1 + 0.1 * math.log(8))
    }


@pytest.mark.parametrize("name", ["pi", "ntk", "ntk_critical", "yarn", "llama3"])
def test_a_given_original_length_goes_before_that_of_a_geometry(name: str) -> None:
    form = getattr(closed_form_scalings, name)
    given = form(LLAMA2_7B, "32k", original_length="8k")
    assert given.geometry == RopeGeometry(rotary_dim=128, base=1e4, original_length=8192)
    assert given == form(given.geometry, "32k")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: closed.pi(LLAMA2_7B, 4095), "target_length must not be below the original window of 4096 .* 4095"),
        (lambda: closed.ntk_aware(LLAMA2_7B, math.nan), "target_length must be a finite number"),
        (lambda: closed.dynamic_ntk(LLAMA2_7B, 0), "current_length must be"),
        (lambda: closed.ntk_critical(LLAMA2_7B, 8192, 0), "critical_dim must be a whole number, 1 or more"),
        (lambda: closed.ntk_critical(LLAMA2_7B, 8192, 65), "critical_dim must be a pair index, 1 to 64; found 65"),
        (lambda: closed.ntk_critical(LLAMA2_7B, 1 << 32, 1), "critical_dim 1 is too low for a ratio of .* overflow"),
        (lambda: closed.yarn(LLAMA2_7B, 8192, critical_dim=65), "critical_dim must be a pair index"),
        (lambda: closed.yarn(LLAMA2_7B, 8192, 1.0, 32.0), "beta_fast must not be below beta_slow"),
        (lambda: closed.yarn(LLAMA2_7B, 8192, 1e308), "expected beta_fast and beta_slow of 1e-09 to 1e[+]09"),
        (lambda: closed.yarn(LLAMA2_7B, 8192, 1.0, 1e-320), "expected beta_fast and beta_slow of 1e-09 to 1e[+]09"),
        (lambda: closed.llama3(LLAMA2_7B, 8, 4.0, 4.0), "low_freq_factor must be below high_freq_factor"),
        (lambda: closed.llama3(LLAMA2_7B, 0.5), "target_length must not be below"),
        (lambda: closed.su_attention_factor(LLAMA2_7B, -1), "target_length must be"),
    ],
)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(LongRopeError, match=f"^{message}"):
        call()
