"""Facts of every search on the knots (gradient, CMA-ES, hybrid): seeds, bounds, start tokens, result and progress."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from longrope.callbacks import SearchProgress
from longrope.rope.closed_forms import pi, yarn
from longrope.search.cma import CMASettings, cma_search, hybrid_search
from longrope.search.evaluator import SEARCH, VALIDATION, EvalRequest, EvalResult, both_splits, loss_request, mean_loss
from longrope.search.gradient import GradientSettings, gradient_search
from longrope.search.log import read_log
from longrope.search.start import Bounds, WindowStage
from tests.search.slopes import (
    ORIGINAL,
    SAMPLES,
    SEEDS,
    STAGE,
    Quadratic,
    Reply,
    ReplyEvaluator,
    Search,
    check_stops_anywhere,
    complete,
    logged,
)
from tests.search.targets import GEOMETRY, OPTIMUM, TARGET_LENGTH, Shown

SHORT = GradientSettings(steps=5, validate_every=2)
GENERATIONS = CMASettings(evaluations=27, knots=6)  # three of 9
HYBRID = {"settings": SHORT, "polish": GENERATIONS}
Make = Callable[..., Search]
SEARCHES: dict[str, Make] = {
    "gradient": lambda **more: partial(gradient_search, stages=[STAGE], geometry=GEOMETRY, settings=SHORT, **more),
    "cma": lambda **more: partial(cma_search, stage=STAGE, geometry=GEOMETRY, settings=GENERATIONS, **more),
    "hybrid": lambda **more: partial(hybrid_search, stages=[STAGE], geometry=GEOMETRY, **HYBRID, **more),
}
every_search = pytest.mark.parametrize("make", SEARCHES.values(), ids=SEARCHES)
CHOICES = (0, 1, 8, 64)


# --- the result


@every_search
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_finite_at_all_is_an_error(make: Make, bad: float) -> None:
    ran = complete(make(), lambda _: EvalResult(bad, (bad,) * (GEOMETRY.pairs + 1)))
    assert all(np.isfinite(request.window.factors).all() for request, _ in ran.said)
    assert ran.error is not None
    assert ran.error.code == "not-finite"
    assert "\n" not in str(ran.error)


@every_search
def test_the_result_comes_with_its_loss_on_all_search_samples(make: Make) -> None:
    """Search and validation do not agree, and validation decides or not."""
    middle = np.exp(0.6 * np.log(SEEDS["yarn"]) + 0.4 * Quadratic().goal)

    def reply(request: EvalRequest) -> EvalResult:
        return (Quadratic(middle) if request.split == VALIDATION else Quadratic())(request)

    window, loss = complete(make(), reply).best
    assert loss == reply(loss_request(window, SEARCH)).loss


@every_search
def test_rows_tell_requests_apart_and_are_json(make: Make) -> None:
    """A log compares them: the same row only for the same window, texts and length."""
    asked = [request for request, _ in complete(make(), Quadratic()).said]
    rows = {json.dumps(request.row): (request.window, request.split, request.samples) for request in asked}
    for request in asked:
        assert rows[json.dumps(request.row)] == (request.window, request.split, request.samples)
    assert len(rows) == len({(request.window, request.split, request.samples) for request in asked})


@every_search
def test_searches_compare_their_seeds_in_one_batch(make: Make) -> None:
    ran = complete(make(), Quadratic())
    assert ran.batches[0] == 3
    assert [request.samples for request, _ in ran.said[:3]] == [(0, 1)] * 3
    assert ran.chosen_seeds == ["yarn"]
    assert ran.said[3][0].samples is None


# --- bounds and start tokens


def preferring(start_tokens: int) -> Reply:
    """The quadratic, and a tenth more for every doubling between n̂ and the one preferred."""
    quadratic = Quadratic(OPTIMUM)

    def reply(request: EvalRequest) -> EvalResult:
        result = quadratic(request)
        away = abs(math.log2(request.window.start_tokens + 1) - math.log2(start_tokens + 1))
        return EvalResult(result.loss + 0.1 * away, result.gradient)

    return reply


@every_search
@pytest.mark.parametrize("largest", [1.0, 3.0, 7.5])
def test_no_window_goes_beyond_the_largest_factor(make: Make, largest: float) -> None:
    """Seeds included: PI's factors are the ratio everywhere."""
    ran = complete(make(bounds=Bounds(largest)), Quadratic(OPTIMUM))
    assert max(max(request.window.factors) for request, _ in ran.said) <= largest
    assert max(ran.best[0].factors) == pytest.approx(largest)  # the optimum lies beyond
    assert max(OPTIMUM) > largest


@every_search
def test_a_bound_that_does_not_bind_changes_nothing(make: Make) -> None:
    free, bounded = (complete(make(bounds=bounds), Quadratic(OPTIMUM)) for bounds in (None, Bounds(1e6)))
    assert free.said == bounded.said


@every_search
def test_start_tokens_that_are_given_are_those_of_every_window(make: Make) -> None:
    ran = complete(make(bounds=Bounds(start_tokens=(8,))), preferring(0))
    assert {request.window.start_tokens for request, _ in ran.said} == {8}
    assert all(request.row["start_tokens"] == 8 for request, _ in ran.said)
    assert ran.best[0].start_tokens == 8


@every_search
def test_no_start_tokens_are_no_part_of_the_log(make: Make) -> None:
    assert not any("start_tokens" in request.row for request, _ in complete(make(), preferring(0)).said)


