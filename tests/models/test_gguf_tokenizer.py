"""The tokenizer of a GGUF file gives the tokens that llama.cpp gives, with the BOS and EOS that it adds."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from longrope.models.gguf.pre_tokenizers import NAMED
from longrope.models.loading import load_tokenizer
from tests.checkpoints import words
from tests.export.sources import refusal
from tests.models.gguf_models import model_of, save_gguf

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("tests.export.gguf.llama_cpp")

TEXTS = [
    "It was the 1st of May 1862, and nobody had come home; 12345678 steps, 3.14159.",
    "  Leading and trailing  spaces   inside\t\ttabs\n\n\n  new lines \r\n and more \n",
    "don't I'LL we've they'd it's IT'S 'tis O'Brien",
    "naïve café — Ελληνικά, русский, 中文字符, 日本語, العربية, हिन्दी 👩‍👩‍👧 ½ ² Ⅷ ٣٤",
    "x=3.14*y**2;if(a[0]!=NULL){return -1;} // 100%\n    indented\n",
    " ",
    "</s> a special token within <s>text",
]
SIZE = 700


@cache
def byte_level() -> dict[str, Any]:
    """A vocabulary with merges across all borders, so that each border shows."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=5,
        show_progress=False,
    )
    bpe.train_from_iterator([*TEXTS * 3, words(100)], trainer)
    return keys_of(bpe, "gpt2") | {"bos_token_id": 0, "eos_token_id": 1}


@cache
def sentencepiece() -> dict[str, Any]:
    """A vocabulary as SentencePiece has it: bytes for what is not in it, and scores in the order of merges."""
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([*TEXTS[:3] * 3, words(100)], trainer)
    found = keys_of(bpe, "llama")
    count = len(found["tokens"])
    types = [2, 3, 3, *[6] * 256, *[1] * (count - 259)]
    scores = [0.0] * 259 + [-float(index) for index in range(count - 259)]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return found | ids | {"scores": scores, "token_type": types, "merges": None, "pre": "default"}


def keys_of(bpe: Tokenizer, kind: str) -> dict[str, Any]:
    import json

    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    types = [3 if token in ("<s>", "</s>") else 1 for token in tokens]
    return {"model": kind, "tokens": tokens, "token_type": types, "merges": merges, "add_bos_token": None}


def save(path, keys: dict[str, Any], architecture: str = "llama"):
    model = model_of(architecture, vocab_size=len(keys["tokens"]))
    return save_gguf(path / "model.gguf", architecture, model=model, words=keys)


def differing_texts(path) -> list[str]:
    server, ours = llama_cpp.serve(path, 256), load_tokenizer(str(path))
    return [text for text in TEXTS if ours(text).input_ids != llama_cpp.tokenize(server, text)]


@pytest.mark.parametrize("pre", NAMED)
def test_the_rules_of_byte_level_bpe(pre, tmp_path):
    assert differing_texts(save(tmp_path, byte_level() | {"pre": pre})) == []


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2", "gemma3"])
def test_sentencepiece(architecture, tmp_path):
    path = save(tmp_path, sentencepiece(), architecture)
    assert differing_texts(path) == []
    ours = load_tokenizer(str(path))
    ours.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [saved(text).input_ids for text in TEXTS] == [ours(text).input_ids for text in TEXTS]
    assert ours.decode(ours(TEXTS[0]).input_ids, skip_special_tokens=True).strip() == TEXTS[0]


@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, None])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_bos_and_eos(make, bos, eos, tmp_path):
    keys = make() | {"add_bos_token": bos, "add_eos_token": eos}
    assert differing_texts(save(tmp_path, keys | {"pre": "gpt-2"})) == []


def test_no_space_before_the_first_word(tmp_path):
    assert differing_texts(save(tmp_path, sentencepiece() | {"add_space_prefix": False})) == []


@pytest.mark.parametrize("wrong", [10**6, True])
def test_special_tokens_that_are_not_in_the_vocabulary(wrong, tmp_path):
    """They are llama.cpp's defaults, or none."""
    found = load_tokenizer(str(save(tmp_path, sentencepiece() | {"bos_token_id": wrong})))
    assert found.bos_token_id == found("x").input_ids[0] == 1
    found = load_tokenizer(str(save(tmp_path, byte_level() | {"pre": "gpt-2", "eos_token_id": wrong})))
    assert (found.bos_token_id, found.eos_token_id) == (0, None)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"pre": "no-such-rule"}, "'no-such-rule'"),
        ({"pre": None}, "None"),
        ({"model": "bert"}, "'bert'"),
        ({"model": None}, "None"),
        ({"pre": "gpt-2", "bos_token_id": None, "add_bos_token": True}, "a BOS to add"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused(keys, named, tmp_path):
    error = refusal(load_tokenizer, str(save(tmp_path, byte_level() | keys)))
    assert named in str(error)
    assert "give the model's own `tokenizer`" in str(error)
    assert "\n" not in str(error)
