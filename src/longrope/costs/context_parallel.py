"""The costs of texts that P devices share (`models/context_parallel.py`): bytes on each, and time with its exchange.

Every layer gathers the keys and values of the whole text on every device, S = a·T·(k + v) bytes, in a forward once; a
gradient gathers them twice (its layers are computed again) and scatters their gradient back. Nothing of the exchange is
hidden behind compute: a layer waits for it. An all-gather is NCCL's ring: a device sends S·(P − 1)/P bytes over the
link of its machine; where there are several machines, as many rings as a machine has GPUs cross the network, and each
brings its share of S. Every one of the P − 1 steps costs the latency of a hop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from longrope.costs.devices import CPU, Devices, links
from longrope.costs.flops_bytes import forward_flops, gradient_flops
from longrope.models.config import LayerInputs
from longrope.models.layer_inputs import layers_run_again
from longrope.models.model_dims import ModelShape
from longrope.models.peak_bytes import row_bytes, shared_bytes

LINK_SHARE = 0.8
"""The share of a link's rate that is reached: NCCL's own numbers for NVLink, 360 of 450 GB/s on Hopper and 720 of 900
on Blackwell (`nvlinkBws` in its src)."""


@dataclass(frozen=True, slots=True)
class SharedTime:
    """Seconds for a text on the devices that share it: computing, and waiting for the exchange."""

    compute: float
    exchange: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange

    def __add__(self, other: SharedTime) -> SharedTime:
        return SharedTime(self.compute + other.compute, self.exchange + other.exchange)

    def __mul__(self, texts: int) -> SharedTime:
        return SharedTime(self.compute * texts, self.exchange * texts)


def shared_seconds(
    shape: ModelShape,
    length: int,
    devices: Devices,
    *,
    gradient: bool,
    processes: int,
    scored: int | None = None,
    layer_inputs: LayerInputs = "keep",
) -> SharedTime:
    """The time of scoring one text of `length` tokens, or of its gradient, on `processes` devices that share it.

    `scored`: tokens whose loss is taken (default: all).
    """
    flops, exchanges = forward_flops(shape, length, scored), float(len(shape.reaches))
    if gradient:  # layers that run once more gather once more
        again = layers_run_again(shape.layers, layer_inputs) / shape.layers
        flops, exchanges = gradient_flops(shape, length, scored, layer_inputs), (3 + again) * exchanges
    each = exchange_seconds(row_bytes(shape, length, devices.itemsize), devices, processes)
    return SharedTime(devices.seconds(flops) / processes, exchanges * each)


def exchange_seconds(size: float, devices: Devices, processes: int) -> float:
    """The time in which `processes` devices gather `size` bytes, of which each has its share, on all of them."""
    if processes == 1:
        return 0.0
    inside, network = devices.link, links()[devices.network]
    if devices.gpu == CPU:
        inside, together = network, 1
    else:
        together = min(processes, devices.per_machine)
    machines = math.ceil(processes / together)
    seconds = size * (processes - 1) / processes / (LINK_SHARE * inside.rate)
    if machines > 1:
        rate = network.rate * (1 if network.shared else together)
        seconds = max(seconds if together > 1 else 0.0, size * (machines - 1) / machines / (LINK_SHARE * rate))
    crossing = machines if machines > 1 else 0
    # The early and the late pieces of all processes are gathered one after the other.
    return seconds + 2 * ((processes - 1 - crossing) * inside.latency + crossing * network.latency)


def fewest_sharing(
    shape: ModelShape,
    length: int,
    devices: Devices,
    *,
    gradient: bool,
    most: int = 4096,
    layer_inputs: LayerInputs = "keep",
) -> int | None:
    """The fewest devices, a power of 2, that share a text so that it fits each of them; None where no number does."""
    count = 1
    while count <= min(most, max(1, length // 2)):
        way: dict[str, Any] = {"gradient": gradient, "layer_inputs": layer_inputs}
        found = shared_bytes(shape, length, devices.itemsize, processes=count, **way)
        if devices.holds(sum(found.values())):
            return count
        count *= 2
    return None