@every_search
@pytest.mark.parametrize("preferred", CHOICES)
def test_start_tokens_are_chosen_when_the_factors_are(make: Make, preferred: int) -> None:
    plain = complete(make(), preferring(preferred))
    ran = complete(make(bounds=Bounds(start_tokens=CHOICES)), preferring(preferred))
    window, loss = ran.best
    assert window.factors == plain.best[0].factors
    assert window.start_tokens == preferred
    assert loss == pytest.approx(Quadratic(OPTIMUM)(EvalRequest(window, {})).loss)
    tried = {request.window.start_tokens for request, _ in ran.said if request.window.factors == window.factors}
    assert tried == set(CHOICES)
    assert ran.incumbent is not None
    assert ran.incumbent[0] == window


@every_search
def test_of_equal_losses_the_first_choice_wins(make: Make) -> None:
    assert complete(make(bounds=Bounds(start_tokens=CHOICES)), Quadratic(OPTIMUM)).best[0].start_tokens == 0


@every_search
def test_stopped_anywhere_and_resumed(make: Make, tmp_path: Path) -> None:
    check_stops_anywhere(tmp_path, lambda: make(bounds=Bounds(12.0, CHOICES)), preferring(8))


def test_a_seed_beyond_the_bound_is_cut_to_it() -> None:
    ran = complete(SEARCHES["cma"](bounds=Bounds(2.0)), Quadratic())
    for (request, _), seed in zip(ran.said, SEEDS.values(), strict=False):
        np.testing.assert_array_equal(request.window.factors, np.maximum.accumulate(np.clip(seed, 1.0, 2.0)))
        assert request.window.max_length == TARGET_LENGTH


# --- progress


def progress_of(
    folder: Path, search: Search, reply: Reply, target_length: int = TARGET_LENGTH
) -> list[tuple[EvalRequest, EvalResult, SearchProgress]]:
    """Every request of a search, its result, and the progress shown then."""
    shown, ran = Shown(), complete(search, reply)
    logged(folder / "log", search, ReplyEvaluator(reply), callbacks=shown, target_length=target_length)
    _, rows = read_log(folder / "log")
    assert [one.evaluations for one in shown.progress] == list(range(1, len(rows) + 1))
    return [(*said, progress) for said, progress in zip(ran.said, shown.progress, strict=True)]


def overfitting(request: EvalRequest) -> EvalResult:
    """Validation losses are 10 above those of the search, and best half the way."""
    middle = np.exp(0.6 * np.log(SEEDS["yarn"]) + 0.4 * Quadratic().goal)
    if request.split == SEARCH:
        return Quadratic()(request)
    result = Quadratic(middle)(request)
    return replace(result, loss=result.loss + 10.0)


@pytest.mark.parametrize("name", ["gradient", "hybrid"])
def test_progress_of_a_search_that_validates_shows_what_it_chooses_by(tmp_path: Path, name: str) -> None:
    reported = progress_of(tmp_path, SEARCHES[name](), overfitting)
    seen: list[float] = []
    validated: EvalResult | None = None
    for request, result, progress in reported:
        assert progress.best_loss == min(seen, default=math.inf)
        if validated is not None:  # the search samples come right after
            assert (request.split, request.samples) == (SEARCH, None)
            seen.append(mean_loss([validated, result]))
        validated = result if request.split == VALIDATION else None
    assert min(seen) > 5.0
    # The loss on the search samples alone is the one that compares with the baselines; validation is 10 above them.
    assert all(progress.search_loss is None or progress.search_loss < 1.0 for _, _, progress in reported)
    assert reported[-1][2].search_loss is not None
    ran = complete(SEARCHES[name](), overfitting)
    assert ran.incumbent is not None
    assert reported[-1][2].best_loss == ran.incumbent[1]
    assert ran.incumbent[1] == mean_loss([overfitting(request) for request in both_splits(ran.best[0])])


def test_progress_of_cma_follows_each_candidate(tmp_path: Path) -> None:
    reported = progress_of(tmp_path, SEARCHES["cma"](), Quadratic())
    assert all(progress.best_loss == math.inf for _, _, progress in reported[: len(SEEDS)])
    losses = [result.loss for _, result, _ in reported[len(SEEDS) :]]
    shown = [progress.best_loss for _, _, progress in reported[len(SEEDS) :]]
    assert shown == [min(losses[: count + 1]) for count in range(len(losses))]


def test_progress_begins_anew_with_every_stage(tmp_path: Path) -> None:
    """Losses of another window do not compare: the first validation of a longer one is what is shown from then on."""
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
        return replace(result, loss=result.loss + request.window.max_length)

    search = partial(gradient_search, stages=stages, geometry=GEOMETRY, settings=SHORT.replace(knots=6))
    reported = progress_of(tmp_path, search, reply, 8 * ORIGINAL)
    lengths = [request.window.max_length for request, _, _ in reported]
    first = next(
        place
        for place, (request, _, _) in enumerate(reported)
        if request.window.max_length == 8 * ORIGINAL and request.split == VALIDATION
    )
    assert all(progress.best_loss < 8 * ORIGINAL for _, _, progress in reported[4 : first + 2])
    assert all(progress.best_loss >= 8 * ORIGINAL for _, _, progress in reported[first + 2 :])
    # The loss of a shorter window is shown with its length: it does not compare with the baselines of the target.
    found = [(math.isfinite(progress.best_loss), progress.length) for _, _, progress in reported]
    assert set(found[: first + 2]) == {(False, None), (True, 4 * ORIGINAL)}
    assert set(found[first + 2 :]) == {(True, None)}
    assert lengths == sorted(lengths)
