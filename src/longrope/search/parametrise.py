"""Rescale factors as a smooth function of a few unconstrained numbers: monotone and at least 1 by construction.

log λ is piecewise linear in the pair index between K knots, and at the knots a cumulative sum of softplus increments.
K = D gives every pair its own increment; a few knots give a space that is easier to search and generalises better.
Knows no model; plain NumPy, with the derivative written out, so that a log of gradients replays bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from longrope.errors import LongRopeError

Vector = npt.NDArray[np.float64]

LARGEST = 1e9
"""The largest factor that a window holds. A search that goes ever further up stays there: no angle is left anyway."""


@dataclass(frozen=True)
class KnotFactors:
    """θ (knots,) ↔ λ (pairs,). `upper` (None: no bound below LARGEST) is approached by λ and never exceeded.

    Raises LongRopeError for fewer than 2 knots, more knots than pairs, or an upper bound that is not above 1.
    """

    pairs: int
    knots: int
    upper: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.knots <= self.pairs:
            raise LongRopeError(f"expected 2 to {self.pairs} knots for {self.pairs} rotary pairs, found {self.knots}")
        if self.upper is not None and not self.upper > 1.0:
            raise LongRopeError(f"expected an upper bound of the factors above 1, found {self.upper}")

    @cached_property
    def places(self) -> Vector:
        """The pair of every knot, (knots,): evenly spaced, and whole, so that `parameters` undoes `factors`."""
        return np.linspace(0.0, self.pairs - 1.0, self.knots).round()

    @cached_property
    def interpolation(self) -> Vector:
        """The matrix A (pairs, knots) of log λ = A·(log λ at the knots)."""
        pairs = np.arange(self.pairs, dtype=np.float64)
        return np.stack([np.interp(pairs, self.places, unit) for unit in np.eye(self.knots)], axis=1)

    def factors(self, theta: Vector) -> Vector:
        """λ (pairs,) of θ (knots,): non-decreasing and at least 1."""
        levels = self._bounded(np.cumsum(_softplus(theta)))
        logarithms = np.minimum(self.interpolation @ levels, 700.0)  # exp of more overflows
        return np.clip(np.exp(logarithms), 1.0, LARGEST if self.upper is None else self.upper)

    def pull_back(self, theta: Vector, gradient: Vector) -> Vector:
        """d loss/dθ (knots,) from d loss/dλ (pairs,) by the chain rule."""
        levels = np.cumsum(_softplus(theta))
        by_level = self.interpolation.T @ (self.factors(theta) * gradient)
        if self.upper is not None:
            by_level = by_level * np.exp(-levels / np.log(self.upper))
        # A level is the sum of all increments before it: an increment moves every level from its own on.
        by_increment = np.cumsum(by_level[::-1])[::-1]
        return by_increment * _sigmoid(theta)

    def parameters(self, factors: Vector) -> Vector:
        """θ (knots,) whose factors come closest to λ (pairs,): log λ at the knots, made monotone and bounded."""
        levels = np.interp(self.places, np.arange(self.pairs), np.log(np.maximum(factors, 1.0)))
        levels = np.maximum.accumulate(levels)
        if self.upper is not None:
            bound = np.log(self.upper)
            levels = -bound * np.log1p(-np.minimum(levels / bound, 0.999))
        # An increment of exactly 0 would have no gradient; all small ones together stay below 5 %.
        increments = np.maximum(np.diff(levels, prepend=0.0), 0.05 / self.knots)
        return np.log(np.expm1(increments))

    def _bounded(self, levels: Vector) -> Vector:
        if self.upper is None:
            return levels
        bound = np.log(self.upper)
        return np.asarray(bound * -np.expm1(-levels / bound))


def _softplus(values: Vector) -> Vector:
    return np.asarray(np.logaddexp(0.0, values))


def _sigmoid(values: Vector) -> Vector:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)))
