"""The rules by which llama.cpp splits text before byte-level BPE, which a GGUF file names in `tokenizer.ggml.pre`.

The tests compare each rule's tokens with llama.cpp's own, on texts of many scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

GPT2, BYTES, DIGITS = "gpt2", "bytes", "digits"
"""Stages that are no regular expression: GPT-2's own split, none, and every digit by itself."""

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The pieces before and after digits, which Llama 3 and Qwen 2 share."""
_LLAMA3 = WORDS + r"\p{N}{1,3}" + REST
_QWEN2 = WORDS + r"\p{N}" + REST


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One rule: the stages by which text is split, one after the other, the last one into bytes."""

    stages: tuple[str, ...]
    ignore_merges: bool = False
    """True if a whole piece that is a token needs no merges."""
    add_bos: bool = False
    """True if a text gets a BOS where the file does not say."""

    def build(self) -> Any:
        """The same rule in the tokenizers package."""
        parts: list[Any] = []
        for stage in self.stages:
            if stage == DIGITS:
                parts.append(pre_tokenizers.Digits(individual_digits=True))
            elif stage in (GPT2, BYTES):
                parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=stage == GPT2))
            else:
                parts.append(pre_tokenizers.Split(Regex(stage), behavior="isolated"))
        return pre_tokenizers.Sequence(parts)


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((GPT2,)),
    "smollm": PreTokenizer((DIGITS, GPT2)),
    "llama-bpe": PreTokenizer((_LLAMA3, BYTES), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer((_QWEN2, BYTES)),
    "smaug-bpe": PreTokenizer((_LLAMA3, BYTES)),
}
"""llama.cpp's name -> its rule, one name each."""

_SAME = {
    "gpt-2": (
        "phi-2",
        "mpt",
        "olmo",
        "jina-es",
        "jina-de",
        "jina-v2-es",
        "jina-v2-de",
        "gigachat",
        "a.x-4.0",
        "mellum",
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"),
    "smaug-bpe": ("dbrx",),
}
NAMED = PRE_TOKENIZERS | {other: PRE_TOKENIZERS[name] for name, others in _SAME.items() for other in others}
"""Every known name -> its rule."""
