"""Rescale factors around a seed as a function of a few free numbers: monotone and at least 1 by construction.

log λ = Π(log λ_seed + c ∘ A·u). u = 0 is the seed itself; A interpolates linearly in the pair index between K knots
(K = D: every pair by itself); Π is the nearest non-decreasing and non-negative vector. The scale c is what makes
one step length fit all pairs: at c_i = min(1, P_i/L), with P_i the period, a change of u_i by 1 turns the angle at the
end of the original window by about one turn, and pairs that never finish a turn are not moved further than by a factor
of e. Without it steps that suit low frequencies throw the high ones from one local minimum into another.

Around a model that was trained under factors λ_trained the numbers give multiples μ of those: log λ = log λ_trained +
Π(log μ_seed + c ∘ A·u), so that λ_trained stays what it is, monotone or not.

Knows no model; plain NumPy, so that a log of gradients replays bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry
from longrope.search.config import LARGEST

Vector = npt.NDArray[np.float64]


def phase_scale(geometry: RopeGeometry) -> Vector:
    """The scale c (D,): the change of a pair's log λ where its u changes by 1."""
    return np.minimum(1.0, geometry.periods / geometry.original_length)


@dataclass(frozen=True, eq=False)
class KnotParametrisation:
    """The map u (knots,) ↔ λ (D,), λ from 1 to `largest`, around the seed λ (D,) with the scale c (D,).

    `project` brings a seed inside first. `base` (D,), factors that the model was trained with: the seed is a multiple
    of them, and `largest` bounds the multiples.

    Raises LongRopeError for fewer than 2 knots or more knots than pairs.
    """

    seed: Vector
    scale: Vector
    knots: int
    largest: float = LARGEST
    base: Vector | None = None

    def __post_init__(self) -> None:
        check_knots(len(self.seed), self.knots)

    @cached_property
    def places(self) -> npt.NDArray[np.int64]:
        """The pair of every knot, (knots,): evenly spaced."""
        return np.linspace(0.0, len(self.seed) - 1.0, self.knots).round().astype(np.int64)

    @cached_property
    def interpolation(self) -> Vector:
        """The matrix A (D, knots)."""
        pairs = np.arange(len(self.seed))
        return np.stack([np.interp(pairs, self.places, unit) for unit in np.eye(self.knots)], axis=1)

    @cached_property
    def origin(self) -> Vector:
        """The seed (D,) inside the bounds, at u = 0."""
        return project(self.seed, self.largest)

    @property
    def best_known(self) -> Vector:
        """λ (D,) of the seed as it is where it lies inside the bounds, monotone or not, else of `origin`."""
        return over(self.base, self.seed if self.seed.max() <= self.largest else self.origin)

    def factors(self, numbers: Vector) -> Vector:
        """The factors λ (D,) at u (knots,). They, or their multiples of `base`, are non-decreasing, from 1 to
        `largest`. A pair that does not move keeps the seed's factor, bit for bit."""
        start = np.log(self.origin)
        moved = nearest_monotone(start + self.scale * (self.interpolation @ numbers), self.scale**-2.0)
        factors = np.where(moved == start, self.origin, np.exp(np.minimum(moved, 700.0)))  # exp of more overflows
        return over(self.base, project(factors, self.largest))

    def numbers(self, factors: Vector) -> Vector:
        """The u (knots,) at which the knots have the factors λ (D,): the inverse of `factors` where every pair has a
        knot."""
        own = multiples(self.base, factors)
        return np.asarray(((np.log(own) - np.log(self.origin)) / self.scale)[self.places])

    def vjp(self, factors: Vector, gradient: Vector) -> Vector:
        """The vector-Jacobian product: d loss/du (knots,) at λ from d loss/dλ, both (D,), as if Π did not bind."""
        return self.interpolation.T @ (self.scale * factors * gradient)


def over(base: Vector | None, multiples: Vector) -> Vector:
    """The factors λ (D,) that are these multiples of `base` (D,); without a base, the multiples themselves."""
    return multiples if base is None else np.asarray(base * multiples)


def multiples(base: Vector | None, factors: Vector) -> Vector:
    """The multiples of `base` (D,) that λ = `factors` (D,) are: the inverse of `over`."""
    return factors if base is None else np.asarray(factors / base)


def project(factors: Vector, largest: float = LARGEST) -> Vector:
    """`factors` (D,) made non-decreasing by a running maximum, from 1 to `largest`."""
    return np.asarray(np.maximum.accumulate(np.clip(factors, 1.0, largest)), dtype=np.float64)


def check_knots(pairs: int, knots: int) -> int:
    """Return `knots`. Raises LongRopeError where there are fewer than 2, or more than pairs."""
    if pairs < 2:
        raise LongRopeError(
            f"expected at least 2 rotary pairs to search between, found {pairs}",
            code="wrong-geometry",
            hint="the method longrope searches a single pair",
        )
    if not 2 <= knots <= pairs:
        raise LongRopeError(
            f"expected 2 to {pairs} knots for {pairs} rotary pairs, found {knots}", code="invalid-setting"
        )
    return knots


def nearest_monotone(values: Vector, weights: Vector) -> Vector:
    """The non-decreasing vector with the least Σ weights·(difference)²: isotonic regression.

    Neighbours out of order are pooled at their weighted mean until none is left (pool adjacent violators).
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, heavy, count = pools.pop()
            total = heavy + pool[1]
            pool = ((mean * heavy + pool[0] * pool[1]) / total, total, count + pool[2])
        pools.append(pool)
    return np.repeat([mean for mean, _, _ in pools], [count for _, _, count in pools])
