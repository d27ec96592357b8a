"""Algorithm 1 on top of racing: the same search where samples agree, as good a one for less where they do not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from longrope.search import racing
from longrope.search.evaluator import SEARCH, Answer, CandidateSearch, Question
from longrope.search.evolution import Evolution, EvolutionSettings
from longrope.search.log import SearchLog
from longrope.search.loop import Conversation, Progress, run_search
from longrope.search.racing import RacedSearch
from tests.search.slopes import SAMPLES, Quadratic, Reply, ReplyEvaluator, check_stops_anywhere
from tests.search.targets import HEADER, SEEDS, SETTINGS, SPACE, distance, to_window

TOKENS = (100,) * SAMPLES


def complete(search: CandidateSearch, reply: Reply) -> list[Question]:
    """Run `search` to its end without a log. Everything it asked."""
    asked: list[Question] = []
    while not search.done:
        questions = search.ask()
        asked += questions
        search.tell([reply(question) for question in questions])
    return asked


def agreeing(question: Question) -> Answer:
    """`distance`, and on every sample so much more as that sample is harder."""
    offsets = np.array([0.0, 3.0, -0.5, 1.25])
    samples = range(SAMPLES) if question.samples is None else question.samples
    return Answer(float(np.mean(distance(question.window) + offsets[list(samples)])))


def differing(question: Question) -> Answer:
    """The mean of losses whose minimum lies elsewhere on every sample."""
    target = Quadratic(noise=0.05)
    samples = range(SAMPLES) if question.samples is None else question.samples
    return Answer(float(np.mean([target(Question(question.window, {}, SEARCH, (one,))).loss for one in samples])))


def evolution(settings: EvolutionSettings = SETTINGS) -> Evolution:
    return Evolution(SPACE, SEEDS, settings)


@pytest.fixture
def never_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "DEVIATIONS", 1e9)


@pytest.mark.usefixtures("never_drops")
def test_without_drops_it_asks_what_algorithm_1_asks() -> None:
    """Every candidate on every sample, in place of all at once; the same end."""
    plain, search = (
        CandidateSearch(evolution(), to_window),
        RacedSearch(evolution(), to_window, TOKENS, SETTINGS.top_k),
    )
    whole, split = complete(plain, differing), complete(search, differing)
    sizes, at = [8, 6, 6, 6, 6], 0
    for size in sizes:
        generation, at = whole[at : at + size], at + size
        for sample in range(SAMPLES):
            part, split = split[:size], split[size:]
            assert [question.window for question in part] == [question.window for question in generation]
            assert [question.row for question in part] == [q.row | {"samples": [sample]} for q in generation]
            assert all((question.split, question.samples) == (SEARCH, (sample,)) for question in part)
    assert not split
    assert search.best[0] == plain.best[0]
    assert search.best[1] == pytest.approx(plain.best[1], rel=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_where_samples_agree_the_search_is_the_same_and_cheaper(seed: int) -> None:
    """Nobody is dropped who belongs to the top k, so the same parents have the same children, to the end."""
    chosen = EvolutionSettings(population=16, mutations=8, crossovers=8, iterations=12, top_k=8, seed=seed)
    plain, search = (
        CandidateSearch(evolution(chosen), to_window),
        RacedSearch(evolution(chosen), to_window, TOKENS, chosen.top_k),
    )
    whole, asked = complete(plain, agreeing), complete(search, agreeing)
    windows = list(dict.fromkeys(question.window for question in asked))
    assert windows == list(dict.fromkeys(question.window for question in whole))
    top, raced_top = (one.optimiser.ranked[: chosen.top_k] for one in (plain, search))
    assert [candidate for candidate, _ in raced_top] == [candidate for candidate, _ in top]
    np.testing.assert_allclose([loss for _, loss in raced_top], [loss for _, loss in top], rtol=1e-12)
    assert search.incumbent == (to_window(raced_top[0][0]), raced_top[0][1])
    # Whoever is no better than the k-th of those before is known after one sample.
    questions, known = 0, []
    for at in range(0, len(whole), 16):  # P = N₁ + N₂ = 16
        losses = [agreeing(question).loss for question in whole[at : at + 16]]
        limit = sorted(known)[chosen.top_k - 1] if known else math.inf
        questions += sum(SAMPLES if loss <= limit else 1 for loss in losses)
        known += losses
    assert len(asked) == questions < SAMPLES * len(whole)


@pytest.mark.parametrize("seed", range(3))
def test_where_samples_differ_it_comes_as_far_for_less(seed: int) -> None:
    chosen = EvolutionSettings(population=24, mutations=12, crossovers=12, iterations=20, top_k=12, seed=seed)
    plain, search = (
        CandidateSearch(evolution(chosen), to_window),
        RacedSearch(evolution(chosen), to_window, TOKENS, chosen.top_k),
    )
    whole, asked = complete(plain, differing), complete(search, differing)
    start = min(differing(question).loss for question in whole[:3])
    assert len(asked) < 0.95 * SAMPLES * len(whole)
    assert search.best[1] < plain.best[1] + 0.1 * (start - plain.best[1])
    assert search.best[1] == pytest.approx(differing(Question(search.best[0], {})).loss, rel=1e-12)


def test_an_evolution_whose_children_are_all_dropped_ends_by_patience() -> None:
    """The seeds are best by far: nothing else is known at the end."""
    optimiser = evolution(EvolutionSettings(population=8, mutations=3, crossovers=3, top_k=3, patience=2))
    search = RacedSearch(optimiser, to_window, TOKENS, 3)
    first = {candidate.factors for candidate in optimiser.ask()}
    asked = complete(search, lambda question: Answer(1.0 if question.window.factors in first else 50.0))
    assert optimiser.iteration == 1 + 2
    assert len(asked) == 8 * SAMPLES + 2 * 6
    assert len(optimiser.ranked) == 8
    assert search.best[1] == 1.0


def test_progress_shows_the_best_of_the_generations_told(tmp_path: Path) -> None:
    """A loss on one sample is no candidate's loss: it never counts."""
    shown: list[Progress] = []
    search = RacedSearch(evolution(), to_window, TOKENS, SETTINGS.top_k)
    with SearchLog.create(tmp_path / "log", HEADER) as log:
        asked = run_search(search, Conversation(ReplyEvaluator(agreeing), log), shown.append)
    best = [one.best_loss for one in shown]
    assert best[: 8 * SAMPLES] == [math.inf] * 8 * SAMPLES
    assert sorted(best, reverse=True) == best
    known = [agreeing(Question(question.window, {})).loss for question in asked]
    for place, loss in enumerate(best[8 * SAMPLES :], start=8 * SAMPLES):
        assert any(loss == pytest.approx(one) for one in known[:place])
    assert search.incumbent is not None
    assert best[-1] >= search.incumbent[1]


