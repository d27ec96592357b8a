"""The least memory of a training step, whatever the kernels: a step that cannot fit is refused before any work.

The expected memory of a training is planned in `costs/`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.blocked_attention import NAME as BLOCKED
from longrope.rope.geometry import head_dim_of
from longrope.train.config import FinetuneConfig

GIB = 2**30


def least_bytes(model: PreTrainedModel, config: FinetuneConfig, *, shards: int, packed: bool) -> dict[str, int]:
    """The least bytes on one device, by purpose; `shards` devices share the weights, `packed` rows hold documents.

    Weights, gradients and AdamW's two moments in the weights' dtype; the input of every layer (held on the host with
    offload, all of a layer's own activations without checkpointing left out); where attention is not flash or flex, one
    byte for every pair of positions of the mask between packed documents. With context parallelism a device has its
    share of every row, and the keys and values of the whole row for one layer.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    size = next(model.parameters()).element_size()
    text = model.config.get_text_config()
    row = config.micro_batch * config.length
    tokens = row // config.context_parallel
    kept = 1 if config.offload else text.num_hidden_layers
    dense = packed and model.config._attn_implementation in ("sdpa", "eager", BLOCKED)
    parts = {
        "weights": weights // shards,
        "gradients": trained * size // shards,
        "AdamW's moments": 2 * trained * size // shards,
        "inputs of the layers": kept * tokens * text.hidden_size * (2 if config.bf16 else size),
        "mask between packed documents": tokens * config.length if dense else 0,
    }
    if config.context_parallel > 1:
        parts["keys and values of a layer"] = 2 * row * _key_width(text) * (2 if config.bf16 else size)
    return parts


def _key_width(config: Any) -> int:
    """Numbers in the keys of one token in a layer, all heads."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads * head_dim_of(config))


def require_room(
    model: PreTrainedModel, config: FinetuneConfig, device: torch.device, *, shards: int, packed: bool
) -> None:
    """Raise LongRopeError when the least memory of a step does not fit on `device`."""
    parts = least_bytes(model, config, shards=shards, packed=packed)
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sum(parts.values()) <= there:
        return
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    raise LongRopeError(
        f"a step needs at least {sum(parts.values()) / GIB:.1f} GiB on each device ({listed}), which has "
        f"{there / GIB:.1f}",
        code="out-of-memory",
        hint="use a smaller `length` or `micro_batch`, `offload`, `lora`, FSDP or `context_parallel` over more "
        "devices, or `attn_implementation` flash_attention_2 for packed documents",
    )
