"""Training of a standalone model on next-byte prediction: AdamW on random rows. Not the fine-tuning of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from longrope.checks import positive_number, whole_number
from longrope.errors import LongRopeError
from longrope.standalone.model import StandaloneModel

Bytes = npt.NDArray[np.uint8]

_WARM_UP, _LAST_RATE = 0.05, 0.1  # shares of the steps and of the learning rate
_CLIP = 1.0  # norm of the gradient


def next_byte_loss(model: StandaloneModel, rows: Tensor) -> Tensor:
    """Mean loss, in nats per byte, of predicting each next byte of `rows`, int64 (B, T + 1)."""
    rows = rows.to(model.lm_head.weight.device)
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def fit(
    model: StandaloneModel,
    texts: Sequence[Bytes],
    *,
    length: int,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    on_progress: Callable[[int, float], None],
) -> list[float]:
    """Take `steps` steps, each on `batch` rows of `length` bytes to predict; returns their losses (LongRoPEModel.fit).

    Raises LongRopeError for settings that cannot be, for texts that are too short, and when the loss is not finite.
    """
    length, steps = whole_number("length", length, 1), whole_number("steps", steps, 1)
    batch, seed = whole_number("batch", batch, 1), whole_number("seed", seed, 0)
    peak = positive_number("learning_rate", learning_rate)
    model.scaling.window_for(length)
    long_enough = [text for text in texts if len(text) > length]
    if not long_enough:
        raise LongRopeError(f"expected a text of more than {length} bytes to train on; found none")
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95))
    rng = np.random.default_rng(seed)
    losses: list[float] = []
    model.train()
    try:
        for step in range(1, steps + 1):
            loss = next_byte_loss(model, draw_rows(long_enough, length + 1, batch, rng))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise LongRopeError(
                    f"the loss became {losses[-1]} at step {step}; train with a learning rate below {peak:g}"
                )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            for group in optimiser.param_groups:
                group["lr"] = peak * _rate(step, steps)
            optimiser.step()
            on_progress(step, losses[-1])
    finally:
        model.zero_grad()
        model.eval()
    return losses


def draw_rows(texts: Sequence[Bytes], length: int, count: int, rng: np.random.Generator) -> Tensor:
    """`count` rows of `length` consecutive bytes, int64: every place in `texts` is as likely as any other."""
    ends = np.cumsum([len(text) - length + 1 for text in texts])
    rows = np.empty((count, length), dtype=np.int64)
    for row, place in zip(rows, rng.integers(ends[-1], size=count), strict=True):
        index = int(np.searchsorted(ends, place, side="right"))
        start = int(place) - (int(ends[index - 1]) if index else 0)
        row[:] = texts[index][start : start + length]
    return torch.from_numpy(rows)


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate at `step` (from 1): a linear warm-up, then a cosine from 1 to a tenth."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step <= warm_up:
        return step / warm_up
    done = (step - warm_up) / (steps - warm_up)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
