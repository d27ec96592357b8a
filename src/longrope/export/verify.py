"""The proof of an exported folder: plain transformers loads it, its frequencies and logits are the scaling's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.export.forms import ExpressedScaling
from longrope.export.weights import Change
from longrope.models.apply import scaled
from longrope.models.finite import require_finite_logits
from longrope.models.loading import load_config, load_model, load_tokenizer
from longrope.rope.geometry import text_config
from longrope.rope.scaling import RopeScaling

_FREQUENCY_TOLERANCE = 1e-5  # relative: theirs are float32
_EXACT, _LOW = 1e-3, 5e-2  # of the largest logit: computed in float32, or with bfloat16 or float16 somewhere
_TEXT = "It's 3.14159 — don't  WAIT:\n\tif x_1 != 2048: print('Grüße, 世界! 🙂')\n  [INST] <s> </s>"
_PROBE = 64  # tokens on each side of the switch
_SMALL = 4 * 2**30  # bytes of weights up to which the comparison is made in float32


@dataclass(frozen=True, slots=True)
class Verification:
    """The largest errors of the reloaded checkpoint: relative for frequencies, absolute for logits."""

    max_frequency_error: float
    max_logit_error_short: float
    """Over the first tokens, inside the first window."""
    max_logit_error_long: float
    """Over the tokens around the switch, beyond the first window."""


def verify_hf(
    path: Path,
    expressed: ExpressedScaling,
    *,
    source: str | None = None,
    changes: Mapping[str, Change] | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Reload the checkpoint in `path` and compare it, around the switch, with `expressed.effective`.

    `source` names the model whose weights were changed, and `changes` has the change of each tensor; without `source`,
    the weights are the source's own and the scaling is applied to the reloaded ones. The comparison runs on
    the CPU, in float32 for checkpoints below 4 GiB, else in the checkpoint's own dtype.

    Raises LongRopeError (`differs`) when a frequency, an attention factor or a logit differs.
    """
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    options: dict[str, Any] = {
        "dtype": "float32" if size < _SMALL else "checkpoint",
        "trust_remote_code": trust_remote_code,
    }
    switch, target = expressed.switch, expressed.stated.target_length
    inside = torch.arange(min(_PROBE, switch))
    beyond = torch.arange(max(0, switch - _PROBE), min(target, switch + _PROBE))
    probes = (inside, beyond)
    ours = None if source is None else _source_logits(load_model(source, **options), expressed, changes or {}, probes)
    model = load_model(str(path), **options)
    theirs = [_logits(model, positions) for positions in probes]
    frequency_error = _frequency_error(model, expressed.stated)
    # Without a source, the reloaded weights with our rotary module: nothing but the rotary embedding can differ.
    ours = ours or _scaled_logits(model, expressed.effective, probes)
    errors = []
    for regime, positions, mine, reloaded in zip(("inside", "beyond"), probes, ours, theirs, strict=True):
        error = float((mine - reloaded).abs().max())
        # Folded weights are rounded to their dtype, which may be a short one whatever is computed in.
        if not error <= (_LOW if changes else _tolerance(model, positions)) * float(mine.abs().max()):
            raise LongRopeError(
                f"the reloaded checkpoint differs {regime} the window of {switch} tokens: logits by {error:.3g}; "
                "this model class does not apply the scaling",
                code="differs",
            )
        errors.append(error)
    return Verification(frequency_error, *errors)


def verify_tokenizer(path: Path, source: str) -> None:
    """Raise LongRopeError (`differs`) when the checkpoint in `path` splits a text otherwise than `source` does.

    transformers chooses tokenizer classes, and mends some, by the model type in config.json, which `phi3` changes.
    """
    if not any(path.glob("tokenizer*")):
        return
    theirs, ours = map(load_tokenizer, (source, str(path)))
    if theirs(_TEXT).input_ids != ours(_TEXT).input_ids:
        raise LongRopeError(
            f"as {load_config(str(path)).model_type} the tokenizer of {source} gives other tokens",
            code="differs",
            hint="use the `target` hf",
        )


