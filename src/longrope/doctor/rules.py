"""The RoPE that a runtime computes from config.json by its row of the table: frequencies, attention factor, windows.

The closed forms (yarn, linear, llama3) are those of `longrope.rope`,
which equal transformers'; a runtime that deviates from them does so in its attention factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longrope.checks import positive_number
from longrope.doctor.checkpoint_config import ORIGINAL, CheckpointConfig
from longrope.doctor.readings import LONGROPE, RefusedError, RopeReading, UnknownRuleError, read, require
from longrope.doctor.table import Runtime
from longrope.errors import LongRopeError
from longrope.models.gguf.rope import CONTEXT_STEP
from longrope.rope import closed_forms as closed
from longrope.rope.geometry import FloatArray, RopeGeometry

SHORT, LONG = "short", "long"


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotation of queries and keys in one window."""

    frequencies: FloatArray
    """Radians per token, float64 (D,)."""
    attention_factor: float
    """m, which multiplies cosines and sines."""
    plain: bool = False
    """True if the frequencies are base^(-2i/d): no factor other than 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """The RoPE that a runtime computes from a checkpoint, at every length."""

    short: Rotation
    long: Rotation
    base: float
    switch: str
    """The table's name of the rule that chooses the window."""
    original_length: int
    """L as the runtime reads it."""
    engine: int
    """Tokens that the engine or context is started for; it serves no more."""
    windowed: bool
    """True if it has two windows, which may hold the same numbers."""
    limited: bool = False
    """True if it serves no more than the engine's tokens."""
    capped: bool = False
    """True if max_position_embeddings keeps the engine from the tokens that it should serve."""
    remarks: tuple[str, ...] = ()

    def window(self, length: int) -> str | None:
        """`short` or `long` for a text of `length` tokens alone in its batch; None where it is not served."""
        if (self.limited or self.switch in ("engine", "context")) and length > self.engine:
            return None
        is_long = {
            "forward": length > self.original_length,
            "at": length >= self.original_length,
            "past": length - 1 > self.original_length,  # the last position, which counts from 0
            "engine": self.engine > self.original_length,
            "context": -(-self.engine // CONTEXT_STEP) * CONTEXT_STEP > self.original_length,
            "always": True,
        }
        return LONG if is_long[self.switch] else SHORT

    def at(self, length: int) -> Rotation | None:
        """The rotation of a text of `length` tokens; None where it is not served."""
        window = self.window(length)
        return None if window is None else self.long if window == LONG else self.short


def behaviour(config: CheckpointConfig, runtime: Runtime, switch: int, target: int) -> Behaviour:
    """The RoPE that `runtime` computes from `config`, started for `target` tokens (or `switch`, as its row says).

    Raises RefusedError where the runtime stops with an error, UnknownRuleError where the table has no rule.
    """
    family, says = config.family, {"family": config.family}
    if runtime.lacks:
        raise RefusedError(runtime.lacks.format(**says))
    if runtime.unlooked and config.stated_type != "default":
        raise UnknownRuleError(runtime.unlooked)
    if not runtime.knows(family):
        raise UnknownRuleError(f"the table has no rule of {runtime.label} for the class {family}")
    if runtime.files is not None and runtime.files.base_required and config.base is None and not runtime.names(family):
        raise UnknownRuleError(
            f"it is not known whether {runtime.label} needs rope_theta at the top level for {family}"
        )
    reading, stated = read(config, runtime), config.stated_type
    if reading.rope_type == "default" and stated not in ("default", *runtime.known_types):
        # Plain RoPE because it looks for the type elsewhere, or because nobody has looked how it reads this type.
        raise UnknownRuleError(f"the table has no rule of {runtime.label} for the type {stated!r} of {family}")
    if reading.rope_type == "default" and stated == LONGROPE and reading.parameters and family in (runtime.only or ()):
        require(reading.parameters, runtime.needed)
    if reading.rope_type != "default" and reading.rope_type not in runtime.own_types:
        reading = _of_family(runtime, reading, says)
    return _behaviour(config, runtime, reading, switch, target)


def _of_family(runtime: Runtime, reading: RopeReading, says: Mapping[str, str]) -> RopeReading:
    """The reading of a RoPE type as the runtime's code for the family takes it.

    Raises RefusedError where that code stops, UnknownRuleError where nobody has looked at it.
    """
    if runtime.plain:
        return _taken_for(reading, "default", runtime.plain.format(type=reading.rope_type, **says))
    if runtime.as_yarn and reading.rope_type != "yarn":
        return _taken_for(reading, "yarn", runtime.as_yarn.format(**says))
    if reading.rope_type not in runtime.known_types:
        raise UnknownRuleError(f"the table has no rule of {runtime.label} for the type {reading.rope_type!r}")
    if runtime.stops:
        raise RefusedError(runtime.stops.format(**says))
    if runtime.only is not None and says["family"] not in runtime.only:
        other = runtime.otherwise_says.format(**says)
        if runtime.otherwise == "refused":
            raise RefusedError(other)
        return _taken_for(reading, "default", other)
    require(reading.parameters, runtime.needed)
    return reading


def _taken_for(reading: RopeReading, rope_type: str, why: str) -> RopeReading:
    return replace(reading, rope_type=rope_type, remarks=(*reading.remarks, why))


def _behaviour(config: CheckpointConfig, runtime: Runtime, reading: RopeReading, switch: int, target: int) -> Behaviour:
    short, long, remarks = _rotations(config, runtime, reading)
    engine, capped = _engine(config, runtime, reading, switch, target)
    return Behaviour(
        short=short,
        long=long,
        base=reading.base,
        switch=runtime.switch,
        original_length=reading.original_length,
        engine=engine,
        windowed=reading.rope_type == LONGROPE,
        limited=runtime.limited,
        capped=any("max_position_embeddings" in remark for remark in capped),
        remarks=(*reading.remarks, *remarks, *capped),
    )


def _engine(
    config: CheckpointConfig, runtime: Runtime, reading: RopeReading, switch: int, target: int
) -> tuple[int, list[str]]:
    """The tokens that the engine is started for, and remarks where a limit makes them fewer."""
    derived = _derived_length(config, reading) if "derived" in runtime.limits else config.length
    wanted = {"target": target, "original": switch, "default": config.original_length or derived}[runtime.engine]
    caps = {
        "config": ("max_position_embeddings", config.length),
        "derived": ("the length derived from max_position_embeddings", derived),
        "tokenizer": ("model_max_length", config.tokenizer_length),
    }
    engine, remarks = wanted, []
    for name, limit in (caps[cap] for cap in runtime.limits):
        if limit is not None and limit < engine:
            engine = limit
            remarks.append(f"{name} {limit} caps the length that it serves")
    return engine, remarks


def _derived_length(config: CheckpointConfig, reading: RopeReading) -> int:
    """The longest text that vLLM serves: L' of the config, times the factor of linear, or L times that of YaRN."""
    factor = _number("factor", reading.parameters.get("factor"), 1.0)
    if reading.rope_type == "yarn":
        return int(reading.original_length * factor)
    return int(config.length * factor) if reading.rope_type == "linear" else config.length


def _rotations(
    config: CheckpointConfig, runtime: Runtime, reading: RopeReading
) -> tuple[Rotation, Rotation, list[str]]:
    """The rotations of the short and the long window, which are the same where there is one, and remarks."""
    geometry = RopeGeometry(reading.rotary_dim, reading.base, reading.original_length)
    if reading.rope_type == "default":
        plain = Rotation(geometry.inv_freq, 1.0, plain=True)
        return plain, plain, []
    if reading.rope_type == LONGROPE:
        return _longrope(config, runtime, reading, geometry)
    factors, attention_factor = _closed_form(config, runtime, reading, geometry)
    rotation = _rotation(geometry, factors, attention_factor)
    return rotation, rotation, _yarn_remarks(runtime, reading)


def _longrope(
    config: CheckpointConfig, runtime: Runtime, reading: RopeReading, geometry: RopeGeometry
) -> tuple[Rotation, Rotation, list[str]]:
    short, long = (_factors(reading.parameters, f"{window}_factor", geometry.pairs) for window in (SHORT, LONG))
    remarks = []
    if config.model_class.short_only_5 and runtime.name == "transformers-5":
        long = short
        remarks.append(f"the rotary module of {config.family} turns by the short factors at every length")
    short_m, long_m = _attention_factors(config, runtime, reading)
    if runtime.multiplies:
        short, long = 1.0 / short, 1.0 / long
        remarks.append("multiplies the frequencies by the factors, where all others divide")
    return _rotation(geometry, short, short_m), _rotation(geometry, long, long_m), remarks


def _rotation(geometry: RopeGeometry, factors: FloatArray, attention_factor: float) -> Rotation:
    return Rotation(geometry.inv_freq / factors, attention_factor, plain=bool(np.all(factors == 1.0)))


def _factors(parameters: Mapping[str, Any], name: str, pairs: int) -> FloatArray:
    """λ as float64 (D,); a list of one number is stretched by broadcasting in every runtime that uses tensors."""
    values = parameters.get(name)
    if not isinstance(values, list) or not values:
        raise RefusedError(f"{name} is no list of numbers")
    if len(values) not in (1, pairs):
        raise RefusedError(f"{name} has {len(values)} numbers for {pairs} rotary pairs: shapes differ")
    try:
        return np.broadcast_to([positive_number(name, value) for value in values], (pairs,)).astype(np.float64)
    except LongRopeError as error:
        raise RefusedError(str(error)) from error


def _attention_factors(config: CheckpointConfig, runtime: Runtime, reading: RopeReading) -> tuple[float, float]:
    """m of the short and of the long window, from a `longrope` dictionary."""
    given, by_lengths = reading.parameters, _su(reading, config.length / reading.original_length)
    rule = runtime.attention
    if rule == "none":
        return 1.0, 1.0
    if rule == "lengths":
        return by_lengths, by_lengths
    if rule == "mscale" or config.model_class.mscale:
        if rule != "mscale" and not {"short_mscale", "long_mscale"} <= given.keys():
            raise RefusedError(f"the class {config.family} needs short_mscale and long_mscale")
        short, long = (given.get(f"{window}_mscale") for window in (SHORT, LONG))
        return (_number("short_mscale", short, by_lengths), _number("long_mscale", long, by_lengths))
    factor, stated = given.get("factor"), given.get("attention_factor")
    if rule == "stated-4":
        top = config.original_length or config.model_class.original_length
        if top is not None:
            factor = None  # the ratio of the lengths goes before a stated factor
        elif factor is None and stated is None:
            raise RefusedError(f"without a top-level {ORIGINAL} it needs factor or attention_factor (TypeError)")
    su = by_lengths if factor is None else _su(reading, _number("factor", factor, 1.0))
    m = _number("attention_factor", stated, su)
    return m, m


def _closed_form(
    config: CheckpointConfig, runtime: Runtime, reading: RopeReading, geometry: RopeGeometry
) -> tuple[FloatArray, float]:
    """λ (D,) and m of `linear`, `llama3` and `yarn`."""
    given = reading.parameters
    try:
        factor = positive_number("factor", given.get("factor", config.length / reading.original_length))
        if reading.rope_type == "linear":
            return np.full(geometry.pairs, factor), 1.0
        if reading.rope_type == "llama3":
            bounds = (positive_number(name, given.get(name)) for name in ("low_freq_factor", "high_freq_factor"))
            return closed.llama3(geometry, factor, *bounds), 1.0
        if runtime.yarn_factor == "lengths" and ORIGINAL in given:
            factor = config.length / reading.original_length
        target = factor * reading.original_length
        betas = (given.get("beta_fast") or 32.0, given.get("beta_slow") or 1.0)
        truncates = bool(given.get("truncate", True)) or "truncate" not in runtime.yarn_reads
        factors = closed.yarn(geometry, target, *betas, truncate=truncates)
    except LongRopeError as error:
        raise RefusedError(str(error)) from error
    if unknown := [key for key in runtime.yarn_unknown if _says_something(key, given.get(key))]:
        raise UnknownRuleError(f"it is not known whether {runtime.label} reads {', '.join(unknown)} of yarn")
    return factors, _yarn_attention(runtime, given, geometry, target)


def _yarn_attention(runtime: Runtime, given: Mapping[str, Any], geometry: RopeGeometry, target: float) -> float:
    """m of `yarn` by the keys that the runtime reads of the dictionary."""
    reads = runtime.yarn_reads

    def by_formula(key: str, default: float) -> float:
        value = given.get(key, default)
        return 1.0 if value == 0 else closed.yarn_attention_factor(geometry, target, _number(key, value, default))

    m = closed.yarn_attention_factor(geometry, target)
    if "mscale-alone" in reads or ("mscale" in reads and given.get("mscale") and given.get("mscale_all_dim")):
        m = by_formula("mscale", 1.0) / by_formula("mscale_all_dim", 0.0)
    if "attention_factor" in reads:
        m = _number("attention_factor", given.get("attention_factor"), m)
    return m * _number("attn_factor", given.get("attn_factor"), 1.0) if "attn_factor" in reads else m


def _yarn_remarks(runtime: Runtime, reading: RopeReading) -> list[str]:
    """The keys of `yarn` that this runtime reads otherwise than transformers does."""
    if reading.rope_type != "yarn":
        return []
    given, reads = reading.parameters, runtime.yarn_reads
    remarks = [
        f"{key} is not read"
        for key in ("attention_factor", "truncate")
        if key not in reads and _says_something(key, given.get(key))
    ]
    if "attn_factor" in reads and given.get("attn_factor") not in (None, 1):
        remarks.append(f"the attention factor is multiplied by attn_factor {given['attn_factor']:g}")
    return remarks


def _says_something(key: str, value: Any) -> bool:
    """True if `value` of a key of yarn differs from what is computed without the key."""
    return value is not None and not (key == "truncate" and value is True)


def _su(reading: RopeReading, ratio: float) -> float:
    """√(1 + ln s/ln L) with the L that the runtime reads."""
    geometry = RopeGeometry(reading.rotary_dim, reading.base, reading.original_length)
    return closed.su_attention_factor(geometry, ratio * reading.original_length)


def _number(name: str, value: Any, default: float) -> float:
    try:
        return default if value is None else positive_number(name, value)
    except LongRopeError as error:
        raise RefusedError(str(error)) from error
