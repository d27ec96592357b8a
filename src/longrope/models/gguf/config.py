"""The configuration of the model in a GGUF file, as transformers would have it: sizes, RoPE and the scaling present.

transformers' own reading of these keys drops every scaling of the RoPE and takes the defaults of a published model for
what it does not map (Qwen 3's head dimension, the soft caps of Gemma 2). Here the model is the one that llama.cpp
computes from the file; the tests compare their logits, family by family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from longrope.checks import positive_number, whole_number
from longrope.errors import LongRopeError, one_line
from longrope.models.gguf.container import GgufFile
from longrope.models.gguf.rope import rope_of
from longrope.models.gguf.rope_parameters import as_longrope, rope_parameters
from longrope.rope.geometry import LARGEST_DIM

_Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a file's architecture, checked as they are read."""

    file: GgufFile
    architecture: str

    def given(self, name: str) -> Any:
        """The value of `name`, None where the file lacks it. Raises LongRopeError where it is a list."""
        key = f"{self.architecture}.{name}"
        found = self.file.value(key)
        if found is None and key in self.file.keys:
            raise LongRopeError(
                f"{self.file.path} has one {key} per layer; only models with equal layers can be opened",
                code="unsupported-model",
            )
        return found

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number above 0. Raises LongRopeError (`damaged-file`) for anything else."""
        found = self.given(name)
        return int(self._checked(whole_number, name, default if found is None else found, 1))

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0, with the digits that its float32 has. Raises LongRopeError (`damaged-file`) otherwise."""
        found = self.given(name)
        found = self._checked(positive_number, name, default if found is None else found)
        return float(str(np.float32(found)))

    def has(self, tensor: str) -> bool:
        """True if the first layer has `tensor`."""
        return f"blk.0.{tensor}" in self.file.tensors

    def _checked(self, check: Callable[..., Any], name: str, *given: Any) -> Any:
        try:
            return check(f"{self.architecture}.{name}", *given)
        except LongRopeError as error:
            raise LongRopeError(f"{self.file.path}: {error.message}", code="damaged-file") from error


def gguf_config(file: GgufFile) -> PreTrainedConfig:
    """The configuration of the model in `file`.

    Raises LongRopeError where the family is not known (`unsupported-model`) or a key cannot be (`damaged-file`).
    """
    rope = rope_of(file)
    if rope.architecture not in FAMILIES:
        raise LongRopeError(
            f"cannot open the GGUF file {file.path}: its architecture {rope.architecture!r} is none of "
            f"{', '.join(FAMILIES)}",
            code="unsupported-model",
            hint="give the model's folder with safetensors weights",
        )
    keys = Keys(file, rope.architecture)
    values = _sizes(keys)
    head_dim = values["head_dim"]
    if not values.keys() & {"num_experts"} and keys.given("expert_count"):
        raise _unlike(file, f"it is a mixture of {keys.given('expert_count')} experts")
    rotary_dim = head_dim if rope.rotary_dim is None else rope.rotary_dim
    length = values["max_position_embeddings"]
    parameters = rope_parameters(rope, length, rotary_dim)
    if rope.architecture == "phi3":
        parameters = as_longrope(parameters, length, rotary_dim)
    if rotary_dim != head_dim:
        if rope.architecture not in _PARTIAL or rotary_dim > head_dim:
            raise _unlike(file, f"{rotary_dim} of {head_dim} dimensions of a head rotate")
        parameters["partial_rotary_factor"] = rotary_dim / head_dim
    values |= {"rope_parameters": parameters} | FAMILIES[rope.architecture](keys, values, parameters)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # the configuration classes check their arguments in many ways
        raise LongRopeError(
            f"transformers makes no configuration of the keys of {file.path}: {one_line(error)}", code="damaged-file"
        ) from error
    config.name_or_path = str(file.path)
    return config


