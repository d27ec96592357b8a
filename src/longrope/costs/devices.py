"""The devices that a plan is made for: a GPU of the table, how many, and the share of its peak rate that is reached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from longrope.errors import LongRopeError
from longrope.models.config import USABLE
from longrope.settings import MOST, Settings

if TYPE_CHECKING:
    from longrope.costs.flops_bytes import Flops

CPU = "cpu"
"""The entry of the table for a machine without a GPU."""
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number by dtype."""


@cache
def gpu_table() -> dict[str, dict[str, Any]]:
    """GPUs by name: label, memory in 10^9 bytes, peak TFLOP/s by dtype, source of the numbers."""
    text = resources.files("longrope").joinpath("assets", "gpus.json").read_text(encoding="utf-8")
    return {entry["name"]: entry for entry in json.loads(text)["gpus"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A connection of GPUs inside a machine, or of machines.

    `rate`: bytes that a GPU sends in a second in one direction; with `shared`, all GPUs of a machine together.
    `latency`: seconds of a hop.
    """

    name: str
    label: str
    rate: float
    latency: float
    shared: bool
    gpus: tuple[str, ...]
    source: str


@cache
def links() -> dict[str, Link]:
    """The links of the table by name."""
    text = resources.files("longrope").joinpath("assets", "links.json").read_text(encoding="utf-8")
    return {
        entry["name"]: Link(
            name=entry["name"],
            label=entry["label"],
            rate=1e9 * entry["gigabytes_per_second"],
            latency=1e-6 * entry["microseconds"],
            shared=entry.get("shared", False),
            gpus=tuple(entry["gpus"]),
            source=entry["source"],
        )
        for entry in json.loads(text)["links"]
    }


def networks() -> list[str]:
    """The names of the links between machines."""
    return [name for name, link in links().items() if not link.gpus or link.shared]


class Devices(Settings):
    """The devices of a plan, and the rates that are assumed on them."""

    gpu: str = "h100"
    """A GPU of the table: a100-80, h100, h200, b200, l40s, rtx4090, mi300x, …; or cpu, a machine without one."""
    count: int = Field(1, ge=1, le=MOST)
    """The number of devices."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype of computing."""
    mfu: float = Field(0.5, gt=0, le=1)
    """The share of the peak rate that matrices reach; assumed, of the order of well-kept kernels on long texts."""
    attention_mfu: float | None = Field(None, gt=0, le=1)
    """The share of the peak rate that attention reaches. Default: 4/5 of that of matrices."""
    tflops: float | None = Field(None, gt=0, le=MOST)
    """Peak TFLOP/s of one device, in place of the table's."""
    network: str = "infiniband"
    """The network between machines: infiniband (400 Gbit/s for each GPU), infiniband-hdr, ethernet (100 Gbit/s for each
    machine), ethernet-25."""
    per_machine: int = Field(8, ge=1, le=MOST)
    """GPUs in a machine, which share texts over its own links."""
    memory: float | None = Field(None, gt=0, le=MOST)
    """GB (10^9 bytes) of one device, in place of the table's."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.gpu not in gpu_table():
            raise LongRopeError(
                f"expected a GPU of {', '.join(gpu_table())}; found {self.gpu!r}",
                code="invalid-setting",
                hint="choose one; for another GPU give its `tflops` and `memory` beside the nearest one",
            )
        if self.network not in networks():
            raise LongRopeError(
                f"expected a network of {', '.join(networks())}; found {self.network!r}", code="invalid-setting"
            )
        return self

    @property
    def label(self) -> str:
        """`8 × NVIDIA H100 SXM 80 GB, bfloat16`; it says where the GPU is the default, or a CPU's rate nominal."""
        name, remark = gpu_table()[self.gpu]["label"], ""
        if self.gpu == CPU:
            name = f"CPU of {self.peak_tflops:g} TFLOP/s"
            remark = "" if self.tflops else " (nominal; give yours as `tflops`)"
        elif "gpu" not in self.model_fields_set:
            remark = " (the default; choose yours with `gpu`)"
        given = "" if self.memory is None else f", taken to have {self.memory:g} GB"
        return f"{self.count} × {name}{given}{remark}, {self.dtype}"

    @property
    def link(self) -> Link:
        """The link between the GPUs of a machine."""
        return next(link for link in links().values() if self.gpu in link.gpus)

    @property
    def noun(self) -> str:
        """`GPU`, or `machine` for CPUs: the device that hours and advice are counted in."""
        return "machine" if self.gpu == CPU else "GPU"

    @property
    def chosen_attention_mfu(self) -> float:
        """The share of the peak rate that attention reaches: the given one, or 4/5 of that of matrices."""
        return 0.8 * self.mfu if self.attention_mfu is None else self.attention_mfu

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEM_SIZES[self.dtype]

    @property
    def peak_tflops(self) -> float:
        """The peak rate of one device, 10^12 FLOP/s."""
        return float(self.tflops or gpu_table()[self.gpu]["tflops"][self.dtype])

    @property
    def memory_bytes(self) -> float:
        """The memory of one device."""
        return 1e9 * float(self.memory or gpu_table()[self.gpu]["memory"])

    def to_json(self) -> dict[str, Any]:
        """The settings with their defaults filled in, and the numbers that follow."""
        return self.model_dump() | {
            "attention_mfu": self.chosen_attention_mfu,
            "peak_tflops": self.peak_tflops,
            "memory_bytes": self.memory_bytes,
        }

    @property
    def usable_bytes(self) -> float:
        """The memory of one device that is planned with."""
        return USABLE * self.memory_bytes

    def holds(self, size: float) -> bool:
        """True if `size` bytes fit on one device."""
        return size <= self.usable_bytes

    def seconds(self, flops: Flops) -> float:
        """The time of `flops` on one device."""
        return (flops.matrices / self.mfu + flops.attention / self.chosen_attention_mfu) / (1e12 * self.peak_tflops)

    def larger(self, size: float) -> list[str]:
        """The GPUs of the table that hold `size` bytes, smallest first."""
        gpus = sorted(gpu_table().items(), key=lambda entry: float(entry[1]["memory"]))
        return [name for name, gpu in gpus if size <= USABLE * 1e9 * gpu["memory"] and name != CPU]
