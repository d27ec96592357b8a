"""What a plan is made for: a GPU of the table, how many of them, and which share of its peak rate is reached."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from longrope.costs.flops_bytes import Flops
from longrope.errors import LongRopeError

ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
USABLE = 0.9
"""The share of a device's memory that is planned with; the rest is the driver's, the kernels' and fragmentation."""


@cache
def gpu_table() -> dict[str, dict[str, Any]]:
    """GPUs by name: label, memory in 10^9 bytes, peak TFLOP/s by dtype, source."""
    text = resources.files("longrope").joinpath("assets", "gpus.json").read_text(encoding="utf-8")
    return {entry["name"]: entry for entry in json.loads(text)["gpus"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """`count` GPUs named in `gpu_table`, their factors in `dtype`.

    `mfu` and `attention_mfu`: the share of the peak rate that matrices and attention reach; assumptions, of the order
    of what well-kept kernels reach on long texts. `tflops` and `memory` (10^9 bytes) replace those of the table.

    Raises LongRopeError for an unknown name or a number that cannot be.
    """

    gpu: str = "h100"
    count: int = 1
    dtype: str = "bfloat16"
    mfu: float = 0.5
    attention_mfu: float = 0.4
    tflops: float | None = field(default=None)
    memory: float | None = field(default=None)

    def __post_init__(self) -> None:
        if self.gpu not in gpu_table():
            raise LongRopeError(
                f"expected a GPU of {', '.join(gpu_table())}; found {self.gpu!r}: choose one and give --tflops and "
                "--gpu-memory of yours"
            )
        if self.count < 1:
            raise LongRopeError(f"expected at least 1 GPU, found {self.count}")
        if self.dtype not in ITEM_SIZES:
            raise LongRopeError(f"expected a dtype of {', '.join(ITEM_SIZES)}; found {self.dtype!r}")
        for name in ("mfu", "attention_mfu"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise LongRopeError(f"expected {name} above 0, up to 1; found {getattr(self, name)}")
        for name in ("tflops", "memory"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise LongRopeError(f"expected a positive {name}, found {value}")

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEM_SIZES[self.dtype]

    @property
    def peak_tflops(self) -> float:
        """Of one device, 10^12 FLOP/s."""
        return float(self.tflops or gpu_table()[self.gpu]["tflops"][self.dtype])

    @property
    def memory_bytes(self) -> float:
        """Of one device."""
        return 1e9 * float(self.memory or gpu_table()[self.gpu]["memory"])

    def holds(self, size: float) -> bool:
        """Whether `size` bytes fit on one device."""
        return size <= USABLE * self.memory_bytes

    def seconds(self, flops: Flops) -> float:
        """On one device."""
        return (flops.matrices / self.mfu + flops.attention / self.attention_mfu) / (1e12 * self.peak_tflops)

    def larger(self, size: float) -> list[str]:
        """The GPUs of the table that hold `size` bytes, smallest first."""
        gpus = sorted(gpu_table().items(), key=lambda entry: float(entry[1]["memory"]))
        return [name for name, gpu in gpus if size <= USABLE * 1e9 * gpu["memory"] and name != "cpu"]
