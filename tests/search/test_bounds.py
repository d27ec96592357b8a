"""What every search by dialogue keeps to: the largest λ, and start tokens, given or chosen when the factors are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longrope.search.cma import CMASearch, CMASettings, HybridSearch
from longrope.search.dialogue import Bounds, DialogueSearch
from longrope.search.evaluator import Answer, Question
from longrope.search.gradient import GradientSearch, GradientSettings
from tests.search.slopes import SEEDS, STAGE, Quadratic, check_stops_anywhere, complete
from tests.search.targets import GEOMETRY, OPTIMUM, TARGET_LENGTH

SHORT = GradientSettings(steps=5, validate_every=2)
GENERATIONS = CMASettings(evaluations=27, knots=6)
Make = Callable[[Bounds], DialogueSearch]
SEARCHES: dict[str, Make] = {
    "gradient": lambda bounds: GradientSearch([STAGE], GEOMETRY, SHORT, 1.0, bounds),
    "cma": lambda bounds: CMASearch(STAGE, GEOMETRY, GENERATIONS, 1.0, bounds),
    "hybrid": lambda bounds: HybridSearch([STAGE], GEOMETRY, SHORT, GENERATIONS, 1.0, bounds),
}
every_search = pytest.mark.parametrize("make", SEARCHES.values(), ids=SEARCHES)
CHOICES = (0, 1, 8, 64)


def preferring(start_tokens: int) -> Callable[[Question], Answer]:
    """The quadratic, and a tenth more for every doubling between n̂ and the one preferred."""
    quadratic = Quadratic(OPTIMUM)

    def reply(question: Question) -> Answer:
        answer = quadratic(question)
        away = abs(math.log2(question.window.start_tokens + 1) - math.log2(start_tokens + 1))
        return Answer(answer.loss + 0.1 * away, answer.gradient)

    return reply


@every_search
@pytest.mark.parametrize("largest", [1.0, 3.0, 7.5])
def test_no_window_goes_beyond_the_largest_factor(make: Make, largest: float) -> None:
    """Seeds included: PI's factors are the ratio everywhere."""
    search = make(Bounds(largest))
    said = complete(search, Quadratic(OPTIMUM))
    assert max(max(question.window.factors) for question, _ in said) <= largest
    assert max(search.best[0].factors) == pytest.approx(largest)  # the optimum lies beyond
    assert max(OPTIMUM) > largest


@every_search
def test_a_bound_that_does_not_bind_changes_nothing(make: Make) -> None:
    free, bounded = make(Bounds()), make(Bounds(1e6))
    assert complete(free, Quadratic(OPTIMUM)) == complete(bounded, Quadratic(OPTIMUM))


@every_search
def test_start_tokens_that_are_given_are_those_of_every_window(make: Make) -> None:
    search = make(Bounds(start_tokens=(8,)))
    said = complete(search, preferring(0))
    assert {question.window.start_tokens for question, _ in said} == {8}
    assert all(question.row["start_tokens"] == 8 for question, _ in said)
    assert search.best[0].start_tokens == 8


@every_search
def test_no_start_tokens_are_no_part_of_the_log(make: Make) -> None:
    assert not any("start_tokens" in question.row for question, _ in complete(make(Bounds()), preferring(0)))


@every_search
@pytest.mark.parametrize("preferred", CHOICES)
def test_start_tokens_are_chosen_when_the_factors_are(make: Make, preferred: int) -> None:
    plain, search = make(Bounds()), make(Bounds(start_tokens=CHOICES))
    complete(plain, preferring(preferred))
    said = complete(search, preferring(preferred))
    window, loss = search.best
    assert window.factors == plain.best[0].factors
    assert window.start_tokens == preferred
    assert loss == pytest.approx(Quadratic(OPTIMUM)(Question(window, {})).loss)
    tried = {question.window.start_tokens for question, _ in said if question.window.factors == window.factors}
    assert tried == set(CHOICES)
    assert search.incumbent is not None
    assert search.incumbent[0] == window


@every_search
def test_of_equal_losses_the_first_choice_wins(make: Make) -> None:
    search = make(Bounds(start_tokens=CHOICES))
    complete(search, Quadratic(OPTIMUM))
    assert search.best[0].start_tokens == 0


@every_search
def test_stopped_anywhere_and_resumed(make: Make, tmp_path: Path) -> None:
    check_stops_anywhere(tmp_path, lambda: make(Bounds(12.0, CHOICES)), preferring(8))


def test_a_seed_beyond_the_bound_is_cut_to_it() -> None:
    search = SEARCHES["cma"](Bounds(2.0))
    raced = search.ask()
    for question, seed in zip(raced, SEEDS.values(), strict=True):
        np.testing.assert_array_equal(question.window.factors, np.maximum.accumulate(np.clip(seed, 1.0, 2.0)))
        assert question.window.max_length == TARGET_LENGTH
