"""The evaluators of Ray workers in tests: a tiny Llama or a cheap function, which may wait, raise or die.

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
import torch.distributed as dist

from longrope.errors import LongRopeError
from longrope.models.processes import Processes
from longrope.models.shared_texts import Share
from longrope.rope.scaling import Window
from longrope.search.evaluator import EvalRequest, EvalResult, EvaluateEach, SerialEvaluator
from longrope.search.objective import PerplexityObjective
from longrope.search.replicas import Replica
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
    """Does what a request's row says, and results with a cheap loss or a number about its process."""

    def __call__(self, requests: Sequence[EvalRequest]) -> Iterator[EvalResult]:
        for request in requests:
            do, *arguments = request.row.get("do", ["pause", 0.03])
            yield getattr(self, do)(request, *arguments)

    def pause(self, request: EvalRequest, seconds: float) -> EvalResult:
        time.sleep(seconds)
        return EvalResult(distance(request.window))

    def model(self, request: EvalRequest) -> EvalResult:
        return serial().result(request)

    def pid(self, request: EvalRequest, seconds: float) -> EvalResult:
        time.sleep(seconds)
        return EvalResult(float(os.getpid()))

    def threads(self, request: EvalRequest) -> EvalResult:
        return EvalResult(float(torch.get_num_threads()))

    def wait(self, request: EvalRequest, path: str) -> EvalResult:
        deadline = time.monotonic() + 60
        while not Path(path).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return EvalResult(distance(request.window))

    def die(self, request: EvalRequest, folder: str, times: int) -> EvalResult:
        """The first `times` processes that are asked leave their number in `folder` and are killed."""
        if len(list(Path(folder).iterdir())) < times:
            (Path(folder) / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return EvalResult(distance(request.window))

    def complain(self, request: EvalRequest, kind: str) -> EvalResult:
        raise {"user": LongRopeError, "bug": ZeroDivisionError}[kind](f"{kind} error")


def ask(*do: object, window: Window = WINDOW, **more: Any) -> EvalRequest:
    return EvalRequest(window, {"do": list(do)}, **more)


def losses(evaluator: Any, requests: Sequence[EvalRequest]) -> list[float]:
    return [result.loss for result in evaluator(requests)]


@dataclass
class Unmakeable:
    """A recipe that fails."""

    deadly: bool

    def __call__(self) -> Obedient:
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        raise LongRopeError("there is no such model")


@dataclass(frozen=True)
class Failing(Replica):
    """In process `rank`, every share of a text ends in an error, or the process.

    `unheard`: the error reaches no other process, `early`: before the model is loaded.
    """

    rank: int = 0
    deadly: bool = False
    unheard: bool = False
    early: bool = False

    def __call__(self) -> EvaluateEach:
        if dist.get_rank() == self.rank:
            if self.early:
                self.fail()
            Share.scores = self.fail  # type: ignore[method-assign]
            if self.unheard:
                Processes._failed = again  # type: ignore[method-assign]
        return super().__call__()

    def fail(self, *_: Any, **__: Any) -> Any:
        if self.deadly:
            os._exit(1)
        raise MemoryError("no room for 1 GiB")


def again(_: Processes, error: Exception) -> Any:
    raise error
