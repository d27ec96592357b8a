"""The interface of a suite of measurements, and `run_tasks`, which measures all methods on the same samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from longrope.callbacks import Callbacks
from longrope.data.documents import Document
from longrope.data.samples import Samples, draw_samples
from longrope.data.tokens import Ids, TokenizedDocument, bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.evaluation.compare import Comparison
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.results import EvalRow
from longrope.evaluation.task_log import TaskKey, TaskLog, TaskResult
from longrope.models.apply import scaled as with_scaling
from longrope.models.devices import says_where
from longrope.models.loading import LoadedModel
from longrope.models.scaled import ScaledModel
from longrope.models.shared_texts import says_sharing, sharing_processes
from longrope.models.texts import check_vocabulary
from longrope.rope.baselines import ORIGINAL, Method
from longrope.rope.scaling import RopeScaling
from longrope.storage import sha256_text

ScaledMethod = tuple[ScaledModel, Method]
"""A method and the model that it is measured on."""


@dataclass(frozen=True)
class TextContext:
    """The inputs of the samples of all suites. `documents` is empty where no suite needs text."""

    tokenizer: PreTrainedTokenizerBase
    lengths: Sequence[int]
    documents: Sequence[Document]
    seed: int
    config: EvalConfig

    @cached_property
    def tokenized(self) -> list[TokenizedDocument]:
        return tokenize(self.documents, self.tokenizer)

    @property
    def data_sha256(self) -> str | None:
        """The hash of the documents, whatever their order; None where there are none."""
        hashes = sorted({document.sha256 for document in self.documents})
        return sha256_text("\n".join(hashes)) if hashes else None

    def check_ids(self, ids: Ids) -> None:
        """Raise LongRopeError when a prompt has ids that the model does not know; where that is known."""

    def samples(self, length: int) -> Samples:
        """Plain texts of exactly `length` tokens."""
        drawn = draw_samples(
            self.tokenized,
            length=length,
            count=self.config.samples,
            seed=self.seed,
            bos_token_id=bos_of(self.tokenizer),
        )
        self.check_ids(drawn.ids.numpy())
        return drawn


@dataclass(frozen=True)
class EvalContext(TextContext):
    """The inputs that all suites on a loaded model share."""

    loaded: LoadedModel

    @classmethod
    def of(
        cls, loaded: LoadedModel, lengths: Sequence[int], documents: Sequence[Document], seed: int, config: EvalConfig
    ) -> EvalContext:
        """The context of `loaded` with its tokenizer."""
        return cls(loaded.tokenizer, lengths, documents, seed, config, loaded)

    def check_ids(self, ids: Ids) -> None:
        """Raise LongRopeError when a prompt has ids that the model has no embedding for."""
        check_vocabulary(self.loaded, torch.from_numpy(ids))


@dataclass(frozen=True, slots=True)
class EvalTask:
    """A suite, or one of its tasks, at one length; `steps` counts its calls of `on_eval_step` for each method."""

    suite: str
    task: str
    length: int
    steps: int


@dataclass(frozen=True)
class PreparedTask:
    """The samples of a task: their hash, their documents (SHA-256 -> name), and the function that measures them."""

    samples_sha256: str
    documents: dict[str, str]
    measure: Callable[[ScaledModel, Method, Callbacks], list[EvalRow]]


@dataclass(frozen=True)
class Suite(ABC):
    """One suite in the context of one evaluation."""

    context: TextContext
    name: ClassVar[str]
    by_length: ClassVar[bool] = True
    """True if the suite measures at the lengths asked for; False: inside the original window."""
    shareable: ClassVar[bool] = True
    """True if the suite can be measured on texts that several processes share: it scores texts, or measures inside the
    original window."""
    with_original: ClassVar[bool] = False
    """True if the suite measures the original model too, asked for or not."""

    @classmethod
    def needs_text(cls, config: EvalConfig) -> bool:
        """True if the suite draws from documents."""
        return True

    @abstractmethod
    def check(self) -> None:
        """Raise LongRopeError for anything that would stop a task, before the first one is measured."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings of this suite that decide its numbers, for the results file."""

    @abstractmethod
    def tasks(self) -> Iterator[EvalTask]:
        """The tasks in the order of the results."""

    @abstractmethod
    def prepare(self, task: EvalTask, original: ScaledMethod) -> PreparedTask:
        """The samples of `task`; `original` is the original model, which short texts are compared with."""


