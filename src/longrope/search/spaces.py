"""The two spaces that `Evolution` searches: candidates, mutations and crossovers. Knows no model and no loss.

- `SearchSpace` (LongRoPE, 2402.13753, Table 4): rescale factors λ in [1, 1.25·s], monotone, and start tokens n̂.
- `CriticalSpace` (LongRoPE2, 2502.20082, Algorithms 1 and 2): the real critical dimension d_rcd is a gene. From pair
  d_rcd on, λ is searched in [s, 2s], monotone. Below it, λ follows a rule: `ntk` with the base implied at d_rcd,
  λ_i = λ_{d_rcd}^(i/d_rcd), is the paper's; `yarn` goes linearly in 1/λ from the pair where YaRN's ramp begins to
  d_rcd; `ramp` does so from a pair that is searched too.

Where a model was trained under factors λ_trained, candidates are multiples μ of those: `methods.py` multiplies them (λ
= λ_trained ∘ μ), and the spaces know nothing of it.

Factors are whole numbers of hundredths here, so that two candidates are equal exactly when their windows are, a hash is
exact, and a log replays bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.config import Below

Steps = npt.NDArray[np.int64]
TAIL_STEPS = 10
"""The rise of the tails of the first population from pair to pair: 0.1, as in the authors' later code."""

STEPS = 100  # grid steps per unit of λ
UPPER_RATIO = 1.25  # λ ≤ 1.25·s


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point of `SearchSpace`: λ_i = steps[i]/100, and n̂."""

    steps: tuple[int, ...]
    start_tokens: int = 0

    @property
    def factors(self) -> tuple[float, ...]:
        return tuple(step / STEPS for step in self.steps)

    def to_row(self) -> dict[str, Any]:
        """The candidate as the log records it."""
        return {"steps": list(self.steps), "start_tokens": self.start_tokens}

    def window(self, max_length: int, attention_factor: float) -> Window:
        return Window(max_length, self.factors, self.start_tokens, attention_factor)


def redraw(steps: Steps, lowest: int, highest: int, probability: float, rng: Generator) -> Steps:
    """`steps` (n,), non-decreasing in [lowest, highest], each gene redrawn with `probability`; still non-decreasing.

    A run of neighbouring genes that are redrawn together gets sorted uniform draws between the nearest genes that stay:
    but for ties a uniform draw from the monotone vectors that agree with the parent elsewhere.
    """
    redrawn = rng.random(len(steps)) < probability
    steps = steps.copy()
    at = 0
    while at < len(steps):
        if not redrawn[at]:
            at += 1
            continue
        end = at
        while end < len(steps) and redrawn[end]:
            end += 1
        low = steps[at - 1] if at > 0 else lowest
        high = steps[end] if end < len(steps) else highest
        steps[at:end] = np.sort(rng.integers(low, high + 1, end - at))
        at = end
    return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """λ_i ∈ [1, upper] with λ_i ≤ λ_{i+1} for `pairs` pairs, and n̂ from `start_tokens`.

    Raises LongRopeError for an empty space.
    """

    pairs: int
    upper: float
    start_tokens: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.pairs < 1 or not 1.0 <= self.upper < np.inf or not self.start_tokens:
            raise LongRopeError(
                "a search space needs at least one pair, a finite upper bound from 1 and a choice of start tokens; "
                f"found {self.pairs}, {self.upper} and {self.start_tokens}",
                code="invalid-setting",
            )

    @classmethod
    def for_ratio(cls, pairs: int, ratio: float, start_tokens: tuple[int, ...] = (0,)) -> SearchSpace:
        """Table 4's bounds for an extension by `ratio` = s."""
        return cls(pairs=pairs, upper=UPPER_RATIO * ratio, start_tokens=start_tokens)

    @property
    def upper_steps(self) -> int:
        return int(np.floor(self.upper * STEPS + 1e-9))

    def snap(self, factors: Sequence[float] | np.ndarray, start_tokens: int | None = None) -> Candidate:
        """The nearest candidate to monotone `factors` (pairs,): rounded to the grid, inside the bounds.

        Where they are not monotone, a factor below its predecessor is raised to it.
        """
        steps = np.rint(np.asarray(factors, dtype=np.float64) * STEPS).clip(STEPS, self.upper_steps)
        steps = np.maximum.accumulate(steps).astype(np.int64)
        n_hat = self.start_tokens[0] if start_tokens is None else start_tokens
        return Candidate(tuple(steps.tolist()), n_hat)

    def mutate(self, parent: Candidate, probability: float, rng: Generator) -> Candidate:
        """Redraw each gene with `probability`, as `redraw` does, and n̂ where there is a choice."""
        steps = redraw(np.array(parent.steps, dtype=np.int64), STEPS, self.upper_steps, probability, rng)
        n_hat = parent.start_tokens
        if len(self.start_tokens) > 1 and rng.random() < probability:
            n_hat = int(rng.choice(self.start_tokens))
        return Candidate(tuple(steps.tolist()), n_hat)

    def cross(self, first: Candidate, second: Candidate, rng: Generator) -> Candidate:
        """Uniform crossover: every gene from either parent with equal chance; sorting restores the monotone order."""
        pick = rng.random(self.pairs) < 0.5
        steps = np.sort(np.where(pick, first.steps, second.steps))
        n_hat = first.start_tokens if rng.random() < 0.5 else second.start_tokens
        return Candidate(tuple(steps.tolist()), n_hat)


