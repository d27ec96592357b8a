"""Replicas of a model in Ray workers: the instructions by which a worker loads one, and the evaluator over many.

Workers get instructions, never a live model: each worker loads the checkpoint itself and proves that it is the same
model on the same kind of machine.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longrope.checks import count_in
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling
from longrope.models.config import LayerInputs, LoadOptions
from longrope.models.devices import device_of, is_spread, moved_to_cpu
from longrope.models.fingerprint import fingerprint
from longrope.models.loading import LoadedModel, open_without_tokenizer
from longrope.models.processes import require_alone, sharing
from longrope.provenance import versions
from longrope.rope.scaling import RopeScaling
from longrope.search.evaluator import EvalRequest, EvalResult, EvaluateEach, SerialEvaluator
from longrope.search.ray_evaluator import RayEvaluator, import_ray
from longrope.search.ray_process import RayProcess
from longrope.search.search_data import Texts, objectives_over


@dataclass(frozen=True)
class Replica:
    """The instructions by which a worker loads its replica: `fingerprint` and `numerics` are those of the model here.

    With `context_parallel`, each of that many processes of the worker follows them.
    """

    model: str
    options: LoadOptions
    texts: Texts
    fingerprint: str
    numerics: dict[str, Any]
    layer_inputs: LayerInputs = "keep"
    context_parallel: int = 1

    def __call__(self) -> EvaluateEach:
        """Load the model and return its evaluator; in a process that helps the first one, help until it ends.

        Raises LongRopeError where its results would differ from those of the process that gave the instructions.
        """
        if self.context_parallel == 1:
            return self._evaluator(self._load())
        led = self._led()
        next(led, None)
        return lambda requests: iter(led.send(requests))

    def _led(self) -> Generator[list[EvalResult], Sequence[EvalRequest], None]:
        """Takes requests and gives their results, in the first process; an error ends all of them."""
        with sharing(self.context_parallel, self.options.device) as processes:
            if not processes.leads:
                processes.help(self._load)
                return
            evaluate = self._evaluator(processes.open(self._load))
            requests = yield []
            while True:
                requests = yield list(evaluate(requests))

    def _load(self) -> LoadedModel:
        loaded = open_without_tokenizer(self.model, self.options)  # texts come as token ids
        if fingerprint(loaded.model) != self.fingerprint:
            raise LongRopeError(
                f"{self.model} on {platform.node()} has other weights than the model of this search", code="other-model"
            )
        here = numerics(loaded, self.context_parallel)
        differing = [
            f"{key} {here.get(key)} (not {value})" for key, value in self.numerics.items() if here.get(key) != value
        ]
        if differing:
            raise LongRopeError(
                f"{platform.node()} computes otherwise than this search began: {', '.join(differing)}",
                code="other-numerics",
            )
        return loaded

    def _evaluator(self, loaded: LoadedModel) -> SerialEvaluator:
        scaled = apply_scaling(loaded.model, RopeScaling.original(loaded.geometry))
        return SerialEvaluator(objectives_over(scaled, self.texts, self.layer_inputs))


@contextmanager
def ray_evaluator(
    loaded: LoadedModel,
    texts: Texts,
    *,
    workers: int | None = None,
    address: str | None = None,
    layer_inputs: LayerInputs = "keep",
    context_parallel: int = 1,
    on_note: Callable[[str], None],
) -> Iterator[EvaluateEach]:
    """The results of `SerialEvaluator` over `texts`, bit for bit, from Ray workers with a replica each.

    `workers`: how many (None: as many as the cluster holds); `address`: a cluster to join, else the Ray session that
    this process has, else one is started for the length of the `with` block. `layer_inputs` is where
    gradients have the inputs of layers; `on_note` is told where Ray had to be started again. With `context_parallel`,
    a worker is that many processes, which share every text: the results are then those of one process but for rounding.
    On CUDA every process of a worker has one GPU, and the model here is in main memory meanwhile.

    Raises LongRopeError when Ray is missing, the cluster cannot be joined or is too small, or a worker's model,
    versions or hardware are not those here.
    """
    require_alone("Ray starts the processes of its workers")
    if is_spread(loaded.model):
        raise LongRopeError(
            "Ray gives every process of a worker one GPU, for a model that fits it; this one is spread over several "
            "devices",
            code="invalid-setting",
            hint="leave out `workers` and `ray_address`, or give a shorter `dtype`",
        )
    device = torch.device(loaded.options.device)
    if device.index is not None:
        raise LongRopeError(
            f"Ray hands out the GPUs to workers: expected the device {device.type}, found {device}",
            code="invalid-setting",
        )
    ray = import_ray()
    replica = Replica(
        _anywhere(loaded.name),
        loaded.options,
        texts,
        fingerprint(loaded.model),
        numerics(loaded, context_parallel),
        layer_inputs,
        context_parallel,
    )
    needs: dict[str, Any] = {"gpu": device.type == "cuda", "processes": context_parallel}
    computing: AbstractContextManager[EvaluateEach]
    if address is None and ray.is_initialized():
        computing = RayEvaluator(replica, workers, **needs)
    else:
        computing = RayProcess(replica, workers, **needs, address=address, on_note=on_note)
    with moved_to_cpu(loaded.model), computing as evaluate_each:
        yield evaluate_each


def processes_here(context_parallel: int, workers: int | None, ray_address: str | None) -> int:
    """The number of processes that share texts with this one: 1 where the workers of Ray do the sharing.

    Raises LongRopeError where both torchrun and Ray would start processes, and where `context_parallel` is no number of
    processes.
    """
    count_in("`context_parallel`", context_parallel, 1)
    if workers is None and ray_address is None:
        return context_parallel
    given = "`workers`" if workers is not None else "`ray_address`"
    require_alone(f"{given} has Ray start the processes that compute")
    return 1


def numerics(loaded: LoadedModel, context_parallel: int = 1) -> dict[str, Any]:
    """The dtype, hardware, versions and processes sharing a text that decide the last bits of a loss."""
    model = loaded.model
    device = device_of(model)
    cuda = device.type == "cuda"
    return {
        "dtype": str(model.dtype),
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "attn_implementation": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **({} if context_parallel == 1 else {"context_parallel": context_parallel}),
    }


def _anywhere(name: str) -> str:
    """The model's name, an absolute path where it is a folder, for a process with another working folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