def _source_logits(
    model: PreTrainedModel, expressed: ExpressedScaling, changes: Mapping[str, Change], probes: tuple[Tensor, ...]
) -> list[Tensor]:
    """Logits of the source with the effective scaling, by probe.

    The stated scaling with `changes` must give the same. The changes are made in memory, where nothing is rounded to
    the dtype of the file, so any difference is a mistake of the fold.
    """
    ours = _scaled_logits(model, expressed.effective, probes)
    if not changes:
        return ours
    for name, change in changes.items():
        parameter = model.get_parameter(name)
        parameter.data = change(parameter.data.double()).to(parameter.dtype)
    folded = _scaled_logits(model, expressed.stated, probes)
    for positions, mine, other in zip(probes, ours, folded, strict=True):
        error = float((mine - other).abs().max())
        if not error <= _tolerance(model, positions) * float(mine.abs().max()):
            raise LongRopeError(
                f"folding the attention factor changes the logits of {type(model).__name__} by {error:.3g}",
                code="differs",
                hint="leave out `fold_attention_factor`",
            )
    return ours


def _tolerance(model: PreTrainedModel, positions: Tensor) -> float:
    """The allowed share of the largest logit: transformers' float32 angles at position n are off by up to n·2⁻²⁴."""
    rounding = _EXACT if model.dtype in (torch.float32, torch.float64) else _LOW
    return rounding + 4.0 * float(positions.max()) * 2.0**-24


def _scaled_logits(model: PreTrainedModel, scaling: RopeScaling, probes: tuple[Tensor, ...]) -> list[Tensor]:
    with scaled(model, scaling):
        return [_logits(model, positions) for positions in probes]


def _logits(model: PreTrainedModel, positions: Tensor) -> Tensor:
    ids = (positions * 7919 + 13)[None] % model.get_input_embeddings().num_embeddings
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, position_ids=positions[None], use_cache=False).logits
    require_finite_logits(model, logits, len(positions))
    return logits


def _frequency_error(model: PreTrainedModel, scaling: RopeScaling) -> float:
    """The largest relative error of the short and long inverse frequencies over all rotary modules of `model`.

    Raises LongRopeError (`differs`) where a frequency or an attention factor differs, or a module is not rescaled.
    """
    text = text_config(model.config)
    modules: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if _longrope_prefix(module) is not None and getattr(module, "config", text).model_type == text.model_type
    ]
    if not modules:
        raise LongRopeError(
            f"the reloaded {type(model).__name__} has no rotary module that transformers can rescale", code="differs"
        )
    return max(_module_frequency_error(name, module, scaling) for name, module in modules)


def _longrope_prefix(module: nn.Module) -> str | None:
    """The prefix of a rotary module's buffers for scaled layers: the layer type, or nothing where there is one RoPE."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    prefixes = ("full_attention_", "")
    return next((prefix for prefix in prefixes if f"{prefix}original_inv_freq" in names), None)


def _module_frequency_error(name: str, module: Any, scaling: RopeScaling) -> float:
    prefix = _longrope_prefix(module)
    worst = 0.0
    for buffer, window in (("original_inv_freq", scaling.windows[0]), ("long_inv_freq", scaling.windows[-1])):
        found = getattr(module, f"{prefix}{buffer}", None)
        expected = scaling.geometry.inv_freq / np.asarray(window.factors)  # (D,)
        if found is None or found.shape != expected.shape:
            pairs = "no" if found is None else found.shape[0]
            raise LongRopeError(
                f"the reloaded {name} has {pairs} pairs in {buffer}, expected {len(expected)}", code="differs"
            )
        worst = max(worst, float(np.abs(found.double().cpu().numpy() / expected - 1.0).max()))
    if worst > _FREQUENCY_TOLERANCE:
        raise LongRopeError(
            f"the reloaded frequencies of {name} differ by {worst:.3g} from the scaling's", code="differs"
        )
    m, expected_m = float(getattr(module, f"{prefix}attention_scaling")), scaling.windows[-1].attention_factor
    if abs(m - expected_m) > 1e-6:
        raise LongRopeError(f"the reloaded attention factor of {name} is {m}, expected {expected_m}", code="differs")
    return worst