@dataclass(frozen=True, slots=True)
class CriticalCandidate:
    """A point of `CriticalSpace`: λ_i = steps[i − critical_dim]/100 from pair `critical_dim` (d_rcd) on.

    Below it NTK; or, with `low`, 1/λ goes linearly in i from 1 at pair `low` down to 1/λ_{d_rcd} at d_rcd.
    """

    critical_dim: int
    steps: tuple[int, ...]
    low: int | None = None

    @property
    def factors(self) -> tuple[float, ...]:
        at_critical = self.steps[0] / STEPS
        if self.low is None:
            below = tuple(at_critical ** (pair / self.critical_dim) for pair in range(self.critical_dim))
        else:
            width = self.critical_dim - self.low
            shares = (max(pair - self.low, 0) / width for pair in range(self.critical_dim))
            below = tuple(1.0 / (share / at_critical + (1.0 - share)) for share in shares)
        return below + tuple(step / STEPS for step in self.steps)

    def window(self, max_length: int, attention_factor: float) -> Window:
        return Window(max_length, self.factors, 0, attention_factor)

    def to_row(self) -> dict[str, Any]:
        """The candidate as the log records it."""
        low = {} if self.low is None else {"low": self.low}
        return {"critical_dim": self.critical_dim, **low, "steps": list(self.steps)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalSpace:
    """d_rcd ∈ [first, last] = [d_tcd(10), d_tcd], λ_i ∈ [s, 2s] for i ≥ d_rcd, over `pairs` pairs.

    `below` is the rule below d_rcd, and `low` the pair at which YaRN's ramp begins: that of the rule `yarn`, and one of
    those that the first population of the rule `ramp` has.

    Raises LongRopeError for an empty space.
    """

    pairs: int
    ratio: float
    first: int
    last: int
    below: Below = "ntk"
    low: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last < self.pairs or not 1.0 < self.ratio < np.inf:
            raise LongRopeError(
                "LongRoPE2 needs an extension ratio above 1 and critical dimensions among the pairs; found ratio "
                f"{self.ratio:g} and dimensions {self.first} to {self.last} of {self.pairs} pairs",
                code="invalid-setting",
            )

    @property
    def bounds(self) -> tuple[int, int]:
        """[s, 2s] in steps, inside the interval."""
        return int(np.ceil(self.ratio * STEPS - 1e-9)), int(np.floor(2 * self.ratio * STEPS + 1e-9))

    def initial(self, count: int, probability: float, rng: Generator) -> list[CriticalCandidate]:
        """P₀: at most `count` different candidates, each kind for every d_rcd in turn.

        First the corner s' = s of Algorithm 1, with the rule `ramp` three times: with ramps that begin at YaRN's pair,
        right before d_rcd (λ = 1 below it) and half way. Then, taking turns, tails that rise by 0.1 a pair from an
        s' ~ U[s, 2s] up to 2s (the authors' later code), and what Algorithm 1 does until P₀ is full: one s' ~ U[s, 2s]
        for all pairs from d_rcd on, mutated with `probability`. Their ramps begin anywhere.

        A `count` below the number of d_rcd takes some, evenly spaced from the first to the last.
        """
        dims = np.unique(np.linspace(self.first, self.last, count).round().astype(int)).tolist()
        low, high = self.bounds
        drawn: dict[CriticalCandidate, None] = {}
        for place in range(3 if self.below == "ramp" else 1):
            for dim in dims:
                start = self._start(dim)
                begin = (start, dim - 1, (start + dim - 1) // 2)[place]
                drawn[self._candidate(dim, [low] * (self.pairs - dim), begin)] = None
        for index in range(50 * count):
            if len(drawn) >= count:
                break
            dim = dims[index // 2 % len(dims)]
            level, begin = int(rng.integers(low, high + 1)), self._any_low(dim, rng)
            if index % 2:
                sampled = self._candidate(dim, [level] * (self.pairs - dim), begin)
                drawn[self.mutate(sampled, probability, rng)] = None
            else:
                tail = np.minimum(level + TAIL_STEPS * np.arange(self.pairs - dim), high)
                drawn[self._candidate(dim, tail.tolist(), begin)] = None
        return list(drawn)[:count]

    def mutate(self, parent: CriticalCandidate, probability: float, rng: Generator) -> CriticalCandidate:
        """Algorithm 2: each λ_i, i ≥ d_rcd, redrawn with `probability` inside [s, 2s], monotone; d_rcd stays.

        With the rule `ramp`, its first pair is redrawn with `probability` too.
        """
        steps = redraw(np.array(parent.steps, dtype=np.int64), *self.bounds, probability, rng)
        low = parent.low
        if self.below == "ramp" and rng.random() < probability:
            low = self._any_low(parent.critical_dim, rng)
        return CriticalCandidate(parent.critical_dim, tuple(steps.tolist()), low)

    def cross(self, first: CriticalCandidate, second: CriticalCandidate, rng: Generator) -> CriticalCandidate:
        """d_rcd of either parent, with its ramp; from there on every gene of either, sorted. A parent whose own d_rcd
        lies higher gives, for the pairs below it, its gene at d_rcd."""
        chosen = first if rng.random() < 0.5 else second
        dim = chosen.critical_dim
        pick = rng.random(self.pairs - dim) < 0.5
        steps = np.sort(np.where(pick, _from(first, dim), _from(second, dim)))
        return CriticalCandidate(dim, tuple(steps.tolist()), chosen.low)

    def _candidate(self, dim: int, steps: list[int], begin: int) -> CriticalCandidate:
        """The candidate with a ramp from pair `begin` on, where the rule has one."""
        return CriticalCandidate(dim, tuple(steps), None if self.below == "ntk" else max(begin, 0))

    def _start(self, dim: int) -> int:
        """The first pair of YaRN's ramp to d_rcd: its own, or the one before d_rcd where that lies below it."""
        return max(min(self.low, dim - 1), 0)

    def _any_low(self, dim: int, rng: Generator) -> int:
        """The first pair of a ramp to d_rcd: drawn among all below it where it is searched, else that of YaRN's
        ramp."""
        return int(rng.integers(0, max(dim, 1))) if self.below == "ramp" else self._start(dim)


def _from(candidate: CriticalCandidate, dim: int) -> list[int]:
    """The genes of a candidate for the pairs from `dim` on, where its own begin at another pair."""
    missing = max(0, candidate.critical_dim - dim)
    return [candidate.steps[0]] * missing + list(candidate.steps[max(0, dim - candidate.critical_dim) :])
