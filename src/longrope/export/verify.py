"""The proof of an exported folder: plain transformers loads it, and its logits are the source's under the scaling.

The source model is loaded by itself, from its own files, and the scaling is applied to it; the export is loaded by
itself, and nothing is applied. So a difference in anything that a config says shows, not only in the rotary embedding.
"""

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
from longrope.models.checkpoint_files import source_folder
from longrope.models.devices import device_of, is_offloaded
from longrope.models.finite import require_finite_logits
from longrope.models.first_layers import first_layers
from longrope.models.loading import load_config, load_model, load_tokenizer
from longrope.rope.geometry import scaled_layer_type, text_config
from longrope.rope.hf_config import scaling_of_config
from longrope.rope.scaling import RopeScaling

_FREQUENCY_TOLERANCE = 1e-5  # relative: theirs are float32
_EXACT, _LOW = 1e-3, 5e-2  # of the largest logit: computed in float32, or with bfloat16 or float16 somewhere
_TEXT = "It's 3.14159 — don't  WAIT:\n\tif x_1 != 2048: print('Grüße, 世界! 🙂')\n  [INST] <s> </s>"
_PROBE = 64  # tokens on each side of the switch
_SMALL = 4 * 2**30  # bytes of weights up to which the comparison is made in float32


@dataclass(frozen=True, slots=True)
class Verification:
    """The largest errors of the reloaded checkpoint: relative for frequencies, absolute for logits.

    Logits are compared with those of the source model, loaded apart, with the scaling applied to it.
    """

    max_frequency_error: float
    max_logit_error_short: float
    """Over the first tokens, inside the first window."""
    max_logit_error_long: float
    """Over the tokens around the switch, beyond the first window."""
    max_logit_error_untouched: float | None = None
    """Over the first tokens, against the source as it is, without any scaling; None where the first window is not the
    source's own RoPE (another attention factor, or other factors)."""
    layers: tuple[int, int] | None = None
    """The number of layers that were loaded, from the first, and that of the model; None where all were."""

    def says(self, switch: int) -> str:
        """The comparison that was made, in one sentence; `switch` is the length of the first window."""
        part = "" if self.layers is None else f" of the first {self.layers[0]} of {self.layers[1]} layers"
        text = (
            f"logits{part} of the reloaded folder against those of the source under this scaling, loaded apart: equal"
            f" to {self.max_logit_error_short:.1e} inside the first {switch} tokens and {self.max_logit_error_long:.1e}"
            " beyond"
        )
        if self.max_logit_error_untouched is None:
            return f"{text}; the first window is not the source's own RoPE, so it was not compared without a scaling"
        return f"{text}, and to {self.max_logit_error_untouched:.1e} with the source as it is inside them"


def verify_hf(
    path: Path,
    expressed: ExpressedScaling,
    source: str,
    *,
    changes: Mapping[str, Change] | None = None,
    device: str = "cpu",
    first_layers_only: bool = False,
    trust_remote_code: bool = False,
) -> Verification:
    """Reload the checkpoint in `path` and compare it, around the switch, with the model `source` under the scaling.

    `source` names the model that was exported; `expressed.effective` is applied to it, and where the first window is
    the source's own RoPE, it is compared as it is, too. `changes` has the change of each tensor, where some changed.
    A `path` without weights is a config for those of `source`. The comparison runs on `device`, in float32 for weights
    below 4 GiB, else in the checkpoint's own dtype; one model is in memory at a time, and with `first_layers_only` its
    first layers alone.

    Raises LongRopeError (`differs`) when a frequency, an attention factor or a logit differs.
    """
    weights = str(path) if any(path.glob("*.safetensors")) else source
    of_source, of_path, layers, share = None, None, None, 1.0
    if first_layers_only or weights == source:
        of_path = load_config(str(path), trust_remote_code=trust_remote_code)
    if first_layers_only:
        whole = load_config(source, trust_remote_code=trust_remote_code)
        (of_source, count), (of_path, _) = first_layers(whole), first_layers(of_path)
        layers = (count, int(text_config(whole).num_hidden_layers))
        share = layers[0] / layers[1]
    options: dict[str, Any] = {
        "dtype": "float32" if share * _bytes_of_weights(weights) < _SMALL else "checkpoint",
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    switch, target = expressed.stated.windows[0].max_length, expressed.stated.target_length
    inside = torch.arange(min(_PROBE, switch))
    beyond = torch.arange(max(0, switch - _PROBE), min(target, switch + _PROBE))
    probes = (inside, beyond)
    untouched, ours = _source_logits(load_model(source, config=of_source, **options), expressed, changes or {}, probes)
    model = load_model(weights, config=of_path, **options)
    theirs = [_logits(model, positions) for positions in probes]
    frequency_error = _frequency_error(model, expressed.stated)
    compared = [("inside", inside, ours[0], theirs[0]), ("beyond", beyond, ours[1], theirs[1])]
    if untouched is not None:
        compared.append(("inside", inside, untouched, theirs[0]))
    errors = []
    for regime, positions, mine, reloaded in compared:
        error = float((mine - reloaded).abs().max())
        # Folded weights are rounded to their dtype, which may be a short one whatever is computed in.
        if not error <= (_LOW if changes else _tolerance(model, positions)) * float(mine.abs().max()):
            applied = "as it is" if mine is untouched else "under this scaling"
            raise LongRopeError(
                f"the reloaded checkpoint differs from {source} {applied} {regime} the window of {switch} tokens: "
                f"logits by {error:.3g}; {type(model).__name__} does not compute the same from this config",
                code="differs",
            )
        errors.append(error)
    untouched_error = errors[2] if len(errors) > 2 else None
    return Verification(frequency_error, errors[0], errors[1], untouched_error, layers)


def _bytes_of_weights(name: str) -> int:
    """The size of the weights of a folder, a GGUF file or a model of the hub that was downloaded."""
    place = source_folder(name)
    files = place.glob("*.safetensors") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files)


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
            hint="use `target=hf`",
        )


