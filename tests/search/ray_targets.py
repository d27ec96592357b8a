"""What Ray workers are told in tests: to answer as a tiny Llama or cheaply, to wait, to complain, or to die.

Workers import it by its full name.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.evaluator import Answer, Question, SerialEvaluator
from longrope.search.objective import PerplexityObjective
from tests.evaluation.tiny import random_samples, tiny_scaled
from tests.search.targets import GEOMETRY, TARGET_LENGTH, distance

WINDOW = Window(TARGET_LENGTH, (2.0,) * GEOMETRY.pairs, 0, 1.0)
LENGTHS = {("search", 48): (3, 0), ("validation", 48): (2, 1), ("search", 96): (3, 2)}  # samples and their seed


def serial() -> SerialEvaluator:
    """A tiny Llama; every process makes its own, with the same weights."""
    return SerialEvaluator(
        {
            (split, length): PerplexityObjective(tiny_scaled(), random_samples(count, length, seed=seed))
            for (split, length), (count, seed) in LENGTHS.items()
        }
    )


class Obedient:
    """Does what a question's row says, and answers with a cheap loss or a number about its process."""

    def evaluate(self, questions: Sequence[Question]) -> Iterator[Answer]:
        for question in questions:
            do, *arguments = question.row.get("do", ["pause", 0.03])
            yield getattr(self, do)(question, *arguments)

    def pause(self, question: Question, seconds: float) -> Answer:
        time.sleep(seconds)
        return Answer(distance(question.window))

    def model(self, question: Question) -> Answer:
        (answer,) = serial().evaluate([question])
        return answer

    def pid(self, question: Question, seconds: float) -> Answer:
        time.sleep(seconds)
        return Answer(float(os.getpid()))

    def threads(self, question: Question) -> Answer:
        return Answer(float(torch.get_num_threads()))

    def wait(self, question: Question, path: str) -> Answer:
        deadline = time.monotonic() + 60
        while not Path(path).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return Answer(distance(question.window))

    def die(self, question: Question, folder: str, times: int) -> Answer:
        """The first `times` processes that are asked leave their number in `folder` and are killed."""
        if len(list(Path(folder).iterdir())) < times:
            (Path(folder) / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Answer(distance(question.window))

    def complain(self, question: Question, kind: str) -> Answer:
        raise {"user": LongRopeError, "bug": ZeroDivisionError}[kind](f"{kind} error")


def ask(*do: object, window: Window = WINDOW, **more: Any) -> Question:
    return Question(window, {"do": list(do)}, **more)


def losses(evaluator: Any, questions: Sequence[Question]) -> list[float]:
    return [answer.loss for answer in evaluator.evaluate(questions)]


@dataclass
class Unmakeable:
    """A recipe that fails."""

    deadly: bool

    def __call__(self) -> Obedient:
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        raise LongRopeError("there is no such model")
