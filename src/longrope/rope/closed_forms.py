"""Closed-form rescale factors: the baselines of every comparison and the seeds of every search.

Every function takes a geometry and a target length and returns λ, float64 (D,): the angle of pair i at position n
becomes n·θ_i/λ_i, so 1 extrapolates and s = L'/L interpolates linearly. A target length is in tokens and need not be
whole (a checkpoint may state a ratio instead). Tests compare the frequencies with transformers' own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np

from longrope.checks import LARGEST_FACTOR, positive_number, whole_number
from longrope.errors import LongRopeError
from longrope.rope.geometry import FloatArray, RopeGeometry


def pi(geometry: RopeGeometry, target_length: float) -> FloatArray:
    """Position interpolation (Chen et al. 2023): λ_i = s for all pairs. Raises LongRopeError when L' < L."""
    return np.full(geometry.pairs, _ratio(geometry, target_length))


def ntk_aware(geometry: RopeGeometry, target_length: float) -> FloatArray:
    """NTK-aware scaling: λ_i = s^(2i/(d-2)), that is base' = base·s^(d/(d-2)). Raises LongRopeError when L' < L."""
    ratio = _ratio(geometry, target_length)
    # A single pair (d = 2) has exponent 0/0; it turns with frequency 1 at any base, so its factor is 1.
    exponent = 2 * np.arange(geometry.pairs) / max(geometry.rotary_dim - 2, 1)
    return np.asarray(ratio**exponent, dtype=np.float64)


def dynamic_ntk(geometry: RopeGeometry, current_length: float) -> FloatArray:
    """NTK-aware scaling to the length that the sequence has now: all ones at or below L."""
    length = positive_number("current_length", current_length)
    return ntk_aware(geometry, max(length, geometry.original_length))


def ntk_critical(geometry: RopeGeometry, target_length: float, critical_dim: int | None = None) -> FloatArray:
    """NTK by critical dimension (Liu et al. 2023; "NTK" in LongRoPE2's tables): λ_i = s^(i/d_c), s at d_c, more beyond.

    `critical_dim` is d_c, a pair index in 1 … D: the theoretical one when not given, a real one for NTK-rcd.
    Raises LongRopeError when L' < L, or `critical_dim` is out of range or so low that a factor overflows.
    """
    ratio = _ratio(geometry, target_length)
    critical = _critical_dim(geometry, geometry.critical_dim() if critical_dim is None else critical_dim)
    exponent = np.arange(geometry.pairs) / critical
    if exponent[-1] * math.log(ratio) > math.log(sys.float_info.max):
        raise LongRopeError(
            f"critical_dim {critical} is too low for a ratio of {ratio:g}: the last factors overflow",
            code="invalid-setting",
        )
    return np.asarray(ratio**exponent, dtype=np.float64)


def yarn(
    geometry: RopeGeometry,
    target_length: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    critical_dim: int | None = None,
    *,
    truncate: bool = True,
) -> FloatArray:
    """YaRN (Peng et al. 2023, "NTK by parts"): 1/λ_i goes linearly in i from 1 down to 1/s between two bounds.

    The lower bound is where a pair turns `beta_fast` times inside L, the upper where it turns `beta_slow` times;
    `truncate` takes the floor of the lower and the ceiling of the upper, as transformers does by default. At or below
    the lower bound nothing is interpolated, at or above the upper everything is.

    `critical_dim` (YaRN-rcd, LongRoPE2) is a real critical dimension, a pair index in 1 … D that replaces the upper
    bound: with the default `beta_slow` of 1 that bound *is* the theoretical critical dimension (Eq. 7), the first pair
    which never finished a turn in training, so a lower real one moves exactly this end of the ramp and the pairs from
    it on get the full s. The lower bound stays, since it speaks of pairs that turned often enough to be left alone; it
    gives way only when the critical dimension lies at or below it. `beta_slow` then has no effect.

    Raises LongRopeError when L' < L, beta_fast < beta_slow or `critical_dim` is out of range.
    """
    ratio = _ratio(geometry, target_length)
    turns = ramp_ends(beta_fast, beta_slow)
    low, high = (pair_that_turns(geometry, count, geometry.original_length) for count in turns)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    if critical_dim is not None:
        high = _critical_dim(geometry, critical_dim)
        low = min(max(low, 0), high - 1)
    shares = ramp(geometry, low, high)
    return np.asarray(1.0 / (shares / ratio + (1.0 - shares)), dtype=np.float64)


def yarn_linear(
    geometry: RopeGeometry, target_length: float, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> FloatArray:
    """The YaRN of LongRoPE's authors, a seed of their search: λ_i itself goes linearly in i from 1 up to s.

    In the middle of the ramp λ is (1 + s)/2, where YaRN (`yarn`, linear in 1/λ) has 2/(1 + 1/s): 16.5 in place of 1.94
    for s = 32. The ends of the ramp are those of `yarn`. Raises LongRopeError as that does.
    """
    ratio = _ratio(geometry, target_length)
    ends = (pair_that_turns(geometry, turns, geometry.original_length) for turns in ramp_ends(beta_fast, beta_slow))
    low, high = ends
    shares = ramp(geometry, math.floor(low), math.ceil(high))
    return np.asarray(shares * ratio + (1.0 - shares), dtype=np.float64)


def pair_that_turns(geometry: RopeGeometry, turns: float, length: float) -> float:
    """The pair, as a real number, that turns `turns` times in `length` tokens: D·log_base(length/(2π·turns)).

    Below 0, or beyond the last pair, where no pair does.
    """
    return geometry.rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(geometry.base))


