"""What is compared: closed forms as runtimes apply them, dynamic NTK by length, scalings with their own windows."""

from __future__ import annotations

import numpy as np
import pytest

from longrope.errors import LongRopeError
from longrope.evaluation.contenders import closed_form_contender, closed_form_contenders, scaling_contender
from longrope.rope.factors import CLOSED_FORMS, ntk_aware, ntk_critical, pi, yarn, yarn_attention_factor
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
    contender = closed_form_contender(name, GEOMETRY, TARGET)
    assert contender.name == name
    for length in LENGTHS:
        window = contender.window(length)
        assert window.factors == tuple(factors.tolist())
        assert window.attention_factor == (yarn_attention_factor(GEOMETRY, TARGET) if name == "yarn" else 1.0)
        assert window.start_tokens == 0
        assert window.max_length >= length


def test_dynamic_ntk_follows_the_length() -> None:
    contender = closed_form_contender("dynamic-ntk", GEOMETRY, TARGET)
    for length in LENGTHS:
        expected = ntk_aware(GEOMETRY, max(length, 8192))
        assert contender.window(length).factors == tuple(expected.tolist())
    assert contender.window(8192).is_identity
    assert not contender.window(8193).is_identity
    assert contender.window(2 * TARGET).factors == tuple(ntk_aware(GEOMETRY, 2 * TARGET).tolist())


@pytest.mark.parametrize("name", ["linear", "", "PI", "dynamic"])
def test_unknown_names_are_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(LongRopeError, match=f"expected one of none, pi, ntk, .*, yarn to compare with, found '{name}'"):
        closed_form_contender(name, GEOMETRY, TARGET)


def test_all_closed_forms_by_default() -> None:
    assert [contender.name for contender in closed_form_contenders(GEOMETRY, TARGET)] == list(CLOSED_FORMS)
    assert [one.name for one in closed_form_contenders(GEOMETRY, TARGET, ["yarn", "pi"])] == ["yarn", "pi"]


def test_scaling_chooses_its_window_by_length() -> None:
    windows = tuple(Window(length, (factor,) * 64) for length, factor in ((8192, 1.0), (16_384, 2.0), (TARGET, 8.0)))
    contender = scaling_contender("found", RopeScaling(GEOMETRY, windows))
    assert contender.name == "found"
    chosen = {2: 0, 8192: 0, 8193: 1, 16_384: 1, 16_385: 2, TARGET: 2}
    for length, index in chosen.items():
        assert contender.window(length) == windows[index]


def test_scaling_refuses_lengths_beyond_its_last_window() -> None:
    contender = scaling_contender("found", RopeScaling.extended(GEOMETRY, TARGET, [2.0] * 64))
    with pytest.raises(LongRopeError, match=f"reaches {TARGET} tokens; a sequence of {TARGET + 1} is too long"):
        contender.window(TARGET + 1)
