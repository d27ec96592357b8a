"""The suites that measure at the lengths asked for: perplexity, passkey, needle and RULER."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib import metadata
from typing import Any

from longrope.data.samples import Samples, draw_origins
from longrope.errors import LongRopeError
from longrope.evaluation import needle, passkey, perplexity
from longrope.evaluation.base import Entrant, Part, Prepared, Suite, sources_of
from longrope.evaluation.config import QA_TASK, EvalConfig
from longrope.evaluation.results import EvalRow
from longrope.evaluation.ruler import suite as ruler
from longrope.evaluation.ruler.qa import Questions
from longrope.evaluation.ruler.tasks import draw_task, needs_text
from longrope.evaluation.ruler.words import words_sha256
from longrope.models.scaled import ScaledModel
from longrope.rope.baselines import Method


class PerplexitySuite(Suite):
    """Perplexity by length, and loss by position."""

    name = perplexity.SUITE

    @cached_property
    def samples(self) -> Samples:
        """As long as the longest length: shorter ones score their beginnings."""
        return self.material.samples(max(self.material.lengths))

    def check(self) -> None:
        lengths, options = self.material.lengths, self.material.options
        perplexity.check_lengths(lengths, max(lengths), options.stride)
        _ = self.samples  # drawn now, so that too little text is found now

    def settings(self) -> dict[str, Any]:
        return {"samples": self.material.options.samples, "stride": self.material.options.stride}

    def parts(self) -> Iterator[Part]:
        for length in self.material.lengths:
            yield Part(self.name, "", length, self.material.options.samples, partial(self._prepare, length))

    def _prepare(self, length: int, _: Entrant) -> Prepared:
        def measure(scaled: ScaledModel, method: Method, step: Callable[[], None]) -> list[EvalRow]:
            stride = self.material.options.stride
            return perplexity.perplexity(
                scaled, self.samples, [length], method, stride=stride, positions=True, on_sample=step
            )

        return Prepared(self.samples.sha256, sources_of(self.samples), measure)


class PasskeySuite(Suite):
    """Passkey retrieval by length; needs no text."""

    name = passkey.SUITE

    @classmethod
    def needs_text(cls, options: EvalConfig) -> bool:
        return False

    def check(self) -> None:
        self.material.check_ids(self._draw(min(self.material.lengths), count=1).prompts[0])

    def settings(self) -> dict[str, Any]:
        return {"trials": self.material.options.trials, "digits": passkey.DIGITS}

    def parts(self) -> Iterator[Part]:
        for length in self.material.lengths:
            yield Part(self.name, "", length, self.material.options.trials, partial(self._prepare, length))

    def _draw(self, length: int, count: int) -> passkey.Passkeys:
        tokenizer = self.material.loaded.tokenizer
        return passkey.draw_passkeys(tokenizer, length=length, count=count, seed=self.material.seed)

    def _prepare(self, length: int, _: Entrant) -> Prepared:
        drawn = self._draw(length, self.material.options.trials)

        def measure(scaled: ScaledModel, method: Method, step: Callable[[], None]) -> list[EvalRow]:
            return passkey.passkey(scaled, self.material.loaded.tokenizer, drawn, method, on_sample=step)

        return Prepared(drawn.sha256, {}, measure)


class NeedleSuite(Suite):
    """The needle grid: depth × length."""

    name = needle.SUITE

    @cached_property
    def per_document(self) -> int:
        """Needles in one document, the same at every length."""
        material = self.material
        asked, depths = material.options.needles, material.options.depths
        fitting = needle.needles_that_fit(material.loaded.tokenizer, min(material.lengths), depths, material.seed)
        return fitting if asked is None else min(asked, depths)

    @property
    def documents_per_trial(self) -> int:
        return -(-self.material.options.depths // self.per_document)

    def check(self) -> None:
        material = self.material
        for document in self._draw(min(material.lengths), trials=1).documents:
            material.check_ids(document.context)
        count = material.options.trials * self.documents_per_trial
        draw_origins(material.tokenized, span=max(material.lengths), count=count, seed=material.seed)

    def settings(self) -> dict[str, Any]:
        options = self.material.options
        counts = {"trials": options.trials, "depths": options.depths, "needles_per_document": self.per_document}
        return {**counts, "digits": needle.DIGITS}

    def parts(self) -> Iterator[Part]:
        steps = self.material.options.trials * self.documents_per_trial
        for length in self.material.lengths:
            yield Part(self.name, "", length, steps, partial(self._prepare, length))

    def _draw(self, length: int, trials: int) -> needle.NeedleGrid:
        return needle.draw_grid(
            self.material.tokenized,
            self.material.loaded.tokenizer,
            length=length,
            depths=needle.grid_depths(self.material.options.depths),
            trials=trials,
            per_document=self.per_document,
            seed=self.material.seed,
        )

    def _prepare(self, length: int, _: Entrant) -> Prepared:
        grid = self._draw(length, self.material.options.trials)

        def measure(scaled: ScaledModel, method: Method, step: Callable[[], None]) -> list[EvalRow]:
            return needle.needle(scaled, self.material.loaded.tokenizer, grid, method, on_sample=step)

        return Prepared(grid.sha256, grid.sources, measure)


class RulerSuite(Suite):
    """RULER's tasks by length."""

    name = ruler.SUITE

    @classmethod
    def needs_text(cls, options: EvalConfig) -> bool:
        return any(map(needs_text, options.chosen_ruler_tasks))

    @cached_property
    def questions(self) -> Questions | None:
        path = self.material.options.qa_file
        return None if path is None else Questions.read(path)

    def check(self) -> None:
        material, tasks = self.material, self.material.options.chosen_ruler_tasks
        words_sha256()  # the words are there
        shortest, longest = min(material.lengths), max(material.lengths)
        faults = {}
        for task in tasks:
            try:
                self.material.check_ids(
                    draw_task(task, **self._material(task), length=shortest, count=1).samples[0].ids
                )
            except LongRopeError as error:
                faults[task] = str(error)
        if faults:
            rest = ",".join(task for task in tasks if task not in faults)
            raise LongRopeError("; ".join(faults.values()) + (f"; what can be measured is {rest}" if rest else ""))
        if self.needs_text(material.options):
            draw_origins(material.tokenized, span=longest, count=material.options.trials, seed=material.seed)
        if self.questions is not None and QA_TASK in tasks:
            self.questions.draw(material.options.trials, random.Random(material.seed))

    def settings(self) -> dict[str, Any]:
        options = self.material.options
        told = {"trials": options.trials, "tasks": list(options.chosen_ruler_tasks)}
        words = {"wonderwords": metadata.version("wonderwords"), "words_sha256": words_sha256()}
        return {**told, "threshold": options.threshold, "share": options.share, **words}

    def parts(self) -> Iterator[Part]:
        for length in self.material.lengths:
            for task in self.material.options.chosen_ruler_tasks:
                yield Part(self.name, task, length, self.material.options.trials, partial(self._prepare, task, length))

    def _material(self, task: str) -> dict[str, Any]:
        material = self.material
        documents = material.tokenized if needs_text(task) else []
        questions = self.questions if task == QA_TASK else None
        return {
            "tokenizer": material.loaded.tokenizer,
            "seed": material.seed,
            "documents": documents,
            "questions": questions,
        }

    def _prepare(self, task: str, length: int, _: Entrant) -> Prepared:
        drawn = draw_task(task, **self._material(task), length=length, count=self.material.options.trials)

        def measure(scaled: ScaledModel, method: Method, step: Callable[[], None]) -> list[EvalRow]:
            return ruler.ruler_task(scaled, self.material.loaded.tokenizer, drawn, method, on_sample=step)

        return Prepared(drawn.sha256, drawn.sources, measure)