def sources_of(samples: Samples) -> dict[str, str]:
    """SHA-256 -> name of the documents that samples were taken from."""
    return {row.document_sha256: row.document for row in samples.origins}


def run_tasks(
    suites: Sequence[Suite],
    loaded: LoadedModel,
    comparison: Comparison,
    original: LoadedModel | None,
    log: TaskLog | None,
    callbacks: Callbacks,
) -> list[TaskResult]:
    """Measure every task of `suites` for every method on `loaded`, or take its result from `log`.

    The results come by suite, method and task. They are measured task by task, so that samples are made once and only
    those of one task exist. `original` is the model before it was extended, where that has other weights.

    Raises LongRopeError when a result in the log was measured on other samples than are drawn now, or the log cannot be
    written.
    """
    done = {} if log is None else dict(log.results)
    tasks = [(suite, task) for suite in suites for task in suite.tasks()]
    callbacks.on_device(says_where(loaded.model) + says_sharing(sharing_processes(loaded.model)))
    callbacks.on_eval_start(sum(task.steps * len(_methods(suite, comparison)) for suite, task in tasks))
    with ExitStack() as stack:
        scaled = before = stack.enter_context(with_scaling(loaded.model, RopeScaling.original(loaded.geometry)))
        if original is not None and original.model is not loaded.model:
            before = stack.enter_context(with_scaling(original.model, RopeScaling.original(original.geometry)))
        for suite, task in tasks:
            methods = [
                (before if method.name == ORIGINAL else scaled, method) for method in _methods(suite, comparison)
            ]
            for result in _measured(suite, task, methods, (before, comparison.original), done, callbacks):
                if log is not None:
                    log.append(result)
                done[result.key] = result
    keys = [_key(task, method) for suite in suites for method in _methods(suite, comparison) for task in suite.tasks()]
    return [done[key] for key in dict.fromkeys(keys)]  # two suites may have a task in common


def _methods(suite: Suite, comparison: Comparison) -> list[Method]:
    """The methods that a suite measures: `comparison`'s, and the original model where the suite needs it."""
    missing = suite.with_original and ORIGINAL not in (method.name for method in comparison.methods)
    return [*([comparison.original] if missing else []), *comparison.methods]


def _measured(
    suite: Suite,
    task: EvalTask,
    methods: Sequence[ScaledMethod],
    original: ScaledMethod,
    done: dict[TaskKey, TaskResult],
    callbacks: Callbacks,
) -> Iterator[TaskResult]:
    """The results of a task for the methods that are not done yet."""
    missing = [(scaled, method) for scaled, method in methods if _key(task, method) not in done]
    for _ in range(task.steps * (len(methods) - len(missing))):
        callbacks.on_eval_step()
    if not missing:
        return
    prepared = suite.prepare(task, original)
    for _, method in methods:
        kept = done.get(_key(task, method))
        if kept is not None and kept.samples_sha256 != prepared.samples_sha256:
            raise LongRopeError(
                f"the finished result of {method.name} in {task.suite} at {task.length} tokens was measured on other "
                "samples than are drawn now",
                code="other-run",
                hint="choose another `output`",
            )
    for scaled, method in missing:
        try:
            rows = prepared.measure(scaled, method, callbacks)
        except LongRopeError as error:
            if error.code == "not-finite":
                raise error.within(f"{task.suite} of {method.name} at {task.length} tokens") from error
            raise
        yield TaskResult(_key(task, method), tuple(rows), prepared.samples_sha256, prepared.documents)


def _key(task: EvalTask, method: Method) -> TaskKey:
    return TaskKey(method.name, task.suite, task.task, task.length)
