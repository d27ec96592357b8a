"""CMA-ES around a seed, alone or after the gradient search. The optimiser is the `cmaes` package.

CMA-ES needs no gradient, and leaves a bad basin where a gradient stays in it; it costs more. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cmaes import CMA

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from longrope.search.dialogue import (
    Bounds,
    Dialogue,
    DialogueSearch,
    Stage,
    best_start_tokens,
    both_splits,
    joint,
    loss_of,
    race,
    rank,
)
from longrope.search.evaluator import SEARCH
from longrope.search.gradient import GradientSearch, GradientSettings
from longrope.search.knots import FactorsAround, Vector, check_knots, phase_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class CMASettings:
    """At most `evaluations` candidates, in whole generations of 4 + ⌊3 ln K⌋ for K knots (None: every pair).

    `sigma`: the first step size, in units of u. `patience`: generations without a better candidate before it stops
    (None: never). `race_samples`: texts that choose the seed.
    """

    evaluations: int = 256
    sigma: float = 0.15
    knots: int | None = 12
    race_samples: int = 2
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("evaluations", 1), ("race_samples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise LongRopeError(f"{name} must be at least {least}; found {getattr(self, name)}")
        if self.seed >= 2**32:
            raise LongRopeError(f"CMA-ES takes seeds up to {2**32 - 1}; found {self.seed}")
        if not 0.0 < self.sigma < math.inf:
            raise LongRopeError(f"the step size of CMA-ES must be positive; found {self.sigma}")
        if self.patience is not None and self.patience < 1:
            raise LongRopeError(f"patience must be at least 1 generation; found {self.patience}")


_WORST = 1e300  # what is no number, for CMA-ES: it subtracts losses, and infinity less infinity is no number


class _Evolve(DialogueSearch):
    """What both searches share: generations of CMA-ES around a start, scored on all search samples."""

    bounds: Bounds

    def _evolve(
        self, space: FactorsAround, length: int, attention_factor: float, settings: CMASettings
    ) -> Dialogue[tuple[Window, float]]:
        """The best window and its search loss; the seed of `space`, as it is, is a candidate too."""
        optimiser = CMA(mean=np.zeros(space.knots), sigma=settings.sigma, seed=settings.seed)

        def window(factors: Vector) -> Window:
            return self.bounds.window(length, factors, attention_factor)

        start = window(space.seed if space.seed.max() <= space.largest else space.origin)
        (answer,) = yield [loss_of(start, SEARCH)]
        best = start, rank(answer.loss)
        self._found(best)
        stale = 0
        for _ in range(settings.evaluations // optimiser.population_size):
            points = [optimiser.ask() for _ in range(optimiser.population_size)]
            windows = [window(space.factors(point)) for point in points]
            answers = yield [loss_of(candidate, SEARCH) for candidate in windows]
            losses = [rank(answer.loss) for answer in answers]
            optimiser.tell([(point, min(loss, _WORST)) for point, loss in zip(points, losses, strict=True)])
            at = int(np.argmin(losses))
            stale = 0 if losses[at] < best[1] else stale + 1
            if losses[at] < best[1]:
                best = windows[at], losses[at]
                self._found(best)
            if optimiser.should_stop() or (settings.patience is not None and stale >= settings.patience):
                break
        return best

    def _found(self, best: tuple[Window, float]) -> None:
        """Called with the start and every better candidate."""


def _checked_knots(settings: CMASettings, pairs: int) -> int:
    """K. Raises LongRopeError where the pairs do not have so many, or the evaluations are no generation."""
    knots = pairs if settings.knots is None else settings.knots
    check_knots(pairs, knots)
    generation = 4 + math.floor(3 * math.log(knots))
    if settings.evaluations < generation:
        raise LongRopeError(
            f"expected at least {generation} evaluations, a generation of CMA-ES on {knots} knots; "
            f"found {settings.evaluations}"
        )
    return knots


class CMASearch(_Evolve):
    """Seeds are raced, CMA-ES starts from the best. `incumbent`: the best candidate and its search loss."""

    def __init__(
        self,
        stage: Stage,
        geometry: RopeGeometry,
        settings: CMASettings,
        attention_factor: float = 1.0,
        bounds: Bounds | None = None,
    ) -> None:
        self.bounds = bounds or Bounds()
        self.stage, self.geometry, self.settings = stage, geometry, settings
        self.attention_factor = attention_factor
        self.knots = _checked_knots(settings, geometry.pairs)
        super().__init__()

    def _run(self) -> Dialogue[tuple[Window, float]]:
        stage, settings = self.stage, self.settings
        name = yield from race(stage, stage.seeds, self.attention_factor, settings.race_samples, self.bounds)
        self.chosen_seeds.append(name)
        seed = np.asarray(stage.seeds[name], dtype=np.float64)
        space = FactorsAround(seed, phase_scale(self.geometry), self.knots, self.bounds.largest)
        best = yield from self._evolve(space, stage.length, self.attention_factor, settings)
        if len(self.bounds.start_tokens) == 1:
            return best
        best = yield from best_start_tokens(best[0], self.bounds.start_tokens, lambda w: [loss_of(w, SEARCH)])
        self._found(best)
        return best

    def _found(self, best: tuple[Window, float]) -> None:
        self.incumbent = best


class HybridSearch(GradientSearch, _Evolve):
    """The gradient search, and its result polished by a short CMA-ES; the better of both by `joint`."""

    def __init__(
        self,
        stages: Sequence[Stage],
        geometry: RopeGeometry,
        settings: GradientSettings,
        polish: CMASettings,
        attention_factor: float = 1.0,
        bounds: Bounds | None = None,
    ) -> None:
        self.polish, self.polish_knots = polish, _checked_knots(polish, geometry.pairs)
        super().__init__(stages, geometry, settings, attention_factor, bounds)

    def _polished(self, window: Window) -> Dialogue[Window]:
        seed = np.asarray(window.factors)
        space = FactorsAround(seed, phase_scale(self.geometry), self.polish_knots, self.bounds.largest)
        polished, _ = yield from self._evolve(space, window.max_length, window.attention_factor, self.polish)
        if polished == window:
            return window
        before = joint((yield both_splits(window)))
        after = joint((yield both_splits(polished)))
        if after < before:
            self.incumbent = polished, after
            return polished
        return window
