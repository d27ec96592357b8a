"""The model a verb works on: loaded once, with its tokenizer, geometry and the scaling it already carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrope.data.samples import Samples, draw_samples
from longrope.data.sources import Document, Source, shipped_books
from longrope.data.tokens import bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.export.forms import RECORD, numbers_sha256, refuse_folded
from longrope.models.install import geometry_of
from longrope.models.load import EMBEDDED_MODELS, load_config, load_model, load_tokenizer, resolve
from longrope.rope.existing import existing_scaling
from longrope.rope.factors import CLOSED_FORMS
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window

AnySource = TypeVar("AnySource", bound=Source)
SCALING = "scaling.json"


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
    """A loaded model. `existing` is the scaling its checkpoint carries, relative to its original RoPE.

    `carried_scaling` says where that comes from. The model computes what its config says; whoever asks it about another
    scaling installs that.
    """

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

    def carried_window(self, length: int) -> Window | None:
        """The window of `existing` for `length` tokens, its last one beyond its reach; None without `existing`."""
        return None if self.existing is None else self.existing.window_for(min(length, self.reach))


def open_model(name: str, options: ModelOptions | None = None) -> Subject:
    """Load a model for any verb: a model folder, the folder of a run that has a checkpoint, a hub or embedded name.

    Raises LongRopeError when it cannot be loaded, has no RoPE, or the scaling beside it is for another one.
    """
    options = options or ModelOptions()
    config = load_config(name, trust_remote_code=options.trust_remote_code)
    # A model without RoPE, or with a scaling that is not for it, is refused before its weights are read.
    existing = carried_scaling(name, config, RopeGeometry.from_config(config, original_length=options.original_length))
    model = load_model(
        name,
        dtype=options.dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )
    tokenizer = load_tokenizer(name, trust_remote_code=options.trust_remote_code)
    geometry = geometry_of(model, options.original_length)
    return Subject(name, model, tokenizer, geometry, existing, options)


def carried_scaling(name: str, config: Any, geometry: RopeGeometry) -> RopeScaling | None:
    """The scaling that the weights of `name` are for, relative to their original RoPE; None where that is all.

    It is the recorded one (`recorded_scaling`), which fine-tuning leaves, and what `config` states where there is none.
    An export's config says what its weights compute, folded factors and all, so there it is the config's.

    Raises LongRopeError for a recorded scaling that does not fit `geometry`, or weights that have a factor folded in.
    """
    recorded = recorded_scaling(name)
    if recorded is None or is_export(config, recorded):
        return existing_scaling(config)
    refuse_folded(getattr(config, RECORD, None), name)
    try:
        recorded.check_fits(geometry)
    except LongRopeError as error:
        raise LongRopeError(f"{SCALING} of {name}: {error}") from error
    return recorded


def recorded_scaling(name: str) -> RopeScaling | None:
    """The `scaling.json` of the run folder `name`, or that beside the config.json of a model; None where there is none.

    Raises LongRopeError when it is no scaling.
    """
    given, folder = Path(name).expanduser(), Path(resolve(name))
    for path in (given / SCALING, folder / SCALING) if given.is_dir() else (folder / SCALING,):
        if path.is_file():
            return RopeScaling.load(path)
    return None


def is_export(config: Any, recorded: RopeScaling) -> bool:
    """Whether `longrope export` wrote `config` to express `recorded`."""
    record = getattr(config, RECORD, None)
    return isinstance(record, dict) and record.get("scaling_sha256") == numbers_sha256(recorded)


def as_if_trained(subject: Subject, length: int) -> Subject:
    """The subject as if it reached `length` tokens already, under stand-in factors: for whoever asks what a later
    search will need, and not for its numbers.
    """
    if length <= subject.reach:
        return subject
    factors, attention_factor = CLOSED_FORMS["yarn"](subject.geometry, length)
    return replace(subject, existing=RopeScaling.single(subject.geometry, length, factors, 0, attention_factor))


def require_longer(subject: Subject, target_length: int) -> None:
    """Raise LongRopeError unless `target_length` is above the window that the checkpoint has."""
    if target_length <= subject.reach:
        raise LongRopeError(
            f"expected a target length above the model's window of {subject.reach} tokens, found {target_length}"
        )


def sources_or_books(name: str, sources: Sequence[AnySource], role: str) -> list[AnySource | str]:
    """`sources`, or the shipped books of `role` for an embedded model. Raises LongRopeError when there are none."""
    if sources:
        return list(sources)
    if name not in EMBEDDED_MODELS:
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
