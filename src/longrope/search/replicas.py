"""Replicas of a model in Ray workers: the instructions by which a worker loads one, and the evaluator over many.

Workers get instructions, never a live model: each worker loads the checkpoint itself and proves that it is the same
model on the same kind of machine.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling
from longrope.models.config import LayerInputs, LoadOptions
from longrope.models.devices import device_of, is_spread, moved_to_cpu
from longrope.models.fingerprint import fingerprint
from longrope.models.loading import LoadedModel, open_model
from longrope.models.shared_texts import sharing_processes
from longrope.provenance import versions
from longrope.rope.scaling import RopeScaling
from longrope.search.evaluator import EvaluateEach, SerialEvaluator
from longrope.search.ray_evaluator import RayEvaluator, import_ray
from longrope.search.ray_process import RayProcess
from longrope.search.search_data import Texts, objectives_over


@dataclass(frozen=True)
class Replica:
    """The instructions by which a worker loads its replica: `fingerprint` and `numerics` are those of the model
    here."""

    model: str
    options: LoadOptions
    texts: Texts
    fingerprint: str
    numerics: dict[str, Any]
    layer_inputs: LayerInputs = "keep"

    def __call__(self) -> SerialEvaluator:
        """Load the model and return its evaluator. Raises LongRopeError where its results would differ from those of
        this process."""
        loaded = open_model(self.model, options=self.options)
        if fingerprint(loaded.model) != self.fingerprint:
            raise LongRopeError(
                f"{self.model} on {platform.node()} has other weights than the model of this search", code="other-model"
            )
        here = numerics(loaded)
        differing = [
            f"{key} {here.get(key)} (not {value})" for key, value in self.numerics.items() if here.get(key) != value
        ]
        if differing:
            raise LongRopeError(
                f"{platform.node()} computes otherwise than this search began: {', '.join(differing)}",
                code="other-numerics",
            )
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
    on_note: Callable[[str], None],
) -> Iterator[EvaluateEach]:
    """The results of `SerialEvaluator` over `texts`, bit for bit, from Ray workers with a replica each.

    `workers`: how many (None: as many as the cluster holds); `address`: a cluster to join, else the Ray session that
    this process has, else one is started for the length of the `with` block. `layer_inputs` is where
    gradients have the inputs of layers; `on_note` is told where Ray had to be started again. On CUDA every worker has
    one GPU, and the model here is in main memory meanwhile.

    Raises LongRopeError when Ray is missing, the cluster cannot be joined or is too small, or a worker's model,
    versions or hardware are not those here.
    """
    refuse_ray(sharing_processes(loaded.model), workers, address)
    if is_spread(loaded.model):
        raise LongRopeError(
            "Ray gives every worker one GPU, for a model that fits it; this one is spread over several devices",
            code="invalid-setting",
            hint="leave out `workers`, or give a shorter `dtype`",
        )
    device = torch.device(loaded.options.device)
    if device.index is not None:
        raise LongRopeError(
            f"Ray hands out the GPUs to workers: expected the device {device.type}, found {device}",
            code="invalid-setting",
        )
    ray = import_ray()
    replica = Replica(
        _anywhere(loaded.name), loaded.options, texts, fingerprint(loaded.model), numerics(loaded), layer_inputs
    )
    gpu = device.type == "cuda"
    computing: AbstractContextManager[EvaluateEach]
    if address is None and ray.is_initialized():
        computing = RayEvaluator(replica, workers, gpu=gpu)
    else:
        computing = RayProcess(replica, workers, gpu=gpu, address=address, on_note=on_note)
    with moved_to_cpu(loaded.model), computing as evaluate_each:
        yield evaluate_each


def refuse_ray(context_parallel: int, workers: int | None, ray_address: str | None) -> None:
    """Raise LongRopeError where texts that processes share would be computed in Ray workers."""
    if context_parallel > 1 and (workers is not None or ray_address is not None):
        given = "`workers`" if workers is not None else "`ray_address`"
        raise LongRopeError(
            f"{given} gives every Ray worker whole texts, and `context_parallel` {context_parallel} shares each text "
            "among processes: expected one of them, found both",
            code="not-together",
            hint="leave one of them out",
        )


def numerics(loaded: LoadedModel) -> dict[str, Any]:
    """The dtype, hardware, versions and processes sharing a text that decide the last bits of a loss."""
    model = loaded.model
    device = device_of(model)
    cuda = device.type == "cuda"
    processes = sharing_processes(model)
    return {
        "dtype": str(model.dtype),
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "attn_implementation": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **({} if processes == 1 else {"context_parallel": processes}),
    }


def _anywhere(name: str) -> str:
    """The model's name, an absolute path where it is a folder, for a process with another working folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
