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
    """A model with its installed rotary modules (one in current transformers, more in remote code)."""

    model: PreTrainedModel
    rotaries: tuple[LongRopeRotary, ...]

    @property
    def scaling(self) -> RopeScaling:
        return self.rotaries[0].scaling

    def fix(self, window: Window | None, factors: Tensor | None = None, attention_factor: Tensor | None = None) -> None:
        """Use `window` in every forward (None: chosen by the longest position again).

        `factors` (D,) and `attention_factor` replace the window's numbers by tensors that gradients flow through.
        """
        for rotary in self.rotaries:
            rotary.fixed, rotary.factors, rotary.attention_factor = window, factors, attention_factor

    @contextmanager
    def using(
        self, window: Window | None, factors: Tensor | None = None, attention_factor: Tensor | None = None
    ) -> Iterator[PreTrainedModel]:
        """`fix` for the length of a `with` block; what was fixed before is fixed again after it."""
        first = self.rotaries[0]  # all are always fixed alike
        before = (first.fixed, first.factors, first.attention_factor)
        self.fix(window, factors, attention_factor)
        try:
            yield self.model
        finally:
            self.fix(*before)
