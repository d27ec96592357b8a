"""Parity of the closed forms with transformers' `ROPE_INIT_FUNCTIONS`, at real dimensions, bases and lengths.

Their arithmetic is float32: frequencies agree to about 3e-7, so the tolerance is 1e-6 relative. On a ramp whose
position is itself float32 (llama3, YaRN without truncation) their cancellation near its end costs up to 2e-6 more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longrope.rope import closed_forms as closed
from longrope.rope.closed_forms import FloatArray
from longrope.rope.geometry import RopeGeometry

DIMS = (64, 96, 128)
MODELS = [(1e4, 2048, 131072), (1e4, 4096, 32768), (5e5, 8192, 131072), (1e6, 32768, 131072), (1e6, 40960, 2097152)]
MODELS.append((1e4, 131072, 1048576))  # every pair turns inside L: the upper bound lies beyond the last pair
CASES = [
    pytest.param(RopeGeometry(rotary_dim=dim, base=base, original_length=length), target, id=f"{dim}-{base:g}-{length}")
    for dim in DIMS
    for base, length, target in MODELS
]
RTOL = 1e-6
RTOL_RAMP = 3e-6


def _theirs(
    geometry: RopeGeometry, max_length: int, seq_len: int | None = None, **parameters: Any
) -> tuple[FloatArray, float]:
    config = LlamaConfig(
        hidden_size=8 * geometry.rotary_dim,
        num_attention_heads=8,
        head_dim=geometry.rotary_dim,
        max_position_embeddings=max_length,
        rope_parameters={"rope_theta": geometry.base} | parameters,
    )
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=seq_len)
    return inv_freq.double().numpy(), attention_factor


def _assert_parity(geometry: RopeGeometry, factors: FloatArray, theirs: FloatArray, rtol: float = RTOL) -> None:
    assert factors.dtype == np.float64
    assert factors.shape == (geometry.pairs,)
    np.testing.assert_allclose(geometry.inv_freq / factors, theirs, rtol=rtol, atol=0)


@pytest.mark.parametrize(("geometry", "target"), CASES)
def test_linear(geometry: RopeGeometry, target: int) -> None:
    factor = target / geometry.original_length
    theirs, attention_factor = _theirs(geometry, geometry.original_length, rope_type="linear", factor=factor)
    _assert_parity(geometry, closed.pi(geometry, target), theirs)
    assert attention_factor == 1.0


@pytest.mark.parametrize(("geometry", "target"), CASES)
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_dynamic(geometry: RopeGeometry, target: int, share: float) -> None:
    length = int(target * share)
    theirs, _ = _theirs(geometry, geometry.original_length, length, rope_type="dynamic", factor=1.0)
    _assert_parity(geometry, closed.dynamic_ntk(geometry, length), theirs)


@pytest.mark.parametrize(("geometry", "target"), CASES)
def test_dynamic_with_a_factor_is_ours_at_another_length(geometry: RopeGeometry, target: int) -> None:
    theirs, _ = _theirs(geometry, geometry.original_length, target, rope_type="dynamic", factor=4.0)
    length = 4.0 * target - 3.0 * geometry.original_length
    _assert_parity(geometry, closed.dynamic_ntk(geometry, length), theirs)


@pytest.mark.parametrize(("geometry", "target"), CASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_fast": 128.0, "beta_slow": 2.0},
        {"truncate": False},
        {"beta_fast": 4.0, "beta_slow": 4.0},  # both bounds in one place, or one pair apart
    ],
    ids=["default", "mistral-search", "not-truncated", "step"],
)
def test_yarn(geometry: RopeGeometry, target: int, options: dict[str, Any]) -> None:
    lengths = {
        "factor": target / geometry.original_length,
        "original_max_position_embeddings": geometry.original_length,
    }
    theirs, attention_factor = _theirs(geometry, target, rope_type="yarn", **lengths, **options)
    _assert_parity(
        geometry, closed.yarn(geometry, target, **options), theirs, RTOL_RAMP if "truncate" in options else RTOL
    )
    assert closed.yarn_attention_factor(geometry, target) == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize(("geometry", "target"), CASES)
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (2.0, 16.0)])
def test_llama3(geometry: RopeGeometry, target: int, low: float, high: float) -> None:
    factor = target / geometry.original_length
    theirs, attention_factor = _theirs(
        geometry,
        target,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=geometry.original_length,
    )
    _assert_parity(geometry, closed.llama3(geometry, factor, low, high), theirs, RTOL_RAMP)
    assert attention_factor == 1.0


@pytest.mark.parametrize(("geometry", "target"), CASES)
def test_longrope(geometry: RopeGeometry, target: int) -> None:
    short, long = closed.ntk_aware(geometry, 1.5 * geometry.original_length), closed.ntk_critical(geometry, target)
    parameters: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": geometry.original_length,
    }
    for length, factors in ((geometry.original_length, short), (geometry.original_length + 1, long)):
        theirs, attention_factor = _theirs(geometry, target, length, **parameters)
        _assert_parity(geometry, factors, theirs)
        assert closed.su_attention_factor(geometry, target) == pytest.approx(attention_factor, rel=1e-12)


def test_attention_factors_of_known_models() -> None:
    llama2 = RopeGeometry(rotary_dim=128, base=1e4, original_length=4096)
    assert closed.su_attention_factor(llama2, 32 * 4096) == pytest.approx(1.19024, abs=1e-5)
    assert closed.yarn_attention_factor(llama2, 32 * 4096) == pytest.approx(1.34657, abs=1e-5)
    assert closed.su_attention_factor(llama2, 4096) == closed.yarn_attention_factor(llama2, 4096) == 1.0
    assert closed.su_attention_factor(llama2, 1024) == closed.yarn_attention_factor(llama2, 1024) == 1.0
