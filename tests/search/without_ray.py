"""The other process of `RayProcess` with an evaluator in the place of Ray: what ends it ends the process at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from longrope.search import ray_process
from longrope.search.evaluator import EvalRequest, EvalResult, EvaluateEach
from tests.search.ray_targets import Obedient


class Here:
    """`RayEvaluator` without Ray: one evaluator in this process."""

    def __init__(self, make_evaluator: Callable[[], EvaluateEach], workers: int | None, **_needs: object) -> None:
        self._evaluate = make_evaluator()

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, requests: Sequence[EvalRequest]) -> Iterator[EvalResult]:
        return self._evaluate(requests)


class Odd(Obedient):
    """Raises what no pipe takes."""

    def lock(self, request: EvalRequest) -> EvalResult:
        error: Any = RuntimeError("an error with a function")
        error.function = lambda: None
        raise error


def main(descriptor: int) -> None:
    ray_process.ray_session = lambda address, cpus: nullcontext()  # type: ignore[assignment]
    ray_process.RayEvaluator = Here  # type: ignore[assignment,misc]
    print("messages of Ray", flush=True)
    os.write(2, b"and its log lines\n")
    ray_process.main(descriptor)
