"""The evaluations of a search, without a model: the search itself runs on losses that always get better.

No candidate is dropped then and no patience ends it, so these are the most evaluations that it can make.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longrope.costs.context_parallel import SharedTime, shared_seconds
from longrope.costs.devices import Devices
from longrope.costs.flops_bytes import Flops, forward_flops, gradient_flops
from longrope.models.config import LayerInputs
from longrope.models.loading import LoadedModel
from longrope.models.model_dims import ModelShape
from longrope.search.config import SearchConfig
from longrope.search.evaluator import OTHER, SEARCH, VALIDATION, EvalRequest, EvalResult, SerialEvaluator, distinct
from longrope.search.initial import baselines
from longrope.search.methods import build
from longrope.search.objective import SampledObjective
from longrope.search.search_data import VALIDATION_SAMPLES, samples_of, stage_lengths


class Work(NamedTuple):
    """One evaluation: `rows` texts of `length` tokens, with or without the gradient; the head runs for `scored`
    positions of each (None: all)."""

    rows: int
    length: int
    gradient: bool
    scored: int | None


@dataclass(frozen=True)
class SearchWork:
    """The most that a search computes.

    `rounds`: the evaluations that are requested at once, in order. `evaluations` and `token_passes`: of the search, as
    its summary counts them. `extra` comes on top: the baselines, and the other objective's scores of LongRoPE2.
    """

    rounds: list[list[Work]]
    extra: list[list[Work]]
    evaluations: int
    token_passes: int

    @property
    def by_gradient(self) -> bool:
        """True if some evaluation takes the gradient."""
        return any(work.gradient for work in itertools.chain(*self.rounds))

    @property
    def tokens(self) -> int:
        """Tokens of all rows, `extra` included, a forward once and a backward twice."""
        every = itertools.chain(*self.rounds, *self.extra)
        return sum(work.rows * work.length * (3 if work.gradient else 1) for work in every)

    def flops(self, shape: ModelShape, layer_inputs: LayerInputs = "keep") -> Flops:
        """FLOPs of all evaluations, `extra` included, where gradients have the inputs of layers so."""
        return sum(map(_flops_of(shape, layer_inputs), itertools.chain(*self.rounds, *self.extra)), Flops())

    def time(
        self, shape: ModelShape, devices: Devices, processes: int = 1, layer_inputs: LayerInputs = "keep"
    ) -> SharedTime:
        """The time with a replica on each device, or on each `processes` of them, which share every text.

        The replicas share the evaluations of a round; rounds follow each other.
        """

        @cache
        def of_a_text(length: int, gradient: bool, scored: int | None) -> SharedTime:
            way: dict[str, Any] = {"gradient": gradient, "scored": scored, "layer_inputs": layer_inputs}
            return shared_seconds(shape, length, devices, processes=processes, **way)

        whole, by_total = SharedTime(0.0, 0.0), attrgetter("total")
        for batch in (*self.rounds, *self.extra):
            busy = [SharedTime(0.0, 0.0)] * min(devices.count // processes, max(1, len(batch)))
            for rows, length, gradient, scored in batch:
                busy.sort(key=by_total)  # the replica that is free first takes it
                busy[0] += of_a_text(length, gradient, scored) * rows
            whole += max(busy, key=by_total)
        return whole


def _flops_of(shape: ModelShape, layer_inputs: LayerInputs) -> Callable[[Work], Flops]:
    """The FLOPs of an evaluation, counted once for each kind: a search makes the same a thousand times."""

    @cache
    def of_a_text(length: int, gradient: bool, scored: int | None) -> Flops:
        if gradient:
            return gradient_flops(shape, length, scored, layer_inputs)
        return forward_flops(shape, length, scored)

    return lambda work: of_a_text(work.length, work.gradient, work.scored) * work.rows


def search_work(loaded: LoadedModel, target_length: int, config: SearchConfig) -> SearchWork:
    """The evaluations of a search by `config` of a model with the geometry and checkpoint scaling of `loaded`."""
    objectives = sized_objectives(loaded.context_length, target_length, config)
    prepared = build(loaded, objectives, target_length, config)
    evaluator = SerialEvaluator(objectives)
    batches: list[list[EvalRequest]] = []
    gradient, losses = (1.0,) * (loaded.geometry.pairs + 1), itertools.count(-1.0, -1.0)

    def evaluate(requests: Sequence[EvalRequest]) -> list[EvalResult]:
        batches.append(list(requests))
        return [EvalResult(next(losses), gradient if request.gradient else None) for request in requests]

    def work(request: EvalRequest) -> Work:
        objective = objectives[request.split, request.window.max_length]
        rows = objective.count if request.samples is None else len(request.samples)
        return Work(rows, objective.length, request.gradient, objective.head)

    prepared.run(evaluate)
    requests = [request for batch in batches for request in batch]
    compared = len(baselines(loaded, target_length, formulas=config.baselines))
    extra: list[list[Work]] = [[_scoring(objectives[SEARCH, target_length])] * compared]
    if config.method == "longrope2":  # the best of each d_rcd by the other objective
        space, other = prepared.settings["space"], objectives[OTHER, target_length]
        extra.append([_scoring(other)] * (space["last"] - space["first"] + 1))
    passes = sum(map(evaluator.token_passes, distinct(requests)))
    return SearchWork([list(map(work, batch)) for batch in batches], extra, len(requests), passes)


def sized_objectives(
    context_length: int, target_length: int, config: SearchConfig
) -> Mapping[tuple[str, int], SizedObjective]:
    """The counts and lengths of the texts that `search_data.prepare_texts` draws."""
    chosen, other = config.chosen_objective, config.other_objective
    searched = samples_of(config, chosen, target_length)
    if config.by_gradient:
        lengths = stage_lengths(context_length, target_length, config.continuation)
        splits = {SEARCH: searched, VALIDATION: VALIDATION_SAMPLES}
        return {
            (split, length): SizedObjective(rows, length, chosen)
            for length in lengths
            for split, rows in splits.items()
        }
    sized = {(SEARCH, target_length): SizedObjective(searched, target_length, chosen)}
    if config.method == "longrope2":
        rows = samples_of(config, other, target_length)
        sized[OTHER, target_length] = SizedObjective(rows, target_length, other)
    return sized


class SizedObjective(SampledObjective):
    """An objective of `count` texts of `length` tokens, without the texts. `name`: perplexity or needle."""

    def __init__(self, count: int, length: int, name: str) -> None:
        self._ids = torch.empty(count, length, dtype=torch.int64, device="meta")
        self._needle = name == "needle"

    @property
    def ids(self) -> Tensor:
        return self._ids

    @property
    def head(self) -> int | None:
        """The positions of a text that the head runs for: all (None), or those of an answer, of which one is counted
        for the few."""
        return 1 if self._needle else None

    def scored(self, row: int) -> int:
        return self.head or self.length - 1


def _scoring(objective: SizedObjective) -> Work:
    """All texts of `objective` scored once."""
    return Work(objective.count, objective.length, False, objective.head)
