"""The least memory a training step needs: what must be there at once, whatever the kernels. It refuses, not plans."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.training.settings import TrainingSettings

GIB = 2**30


def least_bytes(model: PreTrainedModel, settings: TrainingSettings, *, shards: int, packed: bool) -> dict[str, int]:
    """Bytes on one device, by what takes them; `shards` devices share the weights, `packed` rows hold documents.

    Weights, gradients and AdamW's two moments in the weights' dtype; the input of every layer (held on the host with
    offload, all of a layer's own activations without checkpointing left out); where attention is not flash or flex, one
    byte for every pair of positions of the mask between packed documents.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    size = next(model.parameters()).element_size()
    config = model.config.get_text_config()
    tokens = settings.micro_batch * settings.length
    kept = 1 if settings.offload else config.num_hidden_layers
    dense = packed and model.config._attn_implementation in ("sdpa", "eager")
    return {
        "weights": weights // shards,
        "gradients": trained * size // shards,
        "AdamW's moments": 2 * trained * size // shards,
        "inputs of the layers": kept * tokens * config.hidden_size * (2 if settings.bf16 else size),
        "mask between packed documents": tokens * settings.length if dense else 0,
    }


def require_room(
    model: PreTrainedModel, settings: TrainingSettings, device: torch.device, *, shards: int, packed: bool
) -> None:
    """Raise LongRopeError when not even the least that a step needs fits on `device`."""
    parts = least_bytes(model, settings, shards=shards, packed=packed)
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sum(parts.values()) <= there:
        return
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    raise LongRopeError(
        f"a step needs at least {sum(parts.values()) / GIB:.1f} GiB on each device ({listed}), which has "
        f"{there / GIB:.1f}: use a smaller --length or --micro-batch, --offload, --lora, FSDP over more devices, or "
        "--attn-implementation flash_attention_2 for packed documents"
    )
