"""The objectives of a search: the mean loss of scored tokens over texts that all candidates share, and its gradient.

- `PerplexityObjective`: every token counts (LongRoPE, 2402.13753, §3.2).
- `NeedleObjective`: only the tokens of the answer about a hidden number count (needle-driven perplexity, LongRoPE2,
  2502.20082, §3.2). Plain perplexity averages over tokens that hardly need the far context; the answer needs it.

Texts run one at a time, so memory does not grow with their number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longrope.data.needles import NeedleSamples
from longrope.data.samples import Samples
from longrope.models.config import LayerInputs
from longrope.models.devices import device_of
from longrope.models.scaled import ScaledModel
from longrope.models.scoring import loss_and_gradient, token_nll
from longrope.rope.scaling import Window


@dataclass(frozen=True)
class SampledObjective(ABC):
    """The mean loss, in nats per scored token, of `samples` under a window: Σ NLL / Σ tokens."""

    scaled: ScaledModel
    samples: Samples
    layer_inputs: LayerInputs = "keep"
    """Where a gradient keeps the input of every layer; the numbers are the same."""

    @property
    def ids(self) -> Tensor:
        """int64 (N, T)."""
        return self.samples.ids

    @abstractmethod
    def scored(self, row: int) -> int:
        """The number of tokens at the end of `row` that are scored, at most T − 1."""

    @property
    def count(self) -> int:
        """N, the number of rows."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """T, the tokens of each row."""
        return self.ids.shape[1]

    def nlls(self, window: Window, rows: Sequence[int] | None = None) -> list[Tensor]:
        """The loss in nats of every scored token, one tensor (scored(row),) for each of `rows` (default: all)."""
        self.scaled.model.eval()
        with self.scaled.using(window), torch.inference_mode():
            return [token_nll(self.scaled.model, self._row(row), start=self._start(row))[0] for row in self._rows(rows)]

    def loss(self, window: Window, rows: Sequence[int] | None = None) -> float:
        """The mean loss of `rows` (default: all); NaN where the model's own numbers are. Sums are taken in float64."""
        return sum(float(nll.sum(dtype=torch.float64)) for nll in self.nlls(window, rows)) / self._tokens(rows)

    def loss_and_gradient(self, window: Window, rows: Sequence[int] | None = None) -> tuple[float, tuple[float, ...]]:
        """`loss`, and its derivatives by λ_0 … λ_{D−1} and the attention factor (D + 1 numbers).

        Memory stays near that of scoring, beside the inputs of layers that `layer_inputs` has on the device
        (`models/scoring.py`).
        """
        tokens, total = self._tokens(rows), 0.0
        gradient = torch.zeros(len(window.factors) + 1, dtype=torch.float64, device=device_of(self.scaled.model))
        for row in self._rows(rows):
            ids, start = self._row(row), self._start(row)
            how: dict[str, Any] = {"start": start, "divisor": tokens, "layer_inputs": self.layer_inputs}
            loss, by_factors = loss_and_gradient(self.scaled, window, ids, **how)
            total, gradient = total + loss, gradient + by_factors
        return total, tuple(gradient.tolist())

    def _row(self, row: int) -> Tensor:
        """The ids (1, T) of a row."""
        return self.ids[row : row + 1].to(device_of(self.scaled.model))

    def _start(self, row: int) -> int:
        """The position whose next token is the first that is scored."""
        return self.length - self.scored(row) - 1

    def _rows(self, rows: Sequence[int] | None) -> Sequence[int]:
        return range(self.count) if rows is None else rows

    def _tokens(self, rows: Sequence[int] | None) -> int:
        return sum(self.scored(row) for row in self._rows(rows))


@dataclass(frozen=True)
class NeedleObjective(SampledObjective):
    """Mean negative log-likelihood, in nats per token, of the answers of `samples`: Σ NLL / Σ answer tokens.

    Only the answers' logits are made: the head runs on as many positions at the end of a row as its answer has tokens.
    """

    samples: NeedleSamples

    def scored(self, row: int) -> int:
        return self.samples.answer_tokens[row]


@dataclass(frozen=True)
class PerplexityObjective(SampledObjective):
    """Mean negative log-likelihood, in nats per token, of `samples` (N, T). Its exponential is the perplexity."""

    def scored(self, row: int) -> int:
        return self.samples.length - 1
