"""The `config.json` of an extended checkpoint: one superset that transformers 5 and 4.5x, vLLM and others read alike.

A config with `rope_parameters` alone (what transformers 5 saves) is plain RoPE with base 10,000 in transformers 4; one
with the original length inside the dictionary alone never leaves the short factors there. Both are silent, so every
key is written in every place that some runtime reads, all with the same value.

Where both are present, transformers 5 takes `rope_scaling`, transformers 4 knows nothing else, and others choose.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from longrope.errors import LongRopeError
from longrope.export.forms import is_forced
from longrope.rope.geometry import FULL_ATTENTION, rope_layer_types, rope_parameters_of, text_config
from longrope.rope.scaling import RopeScaling

THREE_KEYS = ("phi3", "phi4_multimodal")
"""transformers 4 refuses their `rope_scaling` unless it has `type`, `short_factor` and `long_factor` alone."""
_FLAT_BESIDE_NESTED = ("gemma3_text", "olmo3")
"""One RoPE per layer type in transformers 5, where `rope_scaling` updates full attention's; flat in transformers 4."""


def superset_config(raw: dict[str, Any], config: Any, scaling: RopeScaling) -> dict[str, Any]:
    """`raw` (the source's config.json) extended by a `scaling` of two windows, for the model that `config` describes.

    The length where runtimes switch, `original_max_position_embeddings`, is the first window's. Models with one RoPE
    per layer type get a nested `rope_parameters`, and where transformers 4 can express them its keys beside it.

    Raises LongRopeError when the language model's part of a composite config is not found.
    """
    out = deepcopy(raw)
    text = text_config(config)
    section = out if text is config else out.get("text_config")
    if not isinstance(section, dict):
        raise LongRopeError(
            f"expected the language model's config under text_config in {config.model_type}; found none"
        )
    for key in ("rope_scaling", "rope_parameters"):
        section.pop(key, None)
    entry = _entry(config, scaling)
    section["max_position_embeddings"] = scaling.target_length
    section["original_max_position_embeddings"] = scaling.windows[0].max_length
    if getattr(text, "head_dim", None) is not None:
        section["head_dim"] = text.head_dim  # Mixtral's config has None, which transformers' longrope cannot read
    elif hasattr(text, "head_dim"):
        section["head_dim"] = text.hidden_size // text.num_attention_heads
    layer_types = rope_layer_types(config)
    if layer_types:
        others = {name: dict(text.rope_parameters[name]) for name in layer_types if name != FULL_ATTENTION}
        section["rope_parameters"] = {FULL_ATTENTION: entry, **others}
        if text.model_type in _FLAT_BESIDE_NESTED:
            section |= _legacy(text.model_type, entry, is_forced(scaling))
        if text.model_type == "gemma3_text":
            section["rope_local_base_freq"] = others["sliding_attention"]["rope_theta"]
    else:
        section["rope_parameters"] = entry
        section |= _legacy(text.model_type, entry, is_forced(scaling))
    return out


def _entry(config: Any, scaling: RopeScaling) -> dict[str, Any]:
    """The RoPE dictionary with everything that some runtime reads."""
    short, long = scaling.windows
    entry: dict[str, Any] = {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": scaling.geometry.base,
        "factor": long.max_length / short.max_length,
        "original_max_position_embeddings": short.max_length,
        "attention_factor": long.attention_factor,
        "short_mscale": long.attention_factor,
        "long_mscale": long.attention_factor,
        "short_factor": list(short.factors),
        "long_factor": list(long.factors),
    }
    parameters = rope_parameters_of(config)
    if "partial_rotary_factor" in parameters:
        entry["partial_rotary_factor"] = float(parameters["partial_rotary_factor"])
    return entry


def _legacy(family: str, entry: dict[str, Any], forced: bool) -> dict[str, Any]:
    """What transformers 4 and its readers look for beside `rope_parameters`, under the family's own names."""
    three = family in THREE_KEYS and forced  # the attention factor is computed from the lengths there
    scaling = {key: entry[key] for key in ("type", "short_factor", "long_factor")} if three else dict(entry)
    legacy: dict[str, Any] = {"rope_theta": entry["rope_theta"], "rope_scaling": scaling}
    if "partial_rotary_factor" in entry:
        legacy["partial_rotary_factor"] = entry["partial_rotary_factor"]
    if family == "gpt_neox":
        legacy |= {"rotary_emb_base": entry["rope_theta"], "rotary_pct": entry["partial_rotary_factor"]}
    return legacy
