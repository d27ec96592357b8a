"""Every causal language model of the installed transformers, as a tiny random one: configs are made by code.

The default config of a family is made small by the names of its settings; `OWN` has what names do not say.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 64
VOCABULARY = 300
LAYERS = 4

# The first pattern that matches the name of a setting gives its value.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(^|_)vocab_size$|^n_vocab$|vocab_size_per_layer_input$", VOCABULARY),
    (r"^(hidden_size|d_model|n_embd|attention_hidden_size|embedding_size|lru_width|hidden_size_global)$", 64),
    (r"^adapter_(in|out)_dim$|^adapter_input_size$", 64),
    (r"intermediate_size|ffn_dim|ffn_hidden|^n_inner|moe_latent_size|^ffn_size|expert_size", 64),
    (r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers)$", LAYERS),
    (r"^(num_attention_heads|n_heads?|swa_num_attention_heads|num_heads)$", 4),
    (r"num_key_value_heads$|^kv_n_heads$|^num_kv_heads$", 2),
    (r"head_dim$|^kv_channels$", 16),
    (r"_lora_rank$", 32),
    (r"(^|_)d_state$|mamba_chunk_size$|^chunk_size$", 16),
    (r"^(max_position_embeddings|max_seq_len|model_max_length|n_positions)$", WINDOW),
    (r"sliding_window$|^attention_window_size$|^attention_chunk_size$", 24),
    (r"^(n_group|topk_group|num_expert_group)$", 1),
    (r"^(num_(local_)?experts|n_routed_experts|moe_num_experts|num_routed_experts)$", 4),
    (r"experts_per_tok(en)?$|^moe_topk$|^moe_k$|^top_k_experts$", 2),
    (r"shared_experts?$", 1),
    (r"^first_k_dense_replace$|^num_dense_layers$", 1),
    (r"^hidden_size_per_layer_input$", 16),
)
_LATENT = {"num_key_value_heads": 4}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {  # the default config states no RoPE, without which its class cannot be built
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "pad_token_id": VOCABULARY - 1,  # no token of the texts: its embedding is 0, where the gradient is NaN
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 1,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "granitemoehybrid": {
        "layers_block_type": ["mamba", "attention"] * 2,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 32, "head_dim": 16, "zero_expert_num": 2, "moe_topk": 2, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mimo_v2_flash": {"head_dim": 48, "swa_head_dim": 48},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "plbart": _HEADS,
    "recurrent_gemma": {"max_position_embeddings": WINDOW, "lru_width": 64},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "whisper": _HEADS,
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "use_mem_rope": True,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """The model types that `AutoModelForCausalLM` knows."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def small_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The default config of `family`, small; that of the text model inside it too."""
    made = CONFIG_MAPPING[family]
    whole = made()
    inner = whole.get_text_config()
    if inner is whole:
        return made(**smaller(whole) | _parts(whole) | OWN.get(family, {}) | overrides)
    name = next(key for key in made.sub_configs if getattr(whole, key, None) is inner)
    text = smaller(inner) | OWN.get(inner.model_type, {}) | overrides
    return made(**smaller(whole) | _parts(whole) | {name: text} | OWN.get(family, {}))


def _parts(config: PreTrainedConfig) -> dict[str, Any]:
    """The configs inside another, those of images and sound, made small."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: smaller(part) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}


def smaller(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of `config` that are too large for a test, with small values."""
    given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    layers = next((given[name] for name in ("num_hidden_layers", "n_layers", "n_layer") if name in given), None)
    small: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            size = next((size for pattern, size in _SIZES if re.search(pattern, name)), None)
            if size is not None:
                small[name] = size
            if name.endswith("token_id") and value >= VOCABULARY:
                small[name] = VOCABULARY - 1
        if name == "rope_parameters" and isinstance(value, dict) and "original_max_position_embeddings" in value:
            small[name] = value | {"original_max_position_embeddings": WINDOW // 4, "factor": 4.0}
        if isinstance(value, list) and layers and len(value) == layers:
            small[name] = _distinct(value)
        if name == "eos_token_id" and isinstance(value, list):
            small[name] = 2
    return small | (_LATENT if given.get("qk_rope_head_dim") and "num_key_value_heads" in small else {})


def _distinct(values: list[Any]) -> list[Any]:
    """As many values as there are small layers, each kind among them, in the order in which they come."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return (kinds * LAYERS)[:LAYERS]


def small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model in float32 and eval mode, whose queries and keys are large enough that positions matter.

    Scales that begin at zero and are trained to something else, such as the temperature of Zaya's keys, are ones.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and re.search(r"q_proj|k_proj|qkv|query_key_value|q_[ab]_proj|kv_[ab]_proj", name):
                parameter.mul_(6.0)
            elif re.search(r"\.temp$", name) and not parameter.any():
                parameter.fill_(1.0)
    return model
