"""`RopeScaling` and `Window`: validation, windows by length, fit to a model, provenance."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from longrope.errors import LongRopeError
from longrope.rope import closed_forms as closed
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from tests.rope.test_geometry import LLAMA2_7B, PHI3_MINI

SMALL = RopeGeometry(rotary_dim=8, base=1e4, original_length=256)
FACTORS = (1.0, 1.5, 2.0, 4.0)


def test_original_is_the_identity() -> None:
    scaling = RopeScaling.original(LLAMA2_7B)
    assert scaling.windows == (Window(4096, (1.0,) * 64, 0, 1.0),)
    assert scaling.windows[0].is_identity
    assert scaling.target_length == 4096


@pytest.mark.parametrize("wrap", [tuple, list, np.array, torch.tensor])
def test_single_takes_any_sequence(wrap: Any) -> None:
    scaling = RopeScaling.single(SMALL, 1024, wrap(FACTORS), start_tokens=4, attention_factor=1.1)
    assert scaling.windows == (Window(1024, FACTORS, 4, 1.1),)
    assert all(type(factor) is float for factor in scaling.windows[0].factors)


def test_single_may_recover_a_short_window() -> None:
    assert RopeScaling.single(SMALL, 256, FACTORS).target_length == 256


def test_extended_keeps_the_original_factors_up_to_the_window() -> None:
    scaling = RopeScaling.extended(SMALL, 1024, FACTORS, start_tokens=8, attention_factor=1.2)
    assert scaling.windows == (Window(256, (1.0,) * 4, 0, 1.2), Window(1024, FACTORS, 8, 1.2))
    assert not scaling.windows[0].is_identity  # because of the attention factor
    assert RopeScaling.extended(SMALL, 1024, FACTORS).windows[0].is_identity
    for target in (256, 255):
        with pytest.raises(LongRopeError, match=f"target_length must be above .* 256 tokens; found {target}"):
            RopeScaling.extended(SMALL, target, FACTORS)


def test_window_for() -> None:
    scaling = RopeScaling(SMALL, (Window(256, FACTORS), Window(512, FACTORS), Window(2048, FACTORS)))
    chosen = [scaling.window_for(length).max_length for length in (1, 256, 257, 512, 513, 2048)]
    assert chosen == [256, 256, 512, 512, 2048, 2048]
    with pytest.raises(LongRopeError, match="reaches 2048 tokens; a sequence of 2049 is too long"):
        scaling.window_for(2049)
    with pytest.raises(LongRopeError, match="length must be a whole number"):
        scaling.window_for(0)


def test_frozen_and_hashable() -> None:
    scaling = RopeScaling.single(SMALL, 1024, FACTORS, provenance={"seed": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        scaling.windows = ()  # type: ignore[misc]
    assert hash(scaling) == hash(scaling.with_provenance(seed=2))
    assert scaling != scaling.with_provenance(seed=2)


def test_provenance_is_copied_as_json() -> None:
    given = {"lengths": (1, 2), "nested": {"a": None}}
    scaling = RopeScaling.single(SMALL, 1024, FACTORS, provenance=given)
    given["nested"]["a"] = 1  # type: ignore[index]
    more = scaling.with_provenance(seed=3)
    assert more.provenance == {"lengths": [1, 2], "nested": {"a": None}, "seed": 3}
    assert "seed" not in scaling.provenance
    assert more.windows == scaling.windows


@pytest.mark.parametrize("provenance", [[], None, {"x": object()}, {"x": math.nan}, {"x": "\ud800"}, {"x": {1}}])
def test_provenance_must_be_json(provenance: Any) -> None:
    with pytest.raises(LongRopeError, match=r"^provenance must be a JSON object; found"):
        RopeScaling(SMALL, (Window(256, FACTORS),), provenance)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_length", 0, "max_length must be a whole number, 1 or more; found 0"),
        ("max_length", 1024.0, "max_length must be"),
        ("factors", (1.0, 0.0), r"factors\[1\] must be a finite number above 0; found 0.0"),
        ("factors", (1.0, -2.0), r"factors\[1\] must be"),
        ("factors", (math.nan,), r"factors\[0\] must be .* found nan"),
        ("factors", (math.inf,), r"factors\[0\] must be .* found inf"),
        ("factors", ("1.0",), r"factors\[0\] must be .* found '1.0'"),
        ("factors", (True,), r"factors\[0\] must be"),
        ("factors", ([1.0],), r"factors\[0\] must be"),
        ("factors", (), "factors must be a sequence"),
        ("factors", 1.0, "factors must be a sequence"),
        ("factors", "1234", "factors must be a sequence"),
        ("start_tokens", -1, "start_tokens must be a whole number, 0 or more"),
        ("start_tokens", 0.5, "start_tokens must be"),
        ("attention_factor", 0.0, "attention_factor must be a finite number above 0"),
        ("attention_factor", math.inf, "attention_factor must be"),
        ("attention_factor", None, "attention_factor must be"),
    ],
)
def test_window_validation(field: str, value: Any, message: str) -> None:
    with pytest.raises(LongRopeError, match=f"^{message}") as caught:
        Window(**({"max_length": 1024, "factors": FACTORS} | {field: value}))
    assert caught.value.code in ("invalid-number", "invalid-scaling")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ((), "windows must hold at least one window"),
        ((Window(256, FACTORS[:3]),), r"windows\[0\].factors must hold 4 factors for rotary_dim 8; found 3"),
        ((Window(256, FACTORS), Window(512, (*FACTORS, 5.0))), r"windows\[1\].factors must hold 4"),
        ((Window(256, FACTORS), Window(256, FACTORS)), r"windows must have strictly increasing .* \[256, 256\]"),
        ((Window(512, FACTORS), Window(256, FACTORS)), "windows must have strictly increasing"),
    ],
)
def test_scaling_validation(windows: tuple[Window, ...], message: str) -> None:
    with pytest.raises(LongRopeError, match=f"^{message}"):
        RopeScaling(SMALL, windows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 96}, "is for rotary_dim 128; this model has rotary_dim 96"),
        ({"base": 500000.0}, "is for base 10000; this model has base 500000"),
        ({"original_length": 8192}, "is for original_length 4096; this model has original_length 8192"),
        (
            {"rotary_dim": 64, "base": 1e6},
            "is for rotary_dim 128, base 10000; this model has rotary_dim 64, base 1000000",
        ),
    ],
)
def test_check_fits(changes: dict[str, Any], message: str) -> None:
    scaling = RopeScaling.single(LLAMA2_7B, 8192, closed.pi(LLAMA2_7B, 8192))
    scaling.check_fits(RopeGeometry(rotary_dim=128, base=10000, original_length=4096))
    with pytest.raises(LongRopeError, match=message) as error:
        scaling.check_fits(dataclasses.replace(LLAMA2_7B, **changes))
    assert error.value.code == "wrong-geometry"
    with pytest.raises(LongRopeError, match="this model has rotary_dim 96, original_length 2048"):
        scaling.check_fits(PHI3_MINI)
