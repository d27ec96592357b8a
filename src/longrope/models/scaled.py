"""The handle on a model whose rotary modules apply a `RopeScaling`: which window is in force, and how to pin another.

Not how the modules are replaced: that is `apply.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from longrope.models.rotary import LongRopeRotary
from longrope.rope.scaling import RopeScaling, Window


@dataclass(frozen=True)
class ScaledModel:
    """A model with a scaling applied, and its rotary modules (one in current transformers, more in remote code)."""

    model: PreTrainedModel
    rotaries: tuple[LongRopeRotary, ...]

    @property
    def scaling(self) -> RopeScaling:
        return self.rotaries[0].scaling

    def pin_window(
        self, window: Window | None, factors: Tensor | None = None, attention_factor: Tensor | None = None
    ) -> None:
        """Use `window` in every forward; None: the longest position chooses the window again.

        `factors` (D,) and `attention_factor` replace the window's numbers by tensors that gradients flow through.
        """
        for rotary in self.rotaries:
            rotary.pinned, rotary.factors, rotary.attention_factor = window, factors, attention_factor

    @contextmanager
    def using(
        self, window: Window | None, factors: Tensor | None = None, attention_factor: Tensor | None = None
    ) -> Iterator[PreTrainedModel]:
        """`pin_window` for the length of a `with` block; the window pinned before is pinned again after it."""
        first = self.rotaries[0]  # all are always pinned alike
        before = (first.pinned, first.factors, first.attention_factor)
        self.pin_window(window, factors, attention_factor)
        try:
            yield self.model
        finally:
            self.pin_window(*before)
