"""The RoPE settings in the `config.json` of a Hugging Face checkpoint: reads a scaling from them, and writes one.

Reading (`scaling_of_config`): the scaling that a checkpoint has already, relative to its original RoPE. The numbers are
those that transformers computes for the same configuration, from our own closed forms. Scaling of the softmax that some
models add beside RoPE (deepseek's `mscale_all_dim`) is in their attention and not touched here.

Writing (`superset_config`): one superset that transformers 5 and 4.5x, vLLM and others read alike. A config with
`rope_parameters` alone (as transformers 5 saves it) is plain RoPE with base 10,000 in transformers 4; one with the
original length inside the dictionary alone never leaves the short factors there. Neither gives an error, so every key
is written in every place that some runtime reads, all with the same value. Where both are present, transformers 5 takes
`rope_scaling`, transformers 4 knows nothing else, and others choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from longrope.checks import scale_factor, shown, whole_number
from longrope.errors import LongRopeError
from longrope.rope import closed_forms as closed
from longrope.rope.geometry import (
    WINDOW_NAMES,
    RopeGeometry,
    head_dim_of,
    rope_layer_types,
    rope_parameters_of,
    scaled_layer_type,
    stated_window,
    text_config,
    yarn_truncates,
)
from longrope.rope.scaling import RopeScaling, Window
from longrope.transformers_version import require_longrope_by_layer

_Parameters = Mapping[str, Any]


def scaling_of_config(
    config: Any, layer_type: str | None = None, original_length: int | None = None
) -> RopeScaling | None:
    """The scaling that the configuration `config` of a checkpoint states, or None for the original RoPE.

    `linear`, `yarn`, `llama3` and hunyuan's fixed-alpha NTK give one window, `longrope` (and its old name `su`) two:
    the short factors up to L, the long ones beyond. The last window reaches the window that the config states
    (`stated_window`), or factor·L where that is not above L; with `yarn`, the longer of the two. A `longrope` whose
    window is still the original length has the short factors alone: the long ones are never used inside it.

    `dynamic` gives None: transformers changes nothing at or below `max_position_embeddings`, which is L here, and its
    factors beyond depend on the length of the text, so no window has them; `CLOSED_FORMS["dynamic-ntk"]` is that
    baseline. `layer_type` is as in `rope_parameters_of`. `original_length` goes before the L that the config states or
    lets guess: it is that of the geometry and of windows that end at factor·L. The factors stay those that transformers
    computes from the config.

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
            " known",
            code="unknown-rope-type",
        )
    windows = _WINDOWS[rope_type](_Source(config, geometry, parameters, original_length or geometry.original_length))
    geometry = RopeGeometry.from_config(config, layer_type, original_length)
    scaling = RopeScaling(geometry, windows, _provenance(parameters))
    return None if all(window.is_identity for window in scaling.windows) else scaling


@dataclass(frozen=True, slots=True)
class _Source:
    """A configuration, as the functions of one RoPE type read it."""

    config: Any
    geometry: RopeGeometry
    """That of the configuration alone, from which transformers computes the factors."""
    parameters: _Parameters
    original_length: int
    """L, as it was given or as the configuration has it."""

    def window(self, factor: float, factors: Any, attention_factor: float = 1.0, *, longer: bool = False) -> Window:
        """A window up to the one that the configuration states, or up to factor·L where that is not above L.

        `longer`: up to the longer of the two.
        """
        stated, by_factor = stated_window(self.config) or 0, math.floor(factor * self.original_length)
        length = max(stated, by_factor) if longer else stated if stated > self.original_length else by_factor
        return Window(length, factors, attention_factor=attention_factor)


def _linear(source: _Source) -> tuple[Window, ...]:
    factor = _factor(source.parameters, "factor")
    return (source.window(factor, closed.pi(source.geometry, factor * source.geometry.original_length)),)


def _ntk_alpha(source: _Source) -> tuple[Window, ...]:
    # hunyuan: base' = base·alpha^(d/(d-2)) at every length, under the name "dynamic"; the window is the stated one.
    alpha = _factor(source.parameters, "alpha")
    return (source.window(1.0, closed.ntk_aware(source.geometry, alpha * source.geometry.original_length)),)


