"""Searches without a model: a cheap loss with a known minimum, and a run that can be stopped after any evaluation.

As a program (`python -m tests.search.targets LOG SECONDS`) it runs the same search slowly, to be killed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from longrope.rope.closed_forms import ntk_aware, pi, yarn
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from longrope.search.evaluator import Answer, CandidateSearch, Question
from longrope.search.evolution import Evolution, EvolutionSettings
from longrope.search.log import Evaluation, SearchLog
from longrope.search.loop import Conversation, Progress, run_search
from longrope.search.spaces import START_TOKENS, Candidate, SearchSpace

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
        self.loss, self.stop_after, self.asked = loss, stop_after, 0

    def evaluate(self, questions: Sequence[Question]) -> Iterator[Answer]:
        for question in questions:
            if self.asked == self.stop_after:
                raise KeyboardInterrupt
            self.asked += 1
            yield Answer(self.loss(question.window))


def to_window(candidate: Candidate) -> Window:
    return candidate.window(TARGET_LENGTH, 1.0)


def evolve(
    path: Path,
    *,
    resume: bool = False,
    evaluator: FunctionEvaluator | None = None,
    settings: EvolutionSettings = SETTINGS,
    header: dict[str, object] = HEADER,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[Evolution, int]:
    """The small search with its log at `path`: the optimiser at its end, and the evaluations it counted."""
    optimiser = Evolution(SPACE, SEEDS, settings)
    with (SearchLog.resume if resume else SearchLog.create)(path, header) as log:
        search = CandidateSearch(optimiser, to_window)
        conversation = Conversation(evaluator or FunctionEvaluator(), log)
        questions = run_search(search, conversation, on_progress)
        conversation.finish()
    return optimiser, len(questions)


def candidate_of(row: Evaluation) -> Candidate:
    """The candidate that a line of the log records."""
    return Candidate(tuple(row.row["steps"]), row.row["start_tokens"])


def evaluation(index: int, generation: int, candidate: Candidate, loss: float) -> Evaluation:
    """A line of the log for `candidate`."""
    return Evaluation(index, generation, candidate.to_row(), Answer(loss))


def complete(optimiser: Evolution, loss: Callable[[Candidate], float]) -> list[Candidate]:
    """Run `optimiser` to its end without a log. Every candidate it asked, in order."""
    asked: list[Candidate] = []
    while not optimiser.done:
        generation = optimiser.ask()
        asked += generation
        optimiser.tell([loss(candidate) for candidate in generation])
    return asked


if __name__ == "__main__":
    pause = float(sys.argv[2])

    def slow(window: Window) -> float:
        time.sleep(pause)
        return distance(window)

    evolve(Path(sys.argv[1]), evaluator=FunctionEvaluator(slow))
