"""Run an optimiser against an evaluator under a log: the loop that can be stopped at any moment and resumed.

Resuming replays the log: the optimiser is asked the same questions, the logged answers are told, and the first question
without an answer is where work goes on. The end is bit-identical to that of an uninterrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.evaluators import Evaluator
from longrope.search.log import Evaluation, SearchLog
from longrope.search.space import Candidate


class Optimiser(Protocol):
    """Ask/tell over candidates; knows no model."""

    @property
    def done(self) -> bool: ...

    @property
    def best(self) -> tuple[Candidate, float]: ...

    def ask(self) -> list[Candidate]: ...

    def tell(self, losses: Sequence[float]) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress display needs after each evaluation: `best_loss` in nats per token over all told so far."""

    evaluations: int
    best_loss: float
    replayed: bool


def run_search(
    optimiser: Optimiser,
    evaluator: Evaluator,
    log: SearchLog,
    to_window: Callable[[Candidate], Window],
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> int:
    """Ask, evaluate, log and tell until done. Returns the number of evaluations, replayed ones included.

    Raises LongRopeError when the log holds other questions than the optimiser asks.
    """
    replay = list(log.evaluations)
    count, generation, best = 0, 0, math.inf
    while not optimiser.done:
        asked = optimiser.ask()
        known = replay[count : count + len(asked)]
        for candidate, entry in zip(asked, known, strict=False):
            if candidate != entry.candidate:
                raise LongRopeError(
                    f"{log.path}: evaluation {entry.index} is not the one this search would ask; "
                    "the log was edited or made by another version: start anew with another -o"
                )
        losses = [entry.loss for entry in known]
        best = min([best, *filter(math.isfinite, losses)])
        if known:
            on_progress(Progress(count + len(known), best, replayed=True))
        fresh = asked[len(known) :]
        for candidate, loss in zip(fresh, evaluator.evaluate([to_window(c) for c in fresh]), strict=True):
            log.append(Evaluation(count + len(losses), generation, candidate, loss))
            losses.append(loss)
            best = min([best, *filter(math.isfinite, [loss])])
            on_progress(Progress(count + len(losses), best, replayed=False))
        optimiser.tell(losses)
        count += len(asked)
        generation += 1
    if count < len(replay):
        raise LongRopeError(
            f"{log.path} holds {len(replay)} evaluations, this search ends after {count}: "
            "the log was edited or made by another version: start anew with another -o"
        )
    return count
