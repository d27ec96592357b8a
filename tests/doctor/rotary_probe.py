"""Inverse frequencies and m by length that this interpreter's transformers computes for checkpoints' config.json.

Runs by itself (`python rotary_probe.py LENGTHS FOLDER…`, JSON on standard output), so that a second interpreter with
another transformers can run it; imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def probe(folder: str, lengths: list[int]) -> dict[str, Any]:
    """By length, frequencies and attention factor of a forward pass; `error` where transformers stops."""
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
        return {str(length): _rotation(model.eval(), length) for length in lengths}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def frequencies(folder: str, length: int) -> tuple[list[float], float]:
    """The same from the rotary module's own buffers, without a model: for windows too long for a forward pass."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rotary = type(model.base_model.rotary_emb)(config)
    rotary(torch.zeros(1, 1), torch.tensor([[length - 1]]))
    return rotary.inv_freq.double().tolist(), float(rotary.attention_scaling)


def _rotation(model: torch.nn.Module, length: int) -> dict[str, Any]:
    """From the cosines and sines that reach the attention of a full-attention layer: nothing is read from a buffer."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layers = getattr(model.base_model, "layers", None) or model.model.layers
    attention = layers[-1].self_attn if hasattr(layers[-1], "self_attn") else layers[-1].attention

    def hook(module: Any, arguments: Any, keywords: Any) -> None:
        rotated = [value for name, value in keywords.items() if name.startswith("position_embeddings")]
        rotated += [value for value in arguments if isinstance(value, tuple)]
        # Gemma 3 of 4.57 hands every layer both: the global ones come first.
        seen.append(rotated[0])

    handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    handle.remove()
    cos, sin = (_one_per_pair(value.double().view(length, -1)) for value in seen[0])  # (length, D)
    # Position 1 turns by the frequency itself, below half a turn.
    return {
        "frequencies": torch.atan2(sin[1], cos[1]).tolist(),
        "attention_factor": float((cos[1] ** 2 + sin[1] ** 2).sqrt().mean()),
    }


def _one_per_pair(value: torch.Tensor) -> torch.Tensor:
    """(length, D) from (length, d), which families lay out in halves or interleaved."""
    half = value.shape[1] // 2
    if torch.equal(value[:, :half], value[:, half:]):
        return value[:, :half]
    return value[:, ::2] if torch.equal(value[:, ::2], value[:, 1::2]) else value


if __name__ == "__main__":
    wanted = [int(length) for length in sys.argv[1].split(",")]
    print(json.dumps({folder: probe(folder, wanted) for folder in sys.argv[2:]}))
