"""Tiny random models of many families, for the tests: float32, seeded, with logits that really depend on positions.

Two layers, hidden size 64, vocabulary 128, a window of 64 tokens. Freshly initialised weights (0.02) would make
attention nearly uniform and hide every error of a rotary embedding; here the weights are large enough that they show.

Every commit tests the five `CODE_PATHS`, the slow tier all families: parametrise with `FAMILIES`, or with
`slow_but_code_paths` of cases that begin with a family.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WINDOW = 64
VOCABULARY = 128
HIDDEN = 64
LAYERS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}

# The settings of each family beyond the common ones: its special features are switched on, at a size that shows.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "mixtral": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "phi3": {"original_max_position_embeddings": WINDOW},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 10.0, "sliding_window": 24},
    "granite": {
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"tie_word_embeddings": True, "sliding_window": None},
    "cohere": {"logit_scale": 0.25},
    "stablelm": {"num_attention_heads": 2, "partial_rotary_factor": 0.5},  # 16 of 32 dimensions rotate
    "gpt_neox": {"num_attention_heads": 2, "rotary_pct": 0.5, "use_parallel_residual": True},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **_LAYER_TYPES},
    "olmo3": dict(_LAYER_TYPES),
    # Cosines of D columns only; MLPs that return their router's scores too.
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **_LAYER_TYPES,
    },
    "glm": {"head_dim": 32, "partial_rotary_factor": 0.5},
}
ALL_FAMILIES = tuple(_OWN)
CODE_PATHS = ("llama", "cohere", "gpt_neox", "gemma3_text", "gpt_oss")
"""Cosines in halves; interleaved; of a part of the head, in blocks whose modules have other names; one RoPE per layer
type, with norms of queries and keys; cosines of D columns, mixtures of experts and sliding windows."""
ONE_ROPE_PER_LAYER_TYPE = ("gemma3_text", "olmo3")


def slow_but_code_paths(cases: Iterable[Any]) -> list[Any]:
    """`cases` for parametrize, each a family or a tuple that begins with one: all but CODE_PATHS are marked slow."""
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=() if values[0] in CODE_PATHS else pytest.mark.slow))
    return marked


FAMILIES = slow_but_code_paths(ALL_FAMILIES)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of `tiny_model`."""
    return CONFIG_MAPPING[family](**(_COMMON | _OWN[family] | overrides))


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A causal language model of `family` in eval mode, the same weights on every call (`overrides` of its config)."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2 and "embed" not in name:
                gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key_value")) else 1.0
                parameter.copy_(noise * gain / math.sqrt(HIDDEN))
            elif parameter.dim() >= 2:
                parameter.copy_(noise * 0.5)
            else:
                parameter.add_(noise * 0.1)  # norms and biases, kept around what they start from
    return model.eval()


def tokens(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Tensor:
    """The model's own plain forward: (B, T) -> (B, T, V)."""
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False, **options).logits