def _yarn(source: _Source) -> tuple[Window, ...]:
    geometry, parameters = source.geometry, source.parameters
    factor = _stated_factor(source)
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
        truncate=yarn_truncates(source.config),
    )
    # The factor and the original length are YaRN's own statement of its window; max_position_embeddings often stays
    # behind (Qwen3's model cards have 40,960 beside 4 times 32,768).
    return (source.window(factor, factors, attention_factor, longer=True),)


def _llama3(source: _Source) -> tuple[Window, ...]:
    parameters, factor = source.parameters, _factor(source.parameters, "factor")
    low, high = _factor(parameters, "low_freq_factor"), _factor(parameters, "high_freq_factor")
    return (source.window(factor, closed.llama3(source.geometry, factor, low, high)),)


NEEDS_MSCALE = ("phimoe",)
"""Model types whose classes insist on short_mscale and long_mscale."""


def _longrope(source: _Source) -> tuple[Window, ...]:
    geometry, parameters = source.geometry, source.parameters
    factor = _stated_factor(source)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = closed.su_attention_factor(geometry, factor * geometry.original_length)
    short_factor, long_factor = (_required(parameters, name) for name in ("short_factor", "long_factor"))
    # transformers has one attention factor for both windows, except in phimoe, which reads one for each.
    both = getattr(source.config, "model_type", None) in NEEDS_MSCALE
    short_m, long_m = (
        _required(parameters, name) if both else attention_factor for name in ("short_mscale", "long_mscale")
    )
    short = Window(geometry.original_length, short_factor, attention_factor=short_m)
    long = source.window(factor, long_factor, long_m)
    if len(short.factors) == len(long.factors) and long.max_length <= short.max_length:
        return (short,)
    return short, long


