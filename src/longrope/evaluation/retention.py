"""What is left of the original model inside its own window: perplexity, and how often the next token is the same.

Benchmarks through lm-eval are in harness.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longrope.data.samples import Samples
from longrope.evaluation.perplexity import perplexity
from longrope.evaluation.results import EvalRow, mean_and_stderr
from longrope.models.scaled import ScaledModel
from longrope.models.scoring import top_tokens
from longrope.rope.baselines import Method

SUITE = "retention"


def most_likely(
    scaled: ScaledModel, samples: Samples, method: Method, *, on_sample: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """The most likely next token after every position of every sample: N tensors int64 (length,), on the CPU."""
    scaled.model.eval()
    found = []
    with scaled.using(method.window(samples.length)) as model, torch.inference_mode():
        for ids in samples.ids.to(model.device):
            found.append(top_tokens(model, ids[None])[0].cpu())
            on_sample()
    return found


def retention(
    scaled: ScaledModel,
    samples: Samples,
    method: Method,
    original: Sequence[Tensor],
    *,
    on_sample: Callable[[], None] = lambda: None,
) -> list[EvalRow]:
    """Two rows: perplexity of `samples`, which are as long as the original window, and `top1_agreement`.

    The agreement is the share of positions whose most likely next token is that of `original`, which are the
    `most_likely` of the original model; its standard error is over samples. `on_sample` is called twice per sample.
    """
    (row,) = perplexity(scaled, samples, [samples.length], method, on_sample=on_sample)
    own = most_likely(scaled, samples, method, on_sample=on_sample)
    shares = [float((mine == theirs).double().mean()) for mine, theirs in zip(own, original, strict=True)]
    agreement = mean_and_stderr(shares)
    return [
        replace(row, suite=SUITE),
        EvalRow(SUITE, method.name, samples.length, "top1_agreement", *agreement, len(shares)),
    ]
