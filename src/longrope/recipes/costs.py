"""What each step of a recipe will cost: tokens and FLOPs are counted, the time is those at a rate measured here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longrope.costs.flops_bytes import Flops, forward_flops, run_flops
from longrope.costs.model_dims import ModelShape, shape_of
from longrope.costs.search_cost import search_work
from longrope.errors import LongRopeError
from longrope.evaluation.base import Material
from longrope.evaluation.perplexity import SUITE as PERPLEXITY
from longrope.evaluation.suites import SUITES
from longrope.models.loading import Subject, as_if_trained
from longrope.models.scoring import token_nll
from longrope.recipes.graph import Step
from longrope.recipes.schema import EvaluateStage, FinetuneStage, RecoverStage, SearchStage
from longrope.rope.baselines import ORIGINAL
from longrope.search.config import SearchOptions
from longrope.train.config import TrainingSettings

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


def recipe_costs(subject: Subject, steps: Sequence[Step], rates: Rates) -> list[StepCost]:
    """What the steps cost at most: searches that stop early cost less.

    Raises LongRopeError, with the stage, for settings that are not for this model.
    """
    shape = shape_of(subject.name, subject.model)
    return [_cost(subject, shape, place, step, rates) for place, step in enumerate(steps, start=1)]


def measure_rates(subject: Subject) -> Rates:
    """The rates of scoring two short texts, after one that warms up."""
    shape = shape_of(subject.name, subject.model)
    short, long = PROBE
    _timed(subject, short)
    seconds, flops = _timed(subject, short), forward_flops(shape, short)
    matrices = flops.total / seconds
    if seconds * long / short > _PATIENCE:
        return Rates(matrices, matrices)
    flops = forward_flops(shape, long)
    left = _timed(subject, long) - flops.matrices / matrices
    if left <= 0:  # larger matrices run faster: what is left says nothing of attention
        together = flops.total / (left + flops.matrices / matrices)
        return Rates(together, together)
    return Rates(matrices, flops.attention / left)


def _timed(subject: Subject, length: int) -> float:
    ids = torch.arange(length, device=subject.model.device).remainder(subject.model.config.get_text_config().vocab_size)
    with torch.no_grad():
        began = time.perf_counter()
        token_nll(subject.model, ids[None]).sum().item()
    return time.perf_counter() - began


def _cost(subject: Subject, shape: ModelShape, place: int, step: Step, rates: Rates) -> StepCost:
    try:
        tokens, flops, detail = _work(subject, shape, step)
    except LongRopeError as error:  # settings that are refused only with a model at hand
        raise LongRopeError(f"stage {place} ({step.stage.stage}): {error}") from error
    return StepCost(step.title, tokens, flops.total, rates.seconds(flops), detail)


def _work(subject: Subject, shape: ModelShape, step: Step) -> tuple[int, Flops, str]:
    """Tokens, FLOPs and what they are for."""
    stage = step.stage
    if isinstance(stage, SearchStage):
        return _searches(as_if_trained(subject, step.carried), shape, [stage.target], stage.settings)
    if isinstance(stage, RecoverStage):
        return _searches(as_if_trained(subject, step.reach), shape, stage.lengths, stage.settings)
    if isinstance(stage, FinetuneStage):
        return _training(subject, shape, stage.settings)
    if isinstance(stage, EvaluateStage):
        return _evaluation(subject, shape, stage, step)
    return 0, Flops(), stage.to


def _searches(
    subject: Subject, shape: ModelShape, lengths: Sequence[int], options: SearchOptions
) -> tuple[int, Flops, str]:
    works = [search_work(subject, length, options) for length in dict.fromkeys(lengths)]
    questions = sum(work.questions for work in works)
    flops = sum((work.flops(shape) for work in works), Flops())
    detail = f"{options.method}, {options.chosen_objective}, {questions:,} questions"
    return sum(work.tokens for work in works), flops, detail


def _training(subject: Subject, shape: ModelShape, settings: TrainingSettings) -> tuple[int, Flops, str]:
    rows = settings.steps * settings.rows_per_step
    flops = run_flops(shape, settings, subject.geometry.original_length)
    detail = f"{settings.steps} steps × {settings.rows_per_step} rows, {settings.mix}"
    return 3 * rows * settings.length, flops, detail


def _evaluation(subject: Subject, shape: ModelShape, stage: EvaluateStage, step: Step) -> tuple[int, Flops, str]:
    """Texts of all suites for all that are compared; a benchmark of lm-eval counts as one."""
    material = Material(subject, stage.at(subject.geometry.original_length, step.reach), (), stage.seed, stage.settings)
    texts: list[tuple[int, int]] = []
    for suite in (SUITES[name](material) for name in stage.suites):
        contenders = len({*stage.against, "longrope", *([ORIGINAL] if suite.with_original else [])})
        for part in suite.parts():
            windows = 1
            if stage.settings.stride is not None and suite.name == PERPLEXITY:
                windows += -(-(max(material.lengths) - part.length) // stage.settings.stride)
            texts.append((part.length, contenders * part.steps * windows))
    flops = sum((forward_flops(shape, length) * count for length, count in texts), Flops())
    return sum(length * count for length, count in texts), flops, ", ".join(stage.suites)
