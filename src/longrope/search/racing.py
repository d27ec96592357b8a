"""Racing: candidates are scored sample by sample, and dropped as soon as they cannot be expected in the top k.

All candidates share their samples, so a candidate is compared with the k-th best one on the very samples that both were
scored on: paired differences vary far less than losses. Algorithm 1 scores every candidate on every sample; it runs
unchanged on top of this, and is told that a dropped candidate is infinitely bad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from longrope.rope.scaling import Window
from longrope.search.evaluator import SEARCH, Answer, CandidateSearch, Genome, Optimiser, Question
from longrope.search.knots import Vector

_G = TypeVar("_G", bound=Genome)

DEVIATIONS = 2.0
"""How far behind the k-th best, in standard deviations, a candidate is dropped: by chance, 1 in 44 of its equals."""


class RacedSearch(CandidateSearch[_G]):
    """`CandidateSearch` with a paired test after every sample.

    `tokens`: how many tokens of each sample are scored, which weighs it. `keep`: k. Until k candidates are known on all
    samples, none is dropped.
    """

    def __init__(
        self, optimiser: Optimiser[_G], to_window: Callable[[_G], Window], tokens: Sequence[int], keep: int
    ) -> None:
        super().__init__(optimiser, to_window)
        self._weights: Vector = np.asarray(tokens, dtype=np.float64) / sum(tokens)
        self._keep, self._known = keep, max(2, keep)  # a spread needs two
        self._elite: list[Vector] = []  # the losses (samples,) of the best candidates known, best first
        self._generation: list[_G] = []
        self._losses: list[list[float]] = []  # of every candidate of the generation, so far
        self._racing: list[int] = []  # those not dropped

    def ask(self) -> list[Question]:
        if not self._racing:
            self._generation = self.optimiser.ask()
            self._losses = [[] for _ in self._generation]
            self._racing = list(range(len(self._generation)))
        return [self._question(self._generation[place], len(self._losses[place])) for place in self._racing]

    def tell(self, answers: Sequence[Answer]) -> None:
        if len(answers) != len(self._racing):
            raise ValueError(f"expected {len(self._racing)} answers, found {len(answers)}")
        for place, answer in zip(self._racing, answers, strict=True):
            self._losses[place].append(answer.loss)
        scored = len(self._losses[self._racing[0]]) if self._racing else len(self._weights)
        if scored < len(self._weights):
            if len(self._elite) == self._known:
                limit = self._limit(scored)
                self._racing = [place for place in self._racing if self._behind(place, scored) <= limit]
            if self._racing:
                return
        whole = [np.asarray(losses) for losses in self._losses if len(losses) == len(self._weights)]
        self._elite = sorted([*self._elite, *filter(_finite, whole)], key=self._mean)[: self._known]
        complete = set(self._racing)
        self._racing = []
        self.optimiser.tell(
            [
                self._mean(np.asarray(losses)) if place in complete else math.inf
                for place, losses in enumerate(self._losses)
            ]
        )

    def _question(self, candidate: _G, sample: int) -> Question:
        return Question(self.to_window(candidate), candidate.to_row() | {"samples": [sample]}, SEARCH, (sample,))

    def _mean(self, losses: Vector) -> float:
        """The loss over all samples: Σ NLL / Σ tokens."""
        return float(losses @ self._weights)

    def _behind(self, place: int, scored: int) -> float:
        """How far a candidate lies behind the k-th best on the samples it was scored on."""
        differences = np.asarray(self._losses[place]) - self._elite[self._keep - 1][:scored]
        behind = float(differences @ self._weights[:scored] / self._weights[:scored].sum())
        return behind if math.isfinite(behind) else math.inf

    def _limit(self, scored: int) -> float:
        """The most that a candidate may lie behind after `scored` samples.

        The spread of paired differences is that of the best against the k-th; the samples that are left to score decide
        how far the mean over all of them can still move (finite population correction).
        """
        samples, last = len(self._weights), self._keep - 1
        differences = np.stack(self._elite[:last] + self._elite[last + 1 :]) - self._elite[last]
        within = differences - differences.mean(axis=1, keepdims=True)
        deviation = math.sqrt(float((within**2).sum()) / (len(within) * (samples - 1)))
        return DEVIATIONS * deviation * math.sqrt(1.0 / scored - 1.0 / samples)


def _finite(losses: Vector) -> bool:
    return bool(np.isfinite(losses).all())
