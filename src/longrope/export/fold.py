"""Fold an attention factor into the weights: the rows of the query projection, or of the query norm, that rotate.

The attention factor m multiplies cosines and sines of queries and keys, so logits of the rotated dimensions scale with
m². Multiplying only the queries by a number does the same for every runtime, whatever it makes of the config. What is
not rotated, dimensions beyond the rotary ones and layers without RoPE or with one that is not scaled, is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longrope.errors import LongRopeError
from longrope.export.tensors import Change, Stored
from longrope.rope.geometry import FULL_ATTENTION, RopeGeometry, rope_layer_types

# The query's rows are the first num_heads·head_dim of the named tensor; a norm weight is one head, or all of them. The
# number is what the family's norm adds to its weight before multiplying.
_FAMILIES: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma", "gemma2"), ("q_proj", 0.0)),
    **dict.fromkeys(("granite", "granitemoe", "starcoder2", "cohere", "stablelm", "glm"), ("q_proj", 0.0)),
    **dict.fromkeys(("smollm3", "phi"), ("q_proj", 0.0)),
    "phi3": ("qkv_proj", 0.0),
    **dict.fromkeys(("qwen3", "qwen3_moe", "olmo2", "olmo3"), ("q_norm", 0.0)),
    "gemma3_text": ("q_norm", 1.0),
}
_NORMS = re.compile(r"\.self_attn\.(q_norm|q_layernorm|query_layernorm)\.")


def fold_changes(
    config: Any, geometry: RopeGeometry, tensors: Mapping[str, Stored], query_scale: float
) -> dict[str, Change]:
    """By tensor name, what multiplies the rotated queries of every scaled layer by `query_scale`.

    Raises LongRopeError for a family whose queries are elsewhere, and for tensors that are not where they should be.
    """
    family = getattr(config, "model_type", None)
    if family not in _FAMILIES:
        raise LongRopeError(
            f"cannot fold the attention factor into {family or type(config).__name__}: its queries are known for "
            f"{', '.join(sorted(_FAMILIES))}; leave out --fold-attention-factor"
        )
    module, offset = _FAMILIES[family]
    normed = [name for name in tensors if _NORMS.search(name)]
    if module != "q_norm" and normed:  # the norm would undo what is done before it
        raise LongRopeError(
            f"cannot fold the attention factor into this {family}: its queries are normalised after the projection "
            f"({normed[0]}); leave out --fold-attention-factor"
        )
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)

    def change(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        rows = out[: heads * head_dim].view(-1, head_dim, *out.shape[1:])  # (heads or 1, head_dim, …), a view of out
        rotated = rows[:, : geometry.rotary_dim]
        rotated.copy_((rotated + offset) * query_scale - offset)
        return out

    changes: dict[str, Change] = {}
    for layer in _scaled_layers(config):
        names = [f"model.layers.{layer}.self_attn.{module}.{kind}" for kind in ("weight", "bias")]
        if names[0] not in tensors:
            raise LongRopeError(f"cannot fold the attention factor: expected {names[0]} in the checkpoint, found none")
        changes |= {name: change for name in names if name in tensors}
    return changes


def _scaled_layers(config: Any) -> list[int]:
    """The layers whose RoPE is rescaled: not those of another layer type, nor those without RoPE."""
    layers = range(int(config.num_hidden_layers))
    if rope_layer_types(config):
        return [layer for layer in layers if config.layer_types[layer] == FULL_ATTENTION]
    rotates = getattr(config, "no_rope_layers", None) or [1] * len(layers)  # smollm3: 1 where a layer has RoPE
    return [layer for layer in layers if rotates[layer]]
