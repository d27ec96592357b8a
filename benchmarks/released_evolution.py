"""The evolution of LongRoPE's released code, as a space for `Evolution`: the baseline of `search_cost.py`.

Written anew from what the code does (microsoft/LongRoPE, evolution/algorithms/dim_mono.py and genetic_base.py): one
seed, YaRN; λ ≤ 1 + s; no start tokens; a mutation sweeps over all pairs; a crossover mostly changes one gene. Kinder
than the original: the seed is the true YaRN (theirs blends λ where YaRN blends 1/λ). A crossover's first parent is
either of the two, not always the better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from longrope.search.spaces import STEPS, Candidate

CROSSOVER_TRIES = 20


@dataclass(frozen=True)
class ReleasedSpace:
    """λ in hundredths from 1 to 1 + s, monotone."""

    ratio: float

    @property
    def highest(self) -> int:
        return round((1.0 + self.ratio) * STEPS)

    def snap(self, factors: np.ndarray) -> Candidate:
        steps = np.rint(np.asarray(factors) * STEPS).astype(int).clip(STEPS, self.highest)
        return Candidate(tuple(np.maximum.accumulate(steps).tolist()))

    def mutate(self, parent: Candidate, probability: float, rng: Generator) -> Candidate:
        """With `probability` a sweep: each gene is drawn between the one before, drawn already, and the next one."""
        steps = list(parent.steps)
        while rng.random() >= probability:
            pass  # the released loop draws again until it mutates
        for pair in range(len(steps)):
            low = STEPS if pair == 0 else steps[pair - 1]
            high = self.highest if pair == len(steps) - 1 else steps[pair + 1] - (pair == 0)
            if high >= low:
                steps[pair] = int(rng.integers(low, high + 1))
        return Candidate(tuple(steps))

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
