"""Run a search under a log: the loop that can be stopped at any moment and resumed.

Resuming replays the log: the search asks the same questions, the logged answers are told, and the first question
without an answer is where work goes on. The end is bit-identical to that of an uninterrupted run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.evaluator import VALIDATION, Answer, Evaluator, Question
from longrope.search.log import Evaluation, SearchLog


class Search(Protocol):
    """Asks questions until it is done. What it asks depends on its seed and the answers alone."""

    @property
    def done(self) -> bool: ...

    @property
    def incumbent(self) -> tuple[Window, float] | None:
        """The best window so far and the loss it was chosen by; None where there is none yet."""

    @property
    def best(self) -> tuple[Window, float]:
        """The best window and its loss on the search samples."""

    def ask(self) -> list[Question]: ...

    def tell(self, answers: Sequence[Answer]) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress display needs after each evaluation.

    `best_loss`: the loss, in nats per token, that the best window so far was chosen by; infinity before there is one.
    """

    evaluations: int
    best_loss: float
    replayed: bool


class Conversation:
    """Questions and answers under a log: what the log knows is replayed, the rest is asked and logged.

    What was answered before is not computed again: closed forms coincide, and a search asks about its result twice.
    """

    def __init__(self, evaluator: Evaluator, log: SearchLog) -> None:
        self._evaluator, self._log = evaluator, log
        self._replay = list(log.evaluations)
        self._count = 0  # questions answered so far
        self._generation = 0
        self._answered: dict[Hashable, Answer] = {}

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[Answer, bool]]:
        """The answers in order, each as soon as it is known, and whether it came from the log.

        Raises LongRopeError when the log holds another question here.
        """
        known = self._replay[self._count : self._count + len(questions)]
        for question, entry in zip(questions, known, strict=False):
            if json.loads(json.dumps(question.row)) != entry.row:
                raise LongRopeError(
                    f"{self._log.path}: evaluation {entry.index} is not the one this search would ask; "
                    "the log was edited or made by another version: start anew with another -o"
                )
        for question, entry in zip(questions, known, strict=False):
            self._count += 1
            self._answered[question.key] = entry.answer
            yield entry.answer, True
        fresh = questions[len(known) :]
        new: dict[Hashable, Question] = {}
        for question in fresh:
            if question.key not in self._answered:
                new.setdefault(question.key, question)
        computed = zip(new, self._evaluator.evaluate(list(new.values())), strict=True)
        for question in fresh:
            if question.key not in self._answered:
                self._answered.update([next(computed)])
            answer = self._answered[question.key]
            self._log.append(Evaluation(self._count, self._generation, question.row, answer))
            self._count += 1
            yield answer, False
        next(computed, None)  # an evaluator that has more to say was asked something else
        self._generation += 1

    def finish(self) -> None:
        """Raise LongRopeError when the log knows more than was asked."""
        if self._count < len(self._replay):
            raise LongRopeError(
                f"{self._log.path} holds {len(self._replay)} evaluations, this search ends after {self._count}: "
                "the log was edited or made by another version: start anew with another -o"
            )


def run_search(
    search: Search, conversation: Conversation, on_progress: Callable[[Progress], None] = lambda _: None
) -> list[Question]:
    """Ask and tell until done. Returns the questions asked, replayed ones included; `distinct` ones were computed.

    Raises LongRopeError when the log holds other questions than the search asks.
    """
    questions: list[Question] = []
    best, validates = math.inf, False
    while not search.done:
        asked = search.ask()
        answers = []
        for question, (answer, replayed) in zip(asked, conversation.answers(asked), strict=True):
            answers.append(answer)
            # A search knows its best only when it is told, and a generation can take hours; but a search that
            # validates does not choose by the losses on its search samples.
            validates = validates or question.split == VALIDATION
            if question.samples is None and not validates and math.isfinite(answer.loss):
                best = min(best, answer.loss)
            on_progress(Progress(len(questions) + len(answers), best, replayed))
        search.tell(answers)
        if search.incumbent is not None:
            best = search.incumbent[1]
        questions += asked
    return questions


def distinct(questions: Sequence[Question], known: set[Hashable] | None = None) -> list[Question]:
    """Those that neither a question before them nor one of `known` asked: what one conversation computes.

    `known` holds keys of earlier questions, and gets those of these.
    """
    known = set() if known is None else known
    new = []
    for question in questions:
        if question.key not in known:
            known.add(question.key)
            new.append(question)
    return new
