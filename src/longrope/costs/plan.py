"""`longrope plan`: what search, fine-tuning and evaluation cost, from a model's config alone, before anything is spent.

Numbers of FLOPs and tokens are counted; hours are those FLOPs at an assumed share of a device's peak rate.

A plan in plain words: what it assumes, and, where it does not fit, what would; only what the verbs can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

from longrope.costs.devices import USABLE, Devices, gpu_table
from longrope.costs.flops_bytes import (
    Bytes,
    Flops,
    forward_flops,
    gradient_bytes,
    reading_bytes,
    run_flops,
    scoring_bytes,
    training_bytes,
)
from longrope.costs.model_dims import ModelShape, shape_of, weightless
from longrope.costs.search_cost import search_work
from longrope.errors import LongRopeError
from longrope.evaluation.config import EvalConfig
from longrope.models.apply import geometry_of
from longrope.models.config import LoadOptions
from longrope.models.loading import LoadedModel, find_checkpoint_scaling, require_longer
from longrope.search.config import METHODS, SearchConfig
from longrope.train.config import FinetuneConfig
from longrope.units import doubling_lengths, format_length

FURTHEST_TRAINED = 64
"""LongRoPE fine-tunes up to this ratio (256k of 4k), and reaches further by a second search without training."""
MIXED_TOKENS = 10_000_000_000
MIXED_SHARES = "short:0.3,medium:0.3,long:0.4"
"""LongRoPE2's mixed training (§3.3): 3B tokens of at most L, 3B and 4B of longer documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """One thing that can be done.

    `stage`: search, finetune or evaluate; `name`: the method, recipe or suite. `length`: the longest text. `tokens`: of
    a search the token passes, as its summary counts them (a backward is two more), with those of the baselines; of
    fine-tuning and evaluation the tokens of their texts. FLOPs of matrices and attention apart. `memory`: bytes on one
    device, by what takes them; `fits`, or `advice` on what would. `hours`: on `devices` of the devices.
    """

    stage: str
    name: str
    detail: str
    length: int
    tokens: int
    matrix_flops: float
    attention_flops: float
    memory: Bytes
    fits: bool
    devices: int
    hours: float
    advice: str

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class CostPlan:
    """What extending a model to `target_length` costs on `devices`, and what was assumed."""

    model: str
    original_length: int
    target_length: int
    shape: ModelShape
    devices: Devices
    rows: tuple[CostRow, ...]
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        devices = asdict(self.devices) | {
            "peak_tflops": self.devices.peak_tflops,
            "memory_bytes": self.devices.memory_bytes,
        }
        return asdict(self) | {"devices": devices, "rows": [row.to_json() for row in self.rows]}


def plan(
    name: str,
    target_length: int,
    devices: Devices | None = None,
    *,
    searches: Sequence[SearchConfig] | None = None,
    trainings: Sequence[FinetuneConfig] | None = None,
    context_parallel: int = 1,
    evaluation: EvalConfig | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> CostPlan:
    """Tokens, FLOPs, memory and hours of extending the model `name` to `target_length` tokens.

    `searches`: by default every method with its own defaults. `trainings`: by default LongRoPE's 400 and 600 steps and
    LongRoPE2's 10B tokens; `context_parallel` devices share a row of them. `evaluation`: of lengths L, 2L, … L'.

    Raises LongRopeError for a model without RoPE or without a config, a target that is not longer than its window, and
    devices that cannot be.
    """
    devices = devices or Devices()
    model = weightless(name, trust_remote_code=trust_remote_code)
    shape = shape_of(name, model)
    geometry = geometry_of(model, original_length)
    # A plan reads no text: nothing that is asked of the subject needs a tokenizer.
    checkpoint_scaling = find_checkpoint_scaling(name, model.config, geometry)
    loaded = LoadedModel(name, model, cast(Any, None), geometry, checkpoint_scaling, LoadOptions())
    require_longer(loaded, target_length)
    if not 1 <= context_parallel <= devices.count or devices.count % context_parallel:
        raise LongRopeError(
            f"expected context parallel over a number of devices that divides {devices.count}, found {context_parallel}"
        )
    if searches is None:
        searches = [SearchConfig(method=method) for method in METHODS]
    rows = [_search(loaded, shape, target_length, options, devices) for options in searches]
    if trainings is None:
        rows += _papers_trainings(geometry.original_length, target_length, shape, devices, context_parallel)
    else:
        for settings in trainings:
            rows.append(_training("given", [settings], geometry.original_length, shape, devices, context_parallel))
    lengths = doubling_lengths(geometry.original_length, target_length)
    rows += _evaluation(lengths, evaluation or EvalConfig(), shape, devices)
    return CostPlan(
        model=name,
        original_length=geometry.original_length,
        target_length=target_length,
        shape=shape,
        devices=devices,
        rows=tuple(rows),
        assumptions=assumptions(shape, devices, model.config),
    )


def _row(flops: Flops, memory: Bytes, each: Devices, advice: str, **given: Any) -> CostRow:
    fits = each.holds(sum(memory.values()))
    return CostRow(
        matrix_flops=flops.matrices,
        attention_flops=flops.attention,
        memory=memory,
        fits=fits,
        advice="" if fits else advice,
        **given,
    )


def _search(
    loaded: LoadedModel, shape: ModelShape, target_length: int, options: SearchConfig, devices: Devices
) -> CostRow:
    """One replica of the model on each device, which share the questions that are asked at once."""
    work = search_work(loaded, target_length, options)
    size = gradient_bytes if work.by_gradient else scoring_bytes
    memory = size(shape, target_length, devices.itemsize)
    return _row(
        work.flops(shape),
        memory,
        devices,
        search_advice(partial(size, shape), target_length, devices),
        stage="search",
        name=options.method,
        detail=f"{work.questions:,} questions, objective {options.chosen_objective}",
        length=target_length,
        tokens=work.tokens,
        devices=devices.count,
        hours=work.seconds(shape, devices) / 3600,
    )


def _papers_trainings(
    original_length: int, target_length: int, shape: ModelShape, devices: Devices, context_parallel: int
) -> list[CostRow]:
    trained = min(target_length, FURTHEST_TRAINED * original_length)
    half = max(2, trained // 2)
    single = [FinetuneConfig(length=half, steps=400), FinetuneConfig(length=trained, steps=600)]
    mixed = FinetuneConfig(length=trained, mix=MIXED_SHARES, steps=1)
    mixed = FinetuneConfig(
        length=trained, mix=MIXED_SHARES, steps=math.ceil(MIXED_TOKENS / (mixed.rows_per_step * trained))
    )
    return [
        _training("longrope", single, original_length, shape, devices, context_parallel),
        _training("longrope2", [mixed], original_length, shape, devices, context_parallel),
    ]


def _training(
    name: str,
    stages: Sequence[FinetuneConfig],
    original_length: int,
    shape: ModelShape,
    devices: Devices,
    context_parallel: int,
) -> CostRow:
    """All devices share weights, optimizer states and rows; `context_parallel` of them share each row."""
    flops, tokens = Flops(), 0
    for settings in stages:
        tokens += settings.steps * settings.rows_per_step * settings.length
        flops += run_flops(shape, settings, original_length)
    longest = max(stages, key=lambda settings: settings.length)

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
        f"{settings.steps:,} steps × {settings.rows_per_step} × {format_length(settings.length)}" for settings in stages
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
        devices=devices.count,
        hours=devices.seconds(flops) / devices.count / 3600,
    )


def _evaluation(lengths: Sequence[int], options: EvalConfig, shape: ModelShape, devices: Devices) -> list[CostRow]:
    """One contender on one device: that is how `longrope eval` runs."""
    longest = max(lengths)
    tasks = options.chosen_ruler_tasks
    suites = {
        "perplexity": (options.samples, f"{options.samples} texts", scoring_bytes),
        "passkey": (options.trials, f"{options.trials} texts", reading_bytes),
        "needle": (options.trials, f"{options.trials} documents with needles at all depths", reading_bytes),
        "ruler": (options.trials * len(tasks), f"{len(tasks)} tasks × {options.trials} texts", reading_bytes),
    }
    rows = []
    for name, (count, described, size) in suites.items():
        scored = None if size is scoring_bytes else 0
        flops = sum((forward_flops(shape, length, scored) * count for length in lengths), Flops())
        rows.append(
            _row(
                flops,
                size(shape, longest, devices.itemsize),
                devices,
                search_advice(partial(size, shape), longest, devices),
                stage="evaluate",
                name=name,
                detail=f"{described}, at {len(lengths)} lengths",
                length=longest,
                tokens=count * sum(lengths),
                devices=1,
                hours=devices.seconds(flops) / 3600,
            )
        )
    return rows


_MOST_GPUS = 4096


def assumptions(shape: ModelShape, devices: Devices, config: Any) -> tuple[str, ...]:
    """Everything that decides the numbers and was not counted."""
    gpu = gpu_table()[devices.gpu]
    given = "given" if devices.tflops else gpu["source"]
    said = [
        f"{devices.count} × {gpu['label']}: {devices.peak_tflops:g} TFLOP/s in {devices.dtype} ({given}), "
        f"{devices.memory_bytes / 1e9:g} GB, of which {USABLE:.0%} are planned with",
        f"rate: {devices.mfu:.0%} of the peak for matrices, {devices.attention_mfu:.0%} for attention; assumed, not "
        "measured: take yours from a short run",
        "attention counts the causal half and, where it slides, its window; its kernel makes no T×T matrix "
        "(flash or memory-efficient)",
        "search: one replica of the model on each device; questions at most, without patience or racing; a gradient "
        "counts 3 forwards of matrices and 4.5 of attention; baselines included",
        "fine-tuning: AdamW, 16 bytes of float32 states for each weight, sharded over all devices (FSDP2), bfloat16 "
        "compute, layers computed again, loss in chunks; 4 forwards of matrices and 4.5 of attention; communication "
        "hidden behind compute; documents of the original window are taken as L tokens, others as the whole row",
        "evaluation: one contender on one device; answers of a few tokens are left out",
    ]
    if any(reach is not None for reach in shape.reaches):
        said.append("layers that slide: with sdpa attention they cost as much as full ones, and a mask of T×T bytes")
    if shape.experts:
        said.append("mixture of experts: FLOPs of the chosen experts, memory of all")
    if getattr(config, "quantization_config", None):
        said.append("the checkpoint is quantised: memory is planned for its weights unquantised")
    return tuple(said)


def search_advice(size: Callable[[int, int], Bytes], length: int, devices: Devices) -> str:
    """Search and evaluation hold the model and a whole text on one device. `size`: bytes by length and itemsize."""
    ways = []
    if devices.itemsize > 2 and devices.holds(sum(size(length, 2).values())):
        ways.append("--dtype bfloat16")
    if larger := devices.larger(sum(size(length, devices.itemsize).values())):
        ways.append(f"a GPU such as {' or '.join(larger[:2])}")
    shorter = length // 2
    while shorter >= 1024 and not devices.holds(sum(size(shorter, devices.itemsize).values())):
        shorter //= 2
    if shorter >= 1024:
        ways.append(f"texts of {format_length(shorter)} tokens on this one")
    why = "a replica is not split over devices, so more of them do not help"
    return f"{_needs(size(length, devices.itemsize), devices)}; {why}; what fits: {', '.join(ways) or 'nothing here'}"


def training_advice(
    size: Callable[[int, bool, int], Bytes], devices: Devices, offload: bool, context_parallel: int
) -> str:
    """`size`: bytes by number of GPUs, offload, and devices that share a row."""

    def fits(gpus: int, offload: bool, shared: int) -> bool:
        return devices.holds(sum(size(gpus, offload, shared).values()))

    def sharing(gpus: int, offload: bool) -> int | None:
        """The fewest devices sharing a row with which it fits."""
        choices = (shared for shared in range(1, gpus + 1) if gpus % shared == 0 and shared >= context_parallel)
        return next((shared for shared in choices if fits(gpus, offload, shared)), None)

    count, ways = devices.count, []
    if not offload and fits(count, True, context_parallel):
        ways.append("--offload")
    if shared := sharing(count, offload):
        ways.append(f"context parallel over {shared} devices")
    elif not offload and (shared := sharing(count, True)):
        ways.append(f"--offload and context parallel over {shared} devices")
    gpus = count * 2
    while gpus <= _MOST_GPUS and not fits(gpus, offload, context_parallel):
        gpus *= 2
    if gpus <= _MOST_GPUS:
        ways.append(f"{gpus} GPUs (FSDP)")
    elif not ways:
        gpus = count * 2
        while gpus <= _MOST_GPUS and not sharing(gpus, True):
            gpus *= 2
        if gpus <= _MOST_GPUS:
            ways.append(f"{gpus} GPUs with --offload and context parallel over {sharing(gpus, True)} of them")
    if larger := devices.larger(sum(size(count, offload, context_parallel).values())):
        ways.append(f"a GPU such as {' or '.join(larger[:2])}")
    needed = _needs(size(count, offload, context_parallel), devices)
    return f"{needed}; what fits: {', '.join(ways) or 'nothing here; a shorter length, or LoRA'}"


def _needs(size: Bytes, devices: Devices) -> str:
    total = sum(size.values())
    parts = ", ".join(f"{name} {gigabytes(taken)}" for name, taken in size.items() if taken >= 0.005 * total)
    there = gigabytes(USABLE * devices.memory_bytes)
    return f"needs {gigabytes(total)} GB on a device ({parts}), {there} GB are there"


def gigabytes(size: float) -> str:
    """10^9 bytes: `1,160.3`, `24.2`, `0.0031`."""
    return f"{size / 1e9:,.1f}" if size >= 1e8 else f"{size / 1e9:.2g}"
