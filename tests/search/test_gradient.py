"""The gradient search on losses without a model: where it ends, its requests, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from longrope.errors import LongRopeError
from longrope.rope.closed_forms import CLOSED_FORMS, ntk_aware, ntk_critical, pi, yarn
from longrope.rope.scaling import Window
from longrope.search.config import LARGEST
from longrope.search.evaluator import EvalRequest, EvalResult
from longrope.search.gradient import GradientSettings, gradient_search, stretched
from longrope.search.start import WindowStage
from tests.search.slopes import (
    EASY,
    ORIGINAL,
    SAMPLES,
    SEEDS,
    STAGE,
    Quadratic,
    complete,
    error_of,
    search_of,
    validations,
)
from tests.search.targets import GEOMETRY, OPTIMUM, TARGET_LENGTH

# --- where it ends


@pytest.mark.parametrize(
    ("knots", "optimum", "left"), [(8, EASY, 0.05), (8, OPTIMUM, 0.25), (None, EASY, 0.05), (None, OPTIMUM, 0.12)]
)
def test_comes_near_the_optimum_in_few_questions(knots: int | None, optimum: np.ndarray, left: float) -> None:
    ran = complete(search_of(knots=knots), Quadratic(optimum))
    said = ran.said
    window, loss = ran.best
    start = min(error_of(replace(window, factors=tuple(seed)), optimum) for seed in SEEDS.values())
    assert len(said) <= 3 + 1 + 36 + 6 + 1 + 1
    assert error_of(window, optimum) < left * start
    assert loss == said[-1][1].loss == pytest.approx(Quadratic(optimum)(EvalRequest(window, {})).loss)
    assert window.max_length == TARGET_LENGTH
    assert window.start_tokens == 0


def test_a_loss_that_falls_for_ever_ends_where_windows_do() -> None:
    """Adam's steps are as long for a slope that is nearly 0: a window could not hold where they lead."""

    def reply(request: EvalRequest) -> EvalResult:
        factors = np.array(request.window.factors)
        return EvalResult(-float(np.log(factors).sum()), (*(-1.0 / factors).tolist(), 0.0))

    ran = complete(search_of(steps=120, patience=99, learning_rate=1.0), reply)
    said = ran.said
    assert max(max(request.window.factors) for request, _ in said) <= LARGEST
    assert ran.best[0].factors[-1] == pytest.approx(LARGEST)


def test_every_window_is_monotone_and_from_1() -> None:
    for request, _ in complete(search_of(learning_rate=2.0), Quadratic(OPTIMUM)).said:
        assert request.window.factors[0] >= 1.0
        assert (np.diff(request.window.factors) >= -1e-12).all()


@pytest.mark.parametrize("best", list(CLOSED_FORMS))
def test_the_race_starts_from_the_best_seed(best: str) -> None:
    seeds = {name: form(GEOMETRY, TARGET_LENGTH)[0] for name, form in CLOSED_FORMS.items() if name != "dynamic-ntk"}
    if best not in seeds:
        return
    ran = complete(search_of(replace(STAGE, seeds=seeds), steps=1), Quadratic(seeds[best]))
    said = ran.said
    first, finals = said[: len(seeds)], said[len(seeds) : len(seeds) + 4]
    assert len(seeds) == 5  # one too many to race all on every text
    assert ran.chosen_seeds == [best]
    assert all(request.samples == (0,) and request.split == "search" for request, _ in first)
    assert all(request.samples == (1,) and request.split == "search" for request, _ in finals)
    worst = max(first, key=lambda pair: pair[1].loss)[0]
    assert worst.window.factors not in {request.window.factors for request, _ in finals}
    first_step = said[len(seeds) + 4 + 2][0]
    assert first_step.gradient
    raced = {tuple(request.window.factors): result.loss for request, result in first}
    assert raced[first_step.window.factors] == min(raced.values())


def test_of_equal_seeds_the_first_is_taken() -> None:
    ran = complete(search_of(steps=1), lambda request: replace(Quadratic()(request), loss=1.0))
    assert ran.chosen_seeds == ["pi"]


def test_search_and_validation_decide_together() -> None:
    """The search pulls to the optimum, and validation suffers more than the search gains from half the way on."""
    start = np.log(SEEDS["yarn"])
    middle = np.exp(0.6 * start + 0.4 * np.log(EASY))
    search = search_of(replace(STAGE, seeds={"yarn": SEEDS["yarn"]}), validate_every=2, patience=18)

    def reply(request: EvalRequest) -> EvalResult:
        if request.split == "search":
            return Quadratic(EASY)(request)
        return replace(Quadratic(middle)(request), loss=9.0 * Quadratic(middle)(request).loss)

    ran = complete(search, reply)
    said = ran.said
    checked = [place for place, (request, _) in enumerate(said) if request.split == "validation"]
    assert all(said[place][0].window == said[place + 1][0].window for place in checked)
    losses = [(said[place][1].loss + said[place + 1][1].loss) / 2 for place in checked]
    at = int(np.argmin(losses))
    assert 0 < at < len(losses) - 1
    assert ran.best[0] == said[checked[at]][0].window
    assert ran.incumbent == (ran.best[0], pytest.approx(losses[at]))
    assert ran.best[1] > said[checked[-1] + 1][1].loss  # the search texts alone would have gone on