_WINDOWS: dict[str, Callable[[_Source], tuple[Window, ...]]] = {
    "linear": _linear,
    "ntk_alpha": _ntk_alpha,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _required(parameters: _Parameters, name: str) -> Any:
    if parameters.get(name) is None:
        raise LongRopeError(
            f"expected {name} among the RoPE parameters of type {parameters['rope_type']!r}; found none",
            code="invalid-config",
        )
    return parameters[name]


def _factor(parameters: _Parameters, name: str) -> float:
    return scale_factor(name, _required(parameters, name))


def _stated_factor(source: _Source) -> float:
    """`factor`, which transformers follows even against the lengths, or the ratio of the lengths where it is absent."""
    if source.parameters.get("factor") is not None:
        return _factor(source.parameters, "factor")
    length = whole_number("max_position_embeddings", stated_window(source.config), 1)
    return length / source.geometry.original_length


def _provenance(parameters: _Parameters) -> dict[str, Any]:
    """The scalars of the RoPE dict; the lists are the windows themselves."""
    scalars = {key: value for key, value in parameters.items() if isinstance(value, bool | int | float | str)}
    return {"origin": "configuration of the checkpoint", "rope_parameters": scalars}


THREE_KEY_FAMILIES = ("phi3", "phi4_multimodal")
"""Families whose `rope_scaling` may have `type`, `short_factor` and `long_factor` only in transformers 4."""
_FLAT_BESIDE_NESTED = ("gemma3_text", "olmo3")
"""Families with one RoPE per layer type in transformers 5, where `rope_scaling` is that of full attention; transformers
4 reads flat keys."""


def unsupported_by_transformers(scaling: RopeScaling) -> list[str]:
    """The parts of `scaling` that transformers' `longrope` cannot express, one phrase each; empty where it can.

    It has two regimes, short up to one length and long beyond, one list of factors each, one attention factor for both,
    and no start tokens.
    """
    unsupported = []
    windows = scaling.windows
    if len(windows) > 2:
        dropped = ", ".join(str(window.max_length) for window in windows[1:-1])
        unsupported.append(f"the windows to {dropped} tokens: transformers has two regimes and one switch")
    start_tokens = {window.max_length: window.start_tokens for window in windows if window.start_tokens}
    if start_tokens:
        found = ", ".join(f"{n_hat} (window to {length})" for length, n_hat in start_tokens.items())
        unsupported.append(f"the start tokens {found}: every position is rescaled")
    factors = {window.attention_factor for window in (windows[0], windows[-1])}
    if len(factors) > 1:
        unsupported.append(
            f"the attention factor {windows[0].attention_factor:g} of the short window: "
            f"{windows[-1].attention_factor:g} is used in both"
        )
    return unsupported


def refuse_unsupported(unsupported: Sequence[str], runtime: str, hint: str) -> None:
    """Raise LongRopeError (`not-expressible`) when `runtime` does not support some parts of a scaling."""
    if unsupported:
        raise LongRopeError(
            f"{runtime} cannot express this scaling; it would lose {', and '.join(unsupported)}",
            code="not-expressible",
            hint=hint,
        )


def transformers_scaling(scaling: RopeScaling) -> RopeScaling:
    """The part of `scaling` that transformers expresses: two windows, one attention factor, no start tokens.

    Raises LongRopeError when the scaling does not reach beyond the original window.
    """
    short, long = scaling.windows[0], scaling.windows[-1]
    original = scaling.geometry.original_length
    if long.max_length <= original:
        raise LongRopeError(
            f"expected a scaling that reaches beyond the original window of {original} tokens; this one ends at "
            f"{long.max_length}",
            code="not-expressible",
        )
    switch = short.max_length if len(scaling.windows) > 1 else original
    m = long.attention_factor
    windows = (Window(switch, short.factors, 0, m), Window(long.max_length, long.factors, 0, m))
    return RopeScaling(scaling.geometry, windows, scaling.provenance)


def default_attention_factor(expressed: RopeScaling) -> float:
    """√(1 + ln(L'/L0)/ln L0): the attention factor that runtimes compute by default from the lengths in config.json.

    L0 is the first window's length, at which runtimes switch. MLX and ExLlamaV3 compute it whatever the config states.
    """
    short, long = expressed.windows
    return closed.su_attention_factor(replace(expressed.geometry, original_length=short.max_length), long.max_length)


def has_default_attention_factor(expressed: RopeScaling) -> bool:
    """True if the attention factor is the one that runtimes compute by default."""
    return abs(expressed.windows[-1].attention_factor / default_attention_factor(expressed) - 1.0) < 1e-9


def superset_config(
    raw: dict[str, Any], config: Any, scaling: RopeScaling, read: Collection[str] = ()
) -> dict[str, Any]:
    """`raw` (the source's config.json) extended by a `scaling` of two windows, for the model that `config` describes.

    The length where runtimes switch, `original_max_position_embeddings`, is the first window's. Models with one RoPE
    per layer type get a nested `rope_parameters`, and where transformers 4 can express them its keys beside it.
    `read` are the keys of the RoPE dictionary that the family reads outside of its rotary module: their meaning is
    kept, and so are all keys that no RoPE type has (`mrope_section`).

    Raises LongRopeError when the language model's part of a composite config is not found, or the meaning of a key of
    `read` cannot be kept (`not-expressible`).
    """
    out = deepcopy(raw)
    text = text_config(config)
    section = out if text is config else out.get("text_config")
    if not isinstance(section, dict):
        raise LongRopeError(
            f"expected the language model's config under text_config in {config.model_type}; found none",
            code="invalid-config",
        )
    for key in ("rope_scaling", "rope_parameters"):
        section.pop(key, None)
    entry = _entry(config, scaling, read)
    section[_window_name(text)] = scaling.target_length
    section["original_max_position_embeddings"] = entry["original_max_position_embeddings"]
    computed = getattr(type(text), "head_dim", None)
    if hasattr(text, "head_dim") and not (isinstance(computed, property) and computed.fset is None):
        section["head_dim"] = head_dim_of(text)  # Mixtral's config has None, which transformers' longrope cannot read
    layer_types = rope_layer_types(config)
    scaled = scaled_layer_type(config)
    if scaled is not None:
        require_longrope_by_layer(text.model_type)
        # Layers of a type may have no RoPE at all: None in the place of a dictionary (Cohere Compass).
        others = {
            name: deepcopy(value)
            for name, value in text.rope_parameters.items()
            if name != scaled and (value is None or name in layer_types)
        }
        section["rope_parameters"] = {scaled: entry, **others}
        if text.model_type in _FLAT_BESIDE_NESTED:
            section |= _transformers4_keys(text.model_type, entry, has_default_attention_factor(scaling))
        if text.model_type == "gemma3_text":
            section["rope_local_base_freq"] = others["sliding_attention"]["rope_theta"]
    else:
        section["rope_parameters"] = entry
        section |= _transformers4_keys(text.model_type, entry, has_default_attention_factor(scaling))
    return out


_WINDOW, _ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
_OF_ROPE_TYPES = frozenset(
    "rope_type type rope_theta factor attention_factor beta_fast beta_slow short_factor long_factor low_freq_factor"
    " high_freq_factor truncate mscale mscale_all_dim alpha short_mscale long_mscale partial_rotary_factor".split()
) | {_WINDOW, _ORIGINAL}
"""Keys of the RoPE dictionary that belong to a type of scaling; any other is the family's own and is kept."""


def switch_is_read(read: Collection[str]) -> bool:
    """True if a family's attention reads the original length, which is also the length where runtimes switch."""
    return _ORIGINAL in read


def _entry(config: Any, scaling: RopeScaling, read: Collection[str]) -> dict[str, Any]:
    """The RoPE dictionary with every key that some runtime reads."""
    short, long = scaling.windows
    parameters = rope_parameters_of(config)
    entry: dict[str, Any] = {key: value for key, value in parameters.items() if key not in _OF_ROPE_TYPES}
    entry |= {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": scaling.geometry.base,
        "factor": long.max_length / short.max_length,
        "original_max_position_embeddings": short.max_length,
        "attention_factor": long.attention_factor,
        "short_factor": list(short.factors),
        "long_factor": list(long.factors),
    }
    if not has_default_attention_factor(scaling) or text_config(config).model_type in NEEDS_MSCALE:
        # vLLM, SGLang and ONNX Runtime GenAI read no attention_factor and compute the default one without these keys.
        # transformers warns of them, so they are left out where the default is the factor.
        entry |= dict.fromkeys(("short_mscale", "long_mscale"), long.attention_factor)
    if "partial_rotary_factor" in parameters:
        entry["partial_rotary_factor"] = float(parameters["partial_rotary_factor"])
    if "mscale_all_dim" in read and parameters["rope_type"] != "default" and parameters.get("mscale_all_dim"):
        # The softmax is scaled by (0.1·mscale_all_dim·ln factor + 1)² (DeepSeek): the same number with the new factor.
        before = _stated_factor(_Source(config, RopeGeometry.from_config(config), parameters, 1))
        kept = max(math.log(before), 0.0) / math.log(entry["factor"])
        entry["mscale_all_dim"] = float(parameters["mscale_all_dim"]) * kept
    stated = parameters.get(_ORIGINAL)
    if switch_is_read(read) and stated is not None and stated != short.max_length:
        if short.factors != long.factors:
            raise LongRopeError(
                f"the attention of {text_config(config).model_type} reads {_ORIGINAL} = {stated} for a purpose of its"
                f" own, and it is also where runtimes leave the first window, which ends at {short.max_length} tokens"
                " here",
                code="not-expressible",
                hint=f"give a scaling whose first window ends at {stated} tokens, or `target=hf-unified`",
            )
        entry[_ORIGINAL] = stated  # both windows turn alike: the switch means nothing
    return entry


def _window_name(text: Any) -> str:
    """The name under which a family's config states its window."""
    renamed = getattr(type(text), "attribute_map", {}).get(_WINDOW)
    if renamed is not None or hasattr(text, _WINDOW):
        return str(renamed or _WINDOW)
    return next((name for name in WINDOW_NAMES if hasattr(text, name)), _WINDOW)


def _transformers4_keys(family: str, entry: dict[str, Any], default_factor: bool) -> dict[str, Any]:
    """The keys beside `rope_parameters` that transformers 4 reads, under the family's own names.

    `default_factor`: the attention factor is the one that transformers 4 computes from the lengths.
    """
    three = family in THREE_KEY_FAMILIES and default_factor
    names = ("type", "short_factor", "long_factor") if three else [name for name in entry if name != "rope_theta"]
    scaling = {name: entry[name] for name in names}  # transformers 4 warns of a rope_theta here, and reads the other
    keys: dict[str, Any] = {"rope_theta": entry["rope_theta"], "rope_scaling": scaling}
    if "partial_rotary_factor" in entry:
        keys["partial_rotary_factor"] = entry["partial_rotary_factor"]
    if family == "gpt_neox":
        keys |= {"rotary_emb_base": entry["rope_theta"], "rotary_pct": entry["partial_rotary_factor"]}
    return keys
