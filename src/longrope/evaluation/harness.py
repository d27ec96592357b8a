"""Short-text benchmarks through lm-eval, on a model with a scaling applied; the suite `open-llm`.

lm-eval takes a model object and a tokenizer; its tasks fetch their data from the hub, unless they are a local YAML file
with local data.
"""

from __future__ import annotations

import copy
import io
import math
import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrope.callbacks import Callbacks
from longrope.errors import LongRopeError, one_line
from longrope.evaluation.base import EvalContext, EvalTask, PreparedTask, ScaledMethod, Suite
from longrope.evaluation.config import EvalConfig, HarnessTask
from longrope.evaluation.results import EvalRow
from longrope.evaluation.task_files import refuse_code, sandboxed_templates
from longrope.models.finite import require_finite_logits
from longrope.models.scaled import ScaledModel
from longrope.rope.baselines import Method
from longrope.written import sha256_file

RETENTION = "retention"
"""The suite that the rows of all benchmarks belong to."""
_RESAMPLINGS = 1000  # for the standard error of metrics that have no formula

OPEN_LLM = (
    HarnessTask("arc_challenge", 25),
    HarnessTask("hellaswag", 10),
    HarnessTask("mmlu", 5),
    HarnessTask("truthfulqa_mc2", 0),
)
"""The short benchmarks that LongRoPE reports, as the first Open LLM Leaderboard ran them."""


