"""The perplexity objective: mean next-token loss over samples that every candidate shares (LongRoPE, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longrope.data.samples import Samples
from longrope.models.install import Installed
from longrope.models.scoring import token_nll
from longrope.rope.scaling import Window


@dataclass(frozen=True)
class PerplexityObjective:
    """Mean negative log-likelihood, in nats per token, of `samples` (N, T) under a window: Σ NLL / Σ tokens.

    Its exponential is the perplexity. Samples run one at a time, so memory does not grow with their number.
    """

    installed: Installed
    samples: Samples
    name: str = "perplexity"

    @property
    def token_passes(self) -> int:
        """Tokens that one evaluation sends through the model (a forward counts 1 per token)."""
        return self.samples.ids.numel()

    def loss(self, window: Window) -> float:
        """The loss of one window; NaN where the model's own numbers are."""
        return sum(self.sample_sums(window)) / (self.samples.ids.shape[0] * (self.samples.length - 1))

    def sample_sums(self, window: Window) -> list[float]:
        """Σ NLL in nats of every sample, in their order. Sums are taken in float64."""
        model = self.installed.model
        model.eval()
        sums = []
        with self.installed.using(window), torch.inference_mode():
            for row in self.samples.ids:
                nll = token_nll(model, row[None].to(model.device))
                sums.append(float(nll.sum(dtype=torch.float64)))
        return sums
