"""A transformers tokenizer as GGUF's vocabulary, where llama.cpp splits text in exactly the same way.

Byte-level BPE whose pre-tokeniser is one of `_PRE_TOKENIZERS` only: llama.cpp has them compiled in, by name. Other
tokenizers (SentencePiece's, above all) are llama.cpp's own converter's to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from longrope.errors import LongRopeError
from longrope.models.load import load_tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types

_ELSEWHERE = "convert the model with llama.cpp's convert_hf_to_gguf.py and give that file with --gguf"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# What a tokenizer.json does before BPE, and whether whole words skip the merges -> llama.cpp's name for it.
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((_WORDS + r"\p{N}{1,3}" + _REST, "bytes"), True): "llama-bpe",
    ((_WORDS + r"\p{N}" + _REST, "bytes"), False): "qwen2",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What GGUF's `tokenizer.ggml.*` keys hold. Tokens, types and ids are by position."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    """bos, eos, unk, pad -> id, those that the tokenizer has."""
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    normalises: bool
    """Whether the tokenizer brings text into Unicode's form NFC first (Qwen's), which llama.cpp does not."""


def vocabulary(model_name: str, size: int, *, eos: int | None = None) -> Vocabulary:
    """The vocabulary of `model_name`, filled up to the `size` rows of its embedding.

    `eos` is the end of text that the model's config states, for a tokenizer that names none. Raises LongRopeError
    when llama.cpp would split text differently.
    """
    tokenizer = load_tokenizer(model_name)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LongRopeError(f"expected a tokenizer.json in {model_name}, found a tokenizer without one; {_ELSEWHERE}")
    document = json.loads(backend.to_str())
    pre = _pre_tokenizer(document)
    tokens, types = _tokens(document, size)
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if special["eos"] is None:
        special["eos"] = eos
    add_bos, add_eos = _added(tokenizer, special)
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
        what = "a SentencePiece-like BPE" if model.get("byte_fallback") else f"{model['type']}, normaliser {normalizer}"
        raise LongRopeError(f"expected a plain byte-level BPE tokenizer, found {what}; {_ELSEWHERE}")
    stages = document["pre_tokenizer"] or {"type": "none"}
    parts = stages.get("pretokenizers", [stages])
    found = tuple(map(_stage, parts)), bool(model.get("ignore_merges"))
    if found not in _PRE_TOKENIZERS:
        kinds = " + ".join(part["type"] for part in parts)
        raise LongRopeError(f"llama.cpp has no known name for this tokenizer's pre-tokeniser ({kinds}); {_ELSEWHERE}")
    return _PRE_TOKENIZERS[found]


def _stage(part: dict[str, Any]) -> str:
    """One stage of a pre-tokeniser in a word, or the regular expression that it splits by."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return "gpt2" if part["use_regex"] else "bytes"
    if part["type"] == "Digits" and part["individual_digits"]:
        return "digits"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return str(part["pattern"].get("Regex"))
    return "unknown"


def _tokens(document: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    named = {index: (token, NORMAL) for token, index in document["model"]["vocab"].items()}
    for added in document["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise LongRopeError(
                f"the added token {added['content']!r} depends on what stands beside it, which llama.cpp does not "
                f"know; {_ELSEWHERE}"
            )
        named[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(named) >= size:
        raise LongRopeError(f"expected at most {size} tokens, the rows of the embedding; found id {max(named)}")
    tokens, types = zip(*(named.get(index, (f"[PAD{index}]", UNUSED)) for index in range(size)), strict=True)
    return list(tokens), list(types)


def _added(tokenizer: Any, special: dict[str, int | None]) -> tuple[bool, bool]:
    """Whether the tokenizer puts a BOS before and an EOS after a text; it must do nothing else."""
    plain, whole = tokenizer("x", add_special_tokens=False).input_ids, tokenizer("x").input_ids
    for bos in (False, True):
        for eos in (False, True):
            if whole == [special["bos"]] * bos + plain + [special["eos"]] * eos:
                return bos, eos
    raise LongRopeError(f"this tokenizer adds other tokens than BOS and EOS to a text; {_ELSEWHERE}")
