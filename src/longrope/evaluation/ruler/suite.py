"""The suite `ruler`: RULER's scores by task and length, their mean by length, and the effective lengths.

Scoring is RULER's own: the share of the reference strings that appear in a greedy reply, from 0 to 100.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import metadata
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from longrope.callbacks import Callbacks
from longrope.data.samples import draw_origins
from longrope.errors import LongRopeError
from longrope.evaluation.base import EvalTask, PreparedTask, ScaledMethod, Suite
from longrope.evaluation.config import PUBLISHED_SCORE, QA_TASK, EvalConfig
from longrope.evaluation.results import EvalRow, mean_and_stderr
from longrope.evaluation.retrieval import greedy_reply, row_tensor
from longrope.evaluation.ruler.generators import Questions
from longrope.evaluation.ruler.tasks import TOO_SHORT, RulerSamples, draw_task, needs_text
from longrope.evaluation.ruler.words import words_sha256
from longrope.models.devices import device_of
from longrope.models.generation.cache import prefill
from longrope.models.scaled import ScaledModel
from longrope.rope.baselines import ORIGINAL, Method

SUITE = "ruler"
MEAN = "mean"


def postprocess(reply: str) -> str:
    """A reply without surrounding blanks, control characters as line ends (scripts/eval/evaluate.py)."""
    return re.sub(r"[\x00-\x1f]", "\n", reply.strip()).strip()


def string_match_all(reply: str, references: Sequence[str]) -> float:
    """The share of the references that the reply holds, whatever their case, times 100."""
    said = reply.lower()
    return 100.0 * sum(reference.lower() in said for reference in references) / len(references)


def string_match_part(reply: str, references: Sequence[str]) -> float:
    """100 where the reply holds any of the references, else 0: for answers that may be worded differently."""
    said = reply.lower()
    return 100.0 * any(reference.lower() in said for reference in references)


def measure_ruler(
    scaled: ScaledModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: RulerSamples,
    method: Method,
    *,
    callbacks: Callbacks | None = None,
) -> list[EvalRow]:
    """One row: RULER's score of the task, 0 to 100, over greedy replies."""
    callbacks = callbacks or Callbacks()
    scaled.model.eval()
    window = method.window(samples.length)
    replies = []
    with torch.inference_mode():
        for sample in samples.samples:
            text = prefill(scaled, row_tensor(sample.ids, device_of(scaled.model)), window)
            replies.append(greedy_reply(text, tokenizer, [], sample.room))
            callbacks.on_eval_step()
    return [ruler_row(samples, replies, method.name)]


def ruler_row(samples: RulerSamples, replies: Sequence[str], name: str) -> EvalRow:
    """RULER's score of the task, 0 to 100, over `replies`, one to each sample."""
    match = string_match_part if samples.task == QA_TASK else string_match_all
    scores = [match(postprocess(reply), sample.answers) for reply, sample in zip(replies, samples.samples, strict=True)]
    detail = {"task": samples.task}
    return EvalRow(SUITE, name, samples.length, "score", *mean_and_stderr(scores), len(scores), detail)


def means(rows: Sequence[EvalRow]) -> list[EvalRow]:
    """The unweighted mean over tasks, for every method and length of the tasks' rows. Trials are all samples."""
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
    """The longest length whose mean reaches a threshold, two rows per method; 0 where none does.

    `rows` are those of `means`. *absolute*: `threshold`, which is comparable with RULER's table where all its tasks
    are measured. *relative*: `share` of the mean that the method `reference` (or, where that was not measured, the
    method itself) has at the longest length inside the original window, as RULER's own threshold is a model's score
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


def summary_rows(rows: Sequence[EvalRow], original_length: int, config: EvalConfig) -> list[EvalRow]:
    """The means over tasks, and the effective lengths: relative to the original model where it is measured."""
    averages = means(rows)
    reference = ORIGINAL if any(row.scaling == ORIGINAL for row in averages) else "none"
    return averages + effective_lengths(
        averages, original_length=original_length, reference=reference, threshold=config.threshold, share=config.share
    )


class RulerSuite(Suite):
    """RULER's tasks by length."""

    name = SUITE
    shareable = False

    @classmethod
    def needs_text(cls, config: EvalConfig) -> bool:
        return any(map(needs_text, config.chosen_ruler_tasks))

    @cached_property
    def questions(self) -> Questions | None:
        path = self.context.config.qa_file
        return None if path is None else Questions.read(path)

    def check(self) -> None:
        context, tasks = self.context, self.context.config.chosen_ruler_tasks
        words_sha256()  # the words are there
        faults: dict[str, LongRopeError] = {}
        for task in tasks:
            try:
                context.check_ids(self.draw(task, min(context.lengths), count=1).samples[0].ids)
            except LongRopeError as error:
                if error.code != TOO_SHORT:
                    raise
                faults[task] = error
        if faults:
            rest = ",".join(task for task in tasks if task not in faults)
            raise LongRopeError(
                "; ".join(error.message for error in faults.values()),
                code=TOO_SHORT,
                hint=f"give `ruler_tasks` of {rest}, or measure longer texts" if rest else "measure longer texts",
            )
        if self.needs_text(context.config):
            draw_origins(context.tokenized, span=max(context.lengths), count=context.config.trials, seed=context.seed)
        if self.questions is not None and QA_TASK in tasks:
            self.questions.draw(context.config.trials, random.Random(context.seed))

    def settings(self) -> dict[str, Any]:
        config = self.context.config
        chosen = {"trials": config.trials, "tasks": list(config.chosen_ruler_tasks)}
        words = {"wonderwords": metadata.version("wonderwords"), "words_sha256": words_sha256()}
        asked = {} if self.questions is None else {"questions_sha256": self.questions.sha256}
        return {**chosen, "threshold": config.threshold, "share": config.share, **asked, **words}

    def tasks(self) -> Iterator[EvalTask]:
        for length in self.context.lengths:
            for task in self.context.config.chosen_ruler_tasks:
                yield EvalTask(self.name, task, length, self.context.config.trials)

    def prepare(self, task: EvalTask, original: ScaledMethod) -> PreparedTask:
        drawn, tokenizer = self.draw(task.task, task.length, self.context.config.trials), self.context.tokenizer
        return PreparedTask(
            drawn.sha256,
            drawn.sources,
            lambda scaled, method, callbacks: measure_ruler(scaled, tokenizer, drawn, method, callbacks=callbacks),
        )

    def draw(self, task: str, length: int, count: int) -> RulerSamples:
        """`count` samples of `task` at `length` tokens."""
        return draw_task(
            task,
            self.context.tokenizer,
            length=length,
            count=count,
            seed=self.context.seed,
            documents=self.context.tokenized if needs_text(task) else [],
            questions=self.questions if task == QA_TASK else None,
        )
