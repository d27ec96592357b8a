"""The devices of this machine, and where a model lies: on one of them, or spread over several by accelerate's map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes, get_balanced_memory, get_max_memory
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longrope.errors import LongRopeError, one_line
from longrope.quantities import format_bytes

AUTO = "auto"
"""The name of the best device that is here: CUDA, XPU or another accelerator of PyTorch with float64, else the CPU."""
FOR_WEIGHTS = 0.8
"""The share of free memory that weights may take; the rest is for a text's activations, keys and values."""


def usable_device(name: str) -> torch.device:
    """The device `name`. Raises LongRopeError (`invalid-setting`) where nothing can be computed on it here."""
    try:
        device = torch.device(best_device() if name == AUTO else name)
        require_float64(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, AttributeError, ValueError) as error:  # by kind of device
        accelerator = best_device()
        count = torch.accelerator.device_count() if accelerator != "cpu" else 0
        raise LongRopeError(
            f"the device {name!r} cannot be used here: {_why_not(name, error)}",
            code="invalid-setting",
            hint=f"there are {', '.join(['cpu', *(f'{accelerator}:{index}' for index in range(count))])}",
        ) from error
    return device


def _why_not(name: str, error: Exception) -> str:
    built = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
    if name.partition(":")[0] == "cuda" and not built:
        return f"torch {torch.__version__} is built without CUDA"
    return one_line(error)


def best_device() -> str:
    """The kind of device that AUTO is here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None or accelerator.type == "mps" else accelerator.type


def require_float64(device: torch.device) -> None:
    """Raise LongRopeError (`invalid-setting`) for MPS, the GPU of an Apple machine: angles and sums of losses are
    computed in float64, which it does not have."""
    if device.type == "mps":
        raise LongRopeError(
            f"the device {str(device)!r} cannot be used here: it has no float64, in which angles and sums of losses "
            "are computed",
            code="invalid-setting",
            hint="compute on cpu",
        )


def device_of(model: PreTrainedModel) -> torch.device:
    """The device that `model` takes token ids on: that of its first weights, or where a hook brings them when used."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    places = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", [hook])]
    return next((torch.device(place) for place in places if place is not None), device)


def is_spread(model: nn.Module) -> bool:
    """True if a device map has put parts of `model` on several devices, or weights where nothing is computed."""
    return len(set(_device_map(model).values())) > 1 or is_offloaded(model)


@contextmanager
def moved_to_cpu(model: PreTrainedModel) -> Iterator[None]:
    """In the block, `model` leaves its device to others, and waits in main memory. A spread model stays where it is."""
    device = model.device
    if is_spread(model):
        yield
        return
    model.to("cpu")
    torch.cuda.empty_cache()  # nothing without CUDA
    try:
        yield
    finally:
        model.to(device)


def is_offloaded(model: nn.Module) -> bool:
    """True if a device map has left weights where nothing is computed: in main memory for a GPU, or on disk."""
    return any(parameter.is_meta for parameter in model.parameters())


def says_where(model: PreTrainedModel) -> str:
    """The device or devices that `model` is computed on and its dtype, in one line; of a spread model with the cost."""
    dtype = str(model.dtype).removeprefix("torch.")
    device = device_of(model)
    if not is_spread(model):
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        return f"computing on {device}{name} in {dtype}"
    parts: dict[str, int] = {}
    for place in _device_map(model).values():
        parts[str(place)] = parts.get(str(place), 0) + 1
    listed = ", ".join(
        f"{place} ({count} {'part' if count == 1 else 'parts'})" for place, count in parts.items()
    ) or str(device)
    line = f"computing in {dtype} on a model spread over {listed}"
    if is_offloaded(model):
        line += (
            "; weights in host memory or on disk are copied to the device in every forward, at the speed of the bus: "
            "more GPUs, a shorter dtype or a quantised model are many times faster"
        )
    return line


