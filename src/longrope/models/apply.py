"""Apply a `RopeScaling` to any transformers model by replacing its rotary module, and remove it again.

No subclass: the model stays the caller's object, its weights and config are not touched. Applying proves on a forward
pass that logits move with the factors, because patching a module that nobody calls (as the released code does with
`layer.self_attn.rotary_emb`) changes nothing and gives no error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.devices import device_of
from longrope.models.generation.hooks import hook_generation
from longrope.models.rotary import LongRopeRotary
from longrope.models.saving import hook_saving
from longrope.models.scaled import ScaledModel, method_hooks
from longrope.rope.geometry import RopeGeometry, scaled_layer_type, text_config
from longrope.rope.scaling import RopeScaling, Window, load_scaling

_PROBE_TOKENS = 16


def geometry_of(model: PreTrainedModel, original_length: int | None = None) -> RopeGeometry:
    """The geometry of a model's scaled RoPE (the full-attention layers' where a model has one per layer type)."""
    return RopeGeometry.from_config(model.config, scaled_layer_type(model.config), original_length)


def apply_scaling(model: PreTrainedModel, scaling: RopeScaling | Path | str) -> ScaledModel:
    """Replace every rotary module of `model` so that it applies `scaling`; a scaling applied before is replaced.

    `scaling` is a `RopeScaling` or the path of one. Forwards, `model.generate` and training then use the smallest
    window that holds the text, and `save_pretrained` states the scaling in the saved config. `remove_scaling` puts
    the model's own modules back.

    Raises LongRopeError when `model` is no transformers model but a wrapper of one (PEFT, `torch.compile`), when
    `scaling` cannot be read, when it was made for another geometry, when the model has no rotary module, or when its
    logits do not move with the factors. The model is then as it was.
    """
    _require_unwrapped(model)
    if not isinstance(scaling, RopeScaling):
        scaling = load_scaling(scaling)
    layer_type = scaled_layer_type(model.config)
    # The original length is the scaling's to choose; head size and base are the model's.
    scaling.check_fits(RopeGeometry.from_config(model.config, layer_type, scaling.geometry.original_length))
    put_back = _remember(model)
    try:
        remove_scaling(model)
        places = rotary_modules(model)
        require_one_base(model, [module for _, module in places], scaling.geometry)
        rotaries = {module: LongRopeRotary(module, scaling, layer_type) for _, module in places}
        held = []
        for name, module in places:
            _place(model, name, rotaries[module])
            held.append((*_holder(model, name), rotaries[module]))
        handle = ScaledModel(model, tuple(rotaries.values()), tuple(held))
        if not _logits_move(handle):
            raise LongRopeError(
                f"{type(model).__name__} ignores its rotary module: logits are the same for different rescale factors, "
                "so no scaling can be applied",
                code="not-rope",
            )
    except BaseException:  # out of memory, interrupted, a forward that does not run
        put_back()
        raise
    hook_generation(handle)
    hook_saving(handle)
    return handle


def remove_scaling(model: PreTrainedModel) -> None:
    """Put the model's own rotary modules back; a model without a scaling stays as it is.

    Raises LongRopeError when `model` is no transformers model but a wrapper of one.
    """
    _require_unwrapped(model)
    for hook in method_hooks(model):
        hook.take_off()
    for name, rotary in _applied(model):
        _place(model, name, rotary.original)


def applied_scaling(model: PreTrainedModel) -> RopeScaling | None:
    """The scaling that is applied to `model`; None where there is none."""
    return next((rotary.scaling for _, rotary in _applied(model)), None)


@contextmanager
def scaled(model: PreTrainedModel, scaling: RopeScaling | Path | str) -> Iterator[ScaledModel]:
    """`apply_scaling` for the length of a `with` block.

    After the block the model is as before: with the scaling that was applied to it, the window pinned in that, and the
    options of its generation; or with none. Raises LongRopeError as `apply_scaling` does.
    """
    _require_unwrapped(model)
    put_back = _remember(model)
    try:
        yield apply_scaling(model, scaling)
    finally:
        put_back()


def _require_unwrapped(model: object) -> None:
    """Raise LongRopeError unless `model` is a transformers model: `generate` of a wrapper passes by its hooks."""
    if isinstance(model, PreTrainedModel):
        return
    inner = "`model.get_base_model()`" if hasattr(model, "get_base_model") else "the model inside"
    raise LongRopeError(
        f"expected a transformers model to scale, found {type(model).__name__}",
        code="unsupported-model",
        hint=f"scale the model before it is wrapped, or {inner}" if isinstance(model, nn.Module) else "",
    )


def _remember(model: PreTrainedModel) -> Callable[[], None]:
    """Returns a function that puts back the scaling applied now, or the original RoPE where none is."""
    rotaries, hooks = _applied(model), method_hooks(model)

    def put_back() -> None:
        remove_scaling(model)
        for name, rotary in rotaries:
            _place(model, name, rotary)
        for hook in hooks:
            hook.put()

    return put_back


def _applied(model: PreTrainedModel) -> list[tuple[str, LongRopeRotary]]:
    return [(name, module) for name, module in _named_modules(model) if isinstance(module, LongRopeRotary)]


def rotary_modules(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The rotary modules of the language model, by name. Raises LongRopeError where there is none."""
    family = text_config(model.config).model_type
    found = [
        (name, module)
        for name, module in _named_modules(model)
        if (
            hasattr(module, "inv_freq")
            or any(key.endswith("inv_freq") for key, _ in module.named_buffers(recurse=False))
        )
        and getattr(getattr(module, "config", None), "model_type", family) == family  # not those of images and sound
    ]
    if not found:
        raise LongRopeError(
            f"{type(model).__name__} has no rotary module to scale: longrope needs a model with RoPE", code="not-rope"
        )
    return found


