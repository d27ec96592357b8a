"""Needle-driven perplexity (LongRoPE2, §3.2): the loss of the answer's tokens alone, over shared samples.

Plain perplexity averages over tokens that hardly need the far context; the answer needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longrope.data.needles import NeedleSamples
from longrope.models.install import Installed
from longrope.objectives.sampled import SampledObjective


@dataclass(frozen=True)
class NeedleObjective(SampledObjective):
    """Mean negative log-likelihood, in nats per token, of the answers of `samples`: Σ NLL / Σ answer tokens.

    Only the answers' logits are made: the head runs on as many positions at the end of a row as its answer has tokens.
    """

    installed: Installed
    samples: NeedleSamples
    name: str = "needle"

    @property
    def ids(self) -> Tensor:
        return self.samples.ids

    def scored(self, row: int) -> int:
        return self.samples.answer_tokens[row]
