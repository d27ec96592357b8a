"""Closed-form factors of a second extension: a model trained to L_ft under factors λ, stretched on to L' > L_ft.

LongRoPE (arXiv:2402.13753, §3.3) fine-tunes to 256k and interpolates a second time, to 2048k, without training; its
ablation of that second step compares the search with PI and YaRN applied to the fine-tuned model. Here are PI, NTK and
YaRN of that kind: the forms of `closed_forms.py` with the fine-tuned model's periods λ_i·T_i in place of T_i and its
training length L_ft in place of L. Every result is relative to the *original* RoPE, as all factors are: s₂ = L'/L_ft
multiplies λ, it does not replace it.

Every function takes a geometry, the trained factors λ (D,), L_ft and L' in tokens, and returns float64 (D,): λ times
the multiples μ of the second extension, which are non-decreasing and at least 1. λ stays what it is where a factor is
below its predecessor (some published ones are). With λ = 1 and L_ft = L the results are those of `closed_forms.py`, bit
for bit. All raise LongRopeError when L' < L_ft or λ are not D positive numbers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np

from longrope.checks import positive_number
from longrope.errors import LongRopeError
from longrope.rope.closed_forms import pair_that_turns, ramp, ramp_ends
from longrope.rope.geometry import FloatArray, RopeGeometry
from longrope.rope.scaling import RopeScaling, Window

Factors = Sequence[float] | FloatArray


def second_pi(
    geometry: RopeGeometry, trained_factors: Factors, trained_length: float, target_length: float
) -> FloatArray:
    """Position interpolation of the fine-tuned model: λ_i·s₂."""
    factors, ratio = _checked(geometry, trained_factors, trained_length, target_length)
    return factors * ratio


def second_ntk(
    geometry: RopeGeometry, trained_factors: Factors, trained_length: float, target_length: float
) -> FloatArray:
    """NTK-aware scaling of the fine-tuned model: λ_i·s₂^(2i/(d-2)), nothing at the first pair, s₂ at the last."""
    factors, ratio = _checked(geometry, trained_factors, trained_length, target_length)
    exponent = 2 * np.arange(geometry.pairs) / max(geometry.rotary_dim - 2, 1)
    return np.asarray(factors * ratio**exponent, dtype=np.float64)


def second_ntk_critical(
    geometry: RopeGeometry, trained_factors: Factors, trained_length: float, target_length: float
) -> FloatArray:
    """NTK by the critical dimension of the fine-tuned model: λ_i·s₂^(i/d_c), s₂ at d_c, more beyond.

    d_c is the first pair whose period λ_i·T_i is not below L_ft: the first that did not finish a turn in training
    (LongRoPE2 Eq. 7, for the rescaled periods). At least 1: the first pair is never interpolated. Raises LongRopeError
    when it is so low that a factor overflows, too.
    """
    factors, ratio = _checked(geometry, trained_factors, trained_length, target_length)
    critical = max(math.ceil(_pair_of(geometry, factors, trained_length, 1.0)), 1)
    if (geometry.pairs - 1) / critical * math.log(ratio) + math.log(factors.max()) > math.log(sys.float_info.max):
        raise LongRopeError(
            f"only {critical} pairs finish a turn in {trained_length:g} tokens: the last factors overflow for a "
            f"further ratio of {ratio:g}",
            code="invalid-setting",
        )
    return np.asarray(factors * ratio ** (np.arange(geometry.pairs) / critical), dtype=np.float64)


def second_yarn(
    geometry: RopeGeometry,
    trained_factors: Factors,
    trained_length: float,
    target_length: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    *,
    truncate: bool = True,
) -> FloatArray:
    """YaRN of the fine-tuned model: pairs that turn more than `beta_fast` times in L_ft keep λ_i, slow ones get λ_i·s₂.

    Turns are those of the rescaled pair, L_ft/(λ_i·T_i). Between the pair that turns `beta_fast` times and the one that
    turns `beta_slow` times, 1/λ goes linearly in i from the first to the second, as in `closed_forms.yarn`; `truncate`
    rounds to whole pairs as there. Raises LongRopeError when beta_fast < beta_slow, too.
    """
    factors, ratio = _checked(geometry, trained_factors, trained_length, target_length)
    shares = _shares(geometry, factors, trained_length, beta_fast, beta_slow, truncate)
    return np.asarray(factors * (1.0 / (shares / ratio + (1.0 - shares))), dtype=np.float64)


def second_yarn_linear(
    geometry: RopeGeometry,
    trained_factors: Factors,
    trained_length: float,
    target_length: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> FloatArray:
    """`second_yarn` with a ramp that is linear in the multiple, as `closed_forms.yarn_linear`."""
    factors, ratio = _checked(geometry, trained_factors, trained_length, target_length)
    shares = _shares(geometry, factors, trained_length, beta_fast, beta_slow)
    return np.asarray(factors * (shares * ratio + (1.0 - shares)), dtype=np.float64)


def trained_pair(geometry: RopeGeometry, trained_factors: Factors, trained_length: float, turns: float) -> float:
    """The pair, as a real number, that turns `turns` times in L_ft under the factors it was trained with.

    With one turn rounded up it is the critical dimension of the fine-tuned model (LongRoPE2 Eq. 7, for the rescaled
    periods).
    """
    factors, _ = _checked(geometry, trained_factors, trained_length, trained_length)
    return _pair_of(geometry, factors, trained_length, turns)


def _shares(
    geometry: RopeGeometry,
    factors: FloatArray,
    trained_length: float,
    beta_fast: float,
    beta_slow: float,
    truncate: bool = True,
) -> FloatArray:
    """YaRN's ramp (D,) by the turns of the rescaled pairs in L_ft."""
    low, high = (_pair_of(geometry, factors, trained_length, turns) for turns in ramp_ends(beta_fast, beta_slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return ramp(geometry, low, high)


SecondForm = Callable[[RopeGeometry, Factors, float, float], FloatArray]

SECOND_FORMS: dict[str, SecondForm] = {
    "second-pi": second_pi,
    "second-ntk": second_ntk,
    "second-ntk-critical": second_ntk_critical,
    "second-yarn": second_yarn,
}
"""Every second form by name: (geometry, λ (D,), L_ft, L') -> factors (D,)."""


def continued_attention_factor(attention_factor: float, trained_length: float, target_length: float) -> float:
    """m·(0.1·ln s₂ + 1): YaRN's attention factor (Peng et al. 2023, §3.4) for a model trained under m; m where s₂ ≤ 1.

    Beyond L_ft a query meets s₂ times as many keys; without this a model trained on whole rows finds nothing among
    them (docs/whole-rows.md).
    """
    ratio = positive_number("target_length", target_length) / positive_number("trained_length", trained_length)
    return positive_number("attention_factor", attention_factor) * (0.1 * math.log(ratio) + 1.0 if ratio > 1 else 1.0)


def second_window(name: str, checkpoint_scaling: RopeScaling, target_length: int) -> Window:
    """The last window of `checkpoint_scaling` stretched to `target_length` by the second form `name`.

    It keeps its start tokens, and its attention factor, which `second-yarn` continues. Raises LongRopeError for an
    unknown name, or a `target_length` that is not beyond the last window.
    """
    if name not in SECOND_FORMS:
        raise LongRopeError(
            f"expected one of {', '.join(SECOND_FORMS)} to compare with, found {name!r}", code="invalid-setting"
        )
    last, trained = checkpoint_scaling.windows[-1], checkpoint_scaling.target_length
    if target_length <= trained:
        raise LongRopeError(
            f"expected a target beyond the checkpoint's {trained} tokens for {name}, found {target_length}",
            code="invalid-setting",
        )
    factors = SECOND_FORMS[name](checkpoint_scaling.geometry, last.factors, trained, target_length)
    factor = last.attention_factor
    if name == "second-yarn":
        factor = continued_attention_factor(factor, trained, target_length)
    return Window(target_length, tuple(factors.tolist()), last.start_tokens, factor)


def _checked(
    geometry: RopeGeometry, trained_factors: Factors, trained_length: float, target_length: float
) -> tuple[FloatArray, float]:
    """λ as an array, and s₂ = L'/L_ft, at least 1."""
    factors = np.asarray(trained_factors, dtype=np.float64)
    if factors.shape != (geometry.pairs,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise LongRopeError(
            f"trained factors must be {geometry.pairs} positive numbers, one per rotary pair", code="invalid-setting"
        )
    trained, target = positive_number("trained_length", trained_length), positive_number("target_length", target_length)
    if target < trained:
        raise LongRopeError(
            f"target_length must not be below the {trained:g} tokens that the model was trained for; found {target:g}",
            code="invalid-setting",
        )
    return factors, target / trained


def _pair_of(geometry: RopeGeometry, factors: FloatArray, length: float, turns: float) -> float:
    """The pair, as a real number, whose period λ_i·T_i fits `turns` times into `length` tokens.

    Pair i under λ_i turns as an unscaled pair u_i = i + D·log_base(λ_i) would; between the pairs, u is linear in i, and
    beyond the first and the last it goes on with their factors. Where λ falls, the largest factor so far counts.
    """
    factors = np.maximum.accumulate(factors)
    index = np.arange(geometry.pairs, dtype=np.float64)
    unscaled = index + geometry.pairs * np.log(factors) / math.log(geometry.base)
    wanted = pair_that_turns(geometry, turns, length)
    if wanted <= unscaled[0]:
        return float(wanted - unscaled[0])
    if wanted >= unscaled[-1]:
        return float(index[-1] + (wanted - unscaled[-1]))
    return float(np.interp(wanted, unscaled, index))
