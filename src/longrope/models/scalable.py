"""The abilities that a family must have, looked at on a model without weights: refused there, every verb refuses it.

Each check is of what the classes of the family are, not of their names: rotary modules that a scaling can replace, a
config that can state a scaling, rotary modules that compute the scaling from it, a cache that can be continued.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.apply import require_one_base, rotary_modules
from longrope.models.cache_argument import cache_fault
from longrope.models.chunked import base_of
from longrope.models.devices import require_float64, weightless_model
from longrope.models.rotary import LongRopeRotary, probe_output
from longrope.models.twin import stated_config
from longrope.rope.geometry import RopeGeometry, scaled_layer_type, text_config
from longrope.rope.scaling import RopeScaling

_WINDOW = 64  # tokens, where a config states no window: the user will have to
_COMPARED = 8  # positions, the first ones: far out, transformers' float32 angles are coarse
_CHECKED: set[tuple[type, str]] = set()
"""The configs that were checked: a job opens the same model several times."""


def require_scalable_config(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> None:
    """`require_scalable` of the model of `config`. A model that cannot be built without weights is not looked at."""
    key = type(config), config.to_json_string()
    if key in _CHECKED:
        return
    try:
        model = weightless_model(config, trust_remote_code=trust_remote_code)
    except Exception:  # code of a checkpoint may look at numbers while it builds
        return
    require_scalable(model)
    _CHECKED.add(key)


def require_scalable(model: PreTrainedModel) -> None:
    """Raise LongRopeError unless a scaling can be applied to `model` on its device, stated in its config, and its cache
    continued.

    `model` may be without weights. The output of rotary modules is looked at where they can be made anew from a config,
    as those of transformers can.
    """
    require_float64(model.device)
    layer_type = scaled_layer_type(model.config)
    geometry = _geometry(model.config, layer_type)
    modules = [module for _, module in rotary_modules(model)]
    require_one_base(model, modules, geometry)
    for module in modules:
        made = _made_anew(module, getattr(module, "config", None))
        if made is not None:
            probe_output(made, geometry, layer_type)
    if fault := cache_fault(model, base_of(model)):
        raise LongRopeError(
            f"{type(model).__name__} cannot go on from a cached text: {fault}; this model cannot be scaled",
            code="cannot-generate",
        )
    _require_stated(model, modules, geometry, layer_type)


def _require_stated(
    model: PreTrainedModel, modules: list[nn.Module], geometry: RopeGeometry, layer_type: str | None
) -> None:
    """Raise LongRopeError unless a config can state a scaling, and the rotary modules made from it compute it."""
    factors = torch.linspace(1.0, 4.0, geometry.pairs, dtype=torch.float64)
    window = geometry.original_length
    scaling = RopeScaling.extended(geometry, 4 * window, factors)
    config = stated_config(model, scaling)
    positions = torch.cat([torch.arange(_COMPARED), torch.tensor([window])])[None]  # the last one leaves the window
    for module in modules:
        own, stated = _made_anew(module, getattr(module, "config", None)), _made_anew(module, text_config(config))
        if own is None or stated is None:
            continue
        expected = _output(LongRopeRotary(own, scaling, layer_type), positions, layer_type)
        found = _output(stated, positions, layer_type)
        if not all(torch.allclose(one, other, atol=1e-3) for one, other in zip(expected, found, strict=True)):
            raise LongRopeError(
                f"{type(module).__name__} of this transformers does not compute a scaling beyond the original window "
                f"that its config states; a checkpoint of {type(model).__name__} cannot be extended",
                code="not-expressible",
            )


def _geometry(config: Any, layer_type: str | None) -> RopeGeometry:
    try:
        return RopeGeometry.from_config(config, layer_type)
    except LongRopeError:
        return RopeGeometry.from_config(config, layer_type, _WINDOW)


def _output(module: nn.Module, positions: Tensor, layer_type: str | None) -> list[Tensor]:
    """The real tensors that a rotary module gives at `positions` (1, T), in one row or, where it wants it, three; of
    the last axis but one the first positions."""
    hidden = torch.zeros(1, positions.shape[1], 1)
    arguments = () if layer_type is None else (layer_type,)
    found: Any
    try:
        found = module(hidden, positions, *arguments)
    except Exception:
        found = module(hidden, positions.expand(3, 1, -1), *arguments)
    tensors = [found] if isinstance(found, Tensor) else list(found)
    kept = [tensor[..., :_COMPARED, :] for tensor in tensors]
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in kept]


def _made_anew(module: nn.Module, config: Any) -> nn.Module | None:
    """A rotary module with numbers; None for a class that is not made from a config alone."""
    try:
        found: nn.Module = type(module)(config)
    except Exception:  # foreign code, which may want more than a config, and wrong configs
        return None
    return found