# --- asking, telling, resuming


def test_asking_twice_changes_nothing() -> None:
    quiet, curious = (RacedSearch(evolution(), to_window, TOKENS, SETTINGS.top_k) for _ in range(2))
    while not quiet.done:
        asked = quiet.ask()
        assert curious.ask() == curious.ask() == asked
        for search in (quiet, curious):
            search.tell([Quadratic()(question) for question in asked])
    assert curious.done
    assert curious.best == quiet.best


@pytest.mark.parametrize("count", [0, 7, 9])
def test_tell_of_another_count_is_refused(count: int) -> None:
    search = RacedSearch(evolution(), to_window, TOKENS, SETTINGS.top_k)
    asked = search.ask()
    with pytest.raises(ValueError, match=f"expected 8 answers, found {count}"):
        search.tell([Answer(1.0)] * count)
    assert search.ask() == asked


def test_an_exhausted_space_ends_the_search() -> None:
    optimiser = Evolution(SPACE, SEEDS, EvolutionSettings(population=3, iterations=5, top_k=2, mutations=1))
    optimiser._new = lambda draw: None  # type: ignore[method-assign]
    search = RacedSearch(optimiser, to_window, TOKENS, 2)
    assert len(complete(search, agreeing)) == 3 * SAMPLES


def broken(question: Question) -> Answer:
    """NaN or infinite on a sample in eight, by the candidate and the sample."""
    kind = (round(sum(question.window.factors) * 100) + 5 * (question.samples or (0,))[0]) % 16
    return Answer((math.nan, math.inf)[kind]) if kind < 2 else differing(question)


@pytest.mark.parametrize("reply", [differing, broken])
def test_stopped_after_any_question_and_resumed(tmp_path: Path, reply: Reply) -> None:
    chosen = EvolutionSettings(population=6, mutations=3, crossovers=2, iterations=2, top_k=2, seed=3)
    check_stops_anywhere(tmp_path, lambda: RacedSearch(evolution(chosen), to_window, TOKENS, 2), reply)
    log = (tmp_path / "whole").read_bytes()
    lines = log.count(b"\n") - 1
    assert lines > 6 * SAMPLES
    assert reply is broken or lines < chosen.evaluations * SAMPLES  # some were dropped
    assert (b'"nan"' in log) == (reply is broken)
