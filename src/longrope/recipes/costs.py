"""The cost of each step of a recipe: tokens and FLOPs are counted, the time follows from a rate measured here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longrope.costs.flops_bytes import Flops, forward_flops, run_flops
from longrope.costs.search_cost import search_work
from longrope.errors import LongRopeError
from longrope.evaluation.base import EvalContext
from longrope.evaluation.perplexity import PerplexitySuite
from longrope.evaluation.results import OWN
from longrope.evaluation.run import SUITES
from longrope.models.devices import device_of
from longrope.models.loading import LoadedModel
from longrope.models.model_dims import ModelShape, shape_of
from longrope.models.scoring import token_nll
from longrope.models.targets import as_if_trained
from longrope.recipes.graph import Step
from longrope.recipes.schema import EvaluateStage, FinetuneStage, RecoverStage, SearchStage
from longrope.rope.baselines import ORIGINAL
from longrope.search.config import SearchConfig
from longrope.train.config import FinetuneConfig

PROBE = (256, 4096)
"""Tokens of the two texts that the rates are measured with: matrices prevail in the first, attention in the second."""
_PATIENCE = 5.0  # seconds: a longer text that would take more is not tried


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s of a forward pass as it runs here, on matrices and on attention."""

    matrices: float
    attention: float

    def seconds(self, flops: Flops) -> float:
        return flops.matrices / self.matrices + flops.attention / self.attention


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step: its tokens (a backward counts two more), FLOPs, and seconds on one device."""

    title: str
    tokens: int
    flops: float
    seconds: float
    detail: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recipe_costs(loaded: LoadedModel, steps: Sequence[Step], rates: Rates) -> list[StepCost]:
    """The cost of every step at most: searches that stop early cost less.

    Raises LongRopeError, with the stage, for settings that are not for this model.
    """
    shape = shape_of(loaded.name, loaded.model)
    return [_cost(loaded, shape, place, step, rates) for place, step in enumerate(steps, start=1)]


def extension_costs(
    loaded: LoadedModel,
    target_length: int,
    config: SearchConfig,
    lengths: Sequence[int],
    samples: int,
    methods: int,
    rates: Rates,
) -> list[StepCost]:
    """The cost of a search at most, and of comparing `methods` on `samples` texts at each of `lengths`."""
    shape = shape_of(loaded.name, loaded.model)
    tokens, flops, detail = _searches(loaded, shape, [target_length], config)
    costs = [StepCost("search", tokens, flops.total, rates.seconds(flops), detail)]
    texts = samples * methods
    flops = sum((forward_flops(shape, length) * texts for length in lengths), Flops())
    detail = f"{methods} methods, {samples} texts at {len(lengths)} lengths"
    return [*costs, StepCost("compare", texts * sum(lengths), flops.total, rates.seconds(flops), detail)]


def measure_rates(loaded: LoadedModel) -> Rates:
    """The FLOP/s of matrices and of attention on this machine, from scoring two texts after one that warms up."""
    shape = shape_of(loaded.name, loaded.model)
    short, long = PROBE
    _timed(loaded, short)
    seconds, flops = _timed(loaded, short), forward_flops(shape, short)
    matrices = flops.total / seconds
    if seconds * long / short > _PATIENCE:
        return Rates(matrices, matrices)
    flops = forward_flops(shape, long)
    left = _timed(loaded, long) - flops.matrices / matrices
    if left <= 0:  # larger matrices run faster: the rest says nothing of attention
        together = flops.total / (left + flops.matrices / matrices)
        return Rates(together, together)
    return Rates(matrices, flops.attention / left)


def _timed(loaded: LoadedModel, length: int) -> float:
    ids = torch.arange(length, device=device_of(loaded.model)).remainder(
        loaded.model.config.get_text_config().vocab_size
    )
    with torch.no_grad():
        began = time.perf_counter()
        token_nll(loaded.model, ids[None]).sum().item()
    return time.perf_counter() - began


def _cost(loaded: LoadedModel, shape: ModelShape, place: int, step: Step, rates: Rates) -> StepCost:
    try:
        tokens, flops, detail = _work(loaded, shape, step)
    except LongRopeError as error:  # settings that are refused only with a model at hand
        raise error.within(f"stage {place} ({step.stage.stage})") from error
    return StepCost(step.title, tokens, flops.total, rates.seconds(flops), detail)


def _work(loaded: LoadedModel, shape: ModelShape, step: Step) -> tuple[int, Flops, str]:
    """Tokens and FLOPs of a step, and its work in words."""
    stage = step.stage
    if isinstance(stage, SearchStage):
        return _searches(as_if_trained(loaded, step.starts_at), shape, [stage.target], stage.settings)
    if isinstance(stage, RecoverStage):
        return _searches(as_if_trained(loaded, step.context_length), shape, stage.lengths, stage.settings)
    if isinstance(stage, FinetuneStage):
        return _training(loaded, shape, stage.settings)
    if isinstance(stage, EvaluateStage):
        return _evaluation(loaded, shape, stage, step)
    return 0, Flops(), stage.to


def _searches(
    loaded: LoadedModel, shape: ModelShape, lengths: Sequence[int], options: SearchConfig
) -> tuple[int, Flops, str]:
    works = [search_work(loaded, length, options) for length in dict.fromkeys(lengths)]
    evaluations = sum(work.evaluations for work in works)
    flops = sum((work.flops(shape) for work in works), Flops())
    detail = f"{options.method}, {options.chosen_objective}, {evaluations:,} evaluations"
    return sum(work.tokens for work in works), flops, detail


def _training(loaded: LoadedModel, shape: ModelShape, settings: FinetuneConfig) -> tuple[int, Flops, str]:
    rows = settings.steps * settings.rows_per_step
    flops = run_flops(shape, settings, loaded.geometry.original_length)
    detail = f"{settings.steps} steps × {settings.rows_per_step} rows, {settings.mix}"
    return 3 * rows * settings.length, flops, detail


def _evaluation(loaded: LoadedModel, shape: ModelShape, stage: EvaluateStage, step: Step) -> tuple[int, Flops, str]:
    """Texts of all suites for all methods compared; a benchmark of lm-eval counts as one."""
    lengths = stage.lengths_for(loaded.geometry.original_length, step.context_length)
    context = EvalContext.of(loaded, lengths, (), stage.seed, stage.settings)
    texts: list[tuple[int, int]] = []
    for suite in (SUITES[name](context) for name in stage.suites):
        methods = len({*stage.against, OWN, *([ORIGINAL] if suite.with_original else [])})
        for task in suite.tasks():
            windows = 1
            if stage.settings.stride is not None and isinstance(suite, PerplexitySuite):
                windows += -(-(max(context.lengths) - task.length) // stage.settings.stride)
            texts.append((task.length, methods * task.steps * windows))
    flops = sum((forward_flops(shape, length) * count for length, count in texts), Flops())
    return sum(length * count for length, count in texts), flops, ", ".join(stage.suites)
