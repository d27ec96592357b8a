"""The layer inputs of a search's gradients, planned: kept, in host memory or made again, as set or as it fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longrope.costs.devices import CPU, Devices
from longrope.errors import LongRopeError
from longrope.models.config import LayerInputs
from longrope.models.layer_inputs import first_that_fits, held_inputs
from longrope.models.model_dims import ModelShape
from longrope.models.peak_bytes import host_bytes, shared_bytes
from longrope.quantities import format_bytes
from longrope.search.config import SearchConfig


@dataclass(frozen=True, slots=True)
class LayerInputsPlan:
    """The way that is planned with, the same in words where inputs are not kept, and a setting that would fit."""

    how: LayerInputs = "keep"
    remark: str = ""
    setting: str = ""
    """Advice where the way that is planned with does not fit and another one does; else empty."""


def plan_layer_inputs(
    shape: ModelShape, length: int, config: SearchConfig, devices: Devices, processes: int
) -> LayerInputsPlan:
    """The layer inputs of gradients over texts of `length` tokens, of which each is shared by `processes` devices.

    Raises LongRopeError for `offload` on a machine without a GPU.
    """
    host = devices.gpu != CPU
    if config.layer_inputs == "offload" and not host:
        raise LongRopeError(
            "`layer_inputs` offload is for GPUs; found a plan for a machine without one", code="invalid-setting"
        )

    def needs(how: LayerInputs) -> float:
        size = shared_bytes(shape, length, devices.itemsize, gradient=True, processes=processes, layer_inputs=how)
        return sum(size.values())

    best = first_that_fits(needs, devices.usable_bytes, host=host)
    how = best if config.layer_inputs == "auto" else config.layer_inputs
    setting = f"`layer_inputs` {best}" if devices.holds(needs(best)) and not devices.holds(needs(how)) else ""
    remark = ""
    if how == "offload":
        taken = format_bytes(host_bytes(shape, math.ceil(length / processes), devices.itemsize))
        remark = f", inputs of layers in {taken} of host memory for each device"
    if how == "recompute":
        remark = f", inputs of layers made again, {held_inputs(shape.layers, how)} of {shape.layers} held at once"
    return LayerInputsPlan(how, remark, setting)
