"""Closed forms as scalings, ready to apply to a model: PI, NTK, YaRN and Llama 3's rule in one line each.

`closed_forms.py` has the formulas, as factors. A scaling here has one window with these factors at every length up to
the target, as runtimes apply them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import Any

from longrope.checks import positive_number
from longrope.errors import LongRopeError
from longrope.rope import closed_forms
from longrope.rope.geometry import FloatArray, RopeGeometry
from longrope.rope.scaling import RopeScaling
from longrope.units import parse_length


def pi(model: Any, target_length: int | str, *, original_length: int | str | None = None) -> RopeScaling:
    """Position interpolation (Chen et al. 2023): every angle is divided by s = L'/L.

    `model`: a loaded transformers model, its config, or a `RopeGeometry`. `target_length`: L' in tokens, such as
    131072 or "128k". `original_length`: L in place of the one that is stated. Raises LongRopeError when L' < L, or the
    model has no RoPE.
    """
    geometry, target = _geometry(model, original_length), parse_length(target_length)
    return _scaling("pi", geometry, target, closed_forms.pi(geometry, target))


def ntk(model: Any, target_length: int | str, *, original_length: int | str | None = None) -> RopeScaling:
    """NTK-aware scaling: the base becomes base·s^(d/(d-2)), so that only the slowest pair is divided by s = L'/L.

    Arguments and errors are those of `pi`.
    """
    geometry, target = _geometry(model, original_length), parse_length(target_length)
    return _scaling("ntk", geometry, target, closed_forms.ntk_aware(geometry, target))


def ntk_critical(
    model: Any, target_length: int | str, *, critical_dim: int | None = None, original_length: int | str | None = None
) -> RopeScaling:
    """NTK by critical dimension (Liu et al. 2023; "NTK" in LongRoPE2's tables): λ_i = s^(i/d_c).

    `critical_dim`: d_c, a pair index from 1; by default the theoretical one (LongRoPE2 Eq. 7). The other arguments and
    errors are those of `pi`.
    """
    geometry, target = _geometry(model, original_length), parse_length(target_length)
    return _scaling("ntk-critical", geometry, target, closed_forms.ntk_critical(geometry, target, critical_dim))


def yarn(
    model: Any,
    target_length: int | str,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    critical_dim: int | None = None,
    attention_factor: float | None = None,
    original_length: int | str | None = None,
) -> RopeScaling:
    """YaRN (Peng et al. 2023): pairs that turn often keep their angle, slow ones are divided by s = L'/L, with a ramp.

    `beta_fast`, `beta_slow`: turns within L at the two ends of the ramp. `critical_dim`: a real critical dimension in
    place of the slow end (LongRoPE2's YaRN-rcd). `attention_factor`: 0.1·ln s + 1 by default. The other arguments and
    errors are those of `pi`.
    """
    geometry, target = _geometry(model, original_length), parse_length(target_length)
    factors = closed_forms.yarn(geometry, target, beta_fast, beta_slow, critical_dim)
    if attention_factor is None:
        attention_factor = closed_forms.yarn_attention_factor(geometry, target)
    return _scaling("yarn", geometry, target, factors, attention_factor)


def llama3(
    model: Any,
    target_length: int | str,
    *,
    factor: float | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_length: int | str | None = None,
) -> RopeScaling:
    """Llama 3's rule: the frequency goes linearly in the turns within L from 1/factor at `low_freq_factor` to 1.

    `factor`: s = L'/L by default (Llama 3.1 states 8 for a 16-fold window). `high_freq_factor`: turns from which a pair
    keeps its angle. The other arguments and errors are those of `pi`.
    """
    geometry, target = _geometry(model, original_length), parse_length(target_length)
    ratio = target / geometry.original_length if factor is None else positive_number("factor", factor)
    return _scaling("llama3", geometry, target, closed_forms.llama3(geometry, ratio, low_freq_factor, high_freq_factor))


def _geometry(model: Any, original_length: int | str | None) -> RopeGeometry:
    length = None if original_length is None else parse_length(original_length)
    if isinstance(model, RopeGeometry):
        return model if length is None else replace(model, original_length=length)
    if isinstance(model, str | PathLike):
        raise LongRopeError(
            f"expected a loaded model, its config or a RopeGeometry; found the name {str(model)!r}",
            code="not-loaded",
            hint="load the config with transformers' AutoConfig.from_pretrained",
        )
    return RopeGeometry.from_config(getattr(model, "config", model), original_length=length)


def _scaling(
    name: str, geometry: RopeGeometry, target_length: int, factors: FloatArray, attention_factor: float = 1.0
) -> RopeScaling:
    provenance = {"origin": "closed form", "method": name}
    return RopeScaling.single(geometry, target_length, factors, 0, attention_factor, provenance)


FORMULAS: dict[str, Callable[..., RopeScaling]] = {"pi": pi, "ntk": ntk, "ntk-critical": ntk_critical, "yarn": yarn}
"""The scalings that a name and a length are enough for, as baselines are called."""
