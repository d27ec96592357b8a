"""What a suite of an evaluation is to the code that runs it: parts, measured for all contenders on the same samples.

What is measured lies in `longrope.evaluation`; the suites are in suites_long.py and suites_short.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from longrope.data.documents import Document
from longrope.data.samples import Samples
from longrope.data.tokens import Ids, TokenizedDocument, tokenize
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.results import EvalRow
from longrope.models.loading import LoadedModel, check_vocabulary, prepare_samples
from longrope.models.scaled import ScaledModel
from longrope.rope.baselines import Method

Entrant = tuple[ScaledModel, Method]
Measure = Callable[[ScaledModel, Method, Callable[[], None]], list[EvalRow]]
"""(model, contender, what to call after each step) -> rows."""


@dataclass(frozen=True)
class Prepared:
    """The samples of a part, SHA-256 -> name of the documents they are from, and what measures a contender on them."""

    samples_sha256: str
    documents: dict[str, str]
    measure: Measure


@dataclass(frozen=True)
class Part:
    """A suite, or a task of it, at one length: one cell per contender, of so many steps.

    `prepare` is given the original model, for what short texts are held against.
    """

    suite: str
    task: str
    length: int
    steps: int
    prepare: Callable[[Entrant], Prepared]


@dataclass(frozen=True)
class Material:
    """What all suites draw from. `documents` are none where no suite needs text."""

    loaded: LoadedModel
    lengths: Sequence[int]
    documents: Sequence[Document]
    seed: int
    options: EvalConfig

    @cached_property
    def tokenized(self) -> list[TokenizedDocument]:
        return tokenize(self.documents, self.loaded.tokenizer)

    def check_ids(self, ids: Ids) -> None:
        """Raise LongRopeError when a prompt has ids that the model has no embedding for."""
        check_vocabulary(self.loaded, torch.from_numpy(ids))

    def samples(self, length: int) -> Samples:
        """Plain texts of exactly `length` tokens."""
        loaded, options = self.loaded, self.options
        return prepare_samples(loaded, self.documents, length=length, count=options.samples, seed=self.seed)


@dataclass(frozen=True)
class Suite(ABC):
    """One suite on some material."""

    material: Material
    name: ClassVar[str]
    by_length: ClassVar[bool] = True
    """Whether it measures at the lengths asked for, or inside the original window."""
    with_original: ClassVar[bool] = False
    """Whether the original model is measured too, asked for or not."""

    @classmethod
    def needs_text(cls, options: EvalConfig) -> bool:
        """Whether it draws from documents."""
        return True

    @abstractmethod
    def check(self) -> None:
        """Raise LongRopeError for what any part would stumble on, before anything is measured."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What it was told and made from."""

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """Everything to measure."""


def sources_of(samples: Samples) -> dict[str, str]:
    """SHA-256 -> name of the documents that samples were taken from."""
    return {row.document_sha256: row.document for row in samples.origins}
