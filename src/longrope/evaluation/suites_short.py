"""The suites that measure inside the original window: what is left of the original model, and lm-eval's benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib import metadata
from typing import Any

from longrope.data.samples import Samples
from longrope.evaluation import retention
from longrope.evaluation.base import Entrant, Part, Prepared, Suite, sources_of
from longrope.evaluation.config import EvalConfig, HarnessTask
from longrope.evaluation.harness import OPEN_LLM, Harness
from longrope.evaluation.results import EvalRow
from longrope.models.scaled import ScaledModel
from longrope.rope.baselines import Method


class RetentionSuite(Suite):
    """Short texts against the original model, and lm-eval's benchmarks."""

    name = retention.SUITE
    by_length = False
    with_original = True

    @property
    def length(self) -> int:
        return self.material.loaded.geometry.original_length

    @property
    def tasks(self) -> tuple[HarnessTask, ...]:
        return self.material.options.tasks

    @cached_property
    def samples(self) -> Samples:
        return self.material.samples(self.length)

    @cached_property
    def harness(self) -> Harness:
        return Harness(list(self.tasks))

    def check(self) -> None:
        _ = self.samples
        if self.tasks:
            _ = self.harness

    def settings(self) -> dict[str, Any]:
        return {"samples": self.material.options.samples, "length": self.length, **self._harness_settings()}

    def parts(self) -> Iterator[Part]:
        steps = 2 * self.material.options.samples
        yield Part(self.name, "", self.length, steps, self._prepare)
        yield from self._benchmarks()

    def _benchmarks(self) -> Iterator[Part]:
        for task in self.tasks:
            yield Part(retention.SUITE, str(task), self.length, 1, partial(self._prepare_benchmark, task))

    def _harness_settings(self) -> dict[str, Any]:
        options = self.material.options
        if not self.tasks:
            return {}
        told = {"tasks": list(map(str, self.tasks)), "task_limit": options.task_limit, "task_batch": options.task_batch}
        return {**told, "lm_eval": metadata.version("lm-eval")}

    def _prepare(self, original: Entrant) -> Prepared:
        theirs = retention.most_likely(original[0], self.samples, original[1])

        def measure(scaled: ScaledModel, method: Method, step: Callable[[], None]) -> list[EvalRow]:
            return retention.retention(scaled, self.samples, method, theirs, on_sample=step)

        return Prepared(self.samples.sha256, sources_of(self.samples), measure)

    def _prepare_benchmark(self, task: HarnessTask, _: Entrant) -> Prepared:
        def measure(scaled: ScaledModel, method: Method, step: Callable[[], None]) -> list[EvalRow]:
            options = self.material.options
            rows = self.harness.measure(
                scaled,
                self.material.loaded.tokenizer,
                task,
                method,
                length=self.length,
                limit=options.task_limit,
                batch_size=options.task_batch,
                seed=self.material.seed,
            )
            step()
            return rows

        return Prepared("", {}, measure)


class OpenLlmSuite(RetentionSuite):
    """LongRoPE's short benchmarks alone: retention's tasks, preconfigured. Their data come from the hub."""

    name = "open-llm"

    @classmethod
    def needs_text(cls, options: EvalConfig) -> bool:
        return False

    @property
    def tasks(self) -> tuple[HarnessTask, ...]:
        return OPEN_LLM

    def check(self) -> None:
        _ = self.harness

    def settings(self) -> dict[str, Any]:
        return {"length": self.length, **self._harness_settings()}

    def parts(self) -> Iterator[Part]:
        return self._benchmarks()
