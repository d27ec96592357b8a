"""The gradient search: Adam on the factors around a raced seed. Beyond the papers; knows no model.

The loss is differentiable in the factors, and one backward pass says more than dozens of evaluations. Low-frequency
pairs follow the gradient well; high-frequency pairs wrap many times and have many local minima, so several seeds are
raced first, steps are scaled by a pair's period, and large ratios can be reached by continuation: every stage doubles
the window, starting from the last solution stretched to it (and from the closed forms, raced again).

What is returned is the best *validated* vector: the mean of its losses on the search texts, and on others that no
gradient was taken on, decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    gradient_of,
    joint,
    loss_of,
    race,
)
from longrope.search.evaluator import SEARCH, Answer
from longrope.search.knots import FactorsAround, Vector, check_knots, phase_scale

_BETAS, _EPSILON = (0.8, 0.97), 1e-12  # short memories: a stage is a few dozen steps
_ATTENTION_SCALE = 0.2
"""log m for one unit of its variable: a step that suits a factor changes every logit too much (docs/experiments.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSettings:
    """`steps` gradient steps per stage, each on one sample; `learning_rate`, in units of u, falls by a cosine to a
    tenth.

    `knots`: number of knots (None: every pair). `race_samples`: texts that choose the seed. Every `validate_every`
    steps the vector is validated; `patience` validations without improvement end a stage, which 30 steps with two of
    them never reach by themselves: it is for longer searches, or 1. `learn_attention_factor` makes the attention factor
    a parameter too.
    """

    steps: int = 30
    learning_rate: float = 0.1
    knots: int | None = None
    race_samples: int = 2
    validate_every: int = 15
    patience: int = 3
    learn_attention_factor: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "race_samples", "validate_every", "patience"):
            if getattr(self, name) < 1:
                raise LongRopeError(f"{name} must be at least 1; found {getattr(self, name)}")
        if not 0.0 < self.learning_rate < math.inf:
            raise LongRopeError(f"the learning rate must be positive; found {self.learning_rate}")
        if self.seed < 0:
            raise LongRopeError(f"the seed must be 0 or more; found {self.seed}")


