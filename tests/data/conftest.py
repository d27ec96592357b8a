"""A small byte-level BPE tokenizer, trained on the spot, with and without a BOS in front of texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The whale swam past the ship at 12 knots.",
    "Call me Ishmael; some years ago, never mind how long precisely.",
    "It was the best of times, it was the worst of times.",
]


def _make(*, bos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=16
    )


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return _make(bos=True)


@pytest.fixture
def same_bos_tokenizer() -> PreTrainedTokenizerFast:
    """Another object, the same tokenizer."""
    return _make(bos=True)


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return _make(bos=False)


@pytest.fixture
def write_parquet() -> Callable[[Path, dict[str, list[str | None]]], None]:
    """Writes columns to a Parquet file, in row groups of two rows."""
    return lambda path, columns: pq.write_table(pa.table(columns), path, row_group_size=2)
