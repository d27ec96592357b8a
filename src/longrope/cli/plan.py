"""`longrope plan MODEL --target-length N --gpu h100 --gpus 8`: what it will cost, from the config alone."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Group, Parameter

from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.options import ConfigOnly, Json, Model, Options, TargetLength, verb
from longrope.cli.tables.costs import show_costs
from longrope.errors import LongRopeError
from longrope.search.config import METHODS, SearchConfig
from longrope.train.config import FinetuneConfig
from longrope.units import parse_length

DEVICES, SEARCHES = Group("Devices", sort_key=1), Group("Searches", sort_key=1)
TRAINING = "Fine-tuning of your own in place of the papers'"
TRAINING_OPTIONS = Options(
    TRAINING,
    of=FinetuneConfig,
    only=("mix", "length", "steps", "batch", "offload"),
    names={name: f"--train-{name}" for name in ("length", "steps", "batch")},
    defaults={"length": None},
    helps={"length": "Tokens in a row. Default: L'."},
)


@verb
def command(
    model: Model,
    /,
    *,
    target_length: TargetLength,
    gpu: Annotated[
        str, Parameter(group=DEVICES, help="a100-80, h100, h200, b200, l40s, rtx4090, mi300x, cpu, …")
    ] = "h100",
    gpus: Annotated[int, Parameter(group=DEVICES, help="How many of them.")] = 1,
    dtype: Annotated[str, Parameter(group=DEVICES, help="bfloat16, float16 or float32.")] = "bfloat16",
    mfu: Annotated[float, Parameter(group=DEVICES, help="The share of the peak rate that matrices reach.")] = 0.5,
    attention_mfu: Annotated[
        float | None, Parameter(group=DEVICES, help="The same of attention. Default: 4/5 of --mfu.")
    ] = None,
    tflops: Annotated[
        float | None, Parameter(group=DEVICES, help="Peak TFLOP/s of one device, where it is another one.")
    ] = None,
    gpu_memory: Annotated[float | None, Parameter(group=DEVICES, help="GB (10^9 bytes) of one device.")] = None,
    method: Annotated[
        list[str] | None,
        Parameter(group=SEARCHES, metavar="METHOD", help="Only this method. May be repeated. Default: all."),
    ] = None,
    objective: Annotated[str | None, Parameter(group=SEARCHES, help="perplexity or needle.")] = None,
    samples: Annotated[int | None, Parameter(group=SEARCHES, help="Texts that are scored.")] = None,
    training: Annotated[dict[str, Any], TRAINING_OPTIONS],
    context_parallel: Annotated[int, Parameter(group=TRAINING, help="Devices that share a training row.")] = 1,
    load: ConfigOnly,
    as_json: Json = False,
) -> None:
    """Tokens, FLOPs, memory and hours of search, fine-tuning and evaluation, before they are spent."""
    target = parse_length(target_length)
    given = FinetuneConfig(**{"length": target} | training) if training else None
    if given is not None and given.length > target:
        raise LongRopeError(f"expected a --train-length of at most {target}, found {given.length}")
    from longrope.costs.devices import Devices
    from longrope.costs.plan import plan

    quiet_libraries()
    planned = plan(
        model,
        target,
        Devices(
            gpu=gpu,
            count=gpus,
            dtype=dtype,
            mfu=mfu,
            attention_mfu=attention_mfu,
            tflops=tflops,
            memory=gpu_memory,
        ),
        searches=[SearchConfig(method=name, objective=objective, samples=samples) for name in (method or METHODS)],
        trainings=[given] if given else None,
        context_parallel=context_parallel,
        original_length=load.original_length,
        trust_remote_code=load.trust_remote_code,
    )
    if as_json:
        print_json(planned.to_json())
    else:
        show_costs(planned)
