"""The perplexity objective: mean next-token loss over samples that every candidate shares (LongRoPE, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longrope.data.samples import Samples
from longrope.models.install import Installed
from longrope.objectives.sampled import SampledObjective


@dataclass(frozen=True)
class PerplexityObjective(SampledObjective):
    """Mean negative log-likelihood, in nats per token, of `samples` (N, T). Its exponential is the perplexity."""

    installed: Installed
    samples: Samples
    name: str = "perplexity"

    @property
    def ids(self) -> Tensor:
        return self.samples.ids

    def scored(self, row: int) -> int:
        return self.samples.length - 1
