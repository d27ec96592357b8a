"""Tiny GGUF files of every family that can be opened, written with the `gguf` package as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from tests.checkpoints import tokenizer

gguf = pytest.importorskip("gguf")

VOCABULARY, HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, HEAD_DIM, WINDOW = 300, 64, 2, 4, 2, 32, 256

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": WINDOW,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# Architecture in llama.cpp -> (class of the configuration, what it has beside the sizes).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"hidden_size": HEADS * HEAD_DIM}),
    "qwen3": ("Qwen3Config", {}),
    "phi3": ("Phi3Config", {"hidden_size": HEADS * HEAD_DIM, "original_max_position_embeddings": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 32, "query_pre_attn_scalar": HEAD_DIM, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 32,
            "query_pre_attn_scalar": HEAD_DIM,
            "tie_word_embeddings": True,
            "num_hidden_layers": 7,  # the last two look at all of the text and at a window
        },
    ),
}


def model_of(architecture: str, **more: Any) -> Any:
    """A random model of the family, with weights large enough that positions matter."""
    name, own = FAMILIES[architecture]
    config = getattr(transformers, name)(**_SIZES | own | more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("q_proj", "k_proj", "qkv_proj")):
                parameter.mul_(6.0)
            if key.endswith("bias") or "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def save_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    model: Any = None,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    quantise: Any = None,
    words: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file of `model` (default: `model_of(architecture)`) with a byte-level tokenizer.

    `keys` go under the architecture's prefix; None among them, or among `tensors`, leaves one out. `quantise` is the
    type of the matrices. `words` are keys under `tokenizer.ggml.`
    """
    model = model_of(architecture) if model is None else model
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    stated = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if architecture.startswith("gemma"):
        stated["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        stated["attn_logit_softcapping"] = config.attn_logit_softcapping
        stated["final_logit_softcapping"] = config.final_logit_softcapping
    for name, value in (stated | dict(keys or {})).items():
        if value is not None:
            add(writer, f"{architecture}.{name}", value)
    for name, value in (byte_level_words() | dict(words or {})).items():
        if value is not None:
            add(writer, f"tokenizer.ggml.{name}", value)
    written: dict[str, Any] = {}
    names = gguf.get_tensor_name_map(
        next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), LAYERS + 9
    )
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        written[found] = _as_llama_cpp(architecture, found, weight, config).float().numpy()
    for name, values in (written | dict(tensors or {})).items():
        if values is None:
            continue
        array = np.ascontiguousarray(values, dtype=np.float32)
        if quantise is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_llama_cpp(architecture: str, name: str, weight: Tensor, config: Any) -> Tensor:
    """A weight in the order and with the offset that llama.cpp's graph expects."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if architecture == "llama" and name.split(".")[-2] in heads:
        count = heads[name.split(".")[-2]]
        halves = weight.reshape(count, 2, -1, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape)
    if architecture.startswith("gemma") and "norm" in name:
        return weight + 1
    return weight


def byte_level_words(pre: str = "gpt-2") -> dict[str, Any]:
    """The keys of the tests' tokenizer."""
    made = tokenizer()
    document = json.loads(made.backend_tokenizer.to_str())["model"]
    tokens = sorted(document["vocab"], key=document["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["merges"]]
    types = [3 if token in ("<s>", "</s>") else 1 for token in tokens]
    special = {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True}
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges} | special


def add(writer: Any, key: str, value: Any) -> None:
    """A key of the GGUF type that converters write."""
    kinds = gguf.GGUFValueType
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        item = value[0]
        kind = kinds.STRING if isinstance(item, str) else kinds.FLOAT32 if isinstance(item, float) else kinds.INT32
        writer.add_key_value(key, list(value), kinds.ARRAY, kind)


def token_ids(count: int, seed: int = 0) -> list[int]:
    """Random ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    found: Sequence[int] = torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()
    return list(found)
