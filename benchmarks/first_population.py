"""First populations of LongRoPE2's evolution, on a target without a model: distance to the published LLaMA3-8B table.

    python benchmarks/first_population.py

Prints, for every way to fill P₀ (64 candidates), the rms error of log λ after 1,344 evaluations, the mean of 12 seeds,
and how often d_rcd ends at 33, that of the table.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from longrope.rope.geometry import RopeGeometry
from longrope.rope.presets import preset
from longrope.search.evolution import Evolution, EvolutionSettings
from longrope.search.spaces import TAIL_STEPS, CriticalCandidate, CriticalSpace

GEOMETRY = RopeGeometry(rotary_dim=128, base=500_000.0, original_length=8192)
GOAL = np.log(preset("longrope2_llama3_8b_128k").windows[-1].factors)
SPACE = CriticalSpace(pairs=64, ratio=16.0, first=GEOMETRY.critical_dim(10), last=GEOMETRY.critical_dim())
DIMS = range(SPACE.first, SPACE.last + 1)
LOW, HIGH = SPACE.bounds


def samples(rng: Generator, count: int, *, slope: int, from_s: bool = False) -> list[CriticalCandidate]:
    """Tails from s' ~ U[s, 2s], or from s, that rise by `slope` hundredths a pair: of every d_rcd in turn."""
    made = []
    for index in range(count):
        dim = DIMS[index % len(DIMS)]
        level = LOW if from_s else int(rng.integers(LOW, HIGH + 1))
        tail = np.minimum(level + slope * np.arange(64 - dim), HIGH)
        made.append(CriticalCandidate(dim, tuple(tail.tolist())))
    return made


WAYS: dict[str, Callable[[Generator], list[CriticalCandidate]]] = {
    "constant, s' ~ U[s, 2s] (Algorithm 1)": lambda rng: samples(rng, 64, slope=0),
    "rising by 0.1 a pair, s' ~ U[s, 2s]": lambda rng: samples(rng, 64, slope=TAIL_STEPS),
    "rising from s alone, mutated": lambda rng: samples(rng, 12, slope=TAIL_STEPS, from_s=True),
    "the corner and rising from s, mutated": lambda rng: [
        *samples(rng, 12, slope=0, from_s=True),
        *samples(rng, 12, slope=TAIL_STEPS, from_s=True),
    ],
    "the corner, then rising and mutated constant in turn (what ships)": lambda rng: SPACE.initial(64, 0.3, rng),
}


def loss(candidate: CriticalCandidate) -> float:
    return float(np.sqrt(np.mean((np.log(candidate.factors) - GOAL) ** 2)))


def main() -> None:
    for name, first in WAYS.items():
        errors, dims = [], []
        for seed in range(12):
            optimizer = Evolution(SPACE, first(np.random.default_rng(seed)), EvolutionSettings(seed=seed))
            while not optimizer.done:
                optimizer.tell([loss(candidate) for candidate in optimizer.ask()])
            assert optimizer.incumbent is not None
            errors.append(optimizer.incumbent[1])
            dims.append(optimizer.incumbent[0].critical_dim)
        print(f"{name}: {np.mean(errors):.4f} (median {np.median(errors):.4f}), d_rcd 33 in {dims.count(33)} of 12")


if __name__ == "__main__":
    main()
