"""A model without its weights: every module of a config on the meta device, to look at before anything is read.

Whether a family can be scaled shows in its modules, so `inspect` and `plan` refuse what a search would refuse.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from longrope.errors import LongRopeError, one_line
from longrope.models.apply import require_one_base, rotary_modules
from longrope.models.loading import load_config
from longrope.models.rotary import probe_output
from longrope.rope.geometry import RopeGeometry, scaled_layer_type

_ANY_LENGTH = 2  # the window is not looked at here


def weightless(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config on the meta device: every module and parameter, without the numbers.

    Raises LongRopeError when there is no such config, transformers makes no causal language model of it, or a scaling
    cannot be applied to it.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    RopeGeometry.from_config(config, original_length=_ANY_LENGTH)  # a model without RoPE cannot be extended
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config that transformers cannot build raises many kinds
        raise LongRopeError(
            f"cannot build the model of {name} from its config: {one_line(error)}", code="no-such-model"
        ) from error
    require_scalable(model)
    return model


def require_scalable(model: PreTrainedModel) -> None:
    """Raise LongRopeError unless the weightless `model` has rotary modules that a scaling can replace.

    Their output is looked at where a module can be made anew from its config, as those of transformers can.
    """
    layer_type = scaled_layer_type(model.config)
    geometry = RopeGeometry.from_config(model.config, layer_type, _ANY_LENGTH)
    modules = [module for _, module in rotary_modules(model)]
    require_one_base(model, modules, geometry)
    for module in modules:
        made = _made_anew(module)
        if made is not None:
            probe_output(made, geometry, layer_type)


def _made_anew(module: nn.Module) -> nn.Module | None:
    """A rotary module with numbers; None for a class that is not made from a config alone."""
    try:
        found: nn.Module = type(module)(module.config)
    except Exception:  # foreign code, which may want more than a config
        return None
    return found
