"""A search written as a dialogue: a generator that yields questions and receives their answers. Knows no model.

What a search does next often depends on the last answer; written as one generator it reads from top to bottom, and
`ask`, `tell` and `done` follow from it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.evaluator import SEARCH, VALIDATION, Answer, Question
from longrope.search.knots import LARGEST, Vector, admissible

_T = TypeVar("_T")
Dialogue = Generator[list[Question], list[Answer], _T]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a search keeps to: λ ≤ `largest`, and `start_tokens`, the choices of n̂.

    n̂ is discrete: the search runs with the first choice, and where there are others its result is tried with each.
    """

    largest: float = LARGEST
    start_tokens: tuple[int, ...] = (0,)

    def window(self, length: int, factors: Vector, attention_factor: float) -> Window:
        """`factors` (D,) and the first n̂ as a window."""
        return Window(length, tuple(factors.tolist()), self.start_tokens[0], attention_factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One window of a search: its length, named seeds of D factors each, and how many search samples there are."""

    length: int
    seeds: Mapping[str, Vector]
    samples: int


class DialogueSearch(ABC):
    """Asks what its dialogue yields. The dialogue returns the best window and its loss on all search samples."""

    def __init__(self) -> None:
        self.incumbent: tuple[Window, float] | None = None
        self.chosen_seeds: list[str] = []
        self._best: tuple[Window, float] | None = None
        self._dialogue = self._run()
        self._questions = next(self._dialogue)

    @abstractmethod
    def _run(self) -> Dialogue[tuple[Window, float]]:
        """The whole search."""

    @property
    def done(self) -> bool:
        return not self._questions

    @property
    def best(self) -> tuple[Window, float]:
        """The result and its loss on all search samples.

        Raises LongRopeError when that loss is not finite, or the search is not done.
        """
        if self._best is None:
            raise LongRopeError("the search is not done: it has no validated result yet")
        if not math.isfinite(self._best[1]):
            raise LongRopeError("no factors had a finite loss: the model does not work at this length with any tried")
        return self._best

    def ask(self) -> list[Question]:
        return list(self._questions)

    def tell(self, answers: Sequence[Answer]) -> None:
        if len(answers) != len(self._questions):
            raise ValueError(f"expected answers to {len(self._questions)} questions, found {len(answers)}")
        try:
            self._questions = self._dialogue.send(list(answers))
        except StopIteration as end:
            self._questions, self._best = [], end.value


def race(
    stage: Stage, seeds: Mapping[str, Vector], attention_factor: float, samples: int, bounds: Bounds
) -> Dialogue[str]:
    """The name of the seed with the lowest loss, made `admissible`, on the first few search samples.

    Of equal losses the first wins; a loss that is no number comes last.
    """
    shared = tuple(range(min(samples, stage.samples)))
    questions = []
    for factors in seeds.values():
        window = bounds.window(stage.length, admissible(factors, bounds.largest), attention_factor)
        questions.append(loss_of(window, SEARCH, shared))
    answers = yield questions
    return min(zip(seeds, answers, strict=True), key=lambda entry: rank(entry[1].loss))[0]


def best_start_tokens(
    window: Window, choices: Sequence[int], asked: Callable[[Window], list[Question]]
) -> Dialogue[tuple[Window, float]]:
    """The window with the n̂ of `choices` that has the lowest `joint` loss on what is `asked`, of equals the first, and
    that loss."""
    windows = [replace(window, start_tokens=count) for count in choices]
    questions = [asked(tried) for tried in windows]
    answers = iter((yield [question for each in questions for question in each]))
    losses = [joint(list(islice(answers, len(each)))) for each in questions]
    best = losses.index(min(losses))
    return windows[best], losses[best]


def both_splits(window: Window) -> list[Question]:
    """What `joint` takes the answers of."""
    return [loss_of(window, VALIDATION), loss_of(window, SEARCH)]


def joint(answers: Sequence[Answer]) -> float:
    """The mean of the losses on the validation and the search samples, for comparisons.

    A few texts cannot tell results that lie thousandths of a nat apart: of one that has gained more on the search
    samples than it loses on those it never saw, both together say that it is better.
    """
    return math.fsum(rank(answer.loss) for answer in answers) / len(answers)


def loss_of(window: Window, split: str, samples: tuple[int, ...] | None = None) -> Question:
    return Question(window, _row(window, split, samples), split, samples)


def gradient_of(window: Window, sample: int) -> Question:
    return Question(window, _row(window, SEARCH, (sample,)), SEARCH, (sample,), gradient=True)


def rank(loss: float) -> float:
    """`loss` for comparisons: what is no number is worse than every number."""
    return loss if math.isfinite(loss) else math.inf


def _row(window: Window, split: str, samples: tuple[int, ...] | None) -> dict[str, object]:
    return {
        **({"start_tokens": window.start_tokens} if window.start_tokens else {}),
        "length": window.max_length,
        "factors": list(window.factors),
        "attention_factor": window.attention_factor,
        "split": split,
        "samples": None if samples is None else list(samples),
    }
