"""A complete GGUF file of a small model of the Llama architecture: weights, tokenizer and scaling.

For large models, quantised ones and other architectures, llama.cpp's converter writes the file and `patch.py` adds the
scaling. The same holds for other tokenizers than byte-level BPE with a pre-tokeniser of `PRE_TOKENIZERS`, which
llama.cpp has compiled in by name: a tokenizer is written only where llama.cpp splits text in exactly the same way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longrope.errors import LongRopeError
from longrope.export.gguf.keys import GgufKeys, GgufTensors
from longrope.models.gguf.container import gguf_package
from longrope.models.gguf.pre_tokenizers import BYTES, DIGITS, GPT2, PRE_TOKENIZERS
from longrope.models.loading import load_model, load_tokenizer
from longrope.rope.geometry import RopeGeometry, head_dim_of, rope_parameters_of
from longrope.rope.scaling import MAX_POSITION

ARCHITECTURE = "llama"
MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Three names of the same network. Qwen 2's own graph in llama.cpp takes no factors; Llama's has its biases too."""
_CONVERT = "convert the model with llama.cpp's convert_hf_to_gguf.py and give that file as `gguf`"
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # general.file_type, llama.cpp's numbers

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types

_NAMES = {(rule.stages, rule.ignore_merges): name for name, rule in PRE_TOKENIZERS.items()}
"""The stages of a tokenizer.json before BPE, and whether whole words skip the merges -> llama.cpp's name for them."""


def check_llama(config: Any, geometry: RopeGeometry, context_length: int) -> None:
    """Raise LongRopeError (`unsupported-model`) when llama.cpp's Llama graph does not compute the model of `config`."""
    head_dim, window = head_dim_of(config), _sliding_window(config)
    faults = [
        (config.model_type not in MODEL_TYPES, f"{config.model_type!r} is none of {', '.join(MODEL_TYPES)}"),
        (getattr(config, "quantization_config", None) is not None, "its weights are quantised"),
        (getattr(config, "hidden_act", None) != "silu", "its activation is not silu"),
        (getattr(config, "mlp_bias", False), "its MLP has biases"),
        (geometry.rotary_dim != head_dim, f"{geometry.rotary_dim} of {head_dim} dimensions of a head rotate"),
        (window < context_length, f"it looks back {window} tokens only (sliding window)"),
    ]
    for found, fault in faults:
        if found:
            raise _refusal(f"cannot write this model as a GGUF of the Llama architecture: {fault}")


