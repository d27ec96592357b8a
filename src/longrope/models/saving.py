"""`save_pretrained` and `push_to_hub` of a model with a scaling applied: the saved config states the scaling.

The model's own config does not state an applied scaling, so a plain save would leave a checkpoint with the original
RoPE, without an error. The config is written as `longrope export` writes it, and `scaling.json` beside it. Nothing
is reloaded: `export_checkpoint` proves the logits of a checkpoint, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longrope.errors import LongRopeError, one_line
from longrope.file_links import separate
from longrope.models.checkpoint_files import RECORD, export_record
from longrope.models.rope_readers import keys_read_by_attention
from longrope.models.rotary import LongRopeRotary
from longrope.models.scaled import MethodHook, ScaledModel, method_hooks
from longrope.models.twin import can_be_tried, logit_error, stated_config
from longrope.rope.angles import cos_sin
from longrope.rope.geometry import text_config
from longrope.rope.hf_config import (
    refuse_unsupported,
    scaling_of_config,
    superset_config,
    transformers_scaling,
    unsupported_by_transformers,
)
from longrope.rope.scaling import RopeScaling
from longrope.run_files import SCALING
from longrope.storage import read_json, write_json_atomic

_PROBED = 64  # positions at which cosines are compared
_TOLERANCE = 1e-4  # of cosines there: transformers' frequencies are float32
_SAVE_APART = "save the scaling with its `save`, call `remove_scaling(model)`, then save the weights"


def hook_saving(scaled: ScaledModel) -> None:
    """Put the hooks on the model."""
    for name in ("save_pretrained", "push_to_hub"):
        SaveHook(scaled, name).put()


class SaveHook(MethodHook):
    """Saves a checkpoint that computes with the scaling when transformers loads it, or refuses to save.

    Raises LongRopeError, before anything is written, when the model's family cannot express the scaling.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, scaling = self.scaled.model, self.scaled.scaling
        if (place := args[0] if args else kwargs.get("save_directory")) and self.name == "save_pretrained":
            separate(Path(place), "*.safetensors")  # an export's are links to its source, and may be written in place
        # An adapter that transformers loaded is saved alone, without a config.
        if getattr(model, "_hf_peft_config_loaded", False) or _changes_nothing(model, scaling):
            return self.own(*args, **kwargs)
        require_expressible(self.scaled)
        if self.name == "push_to_hub":  # it calls save_pretrained
            return self.own(*args, **kwargs)
        with _written_into(model.config, scaling):
            return self.own(*args, **kwargs)


@contextmanager
def plain_saves(model: PreTrainedModel) -> Iterator[None]:
    """In the block, `save_pretrained` of a scaled model writes the config without the scaling.

    For a job that records the scaling beside the weights.
    """
    hooks = [hook for hook in method_hooks(model) if isinstance(hook, SaveHook)]
    for hook in hooks:
        hook.take_off()
    try:
        yield
    finally:
        for hook in hooks:
            hook.put()


def require_expressible(scaled: ScaledModel) -> None:
    """Raise LongRopeError unless transformers computes the scaling from the config that would be saved."""
    model, scaling = scaled.model, scaled.scaling
    refuse_unsupported(unsupported_by_transformers(scaling), "a saved config", _SAVE_APART)
    try:
        config = text_config(stated_config(model, scaling))
        same = all(_same_cosines(rotary, config, transformers_scaling(scaling)) for rotary in scaled.rotaries)
        if same and can_be_tried(model):  # the attention may read the config too
            same = logit_error(scaled, scaling) == 0.0
    except LongRopeError as error:
        raise _not_expressible(f"a saved config cannot express this scaling: {error}") from error
    except Exception as error:  # a family's config or rotary module may refuse with anything
        raise _not_expressible(
            f"{type(model).__name__} cannot be loaded with this scaling in its config: {one_line(error)}"
        ) from error
    if not same:
        raise _not_expressible(f"{type(model).__name__} does not apply a scaling that its config states")


def scaled_config(raw: dict[str, Any], config: Any, scaling: RopeScaling) -> dict[str, Any]:
    """`raw`, the model's config.json, with `scaling` in it; `config` is the same as an object."""
    return superset_config(raw, config, transformers_scaling(scaling), keys_read_by_attention(config)) | {
        RECORD: export_record(scaling)
    }


def _changes_nothing(model: PreTrainedModel, scaling: RopeScaling) -> bool:
    """True if `scaling` and the model's own config are both the original RoPE."""
    plain = all(window.is_identity for window in scaling.windows)
    return plain and scaling.target_length <= scaling.geometry.original_length and not scaling_of_config(model.config)


def _not_expressible(message: str) -> LongRopeError:
    return LongRopeError(message, code="not-expressible", hint=_SAVE_APART)


def _same_cosines(rotary: LongRopeRotary, config: Any, scaling: RopeScaling) -> bool:
    """True if a new rotary module of the family, made from `config`, has the cosines and sines of both windows."""
    fresh = type(rotary.original)(config)
    arguments = () if rotary.layer_type is None else (rotary.layer_type,)
    for window in scaling.windows:
        # Lengths choose the factors in transformers, and the last position makes the length.
        positions = torch.tensor([[*range(min(_PROBED, window.max_length - 1)), window.max_length - 1]])
        found = rotary.output.split(fresh(torch.zeros(1, positions.shape[1], 1), positions, *arguments))
        ours = rotary.output.split(rotary.output.of(*cos_sin(scaling.geometry, window, positions), torch.float32))
        for mine, theirs in zip(ours, found, strict=True):
            if not torch.allclose(mine[:, :-1], theirs[:, :-1].cpu(), rtol=0, atol=_TOLERANCE):
                return False
    return True


@contextmanager
def _written_into(config: Any, scaling: RopeScaling) -> Iterator[None]:
    """In the block, `config` writes itself to disk with `scaling` in it, and `scaling.json` beside it."""

    def to_json_file(path: Any, *args: Any, **kwargs: Any) -> None:
        del vars(config)["to_json_file"]  # the config is written with all its attributes
        config.to_json_file(path, *args, **kwargs)
        written = Path(path)
        write_json_atomic(written, scaled_config(read_json(written), config, scaling))
        scaling.save(written.with_name(SCALING))

    vars(config)["to_json_file"] = to_json_file
    try:
        yield
    finally:
        vars(config).pop("to_json_file", None)
