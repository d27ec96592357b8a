"""The `config.json` of an extended checkpoint: one superset that transformers 5 and 4.5x, vLLM and others read alike.

A config with `rope_parameters` alone (what transformers 5 saves) is plain RoPE with base 10,000 in transformers 4; one
with the original length inside the dictionary alone never leaves the short factors there. Both are silent, so every
key is written in every place that some runtime reads, all with the same value.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from longrope.rope.geometry import rope_layer_types
from longrope.rope.scaling import RopeScaling


def superset_config(raw: dict[str, Any], config: Any, scaling: RopeScaling) -> dict[str, Any]:
    """`raw` (the source's config.json) extended by `scaling`, for the model that `config` describes.

    Models with one RoPE per layer type get a nested `rope_parameters` alone: only transformers 5 can express them.
    """
    out = deepcopy(raw)
    # Composite configs keep the language model's part under its own key.
    text_config = config.get_text_config()
    section = (
        out
        if text_config is config
        else next(
            value
            for value in out.values()
            if isinstance(value, dict) and value.get("model_type") == text_config.model_type
        )
    )
    geometry, short, long = scaling.geometry, scaling.windows[0], scaling.windows[-1]
    factor = scaling.target_length / geometry.original_length
    entry: dict[str, Any] = {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": geometry.base,
        "factor": factor,
        "original_max_position_embeddings": geometry.original_length,
        "attention_factor": long.attention_factor,
        "short_mscale": long.attention_factor,
        "long_mscale": long.attention_factor,
        "short_factor": list(short.factors),
        "long_factor": list(long.factors),
    }
    partial = _partial_rotary_factor(text_config)
    if partial is not None:
        entry["partial_rotary_factor"] = partial
    for key in ("rope_scaling", "rope_parameters"):
        section.pop(key, None)
    section["max_position_embeddings"] = scaling.target_length
    section["original_max_position_embeddings"] = geometry.original_length
    if getattr(text_config, "head_dim", None) is not None:
        section["head_dim"] = (
            text_config.head_dim
        )  # Mixtral's config has None, which transformers' longrope cannot read
    elif hasattr(text_config, "head_dim"):
        section["head_dim"] = text_config.hidden_size // text_config.num_attention_heads
    layer_types = rope_layer_types(config)
    if layer_types:
        others = {name: dict(text_config.rope_parameters[name]) for name in layer_types if name != "full_attention"}
        section["rope_parameters"] = {"full_attention": entry, **others}
    else:
        section["rope_theta"] = geometry.base
        section["rope_scaling"] = entry
        section["rope_parameters"] = dict(entry)
    return out


def _partial_rotary_factor(config: Any) -> float | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    inner = parameters.get("full_attention", parameters)
    value = inner.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    return None if value is None else float(value)
