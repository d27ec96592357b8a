"""Install a `RopeScaling` into any transformers model by replacing its rotary module, and take it out again.

Install, not subclass: the model stays what it is, its weights and config are not touched. Installing proves on a
forward pass that logits move with the factors, because patching a module that nobody calls (as the released code does
with `layer.self_attn.rotary_emb`) changes nothing and says nothing.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.generation.hooks import hook_generation, unhook_generation
from longrope.models.rotary import LongRopeRotary
from longrope.models.scaled import ScaledModel
from longrope.rope.geometry import FULL_ATTENTION, RopeGeometry, rope_layer_types
from longrope.rope.scaling import RopeScaling, Window

_PROBE_TOKENS = 16


def geometry_of(model: PreTrainedModel, original_length: int | None = None) -> RopeGeometry:
    """The geometry of a model's scaled RoPE (the full-attention layers' where a model has one per layer type)."""
    return RopeGeometry.from_config(model.config, _scaled_layer_type(model), original_length)


def apply_scaling(model: PreTrainedModel, scaling: RopeScaling) -> ScaledModel:
    """Replace every rotary module of `model` so that it applies `scaling`; a scaling installed before is replaced.

    Raises LongRopeError when the model has no rotary module, when the scaling was made for another geometry, or when
    the model's logits do not move with the factors. The model is then as it was.
    """
    layer_type = _scaled_layer_type(model)
    # The original length is the scaling's to choose; head size and base are the model's.
    scaling.check_fits(RopeGeometry.from_config(model.config, layer_type, scaling.geometry.original_length))
    remove_scaling(model)
    places = _rotary_modules(model)
    if not places:
        raise LongRopeError(f"{type(model).__name__} has no rotary module to scale: longrope needs a model with RoPE")
    # All are made before any is placed: a refusal leaves the model untouched.
    rotaries = {module: LongRopeRotary(module, scaling, layer_type) for _, module in places}
    for name, module in places:
        _place(model, name, rotaries[module])
    scaled = ScaledModel(model, tuple(rotaries.values()))
    try:
        moved = _logits_move(scaled)
    except BaseException:  # out of memory, interrupted, a forward that does not run
        remove_scaling(model)
        raise
    if not moved:
        remove_scaling(model)
        raise LongRopeError(
            f"{type(model).__name__} ignores its rotary module: logits are the same for different rescale factors, "
            "so no scaling can be installed"
        )
    hook_generation(scaled)
    return scaled


def remove_scaling(model: PreTrainedModel) -> None:
    """Put the model's own rotary modules back; without an installed scaling, nothing happens."""
    unhook_generation(model)
    for name, module in _named_modules(model):
        if isinstance(module, LongRopeRotary):
            _place(model, name, module.original)


def _scaled_layer_type(model: PreTrainedModel) -> str | None:
    types = rope_layer_types(model.config)
    if not types:
        return None
    if FULL_ATTENTION not in types:
        raise LongRopeError(
            f"{type(model).__name__} has one RoPE per layer type ({', '.join(types)}), none for {FULL_ATTENTION}; "
            "only full-attention layers can be scaled"
        )
    return FULL_ATTENTION


def _rotary_modules(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in _named_modules(model)
        if hasattr(module, "inv_freq")
        or any(key.endswith("inv_freq") for key, _ in module.named_buffers(recurse=False))
    ]


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every name of every module: remote code may keep one rotary module under the name of each layer."""
    return list(model.named_modules(remove_duplicate=False))


def _place(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _logits_move(scaled: ScaledModel) -> bool:
    """Whether two very different windows give different logits on a few tokens."""
    model, geometry = scaled.model, scaled.scaling.geometry
    ids = torch.arange(_PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    training = [module for module in model.modules() if module.training]
    model.eval()
    logits = []
    try:
        with torch.no_grad():
            for factor in (1.0, 3.0):
                with scaled.using(Window(max_length=_PROBE_TOKENS, factors=(factor,) * geometry.pairs)):
                    logits.append(model(input_ids=ids, use_cache=False).logits)
    finally:
        for module in training:  # not model.train(): parts of it may be in eval mode
            module.training = True
    return not torch.equal(*logits)
