"""CMA-ES on the knots, on losses without a model: where it ends, what it asks, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cmaes import CMA
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.cma import CMASettings, cma_search, hybrid_search
from longrope.search.config import LARGEST
from longrope.search.evaluator import SEARCH, EvalRequest, EvalResult, loss_request
from longrope.search.gradient import GradientSettings
from longrope.search.start import WindowStage
from tests.search.slopes import EASY, SEEDS, STAGE, Quadratic, Search, check_stops_anywhere, complete, error_of
from tests.search.targets import GEOMETRY, OPTIMUM, TARGET_LENGTH

RACED = len(SEEDS)


def cma(stage: WindowStage = STAGE, attention_factor: float = 1.0, **settings: object) -> Search:
    return partial(
        cma_search,
        stage=stage,
        geometry=GEOMETRY,
        settings=CMASettings(**settings),  # type: ignore[arg-type]
        attention_factor=attention_factor,
    )


def of(window: Window) -> EvalRequest:
    return loss_request(window, SEARCH)


# --- where it ends


@pytest.mark.parametrize(
    ("knots", "optimum", "evaluations", "left"),
    [(8, EASY, 500, 0.01), (12, EASY, 256, 0.05), (12, OPTIMUM, 500, 0.3), (None, EASY, 500, 0.05)],
)
def test_comes_near_the_optimum(knots: int | None, optimum: np.ndarray, evaluations: int, left: float) -> None:
    ran = complete(cma(knots=knots, evaluations=evaluations), Quadratic(optimum))
    window, loss = ran.best
    seed = SEEDS[ran.chosen_seeds[0]]
    assert error_of(window, optimum) < left * error_of(replace(window, factors=tuple(seed)), optimum)
    assert loss == Quadratic(optimum)(of(window)).loss


def test_it_crosses_a_wall_around_its_start() -> None:
    """Every loss near PI, the only seed, is higher, and the optimum lies beyond."""
    stage = replace(STAGE, seeds={"pi": SEEDS["pi"]})

    def reply(request: EvalRequest) -> EvalResult:
        far = error_of(request.window, SEEDS["pi"])
        result = Quadratic()(request)
        return result if far < 0.01 or far > 0.05 else replace(result, loss=100.0)

    ran = complete(cma(stage, knots=8, sigma=1.0), reply)
    assert error_of(ran.best[0], SEEDS["pi"]) > 0.05
    assert ran.best[1] < 0.9 * Quadratic()(of(Window(TARGET_LENGTH, tuple(SEEDS["pi"])))).loss


def test_the_start_is_never_lost() -> None:
    """Two knots cannot hold YaRN, and no candidate comes near it: YaRN itself is the result, and known from the first
    result on."""
    seed = SEEDS["yarn"]
    search = cma(replace(STAGE, seeds={"yarn": seed}), knots=2, evaluations=30)

    def reply(request: EvalRequest) -> EvalResult:
        return EvalResult(float(np.abs(np.log(request.window.factors) - np.log(seed)).max()))

    ran = complete(search, reply)
    start, _ = ran.said[1]
    assert start.window.factors == tuple(seed.tolist())
    assert ran.bests == [(start.window, 0.0)]
    assert ran.best == (start.window, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_survived(bad: float) -> None:
    """A third of all candidates, by the candidate alone."""

    def reply(request: EvalRequest) -> EvalResult:
        broken = round(sum(request.window.factors) * 1e6) % 3 == 0
        return EvalResult(bad) if broken and request.samples is None else Quadratic()(request)

    ran = complete(cma(knots=8), reply)
    said = ran.said
    finite = [(result.loss, request.window) for request, result in said[RACED:] if math.isfinite(result.loss)]
    assert 20 < len(finite) < 220
    assert ran.best == min(finite, key=lambda pair: pair[0])[::-1]
    assert error_of(ran.best[0], EASY) < 0.2 * error_of(said[RACED][0].window, EASY)


def test_a_start_that_is_no_number_is_left_for_what_is() -> None:
    start: list[Window] = []

    def reply(request: EvalRequest) -> EvalResult:
        if request.samples is None and not start:
            start.append(request.window)
            return EvalResult(math.nan)
        return Quadratic()(request)

    ran = complete(cma(evaluations=22), reply)
    said = ran.said
    assert ran.best[0] != start[0]
    assert ran.best[1] == min(result.loss for _, result in said[RACED + 1 :])


@pytest.mark.filterwarnings("error")
def test_losses_that_are_never_numbers_are_told_without_a_warning() -> None:
    """`cmaes` looks at the range of the last losses, and infinity less infinity is no number."""
    ran = complete(cma(knots=2, evaluations=600), lambda _: EvalResult(math.nan))
    assert ran.error is not None
    assert len(ran.said) > 100


def test_a_loss_that_falls_for_ever_ends_where_windows_do() -> None:
    ran = complete(cma(evaluations=500), lambda request: EvalResult(-float(np.log(request.window.factors).sum())))
    said = ran.said
    assert max(max(request.window.factors) for request, _ in said) == LARGEST
    assert ran.best[0].factors[-1] == LARGEST


# --- what it asks


@pytest.mark.parametrize("knots", [3, 12, None])
def test_generations_around_the_start_on_all_search_samples(knots: int | None) -> None:
    ran = complete(cma(knots=knots, evaluations=100, attention_factor=1.3), Quadratic())
    said = ran.said
    generation = CMA(mean=np.zeros(knots or GEOMETRY.pairs), sigma=1.0).population_size
    assert len(said) == RACED + 1 + generation * (100 // generation)
    assert said[RACED][0].window.factors == tuple(SEEDS[ran.chosen_seeds[0]].tolist())
    for request, _ in said[RACED:]:
        assert (request.split, request.samples, request.gradient) == (SEARCH, None, False)
        assert (request.window.max_length, request.window.start_tokens) == (TARGET_LENGTH, 0)
        assert request.window.attention_factor == 1.3


def test_a_generation_is_asked_in_one_go() -> None:
    assert complete(cma(knots=8, evaluations=30), Quadratic()).batches == [3, 1, 10, 10, 10]


@given(seed=st.integers(0, 2**32 - 1), sigma=st.floats(0.05, 3.0), knots=st.sampled_from([2, 5, 12, 31, None]))
@settings(max_examples=40, deadline=None)
def test_every_candidate_is_monotone_and_from_1(seed: int, sigma: float, knots: int | None) -> None:
    for request, _ in complete(cma(seed=seed, sigma=sigma, knots=knots, evaluations=30), Quadratic(OPTIMUM)).said:
        assert len(request.window.factors) == GEOMETRY.pairs
        assert request.window.factors[0] >= 1.0
        assert (np.diff(request.window.factors) >= -1e-12 * np.array(request.window.factors[1:])).all()


def test_the_first_candidates_lie_around_the_start_as_far_as_sigma_says() -> None:
    spreads = []
    for sigma in (0.002, 0.02):  # NTK rises by more than that: nothing is projected
        drawn = []
        for seed in range(20):
            search = cma(replace(STAGE, seeds={"ntk": SEEDS["ntk"]}), seed=seed, sigma=sigma, evaluations=11)
            ran = complete(search, lambda _: EvalResult(1.0))
            assert ran.batches == [1, 1, 11]
            drawn += [np.log(request.window.factors) for request, _ in ran.said[2:]]
        spreads.append(np.std(drawn, axis=0)[1:])
        if sigma == 0.002:
            np.testing.assert_allclose(np.mean(drawn, axis=0), np.log(SEEDS["ntk"]), atol=0.01)
    np.testing.assert_allclose(spreads[1] / spreads[0], 10.0, rtol=0.2)


def test_every_pair_moves_by_itself_without_knots() -> None:
    """The logarithms of a generation differ from the start in more directions than knots could give."""
    ran = complete(cma(knots=None, evaluations=100), Quadratic())
    said = ran.said
    moves = np.array([np.log(request.window.factors) for request, _ in said[RACED + 1 :]])
    assert np.linalg.matrix_rank(np.diff(moves, axis=0), tol=1e-6) == GEOMETRY.pairs


def test_patience_counts_generations_without_a_better_candidate() -> None:
    def generations(losses: list[float], patience: int | None, evaluations: int = 110) -> int:
        """Generations, when the best of each is one of `losses` (the last, for ever) and the start 5."""
        batches = 0

        def evaluate(requests: Sequence[EvalRequest]) -> list[EvalResult]:
            nonlocal batches
            batches += 1
            if batches <= 2:  # the seeds, and the start
                return [EvalResult((1.0, 5.0)[batches - 1])] * len(requests)
            first = losses[min(batches - 3, len(losses) - 1)]
            return [EvalResult(first), *[EvalResult(9.0)] * (len(requests) - 1)]

        cma(patience=patience, evaluations=evaluations)(evaluate)
        return batches - 2

    assert generations([6.0], 3) == 3
    assert generations([5.0], 1) == 1  # as good as the start is not better
    assert generations([4.0, 6.0, 6.0, 3.0, 6.0, 6.0, 6.0], 3) == 7
    assert generations([6.0], None) == 10
    assert generations([math.nan], 2) == 2


def test_same_seed_same_questions_other_seed_others() -> None:
    def rows(seed: int) -> str:
        return json.dumps([request.row for request, _ in complete(cma(seed=seed, evaluations=44), Quadratic()).said])

    assert rows(0) == rows(0)
    assert len({rows(seed) for seed in range(4)}) == 4


@pytest.mark.parametrize("broken", [False, True])
def test_stopped_after_any_evaluation_and_resumed(tmp_path: Path, broken: bool) -> None:
    def reply(request: EvalRequest) -> EvalResult:
        kind = round(sum(request.window.factors) * 1e6) % 4
        return EvalResult((math.nan, math.inf)[kind]) if broken and kind < 2 else Quadratic()(request)

    check_stops_anywhere(tmp_path, lambda: cma(knots=3, evaluations=28, sigma=1.0), reply)
    log = (tmp_path / "whole").read_bytes()
    assert log.count(b"\n") == 1 + RACED + 1 + 28
    assert (b'"nan"' in log) == broken


# --- what is refused


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"evaluations": 0}, "`evaluations` of at least 1, found 0"),
        ({"race_samples": 0}, "`race_samples` of at least 1, found 0"),
        ({"seed": -1}, "`seed` of at least 0, found -1"),
        ({"sigma": 0.0}, "`sigma` above 0, found 0.0"),
        ({"sigma": math.nan}, "found nan"),
        ({"sigma": math.inf}, "found inf"),
        ({"patience": 0}, "`patience` of at least 1, found 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(LongRopeError, match=says) as error:
        CMASettings(**wrong)  # type: ignore[arg-type]
    assert error.value.code == "invalid-setting"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("knots", [1, GEOMETRY.pairs + 1])
def test_knots_that_the_pairs_do_not_have_are_refused(knots: int) -> None:
    with pytest.raises(LongRopeError, match=f"2 to 32 knots for 32 rotary pairs, found {knots}"):
        cma(knots=knots)(lambda _: [])


@pytest.mark.parametrize("knots", [2, 3, 8, 12, 20, None])
def test_less_than_one_generation_is_refused(knots: int | None) -> None:
    """It would search nothing, and say so nowhere."""
    generation = CMA(mean=np.zeros(knots or GEOMETRY.pairs), sigma=1.0).population_size
    assert len(complete(cma(knots=knots, evaluations=generation), Quadratic()).said) == RACED + 1 + generation
    short = CMASettings(knots=knots, evaluations=generation - 1)
    gradient = GradientSettings(knots=knots)
    for search in (
        partial(cma_search, stage=STAGE, geometry=GEOMETRY, settings=short),
        partial(hybrid_search, stages=[STAGE], geometry=GEOMETRY, settings=gradient, polish=short),
    ):
        with pytest.raises(LongRopeError, match=f"at least {generation} evaluations, .* found {generation - 1}"):
            search(lambda _: [])


def test_a_seed_that_the_package_does_not_take_is_refused() -> None:
    CMASettings(seed=2**32 - 1)
    with pytest.raises(LongRopeError, match="`seed` below 4294967296, found 4294967296"):
        CMASettings(seed=2**32)
