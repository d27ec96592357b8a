"""Where the gradients of a search have the inputs of layers: as set, or the first way that fits the memory here."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from longrope.errors import LongRopeError
from longrope.models.config import USABLE, LayerInputs
from longrope.models.devices import device_of, free_bytes
from longrope.models.layer_inputs import first_that_fits, held_inputs
from longrope.models.loading import LoadedModel
from longrope.models.model_dims import ModelShape, shape_of
from longrope.models.peak_bytes import host_bytes, shared_bytes
from longrope.quantities import format_bytes
from longrope.search.config import SearchConfig


def choose_layer_inputs(
    loaded: LoadedModel, length: int, config: SearchConfig, workers: int = 1, shares: int = 1
) -> tuple[LayerInputs, str]:
    """The place of layer inputs for texts of `length` tokens, and the choice in words.

    Each text is shared by `shares` processes, and those of `workers` share a CPU's memory. Of a model that lies on
    several GPUs the inputs do, too. Raises LongRopeError for `offload` where host memory is the device's own.
    """
    devices = {tensor.device for tensor in loaded.model.parameters()} - {torch.device("meta"), torch.device("cpu")}
    devices = devices or {device_of(loaded.model)}
    host = all(device.type == "cuda" for device in devices)
    if config.layer_inputs == "offload" and not host:
        raise LongRopeError(
            "`layer_inputs` offload moves what a GPU holds into host memory: here there is nothing to move, on "
            f"{', '.join(sorted({device.type for device in devices}))}",
            code="invalid-setting",
            hint="use recompute",
        )
    if config.layer_inputs != "auto":
        return config.layer_inputs, f"layer inputs: {config.layer_inputs}, as asked"
    free = [free_bytes(device) for device in devices]
    room = None if None in free else min(filter(None, free), default=0)
    try:
        shape = shape_of(loaded.name, loaded.model)
    except LongRopeError:
        room = None
    if room is None:
        return "keep", "layer inputs: keep; what they need cannot be planned here"
    if not host:
        room //= workers * shares
    itemsize = loaded.model.dtype.itemsize
    needs = partial(_needs, shape, length, itemsize, len(devices), shares)
    in_host = shares * host_bytes(shape, math.ceil(length / shares), itemsize)  # of all, which may be on one machine
    host = host and in_host <= USABLE * (free_bytes(torch.device("cpu")) or 0)
    how = first_that_fits(needs, USABLE * room, host=host)
    return how, f"layer inputs: {how}" + ("" if how == "keep" else f", {_why(how, shape, needs, room, in_host)}")


def _why(how: LayerInputs, shape: ModelShape, needs: Callable[[LayerInputs], float], room: int, in_host: int) -> str:
    """What they take, and what all of them on the device would, where `room` bytes are free."""
    place = (
        f"in {format_bytes(in_host)} of host memory"
        if how == "offload"
        else f"{held_inputs(shape.layers, how)} of {shape.layers} held at once"
    )
    short = "" if needs(how) <= USABLE * room else ", which is too few"
    return (
        f"{place}: a gradient takes {format_bytes(needs(how))} beside the weights, {format_bytes(needs('keep'))} with "
        f"all of them on the device, where {format_bytes(room)} are free{short}"
    )


def _needs(shape: ModelShape, length: int, itemsize: int, devices: int, shares: int, how: LayerInputs) -> float:
    """The bytes of a gradient on one of `devices`, beside the weights, which are there."""
    parts = shared_bytes(shape, length, itemsize, gradient=True, processes=shares, layer_inputs=how)
    inputs = parts["inputs of the layers"]
    return sum(parts.values()) - parts["weights"] - inputs + inputs / devices
