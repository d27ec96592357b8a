"""CMA-ES on the knots, on losses without a model: where it ends, what it asks, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cmaes import CMA
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.rope.scaling import Window
from longrope.search.cma import CMASearch, CMASettings, HybridSearch
from longrope.search.dialogue import Stage, loss_of
from longrope.search.evaluator import SEARCH, Answer, Question
from longrope.search.gradient import GradientSettings
from longrope.search.knots import LARGEST
from tests.search.slopes import EASY, SEEDS, STAGE, Quadratic, check_stops_anywhere, complete, error_of
from tests.search.targets import GEOMETRY, OPTIMUM, TARGET_LENGTH

RACED = len(SEEDS)


def cma(stage: Stage = STAGE, attention_factor: float = 1.0, **settings: object) -> CMASearch:
    return CMASearch(stage, GEOMETRY, CMASettings(**settings), attention_factor)  # type: ignore[arg-type]


def of(window: Window) -> Question:
    return loss_of(window, SEARCH)


# --- where it ends


@pytest.mark.parametrize(
    ("knots", "optimum", "evaluations", "left"),
    [(8, EASY, 500, 0.01), (12, EASY, 256, 0.05), (12, OPTIMUM, 500, 0.3), (None, EASY, 500, 0.05)],
)
def test_comes_near_the_optimum(knots: int | None, optimum: np.ndarray, evaluations: int, left: float) -> None:
    search = cma(knots=knots, evaluations=evaluations)
    complete(search, Quadratic(optimum))
    window, loss = search.best
    seed = SEEDS[search.chosen_seeds[0]]
    assert error_of(window, optimum) < left * error_of(replace(window, factors=tuple(seed)), optimum)
    assert loss == Quadratic(optimum)(of(window)).loss


def test_it_crosses_a_wall_around_its_start() -> None:
    """Every loss near PI, the only seed, is higher, and the optimum lies beyond."""
    stage = replace(STAGE, seeds={"pi": SEEDS["pi"]})

    def reply(question: Question) -> Answer:
        far = error_of(question.window, SEEDS["pi"])
        answer = Quadratic()(question)
        return answer if far < 0.01 or far > 0.05 else replace(answer, loss=100.0)

    search = cma(stage, knots=8, sigma=1.0)
    complete(search, reply)
    assert error_of(search.best[0], SEEDS["pi"]) > 0.05
    assert search.best[1] < 0.9 * Quadratic()(of(Window(TARGET_LENGTH, tuple(SEEDS["pi"])))).loss


def test_the_start_is_never_lost() -> None:
    """Two knots cannot hold YaRN, and no candidate comes near it: YaRN itself is the result, and known from the first
    answer on."""
    seed = SEEDS["yarn"]
    search = cma(replace(STAGE, seeds={"yarn": seed}), knots=2, evaluations=30)

    def reply(question: Question) -> Answer:
        return Answer(float(np.abs(np.log(question.window.factors) - np.log(seed)).max()))

    search.tell([reply(question) for question in search.ask()])
    (start,) = search.ask()
    assert start.window.factors == tuple(seed.tolist())
    assert search.incumbent is None
    search.tell([reply(start)])
    assert search.incumbent == (start.window, 0.0)
    complete(search, reply)
    assert search.best == search.incumbent == (start.window, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_survived(bad: float) -> None:
    """A third of all candidates, by the candidate alone."""

    def reply(question: Question) -> Answer:
        broken = round(sum(question.window.factors) * 1e6) % 3 == 0
        return Answer(bad) if broken and question.samples is None else Quadratic()(question)

    search = cma(knots=8)
    said = complete(search, reply)
    finite = [(answer.loss, question.window) for question, answer in said[RACED:] if math.isfinite(answer.loss)]
    assert 20 < len(finite) < 220
    assert search.best == min(finite, key=lambda pair: pair[0])[::-1]
    assert error_of(search.best[0], EASY) < 0.2 * error_of(said[RACED][0].window, EASY)


def test_a_start_that_is_no_number_is_left_for_what_is() -> None:
    start: list[Window] = []

    def reply(question: Question) -> Answer:
        if question.samples is None and not start:
            start.append(question.window)
            return Answer(math.nan)
        return Quadratic()(question)

    search = cma(evaluations=22)
    said = complete(search, reply)
    assert search.best[0] != start[0]
    assert search.best[1] == min(answer.loss for _, answer in said[RACED + 1 :])


@pytest.mark.filterwarnings("error")
def test_losses_that_are_never_numbers_are_told_without_a_warning() -> None:
    """`cmaes` looks at the range of the last losses, and infinity less infinity is no number."""
    search = cma(knots=2, evaluations=600)
    complete(search, lambda _: Answer(math.nan))
    assert search.done


def test_a_loss_that_falls_for_ever_ends_where_windows_do() -> None:
    search = cma(evaluations=500)
    said = complete(search, lambda question: Answer(-float(np.log(question.window.factors).sum())))
    assert max(max(question.window.factors) for question, _ in said) == LARGEST
    assert search.best[0].factors[-1] == LARGEST


# --- what it asks


@pytest.mark.parametrize("knots", [3, 12, None])
def test_generations_around_the_start_on_all_search_samples(knots: int | None) -> None:
    search = cma(knots=knots, evaluations=100, attention_factor=1.3)
    said = complete(search, Quadratic())
    generation = CMA(mean=np.zeros(knots or GEOMETRY.pairs), sigma=1.0).population_size
    assert len(said) == RACED + 1 + generation * (100 // generation)
    assert said[RACED][0].window.factors == tuple(SEEDS[search.chosen_seeds[0]].tolist())
    for question, _ in said[RACED:]:
        assert (question.split, question.samples, question.gradient) == (SEARCH, None, False)
        assert (question.window.max_length, question.window.start_tokens) == (TARGET_LENGTH, 0)
        assert question.window.attention_factor == 1.3


def test_a_generation_is_asked_in_one_go() -> None:
    search, sizes = cma(knots=8, evaluations=30), []
    while not search.done:
        asked = search.ask()
        sizes.append(len(asked))
        search.tell([Quadratic()(question) for question in asked])
    assert sizes == [3, 1, 10, 10, 10]


@given(seed=st.integers(0, 2**32 - 1), sigma=st.floats(0.05, 3.0), knots=st.sampled_from([2, 5, 12, 31, None]))
@settings(max_examples=40, deadline=None)
def test_every_candidate_is_monotone_and_from_1(seed: int, sigma: float, knots: int | None) -> None:
    for question, _ in complete(cma(seed=seed, sigma=sigma, knots=knots, evaluations=30), Quadratic(OPTIMUM)):
        assert len(question.window.factors) == GEOMETRY.pairs
        assert question.window.factors[0] >= 1.0
        assert (np.diff(question.window.factors) >= -1e-12 * np.array(question.window.factors[1:])).all()


def test_the_first_candidates_lie_around_the_start_as_far_as_sigma_says() -> None:
    spreads = []
    for sigma in (0.002, 0.02):  # NTK rises by more than that: nothing is projected
        drawn = []
        for seed in range(20):
            search = cma(replace(STAGE, seeds={"ntk": SEEDS["ntk"]}), seed=seed, sigma=sigma)
            for _ in range(2):
                search.tell([Answer(1.0)])
            drawn += [np.log(question.window.factors) for question in search.ask()]
        spreads.append(np.std(drawn, axis=0)[1:])
        if sigma == 0.002:
            np.testing.assert_allclose(np.mean(drawn, axis=0), np.log(SEEDS["ntk"]), atol=0.01)
    np.testing.assert_allclose(spreads[1] / spreads[0], 10.0, rtol=0.2)


def test_every_pair_moves_by_itself_without_knots() -> None:
    """The logarithms of a generation differ from the start in more directions than knots could give."""
    search = cma(knots=None, evaluations=100)
    said = complete(search, Quadratic())
    moves = np.array([np.log(question.window.factors) for question, _ in said[RACED + 1 :]])
    assert np.linalg.matrix_rank(np.diff(moves, axis=0), tol=1e-6) == GEOMETRY.pairs


def test_patience_counts_generations_without_a_better_candidate() -> None:
    def generations(losses: list[float], patience: int | None, evaluations: int = 110) -> int:
        """Told, when the best of each is one of `losses` (the last, for ever) and the start 5."""
        search = cma(patience=patience, evaluations=evaluations)
        for loss in (1.0, 5.0):
            search.tell([Answer(loss)] * len(search.ask()))
        count = 0
        while not search.done:
            worse = [Answer(9.0)] * (len(search.ask()) - 1)
            search.tell([Answer(losses[min(count, len(losses) - 1)]), *worse])
            count += 1
        return count

    assert generations([6.0], 3) == 3
    assert generations([5.0], 1) == 1  # as good as the start is not better
    assert generations([4.0, 6.0, 6.0, 3.0, 6.0, 6.0, 6.0], 3) == 7
    assert generations([6.0], None) == 10
    assert generations([math.nan], 2) == 2


def test_same_seed_same_questions_other_seed_others() -> None:
    def rows(seed: int) -> str:
        return json.dumps([question.row for question, _ in complete(cma(seed=seed, evaluations=44), Quadratic())])

    assert rows(0) == rows(0)
    assert len({rows(seed) for seed in range(4)}) == 4


@pytest.mark.parametrize("broken", [False, True])
def test_stopped_after_any_evaluation_and_resumed(tmp_path: Path, broken: bool) -> None:
    def reply(question: Question) -> Answer:
        kind = round(sum(question.window.factors) * 1e6) % 4
        return Answer((math.nan, math.inf)[kind]) if broken and kind < 2 else Quadratic()(question)

    check_stops_anywhere(tmp_path, lambda: cma(knots=3, evaluations=28, sigma=1.0), reply)
    log = (tmp_path / "whole").read_bytes()
    assert log.count(b"\n") == 1 + RACED + 1 + 28
    assert (b'"nan"' in log) == broken


# --- what is refused


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"evaluations": 0}, "evaluations must be at least 1; found 0"),
        ({"race_samples": 0}, "race_samples must be at least 1; found 0"),
        ({"seed": -1}, "seed must be at least 0; found -1"),
        ({"sigma": 0.0}, "step size of CMA-ES must be positive; found 0.0"),
        ({"sigma": math.nan}, "found nan"),
        ({"sigma": math.inf}, "found inf"),
        ({"patience": 0}, "patience must be at least 1 generation; found 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(LongRopeError, match=says) as error:
        CMASettings(**wrong)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("knots", [1, GEOMETRY.pairs + 1])
def test_knots_that_the_pairs_do_not_have_are_refused(knots: int) -> None:
    with pytest.raises(LongRopeError, match=f"2 to 32 knots for 32 rotary pairs, found {knots}"):
        cma(knots=knots)


@pytest.mark.parametrize("knots", [2, 3, 8, 12, 20, None])
def test_less_than_one_generation_is_refused(knots: int | None) -> None:
    """It would search nothing, and say so nowhere."""
    generation = CMA(mean=np.zeros(knots or GEOMETRY.pairs), sigma=1.0).population_size
    cma(knots=knots, evaluations=generation)
    short = CMASettings(knots=knots, evaluations=generation - 1)
    for make in (
        lambda: CMASearch(STAGE, GEOMETRY, short),
        lambda: HybridSearch([STAGE], GEOMETRY, GradientSettings(knots=knots), short),
    ):
        with pytest.raises(LongRopeError, match=f"at least {generation} evaluations, .* found {generation - 1}"):
            make()


def test_a_seed_that_the_package_does_not_take_is_refused() -> None:
    CMASettings(seed=2**32 - 1)
    with pytest.raises(LongRopeError, match="seeds up to 4294967295; found 4294967296"):
        CMASettings(seed=2**32)
