"""The scaling that a checkpoint already carries, relative to its original RoPE: a baseline and a seed of the search.

The numbers are those that transformers computes for the same configuration, from our own closed forms. Scaling of the
softmax that some models add beside RoPE (deepseek's `mscale_all_dim`) is in their attention and not touched here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from longrope.checks import positive_number, shown, whole_number
from longrope.errors import LongRopeError
from longrope.rope import closed_forms as closed
from longrope.rope.geometry import RopeGeometry, rope_parameters_of, text_config, yarn_truncates
from longrope.rope.scaling import RopeScaling, Window

_Parameters = Mapping[str, Any]


def scaling_of_config(config: Any, layer_type: str | None = None) -> RopeScaling | None:
    """What the configuration `config` of a checkpoint scales already, or None where it is the original RoPE.

    `linear`, `yarn`, `llama3` and hunyuan's fixed-alpha NTK give one window, `longrope` (and its old name `su`) two:
    the short factors up to L, the long ones beyond. The last window reaches `max_position_embeddings`, or factor·L
    where that is not above L. `dynamic` gives None: transformers changes nothing at or below
    `max_position_embeddings`, which is L here, and its factors beyond depend on the length at hand, which no fixed
    window can say; `CLOSED_FORMS["dynamic-ntk"]` is that baseline. `layer_type` is as in `rope_parameters_of`.

    Raises LongRopeError when the RoPE type is unknown or its parameters are missing or wrong.
    """
    config = text_config(config)
    parameters = rope_parameters_of(config, layer_type)
    geometry = RopeGeometry.from_config(config, layer_type)
    rope_type = parameters["rope_type"]
    if rope_type == "dynamic" and parameters.get("alpha"):
        rope_type = "ntk_alpha"
    if rope_type in ("default", "dynamic"):
        return None
    if rope_type not in _WINDOWS:
        raise LongRopeError(
            f"expected a rope_type of default, dynamic, {', '.join(_WINDOWS)}; found {shown(rope_type)}, which is not"
            " known"
        )
    scaling = RopeScaling(geometry, _WINDOWS[rope_type](config, geometry, parameters), _provenance(parameters))
    return None if all(window.is_identity for window in scaling.windows) else scaling


def _linear(config: Any, geometry: RopeGeometry, parameters: _Parameters) -> tuple[Window, ...]:
    factor = _factor(parameters, "factor")
    return (_window(config, geometry, factor, closed.pi(geometry, factor * geometry.original_length)),)


def _ntk_alpha(config: Any, geometry: RopeGeometry, parameters: _Parameters) -> tuple[Window, ...]:
    # hunyuan: base' = base·alpha^(d/(d-2)) at every length, under the name "dynamic"; the window is the stated one.
    alpha = _factor(parameters, "alpha")
    return (_window(config, geometry, 1.0, closed.ntk_aware(geometry, alpha * geometry.original_length)),)


def _yarn(config: Any, geometry: RopeGeometry, parameters: _Parameters) -> tuple[Window, ...]:
    factor = _stated_factor(config, geometry, parameters)
    target = factor * geometry.original_length
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = closed.yarn_attention_factor(geometry, target)
        if mscale and all_dim:
            attention_factor = closed.yarn_attention_factor(geometry, target, mscale)
            attention_factor /= closed.yarn_attention_factor(geometry, target, all_dim)
    factors = closed.yarn(
        geometry,
        target,
        parameters.get("beta_fast") or 32.0,
        parameters.get("beta_slow") or 1.0,
        truncate=yarn_truncates(config),
    )
    return (_window(config, geometry, factor, factors, attention_factor),)


def _llama3(config: Any, geometry: RopeGeometry, parameters: _Parameters) -> tuple[Window, ...]:
    factor = _factor(parameters, "factor")
    low, high = _factor(parameters, "low_freq_factor"), _factor(parameters, "high_freq_factor")
    return (_window(config, geometry, factor, closed.llama3(geometry, factor, low, high)),)


def _longrope(config: Any, geometry: RopeGeometry, parameters: _Parameters) -> tuple[Window, ...]:
    factor = _stated_factor(config, geometry, parameters)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = closed.su_attention_factor(geometry, factor * geometry.original_length)
    short_factor, long_factor = (_required(parameters, name) for name in ("short_factor", "long_factor"))
    # transformers has one attention factor for both windows, except in phimoe, which reads one for each.
    both = getattr(config, "model_type", None) == "phimoe"
    short_m, long_m = (
        _required(parameters, name) if both else attention_factor for name in ("short_mscale", "long_mscale")
    )
    long = _window(config, geometry, factor, long_factor, long_m)
    if long.max_length <= geometry.original_length:
        raise LongRopeError(
            f"expected max_position_embeddings or factor to reach beyond the original {geometry.original_length}"
            f" tokens; found a longrope scaling that ends at {long.max_length}"
        )
    return Window(geometry.original_length, short_factor, attention_factor=short_m), long


_WINDOWS: dict[str, Callable[[Any, RopeGeometry, _Parameters], tuple[Window, ...]]] = {
    "linear": _linear,
    "ntk_alpha": _ntk_alpha,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _window(config: Any, geometry: RopeGeometry, factor: float, factors: Any, attention_factor: float = 1.0) -> Window:
    """A window up to `max_position_embeddings`, or up to factor·L where that is not above L."""
    length = getattr(config, "max_position_embeddings", None)
    if length is None or whole_number("max_position_embeddings", length, 1) <= geometry.original_length:
        length = math.floor(factor * geometry.original_length)
    return Window(length, factors, attention_factor=attention_factor)


def _required(parameters: _Parameters, name: str) -> Any:
    if parameters.get(name) is None:
        raise LongRopeError(
            f"expected {name} among the RoPE parameters of type {parameters['rope_type']!r}; found none"
        )
    return parameters[name]


def _factor(parameters: _Parameters, name: str) -> float:
    return positive_number(name, _required(parameters, name))


def _stated_factor(config: Any, geometry: RopeGeometry, parameters: _Parameters) -> float:
    """`factor`, which transformers follows even against the lengths, or the ratio of the lengths where it is absent."""
    if parameters.get("factor") is not None:
        return _factor(parameters, "factor")
    length = whole_number("max_position_embeddings", getattr(config, "max_position_embeddings", None), 1)
    return length / geometry.original_length


def _provenance(parameters: _Parameters) -> dict[str, Any]:
    """The scalars of the RoPE dict; the lists are the windows themselves."""
    scalars = {key: value for key, value in parameters.items() if isinstance(value, bool | int | float | str)}
    return {"origin": "configuration of the checkpoint", "rope_parameters": scalars}
