"""Search methods without a model: a smooth loss with a known minimum, its derivative, and searches on it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope.callbacks import Callbacks
from longrope.errors import LongRopeError
from longrope.rope.closed_forms import ntk_aware, pi, yarn
from longrope.rope.scaling import Window
from longrope.search.evaluator import EvalRequest, EvalResult, LoggedEvaluator, SearchOutcome
from longrope.search.gradient import GradientSettings, gradient_search
from longrope.search.knots import KnotParametrisation, phase_scale
from longrope.search.log import SearchLog, read_log
from longrope.search.start import WindowStage
from tests.search.targets import GEOMETRY, HEADER, TARGET_LENGTH

ORIGINAL, SAMPLES = GEOMETRY.original_length, 4
SEEDS = {
    "pi": pi(GEOMETRY, TARGET_LENGTH),
    "yarn": yarn(GEOMETRY, TARGET_LENGTH),
    "ntk": ntk_aware(GEOMETRY, TARGET_LENGTH),
}
STAGE = WindowStage(length=TARGET_LENGTH, seeds=SEEDS, samples=SAMPLES)
EASY = KnotParametrisation(SEEDS["ntk"], phase_scale(GEOMETRY), 8).factors(
    np.array([0.4, 0.3, 0.6, 0.5, 0.6, 0.4, 0.4, 0.5])
)
"""An optimum that 8 knots around NTK can express."""

Reply = Callable[[EvalRequest], EvalResult]
Search = Callable[..., SearchOutcome]
"""A method with all its arguments but `evaluate` and `on_best`."""


class Quadratic:
    """Mean squared distance of log λ to an optimum, plus that of log m; every search sample has its own optimum."""

    def __init__(self, optimum: np.ndarray = EASY, attention_factor: float = 1.0, noise: float = 0.02) -> None:
        self.goal, self.attention_goal = np.log(optimum), math.log(attention_factor)
        offsets = noise * np.random.default_rng(0).standard_normal((SAMPLES, len(optimum)))
        self.offsets = offsets - offsets.mean(axis=0)  # the mean of all samples has its minimum at `optimum`

    def __call__(self, request: EvalRequest) -> EvalResult:
        samples = range(SAMPLES) if request.samples is None else request.samples
        goal = self.goal + (self.offsets[list(samples)].mean(axis=0) if request.split == "search" else 0.0)
        factors = np.array(request.window.factors)
        away = np.log(factors) - goal
        far = math.log(request.window.attention_factor) - self.attention_goal
        gradient = (*(2 * away / factors / len(away)).tolist(), 2 * far / request.window.attention_factor)
        return EvalResult(float(np.mean(away**2) + far**2), gradient if request.gradient else None)


def starts_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows at the beginning of a stage in which its start is chosen: of all on the first text, then of the best
    four on the second."""
    texts = [0 if "gradient" in row else {(0,): 1, (1,): 2}.get(tuple(row["samples"] or ()), 0) for row in rows]
    count = texts.index(0)
    assert texts[:count] == [1] * (count - 4) + [2] * 4
    return list(rows[:count])


class ReplyEvaluator:
    """Results by a function of the request; Ctrl-C instead of a result after `stop_after` of them."""

    def __init__(self, reply: Reply, stop_after: int | None = None) -> None:
        self.reply, self.stop_after, self.computed = reply, stop_after, 0

    def __call__(self, requests: Sequence[EvalRequest]) -> Iterator[EvalResult]:
        for request in requests:
            if self.computed == self.stop_after:
                raise KeyboardInterrupt
            self.computed += 1
            yield self.reply(request)


def search_of(*stages: WindowStage, attention_factor: float = 1.0, **settings: object) -> Search:
    """A gradient search."""
    return partial(
        gradient_search,
        stages=stages or (STAGE,),
        geometry=GEOMETRY,
        settings=GradientSettings(**settings),  # type: ignore[arg-type]
        attention_factor=attention_factor,
    )


@dataclass
class Ran:
    """A search that ran to its end: its requests with their results, the sizes of its batches, every best reported."""

    said: list[tuple[EvalRequest, EvalResult]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    bests: list[tuple[Window, float]] = field(default_factory=list)
    outcome: SearchOutcome | None = None
    error: LongRopeError | None = None

    @property
    def best(self) -> tuple[Window, float]:
        """The result and its loss. Raises the error that the search ended with."""
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome.window, self.outcome.loss

    @property
    def incumbent(self) -> tuple[Window, float] | None:
        return self.bests[-1] if self.bests else None

    @property
    def chosen_seeds(self) -> list[str]:
        assert self.outcome is not None
        return list(self.outcome.chosen_seeds)


def complete(search: Search, reply: Reply) -> Ran:
    """Run `search` to its end without a log."""
    ran = Ran()

    def evaluate(requests: Sequence[EvalRequest]) -> list[EvalResult]:
        results = [reply(request) for request in requests]
        ran.said += zip(requests, results, strict=True)
        ran.batches.append(len(requests))
        return results

    try:
        ran.outcome = search(evaluate, on_best=lambda *best: ran.bests.append(best))
    except LongRopeError as error:
        ran.error = error
    return ran


def logged(
    path: Path,
    search: Search,
    evaluator: ReplyEvaluator,
    *,
    resume: bool = False,
    callbacks: Callbacks | None = None,
    target_length: int | None = None,
) -> SearchOutcome:
    """Run `search` to its end with its log at `path`."""
    with (SearchLog.resume if resume else SearchLog.create)(path, HEADER) as log:
        evaluate = LoggedEvaluator(evaluator, log)
        with evaluate.search(callbacks or Callbacks(), target_length):
            outcome = search(evaluate, on_best=evaluate.report_best)
        evaluate.finish()
    return outcome


def check_stops_anywhere(folder: Path, make: Callable[[], Search], reply: Reply) -> None:
    """Ctrl-C after 0, 1, 2, … results: when resumed, the same bytes of the log, the same end, nothing twice."""
    whole = ReplyEvaluator(reply)
    expected = logged(folder / "whole", make(), whole)
    log = (folder / "whole").read_bytes()
    rows = [row.request for row in read_log(folder / "whole")[1]]
    assert len({json.dumps(row, sort_keys=True) for row in rows}) <= whole.computed <= len(rows)
    for stop in range(whole.computed):
        path = folder / f"{stop}"
        with pytest.raises(KeyboardInterrupt):
            logged(path, make(), ReplyEvaluator(reply, stop))
        assert log.startswith(path.read_bytes())
        resumed = ReplyEvaluator(reply)
        assert logged(path, make(), resumed, resume=True) == expected
        assert path.read_bytes() == log
        assert resumed.computed == whole.computed - stop


def error_of(window: Window, optimum: np.ndarray) -> float:
    return float(np.mean((np.log(window.factors) - np.log(optimum)) ** 2))


def validations(said: list[tuple[EvalRequest, EvalResult]]) -> list[tuple[EvalRequest, EvalResult]]:
    return [(request, result) for request, result in said if request.split == "validation"]
