"""What every search by dialogue keeps to: asking and telling, the race of the seeds, and what its progress shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.rope.closed_forms import pi, yarn
from longrope.rope.scaling import Window
from longrope.search.cma import CMASearch, CMASettings, HybridSearch
from longrope.search.dialogue import (
    Bounds,
    Dialogue,
    DialogueSearch,
    Stage,
    both_splits,
    gradient_of,
    joint,
    loss_of,
    race,
)
from longrope.search.evaluator import SEARCH, VALIDATION, Answer, Question
from longrope.search.gradient import GradientSearch, GradientSettings
from longrope.search.log import SearchLog
from longrope.search.loop import Conversation, Progress, run_search
from tests.search.slopes import ORIGINAL, SAMPLES, SEEDS, STAGE, Quadratic, ReplyEvaluator, complete
from tests.search.targets import GEOMETRY, HEADER, TARGET_LENGTH

WINDOW = Window(TARGET_LENGTH, (2.0,) * GEOMETRY.pairs)
SHORT = GradientSettings(steps=5, validate_every=2, knots=6)
GENERATIONS = CMASettings(evaluations=27, knots=6)  # three of 9

SEARCHES: dict[str, Callable[[], DialogueSearch]] = {
    "gradient": lambda: GradientSearch([STAGE], GEOMETRY, SHORT),
    "cma": lambda: CMASearch(STAGE, GEOMETRY, GENERATIONS),
    "hybrid": lambda: HybridSearch([STAGE], GEOMETRY, SHORT, GENERATIONS),
}
every_search = pytest.mark.parametrize("make", SEARCHES.values(), ids=SEARCHES)


# --- asking and telling


class Script(DialogueSearch):
    """Asks so many questions at a time, and notes what it hears."""

    def __init__(self, counts: list[int], loss: float = 1.5) -> None:
        self.counts, self.loss, self.heard = counts, loss, []
        super().__init__()

    def _run(self) -> Dialogue[tuple[Window, float]]:
        for count in self.counts:
            answers = yield [loss_of(WINDOW, SEARCH, (sample,)) for sample in range(count)]
            self.heard.append([answer.loss for answer in answers])
        return WINDOW, self.loss


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_answers_come_back_in_order_and_wrong_counts_change_nothing(counts: list[int], data: st.DataObject) -> None:
    search, told = Script(counts), []
    for count in counts:
        assert not search.done
        with pytest.raises(LongRopeError, match="not done"):
            _ = search.best
        asked = search.ask()
        assert [question.samples for question in asked] == [(sample,) for sample in range(count)]
        wrong = data.draw(st.sampled_from([n for n in range(6) if n != count]))
        with pytest.raises(ValueError, match=f"expected answers to {count} questions, found {wrong}"):
            search.tell([Answer(0.0)] * wrong)
        asked.clear()  # what was given away is the caller's
        assert len(search.ask()) == count
        losses = [float(len(told)) + sample / 10 for sample in range(count)]
        search.tell([Answer(loss) for loss in losses])
        told.append(losses)
    assert search.heard == told
    assert search.done
    assert search.ask() == []
    assert search.best == (WINDOW, 1.5)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_result_that_is_no_number_is_an_error_of_best(loss: float) -> None:
    search = Script([1], loss)
    complete(search, Quadratic())
    with pytest.raises(LongRopeError, match="no factors had a finite loss") as error:
        _ = search.best
    assert "\n" not in str(error.value)


@every_search
def test_asking_twice_and_reading_changes_nothing(make: Callable[[], DialogueSearch]) -> None:
    quiet, curious, reply = make(), make(), Quadratic()
    while not quiet.done:
        asked = quiet.ask()
        assert curious.ask() == curious.ask() == asked
        assert not curious.done
        _ = curious.incumbent
        for search in (quiet, curious):
            search.tell([reply(question) for question in asked])
    assert curious.done
    assert curious.best == quiet.best


@every_search
def test_tell_after_the_end_is_refused(make: Callable[[], DialogueSearch]) -> None:
    search = make()
    complete(search, Quadratic())
    best = search.best
    with pytest.raises(ValueError, match="expected answers to 0 questions, found 1"):
        search.tell([Answer(0.0)])
    assert search.best == best


@every_search
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_finite_at_all_is_an_error_of_best(make: Callable[[], DialogueSearch], bad: float) -> None:
    search = make()
    said = complete(search, lambda _: Answer(bad, (bad,) * (GEOMETRY.pairs + 1)))
    assert all(np.isfinite(question.window.factors).all() for question, _ in said)
    with pytest.raises(LongRopeError, match="no factors had a finite loss"):
        _ = search.best


@every_search
def test_the_result_comes_with_its_loss_on_all_search_samples(make: Callable[[], DialogueSearch]) -> None:
    """Where search and validation do not agree, and validation decides or not."""
    middle = np.exp(0.6 * np.log(SEEDS["yarn"]) + 0.4 * Quadratic().goal)

    def reply(question: Question) -> Answer:
        return (Quadratic(middle) if question.split == VALIDATION else Quadratic())(question)

    search = make()
    complete(search, reply)
    window, loss = search.best
    assert loss == reply(loss_of(window, SEARCH)).loss


@every_search
def test_rows_tell_questions_apart_and_are_json(make: Callable[[], DialogueSearch]) -> None:
    """What a log compares: the same row only for the same window, texts and length."""
    asked = [question for question, _ in complete(make(), Quadratic())]
    rows = {json.dumps(question.row): (question.window, question.split, question.samples) for question in asked}
    for question in asked:
        assert rows[json.dumps(question.row)] == (question.window, question.split, question.samples)
    assert len(rows) == len({(question.window, question.split, question.samples) for question in asked})


def test_what_questions_are_made_of() -> None:
    for question in (loss_of(WINDOW, VALIDATION), loss_of(WINDOW, SEARCH, (0, 2)), gradient_of(WINDOW, 3)):
        samples = None if question.samples is None else list(question.samples)
        assert question.row == {
            "length": TARGET_LENGTH,
            "factors": [2.0] * GEOMETRY.pairs,
            "attention_factor": 1.0,
            "split": question.split,
            "samples": samples,
        }
    assert gradient_of(WINDOW, 3) == Question(WINDOW, question.row, SEARCH, (3,), gradient=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_both_splits_decide_with_equal_weight_and_numbers_only(bad: float) -> None:
    assert [(question.split, question.samples) for question in both_splits(WINDOW)] == [
        (VALIDATION, None),
        (SEARCH, None),
    ]
    assert joint([Answer(3.0), Answer(1.0)]) == 2.0
    assert joint([Answer(bad), Answer(1.0)]) == joint([Answer(1.0), Answer(bad)]) == math.inf


# --- the race


def raced(stage: Stage, losses: list[float], samples: int = 2) -> tuple[list[Question], str]:
    """What a race asks, all of it, and who wins."""
    dialogue = race(stage, stage.seeds, 1.2, samples, Bounds())
    questions = next(dialogue)
    with pytest.raises(StopIteration) as end:
        dialogue.send([Answer(loss) for loss in losses])
    return questions, end.value.value


@pytest.mark.parametrize(("samples", "there", "expected"), [(2, 4, (0, 1)), (1, 4, (0,)), (3, 2, (0, 1)), (9, 1, (0,))])
def test_a_race_asks_all_seeds_at_once_on_the_same_samples(samples: int, there: int, expected: tuple[int, ...]) -> None:
    questions, _ = raced(replace(STAGE, samples=there), [1.0, 2.0, 3.0], samples)
    assert len(questions) == len(SEEDS)
    for question, seed in zip(questions, SEEDS.values(), strict=True):
        assert (question.split, question.samples, question.gradient) == (SEARCH, expected, False)
        assert (question.window.max_length, question.window.attention_factor) == (TARGET_LENGTH, 1.2)
        assert question.window.factors == tuple(seed.tolist())


@given(losses=st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf, -math.inf]), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_the_first_of_the_lowest_finite_losses_wins(losses: list[float]) -> None:
    names = [f"seed {place}" for place in range(len(losses))]
    _, winner = raced(replace(STAGE, seeds=dict.fromkeys(names, SEEDS["yarn"])), losses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert winner == names[losses.index(min(finite)) if finite else 0]


@every_search
def test_searches_race_their_seeds_in_one_go(make: Callable[[], DialogueSearch]) -> None:
    search, reply = make(), Quadratic()
    asked = search.ask()
    assert [question.samples for question in asked] == [(0, 1)] * 3
    search.tell([reply(question) for question in asked])
    assert search.chosen_seeds == ["yarn"]
    assert all(question.samples is None for question in search.ask())


# --- progress


@pytest.fixture
def progress_of(tmp_path) -> Callable[..., list[tuple[Question, Answer, Progress]]]:
    """Every question of a search, its answer, and what was shown then."""

    def run(search: DialogueSearch, reply: Callable[[Question], Answer]) -> list[tuple[Question, Answer, Progress]]:
        shown: list[Progress] = []
        evaluator = ReplyEvaluator(reply)
        with SearchLog.create(tmp_path / "log", HEADER) as log:
            asked = run_search(search, Conversation(evaluator, log), shown.append)
            answers = [entry.answer for entry in log.evaluations]
        assert [one.evaluations for one in shown] == list(range(1, len(asked) + 1))
        return list(zip(asked, answers, shown, strict=True))

    return run


def overfitting(question: Question) -> Answer:
    """Validation losses are 10 above those of the search, and best half the way."""
    middle = np.exp(0.6 * np.log(SEEDS["yarn"]) + 0.4 * Quadratic().goal)
    if question.split == SEARCH:
        return Quadratic()(question)
    answer = Quadratic(middle)(question)
    return replace(answer, loss=answer.loss + 10.0)


@pytest.mark.parametrize("name", ["gradient", "hybrid"])
def test_progress_of_a_search_that_validates_shows_what_it_chooses_by(
    progress_of: Callable[..., list[tuple[Question, Answer, Progress]]], name: str
) -> None:
    search = SEARCHES[name]()
    seen: list[float] = []
    told = progress_of(search, overfitting)
    validated: Answer | None = None
    for question, answer, progress in told:
        assert progress.best_loss == min(seen, default=math.inf)
        if validated is not None:  # the search samples are asked about right after
            assert (question.split, question.samples) == (SEARCH, None)
            seen.append(joint([validated, answer]))
        validated = answer if question.split == VALIDATION else None
    assert min(seen) > 5.0
    assert search.incumbent is not None
    assert told[-1][2].best_loss == search.incumbent[1]
    assert search.incumbent[1] == joint([overfitting(question) for question in both_splits(search.best[0])])


def test_progress_of_cma_follows_each_candidate(
    progress_of: Callable[..., list[tuple[Question, Answer, Progress]]],
) -> None:
    told = progress_of(SEARCHES["cma"](), Quadratic())
    assert all(progress.best_loss == math.inf for _, _, progress in told[: len(SEEDS)])
    losses = [answer.loss for _, answer, _ in told[len(SEEDS) :]]
    shown = [progress.best_loss for _, _, progress in told[len(SEEDS) :]]
    assert shown == [min(losses[: count + 1]) for count in range(len(losses))]


def test_progress_begins_anew_with_every_stage(
    progress_of: Callable[..., list[tuple[Question, Answer, Progress]]],
) -> None:
    """Losses of another window do not compare: the first validation of a longer one is what is shown from then on."""
    stages = [
        Stage(
            length=k * ORIGINAL,
            seeds={"pi": pi(GEOMETRY, k * ORIGINAL), "yarn": yarn(GEOMETRY, k * ORIGINAL)},
            samples=SAMPLES,
        )
        for k in (4, 8)
    ]

    def reply(question: Question) -> Answer:
        answer = Quadratic()(question)
        return replace(answer, loss=answer.loss + question.window.max_length)

    told = progress_of(GradientSearch(stages, GEOMETRY, SHORT), reply)
    lengths = [question.window.max_length for question, _, _ in told]
    first = next(
        place for place, (question, _, _) in enumerate(told) if question.window.max_length == 8 * ORIGINAL
        and question.split == VALIDATION
    )  # fmt: skip
    assert all(progress.best_loss < 8 * ORIGINAL for _, _, progress in told[4 : first + 2])
    assert all(progress.best_loss >= 8 * ORIGINAL for _, _, progress in told[first + 2 :])
    assert lengths == sorted(lengths)
