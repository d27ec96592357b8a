"""The methods compared: closed forms as runtimes apply them, dynamic NTK by length, scalings with their own windows."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longrope.errors import LongRopeError
from longrope.rope.baselines import Method, checkpoint_method, closed_form_method, dynamic_method
from longrope.rope.closed_forms import ntk_aware, ntk_critical, pi, yarn, yarn_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window

GEOMETRY = RopeGeometry(rotary_dim=128, base=500_000.0, original_length=8192)
TARGET = 65_536
LENGTHS = [2, 4096, 8192, 8193, 32_768, TARGET]


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("none", np.ones(64)),
        ("pi", pi(GEOMETRY, TARGET)),
        ("ntk", ntk_aware(GEOMETRY, TARGET)),
        ("ntk-critical", ntk_critical(GEOMETRY, TARGET)),
        ("yarn", yarn(GEOMETRY, TARGET)),
    ],
)
def test_static_forms_are_those_of_the_target_at_every_length(name: str, factors: np.ndarray) -> None:
    method = closed_form_method(name, GEOMETRY, TARGET)
    assert method.name == name
    for length in LENGTHS:
        window = method.window(length)
        assert window.factors == tuple(factors.tolist())
        assert window.attention_factor == (yarn_attention_factor(GEOMETRY, TARGET) if name == "yarn" else 1.0)
        assert window.start_tokens == 0
        assert window.max_length >= length


def test_dynamic_ntk_follows_the_length() -> None:
    method = closed_form_method("dynamic-ntk", GEOMETRY, TARGET)
    for length in LENGTHS:
        expected = ntk_aware(GEOMETRY, max(length, 8192))
        assert method.window(length).factors == tuple(expected.tolist())
    assert method.window(8192).is_identity
    assert not method.window(8193).is_identity
    assert method.window(2 * TARGET).factors == tuple(ntk_aware(GEOMETRY, 2 * TARGET).tolist())


@pytest.mark.parametrize("name", ["linear", "", "PI", "dynamic"])
def test_unknown_names_are_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(LongRopeError, match=f"none, pi, ntk, .*, yarn to compare with, found '{name}'") as error:
        closed_form_method(name, GEOMETRY, TARGET)
    assert error.value.code == "unknown-baseline"


def test_checkpoint_goes_on_beyond_its_last_window() -> None:
    windows = (Window(8192, (1.0,) * 64), Window(16_384, (2.0,) * 64))
    method = checkpoint_method(RopeScaling(GEOMETRY, windows))
    assert [method.window(length) for length in (8192, 8193, TARGET)] == [windows[0], windows[1], windows[1]]


def test_dynamic_checkpoint_is_what_transformers_computes() -> None:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        head_dim=128,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 500_000.0, "factor": 4.0},
    )
    method = dynamic_method(GEOMETRY, 4.0)
    for length in (8192, 10_000, TARGET):
        theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)
        ours = GEOMETRY.inv_freq / method.window(length).factors
        assert ours == pytest.approx(theirs.numpy(), rel=1e-5)
    assert method.window(100).is_identity


def test_scaling_chooses_its_window_by_length() -> None:
    windows = tuple(Window(length, (factor,) * 64) for length, factor in ((8192, 1.0), (16_384, 2.0), (TARGET, 8.0)))
    method = Method("found", RopeScaling(GEOMETRY, windows).window_for)
    assert method.name == "found"
    chosen = {2: 0, 8192: 0, 8193: 1, 16_384: 1, 16_385: 2, TARGET: 2}
    for length, index in chosen.items():
        assert method.window(length) == windows[index]


def test_scaling_refuses_lengths_beyond_its_last_window() -> None:
    method = Method("found", RopeScaling.extended(GEOMETRY, TARGET, [2.0] * 64).window_for)
    with pytest.raises(LongRopeError, match=f"reaches {TARGET} tokens; a sequence of {TARGET + 1} is too long"):
        method.window(TARGET + 1)
