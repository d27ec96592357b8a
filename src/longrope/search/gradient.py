"""The gradient search: Adam on the factors around the best of several starts. Beyond the papers; knows no model.

The loss is differentiable in the factors, and one backward pass tells more than dozens of evaluations. Low-frequency
pairs follow the gradient well; high-frequency pairs wrap many times and have many local minima. So the search compares
several starts first, scales steps by a pair's period, and reaches large ratios by continuation: every stage doubles the
window, starting from the last solution stretched to it, or from a ramp or closed form where that is better.

The result is the best *validated* vector: the mean of its losses on the search texts, and on others that no gradient
was taken on, decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.random import Generator
from pydantic import Field

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from longrope.search.evaluator import (
    SEARCH,
    EvalRequest,
    EvalResult,
    Evaluate,
    OnBest,
    SearchOutcome,
    both_splits,
    gradient_request,
    ignore,
    loss_request,
    mean_loss,
)
from longrope.search.knots import KnotParametrisation, Vector, check_knots, multiples, phase_scale
from longrope.search.start import Bounds, WindowStage, pick_start
from longrope.settings import Settings

_BETAS, _EPSILON = (0.8, 0.97), 1e-12  # short memories: a stage is a few dozen steps
_ATTENTION_SCALE = 0.2
"""The change of log m for one unit of its variable: the step of a factor would change every logit too much
(docs/experiments.md)."""


class GradientSettings(Settings):
    """`steps` gradient steps per stage, each on one sample; `learning_rate`, in units of u, falls by a cosine to a
    tenth.

    `knots`: number of knots (None: every pair). `race_samples`: texts that choose the start, all but the first among
    the best few. Every `validate_every` steps the vector is validated; `patience` validations without improvement end a
    stage, which 30 steps with two of
    them never reach by themselves: it is for longer searches, or 1. `learn_attention_factor` makes the attention factor
    a parameter too.
    """

    steps: int = Field(30, ge=1)
    learning_rate: float = Field(0.1, gt=0.0, allow_inf_nan=False)
    knots: int | None = None
    race_samples: int = Field(2, ge=1)
    validate_every: int = Field(15, ge=1)
    patience: int = Field(3, ge=1)
    learn_attention_factor: bool = False
    seed: int = Field(0, ge=0)

    def knots_of(self, pairs: int) -> int:
        """K. Raises LongRopeError for a number of knots that the pairs do not have."""
        return check_knots(pairs, pairs if self.knots is None else self.knots)


def gradient_search(
    evaluate: Evaluate,
    stages: Sequence[WindowStage],
    geometry: RopeGeometry,
    settings: GradientSettings,
    attention_factor: float = 1.0,
    bounds: Bounds | None = None,
    on_best: OnBest = ignore,
) -> SearchOutcome:
    """Descend through `stages`; the result is the window of the last, with the best start tokens. Raises LongRopeError
    where no loss was finite.

    `on_best` gets the best validated window of the current stage and its `mean_loss`.
    """
    bounds = bounds or Bounds()
    window, chosen = descend_stages(evaluate, stages, geometry, settings, attention_factor, bounds, on_best)
    return finished(evaluate, window, chosen, bounds, on_best)


def descend_stages(
    evaluate: Evaluate,
    stages: Sequence[WindowStage],
    geometry: RopeGeometry,
    settings: GradientSettings,
    attention_factor: float,
    bounds: Bounds,
    on_best: OnBest,
) -> tuple[Window, tuple[str, ...]]:
    """The best validated window of the last stage, and the name of what each stage started from."""
    if not stages:
        raise LongRopeError("a gradient search needs at least one stage")
    knots, rng = settings.knots_of(geometry.pairs), np.random.default_rng(settings.seed)
    window, chosen = None, []
    for stage in stages:
        seeds = dict(stage.seeds)
        if window is not None:
            before = stage.base_length or geometry.original_length
            ratios = (length / before for length in (window.max_length, stage.length))
            seeds["stretched"] = stretched(multiples(stage.base, np.asarray(window.factors)), *ratios)
            attention_factor = window.attention_factor
        name, seed = pick_start(evaluate, stage, seeds, attention_factor, settings.race_samples, bounds)
        chosen.append(name)
        space = KnotParametrisation(seed, phase_scale(geometry), knots, bounds.largest, stage.base)
        window = descend(evaluate, stage, space, settings, attention_factor, bounds, rng, on_best)
    assert window is not None
    return window, tuple(chosen)


def finished(
    evaluate: Evaluate, window: Window, chosen_seeds: tuple[str, ...], bounds: Bounds, on_best: OnBest
) -> SearchOutcome:
    """`window` with the best start tokens, and its loss on all search samples. Raises LongRopeError where that loss is
    not finite."""
    if len(bounds.start_tokens) > 1:
        window, loss = best_start_tokens(evaluate, window, bounds.start_tokens, both_splits)
        on_best(window, loss)
    (result,) = evaluate([loss_request(window, SEARCH)])
    return checked(SearchOutcome(window, result.loss, chosen_seeds))


def checked(outcome: SearchOutcome) -> SearchOutcome:
    """Return `outcome`. Raises LongRopeError where its loss is not finite."""
    if not math.isfinite(outcome.loss):
        raise LongRopeError(
            "no factors had a finite loss: the model does not work at this length with any tried", code="not-finite"
        )
    return outcome


def best_start_tokens(
    evaluate: Evaluate, window: Window, choices: Sequence[int], requests_of: Callable[[Window], list[EvalRequest]]
) -> tuple[Window, float]:
    """`window` with the n̂ of `choices` that has the lowest mean loss on the requests for it (of equals the first), and
    that loss."""
    windows = [replace(window, start_tokens=count) for count in choices]
    requests = [requests_of(tried) for tried in windows]
    results = evaluate([request for each in requests for request in each])
    size = len(requests[0])
    losses = [mean_loss(results[at : at + size]) for at in range(0, len(results), size)]
    best = losses.index(min(losses))
    return windows[best], losses[best]


def descend(
    evaluate: Evaluate,
    stage: WindowStage,
    space: KnotParametrisation,
    settings: GradientSettings,
    attention_factor: float,
    bounds: Bounds,
    rng: Generator,
    on_best: OnBest,
) -> Window:
    """Run Adam from the seed of `space`; returns the best validated window, that of the seed included.

    The variables are u (K,) and the attention factor's own, in units of `_ATTENTION_SCALE` of its logarithm. Raises
    LongRopeError where no gradient was finite.
    """

    def window_at(point: Vector) -> Window:
        # The last variable is that of m's change: exactly 0, and m what it was, unless it is learned.
        change = math.exp(_ATTENTION_SCALE * point[-1])
        return bounds.window(stage.length, space.factors(point[:-1]), attention_factor * change)

    point = np.zeros(space.knots + 1)
    best, best_point = window_at(point), point
    best_loss, stale = mean_loss(evaluate(both_splits(best))), 0
    on_best(best, best_loss)
    adam, order, broken = _Adam(len(point)), np.zeros(0, dtype=np.int64), 0
    rate = settings.learning_rate
    for step in range(1, settings.steps + 1):
        # Every sample once, in drawn order, before any comes again.
        place = (step - 1) % stage.samples
        order = rng.permutation(stage.samples) if place == 0 else order
        window = window_at(point)
        (result,) = evaluate([gradient_request(window, int(order[place]))])
        gradient = _gradient(space, window, result, settings.learn_attention_factor)
        if gradient is None:  # the model broke here: back to the best point, with smaller steps
            point, adam, rate, broken = best_point, _Adam(len(point)), rate / 2, broken + 1
            if broken == settings.steps:
                raise LongRopeError(
                    f"none of {broken} gradients at {stage.length} tokens was finite, which leaves the seed as it was",
                    code="not-finite",
                )
        else:
            decay = 0.55 + 0.45 * math.cos(math.pi * (step - 1) / settings.steps)
            point = point - adam.step(gradient, rate * decay)
            # A projected step: a point that left the space goes on from the nearest point of it.
            point = np.append(space.numbers(space.factors(point[:-1])), point[-1])
        if step % settings.validate_every == 0 or step == settings.steps:
            window = window_at(point)
            loss = mean_loss(evaluate(both_splits(window)))
            stale += 1
            if loss < best_loss:
                best, best_loss, best_point, stale = window, loss, point, 0
                on_best(best, best_loss)
            if stale >= settings.patience:
                break
    # A checkpoint's factors need not be monotone: the result is never worse than the seed it began with.
    if space.seed.max() <= bounds.largest and not np.array_equal(space.origin, space.seed):
        window = bounds.window(stage.length, space.best_known, attention_factor)
        loss = mean_loss(evaluate(both_splits(window)))
        if loss < best_loss:
            best = window
            on_best(best, loss)
    return best


class _Adam:
    """The moments of Adam (Kingma & Ba, 1412.6980, Algorithm 1)."""

    def __init__(self, size: int) -> None:
        self._first, self._second, self._age = np.zeros(size), np.zeros(size), 0

    def step(self, gradient: Vector, rate: float) -> Vector:
        """The step to subtract."""
        self._age += 1
        self._first = _BETAS[0] * self._first + (1 - _BETAS[0]) * gradient
        self._second = _BETAS[1] * self._second + (1 - _BETAS[1]) * gradient**2
        mean, variance = self._first / (1 - _BETAS[0] ** self._age), self._second / (1 - _BETAS[1] ** self._age)
        return np.asarray(rate * mean / (np.sqrt(variance) + _EPSILON))


def _gradient(
    space: KnotParametrisation, window: Window, result: EvalResult, learn_attention_factor: bool
) -> Vector | None:
    """d loss/d(u, log m in its unit) at `window`, (K + 1,); None where the loss or a derivative is not finite."""
    assert result.gradient is not None
    if not np.isfinite((result.loss, *result.gradient)).all():
        return None
    by_log = result.gradient[-1] * window.attention_factor * _ATTENTION_SCALE if learn_attention_factor else 0.0
    return np.append(space.vjp(np.asarray(window.factors), np.array(result.gradient[:-1])), by_log)


def stretched(factors: Vector, ratio: float, target_ratio: float) -> Vector:
    """The factors of an extension by `ratio`, stretched to `target_ratio` in log λ: λ^(ln s'/ln s).

    PI and NTK forms of one ratio become those of the other.
    """
    return np.asarray(np.asarray(factors, dtype=np.float64) ** (math.log(target_ratio) / math.log(ratio)))
