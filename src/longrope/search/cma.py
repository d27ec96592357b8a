"""CMA-ES on the parametrisation of the gradient search, alone or after it. The optimiser is the `cmaes` package.

CMA-ES needs no gradient, and leaves a bad basin where a gradient stays in it; it costs more. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cmaes import CMA

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.dialogue import Dialogue, DialogueSearch, Stage, loss_of, race, rank
from longrope.search.evaluators import SEARCH, VALIDATION
from longrope.search.gradient import GradientSearch, GradientSettings
from longrope.search.parametrise import KnotFactors, Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class CMASettings:
    """At most `evaluations` candidates, in whole generations of 4 + ⌊3 ln K⌋ for K knots (None: every pair).

    `sigma`: the first step size, in units of θ. `patience`: generations without a better candidate before it stops
    (None: never). `race_samples`: texts that choose the seed.
    """

    evaluations: int = 256
    sigma: float = 0.5
    knots: int | None = 12
    race_samples: int = 2
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("evaluations", 1), ("race_samples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise LongRopeError(f"{name} must be at least {least}; found {getattr(self, name)}")
        if not 0.0 < self.sigma < math.inf:
            raise LongRopeError(f"the step size of CMA-ES must be positive; found {self.sigma}")
        if self.patience is not None and self.patience < 1:
            raise LongRopeError(f"patience must be at least 1 generation; found {self.patience}")


_WORST = 1e300  # what is no number, for CMA-ES: it subtracts losses, and infinity less infinity is no number


class _Evolve(DialogueSearch):
    """What both searches share: generations of CMA-ES around a start, scored on all search samples."""

    def _evolve(
        self, space: KnotFactors, start: Vector, length: int, attention_factor: float, settings: CMASettings
    ) -> Dialogue[tuple[Window, float]]:
        """The best window and its search loss; `start` (D,), as it is and off the knots, is a candidate too."""
        optimiser = CMA(mean=space.parameters(start), sigma=settings.sigma, seed=settings.seed)

        def window(factors: Vector) -> Window:
            return Window(length, tuple(factors.tolist()), 0, attention_factor)

        (answer,) = yield [loss_of(window(start), SEARCH)]
        best = window(start), rank(answer.loss)
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


def _check_evaluations(settings: CMASettings, space: KnotFactors) -> None:
    generation = 4 + math.floor(3 * math.log(space.knots))
    if settings.evaluations < generation:
        raise LongRopeError(
            f"expected at least {generation} evaluations, a generation of CMA-ES on {space.knots} knots; "
            f"found {settings.evaluations}"
        )


class CMASearch(_Evolve):
    """Seeds are raced, CMA-ES starts from the best. `incumbent`: the best candidate and its search loss."""

    def __init__(self, stage: Stage, settings: CMASettings, attention_factor: float = 1.0) -> None:
        self.stage, self.settings, self.attention_factor = stage, settings, attention_factor
        pairs = len(next(iter(stage.seeds.values())))
        self.space = KnotFactors(pairs, pairs if settings.knots is None else settings.knots)
        _check_evaluations(settings, self.space)
        super().__init__()

    def _run(self) -> Dialogue[tuple[Window, float]]:
        stage, settings = self.stage, self.settings
        name = yield from race(stage, stage.seeds, self.space, self.attention_factor, settings.race_samples)
        self.chosen_seeds.append(name)
        start = np.asarray(stage.seeds[name], dtype=np.float64)
        return (yield from self._evolve(self.space, start, stage.length, self.attention_factor, settings))

    def _found(self, best: tuple[Window, float]) -> None:
        self.incumbent = best


class HybridSearch(GradientSearch, _Evolve):
    """The gradient search, and its result polished by a short CMA-ES; the better of both on the validation samples."""

    def __init__(
        self,
        stages: Sequence[Stage],
        original_length: int,
        settings: GradientSettings,
        polish: CMASettings,
        attention_factor: float = 1.0,
    ) -> None:
        self.polish = polish
        super().__init__(stages, original_length, settings, attention_factor)
        _check_evaluations(polish, self.space)

    def _polished(self, window: Window) -> Dialogue[Window]:
        start = np.asarray(window.factors)
        polished, _ = yield from self._evolve(
            self.space, start, window.max_length, window.attention_factor, self.polish
        )
        if polished == window:
            return window
        before, after = yield [loss_of(window, VALIDATION), loss_of(polished, VALIDATION)]
        if rank(after.loss) < rank(before.loss):
            self.incumbent = polished, after.loss
            return polished
        return window
