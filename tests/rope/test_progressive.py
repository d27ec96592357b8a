"""The second closed forms: those of `closed_forms.py` where nothing was extended before, else by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longrope.errors import LongRopeError
from longrope.rope import closed_forms as closed
from longrope.rope.geometry import RopeGeometry
from longrope.rope.progressive import (
    SECOND_FORMS,
    second_ntk,
    second_ntk_critical,
    second_pi,
    second_yarn,
    second_yarn_linear,
    trained_pair,
)
from tests.rope.test_geometry import LLAMA2_7B, LLAMA3_8B, MISTRAL, PHI3_MINI, geometries

REAL = [PHI3_MINI, LLAMA3_8B, LLAMA2_7B, MISTRAL]
TRAINED, TARGET = 262_144, 2_097_152
FIRST = {
    "second-pi": closed.pi,
    "second-ntk": closed.ntk_aware,
    "second-ntk-critical": closed.ntk_critical,
    "second-yarn": closed.yarn,
}


@pytest.mark.parametrize("geometry", REAL)
@pytest.mark.parametrize("ratio", [1, 2, 32, 512])
@pytest.mark.parametrize("name", SECOND_FORMS)
def test_of_the_original_rope_they_are_the_first_forms(name: str, ratio: int, geometry: RopeGeometry) -> None:
    """λ = 1 and L_ft = L: nothing was extended before."""
    length = geometry.original_length
    found = SECOND_FORMS[name](geometry, np.ones(geometry.pairs), length, ratio * length)
    assert found.tolist() == FIRST[name](geometry, ratio * length).tolist()


@given(geometries, st.floats(1.0, 512.0))
def test_second_yarn_of_the_original_rope_is_yarn(geometry: RopeGeometry, ratio: float) -> None:
    length = geometry.original_length
    found = second_yarn(geometry, [1.0] * geometry.pairs, length, ratio * length)
    assert found.tolist() == closed.yarn(geometry, ratio * length).tolist()


@pytest.mark.parametrize("geometry", REAL)
@pytest.mark.parametrize(("beta_fast", "beta_slow"), [(32.0, 1.0), (128.0, 2.0)])
def test_second_yarn_of_the_original_rope_is_that_of_transformers(
    geometry: RopeGeometry, beta_fast: float, beta_slow: float
) -> None:
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "rope_theta": geometry.base,
        "factor": 8.0,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "original_max_position_embeddings": geometry.original_length,
    }
    config = LlamaConfig(
        hidden_size=8 * geometry.rotary_dim,
        num_attention_heads=8,
        head_dim=geometry.rotary_dim,
        max_position_embeddings=8 * geometry.original_length,
        rope_parameters=parameters,
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    length = geometry.original_length
    ours = second_yarn(geometry, np.ones(geometry.pairs), length, 8 * length, beta_fast, beta_slow)
    np.testing.assert_allclose(geometry.inv_freq / ours, theirs.double().numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("geometry", REAL)
def test_second_yarn_of_a_model_under_pi_is_yarn_of_a_model_that_turns_as_slowly(geometry: RopeGeometry) -> None:
    """PI to 32·L makes every pair turn in 32·L tokens as often as it did in L: YaRN's pairs stay the same ones."""
    trained = np.full(geometry.pairs, 32.0)
    found = second_yarn(geometry, trained, 32 * geometry.original_length, 256 * geometry.original_length)
    np.testing.assert_allclose(found, 32 * closed.yarn(geometry, 8 * geometry.original_length), rtol=1e-12)


@pytest.mark.parametrize("geometry", REAL)
def test_second_yarn_counts_turns_of_the_rescaled_periods(geometry: RopeGeometry) -> None:
    """Every pair's turns, counted one by one: fast pairs keep their factor, slow ones are stretched in full."""
    trained = closed.ntk_critical(geometry, TRAINED)
    found = second_yarn(geometry, trained, TRAINED, TARGET) / trained
    turns = TRAINED / (trained * geometry.periods)
    fast, slow = turns > 32, turns < 1
    assert fast.any()
    # floor and ceil widen the ramp by less than a pair at each end.
    np.testing.assert_allclose(found[fast][:-1], 1.0, rtol=1e-12)
    np.testing.assert_allclose(found[slow][1:], TARGET / TRAINED, rtol=1e-12)
    between = found[~fast & ~slow]
    assert (np.diff(between) > 0).all()


