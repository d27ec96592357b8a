"""A second model with the weights of a loaded one and another config: what a checkpoint with that config computes.

The twin is loaded as a checkpoint would be, from the loaded model's own tensors, which the two share. So a config can
be tried before anything is written, and before a search spends hours on a scaling that no config can state.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from longrope.errors import LongRopeError, one_line
from longrope.models.devices import device_of
from longrope.models.remarks import keys_of_others_unremarked
from longrope.models.rope_readers import keys_read_by_attention
from longrope.models.scaled import ScaledModel
from longrope.rope.hf_config import superset_config, transformers_scaling
from longrope.rope.scaling import RopeScaling
from longrope.storage import write_json_atomic

_PROBE = 32  # tokens on each side of the switch
_EXACT, _LOW = 1e-3, 5e-2  # of the largest logit: in float32, and in a shorter dtype


def stated_config(model: PreTrainedModel, scaling: RopeScaling) -> PreTrainedConfig:
    """The config of `model` with `scaling`, as an export states it and transformers reads it.

    Raises LongRopeError (`not-expressible`) where the family has no such config.
    """
    raw = json.loads(model.config.to_json_string())
    expressed = transformers_scaling(scaling)
    stated = superset_config(raw, model.config, expressed, keys_read_by_attention(model.config))
    try:
        with tempfile.TemporaryDirectory() as folder:  # the loader of files undoes what JSON cannot say, as infinity
            write_json_atomic(Path(folder) / "config.json", stated)
            with keys_of_others_unremarked():
                config: PreTrainedConfig = type(model.config).from_pretrained(folder)
    except Exception as error:  # a family's config may refuse with anything
        raise LongRopeError(
            f"the config of {type(model).__name__} cannot state a scaling: {one_line(error)}", code="not-expressible"
        ) from error
    config._attn_implementation = model.config._attn_implementation
    return config


def can_be_tried(model: PreTrainedModel) -> bool:
    """True if a twin of `model` can share its weights: they are whole, and on one device."""
    spread = len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1
    return not spread and not getattr(model, "is_quantized", False) and model.device.type != "meta"


def twin_of(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of `config` with the weights of `model`, in eval mode. Raises LongRopeError where it cannot be made."""
    place: dict[str, Any] = {} if model.device.type == "cpu" else {"device_map": {"": model.device}}
    try:
        found: PreTrainedModel = type(model).from_pretrained(
            None, config=config, state_dict=model.state_dict(), dtype=model.dtype, **place
        )
    except Exception as error:  # foreign code may raise anything
        raise LongRopeError(
            f"{type(model).__name__} cannot be loaded with this scaling in its config: {one_line(error)}",
            code="not-expressible",
        ) from error
    return found.eval()


def logit_error(handle: ScaledModel, scaling: RopeScaling) -> float:
    """The largest difference of logits between a checkpoint whose config states `scaling` and the scaling itself.

    `handle` is on a model with any scaling of the same geometry applied. The difference is a share of the largest
    logit, the larger of those inside the first window and beyond it; what rounding explains counts as 0.
    """
    model, expressed = handle.model, transformers_scaling(scaling)
    twin = twin_of(model, stated_config(model, scaling))
    short, long = expressed.windows
    inside = torch.arange(min(_PROBE, short.max_length))
    beyond = torch.arange(max(0, short.max_length - _PROBE), min(long.max_length, short.max_length + _PROBE))
    worst = 0.0
    for window, positions in ((short, inside), (long, beyond)):
        with handle.using(window):
            ours = _logits(model, positions)
        error = float((ours - _logits(twin, positions)).abs().max() / ours.abs().max())
        rounding = _EXACT if model.dtype in (torch.float32, torch.float64) else _LOW
        worst = max(worst, 0.0 if error <= rounding + 4.0 * float(positions[-1]) * 2.0**-24 else error)
    return worst


def _logits(model: PreTrainedModel, positions: Tensor) -> Tensor:
    ids = (positions * 7919 + 13)[None] % model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=ids.to(device_of(model)), position_ids=positions[None].to(device_of(model)), use_cache=False
        ).logits
    return logits.float()
