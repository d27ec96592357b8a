"""The mathematics of `RopeGeometry`: check values of the critical dimension, frequencies, validation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry

PHI3_MINI = RopeGeometry(rotary_dim=96, base=1e4, original_length=2048)
LLAMA3_8B = RopeGeometry(rotary_dim=128, base=5e5, original_length=8192)
LLAMA2_7B = RopeGeometry(rotary_dim=128, base=1e4, original_length=4096)
MISTRAL = RopeGeometry(rotary_dim=128, base=1e4, original_length=8192)

geometries = st.builds(
    RopeGeometry,
    rotary_dim=st.integers(1, 128).map(lambda pairs: 2 * pairs),
    base=st.floats(100, 1e8),
    original_length=st.integers(8, 1 << 20),
)


@pytest.mark.parametrize(
    ("geometry", "periods", "expected"),
    [
        (PHI3_MINI, 1, 31),
        (LLAMA3_8B, 1, 35),
        (LLAMA3_8B, 10, 24),
        (LLAMA2_7B, 1, 46),
        (LLAMA2_7B, 10, 30),
        (MISTRAL, 1, 50),
        (MISTRAL, 10, 34),
    ],
)
def test_published_critical_dimensions(geometry: RopeGeometry, periods: float, expected: int) -> None:
    assert geometry.critical_dim(periods) == expected


def test_critical_dim_is_clamped() -> None:
    assert RopeGeometry(rotary_dim=64, base=1e4, original_length=4).critical_dim() == 0
    assert RopeGeometry(rotary_dim=64, base=100, original_length=100_000).critical_dim() == 32


@given(geometries, st.floats(0.5, 50))
def test_critical_dim_is_the_first_pair_with_fewer_periods(geometry: RopeGeometry, periods: float) -> None:
    turns = geometry.original_length / geometry.periods
    critical = geometry.critical_dim(periods)
    assert np.all(turns[:critical] >= periods * (1 - 1e-9))
    assert np.all(turns[critical:] <= periods * (1 + 1e-9))


@pytest.mark.parametrize("periods", [0, -1.0, math.nan, math.inf, "1"])
def test_critical_dim_refuses(periods: Any) -> None:
    with pytest.raises(LongRopeError, match=r"^periods must be a finite number above 0; found"):
        LLAMA2_7B.critical_dim(periods)


@pytest.mark.parametrize("geometry", [PHI3_MINI, LLAMA3_8B, LLAMA2_7B])
def test_frequencies_and_periods(geometry: RopeGeometry) -> None:
    expected = [geometry.base ** (-2 * i / geometry.rotary_dim) for i in range(geometry.pairs)]
    assert geometry.inv_freq.dtype == np.float64
    np.testing.assert_allclose(geometry.inv_freq, expected, rtol=1e-14)
    np.testing.assert_allclose(geometry.periods * geometry.inv_freq, 2 * math.pi, rtol=1e-15)
    assert geometry.periods[0] == pytest.approx(2 * math.pi)
    assert geometry.inv_freq is not geometry.inv_freq  # a fresh, writable array each time


def test_plain_numbers_are_stored() -> None:
    geometry = RopeGeometry(rotary_dim=np.int64(128), base=10000, original_length=np.int32(4096))  # type: ignore[arg-type]
    assert geometry == LLAMA2_7B
    assert hash(geometry) == hash(LLAMA2_7B)
    assert [type(value) for value in (geometry.rotary_dim, geometry.base, geometry.original_length)] == [
        int,
        float,
        int,
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotary_dim", 0),
        ("rotary_dim", 127),
        ("rotary_dim", 64.0),
        ("rotary_dim", True),
        ("rotary_dim", None),
        ("base", 1),
        ("base", -1e4),
        ("base", math.nan),
        ("base", math.inf),
        ("base", 10**400),
        ("base", "10000"),
        ("original_length", 0),
        ("original_length", 1),
        ("original_length", "4k"),
        ("original_length", 4096.5),
    ],
)
def test_validation_names_the_field(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"rotary_dim": 128, "base": 1e4, "original_length": 4096} | {field: value}
    with pytest.raises(LongRopeError, match=rf"^{field} must .*; found ") as caught:
        RopeGeometry(**fields)
    assert caught.value.code in ("invalid-number", "invalid-geometry")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("field", "value"), [("rotary_dim", 2**17), ("original_length", 2**41), ("rotary_dim", 10**400)]
)
def test_what_no_model_has_is_refused(field: str, value: int) -> None:
    fields: dict[str, Any] = {"rotary_dim": 128, "base": 1e4, "original_length": 4096} | {field: value}
    with pytest.raises(LongRopeError, match=rf"^expected {field} of at most .*, found "):
        RopeGeometry(**fields)
