"""The texts of a cost plan: its assumptions, and advice where something does not fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from longrope.costs.context_parallel import LINK_SHARE, fewest_sharing
from longrope.costs.devices import CPU, Devices, gpu_table, links
from longrope.costs.layer_inputs import LayerInputsPlan
from longrope.models.config import USABLE
from longrope.models.devices import FOR_WEIGHTS
from longrope.models.model_dims import ModelShape
from longrope.models.peak_bytes import Bytes, gradient_bytes, scoring_bytes, shared_bytes
from longrope.units import format_length

_MOST_GPUS = 4096
_IN_A_MACHINE = (2, 4, 8)
_OF_LAYERS = ("weights", "inputs of the layers", "keys and values")
"""The purposes of bytes that lie on the device of their layer."""
_SEARCH_ALONE, _SHOWN = 8, 512
"""Ratios to the window that the model has: up to the first a search may do without training, up to the second LongRoPE
went."""
FIRST_TARGETS = {"longrope2": 16, "longrope": 32}
"""The recipes of the papers, with the first target of each as a multiple of the original window."""


def beyond_searching(original_length: int, context_length: int, target_length: int) -> str:
    """A remark on targets for which a search alone is not enough; empty below them.

    They are counted from the model's window of `context_length` tokens. A recipe whose first target lies inside it is
    not named.
    """
    ratio = target_length / context_length
    if ratio <= _SEARCH_ALONE:
        return ""
    if ratio <= _SHOWN:
        names = [name for name, times in FIRST_TARGETS.items() if times * original_length > context_length]
        how = f" (extend --recipe {' or '.join(names)})" if names else ""
        return (
            f" At {ratio:.3g} times the window a search alone is a beginning: above {_SEARCH_ALONE} times the papers "
            f"train too{how}."
        )
    return (
        f" At {ratio:.3g} times the window nobody has shown that it works: the papers reach {_SHOWN} times, and train."
    )


def text_advice(
    shape: ModelShape,
    length: int,
    devices: Devices,
    gradient: bool,
    context_parallel: int,
    inputs: LayerInputsPlan | None = None,
) -> str:
    """Advice for texts of `length` tokens that do not fit, each shared by `context_parallel` devices."""
    inputs = inputs or LayerInputsPlan()
    size = partial(gradient_bytes, layer_inputs=inputs.how) if gradient else scoring_bytes
    way: dict[str, Any] = {"gradient": gradient, "layer_inputs": inputs.how}
    sharing = fewest_sharing(shape, length, devices, **way)
    wanted = sharing if sharing is not None and sharing > context_parallel else None
    found = shared_bytes(shape, length, devices.itemsize, processes=context_parallel, **way)
    return search_advice(partial(size, shape), length, devices, found, wanted, inputs.setting)


def search_advice(
    size: Callable[[int, int], Bytes],
    length: int,
    devices: Devices,
    found: Bytes,
    sharing: int | None = None,
    setting: str = "",
) -> str:
    """Advice for a search or evaluation that does not fit, with `found` on a device.

    `size`: bytes by length and itemsize, of a text that is not shared. `sharing`: devices that share the text with
    which it fits. `setting`: one of the job with which it fits.
    """
    ways = [setting] if setting else []
    if sharing is not None:
        ways.append(f"every text shared by {sharing} {devices.noun}s (`context_parallel` {sharing})")
    if devices.itemsize > 2 and devices.holds(sum(size(length, 2).values())):
        ways.append("`dtype` bfloat16")
    if larger := devices.larger(sum(size(length, devices.itemsize).values())):
        ways.append(f"a GPU such as {' or '.join(larger[:2])}")
    shorter = length // 2
    while shorter >= 1024 and not devices.holds(sum(size(shorter, devices.itemsize).values())):
        shorter //= 2
    if shorter >= 1024:
        ways.append(f"texts of {format_length(shorter)} tokens on this one")
    parts = size(length, devices.itemsize)
    if (gpus := _spread(parts, devices)) is not None:
        # The device auto spreads a model whose weights are too large, whatever the text.
        large = parts["weights"] > FOR_WEIGHTS * devices.memory_bytes
        how = "--device auto" if large else 'in Python: a model loaded with device_map="balanced"'
        ways.append(f"the layers spread over {gpus} GPUs of a machine ({how}), of which one works at a time")
    return f"{_needs(found, devices)}; what fits: {', '.join(ways) or 'nothing here'}"


def _spread(parts: Bytes, devices: Devices) -> int | None:
    """The fewest GPUs of one machine over which a device map makes it fit: layers and what they keep are shared out,
    the activations of the one at work are not. None where no number does.
    """
    if devices.gpu == CPU:
        return None
    shared = sum(size for name, size in parts.items() if name in _OF_LAYERS)
    rest = sum(parts.values()) - shared
    return next((gpus for gpus in _IN_A_MACHINE if devices.holds(shared / gpus + rest)), None)


def training_advice(
    size: Callable[[int, bool, int], Bytes], devices: Devices, offload: bool, context_parallel: int
) -> str:
    """Advice for a training that does not fit.

    `size`: bytes by number of GPUs, offload, and devices that share a row.
    """

    def fits(gpus: int, offload: bool, shared: int) -> bool:
        return devices.holds(sum(size(gpus, offload, shared).values()))

    def sharing(gpus: int, offload: bool) -> int | None:
        """The fewest devices sharing a row with which it fits."""
        choices = (shared for shared in range(1, gpus + 1) if gpus % shared == 0 and shared >= context_parallel)
        return next((shared for shared in choices if fits(gpus, offload, shared)), None)

    count, ways = devices.count, []
    if not offload and fits(count, True, context_parallel):
        ways.append("`offload`")
    if shared := sharing(count, offload):
        ways.append(f"context parallel over {shared} devices")
    elif not offload and (shared := sharing(count, True)):
        ways.append(f"`offload` and context parallel over {shared} devices")
    gpus = count * 2
    while gpus <= _MOST_GPUS and not fits(gpus, offload, context_parallel):
        gpus *= 2
    if gpus <= _MOST_GPUS:
        ways.append(f"{gpus} {devices.noun}s (FSDP)")
    elif not ways:
        gpus = count * 2
        while gpus <= _MOST_GPUS and not sharing(gpus, True):
            gpus *= 2
        if gpus <= _MOST_GPUS:
            ways.append(
                f"{gpus} {devices.noun}s with `offload` and context parallel over {sharing(gpus, True)} of them"
            )
    if larger := devices.larger(sum(size(count, offload, context_parallel).values())):
        ways.append(f"a GPU such as {' or '.join(larger[:2])}")
    needed = _needs(size(count, offload, context_parallel), devices)
    return f"{needed}; what fits: {', '.join(ways) or 'nothing here; a shorter length, or LoRA'}"


def _needs(size: Bytes, devices: Devices) -> str:
    total = sum(size.values())
    parts = ", ".join(f"{name} {gigabytes(taken)}" for name, taken in size.items() if taken >= 0.005 * total)
    there = gigabytes(devices.usable_bytes)
    return f"needs {gigabytes(total)} GB on a device ({parts}), {there} GB are there"


def gigabytes(size: float) -> str:
    """10^9 bytes: `1,160.3`, `24.2`, `0.0031`."""
    return f"{size / 1e9:,.1f}" if size >= 1e8 else f"{size / 1e9:.2g}"


def assumptions(shape: ModelShape, devices: Devices, config: Any, context_parallel: int = 1) -> tuple[str, ...]:
    """The assumptions behind the numbers of a plan, one line each."""
    gpu = gpu_table()[devices.gpu]
    source = "given" if devices.tflops else gpu["source"]
    lines = [
        f"{devices.count} × {gpu['label']}: {devices.peak_tflops:g} TFLOP/s in {devices.dtype} ({source}), "
        f"{devices.memory_bytes / 1e9:g} GB, of which the plan uses {USABLE:.0%}",
        f"rate: {devices.mfu:.0%} of the peak for matrices, {devices.chosen_attention_mfu:.0%} for attention; "
        "assumed, not measured: a short run of yours gives the real one",
        "attention counts the causal half and, where it slides, its window; its kernel makes no T×T matrix "
        "(flash or memory-efficient)",
        "search: one replica of the model on each device, or on those that share texts; evaluations at most, without "
        "patience or racing; a gradient counts 3 forwards of matrices (2 of the head) and 4.5 of attention, almost one "
        "more of both where inputs of layers are made again; copies to host memory are hidden behind computing; "
        "baselines included where they are scored",
        "fine-tuning: AdamW, 16 bytes of float32 states for each weight, sharded over all devices (FSDP2), bfloat16 "
        "compute, layers computed again, loss in chunks; 4 forwards of matrices and 4.5 of attention; communication "
        "hidden behind compute; documents of the original window are taken as L tokens, others as the whole row",
        "evaluation: one method on one device; answers of a few tokens are left out",
    ]
    if context_parallel > 1:
        inside, network = devices.link, links()[devices.network]
        over = inside.label if context_parallel <= devices.per_machine else f"{inside.label} and {network.label}"
        groups = devices.count // context_parallel
        lines.append(
            f"every text and every row of training is shared by {context_parallel} {devices.noun}s, each with a whole "
            f"model in searches and evaluations, over {over} at {LINK_SHARE:.0%} of the rate; computing waits for the "
            "exchange of keys and values"
            + (f"; a search has {groups} such replicas (`workers` {groups})" if groups > 1 else "")
        )
    if any(reach is not None for reach in shape.reaches):
        lines.append("layers that slide: with sdpa attention they cost as much as full ones, and a mask of T×T bytes")
    if shape.experts:
        lines.append("mixture of experts: FLOPs of the chosen experts, memory of all")
    if getattr(config, "quantization_config", None):
        lines.append("the checkpoint is quantised: memory is planned for its weights unquantised")
    return tuple(lines)
