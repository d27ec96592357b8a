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
from transformers import AutoModelForCausalLM, PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.install import install, uninstall
from longrope.rope.scaling import RopeScaling, Window

# transformers' angles are float32: at position n they are off by up to n·2⁻²⁴, ours are not.
_FREQUENCY_TOLERANCE = 1e-5  # relative
_LOGIT_TOLERANCE = 1e-3  # of the largest logit
_PROBE = 64


@dataclass(frozen=True, slots=True)
class Verification:
    """How far the reloaded checkpoint is from the installed scaling: relative for frequencies, absolute for logits."""

    max_frequency_error: float
    max_logit_error_short: float
    max_logit_error_long: float


def verify_hf(path: Path, scaling: RopeScaling, *, trust_remote_code: bool = False) -> Verification:
    """Reload `path` and compare with `scaling` installed in the same weights, on both sides of the original length.

    Raises LongRopeError when a frequency, an attention factor or a logit differs.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=trust_remote_code
    ).eval()
    original, target = scaling.geometry.original_length, scaling.target_length
    inside = torch.arange(min(_PROBE, original))
    beyond = torch.arange(max(0, original - _PROBE // 2), min(target, original + _PROBE // 2))
    theirs = [_logits(model, positions) for positions in (inside, beyond)]
    frequency_error = _compare_frequencies(model, scaling)
    # The reloaded weights with our module in place of theirs: only the rotary embedding can differ.
    with _installed(model, exported(scaling)):
        ours = [_logits(model, positions) for positions in (inside, beyond)]
    errors = []
    for regime, mine, reloaded in zip(("inside", "beyond"), ours, theirs, strict=True):
        error = float((mine - reloaded).abs().max())
        if not error <= _LOGIT_TOLERANCE * max(1.0, float(mine.abs().max())):
            raise LongRopeError(
                f"the reloaded checkpoint at {path} differs {regime} the original window: logits by {error:.3g}; "
                "this model class does not apply the scaling"
            )
        errors.append(error)
    return Verification(frequency_error, *errors)


def exported(scaling: RopeScaling) -> RopeScaling:
    """The part of `scaling` that transformers expresses: two windows, one attention factor, no start tokens."""
    short, long = scaling.windows[0], scaling.windows[-1]
    original = scaling.geometry.original_length
    windows = [
        Window(max_length=length, factors=window.factors, attention_factor=long.attention_factor)
        for length, window in ((original, short), (scaling.target_length, long))
    ]
    return RopeScaling(geometry=scaling.geometry, windows=tuple(windows), provenance=scaling.provenance)


@contextmanager
def _installed(model: PreTrainedModel, scaling: RopeScaling) -> Iterator[None]:
    install(model, scaling)
    try:
        yield
    finally:
        uninstall(model)


def _logits(model: PreTrainedModel, positions: Tensor) -> Tensor:
    ids = (positions * 7919 + 13)[None] % model.config.get_text_config().vocab_size
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
