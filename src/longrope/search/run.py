"""Run a search under a log: the loop that can be stopped at any moment and resumed.

Resuming replays the log: the search asks the same questions, the logged answers are told, and the first question
without an answer is where work goes on. The end is bit-identical to that of an uninterrupted run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.evaluators import Answer, Evaluator, Question
from longrope.search.log import Evaluation, SearchLog


class Search(Protocol):
    """Asks questions until it is done. What it asks depends on its seed and the answers alone."""

    @property
    def done(self) -> bool: ...

    @property
    def best(self) -> tuple[Window, float]:
        """The best window and its loss."""

    def ask(self) -> list[Question]: ...

    def tell(self, answers: Sequence[Answer]) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress display needs after each evaluation: `best_loss` in nats per token over all told so far."""

    evaluations: int
    best_loss: float
    replayed: bool


def run_search(
    search: Search, evaluator: Evaluator, log: SearchLog, on_progress: Callable[[Progress], None] = lambda _: None
) -> list[Question]:
    """Ask, evaluate, log and tell until done. Returns the questions asked, replayed ones included.

    Raises LongRopeError when the log holds other questions than the search asks.
    """
    replay = list(log.evaluations)
    questions: list[Question] = []
    generation, best = 0, math.inf
    while not search.done:
        asked = search.ask()
        known = replay[len(questions) : len(questions) + len(asked)]
        for question, entry in zip(asked, known, strict=False):
            if json.loads(json.dumps(question.row)) != entry.row:
                raise LongRopeError(
                    f"{log.path}: evaluation {entry.index} is not the one this search would ask; "
                    "the log was edited or made by another version: start anew with another -o"
                )
        answers = [entry.answer for entry in known]
        best = min([best, *_finite(answers)])
        if known:
            on_progress(Progress(len(questions) + len(known), best, replayed=True))
        fresh = asked[len(known) :]
        for question, answer in zip(fresh, evaluator.evaluate(fresh), strict=True):
            log.append(Evaluation(len(questions) + len(answers), generation, question.row, answer))
            answers.append(answer)
            best = min([best, *_finite([answer])])
            on_progress(Progress(len(questions) + len(answers), best, replayed=False))
        search.tell(answers)
        questions += asked
        generation += 1
    if len(questions) < len(replay):
        raise LongRopeError(
            f"{log.path} holds {len(replay)} evaluations, this search ends after {len(questions)}: "
            "the log was edited or made by another version: start anew with another -o"
        )
    return questions


def _finite(answers: Sequence[Answer]) -> list[float]:
    return [answer.loss for answer in answers if math.isfinite(answer.loss)]
