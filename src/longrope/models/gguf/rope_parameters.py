"""The `rope_parameters` of transformers that compute the RoPE which llama.cpp computes from a GGUF file.

llama.cpp scales a RoPE in three places: a set of factors (LongRoPE's two, or a single one such as Llama 3's), a divisor
of all positions (`rope.scaling.factor`), and YaRN's ramp between the two. `rope.scaling.attn_factor` multiplies cosines
and sines in all of them.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from longrope.checks import positive_number
from longrope.errors import LongRopeError
from longrope.models.gguf.rope import GRAPHS, GgufRope
from longrope.rope.closed_forms import llama3, yarn_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.hf_config import scaling_of_config
from longrope.rope.scaling import RopeScaling

_LOW, _HIGH = 1.0, 4.0  # Llama 3's frequency factors, in all models that were published
_CLOSE = 1e-5  # relative: the factors of a file are float32
_KNOWN = ("none", "linear", "yarn", "longrope")


def rope_parameters(rope: GgufRope, context_length: int, rotary_dim: int) -> dict[str, Any]:
    """The RoPE dictionary of a file for a model with a window of `context_length` tokens, which it states.

    Raises LongRopeError (`unsupported-gguf`) where transformers cannot compute it, or llama.cpp would not apply it.
    """
    if rope.scaling_type not in (None, *_KNOWN):
        raise _refused(rope, f"the unknown rope.scaling.type {rope.scaling_type!r}")
    base: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.freq_base}
    scale = 1.0 if rope.scaling_type == "none" else (rope.factor or 1.0)
    m = positive_number("rope.scaling.attn_factor", 1.0 if rope.attention_factor is None else rope.attention_factor)
    factors = _factors(rope, rotary_dim)
    if rope.scaling_type == "yarn":
        if factors is not None:
            raise _refused(rope, "factors beside the type yarn")
        return base | _yarn(rope, context_length, scale, m)
    if factors is None and m == 1.0:
        if scale == 1.0:
            return base
        original = rope.original_context_length
        linear = {"rope_type": "linear", "factor": scale}
        return base | linear | ({} if original is None else {"original_max_position_embeddings": original})
    if factors is None:
        factors = ((1.0,) * (rotary_dim // 2),) * 2
    short, long = (tuple(factor * scale for factor in part) for part in factors)
    if short == long and m == 1.0:
        if all(factor == 1.0 for factor in long):
            return base
        if (found := _as_llama3(rope, long, rotary_dim)) is not None:
            return base | found
    return base | {
        "rope_type": "longrope",
        "short_factor": list(short),
        "long_factor": list(long),
        "attention_factor": m,
        "original_max_position_embeddings": _switch(rope, short, long, context_length),
    }


def stated_scaling(rope: GgufRope) -> RopeScaling | None:
    """The scaling that a file states and llama.cpp applies, None for the original RoPE; raises as `rope_parameters`.

    The file must state its context length and a rotary dimension.
    """
    length, rotary_dim = rope.context_length or 0, rope.rotary_dim or 0
    return _scaling_of(rope_parameters(rope, length, rotary_dim), length, rotary_dim)


def _scaling_of(parameters: dict[str, Any], context_length: int, rotary_dim: int) -> RopeScaling | None:
    return scaling_of_config(
        SimpleNamespace(
            rope_parameters=parameters, head_dim=rotary_dim, max_position_embeddings=context_length, model_type="llama"
        )
    )


def _factors(rope: GgufRope, rotary_dim: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The short and the long factors that the graph applies; None where the file has none."""
    both = rope.short_factors is not None and rope.long_factors is not None
    if rope.rope_freqs is None and rope.short_factors is None and rope.long_factors is None:
        if rope.scaling_type == "longrope":
            raise _refused(rope, "the type longrope and no factors")
        return None
    if rope.architecture not in GRAPHS:
        raise _refused(rope, f"factors, which the graph of {rope.architecture} does not take")
    is_longrope = rope.scaling_type == "longrope"
    if rope.rope_freqs is not None and both:
        raise _refused(rope, "both rope_freqs and two sets of factors")
    if rope.rope_freqs is not None:
        if rope.architecture == "llama" and is_longrope:
            raise _refused(rope, "the type longrope and rope_freqs in place of two sets of factors")
        found = (rope.rope_freqs, rope.rope_freqs)
    elif rope.short_factors is None or rope.long_factors is None:
        raise _refused(rope, "one of two sets of factors")
    elif rope.architecture == "llama" and not is_longrope:
        raise _refused(rope, f"factors and the type {rope.scaling_type}, with which the graph does not load them")
    else:
        found = (rope.short_factors, rope.long_factors)
    for part in found:
        if len(part) != rotary_dim // 2:
            raise _refused(rope, f"{len(part)} factors for {rotary_dim // 2} rotary pairs")
        for factor in part:
            positive_number(f"a RoPE factor of {rope.path}", factor)
    return found


