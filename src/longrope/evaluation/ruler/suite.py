"""RULER's scores of a model: by task, their mean by length, and the effective length they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from longrope.evaluation.config import PUBLISHED_SCORE
from longrope.evaluation.replies import reply_text, row_tensor, stop_tokens
from longrope.evaluation.results import EvalRow, mean_and_stderr
from longrope.evaluation.ruler.scoring import postprocess
from longrope.evaluation.ruler.tasks import RulerSamples
from longrope.models.generation.cache import prefill
from longrope.models.scaled import ScaledModel
from longrope.rope.baselines import Method

SUITE = "ruler"
MEAN = "mean"


def ruler_task(
    scaled: ScaledModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: RulerSamples,
    method: Method,
    *,
    on_sample: Callable[[], None] = lambda: None,
) -> list[EvalRow]:
    """One row: RULER's score of the task, 0 to 100, over greedy replies."""
    scaled.model.eval()
    window = method.window(samples.length)
    stop = stop_tokens(scaled, tokenizer)
    device = scaled.model.device
    scores = []
    with torch.inference_mode():
        for sample in samples.samples:
            said = prefill(scaled, row_tensor(sample.ids, device), window).greedy(
                row_tensor([], device), sample.room, stop
            )
            scores.append(samples.score(postprocess(reply_text(tokenizer, said)), sample.answers))
            on_sample()
    detail = {"task": samples.task}
    return [EvalRow(SUITE, method.name, samples.length, "score", *mean_and_stderr(scores), len(scores), detail)]


def means(rows: Sequence[EvalRow]) -> list[EvalRow]:
    """The unweighted mean over tasks, for every contender and length of the tasks' rows. Trials are all samples."""
    groups: dict[tuple[str, int], list[EvalRow]] = {}
    for row in rows:
        groups.setdefault((row.scaling, row.length), []).append(row)
    result = []
    for (name, length), own in groups.items():
        value = math.fsum(row.value for row in own) / len(own)
        stderr = None
        if all(row.stderr is not None for row in own):  # of a mean of independent means
            stderr = math.sqrt(math.fsum((row.stderr or 0.0) ** 2 for row in own)) / len(own)
        trials = sum(row.trials for row in own)
        result.append(EvalRow(SUITE, name, length, "score", value, stderr, trials, {"task": MEAN}))
    return result


def effective_lengths(
    rows: Sequence[EvalRow], *, original_length: int, reference: str, threshold: float = PUBLISHED_SCORE, share: float
) -> list[EvalRow]:
    """The longest length whose mean reaches a threshold, two rows per contender; 0 where none does.

    `rows` are those of `means`. *absolute*: `threshold`, which is comparable with RULER's table where all its tasks
    are measured. *relative*: `share` of the mean that the contender `reference` (or, where that was not measured, the
    contender itself) has at the longest length inside the original window, as RULER's own threshold is a model's score
    at its own window; left out where no length lies inside.
    """
    by_name: dict[str, dict[int, EvalRow]] = {}
    for row in rows:
        by_name.setdefault(row.scaling, {})[row.length] = row
    result = []
    for name, own in by_name.items():
        rules: dict[str, tuple[float, dict[str, Any]]] = {"absolute": (threshold, {})}
        measured = by_name.get(reference, own)
        if inside := [length for length in measured if length <= original_length]:
            at = max(inside)
            of = {"of": reference if reference in by_name else name, "at": at, "share": share}
            rules["relative"] = (share * measured[at].value, of)
        for rule, (least, more) in rules.items():
            passing = [length for length, row in own.items() if row.value >= least]
            detail = {"threshold": least, "rule": rule, **more}
            trials = sum(row.trials for row in own.values())
            value = float(max(passing, default=0))
            result.append(EvalRow(SUITE, name, max(own), "effective_length", value, None, trials, detail))
    return result
