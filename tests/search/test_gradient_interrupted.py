"""The gradient search when losses are no numbers, and when it is stopped: its log is its whole state."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longrope.rope.closed_forms import pi, yarn
from longrope.rope.scaling import Window
from longrope.search.evaluator import EvalRequest, EvalResult
from longrope.search.log import read_log
from longrope.search.start import WindowStage
from tests.search.slopes import (
    EASY,
    ORIGINAL,
    SAMPLES,
    SEEDS,
    Quadratic,
    Reply,
    ReplyEvaluator,
    Search,
    check_stops_anywhere,
    complete,
    error_of,
    logged,
    search_of,
    validations,
)
from tests.search.targets import GEOMETRY

# --- losses that are no numbers


def broken_at(kind: str, bad: float, every: int) -> Reply:
    """`Quadratic`, but every n-th result of a kind has a loss, a factor's derivative or that of m that is no number."""
    count, inner = 0, Quadratic()

    def reply(request: EvalRequest) -> EvalResult:
        nonlocal count
        result = inner(request)
        if request.gradient != (kind != "validation") or (kind == "validation" and request.split == "search"):
            return result
        count += 1
        if count % every:
            return result
        if kind in ("loss", "validation"):
            return replace(result, loss=bad)
        assert result.gradient is not None
        at = 3 if kind == "factor" else -1
        gradient = list(result.gradient)
        gradient[at] = bad
        return replace(result, gradient=tuple(gradient))

    return reply


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "every"), [("loss", 8), ("factor", 8), ("attention", 8), ("validation", 2)])
def test_what_is_no_number_is_survived(kind: str, every: int, bad: float) -> None:
    ran = complete(search_of(learn_attention_factor=True), broken_at(kind, bad, every))
    said = ran.said
    window, loss = ran.best
    assert math.isfinite(loss)
    assert all(np.isfinite(request.window.factors).all() for request, _ in said)
    finite = [(result.loss, request.window) for request, result in validations(said) if math.isfinite(result.loss)]
    assert window == min(finite, key=lambda pair: pair[0])[1]
    assert error_of(window, EASY) < 0.5 * error_of(validations(said)[0][0].window, EASY)


def test_a_step_that_breaks_goes_back_to_the_best_point_with_half_the_step() -> None:
    """Adam begins anew there, so that its first step has the full length of the halved rate."""
    count = 0

    def reply(request: EvalRequest) -> EvalResult:
        nonlocal count
        if not request.gradient:
            return EvalResult(1.0)
        count += 1
        slope = math.nan if count == 5 else (1.0 if count < 5 else -1.0) / request.window.attention_factor
        return EvalResult(1.0, (*[0.0] * GEOMETRY.pairs, slope))

    said = complete(search_of(steps=8, patience=99, learn_attention_factor=True, learning_rate=0.1), reply).said
    logs = [math.log(request.window.attention_factor) for request, _ in said if request.gradient]
    assert len(logs) == 8
    assert logs[5] == 0.0  # the start: nothing was validated as better
    rate = 0.5 * 0.2 * 0.1 * (0.55 + 0.45 * np.cos(math.pi * np.array([5, 6]) / 8))
    np.testing.assert_allclose(np.diff(logs[5:]), rate, rtol=1e-6)  # upwards at once: no moment is left


def test_a_seed_that_is_no_number_loses_its_race() -> None:
    def reply(request: EvalRequest) -> EvalResult:
        nearest = min(SEEDS, key=lambda name: error_of(request.window, SEEDS[name]))
        return EvalResult(math.nan) if nearest == "yarn" and request.samples == (0, 1) else Quadratic()(request)

    ran, usual = complete(search_of(steps=1), reply), complete(search_of(steps=1), Quadratic())
    assert (usual.chosen_seeds, ran.chosen_seeds) == (["yarn"], ["ntk"])


# --- a search that can be stopped


def test_same_seed_same_questions_other_seed_others() -> None:
    def rows(seed: int) -> str:
        return json.dumps([request.row for request, _ in complete(search_of(seed=seed), Quadratic()).said])

    assert rows(0) == rows(0)
    assert len({rows(seed) for seed in range(4)}) > 2


def descent() -> Search:
    """A small search over two stages."""
    stages = [
        WindowStage(
            length=k * ORIGINAL,
            seeds={"pi": pi(GEOMETRY, k * ORIGINAL), "yarn": yarn(GEOMETRY, k * ORIGINAL)},
            samples=SAMPLES,
        )
        for k in (4, 8)
    ]
    return search_of(*stages, steps=6, validate_every=2, knots=5, learn_attention_factor=True)


def broken(request: EvalRequest) -> EvalResult:
    """`Quadratic`, but NaN and infinite in a third of the gradients and losses, by the request alone."""
    result, kind = Quadratic()(request), round(sum(request.window.factors) * 1e6) % 6
    if result.gradient is None:
        return replace(result, loss=math.nan) if kind == 0 and request.split == "validation" else result
    if kind == 1:
        return EvalResult(math.inf, (math.nan, *result.gradient[1:-1], -math.inf))
    return EvalResult(result.loss, (math.nan, *result.gradient[1:])) if kind == 2 else result


@pytest.mark.parametrize("reply", [Quadratic(), broken], ids=["smooth", "broken"])
def test_stopped_after_any_question_and_resumed(tmp_path: Path, reply: Reply) -> None:
    check_stops_anywhere(tmp_path, descent, reply)
    log = (tmp_path / "whole").read_bytes()
    assert log.count(b"\n") > 21
    assert (b'"nan"' in log) == (reply is broken)


def test_the_log_holds_requests_and_results(tmp_path: Path) -> None:
    reply = Quadratic()
    logged(tmp_path / "log", descent(), ReplyEvaluator(reply))
    for entry in read_log(tmp_path / "log")[1]:
        row, gradient = entry.request, entry.gradient is not None
        samples = None if row["samples"] is None else tuple(row["samples"])
        window = Window(row["length"], tuple(row["factors"]), 0, row["attention_factor"])
        assert reply(EvalRequest(window, {}, row["split"], samples, gradient)) == EvalResult(entry.loss, entry.gradient)
