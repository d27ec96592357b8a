"""The gradient search with a polish by CMA-ES: validation decides between them, and never for the worse."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.rope.closed_forms import pi, yarn
from longrope.rope.scaling import Window
from longrope.search.cma import CMASettings, hybrid_search
from longrope.search.evaluator import SEARCH, VALIDATION, EvalRequest, EvalResult, both_splits, loss_request, mean_loss
from longrope.search.gradient import GradientSettings, gradient_search
from longrope.search.start import WindowStage
from tests.search.slopes import (
    EASY,
    ORIGINAL,
    SAMPLES,
    SEEDS,
    STAGE,
    Quadratic,
    Ran,
    Reply,
    Search,
    check_stops_anywhere,
    complete,
    validations,
)
from tests.search.targets import GEOMETRY, TARGET_LENGTH

DESCENT = GradientSettings(steps=6, validate_every=2, knots=8)
POLISH = CMASettings(evaluations=60, sigma=0.3, knots=8)


def both(
    reply: Reply, *stages: WindowStage, descent: GradientSettings = DESCENT, polish: CMASettings = POLISH
) -> tuple[Ran, Ran, list[tuple[EvalRequest, EvalResult]], int]:
    """The gradient search alone and polished, all evaluations of the second, and where its polish begins."""
    alone = complete(partial(gradient_search, stages=stages or (STAGE,), **common(descent)), reply)
    hybrid = complete(partial(hybrid_search, stages=stages or (STAGE,), polish=polish, **common(descent)), reply)
    start = len(alone.said) - 1
    # The same up to the gradient's result; alone it evaluates the search loss of that last, polished first.
    assert hybrid.said[: start + 1] == alone.said
    return alone, hybrid, hybrid.said, start


def common(descent: GradientSettings) -> dict[str, Any]:
    return {"geometry": GEOMETRY, "settings": descent, "attention_factor": 1.1}


def mean_loss_of(reply: Reply, window: Window) -> float:
    return mean_loss([reply(request) for request in both_splits(window)])


def splits(goals: dict[str, np.ndarray]) -> Reply:
    """`Quadratic` with an optimum for each split."""
    return lambda request: Quadratic(goals[request.split])(request)


def toward(share: float) -> np.ndarray:
    """From YaRN (0) to EASY (1), in log λ."""
    return np.exp((1 - share) * np.log(SEEDS["yarn"]) + share * np.log(EASY))


def test_a_polish_that_helps_is_the_result() -> None:
    reply = Quadratic()
    alone, hybrid, said, start = both(reply)
    window, loss = hybrid.best
    assert (window, loss) != alone.best
    assert loss < 0.75 * alone.best[1]
    candidates = [(result.loss, request.window) for request, result in said[start + 1 :] if request.split == SEARCH]
    assert (loss, window) == min(candidates[:-1], key=lambda pair: pair[0])
    assert hybrid.incumbent == (window, mean_loss_of(reply, window))


def test_a_polish_that_overfits_is_left() -> None:
    """Validation soon loses more than the search gains; the gradient stopped there, CMA-ES goes on."""
    searched = splits({SEARCH: EASY, VALIDATION: toward(0.2)})

    def reply(request: EvalRequest) -> EvalResult:
        result = searched(request)
        return result if request.split == SEARCH else replace(result, loss=20.0 * result.loss)

    stage = replace(STAGE, seeds={"yarn": SEEDS["yarn"]})
    descent = DESCENT.replace(steps=36, patience=18)
    alone, hybrid, said, start = both(reply, stage, descent=descent)
    assert hybrid.best == alone.best
    assert hybrid.incumbent == alone.incumbent
    polished = min(said[start + 1 : -5], key=lambda pair: pair[1].loss)
    assert polished[1].loss < 0.9 * alone.best[1]  # on the search samples it was better
    assert validations(said)[-1][0].window == polished[0].window


@given(share=st.floats(-0.5, 1.5), seed=st.integers(0, 99), offset=st.floats(-3.0, 3.0))
@settings(max_examples=30, deadline=None)
def test_never_worse_than_the_gradient_on_both_splits(share: float, seed: int, offset: float) -> None:
    goal = np.maximum(toward(share) * np.exp(offset * np.linspace(0.0, 0.1, GEOMETRY.pairs)), 1.0)
    reply = splits({SEARCH: EASY, VALIDATION: goal})
    alone, hybrid, _, _ = both(reply, descent=DESCENT.replace(seed=seed), polish=POLISH.replace(seed=seed))
    before, after = (mean_loss_of(reply, ran.best[0]) for ran in (alone, hybrid))
    assert after <= before
    assert hybrid.incumbent == (hybrid.best[0], after)
    assert hybrid.best[1] == reply(loss_request(hybrid.best[0], SEARCH)).loss


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("split", [SEARCH, VALIDATION])
def test_a_polish_without_numbers_is_left(bad: float, split: str) -> None:
    """Every result of a split from the polish on is none."""
    alone, _, _, start = both(Quadratic())
    count = 0

    def reply(request: EvalRequest) -> EvalResult:
        nonlocal count
        count += 1
        after = count > start + 1  # the gradient's own result keeps its loss
        broken = after and request.split == split and request.window != alone.best[0]
        return EvalResult(bad) if broken else Quadratic()(request)

    hybrid = complete(partial(hybrid_search, stages=[STAGE], polish=POLISH, **common(DESCENT)), reply)
    assert hybrid.best == alone.best
    assert hybrid.incumbent == alone.incumbent


def test_where_no_candidate_is_better_nothing_more_is_validated() -> None:
    _, hybrid, said, start = both(lambda request: replace(Quadratic()(request), loss=1.0))
    assert [request.split for request, _ in said[start:]] == [SEARCH] * (len(said) - start)
    assert hybrid.best == (said[start][0].window, 1.0)


def test_it_polishes_what_the_last_stage_left() -> None:
    """At its length, with the attention factor that was learned, and the budget given."""
    stages = [
        WindowStage(length=k * ORIGINAL, seeds={"yarn": yarn(GEOMETRY, k * ORIGINAL)}, samples=SAMPLES)
        for k in (2, 4, 8)
    ]
    descent = DESCENT.replace(learn_attention_factor=True)
    alone, hybrid, said, start = both(Quadratic(attention_factor=1.3), *stages, descent=descent)
    polished = [request for request, _ in said[start:]]
    assert len(polished) == 1 + 60 + 4 + 1  # the start, six generations of 10, two windows on both splits, the result
    assert polished[0].window == alone.best[0]
    assert {request.window.max_length for request in polished} == {TARGET_LENGTH}
    assert {request.window.attention_factor for request in polished} == {alone.best[0].attention_factor}
    assert alone.best[0].attention_factor != 1.1
    assert hybrid.best[0].attention_factor == alone.best[0].attention_factor


def test_it_keeps_a_seed_that_nothing_improves() -> None:
    """The gradient ends with YaRN itself; so does the polish, which begins with it."""
    seed = SEEDS["yarn"]

    def reply(request: EvalRequest) -> EvalResult:
        error = float(np.abs(np.log(request.window.factors) - np.log(seed)).max())
        return replace(Quadratic()(request), loss=error)

    two = {"descent": DESCENT.replace(knots=2), "polish": POLISH.replace(knots=2)}
    _, hybrid, said, start = both(reply, replace(STAGE, seeds={"yarn": seed}), **two)
    assert said[start][0].window.factors == tuple(seed.tolist())
    assert hybrid.best == (Window(TARGET_LENGTH, tuple(seed.tolist()), 0, 1.1), 0.0)


@pytest.mark.parametrize("broken", [False, True])
def test_stopped_after_any_question_and_resumed(tmp_path: Path, broken: bool) -> None:
    stages = [
        WindowStage(
            length=k * ORIGINAL,
            seeds={"pi": pi(GEOMETRY, k * ORIGINAL), "yarn": yarn(GEOMETRY, k * ORIGINAL)},
            samples=SAMPLES,
        )
        for k in (4, 8)
    ]

    def reply(request: EvalRequest) -> EvalResult:
        result = Quadratic()(request)
        kind = round(sum(request.window.factors) * 1e6) % 5
        return replace(result, loss=math.nan) if broken and kind == 0 and request.samples is None else result

    def make() -> Search:
        descent = DESCENT.replace(steps=3, knots=3, learn_attention_factor=True)
        polish = POLISH.replace(knots=3, evaluations=14)
        return partial(hybrid_search, stages=stages, geometry=GEOMETRY, settings=descent, polish=polish)

    check_stops_anywhere(tmp_path, make, reply)
    assert (b'"nan"' in (tmp_path / "whole").read_bytes()) == broken
