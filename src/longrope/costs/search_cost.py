"""The evaluations of a search, without a model: the search itself runs on losses that always get better.

No candidate is dropped then and no patience ends it, so these are the most evaluations that it can make.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrope.costs.devices import Devices
from longrope.costs.flops_bytes import Flops, forward_flops, gradient_flops
from longrope.costs.model_dims import ModelShape
from longrope.models.loading import LoadedModel
from longrope.search.config import SearchConfig
from longrope.search.evaluator import OTHER, SEARCH, VALIDATION, EvalRequest, EvalResult, SerialEvaluator, distinct
from longrope.search.initial import baselines
from longrope.search.methods import build
from longrope.search.objective import SampledObjective
from longrope.search.search_data import VALIDATION_SAMPLES, samples_of, stage_lengths


class _Sized(SampledObjective):
    """So many texts of such a length, and nothing in them."""

    name = "sized"

    def __init__(self, count: int, length: int) -> None:
        self._ids = torch.empty(count, length, dtype=torch.int64, device="meta")

    @property
    def ids(self) -> Tensor:
        return self._ids

    def scored(self, row: int) -> int:
        return self.length - 1


Work = tuple[int, int, bool]
"""Rows, their tokens, and whether the gradient is asked for."""


@dataclass(frozen=True)
class SearchWork:
    """What a search asks for at most.

    `rounds`: questions that are asked at once. `token_passes`: of the search, as its summary counts them; `baselines`
    and the other objective's scores of LongRoPE2 come on top, `extra`.
    """

    rounds: list[list[Work]]
    extra: list[list[Work]]
    questions: int
    token_passes: int

    @property
    def longest(self) -> int:
        return max(length for work in self.rounds for _, length, _ in work)

    @property
    def by_gradient(self) -> bool:
        return any(gradient for work in self.rounds for *_, gradient in work)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, `extra` included, a forward once and a backward twice."""
        every = [work for asked in (*self.rounds, *self.extra) for work in asked]
        return sum(rows * length * (3 if gradient else 1) for rows, length, gradient in every)

    def flops(self, shape: ModelShape) -> Flops:
        cost = _Costs(shape)
        return sum((cost(work) for asked in (*self.rounds, *self.extra) for work in asked), Flops())

    def seconds(self, shape: ModelShape, devices: Devices) -> float:
        """With one replica on each device: the questions of a round are shared, rounds follow each other."""
        cost, total = _Costs(shape), 0.0
        for asked in (*self.rounds, *self.extra):
            free = [0.0] * devices.count
            for work in asked:
                heapq.heappush(free, heapq.heappop(free) + devices.seconds(cost(work)))
            total += max(free)
        return total


class _Costs:
    """The FLOPs of a question; the same one comes a thousand times."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.known: dict[tuple[int, bool], Flops] = {}

    def __call__(self, work: Work) -> Flops:
        rows, length, gradient = work
        if (length, gradient) not in self.known:
            self.known[length, gradient] = (gradient_flops if gradient else forward_flops)(self.shape, length)
        return self.known[length, gradient] * rows


def search_work(loaded: LoadedModel, target_length: int, options: SearchConfig) -> SearchWork:
    """The evaluations of a search by `options` of a model with the geometry and checkpoint scaling of `loaded`."""
    objectives = sized_objectives(loaded.context_length, target_length, options)
    prepared = build(loaded, objectives, target_length, options)
    evaluator = SerialEvaluator(objectives)
    batches: list[list[EvalRequest]] = []
    gradient, losses = (1.0,) * (loaded.geometry.pairs + 1), itertools.count(-1.0, -1.0)

    def evaluate(requests: Sequence[EvalRequest]) -> list[EvalResult]:
        batches.append(list(requests))
        return [EvalResult(next(losses), gradient if request.gradient else None) for request in requests]

    def work(request: EvalRequest) -> Work:
        objective = objectives[request.split, request.window.max_length]
        rows = objective.count if request.samples is None else len(request.samples)
        return rows, objective.length, request.gradient

    prepared.run(evaluate)
    requests = [request for batch in batches for request in batch]
    scored = objectives[SEARCH, target_length].count
    compared = len(baselines(loaded, target_length))
    extra: list[list[Work]] = [[(scored, target_length, False)] * compared]
    if options.method == "longrope2":  # the best of each d_rcd by the other objective
        space, other = prepared.settings["space"], objectives[OTHER, target_length].count
        extra.append([(other, target_length, False)] * (space["last"] - space["first"] + 1))
    passes = sum(map(evaluator.token_passes, distinct(requests)))
    return SearchWork([list(map(work, batch)) for batch in batches], extra, len(requests), passes)


def sized_objectives(
    context_length: int, target_length: int, options: SearchConfig
) -> Mapping[tuple[str, int], SampledObjective]:
    """The counts and lengths of the texts that `search_data.prepare_texts` draws."""
    searched = samples_of(options, options.chosen_objective, target_length)
    if options.by_gradient:
        lengths = stage_lengths(context_length, target_length, options.continuation)
        splits = {SEARCH: searched, VALIDATION: VALIDATION_SAMPLES}
        return {(split, length): _Sized(rows, length) for length in lengths for split, rows in splits.items()}
    counts = {SEARCH: searched}
    if options.method == "longrope2":
        counts[OTHER] = samples_of(options, options.other_objective, target_length)
    return {(split, target_length): _Sized(rows, target_length) for split, rows in counts.items()}
