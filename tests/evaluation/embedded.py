"""The embedded model for tests of whole suites, other tokenizers, and an oracle in place of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from longrope.data.books import read_book
from longrope.data.documents import Document
from longrope.data.tokens import Ids, TokenizedDocument, encode
from longrope.models.apply import apply_scaling, geometry_of
from longrope.models.loading import load_model, load_tokenizer
from longrope.models.scaled import ScaledModel
from longrope.rope.baselines import Method, closed_form_method
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window

WINDOW = 256


@cache
def tiny() -> ScaledModel:
    """The embedded model, its original RoPE installed."""
    model = load_model("tiny")
    return apply_scaling(model, RopeScaling.original(geometry_of(model)))


@cache
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("tiny")


def geometry() -> RopeGeometry:
    return tiny().scaling.geometry


@cache
def book() -> Document:
    """The first part of a shipped book."""
    whole = read_book("les-miserables")
    return Document.of("book", whole.text[100_000:300_000])


@cache
def tokenized(tokenizer: PreTrainedTokenizerBase) -> list[TokenizedDocument]:
    return [TokenizedDocument("book", book().sha256, np.asarray(encode(tokenizer, book().text), dtype=np.int32))]


def none() -> Method:
    return closed_form_method("none", geometry(), WINDOW)


def shuffled() -> Method:
    """A broken rotary: the right frequencies at the wrong pairs (those of each half in reverse order)."""
    theta = geometry().inv_freq
    half = len(theta) // 2
    wrong = np.concatenate([theta[:half][::-1], theta[half:][::-1]])
    return Method("shuffled", lambda length: Window(length, tuple((theta / wrong).tolist())))


class Oracle:
    """In place of a prefill: replies to a prompt with its entry in `replies`, whatever the model is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, replies: Mapping[bytes, str]) -> None:
        self.tokenizer, self.replies = tokenizer, replies
        self.lengths: list[int] = []

    def prefill(self, scaled: ScaledModel, ids: Tensor, window: Window) -> Oracle:
        self.scaled, self.prompt = scaled, ids
        return self

    def greedy(self, tokens: Tensor, max_new_tokens: int, stop: Sequence[int] = ()) -> list[int]:
        asked = [*self.prompt[0].tolist(), *tokens[0].tolist()]
        self.lengths.append(len(asked) + max_new_tokens)
        return encode(self.tokenizer, self.replies[key(asked)])[:max_new_tokens]

    def score(self, tokens: Tensor) -> Tensor:
        return tokens[0].float()


def key(ids: Sequence[int] | Ids) -> bytes:
    return np.asarray(ids, dtype=np.int64).tobytes()


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Oracle]:
    """`oracle(module, tokenizer, {prompt: reply})` puts an oracle in place of the module's prefill."""

    def use(module: Any, tokenizer: PreTrainedTokenizerBase, replies: Mapping[bytes, str]) -> Oracle:
        stand_in = Oracle(tokenizer, replies)
        monkeypatch.setattr(module, "prefill", stand_in.prefill)
        return stand_in

    return use


def _trained(bpe: Tokenizer, alphabet: list[str]) -> Tokenizer:
    text = [book().text[:60_000], *(f" {number} {number * 7919 % 90000 + 10000}." for number in range(100, 999))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text, trainer)
    return bpe


@cache
def digit_groups() -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges digits as it finds them and puts no BOS in front, as GPT-2's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(bpe, pre_tokenizers.ByteLevel.alphabet()), eos_token="</s>"
    )


@cache
def sentence_pieces() -> PreTrainedTokenizerFast:
    """Blanks as ▁, one more in front of every text, and a BOS, as Llama 2's."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trained = _trained(bpe, [chr(code) for code in range(32, 127)] + ["▁", "\n"])
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", trained.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = [tiny_tokenizer, digit_groups, sentence_pieces]
