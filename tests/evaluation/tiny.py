"""A tiny Llama with random weights, random samples, the same model scaled by plain transformers; counted steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longrope.callbacks import Callbacks
from longrope.data.samples import SampleOrigin, Samples
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling
from longrope.models.scaled import ScaledModel
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window

GEOMETRY = RopeGeometry(rotary_dim=32, base=10_000.0, original_length=32)
VOCABULARY = 97
BOS = 0


def tiny_llama() -> LlamaForCausalLM:
    """Two layers of two heads of 32 (16 rotary pairs), with weights large enough that positions matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=GEOMETRY.original_length,
        initializer_range=0.25,
        rope_parameters={"rope_type": "default", "rope_theta": GEOMETRY.base},
    )
    return LlamaForCausalLM(config).eval()


@dataclass
class Steps(Callbacks):
    """Counts the steps of an evaluation, those announced and those taken."""

    announced: int = 0
    taken: int = 0

    def on_eval_start(self, steps: int) -> None:
        self.announced += steps

    def on_eval_step(self) -> None:
        self.taken += 1


@contextmanager
def refused(code: str, *fragments: str) -> Iterator[None]:
    """The block raises a LongRopeError of this code (any, where "") whose text has all of `fragments`."""
    with pytest.raises(LongRopeError) as error:
        yield
    assert code in ("", error.value.code), str(error.value)
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


@cache
def plain() -> LlamaForCausalLM:
    """The model as it is, nothing installed; the same weights as `tiny_scaled()`."""
    return tiny_llama()


@cache
def tiny_scaled() -> ScaledModel:
    model = tiny_llama()
    return apply_scaling(model, RopeScaling.original(GEOMETRY))


def scaled_by_hand(window: Window) -> LlamaForCausalLM:
    """`plain()` with a window's factors written into transformers' own rotary module. Start tokens are not for it."""
    assert window.start_tokens == 0
    model = copy.deepcopy(plain())
    rotary = model.model.rotary_emb
    rotary.inv_freq /= torch.tensor(window.factors)
    rotary.attention_scaling = window.attention_factor
    return model


def nll_by_hand(model: LlamaForCausalLM, ids: list[int]) -> list[float]:
    """−log p of every token but the first, in float64, from the logits of one plain forward."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    log_p = logits.double().log_softmax(-1)
    return [-float(row[token]) for row, token in zip(log_p, ids[1:], strict=True)]


def random_samples(count: int, length: int, *, bos: bool = True, seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (count, length), generator=generator)
    if bos:
        ids[:, 0] = BOS
    rows = tuple(SampleOrigin("book", "00" * 32, index * length) for index in range(count))
    return Samples(ids, rows, bos)


def ramp(max_length: int, ratio: float = 4.0, attention_factor: float = 1.1) -> Window:
    """Factors that rise from 1 to `ratio`."""
    factors = torch.linspace(0, 1, GEOMETRY.pairs, dtype=torch.float64)
    return Window(max_length, tuple((ratio**factors).tolist()), 0, attention_factor)
