"""The proof of an export: reload it with plain transformers and compare frequencies and logits with ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.install import install, uninstall
from longrope.models.load import load_model
from longrope.rope.scaling import RopeScaling

_FREQUENCY_TOLERANCE = 1e-5  # relative: theirs are float32
_PROBE = 64  # tokens on each side of the switch
_SMALL = 4 * 2**30  # bytes of weights up to which the comparison is made in float32


@dataclass(frozen=True, slots=True)
class Verification:
    """How far the reloaded checkpoint is from the installed scaling: relative for frequencies, absolute for logits."""

    max_frequency_error: float
    max_logit_error_short: float
    max_logit_error_long: float


def verify_hf(path: Path, scaling: RopeScaling, *, trust_remote_code: bool = False) -> Verification:
    """Reload `path` and compare with the two windows of `scaling` installed in the same weights, around the switch.

    The comparison is made on the CPU, in float32 for checkpoints below 4 GiB, else in the checkpoint's own dtype.
    Raises LongRopeError when a frequency, an attention factor or a logit differs.
    """
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    dtype = "float32" if size < _SMALL else "checkpoint"
    model = load_model(str(path), dtype=dtype, trust_remote_code=trust_remote_code)
    switch = scaling.windows[0].max_length
    inside = torch.arange(min(_PROBE, switch))
    beyond = torch.arange(max(0, switch - _PROBE), min(scaling.target_length, switch + _PROBE))
    theirs = [_logits(model, positions) for positions in (inside, beyond)]
    frequency_error = _compare_frequencies(model, scaling)
    # The reloaded weights with our module in place of theirs: only the rotary embedding can differ.
    with _installed(model, scaling):
        ours = [_logits(model, positions) for positions in (inside, beyond)]
    errors = []
    for regime, positions, mine, reloaded in zip(("inside", "beyond"), (inside, beyond), ours, theirs, strict=True):
        error = float((mine - reloaded).abs().max())
        if not error <= _tolerance(model, positions) * max(1.0, float(mine.abs().max())):
            raise LongRopeError(
                f"the reloaded checkpoint differs {regime} the window of {switch} tokens: logits by {error:.3g}; "
                "this model class does not apply the scaling"
            )
        errors.append(error)
    return Verification(frequency_error, *errors)


def _tolerance(model: PreTrainedModel, positions: Tensor) -> float:
    """Of the largest logit. transformers' float32 angles at position n are off by up to n·2⁻²⁴, ours are not."""
    rounding = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    return rounding + 4.0 * float(positions.max()) * 2.0**-24


@contextmanager
def _installed(model: PreTrainedModel, scaling: RopeScaling) -> Iterator[None]:
    install(model, scaling)
    try:
        yield
    finally:
        uninstall(model)


def _logits(model: PreTrainedModel, positions: Tensor) -> Tensor:
    ids = (positions * 7919 + 13)[None] % model.get_input_embeddings().num_embeddings
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, position_ids=positions[None], use_cache=False).logits
    return logits


def _compare_frequencies(model: PreTrainedModel, scaling: RopeScaling) -> float:
    """Largest relative error of the reloaded rotary's two frequency lists; its attention factor must agree too."""
    rotary = _longrope_module(model)
    prefix = "full_attention_" if hasattr(rotary, "full_attention_inv_freq") else ""
    worst = 0.0
    for name, window in (("original_inv_freq", scaling.windows[0]), ("long_inv_freq", scaling.windows[-1])):
        found = getattr(rotary, prefix + name, None)
        if found is None:
            raise LongRopeError(f"the reloaded {type(model).__name__} has no {name}: it does not apply longrope")
        expected = scaling.geometry.inv_freq / np.asarray(window.factors)
        if found.shape != expected.shape:
            raise LongRopeError(f"the reloaded {name} has {tuple(found.shape)} pairs, expected {expected.shape}")
        worst = max(worst, float(np.abs(found.double().cpu().numpy() / expected - 1.0).max()))
    if worst > _FREQUENCY_TOLERANCE:
        raise LongRopeError(f"the reloaded checkpoint's frequencies differ by {worst:.3g} from the scaling's")
    attention = float(getattr(rotary, f"{prefix}attention_scaling"))
    if abs(attention - scaling.windows[-1].attention_factor) > 1e-6:
        raise LongRopeError(
            f"the reloaded attention factor is {attention}, expected {scaling.windows[-1].attention_factor}"
        )
    return worst


def _longrope_module(model: PreTrainedModel) -> Any:
    modules: list[nn.Module] = [
        module
        for module in model.modules()
        if any(key.endswith("original_inv_freq") for key, _ in module.named_buffers(recurse=False))
    ]
    if not modules:
        raise LongRopeError(f"the reloaded {type(model).__name__} has no rotary module that transformers can rescale")
    return modules[0]
