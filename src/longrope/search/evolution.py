"""LongRoPE's evolutionary search (2402.13753, Algorithm 1) as ask/tell, without a model.

`Evolution` is the optimizer; `evolution_search` runs it on an `Evaluate`.

Everything random comes from one generator that only `ask` advances: the same seed and the same losses give the same
candidates, which is what makes a log of requests and results the whole state of a search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.evaluator import EvalRequest, Evaluate, OnBest, SearchOutcome, ignore
from longrope.search.racing import Racing
from longrope.settings import Settings

_TRIES = 100  # attempts at a candidate that has not been evaluated before


class EvolutionSettings(Settings):
    """Algorithm 1's settings; the defaults are the paper's (64 + 40·32 = 1,344 evaluations).

    `patience` stops after that many iterations without a better candidate (None: never).
    """

    population: int = Field(64, ge=1)  # P
    mutations: int = Field(16, ge=0)  # N₁
    crossovers: int = Field(16, ge=0)  # N₂
    probability: float = Field(0.3, gt=0.0, le=1.0)  # p
    iterations: int = Field(40, ge=0)  # T
    top_k: int = Field(32, ge=1)  # k
    patience: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _children(self) -> Self:
        if self.mutations + self.crossovers < 1:
            raise LongRopeError("an iteration needs mutations or crossovers; found none", code="invalid-setting")
        return self

    @classmethod
    def for_population(
        cls,
        population: int,
        *,
        top_k: int | None = None,
        iterations: int = 40,
        patience: int | None = None,
        seed: int = 0,
    ) -> EvolutionSettings:
        """The paper's proportions for another population: N₁ = N₂ = P/4, k = P/2 unless `top_k` is given."""
        quarter = max(1, population // 4)
        return cls(
            population=population,
            mutations=quarter,
            crossovers=quarter,
            iterations=iterations,
            top_k=max(1, population // 2) if top_k is None else top_k,
            patience=patience,
            seed=seed,
        )

    @property
    def evaluations(self) -> int:
        """The number of candidates that a search without patience evaluates."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


_C = TypeVar("_C", bound=Hashable)


class Space(Protocol[_C]):
    """A set of candidates: mutations and crossovers stay inside it."""

    def mutate(self, parent: _C, probability: float, rng: Generator) -> _C: ...

    def cross(self, first: _C, second: _C, rng: Generator) -> _C: ...


def evolution_search(
    evaluate: Evaluate,
    optimizer: Evolution[Any],
    to_window: Callable[[Any], Window],
    racing: Racing | None = None,
    on_best: OnBest = ignore,
) -> SearchOutcome:
    """Algorithm 1 to its end. Raises LongRopeError when no loss was finite. One `optimizer` is good for one search.

    `racing`: drop candidates that fall behind after each text. `on_best` gets the best candidate after each generation.
    """
    while not optimizer.done:
        requests = [EvalRequest(to_window(candidate), candidate.to_row()) for candidate in optimizer.ask()]
        optimizer.tell(racing.losses(evaluate, requests) if racing else [result.loss for result in evaluate(requests)])
        if optimizer.incumbent is not None:
            on_best(to_window(optimizer.incumbent[0]), optimizer.incumbent[1])
    if optimizer.incumbent is None:
        raise LongRopeError(
            "no candidate had a finite loss: the model does not work at this length with any factors tried",
            code="not-finite",
        )
    candidate, loss = optimizer.incumbent
    return SearchOutcome(to_window(candidate), loss, ranked=tuple(optimizer.ranked), to_window=to_window)


class Evolution(Generic[_C]):
    """Algorithm 1. `ask` gives a generation that was never evaluated before, `tell` takes its losses."""

    def __init__(self, space: Space[_C], seeds: Sequence[_C], settings: EvolutionSettings) -> None:
        if not seeds:
            raise LongRopeError("an evolution needs at least one seed", code="invalid-setting")
        self.space, self.settings = space, settings
        self._seeds = tuple(dict.fromkeys(seeds))
        self._rng = np.random.default_rng(settings.seed)
        self._seen: set[_C] = set()
        self._ranked: list[tuple[float, int, _C]] = []  # (loss, order of asking, candidate), best first
        self._asked: list[_C] | None = None
        self._exhausted = False
        self._stale = 0
        self.iteration = 0  # generations with losses; the first is P₀

    @property
    def done(self) -> bool:
        patience = self.settings.patience
        stale = patience is not None and self._stale >= patience
        return self.iteration > self.settings.iterations or stale or self._exhausted

    @property
    def ranked(self) -> list[tuple[_C, float]]:
        """All candidates with a finite loss, best first."""
        return [(candidate, loss) for loss, _, candidate in self._ranked if math.isfinite(loss)]

    @property
    def incumbent(self) -> tuple[_C, float] | None:
        """The best candidate so far and its loss; None while none had a finite loss."""
        return next(iter(self.ranked), None)

    def ask(self) -> list[_C]:
        """The generation to evaluate now; asking again before telling gives the same one."""
        if self._asked is None:
            generation = self._first_generation() if self.iteration == 0 else self._children()
            self._exhausted = not generation
            self._asked = generation
        return list(self._asked)

    def tell(self, losses: Sequence[float]) -> None:
        """Losses of the generation asked last, in its order. NaN and infinity rank behind every number."""
        if self._asked is None or len(losses) != len(self._asked):
            raise ValueError(f"expected {len(self._asked or [])} losses for the generation asked, found {len(losses)}")
        before = self._ranked[0][0] if self._ranked else math.inf
        start = len(self._seen) - len(self._asked)
        for order, (candidate, loss) in enumerate(zip(self._asked, losses, strict=True)):
            self._ranked.append((loss if math.isfinite(loss) else math.inf, start + order, candidate))
        self._ranked.sort(key=lambda entry: entry[:2])
        self._stale = 0 if self._ranked[0][0] < before else self._stale + 1
        self._asked = None
        self.iteration += 1

    def _first_generation(self) -> list[_C]:
        """P₀: the seeds, and mutations of them in turn."""
        generation: list[_C | None] = list(self._seeds[: self.settings.population])
        self._seen.update(self._seeds[: self.settings.population])
        for index in range(self.settings.population - len(generation)):
            seed = self._seeds[index % len(self._seeds)]
            generation.append(self._new(partial(self._mutation_of, seed)))
        return [candidate for candidate in generation if candidate is not None]

    def _children(self) -> list[_C]:
        """N₁ mutations of Top-k members and N₂ crossovers of pairs of them."""
        top = [candidate for _, _, candidate in self._ranked[: self.settings.top_k]]
        children = [
            self._new(lambda: self._mutation_of(top[self._rng.integers(len(top))]))
            for _ in range(self.settings.mutations)
        ]
        children += [self._new(lambda: self._crossover_of(top)) for _ in range(self.settings.crossovers)]
        return [candidate for candidate in children if candidate is not None]

    def _mutation_of(self, parent: _C) -> _C:
        return self.space.mutate(parent, self.settings.probability, self._rng)

    def _crossover_of(self, top: list[_C]) -> _C:
        if len(top) == 1:
            return self._mutation_of(top[0])
        first, second = self._rng.choice(len(top), 2, replace=False)
        return self.space.cross(top[first], top[second], self._rng)

    def _new(self, draw: Callable[[], _C]) -> _C | None:
        """The first draw that was never asked before; None when there is none in 100 draws."""
        for _ in range(_TRIES):
            candidate = draw()
            if candidate not in self._seen:
                self._seen.add(candidate)
                return candidate
        return None
