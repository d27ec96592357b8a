"""The RoPE that llama.cpp computes from a GGUF file: the factors that its graph loads, and its frequencies."""

from __future__ import annotations

import numpy as np

from longrope.doctor.readings import LONGROPE, RefusedError, UnknownRuleError
from longrope.doctor.rules import Behaviour, Rotation
from longrope.doctor.table import Runtime
from longrope.models.gguf.rope import GRAPHS, GgufRope
from longrope.models.gguf.rope_parameters import stated_scaling
from longrope.rope.geometry import FloatArray, RopeGeometry

YARN = "yarn"


def behaviour(rope: GgufRope, runtime: Runtime, switch: int, target: int) -> Behaviour:
    """The RoPE that llama.cpp computes from the file of `rope`, with a context for `target` tokens (or `switch`).

    Raises RefusedError where llama.cpp cannot load the file, UnknownRuleError where no rule for it is known.
    """
    if rope.rotary_dim is None:
        raise UnknownRuleError("the file does not say how many dimensions rotate")
    geometry = RopeGeometry(rope.rotary_dim, rope.freq_base, rope.original_context_length or rope.context_length or 2)
    factors, remarks = _factors(rope)
    scale = 1.0 if rope.scaling_type in ("none", YARN) or not rope.factor else rope.factor
    if scale != 1.0 and factors is not None:
        remarks.append(f"rope.scaling.factor {scale:g} divides all frequencies, on top of the factors")
    m = 1.0 if rope.attention_factor is None else rope.attention_factor
    if rope.scaling_type == YARN:
        if factors is not None:
            raise UnknownRuleError("the table has no rule of llama.cpp for YaRN with factors beside it")
        if (stated := stated_scaling(rope)) is not None:
            factors, m = (stated.windows[0].factors,) * 2, stated.windows[0].attention_factor
    short, long = (_rotation(geometry, values, scale, m) for values in factors or (None, None))
    engine = target if runtime.engine == "target" else switch
    if rope.context_length is not None and rope.context_length < engine:
        engine = rope.context_length
        remarks.append(f"context_length {engine} caps the length that llama-server serves")
    return Behaviour(
        short=short,
        long=long,
        base=rope.freq_base,
        switch=runtime.switch,
        original_length=geometry.original_length,
        engine=engine,
        windowed=factors is not None and factors[0] is not factors[1],
        remarks=tuple(remarks),
    )


_Factors = tuple[float, ...]


def _factors(rope: GgufRope) -> tuple[tuple[_Factors, _Factors] | None, list[str]]:
    """The short and the long factors that the graph uses, None where it uses none, and remarks."""
    if rope.architecture not in GRAPHS:
        return None, [f"the graph of {rope.architecture} takes no factors"]
    is_llama = rope.architecture == "llama"
    if rope.rope_freqs is not None and not (is_llama and rope.scaling_type == LONGROPE):
        return (rope.rope_freqs, rope.rope_freqs), []
    if is_llama and rope.scaling_type != LONGROPE:
        found = rope.long_factors is not None or rope.short_factors is not None
        return None, ["rope.scaling.type is not longrope, so the factor tensors are not loaded"] * found
    if rope.short_factors is None or rope.long_factors is None:
        says = "rope.scaling.type is longrope, but the file has no rope_factors_short and rope_factors_long"
        return None, [says] * (rope.scaling_type == LONGROPE)
    if rope.original_context_length is None:
        says = f"without rope.scaling.original_context_length, context_length {rope.context_length} is the switch"
        return (rope.short_factors, rope.long_factors), [says]
    return (rope.short_factors, rope.long_factors), []


def _rotation(geometry: RopeGeometry, factors: _Factors | None, scale: float, m: float) -> Rotation:
    values: FloatArray = np.ones(geometry.pairs) if factors is None else np.asarray(factors, dtype=np.float64)
    if values.shape != (geometry.pairs,):
        raise RefusedError(f"a factor tensor has {len(values)} numbers for {geometry.pairs} rotary pairs")
    return Rotation(geometry.inv_freq / (values * scale), m, plain=bool(np.all(values * scale == 1.0)))
