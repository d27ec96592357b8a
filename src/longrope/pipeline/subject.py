"""The model a verb works on: loaded once, with its tokenizer, geometry and the scaling it already carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrope.data.samples import Samples, draw_samples
from longrope.data.sources import Document, Source, shipped_books
from longrope.data.tokens import bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.models.install import geometry_of
from longrope.models.load import EMBEDDED, load_config, load_model, load_tokenizer
from longrope.rope.existing import existing_scaling
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling

AnySource = TypeVar("AnySource", bound=Source)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How to load a model. `original_length` overrides the window that the config states."""

    dtype: str = "auto"
    device: str = "cpu"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    original_length: int | None = None


@dataclass(frozen=True)
class Subject:
    """A loaded model. `existing` is the scaling its checkpoint carries, relative to its original RoPE."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    geometry: RopeGeometry
    existing: RopeScaling | None
    options: ModelOptions

    @property
    def reach(self) -> int:
        """The window of the checkpoint as it is: that of the scaling it carries, else the original window."""
        return self.geometry.original_length if self.existing is None else self.existing.target_length


def open_model(name: str, options: ModelOptions | None = None) -> Subject:
    """Load a model for any verb. Raises LongRopeError when it cannot be loaded or has no RoPE."""
    options = options or ModelOptions()
    config = load_config(name, trust_remote_code=options.trust_remote_code)
    RopeGeometry.from_config(config)  # a model without RoPE is refused before its weights are read
    model = load_model(
        name,
        dtype=options.dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )
    tokenizer = load_tokenizer(name, trust_remote_code=options.trust_remote_code)
    geometry = geometry_of(model, options.original_length)
    return Subject(name, model, tokenizer, geometry, existing_scaling(model.config), options)


def require_longer(subject: Subject, target_length: int) -> None:
    """Raise LongRopeError unless `target_length` is above the window that the checkpoint has."""
    if target_length <= subject.reach:
        raise LongRopeError(
            f"expected a target length above the model's window of {subject.reach} tokens, found {target_length}"
        )


def sources_or_books(name: str, sources: Sequence[AnySource], role: str) -> list[AnySource | str]:
    """`sources`, or the shipped books of `role` for the embedded model. Raises LongRopeError when there are none."""
    if sources:
        return list(sources)
    if name != EMBEDDED:
        raise LongRopeError(
            f"expected --data with a text file, folder, .jsonl, .parquet or hf:NAME for {name}; found none"
        )
    return [f"book:{book.name}" for book in shipped_books() if book.role == role]


def prepare_samples(subject: Subject, documents: Sequence[Document], *, length: int, count: int, seed: int) -> Samples:
    """Samples of exactly `length` tokens of `documents` for the subject's tokenizer."""
    samples = draw_samples(
        tokenize(documents, subject.tokenizer),
        length=length,
        count=count,
        seed=seed,
        bos_token_id=bos_of(subject.tokenizer),
    )
    check_vocabulary(subject, samples.ids)
    return samples


def check_vocabulary(subject: Subject, ids: Tensor) -> None:
    """Raise LongRopeError when the tokenizer makes ids that the model has no embedding for."""
    size = subject.model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= size:
        raise LongRopeError(
            f"the tokenizer of {subject.name} makes token id {int(ids.max())}, its model knows {size}; "
            "is it the model's own tokenizer?"
        )