def require_one_base(model: PreTrainedModel, modules: Iterable[nn.Module], geometry: RopeGeometry) -> None:
    """Raise LongRopeError where layers have rotary modules of different bases (Granite with sliding windows may)."""
    configs = [config for module in modules if (config := getattr(module, "config", None)) is not None]
    parameters = [entry for config in configs if isinstance(entry := getattr(config, "rope_parameters", None), dict)]
    bases = {float(base) for entry in parameters if isinstance(base := entry.get("rope_theta"), int | float)}
    if len(bases) > 1 or (bases and geometry.base not in bases):
        raise LongRopeError(
            f"{type(model).__name__} has rotary modules of other bases than {geometry.base:g}:"
            f" {', '.join(f'{base:g}' for base in sorted(bases))}; one scaling cannot be for all of them",
            code="not-rope",
        )


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every name of every module: remote code may keep one rotary module under the name of each layer."""
    return list(model.named_modules(remove_duplicate=False))


def _place(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, child = _holder(model, name)
    setattr(parent, child, module)


def _holder(model: PreTrainedModel, name: str) -> tuple[nn.Module, str]:
    """The module that holds the module `name`, and the name under which it does."""
    parent, _, child = name.rpartition(".")
    return model.get_submodule(parent), child


def _logits_move(handle: ScaledModel) -> bool:
    """True if two very different windows give different logits on a few tokens."""
    model, geometry = handle.model, handle.scaling.geometry
    ids = torch.arange(_PROBE_TOKENS, device=device_of(model))[None] % model.config.get_text_config().vocab_size
    logits = []
    with kept_modes(model), torch.no_grad():
        model.eval()
        for factor in (1.0, 3.0):
            with handle.using(Window(max_length=_PROBE_TOKENS, factors=(factor,) * geometry.pairs)):
                logits.append(model(input_ids=ids, use_cache=False).logits)
    return not torch.equal(*logits)


@contextmanager
def kept_modes(model: object) -> Iterator[None]:
    """Puts the modules of `model`, loaded by the caller, that are in training mode back into it after the block.

    A `LoadedModel` is one too; a name, a folder or None has nothing to put back.
    """
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    training = [module for module in inner.modules() if module.training] if isinstance(inner, nn.Module) else []
    try:
        yield
    finally:
        for module in training:  # not model.train(): parts of it may be in eval mode
            module.training = True
