"""The space of LongRoPE2's search (2502.20082, Algorithms 1 and 2): a real critical dimension, and factors beyond it.

A candidate has d_rcd as a gene. From pair d_rcd on, λ is searched in [s, 2s], monotone, in hundredths; below it λ is
NTK with the base implied at d_rcd: λ_i = λ_{d_rcd}^(i/d_rcd). `Evolution` runs on it as on LongRoPE's space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.space import STEPS, redraw


@dataclass(frozen=True, slots=True)
class CriticalCandidate:
    """λ_i = steps[i − critical_dim]/100 from pair `critical_dim` (d_rcd) on, NTK below it."""

    critical_dim: int
    steps: tuple[int, ...]

    @property
    def factors(self) -> tuple[float, ...]:
        at_critical = self.steps[0] / STEPS
        below = tuple(at_critical ** (pair / self.critical_dim) for pair in range(self.critical_dim))
        return below + tuple(step / STEPS for step in self.steps)

    def window(self, max_length: int, attention_factor: float) -> Window:
        return Window(max_length, self.factors, 0, attention_factor)

    def to_row(self) -> dict[str, Any]:
        """The candidate as the log records it."""
        return {"critical_dim": self.critical_dim, "steps": list(self.steps)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalSpace:
    """d_rcd ∈ [first, last] = [d_tcd(10), d_tcd], λ_i ∈ [s, 2s] for i ≥ d_rcd, over `pairs` pairs.

    Raises LongRopeError for an empty space.
    """

    pairs: int
    ratio: float
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last < self.pairs or not 1.0 < self.ratio < np.inf:
            raise LongRopeError(
                "LongRoPE2 needs an extension ratio above 1 and critical dimensions among the pairs; found ratio "
                f"{self.ratio:g} and dimensions {self.first} to {self.last} of {self.pairs} pairs"
            )

    @property
    def bounds(self) -> tuple[int, int]:
        """[s, 2s] in steps, inside the interval."""
        return int(np.ceil(self.ratio * STEPS - 1e-9)), int(np.floor(2 * self.ratio * STEPS + 1e-9))

    def initial(self, count: int, rng: Generator) -> list[CriticalCandidate]:
        """Algorithm 1: for each d_rcd in turn, one s' ~ U[s, 2s] for all pairs from d_rcd on; different candidates.

        A `count` below the number of d_rcd takes some, evenly spaced from the first to the last.
        """
        dims = np.unique(np.linspace(self.first, self.last, count).round().astype(int)).tolist()
        low, high = self.bounds
        drawn: dict[CriticalCandidate, None] = {}
        for index in range(50 * count):
            dim = dims[index % len(dims)]
            drawn[CriticalCandidate(dim, (int(rng.integers(low, high + 1)),) * (self.pairs - dim))] = None
            if len(drawn) == count:
                break
        return list(drawn)

    def mutate(self, parent: CriticalCandidate, probability: float, rng: Generator) -> CriticalCandidate:
        """Algorithm 2: each λ_i, i ≥ d_rcd, redrawn with `probability` inside [s, 2s], monotone; d_rcd stays."""
        steps = redraw(np.array(parent.steps, dtype=np.int64), *self.bounds, probability, rng)
        return CriticalCandidate(parent.critical_dim, tuple(steps.tolist()))

    def cross(self, first: CriticalCandidate, second: CriticalCandidate, rng: Generator) -> CriticalCandidate:
        """d_rcd of either parent; from there on every gene of either, sorted. A parent whose own d_rcd lies higher
        gives, for the pairs below it, its gene at d_rcd."""
        dim = first.critical_dim if rng.random() < 0.5 else second.critical_dim
        pick = rng.random(self.pairs - dim) < 0.5
        steps = np.sort(np.where(pick, _from(first, dim), _from(second, dim)))
        return CriticalCandidate(dim, tuple(steps.tolist()))


def _from(candidate: CriticalCandidate, dim: int) -> list[int]:
    """The genes of pairs `dim` … of a candidate whose own begin elsewhere."""
    missing = max(0, candidate.critical_dim - dim)
    return [candidate.steps[0]] * missing + list(candidate.steps[max(0, dim - candidate.critical_dim) :])
