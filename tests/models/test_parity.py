"""Logits against transformers' own scaled RoPE, and checkpoints that arrive with a scaling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from longrope.models.apply import apply_scaling, geometry_of, remove_scaling
from longrope.rope import closed_forms as closed
from longrope.rope.geometry import RopeGeometry
from longrope.rope.hf_config import scaling_of_config
from longrope.rope.scaling import RopeScaling, Window
from tests.models.families import (
    ALL_FAMILIES,
    ONE_ROPE_PER_LAYER_TYPE,
    WINDOW,
    logits,
    slow_but_code_paths,
    tiny_config,
    tiny_model,
    tokens,
)

RATIO = 4
TARGET = RATIO * WINDOW
LENGTHS = (WINDOW, WINDOW + 1, TARGET - 5)
TOLERANCE = 3e-5  # root mean square, of logits with a standard deviation of 1; measured: 7e-6
PARITY = ("llama", "qwen2", "phi3", "stablelm", "cohere", "gemma3_text", "olmo3", "gpt_neox", "granite", "glm")
KINDS = ("linear", "llama3", "yarn", "longrope", "longrope-m")


def geometry(family: str) -> RopeGeometry:
    return geometry_of(tiny_model(family))


def searched(pairs: int, seed: int) -> list[float]:
    """Factors without a formula, as a search finds them."""
    return np.sort(np.random.default_rng(seed).uniform(1.0, 1.25 * RATIO, pairs)).round(2).tolist()


def parameters(kind: str, pairs: int) -> dict[str, Any]:
    """The RoPE parameters of a checkpoint with this scaling, without base and partial rotary factor."""
    original = {"original_max_position_embeddings": WINDOW}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(RATIO)} | original
    if kind == "llama3":
        bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return {"rope_type": "llama3", "factor": float(RATIO)} | bands | original
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": float(RATIO)} | original
    lists = {"short_factor": searched(pairs, 1), "long_factor": searched(pairs, 2)}
    fixed = {"attention_factor": 1.25} if kind == "longrope-m" else {}
    return {"rope_type": "longrope", "factor": float(RATIO)} | lists | fixed | original


def by_hand(kind: str, of: RopeGeometry) -> RopeScaling:
    """The same scaling from our own closed forms, without reading any configuration."""
    if kind == "linear":
        return RopeScaling.single(of, TARGET, closed.pi(of, TARGET))
    if kind == "llama3":
        return RopeScaling.single(of, TARGET, closed.llama3(of, RATIO, 1.0, 4.0))
    if kind == "yarn":
        m = closed.yarn_attention_factor(of, TARGET)
        return RopeScaling.single(of, TARGET, closed.yarn(of, TARGET), attention_factor=m)
    m = 1.25 if kind == "longrope-m" else closed.su_attention_factor(of, TARGET)
    windows = (
        Window(length, tuple(searched(of.pairs, seed)), 0, m) for seed, length in enumerate((WINDOW, TARGET), start=1)
    )
    return RopeScaling(of, tuple(windows))


def carrying(family: str, kind: str) -> PreTrainedModel:
    """The tiny model as a checkpoint whose configuration has a scaling."""
    plain = tiny_config(family)
    ours = parameters(kind, geometry(family).pairs)
    if family in ONE_ROPE_PER_LAYER_TYPE:
        rope = {name: dict(own) for name, own in plain.rope_parameters.items()}
        rope["full_attention"] |= ours
    else:
        rope = dict(plain.rope_parameters) | ours
    overrides = {"original_max_position_embeddings": WINDOW} if family == "phi3" else {}
    return tiny_model(family, rope_parameters=rope, max_position_embeddings=TARGET, **overrides)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal up to the float32 rounding of transformers' frequencies."""
    scale = max(1.0, float(theirs.std()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * TOLERANCE * scale)
    assert float((ours - theirs).pow(2).mean().sqrt()) < TOLERANCE * scale


# Phi3Config knows no scaling but longrope.
@pytest.mark.parametrize(
    ("family", "kind"),
    slow_but_code_paths((name, kind) for name in PARITY for kind in KINDS if name != "phi3" or "longrope" in kind),
)
def test_logits_are_those_of_transformers(family: str, kind: str) -> None:
    theirs, ours = carrying(family, kind), tiny_model(family)
    inputs = [tokens(length) for length in LENGTHS]
    plain = [logits(ours, ids) for ids in inputs]
    apply_scaling(ours, by_hand(kind, geometry(family)))
    for ids, unscaled in zip(inputs, plain, strict=True):
        expected = logits(theirs, ids)
        assert_close(logits(ours, ids), expected)
        assert (expected - unscaled).abs().max() > 0.1 * expected.std()  # the scaling is no small thing


@pytest.mark.parametrize(
    ("family", "kind"),
    slow_but_code_paths(
        (name, kind) for name in ALL_FAMILIES for kind in ("llama3", "longrope") if name != "phi3" or kind == "longrope"
    ),
)
def test_a_checkpoint_that_carries_a_scaling(family: str, kind: str) -> None:
    model, plain = carrying(family, kind), tiny_model(family)
    inputs = [tokens(length) for length in LENGTHS]
    own = [logits(model, ids) for ids in inputs]
    of = geometry_of(model)
    assert of == geometry(family)  # the original RoPE: base, rotary dimension and window of the unscaled model

    apply_scaling(model, RopeScaling.single(of, TARGET, np.ones(of.pairs)))
    assert all(torch.equal(logits(model, ids), logits(plain, ids)) for ids in inputs)

    present = scaling_of_config(model.config, "full_attention")
    assert present is not None
    apply_scaling(model, present)
    for ids, expected in zip(inputs, own, strict=True):
        assert_close(logits(model, ids), expected)

    remove_scaling(model)
    assert all(torch.equal(logits(model, ids), expected) for ids, expected in zip(inputs, own, strict=True))


def test_a_checkpoint_with_dynamic_scaling() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model, plain = tiny_model("llama", rope_parameters=rope), tiny_model("llama")
    ids = tokens(2 * WINDOW)
    own = logits(model, ids)
    assert not torch.equal(own, logits(plain, ids))
    of = geometry_of(model)
    apply_scaling(model, RopeScaling.single(of, TARGET, np.ones(of.pairs)))
    assert torch.equal(logits(model, ids), logits(plain, ids))
    ntk = closed.dynamic_ntk(of, 3 * WINDOW)  # transformers with a factor of 2 at 2·L is ours at 2·2·L − L
    apply_scaling(model, RopeScaling.single(of, TARGET, ntk))
    assert_close(logits(model, ids), own)
    remove_scaling(model)
    assert torch.equal(logits(model, ids), own)