def ramp_ends(beta_fast: float, beta_slow: float) -> tuple[float, float]:
    """The turns at the two ends of YaRN's ramp.

    Raises LongRopeError when `beta_fast` is below `beta_slow`, or one is beyond all that can be computed with.
    """
    fast, slow = positive_number("beta_fast", beta_fast), positive_number("beta_slow", beta_slow)
    if fast < slow:
        raise LongRopeError(
            f"beta_fast must not be below beta_slow; found {fast:g} and {slow:g}", code="invalid-setting"
        )
    if fast > LARGEST_FACTOR or slow < 1 / LARGEST_FACTOR:
        raise LongRopeError(
            f"expected beta_fast and beta_slow of {1 / LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}; found {fast:g} and"
            f" {slow:g}",
            code="invalid-setting",
        )
    return fast, slow


def ramp(geometry: RopeGeometry, low: float, high: float) -> FloatArray:
    """YaRN's ramp, float64 (D,): 0 up to pair `low`, 1 from pair `high` on, linear in i between.

    The bounds are limited as in transformers: to 0 and d − 1 (not to the last pair, D − 1); where they meet, a step.
    """
    low, high = max(low, 0), max(min(high, geometry.rotary_dim - 1), 0)
    if low == high:
        high += 0.001
    return np.asarray(np.clip((np.arange(geometry.pairs) - low) / (high - low), 0.0, 1.0), dtype=np.float64)


def llama3(
    geometry: RopeGeometry, factor: float, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0
) -> FloatArray:
    """Llama 3's rule: 1/λ_i goes linearly in the turns inside L from 1/factor at `low_freq_factor` to 1 at the other.

    Raises LongRopeError when `factor` < 1 or the frequency factors are not in order.
    """
    ratio = _ratio(geometry, positive_number("factor", factor) * geometry.original_length)
    low = positive_number("low_freq_factor", low_freq_factor)
    high = positive_number("high_freq_factor", high_freq_factor)
    if low >= high:
        raise LongRopeError(
            f"low_freq_factor must be below high_freq_factor; found {low:g} and {high:g}", code="invalid-setting"
        )
    turns = geometry.original_length / geometry.periods
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / ratio + smooth), dtype=np.float64)


def su_attention_factor(geometry: RopeGeometry, target_length: float) -> float:
    """√(1 + ln s / ln L): LongRoPE's attention factor and transformers' default for `longrope`; 1 where s ≤ 1."""
    ratio = positive_number("target_length", target_length) / geometry.original_length
    return math.sqrt(1 + math.log(ratio) / math.log(geometry.original_length)) if ratio > 1 else 1.0


def yarn_attention_factor(geometry: RopeGeometry, target_length: float, mscale: float = 1.0) -> float:
    """0.1·mscale·ln s + 1: YaRN's attention factor (Peng et al. 2023, §3.4); 1 where s ≤ 1."""
    ratio = positive_number("target_length", target_length) / geometry.original_length
    return 0.1 * positive_number("mscale", mscale) * math.log(ratio) + 1.0 if ratio > 1 else 1.0


ClosedForm = Callable[[RopeGeometry, float], tuple[FloatArray, float]]

CLOSED_FORMS: dict[str, ClosedForm] = {
    "none": lambda geometry, target: (np.ones(geometry.pairs), 1.0),
    "pi": lambda geometry, target: (pi(geometry, target), 1.0),
    "ntk": lambda geometry, target: (ntk_aware(geometry, target), 1.0),
    "ntk-critical": lambda geometry, target: (ntk_critical(geometry, target), 1.0),
    "dynamic-ntk": lambda geometry, length: (dynamic_ntk(geometry, length), 1.0),
    "yarn": lambda geometry, target: (yarn(geometry, target), yarn_attention_factor(geometry, target)),
}
"""Every baseline by name: (geometry, target length) -> (factors (D,), attention factor).

`dynamic-ntk` takes the length of the sequence at hand; given the target length it equals `ntk`, so a comparison over
several lengths must ask it once per length."""


def _ratio(geometry: RopeGeometry, target_length: float) -> float:
    """s = L'/L, at least 1."""
    target = positive_number("target_length", target_length)
    if target < geometry.original_length:
        raise LongRopeError(
            f"target_length must not be below the original window of {geometry.original_length} tokens;"
            f" found {target:g}",
            code="invalid-setting",
        )
    return target / geometry.original_length


def _critical_dim(geometry: RopeGeometry, critical_dim: int) -> int:
    if whole_number("critical_dim", critical_dim, 1) > geometry.pairs:
        raise LongRopeError(
            f"critical_dim must be a pair index, 1 to {geometry.pairs}; found {critical_dim}", code="invalid-setting"
        )
    return int(critical_dim)
