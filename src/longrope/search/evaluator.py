"""Questions, answers, and who answers: windows in, losses (and gradients) out, in the order asked.

The serial evaluator answers in this process. An optimiser knows none of this; `CandidateSearch` stands between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.objective import SampledObjective

SEARCH, VALIDATION, OTHER = "search", "validation", "other"
"""The splits: texts that are searched on, texts that decide between results, and texts of the other objective."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a model: the loss of `window`, and with `gradient` also its gradient.

    `split` and `samples` choose the texts (all of the split where None). `row` is what the log records: the same
    question has the same row, bit for bit.
    """

    window: Window
    row: dict[str, Any]
    split: str = SEARCH
    samples: tuple[int, ...] | None = None
    gradient: bool = False

    @property
    def key(self) -> tuple[Window, str, tuple[int, ...] | None, bool]:
        """What the answer depends on: questions with the same one are computed once."""
        return self.window, self.split, self.samples, self.gradient


@dataclass(frozen=True, slots=True)
class Answer:
    """The mean loss in nats per token, and for a gradient question d loss/d(λ_0 … λ_{D−1}, m)."""

    loss: float
    gradient: tuple[float, ...] | None = field(default=None)


class Evaluator(Protocol):
    """A source of answers. `evaluate` yields one per question, in order, each as soon as it is known."""

    def evaluate(self, questions: Sequence[Question]) -> Iterator[Answer]: ...


class SerialEvaluator:
    """One question after the other, in this process.

    `objectives` maps (split, window length) to what answers.
    """

    def __init__(self, objectives: Mapping[tuple[str, int], SampledObjective]) -> None:
        self.objectives = objectives

    def evaluate(self, questions: Sequence[Question]) -> Iterator[Answer]:
        for question in questions:
            objective = self._objective(question)
            if question.gradient:
                yield Answer(*objective.loss_and_gradient(question.window, question.samples))
            else:
                yield Answer(objective.loss(question.window, question.samples))

    def token_passes(self, question: Question) -> int:
        """Tokens that answering `question` sends through the model: a forward counts 1 per token, a backward 2."""
        objective = self._objective(question)
        rows = objective.count if question.samples is None else len(question.samples)
        return rows * objective.length * (3 if question.gradient else 1)

    def _objective(self, question: Question) -> SampledObjective:
        return self.objectives[question.split, question.window.max_length]


class Genome(Protocol):
    """A point of a search space: hashable, and a row of a log."""

    def to_row(self) -> dict[str, Any]: ...


_G = TypeVar("_G", bound=Genome)


class Optimiser(Protocol[_G]):
    """Ask/tell over plain vectors; knows no model."""

    @property
    def done(self) -> bool: ...

    @property
    def incumbent(self) -> tuple[_G, float] | None:
        """The best so far and its loss."""

    def ask(self) -> list[_G]: ...

    def tell(self, losses: Sequence[float]) -> None: ...


class CandidateSearch(Generic[_G]):
    """An ask/tell optimiser as a search: its candidates become windows, the answers' losses are told."""

    def __init__(self, optimiser: Optimiser[_G], to_window: Callable[[_G], Window]) -> None:
        self.optimiser, self.to_window = optimiser, to_window

    @property
    def done(self) -> bool:
        return self.optimiser.done

    def ask(self) -> list[Question]:
        return [Question(self.to_window(candidate), candidate.to_row()) for candidate in self.optimiser.ask()]

    def tell(self, answers: Sequence[Answer]) -> None:
        self.optimiser.tell([answer.loss for answer in answers])

    @property
    def incumbent(self) -> tuple[Window, float] | None:
        """The best window told so far and its loss on the search samples."""
        found = self.optimiser.incumbent
        return None if found is None else (self.to_window(found[0]), found[1])

    @property
    def best_candidate(self) -> tuple[_G, float]:
        """The best candidate and its loss on the search samples. Raises LongRopeError when no loss was finite."""
        found = self.optimiser.incumbent
        if found is None:
            raise LongRopeError(
                "no candidate had a finite loss: the model does not work at this length with any factors tried"
            )
        return found

    @property
    def best(self) -> tuple[Window, float]:
        """The best window and its loss on the search samples. Raises LongRopeError when no loss was finite."""
        candidate, loss = self.best_candidate
        return self.to_window(candidate), loss
