"""`plan`: what search, fine-tuning and evaluation cost, from a model's config alone, before anything is spent.

FLOPs and tokens are counted; hours are those FLOPs at an assumed share of a device's peak rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from longrope.costs.advice import assumptions, beyond_searching, search_advice, text_advice, training_advice
from longrope.costs.context_parallel import fewest_sharing, shared_seconds
from longrope.costs.devices import Devices
from longrope.costs.flops_bytes import (
    Flops,
    forward_flops,
    reading_bytes,
    run_flops,
    training_bytes,
)
from longrope.costs.layer_inputs import LayerInputsPlan, plan_layer_inputs
from longrope.costs.search_cost import search_work
from longrope.errors import LongRopeError
from longrope.evaluation.config import EvalConfig
from longrope.models.apply import geometry_of
from longrope.models.config import LoadOptions
from longrope.models.loading import LoadedModel, find_checkpoint_scaling
from longrope.models.model_dims import ModelShape, shape_of
from longrope.models.peak_bytes import Bytes, shared_bytes
from longrope.models.targets import require_longer
from longrope.models.weightless import weightless
from longrope.quantities import format_bytes, format_count, format_duration, format_gpu_hours
from longrope.search.config import METHODS, SearchConfig
from longrope.storage import write_json_atomic
from longrope.train.config import FinetuneConfig
from longrope.units import doubling_lengths, format_length, parse_length

LONGEST_TRAINED = 64
"""LongRoPE fine-tunes up to this multiple of the original window (256k of 4k), and reaches further by a second search
without training."""
RECOMMENDED = "gradient"
"""The search method to begin with: it needs the fewest token passes (docs/experiments.md)."""
MIXED_TOKENS = 10_000_000_000
MIXED_SHARES = "short:0.3,medium:0.3,long:0.4"
"""LongRoPE2's mixed training (§3.3): 3B tokens of at most L, 3B and 4B of longer documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """The cost of one search, fine-tuning or evaluation."""

    stage: str
    """search, finetune or evaluate."""
    name: str
    """The search method, the paper whose training it is, or the suite."""
    detail: str
    """The work that is counted, in words."""
    length: int
    """Tokens of the longest text."""
    tokens: int
    """Of a search its token passes (a backward counts two more) with those of the baselines; else tokens of texts."""
    matrix_flops: float
    attention_flops: float
    memory: Bytes
    """Bytes on one device, by purpose."""
    fits: bool
    """True if the memory of a device holds them."""
    devices: int
    """The number of devices that work on it."""
    hours: float
    """Wall time on these devices."""
    exchange_hours: float = 0.0
    """The part of `hours` in which devices that share texts wait for keys and values of one another."""
    advice: str
    """The changes with which the job would fit, where it does not; else empty."""

    @property
    def peak_bytes(self) -> float:
        """Bytes on one device, all purposes."""
        return sum(self.memory.values())

    @property
    def gpu_hours(self) -> float:
        """`hours` of every device that is used, together."""
        return self.hours * self.devices

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes, "gpu_hours": self.gpu_hours}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CostPlan:
    """The cost of extending a model to `target_length` tokens on `devices`, and the assumptions."""

    model: str
    original_length: int
    context_length: int
    """Tokens that the checkpoint supports already."""
    target_length: int
    shape: ModelShape
    devices: Devices
    rows: tuple[CostRow, ...]
    assumptions: tuple[str, ...]

    @property
    def recommended(self) -> CostRow | None:
        """The search to begin with: by gradient where it is planned and fits, else the quickest that fits."""
        searches = [row for row in self.rows if row.stage == "search" and row.fits]
        by_gradient = [row for row in searches if row.name == RECOMMENDED]
        return min(by_gradient or searches, key=lambda row: row.hours, default=None)

    @property
    def recommendation(self) -> str:
        """The recommended search and its cost in one sentence; where none fits, that."""
        row = self.recommended
        if row is None:
            return "Recommended: nothing as planned, because no search fits on a device; below is what would."
        hours = f"{format_gpu_hours(row.gpu_hours)} {self.devices.noun}-hours"
        lengths = self.original_length, self.context_length, self.target_length
        return (
            f"Recommended: search --method {row.name}, without training: {format_duration(3600 * row.hours)} "
            f"({hours}), {format_bytes(row.peak_bytes)} on each device." + beyond_searching(*lengths)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "recommended": None if self.recommended is None else self.recommended.name,
            "model": self.model,
            "original_length": self.original_length,
            "context_length": self.context_length,
            "target_length": self.target_length,
            "shape": asdict(self.shape),
            "devices": self.devices.to_json(),
            "rows": [row.to_json() for row in self.rows],
            "assumptions": self.assumptions,
        }

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file."""
        write_json_atomic(Path(path), self.to_json())

    def __repr__(self) -> str:
        lines = [
            f"{self.model}: {format_length(self.original_length)} -> {format_length(self.target_length)} tokens on "
            f"{self.devices.label}",
            self.recommendation,
        ]
        hours = f"{self.devices.noun}-hours"
        for row in self.rows:
            fits = "fits" if row.fits else "TOO LARGE"
            lines.append(
                f"{row.stage + ' ' + row.name:22}{format_count(row.tokens):>5} tokens {format_bytes(row.peak_bytes):>8}"
                f" {format_duration(3600 * row.hours):>11} {format_gpu_hours(row.gpu_hours):>6} {hours} {fits}"
            )
        return "\n".join(lines)


def plan(
    model: PreTrainedModel | str | Path,
    target_length: int | str,
    devices: Devices | None = None,
    *,
    searches: Sequence[SearchConfig] | None = None,
    trainings: Sequence[FinetuneConfig] | None = None,
    context_parallel: int = 1,
    evaluation: EvalConfig | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> CostPlan:
    """Tokens, FLOPs, memory and hours of extending a model to `target_length` tokens.

    `model`: a loaded model, a folder, a hub name or the name of an embedded model; of the last three only the config is
    read. `searches`: by default every method with its own defaults. `trainings`: by default LongRoPE's 400 and 600
    steps and LongRoPE2's 10B tokens. `evaluation`: of lengths L, 2L, … L'. `context_parallel`: devices that share every
    text and every row of training.

    Raises LongRopeError for a model without RoPE or without a config, a target that is not longer than its window, and
    devices that cannot be.
    """
    target_length, devices = parse_length(target_length), devices or Devices()
    loaded = _without_weights(model, original_length, trust_remote_code)
    require_longer(loaded, target_length)
    if not 1 <= context_parallel <= devices.count or devices.count % context_parallel:
        raise LongRopeError(
            f"expected context parallelism over a number of devices that divides {devices.count}, found "
            f"{context_parallel}",
            code="invalid-setting",
        )
    longest = max(trainings or (), key=lambda config: config.reach, default=None)
    if longest is not None and longest.reach > target_length:
        name = "length" if longest.skip_to is None else "skip_to"
        raise LongRopeError(
            f"expected a `{name}` of at most {target_length} for training, found {longest.reach}",
            code="invalid-setting",
        )
    shape, original_length = shape_of(loaded.name, loaded.model), loaded.geometry.original_length
    if searches is None:
        searches = [SearchConfig(method=method) for method in METHODS]
    rows = [_search(loaded, shape, target_length, config, devices, context_parallel) for config in searches]
    runs = _papers_trainings(original_length, target_length)
    if trainings is not None:
        runs = [("given", [config]) for config in trainings]
    rows += [_training(name, stages, original_length, shape, devices, context_parallel) for name, stages in runs]
    lengths = doubling_lengths(original_length, target_length)
    rows += _evaluation(lengths, evaluation or EvalConfig(), shape, devices, context_parallel)
    return CostPlan(
        model=loaded.name,
        original_length=original_length,
        context_length=loaded.context_length,
        target_length=target_length,
        shape=shape,
        devices=devices,
        rows=tuple(rows),
        assumptions=assumptions(shape, devices, loaded.model.config, context_parallel),
    )


def _without_weights(
    model: PreTrainedModel | str | Path, original_length: int | None, trust_remote_code: bool
) -> LoadedModel:
    """The model as a search sees it, but for weights and tokenizer, which no plan reads."""
    if isinstance(model, PreTrainedModel):
        name = str(model.name_or_path or type(model).__name__)
        folder = name if Path(name).is_dir() else None
    else:
        name = folder = str(model)
        model = weightless(name, trust_remote_code=trust_remote_code)
    geometry = geometry_of(model, original_length)
    checkpoint_scaling = find_checkpoint_scaling(folder, model.config, geometry)
    options = LoadOptions(original_length=original_length, trust_remote_code=trust_remote_code)
    return LoadedModel(name, model, cast(Any, None), geometry, checkpoint_scaling, options)


def _search(
    loaded: LoadedModel,
    shape: ModelShape,
    target_length: int,
    config: SearchConfig,
    devices: Devices,
    context_parallel: int,
) -> CostRow:
    """A search with a replica of the model on each device, or on each `context_parallel` of them, which share every
    text; the replicas share the evaluations requested at once."""
    work = search_work(loaded, target_length, config)
    inputs = LayerInputsPlan()
    if work.by_gradient:
        inputs = plan_layer_inputs(shape, target_length, config, devices, context_parallel)
    time = work.time(shape, devices, context_parallel, inputs.how)
    return _row(
        work.flops(shape, inputs.how),
        shared_bytes(
            shape,
            target_length,
            devices.itemsize,
            gradient=work.by_gradient,
            processes=context_parallel,
            layer_inputs=inputs.how,
        ),
        devices,
        text_advice(shape, target_length, devices, work.by_gradient, context_parallel, inputs),
        stage="search",
        name=config.method,
        detail=f"{work.evaluations:,} evaluations, objective {config.chosen_objective}{inputs.remark}",
        length=target_length,
        tokens=work.tokens,
        devices_used=devices.count,
        hours=time.total / 3600,
        exchange_hours=time.exchange / 3600,
    )


def _papers_trainings(original_length: int, target_length: int) -> list[tuple[str, list[FinetuneConfig]]]:
    """The fine-tunings of LongRoPE (in two stages, the first for half the length) and of LongRoPE2, by name."""
    trained = min(target_length, LONGEST_TRAINED * original_length)
    half = max(2, trained // 2)
    single = [FinetuneConfig(length=half, steps=400), FinetuneConfig(length=trained, steps=600)]
    mixed = FinetuneConfig(length=trained, mix=MIXED_SHARES, steps=1)
    steps = math.ceil(MIXED_TOKENS / (mixed.rows_per_step * trained))
    return [("longrope", single), ("longrope2", [mixed.replace(steps=steps)])]


def _training(
    name: str,
    stages: Sequence[FinetuneConfig],
    original_length: int,
    shape: ModelShape,
    devices: Devices,
    context_parallel: int,
) -> CostRow:
    """The cost of a fine-tuning in `stages`, one after the other.

    All devices share weights, optimizer states and rows; `context_parallel` of them share each row.
    """
    flops, tokens = Flops(), 0
    for config in stages:
        tokens += config.steps * config.rows_per_step * config.length
        flops += run_flops(shape, config, original_length)
    longest = max(stages, key=lambda config: config.length)

    def size(gpus: int, offload: bool, shared: int) -> Bytes:
        return training_bytes(
            shape,
            longest.micro_batch * longest.length,
            gpus=gpus,
            offload=offload,
            context_parallel=shared,
            itemsize=min(2, devices.itemsize),
        )

    described = ", ".join(
        f"{config.steps:,} steps × {config.rows_per_step} × {format_length(config.length)}" for config in stages
    )
    advice = training_advice(size, devices, longest.offload, context_parallel)
    return _row(
        flops,
        size(devices.count, longest.offload, context_parallel),
        devices,
        advice,
        stage="finetune",
        name=name,
        detail=f"{described}, {longest.mix}",
        length=longest.length,
        tokens=tokens,
        devices_used=devices.count,
        hours=devices.seconds(flops) / devices.count / 3600,
    )


def _evaluation(
    lengths: Sequence[int], config: EvalConfig, shape: ModelShape, devices: Devices, context_parallel: int
) -> list[CostRow]:
    """An evaluation of one method on one device, or on those that share every text; a row for each suite.

    Shared texts are scored, in needles every question with its document; RULER is then not measured.
    """
    longest, shared = max(lengths), context_parallel > 1
    tasks = config.chosen_ruler_tasks
    needles = config.trials * (config.depths if shared else 1)
    suites = {
        "perplexity": (config.samples, f"{config.samples} texts", True),
        "passkey": (config.trials, f"{config.trials} texts", shared),
        "needle": (needles, f"{config.trials} documents with needles at all depths", shared),
        "ruler": (config.trials * len(tasks), f"{len(tasks)} tasks × {config.trials} texts", False),
    }
    rows = []
    for name, (count, texts, scores) in suites.items():
        if shared and not scores:
            continue
        scored = None if name == "perplexity" else 0
        flops = sum((forward_flops(shape, length, scored) * count for length in lengths), Flops())
        times = [
            shared_seconds(shape, length, devices, gradient=False, processes=context_parallel, scored=scored)
            for length in lengths
        ]
        memory = reading_bytes(shape, longest, devices.itemsize)
        if scores:
            memory = shared_bytes(shape, longest, devices.itemsize, gradient=False, processes=context_parallel)
            advice = text_advice(shape, longest, devices, False, context_parallel)
        else:
            sharing = None if name == "ruler" else fewest_sharing(shape, longest, devices, gradient=False)
            advice = search_advice(partial(reading_bytes, shape), longest, devices, memory, sharing)
        rows.append(
            _row(
                flops,
                memory,
                devices,
                advice,
                stage="evaluate",
                name=name,
                detail=f"{texts}, at {len(lengths)} lengths",
                length=longest,
                tokens=count * sum(lengths),
                devices_used=context_parallel,
                hours=count * sum(time.total for time in times) / 3600,
                exchange_hours=count * sum(time.exchange for time in times) / 3600,
            )
        )
    return rows


def _row(flops: Flops, memory: Bytes, devices: Devices, advice: str, devices_used: int, **given: Any) -> CostRow:
    fits = devices.holds(sum(memory.values()))
    return CostRow(
        matrix_flops=flops.matrices,
        attention_flops=flops.attention,
        memory=memory,
        fits=fits,
        advice="" if fits else advice,
        devices=devices_used,
        **given,
    )