def require_one_kind(name: str) -> None:
    """Raise LongRopeError (`invalid-setting`) unless `name` is a kind of device, without a number, or AUTO."""
    if name not in (AUTO, "cpu", "cuda", best_device()):
        raise LongRopeError(
            f"expected `device` cpu or cuda, or auto, found {name!r}: one process trains on one device",
            code="invalid-setting",
        )


def spread_options(
    config: PreTrainedConfig, dtype: Any, name: str, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The options of `from_pretrained` for a model that AUTO spreads; none for one that fits the device.

    Arguments are those of `too_large`; `name` is the model's, for errors. Raises LongRopeError (`out-of-memory`) where
    GPUs and main memory together have no room for the weights.
    """
    if not too_large(config, dtype, usable_device(AUTO), trust_remote_code=trust_remote_code):
        return {}
    needed = weight_bytes(config, dtype, trust_remote_code=trust_remote_code)
    return {"device_map": "auto", "max_memory": room_for_weights(needed, name)}


def spread(model: PreTrainedModel, max_memory: dict[int | str, int]) -> PreTrainedModel:
    """`model`, which is in main memory, over the devices, as `from_pretrained` would have put it there."""
    whole_layers = list(model._no_split_modules or ())
    balanced = get_balanced_memory(model, max_memory=max_memory, no_split_module_classes=whole_layers)
    places = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=whole_layers)
    found: PreTrainedModel = dispatch_model(model, places)
    return found


def too_large(config: PreTrainedConfig, dtype: Any, device: torch.device, *, trust_remote_code: bool = False) -> bool:
    """True if the weights of the model of `config` leave no room for texts on `device`.

    `dtype` is that of the weights; None: the one in the config.
    """
    if device.type == "cpu":  # host memory is all there is
        return False
    if getattr(config, "quantization_config", None) is not None:  # its size is not that of its numbers
        return False
    free = memory_by_device().get(0 if device.index is None else device.index)
    return free is not None and weight_bytes(config, dtype, trust_remote_code=trust_remote_code) > FOR_WEIGHTS * free


def weightless_model(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` on the meta device: every module and parameter, without the numbers. What transformers
    raises is not caught."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def weight_bytes(config: PreTrainedConfig, dtype: Any, *, trust_remote_code: bool = False) -> int:
    """The bytes of the weights of the model of `config` in `dtype` (None: the one in the config)."""
    model = weightless_model(config, trust_remote_code=trust_remote_code)
    wanted = dtype or getattr(config, "dtype", None) or torch.float32
    sizes: dict[str, int] = compute_module_sizes(model, dtype=wanted)
    return sizes[""]


def memory_by_device() -> dict[int | str, int]:
    """Free bytes of every GPU by its number, and of main memory by the name cpu, as accelerate counts them."""
    found: dict[int | str, int] = get_max_memory()
    return found


def free_bytes(device: torch.device) -> int | None:
    """The bytes that are free on `device`, those among them that PyTorch keeps for its next tensors; None where nobody
    says."""
    if device.type == "cpu":  # whose memory is the host's
        return memory_by_device().get("cpu")
    free = memory_by_device().get(torch.accelerator.current_device_index() if device.index is None else device.index)
    if free is None or device.type != "cuda":
        return free
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def room_for_weights(needed: int, name: str) -> dict[int | str, int]:
    """The bytes that weights may take on each GPU and in main memory.

    Raises LongRopeError (`out-of-memory`) where all together is less than `needed`.
    """
    room = {place: int(FOR_WEIGHTS * free) for place, free in memory_by_device().items()}
    if needed > sum(room.values()):
        listed = ", ".join(f"{format_bytes(free)} on {place}" for place, free in room.items())
        raise LongRopeError(
            f"the weights of {name} take {format_bytes(needed)}; there is room for {listed}",
            code="out-of-memory",
            hint="give a shorter `dtype`, a quantised model, or use a machine with more memory",
        )
    return room


def _device_map(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "hf_device_map", None) or {}