def _sizes(keys: Keys) -> _Values:
    """The sizes that all families have, bounded by what the file holds, so that no wrong number allocates anything."""
    file, heads = keys.file, keys.count("attention.head_count")
    layers, hidden = keys.count("block_count"), keys.count("embedding_length")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.dims) != 2 or embedding.dims[0] != hidden:
        found = "none" if embedding is None else f"one of {embedding.dims}"
        raise _damaged(file, f"expected token_embd.weight with rows of {hidden}, found {found}")
    present = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if present != {str(index) for index in range(min(layers, len(present) + 1))}:
        raise _damaged(file, f"its block_count is {layers}, it has tensors of {len(present)} layers")
    head_dim = keys.count("attention.key_length", hidden // heads or None)
    if head_dim > LARGEST_DIM:
        raise _damaged(file, f"expected heads of at most {LARGEST_DIM} dimensions, found {head_dim}")
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise _unlike(file, f"keys of {head_dim} and values of {keys.count('attention.value_length')} dimensions")
    special = {f"{name}_token_id": _token_id(file, key) for name, key in _SPECIAL.items()}
    return special | {
        "vocab_size": embedding.dims[1],
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _token_id(file: GgufFile, name: str) -> int | None:
    """A special token, None where the file has none or one that the embedding has no row for."""
    found, rows = file.value(f"tokenizer.ggml.{name}_token_id"), file.tensors["token_embd.weight"].dims[1]
    return found if isinstance(found, int) and 0 <= found < rows else None


def _llama(keys: Keys, _values: _Values, _rope: _Values) -> _Values:
    """Llama, Mistral, and others under its name: with biases of queries, keys and values alone it is Qwen 2's network.

    llama.cpp's graph has no sliding window, whatever the model was trained with.
    """
    if keys.has("attn_q.bias") and not keys.has("attn_output.bias"):
        return {"model_type": "qwen2"}
    biases = {"attention_bias": keys.has("attn_q.bias"), "mlp_bias": keys.has("ffn_gate.bias")}
    return {"model_type": "llama"} | biases


def _qwen3(keys: Keys, _values: _Values, _rope: _Values) -> _Values:
    return {"model_type": "qwen3", "attention_bias": keys.has("attn_q.bias")}


def _phi3(_keys: Keys, values: _Values, rope: _Values) -> _Values:
    """llama.cpp computes Phi-3 without its sliding window."""
    switch = rope.get("original_max_position_embeddings", values["max_position_embeddings"])
    return {"model_type": "phi3", "sliding_window": None, "original_max_position_embeddings": switch}


def _gemma2(keys: Keys, values: _Values, _rope: _Values) -> _Values:
    return {
        "model_type": "gemma2",
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _gemma_scale(values, layers_of_27b=46),
    }


def _gemma3(keys: Keys, values: _Values, rope: _Values) -> _Values:
    """Layers with a sliding window have a RoPE of their own, which is never scaled."""
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)}
    cap = keys.given("final_logit_softcapping")
    return {
        "model_type": "gemma3_text",
        "sliding_window": keys.count("attention.sliding_window"),
        "final_logit_softcapping": None if cap is None else keys.number("final_logit_softcapping"),
        "query_pre_attn_scalar": _gemma_scale(values, layers_of_27b=62),
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
    }


def _gemma_scale(values: _Values, layers_of_27b: int) -> int:
    """The dimension whose root divides attention scores: llama.cpp knows the models of 27B by their layers."""
    if values["num_hidden_layers"] == layers_of_27b:
        return int(values["hidden_size"] // values["num_attention_heads"])
    return int(values["head_dim"])


FAMILIES: dict[str, Callable[[Keys, _Values, _Values], _Values]] = {
    "llama": _llama,
    "qwen2": lambda *_: {"model_type": "qwen2"},
    "qwen3": _qwen3,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
"""llama.cpp's architecture -> the function for the values that its models have beside the common sizes."""

_PARTIAL = ("phi3",)
"""Architectures of which transformers rotates a part of a head."""


def _unlike(file: GgufFile, found: str) -> LongRopeError:
    return LongRopeError(
        f"cannot open the GGUF file {file.path}: {found}, which transformers' class does not compute",
        code="unsupported-model",
    )


def _damaged(file: GgufFile, found: str) -> LongRopeError:
    return LongRopeError(f"the GGUF file {file.path} is damaged: {found}", code="damaged-file", hint="fetch it again")