class Harness:
    """lm-eval with its list of tasks, which takes seconds to read: one for all methods."""

    def __init__(self, tasks: list[HarnessTask], *, trust_remote_code: bool = False) -> None:
        """Read lm-eval's tasks. `trust_remote_code` lets task files run code that comes with them.

        Raises LongRopeError where lm-eval is missing or does not have one of `tasks`, or one would run such code.
        """
        try:
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise LongRopeError(
                "benchmarks need lm-eval", code="missing-dependency", hint='pip install "longrope[eval]"'
            ) from error
        self._wrapper = HFLM
        self._manager = TaskManager(include_defaults=not all(task.is_file for task in tasks))
        known = set(self._manager.all_tasks)
        for task in tasks:
            if not (Path(task.name).is_file() if task.is_file else task.name in known):
                raise LongRopeError(
                    f"lm-eval has no task {task.name!r}",
                    code="invalid-setting",
                    hint="give one of its names or the path of a YAML file",
                )
        self._sandboxed = not trust_remote_code and any(task.is_file for task in tasks)
        if self._sandboxed:
            refuse_code(tasks)

    def measure(
        self,
        scaled: ScaledModel,
        tokenizer: PreTrainedTokenizerBase,
        task: HarnessTask,
        method: Method,
        *,
        length: int,
        limit: int | None = None,
        batch_size: int = 1,
        seed: int = 0,
    ) -> list[EvalRow]:
        """A row per metric of `task`, named as lm-eval names it, with lm-eval's standard error.

        All texts, whatever their length, are read under the window for `length` tokens; lm-eval cuts longer ones from
        the left. `limit` takes the first questions only. Raises LongRopeError when lm-eval cannot run the task, and for
        logits that are not finite.
        """
        from lm_eval import simple_evaluate

        templates = sandboxed_templates() if self._sandboxed else nullcontext()
        with scaled.using(method.window(length)) as model, _quiet(), templates, _finite_logits(model):
            try:
                # A copy of the tokenizer: lm-eval may give it a padding token.
                wrapped = self._wrapper(
                    pretrained=model, tokenizer=copy.deepcopy(tokenizer), max_length=length, batch_size=batch_size
                )
                found = simple_evaluate(
                    wrapped,
                    tasks=[task.name],
                    num_fewshot=task.shots,
                    limit=limit,
                    task_manager=self._manager,
                    bootstrap_iters=_RESAMPLINGS,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
            except LongRopeError:
                raise
            except Exception as error:  # tasks are foreign code, and their data comes over the network
                raise LongRopeError(
                    f"lm-eval cannot run {task.name}: {one_line(error)}", code="runtime-fault"
                ) from error
        return _rows(found, task, method.name, length)


@contextmanager
def _finite_logits(model: PreTrainedModel) -> Iterator[None]:
    """Raises LongRopeError inside the block where `model` computes logits that are not finite: lm-eval would compare
    them all the same."""

    def check(_module: Any, _inputs: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None:
            require_finite_logits(model, logits, logits.shape[-2])

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences standard error, that of child processes too: lm-eval draws bars and asks git for its version."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(io.StringIO()):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _rows(found: dict[str, Any], asked: HarnessTask, scaling: str, length: int) -> list[EvalRow]:
    """The rows of the task or group `asked`, or of every task that its file or tag stands for.

    Their detail has the task, the solved examples where they were asked for, and `higher_is_better` where lm-eval says
    it.
    """
    shots = {} if asked.shots is None else {"shots": asked.shots}
    counts = {task: count["effective"] for task, count in found["n-samples"].items()}
    rows = []
    for task in [asked.name] if asked.name in found["results"] else found["results"]:
        directions = found.get("higher_is_better", {}).get(task) or {}
        own = found["results"][task]
        trials = counts.get(task, sum(counts.values()))  # a group has the questions of all its tasks
        for metric, value in own.items():
            base, _, chosen = metric.partition(",")
            if not chosen or base.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = own.get(f"{base}_stderr,{chosen}")
            known = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
            said = directions.get(base)
            better = {"higher_is_better": said} if isinstance(said, bool) else {}
            detail = {"task": task, **shots, **better}
            rows.append(EvalRow(RETENTION, scaling, length, metric, float(value), known, trials, detail))
    return rows


class BenchmarkSuite(Suite):
    """A suite that runs `benchmarks` of lm-eval inside the original window, on the original model too."""

    context: EvalContext
    by_length = False
    with_original = True

    @classmethod
    def needs_text(cls, config: EvalConfig) -> bool:
        return False

    @property
    @abstractmethod
    def benchmarks(self) -> tuple[HarnessTask, ...]:
        """The tasks of lm-eval."""

    @property
    def length(self) -> int:
        return self.context.loaded.geometry.original_length

    @cached_property
    def harness(self) -> Harness:
        trusted = self.context.loaded.options.trust_remote_code
        return Harness(list(self.benchmarks), trust_remote_code=trusted)

    def check(self) -> None:
        if self.benchmarks:
            _ = self.harness

    def settings(self) -> dict[str, Any]:
        if not self.benchmarks:
            return {"length": self.length}
        files = {task.name: sha256_file(Path(task.name)) for task in self.benchmarks if task.is_file}
        return {
            "length": self.length,
            "tasks": list(map(str, self.benchmarks)),
            **({"task_files_sha256": files} if files else {}),
            "task_limit": self.context.config.task_limit,
            "task_batch": self.context.config.task_batch,
            "lm_eval": metadata.version("lm-eval"),
        }

    def tasks(self) -> Iterator[EvalTask]:
        for benchmark in self.benchmarks:
            yield EvalTask(RETENTION, str(benchmark), self.length, 1)

    def prepare(self, task: EvalTask, original: ScaledMethod) -> PreparedTask:
        benchmark = next(benchmark for benchmark in self.benchmarks if str(benchmark) == task.task)

        def measure(scaled: ScaledModel, method: Method, callbacks: Callbacks) -> list[EvalRow]:
            config = self.context.config
            rows = self.harness.measure(
                scaled,
                self.context.tokenizer,
                benchmark,
                method,
                length=self.length,
                limit=config.task_limit,
                batch_size=config.task_batch,
                seed=self.context.seed,
            )
            callbacks.on_eval_step()
            return rows

        return PreparedTask("", {}, measure)


class OpenLlmSuite(BenchmarkSuite):
    """The short benchmarks that LongRoPE reports. Their data come from the hub."""

    name = "open-llm"

    @property
    def benchmarks(self) -> tuple[HarnessTask, ...]:
        return OPEN_LLM
