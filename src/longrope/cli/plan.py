"""`longrope plan MODEL --target-length N --gpu h100 --gpus 8`: its costs, from the config alone."""

from __future__ import annotations

from typing import Annotated, Any

from longrope.cli import options as given
from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.tables.costs import show_costs
from longrope.cli.verb import Options, verb
from longrope.costs.devices import Devices
from longrope.search.config import GRADIENT, METHODS, SearchConfig
from longrope.train.config import FinetuneConfig

DEVICES = Options("Devices", names={"count": "--gpus", "memory": "--gpu-memory"})
TRAINING = Options(
    given.TRAINING,
    of=FinetuneConfig,
    only=("mix", "length", "steps", "batch", "offload"),
    names={name: f"--train-{name}" for name in ("length", "steps", "batch")},
    defaults={"length": None},
    helps={"length": "Tokens in a row. Default: L'."},
    place=3,
)


@verb
def command(
    model: given.Model,
    /,
    *,
    target_length: given.TargetLength,
    devices: Annotated[Devices, DEVICES],
    method: given.Methods = None,
    objective: given.Objective = None,
    samples: given.Samples = None,
    layer_inputs: given.LayerInputsOfPlan = "auto",
    training: Annotated[dict[str, Any], TRAINING],
    context_parallel: given.ContextParallel = 1,
    load: given.ConfigOnly,
    as_json: given.Json = False,
) -> None:
    """Tokens, FLOPs, memory and hours of search, fine-tuning and evaluation, before they are spent."""
    from longrope.costs.plan import plan

    quiet_libraries()
    settings: dict[str, Any] = {"objective": objective, "samples": samples}
    more = {name: {"layer_inputs": layer_inputs} for name in GRADIENT}
    planned = plan(
        model,
        target_length,
        devices,
        searches=[SearchConfig(**settings | {"method": name} | more.get(name, {})) for name in (method or METHODS)],
        trainings=[FinetuneConfig(**{"length": target_length} | training)] if training else None,
        context_parallel=context_parallel,
        original_length=load.original_length,
        trust_remote_code=load.trust_remote_code,
    )
    print_json(planned.to_json()) if as_json else show_costs(planned)