def _source_logits(
    model: PreTrainedModel, expressed: ExpressedScaling, changes: Mapping[str, Change], probes: tuple[Tensor, ...]
) -> tuple[Tensor | None, list[Tensor]]:
    """Logits of the source inside the first window as it is, and by probe with the effective scaling.

    The first are None where the first window is not the source's own RoPE. The stated scaling with `changes` must give
    the same as the effective one. The changes are made in memory, where nothing is rounded to the dtype of the file, so
    any difference is a mistake of the fold.
    """
    untouched = _logits(model, probes[0]) if _is_own_window(model, expressed.effective, len(probes[0])) else None
    ours = _scaled_logits(model, expressed.effective, probes)
    if not changes:
        return untouched, ours
    if is_offloaded(model):
        raise LongRopeError(
            "the proof of folded weights changes them in memory; a device map has left some elsewhere",
            code="out-of-memory",
            hint="prove it with the `device` cpu, or with the `proof` rotary",
        )
    there = dict(model.named_parameters())
    for name in changes.keys() & there.keys():  # the first layers may be all that was loaded
        parameter = there[name]
        parameter.data = changes[name](parameter.data.cpu().double()).to(parameter)
    folded = _scaled_logits(model, expressed.stated, probes)
    for positions, mine, other in zip(probes, ours, folded, strict=True):
        error = float((mine - other).abs().max())
        if not error <= _tolerance(model, positions) * float(mine.abs().max()):
            raise LongRopeError(
                f"folding the attention factor changes the logits of {type(model).__name__} by {error:.3g}",
                code="differs",
                hint="leave out `fold_attention_factor`",
            )
    return untouched, ours


def _is_own_window(model: PreTrainedModel, scaling: RopeScaling, length: int) -> bool:
    """True if the first window of `scaling` is the RoPE that the untouched model has for `length` tokens."""
    first = scaling.windows[0]
    stated = scaling_of_config(model.config)
    if stated is None:
        return first.is_identity
    own = stated.window_for(min(length, stated.target_length))
    return (
        np.allclose(first.factors, own.factors, rtol=1e-6) and abs(first.attention_factor - own.attention_factor) < 1e-6
    )


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
        logits: Tensor = model(
            input_ids=ids.to(device_of(model)), position_ids=positions[None].to(device_of(model)), use_cache=False
        ).logits
    require_finite_logits(model, logits, len(positions))
    return logits.cpu()


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
    # A module that no layer calls has never computed its long frequencies (Granite with sliding windows has one).
    called = [(name, module) for name, module in modules if hasattr(module, f"{_longrope_prefix(module)}long_inv_freq")]
    modules = called or modules
    return max(_module_frequency_error(name, module, scaling) for name, module in modules)


def _longrope_prefix(module: nn.Module) -> str | None:
    """The prefix of a rotary module's buffers for scaled layers: the layer type, or nothing where there is one RoPE."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    config = getattr(module, "config", None)
    layer_type = None if config is None else scaled_layer_type(config)
    prefix = "" if layer_type is None else f"{layer_type}_"
    return prefix if f"{prefix}original_inv_freq" in names else None


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
