"""Searches without a model: a cheap loss with a known minimum, and a run that can be stopped after any evaluation.

As a program (`python -m tests.search.targets LOG SECONDS`) it runs the same search slowly, to be killed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from longrope.callbacks import Callbacks, SearchProgress
from longrope.rope.closed_forms import ntk_aware, pi, yarn
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from longrope.search.config import START_TOKENS
from longrope.search.evaluator import EvalRequest, EvalResult, EvaluateEach, LoggedEvaluator
from longrope.search.evolution import Evolution, EvolutionSettings, evolution_search
from longrope.search.log import LogRow, SearchLog
from longrope.search.spaces import Candidate, SearchSpace

GEOMETRY = RopeGeometry(rotary_dim=64, base=10_000.0, original_length=256)
TARGET_LENGTH = 2048
SPACE = SearchSpace.for_ratio(GEOMETRY.pairs, TARGET_LENGTH / GEOMETRY.original_length, START_TOKENS)
SEEDS = [SPACE.snap(form(GEOMETRY, TARGET_LENGTH)) for form in (pi, ntk_aware, yarn)]
OPTIMUM = 1.0 + 8.0 / (1.0 + np.exp((13.0 - np.arange(GEOMETRY.pairs)) / 2.0))
"""A ramp of the shape of published factors, earlier than YaRN's and to more than s = 8: the minimum of `distance`."""

SETTINGS = EvolutionSettings(population=8, mutations=3, crossovers=3, iterations=4, top_k=4, seed=5)
"""A small search: 8 + 4·6 = 32 evaluations."""
HEADER = {"samples_sha256": "ab" * 32, "target_length": TARGET_LENGTH, "settings": {"seed": 5, "population": 8}}


def distance(window: Window) -> float:
    """Mean squared distance of log λ to the optimum."""
    return float(np.mean((np.log(window.factors) - np.log(OPTIMUM)) ** 2))


class FunctionEvaluator:
    """Losses by a function of the window; Ctrl-C instead of the loss after `stop_after` of them."""

    def __init__(self, loss: Callable[[Window], float] = distance, stop_after: int | None = None) -> None:
        self.loss, self.stop_after, self.computed = loss, stop_after, 0

    def __call__(self, requests: Sequence[EvalRequest]) -> Iterator[EvalResult]:
        for request in requests:
            if self.computed == self.stop_after:
                raise KeyboardInterrupt
            self.computed += 1
            yield EvalResult(self.loss(request.window))


class Shown(Callbacks):
    """Keeps the progress of a search."""

    def __init__(self) -> None:
        self.progress: list[SearchProgress] = []

    def on_search_progress(self, progress: SearchProgress) -> None:
        self.progress.append(progress)


def to_window(candidate: Candidate) -> Window:
    return candidate.window(TARGET_LENGTH, 1.0)


def evolve(
    path: Path,
    *,
    resume: bool = False,
    evaluator: EvaluateEach | None = None,
    settings: EvolutionSettings = SETTINGS,
    header: dict[str, object] = HEADER,
    callbacks: Callbacks | None = None,
) -> tuple[Evolution, int]:
    """The small search with its log at `path`: the optimizer at its end, and the evaluations it counted."""
    optimizer = Evolution(SPACE, SEEDS, settings)
    with (SearchLog.resume if resume else SearchLog.create)(path, header) as log:
        evaluate = LoggedEvaluator(evaluator or FunctionEvaluator(), log)
        with evaluate.search(callbacks or Callbacks()) as requests:
            evolution_search(evaluate, optimizer, to_window, on_best=evaluate.report_best)
        evaluate.finish()
    return optimizer, len(requests)


def candidate_of(row: LogRow) -> Candidate:
    """The candidate that a line of the log records."""
    return Candidate(tuple(row.request["steps"]), row.request["start_tokens"])


def log_row(index: int, generation: int, candidate: Candidate, loss: float) -> LogRow:
    """A line of the log for `candidate`."""
    return LogRow(index, generation, candidate.to_row(), loss)


def complete(optimizer: Evolution, loss: Callable[[Candidate], float]) -> list[Candidate]:
    """Run `optimizer` to its end without a log. Every candidate it asked, in order."""
    asked: list[Candidate] = []
    while not optimizer.done:
        generation = optimizer.ask()
        asked += generation
        optimizer.tell([loss(candidate) for candidate in generation])
    return asked


if __name__ == "__main__":
    pause = float(sys.argv[2])

    def slow(window: Window) -> float:
        time.sleep(pause)
        return distance(window)

    evolve(Path(sys.argv[1]), evaluator=FunctionEvaluator(slow))
