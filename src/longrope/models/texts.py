"""Texts for a loaded model: the sources it is read from, samples in its tokens, and the check of their ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from longrope.data.books import shipped_books
from longrope.data.documents import Document
from longrope.data.samples import Samples, draw_samples
from longrope.data.sources import TextSource
from longrope.data.tokens import bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.models.checkpoint_files import EMBEDDED_MODELS
from longrope.models.config import LoadOptions
from longrope.models.loading import LoadedModel, config_and_scaling

_ROLES = {"evaluation": " to measure on"}
AnySource = TypeVar("AnySource", bound=TextSource)


def sources_or_books(
    name: str, sources: Sequence[AnySource], role: str, argument: str = "data"
) -> list[AnySource | str]:
    """`sources`, or the shipped books of `role` for an embedded model.

    `role`: search or evaluation. `argument`: the argument that the sources are given by. Raises LongRopeError, naming
    it, when there are none.
    """
    if sources:
        return list(sources)
    if name not in EMBEDDED_MODELS:
        raise _no_texts(name, {role: argument})
    return [f"book:{book.name}" for book in shipped_books() if book.role == role]


def require_texts(
    model: object, sources: Sequence[TextSource], role: str, load: LoadOptions | None = None, argument: str = "data"
) -> None:
    """Raise LongRopeError as `sources_or_books` does where `model` is named and has no texts.

    A job calls it before it reads a model of gigabytes. `load`: how the model would be loaded. Of a name that is no
    model, or one without RoPE, the error says that: its config is read first.
    """
    require_all_texts(model, {role: (sources, argument)}, load)


def require_all_texts(
    model: object, given: Mapping[str, tuple[Sequence[TextSource], str]], load: LoadOptions | None = None
) -> None:
    """`require_texts` for several roles at once: (sources, argument) by role. One error names all that is missing."""
    missing = {role: argument for role, (sources, argument) in given.items() if not sources}
    if missing and isinstance(model, str | Path) and str(model) not in EMBEDDED_MODELS:
        load = load or LoadOptions()
        config_and_scaling(model, load.original_length, trust_remote_code=load.trust_remote_code)
        raise _no_texts(str(model), missing)


def _no_texts(name: str, missing: Mapping[str, str]) -> LongRopeError:
    """`missing`: role -> the argument that its texts are given by."""
    wanted = " and ".join(f"as `{argument}`{_ROLES.get(role, '')}" for role, argument in missing.items())
    return LongRopeError(
        f"expected texts for {name} {wanted}, found none",
        code="missing-data",
        hint="give a text file, folder, .jsonl, .json, .parquet or hf:NAME",
    )


def prepare_samples(
    loaded: LoadedModel, documents: Sequence[Document], *, length: int, count: int, seed: int
) -> Samples:
    """`count` samples of exactly `length` tokens of `documents`, for the model's tokenizer."""
    samples = draw_samples(
        tokenize(documents, loaded.tokenizer),
        length=length,
        count=count,
        seed=seed,
        bos_token_id=bos_of(loaded.tokenizer),
    )
    check_vocabulary(loaded, samples.ids)
    return samples


def check_vocabulary(loaded: LoadedModel, ids: Tensor) -> None:
    """Raise LongRopeError when the tokenizer makes ids that the model has no embedding for."""
    size = loaded.model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= size:
        raise LongRopeError(
            f"the tokenizer of {loaded.name} makes token id {int(ids.max())}, its model knows {size}",
            code="another-tokenizer",
            hint="give the model's own `tokenizer`",
        )
