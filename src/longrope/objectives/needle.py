"""Needle-driven perplexity (LongRoPE2, §3.2): the loss of the answer's tokens alone, over shared samples.

Plain perplexity averages over tokens that hardly need the far context; the answer needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longrope.data.needles import NeedleSamples
from longrope.models.install import Installed
from longrope.models.scoring import token_nll
from longrope.rope.scaling import Window


@dataclass(frozen=True)
class NeedleObjective:
    """Mean negative log-likelihood, in nats per token, of the answers of `samples`: Σ NLL / Σ answer tokens."""

    installed: Installed
    samples: NeedleSamples
    name: str = "needle"

    @property
    def token_passes(self) -> int:
        """Tokens that one evaluation sends through the model (a forward counts 1 per token)."""
        return self.samples.ids.numel()

    def loss(self, window: Window) -> float:
        """The loss of one window; NaN where the model's own numbers are."""
        nlls = self.answer_nlls(window)
        return sum(float(nll.sum(dtype=torch.float64)) for nll in nlls) / sum(self.samples.answer_tokens)

    def answer_nlls(self, window: Window) -> list[Tensor]:
        """The loss, in nats, of every answer token (answer_tokens[j],) of every sample, in their order.

        Only the answer's logits are made: the head runs on the last `answer_tokens[j]` positions.
        """
        model, length = self.installed.model, self.samples.length
        model.eval()
        nlls = []
        with self.installed.using(window), torch.inference_mode():
            for row, tokens in zip(self.samples.ids, self.samples.answer_tokens, strict=True):
                nlls.append(token_nll(model, row[None].to(model.device), start=length - tokens - 1)[0])
        return nlls
