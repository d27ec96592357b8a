"""The `config.json` of an extended checkpoint: one superset that transformers 5 and 4.5x, vLLM and others read alike.

A config with `rope_parameters` alone (what transformers 5 saves) is plain RoPE with base 10,000 in transformers 4; one
with the original length inside the dictionary alone never leaves the short factors there. Both are silent, so every
key is written in every place that some runtime reads, all with the same value.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from longrope.errors import LongRopeError
from longrope.rope.geometry import FULL_ATTENTION, rope_layer_types, rope_parameters_of, text_config
from longrope.rope.scaling import RopeScaling


def superset_config(raw: dict[str, Any], config: Any, scaling: RopeScaling) -> dict[str, Any]:
    """`raw` (the source's config.json) extended by a `scaling` of two windows, for the model that `config` describes.

    The length where runtimes switch, `original_max_position_embeddings`, is the first window's. Models with one RoPE
    per layer type get a nested `rope_parameters` alone: only transformers 5 can express them.

    Raises LongRopeError when the language model's part of a composite config is not found.
    """
    out = deepcopy(raw)
    text = text_config(config)
    section = out if text is config else out.get("text_config")
    if not isinstance(section, dict):
        raise LongRopeError(
            f"expected the language model's config under text_config in {config.model_type}; found none"
        )
    geometry, (short, long) = scaling.geometry, scaling.windows
    factor = long.max_length / short.max_length
    entry: dict[str, Any] = {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": geometry.base,
        "factor": factor,
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
    for key in ("rope_scaling", "rope_parameters"):
        section.pop(key, None)
    section["max_position_embeddings"] = scaling.target_length
    section["original_max_position_embeddings"] = short.max_length
    if getattr(text, "head_dim", None) is not None:
        section["head_dim"] = text.head_dim  # Mixtral's config has None, which transformers' longrope cannot read
    elif hasattr(text, "head_dim"):
        section["head_dim"] = text.hidden_size // text.num_attention_heads
    layer_types = rope_layer_types(config)
    if layer_types:
        others = {name: dict(text.rope_parameters[name]) for name in layer_types if name != FULL_ATTENTION}
        section["rope_parameters"] = {FULL_ATTENTION: entry, **others}
    else:
        section["rope_theta"] = geometry.base
        section["rope_scaling"] = entry
        section["rope_parameters"] = dict(entry)
    return out
