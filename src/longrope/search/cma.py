"""CMA-ES around a start, alone (`cma_search`) or after the gradient search (`hybrid_search`).

The optimizer is the `cmaes` package (Hansen, 1604.00772). CMA-ES needs no gradient, and leaves a bad basin where a
gradient stays in it; it costs more. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from cmaes import CMA
from pydantic import Field

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from longrope.search.evaluator import (
    SEARCH,
    Evaluate,
    OnBest,
    SearchOutcome,
    both_splits,
    ignore,
    loss_request,
    mean_loss,
    rank,
)
from longrope.search.gradient import GradientSettings, best_start_tokens, checked, descend_stages, finished
from longrope.search.knots import KnotParametrisation, Vector, check_knots, multiples, phase_scale
from longrope.search.start import Bounds, WindowStage, pick_start
from longrope.settings import Settings

_WORST = 1e300  # NaN and infinity, for CMA-ES: it subtracts losses, and infinity less infinity is NaN


class CMASettings(Settings):
    """At most `evaluations` candidates, in whole generations of 4 + ⌊3 ln K⌋ for K knots (None: every pair).

    `sigma`: the first step size, in units of u. `patience`: generations without a better candidate before it stops
    (None: never). `race_samples`: texts that choose the start.
    """

    evaluations: int = Field(256, ge=1)
    sigma: float = Field(0.15, gt=0.0, allow_inf_nan=False)
    knots: int | None = 12
    race_samples: int = Field(2, ge=1)
    patience: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)

    def knots_of(self, pairs: int) -> int:
        """K. Raises LongRopeError where the pairs have fewer, or the evaluations are less than a generation."""
        knots = check_knots(pairs, pairs if self.knots is None else self.knots)
        generation = 4 + math.floor(3 * math.log(knots))
        if self.evaluations < generation:
            raise LongRopeError(
                f"expected at least {generation} evaluations, a generation of CMA-ES on {knots} knots; "
                f"found {self.evaluations}",
                code="invalid-setting",
            )
        return knots


def cma_search(
    evaluate: Evaluate,
    stage: WindowStage,
    geometry: RopeGeometry,
    settings: CMASettings,
    attention_factor: float = 1.0,
    bounds: Bounds | None = None,
    on_best: OnBest = ignore,
) -> SearchOutcome:
    """CMA-ES around the best start of `stage`, then the best start tokens.

    Raises LongRopeError where no loss was finite.

    `on_best` gets the start, then every better candidate, with the search loss.
    """
    bounds = bounds or Bounds()
    knots = settings.knots_of(geometry.pairs)
    name, seed = pick_start(evaluate, stage, stage.seeds, attention_factor, settings.race_samples, bounds)
    space = KnotParametrisation(seed, phase_scale(geometry), knots, bounds.largest, stage.base)
    window, loss = evolve(evaluate, space, stage.length, attention_factor, settings, bounds, on_best)
    if len(bounds.start_tokens) > 1:
        window, loss = best_start_tokens(
            evaluate, window, bounds.start_tokens, lambda tried: [loss_request(tried, SEARCH)]
        )
        on_best(window, loss)
    return checked(SearchOutcome(window, loss, (name,)))


def hybrid_search(
    evaluate: Evaluate,
    stages: Sequence[WindowStage],
    geometry: RopeGeometry,
    settings: GradientSettings,
    polish: CMASettings,
    attention_factor: float = 1.0,
    bounds: Bounds | None = None,
    on_best: OnBest = ignore,
) -> SearchOutcome:
    """The gradient search, and its result polished by a short CMA-ES; the better of both by `mean_loss`.

    Raises LongRopeError where no loss was finite.
    """
    bounds = bounds or Bounds()
    knots = polish.knots_of(geometry.pairs)
    window, chosen = descend_stages(evaluate, stages, geometry, settings, attention_factor, bounds, on_best)
    base = stages[-1].base
    seed = multiples(base, np.asarray(window.factors))
    space = KnotParametrisation(seed, phase_scale(geometry), knots, bounds.largest, base)
    polished, _ = evolve(evaluate, space, window.max_length, window.attention_factor, polish, bounds)
    if polished != window:
        before = mean_loss(evaluate(both_splits(window)))
        after = mean_loss(evaluate(both_splits(polished)))
        if after < before:
            window = polished
            on_best(window, after)
    return finished(evaluate, window, chosen, bounds, on_best)


def evolve(
    evaluate: Evaluate,
    space: KnotParametrisation,
    length: int,
    attention_factor: float,
    settings: CMASettings,
    bounds: Bounds,
    on_best: OnBest = ignore,
) -> tuple[Window, float]:
    """Generations of CMA-ES around the seed of `space`, scored on all search samples: the best window and its loss.

    The seed as it is, monotone or not, is a candidate too.
    """
    optimizer = CMA(mean=np.zeros(space.knots), sigma=settings.sigma, seed=settings.seed)

    def window_of(factors: Vector) -> Window:
        return bounds.window(length, factors, attention_factor)

    best = window_of(space.best_known)
    (result,) = evaluate([loss_request(best, SEARCH)])
    best_loss, stale = rank(result.loss), 0
    on_best(best, best_loss)
    for _ in range(settings.evaluations // optimizer.population_size):
        points = [optimizer.ask() for _ in range(optimizer.population_size)]
        windows = [window_of(space.factors(point)) for point in points]
        losses = [rank(result.loss) for result in evaluate([loss_request(window, SEARCH) for window in windows])]
        optimizer.tell([(point, min(loss, _WORST)) for point, loss in zip(points, losses, strict=True)])
        at, stale = int(np.argmin(losses)), stale + 1
        if losses[at] < best_loss:
            best, best_loss, stale = windows[at], losses[at], 0
            on_best(best, best_loss)
        if optimizer.should_stop() or (settings.patience is not None and stale >= settings.patience):
            break
    return best, best_loss
