"""The form `phi3`: a Llama or Mistral checkpoint under the Phi-3 architecture, with the same logits bit for bit.

Phi-3 is the architecture for which most runtimes implement LongRoPE in full, and for which transformers recomputes the
keys when generation passes the switch. Its projections are fused, so Llama's are stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longrope.errors import LongRopeError
from longrope.export.weights import StoredTensor
from longrope.rope.geometry import RopeGeometry, head_dim_of

_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_KEPT = ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
_COPIED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",  # Phi3Config would fill in 32000, outside of a small vocabulary
    "sliding_window",
)
_FAMILIES = ("llama", "mistral")


def require_eligible(config: Any, geometry: RopeGeometry) -> None:
    """Raise LongRopeError (`unsupported-model`), with the reason, when Phi-3 does not compute the model of `config`."""
    family = getattr(config, "model_type", None)
    if family == "phi3":
        raise LongRopeError("the model is Phi-3 already", code="unsupported-model", hint="use `target=hf`")
    head_dim = head_dim_of(config)
    reasons = {
        f"its architecture is {family}, not {' or '.join(_FAMILIES)}": family not in _FAMILIES,
        "its projections have biases": getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
        f"its head_dim {head_dim} is not hidden_size/num_attention_heads": head_dim * config.num_attention_heads
        != config.hidden_size,
        f"only {geometry.rotary_dim} of its {head_dim} head dimensions rotate": geometry.rotary_dim != head_dim,
        "its weights are quantised": getattr(config, "quantization_config", None) is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise _refusal(reason)


def phi3_parts(config: Any, tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[str, ...]]:
    """Tensor of Phi-3 -> the tensors of the source that are stacked into it.

    Raises LongRopeError when a tensor is missing (`damaged-file`) or Phi-3 has none for it (`unsupported-model`).
    """
    ends = ["model.embed_tokens.weight", "model.norm.weight"]
    if not config.tie_word_embeddings or "lm_head.weight" in tensors:
        ends.append("lm_head.weight")
    parts: dict[str, tuple[str, ...]] = {name: (name,) for name in ends}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for fused, sources in _FUSED.items():
            parts[f"{prefix}{fused}.weight"] = tuple(f"{prefix}{source}.weight" for source in sources)
        parts |= {f"{prefix}{kept}.weight": (f"{prefix}{kept}.weight",) for kept in _KEPT}
    used = {source for sources in parts.values() for source in sources}
    if missing := sorted(used - tensors.keys()):
        raise LongRopeError(f"the checkpoint lacks {missing[0]}; give a complete one", code="damaged-file")
    # Old checkpoints store the frequencies, which are computed.
    if more := sorted(name for name in tensors.keys() - used if not name.endswith("rotary_emb.inv_freq")):
        raise _refusal(f"Phi-3 has no place for {more[0]}")
    return parts


def phi3_config(raw: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """config.json of the Phi-3 model, without its RoPE; every value is written out, because the defaults differ."""
    out: dict[str, Any] = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    out |= {name: getattr(config, name, None) for name in _COPIED_KEYS}
    out |= {"head_dim": config.hidden_size // config.num_attention_heads, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return out | {name: raw[name] for name in ("dtype", "torch_dtype", "transformers_version") if name in raw}


def _refusal(reason: str) -> LongRopeError:
    return LongRopeError(
        f"the model cannot become Phi-3: {reason}",
        code="unsupported-model",
        hint="use `target=hf` or `target=hf-unified`",
    )
