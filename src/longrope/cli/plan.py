"""`longrope plan MODEL --target-length N --gpu h100 --gpus 8`: what it will cost, from the config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from longrope.cli.common import Json, Model, OriginalLength, RemoteCode, output, print_json, quiet_libraries, table
from longrope.errors import LongRopeError
from longrope.units import format_length, parse_length

if TYPE_CHECKING:
    from longrope.costs.plan import CostPlan
    from longrope.train.config import FinetuneConfig

TargetLength = Annotated[str, typer.Option("--target-length", help="The new window L' in tokens: 4096, 128k, 2M.")]
Gpu = Annotated[str, typer.Option("--gpu", help="a100-80, h100, h200, b200, l40s, rtx4090, mi300x, cpu, …")]
Gpus = Annotated[int, typer.Option("--gpus", min=1, help="How many of them.")]
PlanDtype = Annotated[str | None, typer.Option("--dtype", help="bfloat16, float16 or float32. Default: bfloat16.")]
Mfu = Annotated[float, typer.Option("--mfu", help="The share of the peak rate that matrices reach.")]
AttentionMfu = Annotated[
    float | None, typer.Option("--attention-mfu", help="The same of attention. Default: 4/5 of --mfu.")
]
Tflops = Annotated[float | None, typer.Option("--tflops", help="Peak TFLOP/s of one device, where it is another one.")]
GpuMemory = Annotated[float | None, typer.Option("--gpu-memory", help="GB (10^9 bytes) of one device.")]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="Only this search method. May be repeated. Default: all.")
]
Objective = Annotated[str | None, typer.Option("--objective", help="Searches: perplexity or needle.")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Searches: texts that are scored.")]
Mix = Annotated[str | None, typer.Option("--mix", help="Fine-tuning of your own instead of the papers': its mix.")]
TrainLength = Annotated[str | None, typer.Option("--train-length", help="… the tokens of a row. Default: L'.")]
TrainSteps = Annotated[int | None, typer.Option("--train-steps", min=1, help="… its optimizer steps. Default: 400.")]
TrainBatch = Annotated[int | None, typer.Option("--train-batch", min=1, help="… its rows of a step.")]
Offload = Annotated[bool, typer.Option("--offload", help="… layer inputs in host memory.")]
ContextParallel = Annotated[int, typer.Option("--context-parallel", min=1, help="Devices that share a training row.")]


def command(
    model: Model,
    target_length: TargetLength,
    gpu: Gpu = "h100",
    gpus: Gpus = 1,
    dtype: PlanDtype = None,
    mfu: Mfu = 0.5,
    attention_mfu: AttentionMfu = None,
    tflops: Tflops = None,
    gpu_memory: GpuMemory = None,
    method: Methods = None,
    objective: Objective = None,
    samples: Samples = None,
    mix: Mix = None,
    train_length: TrainLength = None,
    train_steps: TrainSteps = None,
    train_batch: TrainBatch = None,
    offload: Offload = False,
    context_parallel: ContextParallel = 1,
    original_length: OriginalLength = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Tokens, FLOPs, memory and hours of search, fine-tuning and evaluation, before they are spent."""
    target = parse_length(target_length)
    from longrope.costs.devices import Devices
    from longrope.costs.plan import plan
    from longrope.search.config import METHODS, SearchConfig
    from longrope.train.config import FinetuneConfig

    quiet_libraries()
    trainings: list[FinetuneConfig] | None = None
    if offload or any(value is not None for value in (mix, train_length, train_steps, train_batch)):
        settings = FinetuneConfig(
            length=target if train_length is None else parse_length(train_length),
            mix=mix or "long",
            steps=train_steps or 400,
            batch=train_batch,
            offload=offload,
        )
        if settings.length > target:
            raise LongRopeError(f"expected a --train-length of at most {target}, found {settings.length}")
        trainings = [settings]
    planned = plan(
        model,
        target,
        Devices(
            gpu=gpu,
            count=gpus,
            dtype=dtype or "bfloat16",
            mfu=mfu,
            attention_mfu=0.8 * mfu if attention_mfu is None else attention_mfu,
            tflops=tflops,
            memory=gpu_memory,
        ),
        searches=[SearchConfig(method=name, objective=objective, samples=samples) for name in (method or METHODS)],
        trainings=trainings,
        context_parallel=context_parallel,
        original_length=parse_length(original_length) if original_length else None,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(planned.to_json())
    else:
        show(planned)


def show(planned: CostPlan) -> None:
    """Print a plan: a table, what does not fit, and the assumptions."""
    from longrope.costs.plan import gigabytes

    shape, devices = planned.shape, planned.devices
    active = shape.active_weights + shape.head_weights
    output.print(
        f"{planned.model}: {shape.parameters:,} weights, {active:,} multiplied with a token; "
        f"{format_length(planned.original_length)} -> {format_length(planned.target_length)} tokens"
    )
    rows = table(
        f"on {devices.count} × {devices.gpu}, {devices.dtype}",
        ["", "tokens", "FLOPs", "matrices", "attention", "GB a device", "fits", "hours", "devices", ""],
    )
    rows.columns[-1].justify = "left"
    for row in planned.rows:
        flops = row.matrix_flops + row.attention_flops
        rows.add_row(
            f"{row.stage} {row.name}",
            f"{row.tokens:.3g}",
            f"{flops:.3g}",
            f"{row.matrix_flops / flops:.0%}",
            f"{row.attention_flops / flops:.0%}",
            gigabytes(row.peak_bytes),
            "yes" if row.fits else "NO",
            hours(row.hours),
            str(row.devices),
            row.detail,
        )
    output.print(rows)
    misfits: dict[str, list[str]] = {}
    for row in planned.rows:
        if not row.fits:
            misfits.setdefault(row.advice, []).append(f"{row.stage} {row.name}")
    for advice, names in misfits.items():
        output.print(f"does not fit: {', '.join(names)}: {advice}")
    output.print("assumed:")
    for line in planned.assumptions:
        output.print(f"- {line}")


def hours(value: float) -> str:
    """`0.02`, `3.1`, `1,240`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