def _yarn(rope: GgufRope, context_length: int, scale: float, m: float) -> dict[str, Any]:
    """The parameters of YaRN: llama.cpp multiplies its own attention factor, 1 + 0.1·ln s, by `attn_factor`.

    It reads the keys `rope.scaling.yarn_*` in none of the families that can be opened.
    """
    original = rope.original_context_length or context_length
    geometry = RopeGeometry(rope.rotary_dim or 2, rope.freq_base, original)
    return {
        "rope_type": "yarn",
        "factor": scale,
        "original_max_position_embeddings": original,
        "attention_factor": m * yarn_attention_factor(geometry, scale * original),
    }


def _switch(rope: GgufRope, short: tuple[float, ...], long: tuple[float, ...], context_length: int) -> int:
    """The original window: the stated one, or for a single set of factors L'/max λ, how far they stretch."""
    if rope.original_context_length is not None and rope.original_context_length < context_length:
        return rope.original_context_length
    if short != long:
        found = rope.original_context_length or "none"
        raise _refused(rope, f"two sets of factors, and an original_context_length ({found}) that never takes the long")
    return min(max(2, math.floor(context_length / max(long))), context_length - 1)


def _as_llama3(rope: GgufRope, factors: tuple[float, ...], rotary_dim: int) -> dict[str, Any] | None:
    """Llama 3's parameters, which a converted file does not state, found from the factors; None where they differ.

    Of a pair between the two plateaus 1/λ = (1 - w)/s + w, with w = (L/T - low)/(high - low): that gives L.
    """
    scale, values = max(factors), np.asarray(factors)
    between = (values > 1 + _CLOSE) & (values < scale * (1 - _CLOSE))
    if scale <= 1 or not between.any():
        return None
    weight = (1 / values[between] - 1 / scale) / (1 - 1 / scale)
    periods = RopeGeometry(rotary_dim, rope.freq_base, 2).periods[between]
    original = round(float(np.median(periods * (weight * (_HIGH - _LOW) + _LOW))))
    if original < 2 or not np.allclose(
        llama3(RopeGeometry(rotary_dim, rope.freq_base, original), scale, _LOW, _HIGH), values, rtol=_CLOSE, atol=0
    ):
        return None
    return {
        "rope_type": "llama3",
        "factor": scale,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": original,
    }


def as_longrope(parameters: dict[str, Any], context_length: int, rotary_dim: int) -> dict[str, Any]:
    """The same RoPE as the type longrope, the only one that transformers' Phi-3 knows beside the original."""
    if parameters["rope_type"] in ("default", "longrope"):
        return parameters
    scaling = _scaling_of(parameters, context_length, rotary_dim)
    if scaling is None:
        return {"rope_type": "default", "rope_theta": parameters["rope_theta"]}
    factors = list(scaling.windows[0].factors)
    return {
        "rope_type": "longrope",
        "rope_theta": parameters["rope_theta"],
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": scaling.windows[0].attention_factor,
        "original_max_position_embeddings": scaling.geometry.original_length,
    }


def _refused(rope: GgufRope, found: str) -> LongRopeError:
    return LongRopeError(
        f"cannot open the GGUF file {rope.path}: it states {found}",
        code="unsupported-gguf",
        hint="longrope doctor shows what llama.cpp computes from it",
    )
