"""Configurations that runtimes read differently, by name: what goes into config.json beside a tiny model's sizes.

Every case is executed in transformers 5 (and, in the slow tier, in 4.57) and must come out as the doctor says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

L, TARGET, PAIRS, BASE = 64, 256, 16, 50_000.0
LENGTHS = (30, L, L + 1, 200)

SHORT = [1.0 + 0.01 * i for i in range(PAIRS)]
LONG = [1.0 + 0.25 * i for i in range(PAIRS)]
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": TARGET,
    "num_local_experts": 2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LISTS = {"short_factor": SHORT, "long_factor": LONG}
OWN = {"original_max_position_embeddings": L}
ENTRY: dict[str, Any] = {"type": "longrope", "rope_type": "longrope", "factor": 4.0, "rope_theta": BASE, **OWN, **LISTS}
THREE = {"type": "longrope", **LISTS}
NESTED = {"full_attention": ENTRY, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, "head_dim": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": BASE, **OWN}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **OWN}


def without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


def superset(entry: dict[str, Any], **more: Any) -> dict[str, Any]:
    """All keys in all places, as our export writes them."""
    return {"rope_scaling": entry, "rope_parameters": dict(entry), "rope_theta": BASE, **OWN, "head_dim": 32} | more


CASES: dict[str, dict[str, Any]] = {
    "plain": {"model_type": "llama", "rope_theta": BASE},
    "plain, 5 only": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": BASE}},
    "5 only": {"model_type": "llama", "rope_parameters": ENTRY},
    "4, L inside only": {"model_type": "llama", "rope_scaling": without(ENTRY, "rope_theta"), "rope_theta": BASE},
    "4, L in both": {"model_type": "llama", "rope_scaling": without(ENTRY, "rope_theta"), "rope_theta": BASE, **OWN},
    "superset": {"model_type": "llama", **superset(ENTRY)},
    "superset, m": {"model_type": "llama", **superset(ENTRY | {"attention_factor": 1.25})},
    "m of 32": {"model_type": "llama", **superset(ENTRY | {"attention_factor": 32.0})},
    "no factor": {"model_type": "llama", **superset(without(ENTRY, "factor"))},
    "no factor, L inside only": {"model_type": "llama", "rope_scaling": without(ENTRY, "factor"), "rope_theta": BASE},
    "factor of 8": {"model_type": "llama", **superset(ENTRY | {"factor": 8.0})},
    "theta in the other dictionary": {
        "model_type": "llama",
        "rope_scaling": without(ENTRY, "rope_theta"),
        "rope_parameters": ENTRY,
        **OWN,
    },
    "L differs": {"model_type": "llama", **superset(ENTRY), "original_max_position_embeddings": 128},
    "no L": {"model_type": "llama", "rope_parameters": without(ENTRY, "original_max_position_embeddings")},
    "su": {"model_type": "llama", **superset(ENTRY | {"type": "su", "rope_type": "su"})},
    "no long factors": {"model_type": "llama", **superset(without(ENTRY, "long_factor"))},
    "short lists": {"model_type": "llama", **superset(ENTRY | {"long_factor": LONG[:-1]})},
    "lists of one": {"model_type": "llama", **superset(ENTRY | {"short_factor": [1.0], "long_factor": [4.0]})},
    "nested in llama": {"model_type": "llama", "rope_parameters": NESTED, "rope_theta": BASE},
    "nested in qwen3": {"model_type": "qwen3", "rope_parameters": NESTED, "head_dim": 32},
    "mistral": {"model_type": "mistral", **superset(ENTRY)},
    "mistral without head_dim": {"model_type": "mistral", **without(superset(ENTRY), "head_dim")},
    "mixtral": {"model_type": "mixtral", **superset(ENTRY)},
    "mixtral without head_dim": {"model_type": "mixtral", **without(superset(ENTRY), "head_dim")},
    "qwen2": {"model_type": "qwen2", **superset(ENTRY)},
    "qwen3": {"model_type": "qwen3", **superset(ENTRY)},
    "olmo2": {"model_type": "olmo2", **superset(ENTRY)},
    "cohere, no theta": {"model_type": "cohere", "rope_scaling": without(ENTRY, "rope_theta"), **OWN},
    "smollm3, no theta": {"model_type": "smollm3", "rope_scaling": without(ENTRY, "rope_theta"), **OWN},
    "gpt_neox": {
        "model_type": "gpt_neox",
        "rotary_pct": 0.5,
        "rotary_emb_base": BASE,
        "rope_scaling": without(ENTRY, "rope_theta") | {"short_factor": SHORT[:8], "long_factor": LONG[:8]},
        **OWN,
    },
    "stablelm": {
        "model_type": "stablelm",
        "partial_rotary_factor": 0.5,
        **superset(ENTRY | {"short_factor": SHORT[:8], "long_factor": LONG[:8]}),
    },
    "phi3, published": {"model_type": "phi3", "rope_scaling": THREE, "rope_theta": BASE, **OWN},
    "phi3, su": {"model_type": "phi3", "rope_scaling": THREE | {"type": "su"}, "rope_theta": BASE, **OWN},
    "phi3, L inside only": {"model_type": "phi3", "rope_parameters": ENTRY},
    "phi3, ten keys": {"model_type": "phi3", **superset(ENTRY)},
    "phimoe": {
        "model_type": "phimoe",
        "rope_theta": BASE,
        "rope_scaling": without(ENTRY, "rope_theta") | {"short_mscale": 1.25, "long_mscale": 1.5},
        **OWN,
    },
    "gemma3, nested": {"model_type": "gemma3_text", "rope_parameters": NESTED, **LAYERS},
    "gemma3, flat": {"model_type": "gemma3_text", "rope_parameters": ENTRY, **LAYERS},
    "gemma3, rope_scaling": {"model_type": "gemma3_text", "rope_scaling": ENTRY, **OWN, **LAYERS},
    "olmo3, nested": {"model_type": "olmo3", "rope_parameters": NESTED, **LAYERS},
    "olmo3, flat": {"model_type": "olmo3", "rope_parameters": ENTRY, **LAYERS},
    "yarn": {"model_type": "llama", "rope_scaling": without(YARN, "rope_theta"), "rope_theta": BASE},
    "yarn, m": {"model_type": "qwen2", **superset(YARN | {"attention_factor": 1.0, "beta_fast": 16.0})},
    "yarn, mscale": {"model_type": "llama", **superset(YARN | {"mscale": 0.7, "mscale_all_dim": 0.4})},
    "llama3": {"model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": BASE},
    "linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": BASE},
}


def write_case(folder: Path, case: dict[str, Any]) -> Path:
    """A checkpoint folder with nothing but the config.json of `case`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | case))
    return folder
