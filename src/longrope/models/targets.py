"""The lengths that a model may be extended to."""

from __future__ import annotations

from dataclasses import replace

from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.rope.closed_forms import CLOSED_FORMS
from longrope.rope.scaling import RopeScaling


def as_if_trained(loaded: LoadedModel, length: int) -> LoadedModel:
    """The model as if it supported `length` tokens already, with YaRN's factors in place of those not yet found.

    For planning a later search: its shapes and texts, not its numbers.
    """
    if length <= loaded.context_length:
        return loaded
    factors, attention_factor = CLOSED_FORMS["yarn"](loaded.geometry, length)
    return replace(loaded, checkpoint_scaling=RopeScaling.single(loaded.geometry, length, factors, 0, attention_factor))


def require_longer(loaded: LoadedModel, target_length: int) -> None:
    """Raise LongRopeError unless `target_length` is above the window that the checkpoint has."""
    if target_length <= loaded.context_length:
        raise LongRopeError(
            f"expected a target length above the model's window of {loaded.context_length} tokens, found "
            f"{target_length}",
            code="invalid-setting",
            hint=_guess_hint(loaded),
        )


def _guess_hint(loaded: LoadedModel) -> str:
    guess = loaded.original_length_guess
    length = loaded.geometry.original_length
    if guess:
        return f"its original window L of {length} is a guess ({guess}): give `original_length`"
    if loaded.checkpoint_scaling is not None:
        return ""
    return "if it was trained with less than its config states, give `original_length`"