@pytest.mark.parametrize("geometry", REAL)
def test_ntk_and_pi_by_their_formulas(geometry: RopeGeometry) -> None:
    trained, ratio = closed.yarn(geometry, TRAINED), TARGET / TRAINED
    assert second_pi(geometry, trained, TRAINED, TARGET).tolist() == (trained * ratio).tolist()
    aware = second_ntk(geometry, trained, TRAINED, TARGET) / trained
    assert (aware[0], aware[-1]) == (1.0, pytest.approx(ratio))
    # d_c by counting: the first pair that does not finish a turn.
    critical = int(np.argmax(trained * geometry.periods >= TRAINED))
    by_critical = second_ntk_critical(geometry, trained, TRAINED, TARGET) / trained
    assert by_critical[critical] == pytest.approx(ratio)
    assert np.log(by_critical) == pytest.approx(np.arange(geometry.pairs) * math.log(ratio) / critical)


monotone = st.lists(st.floats(0.0, 2.0), min_size=128, max_size=128)


@pytest.mark.parametrize("name", SECOND_FORMS)
@given(geometry=geometries, steps=monotone, ratio=st.floats(1.0, 64.0), first=st.floats(1.0, 512.0))
def test_stretched_factors_are_monotone_and_never_below_the_carried(
    name: str, geometry: RopeGeometry, steps: list[float], ratio: float, first: float
) -> None:
    trained = np.exp(np.cumsum(steps[: geometry.pairs]) * math.log(512.0) / (2.0 * geometry.pairs))
    length = first * geometry.original_length
    found = SECOND_FORMS[name](geometry, trained, length, ratio * length)
    assert found.shape == (geometry.pairs,)
    assert np.isfinite(found).all()
    assert (np.diff(found) >= -1e-9 * found[1:]).all()
    assert (found >= trained * (1 - 1e-12)).all()
    if name != "second-ntk-critical":
        assert (found <= trained * ratio * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", SECOND_FORMS)
def test_trained_factors_that_fall_stay_what_they_are(name: str) -> None:
    """As in some published tables: the multiples are those of the factors raised to their predecessors, monotone."""
    trained = closed.yarn(PHI3_MINI, 131_072)
    dented = trained.copy()
    dented[20] = dented[19] * 0.9
    raised = np.maximum.accumulate(dented)
    found = SECOND_FORMS[name](PHI3_MINI, dented, 131_072, 262_144)
    multiples = SECOND_FORMS[name](PHI3_MINI, raised, 131_072, 262_144) / raised
    np.testing.assert_allclose(found, dented * multiples, rtol=1e-12)
    assert (np.diff(found / dented) >= -1e-12).all()
    assert (found / dented >= 1 - 1e-12).all()


@pytest.mark.parametrize("geometry", REAL)
def test_the_critical_dimension_of_a_trained_model_is_by_its_own_periods(geometry: RopeGeometry) -> None:
    """Without factors Eq. 7; under PI for 8·L the same pairs finish a turn in 8·L."""
    length, ones = geometry.original_length, np.ones(geometry.pairs)
    assert math.ceil(trained_pair(geometry, ones, length, 1)) == geometry.critical_dim()
    assert math.ceil(trained_pair(geometry, ones, length, 10)) == geometry.critical_dim(10)
    assert trained_pair(geometry, 8 * ones, 8 * length, 1) == pytest.approx(trained_pair(geometry, ones, length, 1))


def test_the_authors_second_yarn_is_linear_in_the_multiple() -> None:
    trained = closed.yarn(LLAMA2_7B, 262_144)
    linear = second_yarn_linear(LLAMA2_7B, trained, TRAINED, TARGET) / trained
    shares = (1 - trained / second_yarn(LLAMA2_7B, trained, TRAINED, TARGET)) / (1 - 1 / 8)
    np.testing.assert_allclose(linear, 1 + 7 * shares, rtol=1e-9)


@pytest.mark.parametrize("name", SECOND_FORMS)
@pytest.mark.parametrize(
    ("trained", "target", "says"),
    [
        ([1.0] * 47, TARGET, "must be 48 positive numbers"),
        ([1.0] * 47 + [0.0], TARGET, "must be 48 positive numbers"),
        ([1.0] * 47 + [math.nan], TARGET, "must be 48 positive numbers"),
        ([1.0] * 48, TRAINED - 1, "must not be below the 262144 tokens"),
        ([1.0] * 48, math.inf, "target_length must be a finite number"),
    ],
)
def test_what_is_refused(name: str, trained: list[float], target: float, says: str) -> None:
    with pytest.raises(LongRopeError, match=says):
        SECOND_FORMS[name](PHI3_MINI, trained, TRAINED, target)


def test_refusals_of_one_form() -> None:
    with pytest.raises(LongRopeError, match="beta_fast must not be below beta_slow"):
        second_yarn(PHI3_MINI, [1.0] * 48, TRAINED, TARGET, 1.0, 2.0)
    slow = RopeGeometry(rotary_dim=256, base=1e9, original_length=8)
    with pytest.raises(LongRopeError, match="only 2 pairs finish a turn in 8 tokens: the last factors overflow"):
        second_ntk_critical(slow, [1.0] * 128, 8, 8 * 10**6)
