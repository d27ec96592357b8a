"""The evolution of LongRoPE's released code, as a space for `Evolution`: the baseline of `search_cost.py`.

Written anew from what the code does (microsoft/LongRoPE, evolution/algorithms/dim_mono.py and genetic_base.py): one
seed, YaRN; λ ≤ 1 + s; no start tokens; a crossover mostly changes one gene. Its mutation is one of two: as first
released in April 2024, a sweep that draws every pair anew; in the main branch since June 2024, each pair with p = 0.3.
Kinder than the original: the seed is the true YaRN (theirs blends λ where YaRN blends 1/λ). A crossover's first parent
is either of the two, not always the better.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from longrope.search.spaces import STEPS, Candidate

CROSSOVER_TRIES = 20


@dataclass(frozen=True)
class ReleasedSpace:
    """λ in hundredths from 1 to 1 + s, monotone. `sweep`: the mutation of April 2024, else that of the main branch."""

    ratio: float
    sweep: bool = True

    @property
    def highest(self) -> int:
        return round((1.0 + self.ratio) * STEPS)

    def snap(self, factors: np.ndarray) -> Candidate:
        steps = np.rint(np.asarray(factors) * STEPS).astype(int).clip(STEPS, self.highest)
        return Candidate(tuple(np.maximum.accumulate(steps).tolist()))

    def mutate(self, parent: Candidate, probability: float, rng: Generator) -> Candidate:
        """Genes drawn between the one before, drawn already, and the next one: all, or each with `probability`.

        The released loops draw again until something changes.
        """
        steps = list(parent.steps)
        if self.sweep:
            while rng.random() >= probability:
                pass
            self._redraw(steps, range(len(steps)), rng)
            return Candidate(tuple(steps))
        while tuple(steps) == parent.steps:
            self._redraw(steps, (pair for pair in range(len(steps)) if rng.random() < probability), rng)
        return Candidate(tuple(steps))

    def _redraw(self, steps: list[int], pairs: Iterable[int], rng: Generator) -> None:
        for pair in pairs:
            low = STEPS if pair == 0 else steps[pair - 1]
            high = self.highest if pair == len(steps) - 1 else steps[pair + 1] - (pair == 0)
            if high >= low:
                steps[pair] = int(rng.integers(low, high + 1))

    def cross(self, first: Candidate, second: Candidate, rng: Generator) -> Candidate:
        """The first parent with genes of the second, one after the other, up to the first monotone change."""
        steps = list(first.steps)
        for _ in range(CROSSOVER_TRIES):
            for pair in range(len(steps)):
                if rng.random() < 0.3:
                    if rng.random() < 0.5:
                        steps[pair] = second.steps[pair]
                    if tuple(steps) != first.steps and (np.diff(steps) >= 0).all():
                        return Candidate(tuple(steps))
        return self.mutate(first, 0.3, rng)
