"""Search workers for a subject: what every Ray actor is told, so that its replica answers as the model here would.

A recipe travels, never a live model: each worker loads the checkpoint itself and proves that it is the same one.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longrope.errors import LongRopeError
from longrope.models.fingerprint import fingerprint
from longrope.models.install import install
from longrope.pipeline.subject import ModelOptions, Subject, open_model
from longrope.pipeline.texts import Texts, objectives_over
from longrope.provenance import versions
from longrope.rope.scaling import RopeScaling
from longrope.search.evaluators import SerialEvaluator
from longrope.search.ray_evaluator import RayEvaluator, ray_session


@dataclass(frozen=True)
class Recipe:
    """How a worker makes its replica. `fingerprint` and `numerics` are those of the model here."""

    model: str
    options: ModelOptions
    texts: Texts
    fingerprint: str
    numerics: dict[str, Any]

    def __call__(self) -> SerialEvaluator:
        """The evaluator of a new replica. Raises LongRopeError when its answers would be others than here."""
        subject = open_model(self.model, self.options)
        if fingerprint(subject.model) != self.fingerprint:
            raise LongRopeError(f"{self.model} on {platform.node()} has other weights than the model of this search")
        here = numerics(subject)
        differing = [
            f"{key} {here.get(key)} (not {value})" for key, value in self.numerics.items() if here.get(key) != value
        ]
        if differing:
            raise LongRopeError(f"{platform.node()} computes otherwise than this search began: {', '.join(differing)}")
        installed = install(subject.model, RopeScaling.original(subject.geometry))
        return SerialEvaluator(objectives_over(installed, self.texts))


@contextmanager
def ray_evaluator(
    subject: Subject, texts: Texts, *, workers: int | None = None, address: str | None = None
) -> Iterator[RayEvaluator]:
    """What answers as `SerialEvaluator` over `texts` would, bit for bit, from Ray workers with a replica each.

    `workers`: how many (None: as many as the cluster holds); `address`: a cluster to join, else one is started here for
    the length of the `with` block. On CUDA every worker has one GPU, and the model here waits in main memory meanwhile.

    Raises LongRopeError when Ray is missing, the cluster cannot be joined or is too small, or a worker's model,
    versions or hardware are not those here.
    """
    device = torch.device(subject.options.device)
    if device.index is not None:
        raise LongRopeError(f"Ray hands out the GPUs to workers: expected the device {device.type}, found {device}")
    recipe = Recipe(_anywhere(subject.name), subject.options, texts, fingerprint(subject.model), numerics(subject))
    evaluator = RayEvaluator(recipe, workers, gpu=device.type == "cuda")
    cpus = None if workers is None else workers * torch.get_num_threads()
    with _parked(subject), ray_session(address, cpus), evaluator:
        yield evaluator


def numerics(subject: Subject) -> dict[str, Any]:
    """What decides the last bits of a loss."""
    model = subject.model
    cuda = model.device.type == "cuda"
    return {
        "dtype": str(model.dtype),
        "device": model.device.type,
        "hardware": torch.cuda.get_device_name(model.device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "attn_implementation": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


@contextmanager
def _parked(subject: Subject) -> Iterator[None]:
    """The model in main memory for a while: its place on the GPU is a worker's."""
    device = subject.model.device
    subject.model.to("cpu")
    torch.cuda.empty_cache()  # nothing without CUDA
    try:
        yield
    finally:
        subject.model.to(device)


def _anywhere(name: str) -> str:
    """A model's name for a process with another working folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name
