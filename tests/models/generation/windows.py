"""Scalings with several short windows, and generation without a cache: what every cached generation has to equal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from longrope.models.apply import geometry_of
from longrope.models.scaled import ScaledModel
from longrope.rope.scaling import RopeScaling, Window
from tests.models.families import WINDOW

SECOND, LAST = WINDOW + 8, 8 * WINDOW


def three_windows(model: PreTrainedModel) -> RopeScaling:
    """As v1 leaves them after recovery: limits at 64, 72 and 512 tokens, attention factors, and start tokens."""
    geometry = geometry_of(model)
    pairs = geometry.pairs
    windows = (
        Window(WINDOW, np.ones(pairs)),
        Window(SECOND, np.linspace(1, 2, pairs), attention_factor=1.1),
        Window(LAST, np.linspace(1.5, 8, pairs), start_tokens=2, attention_factor=1.2),
    )
    return RopeScaling(geometry, windows)


def uncached(
    scaled: ScaledModel, ids: Tensor, count: int, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy continuation, each token from a forward of the whole text: ids (B, T + count), logits (B, count, V)."""
    kept = []
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    for _ in range(count):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = scaled.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[
                :, -1
            ]
        kept.append(logits)
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids, torch.stack(kept, dim=1)