class GradientSearch(DialogueSearch):
    """Asks the losses of seeds, then gradients and validations. Use `ask` and `tell` until `done`.

    `incumbent` is the best validated window of the current stage, and its mean loss on search and validation samples.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        geometry: RopeGeometry,
        settings: GradientSettings,
        attention_factor: float = 1.0,
        bounds: Bounds | None = None,
    ) -> None:
        if not stages:
            raise LongRopeError("a gradient search needs at least one stage")
        self.bounds = bounds or Bounds()
        self.stages, self.geometry, self.settings = tuple(stages), geometry, settings
        self.knots = geometry.pairs if settings.knots is None else settings.knots
        check_knots(geometry.pairs, self.knots)
        self._start_attention_factor = attention_factor
        self._rng = np.random.default_rng(settings.seed)
        super().__init__()

    def _run(self) -> Dialogue[tuple[Window, float]]:
        attention_factor = self._start_attention_factor
        factors: Vector | None = None
        reached = original = self.geometry.original_length
        for stage in self.stages:
            seeds = dict(stage.seeds)
            if factors is not None:
                seeds["stretched"] = stretched(factors, reached / original, stage.length / original)
            name = yield from race(stage, seeds, attention_factor, self.settings.race_samples, self.bounds)
            self.chosen_seeds.append(name)
            seed = np.asarray(seeds[name], dtype=np.float64)
            factors, attention_factor = yield from self._descend(stage, seed, attention_factor)
            reached = stage.length
        assert factors is not None
        window = yield from self._polished(self.bounds.window(reached, factors, attention_factor))
        if len(self.bounds.start_tokens) > 1:
            window, loss = yield from best_start_tokens(window, self.bounds.start_tokens, both_splits)
            self.incumbent = window, loss
        (answer,) = yield [loss_of(window, SEARCH)]
        return window, answer.loss

    def _polished(self, window: Window) -> Dialogue[Window]:
        """What is done with the result of the last stage: nothing here."""
        yield from ()
        return window

    def _descend(self, stage: Stage, seed: Vector, attention_factor: float) -> Dialogue[tuple[Vector, float]]:
        """Adam from the seed and m. The best validated factors (D,) and attention factor, the seed's included."""
        settings = self.settings
        space = FactorsAround(seed, phase_scale(self.geometry), self.knots, self.bounds.largest)

        def window_at(point: Vector) -> Window:
            # The last number is that of m's change: exactly 0, and m what it was, unless it is learned.
            factors = space.factors(point[:-1])
            change = math.exp(_ATTENTION_SCALE * point[-1])
            return self.bounds.window(stage.length, factors, attention_factor * change)

        point = np.zeros(self.knots + 1)
        first, second = np.zeros_like(point), np.zeros_like(point)
        best_loss, best_point, stale = joint((yield both_splits(window_at(point)))), point, 0
        self.incumbent = window_at(point), best_loss
        scale, age = 1.0, 0  # age: steps in the moments
        for step in range(1, settings.steps + 1):
            window = window_at(point)
            (answer,) = yield [gradient_of(window, self._draw(stage, step))]
            gradient = self._gradient(space, window, answer)
            if gradient is None:  # the model broke here: back to the best point, with smaller steps
                point, first, second, age, scale = best_point, np.zeros_like(point), np.zeros_like(point), 0, scale / 2
            else:
                age += 1
                first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
                second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient**2
                mean, variance = first / (1 - _BETAS[0] ** age), second / (1 - _BETAS[1] ** age)
                rate = scale * settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * (step - 1) / settings.steps))
                point = point - rate * mean / (np.sqrt(variance) + _EPSILON)
                # A projected step: what left the space goes on from the nearest point of it.
                point = np.append(space.numbers(space.factors(point[:-1])), point[-1])
            if step % settings.validate_every == 0 or step == settings.steps:
                loss = joint((yield both_splits(window_at(point))))
                better = loss < best_loss
                if better:
                    best_loss, best_point = loss, point
                    self.incumbent = window_at(point), best_loss
                stale = 0 if better else stale + 1
                if stale >= settings.patience:
                    break
        # A checkpoint's factors need not be monotone: the result is never worse than the seed it began with.
        if seed.max() <= self.bounds.largest and not np.array_equal(space.origin, seed):
            seed_window = self.bounds.window(stage.length, seed, attention_factor)
            loss = joint((yield both_splits(seed_window)))
            if loss < best_loss:
                self.incumbent = seed_window, loss
                return seed, attention_factor
        best = window_at(best_point)
        return np.asarray(best.factors), best.attention_factor

    def _draw(self, stage: Stage, step: int) -> int:
        """The sample of a step: every sample once, in drawn order, before any comes again."""
        place = (step - 1) % stage.samples
        if place == 0:
            self._order = self._rng.permutation(stage.samples)
        return int(self._order[place])

    def _gradient(self, space: FactorsAround, window: Window, answer: Answer) -> Vector | None:
        """d loss/d(u, log m in its unit) at `window`, or None where the loss or a derivative is not finite."""
        assert answer.gradient is not None
        if not np.isfinite((answer.loss, *answer.gradient)).all():
            return None
        by_log = answer.gradient[-1] * window.attention_factor * _ATTENTION_SCALE
        by_log = by_log if self.settings.learn_attention_factor else 0.0
        return np.append(space.pull_back(np.asarray(window.factors), np.array(answer.gradient[:-1])), by_log)


def stretched(factors: Vector, ratio: float, target_ratio: float) -> Vector:
    """The factors of an extension by `ratio`, stretched to `target_ratio` in log λ: λ^(ln s'/ln s).

    PI and NTK forms of one ratio become those of the other.
    """
    return np.asarray(np.asarray(factors, dtype=np.float64) ** (math.log(target_ratio) / math.log(ratio)))