def test_a_gain_on_the_search_texts_alone_that_validation_pays_for_is_refused() -> None:
    """Every validation loses twice what the search gains: the seed is the result."""
    seed = SEEDS["yarn"]

    def reply(request: EvalRequest) -> EvalResult:
        result = Quadratic()(request)
        return result if request.split == "search" else replace(result, loss=10.0 - 2.0 * result.loss)

    ran = complete(search_of(replace(STAGE, seeds={"yarn": seed})), reply)
    assert ran.best[0].factors == tuple(seed.tolist())


def test_where_no_step_helps_the_seed_is_returned() -> None:
    ran = complete(search_of(), lambda request: replace(Quadratic()(request), loss=1.0))
    said = ran.said
    assert ran.best == (validations(said)[0][0].window, 1.0)


def test_patience_ends_a_stage() -> None:
    """Constant losses: no validation is better than the first."""
    for patience in (1, 2, 3):
        said = complete(
            search_of(patience=patience, validate_every=5), lambda request: replace(Quadratic()(request), loss=1.0)
        ).said
        assert sum(request.gradient for request, _ in said) == 5 * patience
    improving = iter(range(1000, 0, -1))

    def better(request: EvalRequest) -> EvalResult:
        return replace(Quadratic()(request), loss=float(next(improving)))

    assert sum(request.gradient for request, _ in complete(search_of(patience=1), better).said) == 30


def test_never_worse_than_a_seed_that_is_not_monotone() -> None:
    """A checkpoint's factors may be out of order: if no step helps, they are returned as they are."""
    seed = np.asarray(CLOSED_FORMS["yarn"](GEOMETRY, TARGET_LENGTH)[0])
    seed[[3, 4]] = seed[[4, 3]]

    def reply(request: EvalRequest) -> EvalResult:
        error = float(np.abs(np.log(request.window.factors) - np.log(seed)).max())
        return replace(Quadratic()(request), loss=error)

    ran = complete(search_of(WindowStage(length=TARGET_LENGTH, seeds={"checkpoint": seed}, samples=3), steps=6), reply)
    said = ran.said
    assert ran.best[0].factors == tuple(seed.tolist())
    assert all((np.diff(request.window.factors) >= 0.0).all() for request, _ in said[:-3])


def test_patience_begins_again_after_a_better_validation() -> None:
    losses = iter([5.0, 6.0, 6.0, 4.0, 6.0, 6.0, 3.0, 6.0, 6.0, 6.0])

    def reply(request: EvalRequest) -> EvalResult:
        return replace(Quadratic()(request), loss=next(losses) if request.split == "validation" else 1.0)

    ran = complete(search_of(patience=3, validate_every=1), reply)
    said = ran.said
    assert len(validations(said)) == 10
    assert ran.best[0] == validations(said)[6][0].window


# --- its requests


def test_one_sample_a_step_and_all_before_any_repeats() -> None:
    said = complete(search_of(steps=14, patience=99, validate_every=5), Quadratic()).said
    steps = [request for request, _ in said if request.gradient]
    assert all(request.split == "search" and len(request.samples or ()) == 1 for request in steps)
    drawn = [request.samples[0] for request in steps if request.samples]
    assert len(drawn) == 14
    for at in range(0, 12, SAMPLES):
        assert sorted(drawn[at : at + SAMPLES]) == [0, 1, 2, 3]
    assert len({tuple(drawn[at : at + SAMPLES]) for at in range(0, 12, SAMPLES)}) > 1  # drawn anew each round
    at = [index for index, (request, _) in enumerate(said) if request.split == "validation"]
    assert [sum(request.gradient for request, _ in said[:index]) for index in at] == [0, 5, 10, 14]
    assert all(said[index][0].samples is None for index in at)
    last = said[-1][0]
    assert (last.split, last.samples, last.gradient) == ("search", None, False)


def test_the_learning_rate_falls() -> None:
    """A gradient that is always the same makes Adam's steps the learning rate: 1 to 0.1 of it, by a cosine. A step of
    log m is a fifth of that."""
    search = search_of(steps=20, learning_rate=0.05, patience=99, knots=2, learn_attention_factor=True)
    pull = EvalResult(1.0, (*[0.0] * GEOMETRY.pairs, 1.0))

    def constant(request: EvalRequest) -> EvalResult:
        # d loss/dm = 1/m: in log m the slope is 1 everywhere.
        return replace(pull, gradient=(*[0.0] * GEOMETRY.pairs, 1.0 / request.window.attention_factor))

    said = complete(search, constant).said
    logs = [math.log(request.window.attention_factor) for request, _ in said if request.gradient]
    lengths = -np.diff(logs)
    expected = 0.2 * 0.05 * (0.55 + 0.45 * np.cos(math.pi * np.arange(19) / 20))
    np.testing.assert_allclose(lengths, expected, rtol=1e-6)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("start", [1.0, 1.1386294361119891, 2.76])
