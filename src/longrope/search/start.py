"""The windows of a search on the knots, and where it starts: at the best of a few seeds and of ramps of 1/λ.

Good factors without training lie near ramps (YaRN's form): one pair where interpolation begins, another from which it
is whole. Which two is found by a compass search on a grid of such pairs, from the better of two ramps on: of it and its
four neighbours the best is the next centre, until no neighbour is better. On the embedded model that asks about half of
what 25 fixed starts did, and no edge of a grid binds it (docs/measurements.md). Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from longrope.rope.scaling import Window
from longrope.search.config import LARGEST
from longrope.search.evaluator import SEARCH, Evaluate, loss_request, rank
from longrope.search.knots import Vector, over, project

FINALISTS = 4
"""The number of starts that are compared on more than the first text."""
MOST_RAMPS = 20
"""The largest number of ramps that are tried, reached where the search still climbs after five moves."""
ORIGIN, STEPS = (8.0, 0.6), (2.0, 1.6)
"""The grid of ramps: rotations in L at the two ends of one, of the last pair that keeps its frequency and of the first
that is interpolated in full; and the ratios to those of its neighbours."""
_FIRST = ((0, 0), (2, 1))
"""The places on the grid where the search may begin: its origin, and one near YaRN's ends, 32 and 1."""
_AROUND = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
"""Steps from a place to itself and its neighbours."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of a search: λ ≤ `largest`, and `start_tokens`, the choices of n̂.

    n̂ is discrete: the search runs with the first choice, and where there are others its result is tried with each.
    """

    largest: float = LARGEST
    start_tokens: tuple[int, ...] = (0,)

    def window(self, length: int, factors: Vector, attention_factor: float) -> Window:
        """`factors` (D,) and the first n̂ as a window."""
        return Window(length, tuple(factors.tolist()), self.start_tokens[0], attention_factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStage:
    """One window of a search: its length, named seeds of D factors each, and how many search samples there are.

    `base` (D,): factors that the model was trained with for `base_length` tokens; the seeds are multiples of them.
    `ramp`: what a search may start from beside the seeds, by the rotations in L (with a `base` in `base_length`) of the
    last pair that keeps its frequency and of the first that is interpolated in full: (D,), with a `base` multiples.
    """

    length: int
    seeds: Mapping[str, Vector]
    samples: int
    base: Vector | None = None
    base_length: int | None = None
    ramp: Callable[[float, float], Vector] | None = None

    def window(self, factors: Vector, attention_factor: float, bounds: Bounds) -> Window:
        """The window of a seed, made monotone by `project`."""
        factors = over(self.base, project(factors, bounds.largest))
        return bounds.window(self.length, factors, attention_factor)


def pick_start(
    evaluate: Evaluate,
    stage: WindowStage,
    seeds: Mapping[str, Vector],
    attention_factor: float,
    samples: int,
    bounds: Bounds,
) -> tuple[str, Vector]:
    """The name and the factors (D,) of the seed or ramp with the lowest loss on the first `samples` search samples.

    Where there are ramps or more than `FINALISTS` seeds, all are scored on the first sample and only the best go on to
    the others. Of equal losses the first wins; a loss that is no number comes last.
    """
    starts, shared = dict(seeds), tuple(range(min(samples, stage.samples)))

    def losses_of(names: Iterable[str], rows: tuple[int, ...]) -> dict[str, float]:
        windows = {name: stage.window(starts[name], attention_factor, bounds) for name in names}
        results = evaluate([loss_request(window, SEARCH, rows) for window in windows.values()])
        return {name: rank(result.loss) for name, result in zip(windows, results, strict=True)}

    if len(starts) <= FINALISTS and stage.ramp is None:
        losses = losses_of(starts, shared)
    else:
        losses = losses_of(starts, shared[:1]) if starts else {}
        if stage.ramp is not None:
            losses |= _climb(starts, stage.ramp, bounds.largest, partial(losses_of, rows=shared[:1]))
        if len(shared) > 1:
            best = sorted(losses, key=losses.__getitem__)[:FINALISTS]
            others = losses_of([name for name in losses if name in best], shared[1:])
            losses = {name: losses[name] + (len(shared) - 1) * loss for name, loss in others.items()}
    name = min(losses, key=losses.__getitem__)
    return name, np.asarray(starts[name], dtype=np.float64)


def _climb(
    starts: dict[str, Vector],
    ramp: Callable[[float, float], Vector],
    largest: float,
    losses_of: Callable[[list[str]], dict[str, float]],
) -> dict[str, float]:
    """The losses of the ramps that the compass search tries, by name; their factors (D,) are added to `starts`.

    A ramp whose ends are out of order, or that is another one inside the bound λ ≤ `largest`, is not tried.
    """
    names: dict[tuple[int, int], str] = {}  # by place on the grid
    losses: dict[str, float] = {}
    places: Sequence[tuple[int, int]] = _FIRST
    centre = None
    while True:
        new = []
        for place in places:
            fast, slow = (first * step**count for first, step, count in zip(ORIGIN, STEPS, place, strict=True))
            if place in names or fast < slow or len(names) == MOST_RAMPS:
                continue
            factors = project(ramp(fast, slow), largest)
            if not any(np.array_equal(factors, starts[name]) for name in names.values()):
                names[place] = f"ramp, β_fast {fast:g}, β_slow {slow:.3g}"
                starts[names[place]] = factors
                new.append(names[place])
        losses |= losses_of(new) if new else {}
        best = min((place for place in places if place in names), key=lambda place: losses[names[place]])
        if centre is not None and not losses[names[best]] < losses[names[centre]]:
            return losses
        centre = best
        places = [(best[0] + fast, best[1] + slow) for fast, slow in _AROUND]
