"""Evaluators: windows in, losses out, in the order given. The serial one runs in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from longrope.rope.scaling import Window


class Objective(Protocol):
    """What an evaluator minimises: the loss of one window over samples that are fixed."""

    @property
    def name(self) -> str: ...

    @property
    def token_passes(self) -> int:
        """Tokens that one evaluation sends through the model."""

    def loss(self, window: Window) -> float: ...


class Evaluator(Protocol):
    """A source of losses. `evaluate` yields one loss per window, in order, each as soon as it is known."""

    def evaluate(self, windows: Sequence[Window]) -> Iterator[float]: ...


class SerialEvaluator:
    """One window after the other, in this process."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def evaluate(self, windows: Sequence[Window]) -> Iterator[float]:
        for window in windows:
            yield self.objective.loss(window)
