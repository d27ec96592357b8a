"""The handle on a model with a scaling applied: the window in force, and the methods of the model that are replaced.

`apply.py` replaces the rotary modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.rotary import LongRopeRotary
from longrope.rope.scaling import RopeScaling, Window


@dataclass(frozen=True)
class ScaledModel:
    """A model with a scaling applied, and its rotary modules (one in current transformers, more in remote code)."""

    model: PreTrainedModel
    rotaries: tuple[LongRopeRotary, ...]
    places: tuple[tuple[nn.Module, str, LongRopeRotary], ...]
    """Every module that holds a rotary module, the name under which it does, and the rotary module."""

    @property
    def scaling(self) -> RopeScaling:
        return self.rotaries[0].scaling

    @property
    def pinned(self) -> Window | None:
        """The window of every forward; None where the longest position chooses it."""
        return self.rotaries[0].pinned  # all are always pinned alike

    def pin_window(
        self,
        window: Window | None,
        factors: Tensor | None = None,
        attention_factor: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """Use `window` in every forward; None: the longest position chooses the window again.

        `factors` (D,) and `attention_factor` replace the window's numbers by tensors that gradients flow through.
        `positions` (B, N) are rotated by in the place of positions 0 … N − 1; masks stay those of the latter.

        Raises LongRopeError where this scaling was removed from the model since, or replaced.
        """
        if any(parent._modules.get(name) is not rotary for parent, name, rotary in self.places):
            raise not_applied(self.model)
        self._pin(window, factors, attention_factor, positions)

    def _pin(
        self,
        window: Window | None,
        factors: Tensor | None,
        attention_factor: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        for rotary in self.rotaries:
            rotary.pinned, rotary.factors, rotary.attention_factor = window, factors, attention_factor
            rotary.positions = positions

    @contextmanager
    def using(
        self, window: Window | None, factors: Tensor | None = None, attention_factor: Tensor | None = None
    ) -> Iterator[PreTrainedModel]:
        """`pin_window` for the length of a `with` block; the window pinned before is pinned again after it.

        Raises LongRopeError as `pin_window` does.
        """
        first = self.rotaries[0]
        before = (first.pinned, first.factors, first.attention_factor, first.positions)
        self.pin_window(window, factors, attention_factor)
        try:
            yield self.model
        finally:
            self._pin(*before)  # also where the scaling was removed in the block


def handle_of(model: PreTrainedModel | ScaledModel) -> ScaledModel:
    """The handle on a model to which a scaling is applied. Raises LongRopeError when none is."""
    if isinstance(model, ScaledModel):
        return model
    for hook in method_hooks(model):
        return hook.scaled
    raise LongRopeError(
        f"expected a model with a scaling, found {type(model).__name__} without",
        code="no-scaling",
        hint="call `apply_scaling(model, scaling)` first",
    )


def not_applied(model: PreTrainedModel) -> LongRopeError:
    """The error for a handle on `model` whose scaling is no longer applied to it."""
    return LongRopeError(
        f"this scaling is no longer applied to {type(model).__name__}",
        code="not-applied",
        hint="give what the last `apply_scaling` returned",
    )


class MethodHook:
    """Replaces a method of a scaled model, on the instance; `own` is the replaced method."""

    def __init__(self, scaled: ScaledModel, name: str) -> None:
        self.scaled, self.name = scaled, name
        self.own: Any = getattr(scaled.model, name)
        self.__wrapped__ = self.own  # transformers looks at the signature

    def put(self) -> None:
        """Replace the method."""
        setattr(self.scaled.model, self.name, self)

    def take_off(self) -> None:
        """Give the model its own method back."""
        model = self.scaled.model
        delattr(model, self.name)
        if getattr(model, self.name) != self.own:  # it was on the instance before
            setattr(model, self.name, self.own)


def method_hooks(model: PreTrainedModel) -> list[MethodHook]:
    """The hooks that are on `model`."""
    return [value for value in vars(model).values() if isinstance(value, MethodHook)]
