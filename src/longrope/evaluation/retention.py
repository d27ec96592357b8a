"""Short-context quality, the suite `retention`: the model inside its original window, compared with the original model.

Perplexity of texts as long as that window, the share of positions with the same most likely next token, and any of
lm-eval's benchmarks (harness.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longrope.callbacks import Callbacks
from longrope.data.samples import Samples
from longrope.evaluation.base import EvalTask, PreparedTask, ScaledMethod, sources_of
from longrope.evaluation.config import EvalConfig, HarnessTask
from longrope.evaluation.harness import RETENTION, BenchmarkSuite
from longrope.evaluation.perplexity import measure_perplexity
from longrope.evaluation.results import EvalRow, mean_and_stderr
from longrope.models.devices import device_of
from longrope.models.scaled import ScaledModel
from longrope.models.scoring import top_tokens
from longrope.rope.baselines import Method


def most_likely_tokens(
    scaled: ScaledModel, samples: Samples, method: Method, *, callbacks: Callbacks | None = None
) -> list[Tensor]:
    """The most likely next token after every position of every sample: N tensors int64 (length,), on the CPU."""
    callbacks = callbacks or Callbacks()
    scaled.model.eval()
    found = []
    with scaled.using(method.window(samples.length)) as model, torch.inference_mode():
        for ids in samples.ids.to(device_of(model)):
            found.append(top_tokens(model, ids[None])[0].cpu())
            callbacks.on_eval_step()
    return found


def measure_retention(
    scaled: ScaledModel,
    samples: Samples,
    method: Method,
    original: Sequence[Tensor],
    *,
    callbacks: Callbacks | None = None,
) -> list[EvalRow]:
    """Two rows: perplexity of `samples`, which are as long as the original window, and `top1_agreement`.

    The agreement is the share of positions whose most likely next token is that of the original model (`original`, from
    `most_likely_tokens`); its standard error is over samples. A sample counts as two steps.
    """
    (row,) = measure_perplexity(scaled, samples, [samples.length], method, callbacks=callbacks)
    own = most_likely_tokens(scaled, samples, method, callbacks=callbacks)
    shares = [float((mine == theirs).double().mean()) for mine, theirs in zip(own, original, strict=True)]
    agreement = mean_and_stderr(shares)
    return [
        replace(row, suite=RETENTION),
        EvalRow(RETENTION, method.name, samples.length, "top1_agreement", *agreement, len(shares)),
    ]


class RetentionSuite(BenchmarkSuite):
    """Short-context quality: texts of the original window, and the benchmarks of lm-eval in `config.tasks`."""

    name = RETENTION

    @classmethod
    def needs_text(cls, config: EvalConfig) -> bool:
        return True

    @property
    def benchmarks(self) -> tuple[HarnessTask, ...]:
        return self.context.config.tasks

    @cached_property
    def samples(self) -> Samples:
        return self.context.samples(self.length)

    def check(self) -> None:
        _ = self.samples
        super().check()

    def settings(self) -> dict[str, Any]:
        return {"samples": self.context.config.samples, **super().settings()}

    def tasks(self) -> Iterator[EvalTask]:
        yield EvalTask(self.name, "", self.length, 2 * self.context.config.samples)
        yield from super().tasks()

    def prepare(self, task: EvalTask, original: ScaledMethod) -> PreparedTask:
        if task.task:
            return super().prepare(task, original)
        theirs = most_likely_tokens(original[0], self.samples, original[1])  # once, for all methods
        return PreparedTask(
            self.samples.sha256,
            sources_of(self.samples),
            lambda scaled, method, callbacks: measure_retention(
                scaled, self.samples, method, theirs, callbacks=callbacks
            ),
        )