def test_the_attention_factor_moves_only_where_it_is_learned(learn: bool, start: float) -> None:
    """An attention factor that is not learned stays to the last bit: all windows of a checkpoint must share it."""
    stages = [
        WindowStage(length=k * ORIGINAL, seeds={"pi": pi(GEOMETRY, k * ORIGINAL)}, samples=SAMPLES) for k in (2, 4, 8)
    ]
    ran = complete(
        search_of(*stages, attention_factor=start, learn_attention_factor=learn), Quadratic(attention_factor=1.3)
    )
    said = ran.said
    found = ran.best[0].attention_factor
    if learn:
        assert abs(found - 1.3) < 0.25 * abs(start - 1.3)
    else:
        assert {request.window.attention_factor for request, _ in said} == {start}


def test_the_next_stage_starts_with_the_learned_attention_factor() -> None:
    stages = [
        WindowStage(length=k * ORIGINAL, seeds={"pi": pi(GEOMETRY, k * ORIGINAL)}, samples=SAMPLES) for k in (2, 4)
    ]
    said = complete(search_of(*stages, learn_attention_factor=True), Quadratic(attention_factor=1.3)).said
    first_of_second = next(request for request, _ in said if request.window.max_length == 4 * ORIGINAL)
    assert abs(first_of_second.window.attention_factor - 1.3) < 0.15


# --- continuation


@pytest.mark.parametrize("form", [pi, ntk_aware, ntk_critical])
@pytest.mark.parametrize(("ratio", "target"), [(2, 4), (2, 8), (4, 6), (8, 2), (3, 4.6875)])
def test_stretched_turns_the_form_of_one_ratio_into_that_of_the_other(
    form: Callable[..., np.ndarray], ratio: float, target: float
) -> None:
    np.testing.assert_allclose(
        stretched(form(GEOMETRY, ratio * ORIGINAL), ratio, target), form(GEOMETRY, target * ORIGINAL), rtol=1e-12
    )


def test_continuation_starts_each_stage_from_the_last_solution_stretched() -> None:
    """λ of every stage is best at OPTIMUM^(ln s/ln 8): the stretched solution wins every race but the first."""

    def reply(request: EvalRequest) -> EvalResult:
        ratio = request.window.max_length / ORIGINAL
        return Quadratic(stretched(EASY, 8, ratio), noise=0.0)(request)

    stages = [
        WindowStage(
            length=k * ORIGINAL,
            seeds={"pi": pi(GEOMETRY, k * ORIGINAL), "yarn": yarn(GEOMETRY, k * ORIGINAL)},
            samples=2,
        )
        for k in (2, 4, 8)
    ]
    ran = complete(search_of(*stages, steps=24), reply)
    said = ran.said
    assert ran.chosen_seeds == ["yarn", "stretched", "stretched"]
    lengths = [request.window.max_length for request, _ in said]
    assert lengths == sorted(lengths)
    solution: dict[int, Window] = {}
    for k in (2, 4, 8):
        of_stage = [(request, result) for request, result in said if request.window.max_length == k * ORIGINAL]
        race = [request for request, _ in of_stage if request.samples == (0, 1) and not request.gradient]
        assert len(race) == (2 if k == 2 else 3)
        if k > 2:
            expected = stretched(np.array(solution[k // 2].factors), k // 2, k)
            np.testing.assert_allclose(race[-1].window.factors, expected, rtol=0.06)
        request, _ = min(validations(of_stage), key=lambda pair: pair[1].loss)
        solution[k] = request.window
    assert ran.best[0] == solution[8]


# --- what is refused


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": 0}, "`steps` of at least 1, found 0"),
        ({"race_samples": 0}, "`race_samples` of at least 1"),
        ({"validate_every": 0}, "`validate_every` of at least 1"),
        ({"patience": 0}, "`patience` of at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` above 0, found 0.0"),
        ({"learning_rate": -1.0}, "found -1.0"),
        ({"learning_rate": math.nan}, "found nan"),
        ({"learning_rate": math.inf}, "found inf"),
        ({"seed": -1}, "`seed` of at least 0, found -1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(LongRopeError, match=says) as error:
        GradientSettings(**wrong)  # type: ignore[arg-type]
    assert error.value.code == "invalid-setting"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("knots", [1, GEOMETRY.pairs + 1])
def test_knots_that_the_pairs_do_not_have_are_refused(knots: int) -> None:
    ran = complete(search_of(knots=knots), Quadratic())
    with pytest.raises(LongRopeError, match=f"2 to 32 knots for 32 rotary pairs, found {knots}") as error:
        _ = ran.best
    assert error.value.code == "invalid-setting"
    assert not ran.said


def test_no_stages_are_refused() -> None:
    with pytest.raises(LongRopeError, match="at least one stage"):
        gradient_search(lambda _: [], [], GEOMETRY, GradientSettings())
