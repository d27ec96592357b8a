"""Training of a standalone model on next-byte prediction: AdamW on random rows. Not the fine-tuning of checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from longrope.callbacks import Callbacks, TrainProgress
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
    callbacks: Callbacks,
) -> list[float]:
    """Train on `batch` rows of `length` bytes to predict in each of `steps` steps; returns the loss of every step.

    The learning rate warms up linearly over a twentieth of the steps, then falls by a cosine to a tenth. Raises
    LongRopeError for settings that cannot be, for texts that are too short, and when the loss is not finite.
    """
    length, steps = whole_number("length", length, 1), whole_number("steps", steps, 1)
    batch, seed = whole_number("batch", batch, 1), whole_number("seed", seed, 0)
    peak = positive_number("learning_rate", learning_rate)
    model.scaling.window_for(length)
    long_enough = [text for text in texts if len(text) > length]
    if not long_enough:
        raise LongRopeError(
            f"expected a text of more than {length} bytes to train on; found none", code="too-short-text"
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95))
    rng = np.random.default_rng(seed)
    losses: list[float] = []
    model.train()
    callbacks.on_train_start(steps, 0)
    began = time.monotonic()
    try:
        for step in range(1, steps + 1):
            loss = next_byte_loss(model, draw_rows(long_enough, length + 1, batch, rng))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise LongRopeError(
                    f"the loss became {losses[-1]} at step {step}",
                    code="not-finite",
                    hint=f"train with a `learning_rate` below {peak:g}",
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            for group in optimizer.param_groups:
                group["lr"] = peak * _rate(step, steps)
            optimizer.step()
            rate = step * batch * length / max(time.monotonic() - began, 1e-9)
            callbacks.on_train_progress(TrainProgress(step, losses[-1], rate))
    finally:
        model.zero_grad()
        model.eval()
    return losses


def draw_rows(texts: Sequence[Bytes], length: int, count: int, rng: np.random.Generator) -> Tensor:
    """Draw `count` rows of `length` consecutive bytes, int64 (B, length), from all places of `texts` alike."""
    ends = np.cumsum([len(text) - length + 1 for text in texts])
    rows = np.empty((count, length), dtype=np.int64)
    for row, place in zip(rows, rng.integers(ends[-1], size=count), strict=True):
        index = int(np.searchsorted(ends, place, side="right"))
        start = int(place) - (int(ends[index - 1]) if index else 0)
        row[:] = texts[index][start : start + length]
    return torch.from_numpy(rows)


def _rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at `step`, from 1."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step <= warm_up:
        return step / warm_up
    done = (step - warm_up) / (steps - warm_up)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