def write_llama(path: Path, model_name: str, keys: GgufKeys, tensors: GgufTensors) -> list[str]:
    """Write `model_name`, which `check_llama` passed, to `path` with the keys and tensors of its scaling.

    Returns notes for the user, one line each. Raises LongRopeError (`unsupported-model`) when the tokenizer or a weight
    cannot be expressed.
    """
    gguf = gguf_package()
    model = load_model(model_name, dtype="checkpoint")
    config = model.config
    rows = model.get_input_embeddings().num_embeddings
    eos = config.eos_token_id
    words = vocabulary(model_name, rows, eos=eos[0] if isinstance(eos, list) else eos)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type("model")
    writer.add_name(Path(model_name).name)
    writer.add_file_type(_FILE_TYPES[_dtype(model.dtype)])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)
    writer.add_rope_dimension_count(head_dim_of(config))
    writer.add_rope_freq_base(rope_parameters_of(config)["rope_theta"])
    _add_tokenizer(writer, words)
    for key, (kind, value) in keys.items():
        writer.add_key_value(key, value, gguf.GGUFValueType(kind))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no output
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _refusal(f"llama.cpp's Llama has no tensor for {name}")
        _add_tensor(gguf, writer, found, _llama_order(name, weight, config))
    for name, factors in tensors.items():
        writer.add_tensor(name, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    nfc = "the tokenizer brings text into Unicode's form NFC first; llama.cpp takes it as it is"
    return [nfc] * words.normalises


def _llama_order(name: str, weight: Tensor, config: Any) -> Tensor:
    """Queries and keys with their rows as llama.cpp's Llama graph rotates them.

    transformers pairs dimension i of a head with i + d/2; Meta's original weights, and llama.cpp's graph `llama`
    (`LLAMA_ROPE_TYPE_NORM`), pair 2i with 2i + 1. Row (half h, pair i) goes to (pair i, half h); a dot product of a
    query and a key does not change when both are reordered alike.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight
    halves = weight.reshape(count, 2, -1, *weight.shape[1:])  # heads, half, pair, …
    return halves.transpose(1, 2).reshape(weight.shape)


def _add_tensor(gguf: Any, writer: Any, name: str, weight: Tensor) -> None:
    """The weight in its own dtype; vectors (norms, biases) as float32, the only type that ggml adds and multiplies."""
    if weight.dim() == 1:
        writer.add_tensor(name, weight.float().numpy())
    elif _dtype(weight.dtype) is torch.bfloat16:
        raw = weight.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, weight.contiguous().numpy())


def _add_tokenizer(writer: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for name, index in words.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def _dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _FILE_TYPES:
        raise _refusal(f"expected weights in float32, float16 or bfloat16, found {dtype}")
    return dtype


def _sliding_window(config: Any) -> int:
    """The tokens that a query attends to: the sliding window, or all."""
    used = getattr(config, "use_sliding_window", True)
    return int((getattr(config, "sliding_window", None) or MAX_POSITION) if used else MAX_POSITION)


def _refusal(fault: str) -> LongRopeError:
    return LongRopeError(fault, code="unsupported-model", hint=_CONVERT)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The values of GGUF's `tokenizer.ggml.*` keys. Tokens, types and ids are by position."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    """bos, eos, unk, pad -> id, for those that the tokenizer has."""
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    normalises: bool
    """True if the tokenizer brings text into Unicode's form NFC first (Qwen's), which llama.cpp does not."""


def vocabulary(model_name: str, size: int, *, eos: int | None = None) -> Vocabulary:
    """The vocabulary of `model_name`, filled up to the `size` rows of its embedding.

    `eos` is the end of text that the model's config states, for a tokenizer that names none. Raises LongRopeError
    (`unsupported-model`) when llama.cpp would split text differently.
    """
    tokenizer = load_tokenizer(model_name)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"expected a tokenizer.json in {model_name}, found a tokenizer without one")
    document = json.loads(backend.to_str())
    pre = _pre_tokenizer(document)
    tokens, types = _tokens(document, size)
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if special["eos"] is None:
        special["eos"] = eos
    add_bos, add_eos = _bos_and_eos(tokenizer, special)
    template = tokenizer.chat_template
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]],
        special={name: index for name, index in special.items() if index is not None},
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template if isinstance(template, str) else None,
        normalises=document["normalizer"] is not None,
    )


def _pre_tokenizer(document: dict[str, Any]) -> str:
    model = document["model"]
    plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
    normalizer = (document["normalizer"] or {"type": "NFC"})["type"]
    if model["type"] != "BPE" or any(model.get(name) for name in plain) or normalizer != "NFC":
        kind = "a SentencePiece-like BPE" if model.get("byte_fallback") else f"{model['type']}, normaliser {normalizer}"
        raise _refusal(f"expected a plain byte-level BPE tokenizer, found {kind}")
    stages = document["pre_tokenizer"] or {"type": "none"}
    parts = stages.get("pretokenizers", [stages])
    found = tuple(map(_stage, parts)), bool(model.get("ignore_merges"))
    if found not in _NAMES:
        kinds = " + ".join(part["type"] for part in parts)
        raise _refusal(f"llama.cpp has no known name for this tokenizer's pre-tokeniser ({kinds})")
    return _NAMES[found]


def _stage(part: dict[str, Any]) -> str:
    """One stage of a pre-tokeniser in a word, or the regular expression that it splits by."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return GPT2 if part["use_regex"] else BYTES
    if part["type"] == "Digits" and part["individual_digits"]:
        return DIGITS
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return str(part["pattern"].get("Regex"))
    return "unknown"


def _tokens(document: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The tokens of a tokenizer.json by id, padded to `size`, and their types in GGUF."""
    named = {index: (token, NORMAL) for token, index in document["model"]["vocab"].items()}
    for added in document["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise _refusal(f"llama.cpp ignores that the token {added['content']!r} depends on the text beside it")
        named[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(named) >= size:
        raise LongRopeError(
            f"expected at most {size} tokens, the rows of the embedding; found id {max(named)}",
            code="unsupported-model",
        )
    tokens, types = zip(*(named.get(index, (f"[PAD{index}]", UNUSED)) for index in range(size)), strict=True)
    return list(tokens), list(types)


def _bos_and_eos(tokenizer: Any, special: dict[str, int | None]) -> tuple[bool, bool]:
    """(puts a BOS before a text, puts an EOS after it). Raises LongRopeError where the tokenizer adds other tokens."""
    plain, whole = tokenizer("x", add_special_tokens=False).input_ids, tokenizer("x").input_ids
    for bos in (False, True):
        for eos in (False, True):
            if whole == [special["bos"]] * bos + plain + [special["eos"]] * eos:
                return bos, eos
    raise _refusal("this tokenizer adds other tokens than BOS and EOS to a text")
