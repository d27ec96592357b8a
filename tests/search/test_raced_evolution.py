"""Algorithm 1 on top of racing: the same search where samples agree, as good a one for less where they do not."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from longrope.search import racing
from longrope.search.evaluator import SEARCH, EvalRequest, EvalResult
from longrope.search.evolution import Evolution, EvolutionSettings, evolution_search
from longrope.search.log import read_log
from longrope.search.racing import Racing
from longrope.search.spaces import Candidate
from tests.search.slopes import (
    SAMPLES,
    Quadratic,
    Reply,
    ReplyEvaluator,
    Search,
    check_stops_anywhere,
    complete,
    logged,
)
from tests.search.targets import SEEDS, SETTINGS, SPACE, Shown, distance, to_window

TOKENS = (100,) * SAMPLES


def agreeing(request: EvalRequest) -> EvalResult:
    """`distance`, and on every sample so much more as that sample is harder."""
    offsets = np.array([0.0, 3.0, -0.5, 1.25])
    samples = range(SAMPLES) if request.samples is None else request.samples
    return EvalResult(float(np.mean(distance(request.window) + offsets[list(samples)])))


def differing(request: EvalRequest) -> EvalResult:
    """The mean of losses whose minimum lies elsewhere on every sample."""
    target = Quadratic(noise=0.05)
    samples = range(SAMPLES) if request.samples is None else request.samples
    return EvalResult(float(np.mean([target(EvalRequest(request.window, {}, SEARCH, (one,))).loss for one in samples])))


def evolution(settings: EvolutionSettings = SETTINGS) -> Evolution:
    return Evolution(SPACE, SEEDS, settings)


def plain(optimizer: Evolution) -> Search:
    return partial(evolution_search, optimizer=optimizer, to_window=to_window)


def raced(optimizer: Evolution) -> Search:
    return partial(plain(optimizer), racing=Racing(TOKENS, optimizer.settings.top_k))


@pytest.fixture
def never_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "DEVIATIONS", 1e9)


@pytest.mark.usefixtures("never_drops")
def test_without_drops_it_evaluates_what_algorithm_1_does() -> None:
    """Every candidate on every sample, in place of all at once; the same end."""
    one, other = complete(plain(evolution()), differing), complete(raced(evolution()), differing)
    whole, split = ([request for request, _ in ran.said] for ran in (one, other))
    sizes, at = [8, 6, 6, 6, 6], 0
    for size in sizes:
        generation, at = whole[at : at + size], at + size
        for sample in range(SAMPLES):
            part, split = split[:size], split[size:]
            assert [request.window for request in part] == [request.window for request in generation]
            assert [request.row for request in part] == [q.row | {"samples": [sample]} for q in generation]
            assert all((request.split, request.samples) == (SEARCH, (sample,)) for request in part)
    assert not split
    assert other.best[0] == one.best[0]
    assert other.best[1] == pytest.approx(one.best[1], rel=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_where_samples_agree_the_search_is_the_same_and_cheaper(seed: int) -> None:
    """Nobody is dropped who belongs to the top k, so the same parents have the same children, to the end."""
    chosen = EvolutionSettings(population=16, mutations=8, crossovers=8, iterations=12, top_k=8, seed=seed)
    one, other = complete(plain(evolution(chosen)), agreeing), complete(raced(evolution(chosen)), agreeing)
    whole, asked = ([request for request, _ in ran.said] for ran in (one, other))
    windows = list(dict.fromkeys(request.window for request in asked))
    assert windows == list(dict.fromkeys(request.window for request in whole))
    assert one.outcome is not None
    assert other.outcome is not None
    top, raced_top = (ran.outcome.ranked[: chosen.top_k] for ran in (one, other))
    assert [candidate for candidate, _ in raced_top] == [candidate for candidate, _ in top]
    np.testing.assert_allclose([loss for _, loss in raced_top], [loss for _, loss in top], rtol=1e-12)
    assert other.incumbent == other.best == (to_window(raced_top[0][0]), raced_top[0][1])
    # Whoever is no better than the k-th of those before is known after one sample.
    requests, known = 0, []
    for at in range(0, len(whole), 16):  # P = N₁ + N₂ = 16
        losses = [agreeing(request).loss for request in whole[at : at + 16]]
        limit = sorted(known)[chosen.top_k - 1] if known else math.inf
        requests += sum(SAMPLES if loss <= limit else 1 for loss in losses)
        known += losses
    assert len(asked) == requests < SAMPLES * len(whole)


@pytest.mark.parametrize("seed", range(3))
def test_where_samples_differ_it_comes_as_far_for_less(seed: int) -> None:
    chosen = EvolutionSettings(population=24, mutations=12, crossovers=12, iterations=20, top_k=12, seed=seed)
    one, other = complete(plain(evolution(chosen)), differing), complete(raced(evolution(chosen)), differing)
    whole, asked = ([request for request, _ in ran.said] for ran in (one, other))
    start = min(differing(request).loss for request in whole[:3])
    assert len(asked) < 0.95 * SAMPLES * len(whole)
    assert other.best[1] < one.best[1] + 0.1 * (start - one.best[1])
    assert other.best[1] == pytest.approx(differing(EvalRequest(other.best[0], {})).loss, rel=1e-12)


def test_an_evolution_whose_children_are_all_dropped_ends_by_patience() -> None:
    """The seeds are best by far: nothing else is known at the end."""
    optimizer = evolution(EvolutionSettings(population=8, mutations=3, crossovers=3, top_k=3, patience=2))
    first = {candidate.factors for candidate in optimizer.ask()}
    ran = complete(raced(optimizer), lambda request: EvalResult(1.0 if request.window.factors in first else 50.0))
    assert optimizer.iteration == 1 + 2
    assert ran.batches == [8] * SAMPLES + [6, 6]
    assert len(optimizer.ranked) == 8
    assert ran.best[1] == 1.0


def test_progress_shows_the_best_of_whole_generations(tmp_path: Path) -> None:
    """A loss on one sample is no candidate's loss: it never counts."""
    shown = Shown()
    outcome = logged(tmp_path / "log", raced(evolution()), ReplyEvaluator(agreeing), callbacks=shown)
    best = [one.best_loss for one in shown.progress]
    assert best[: 8 * SAMPLES] == [math.inf] * 8 * SAMPLES
    assert sorted(best, reverse=True) == best
    _, rows = read_log(tmp_path / "log")
    windows = [to_window(Candidate(tuple(row.request["steps"]), row.request["start_tokens"])) for row in rows]
    known = [agreeing(EvalRequest(window, {})).loss for window in windows]
    for place, loss in enumerate(best[8 * SAMPLES :], start=8 * SAMPLES):
        assert any(loss == pytest.approx(one) for one in known[:place])
    assert best[-1] >= outcome.loss


# --- the end, and resuming


def test_an_exhausted_space_ends_the_search() -> None:
    """Its last generation is empty, and a batch of its own."""
    optimizer = Evolution(SPACE, SEEDS, EvolutionSettings(population=3, iterations=5, top_k=2, mutations=1))
    optimizer._new = lambda draw: None  # type: ignore[method-assign]
    assert complete(raced(optimizer), agreeing).batches == [3] * SAMPLES + [0]


def broken(request: EvalRequest) -> EvalResult:
    """NaN or infinite on a sample in eight, by the candidate and the sample."""
    kind = (round(sum(request.window.factors) * 100) + 5 * (request.samples or (0,))[0]) % 16
    return EvalResult((math.nan, math.inf)[kind]) if kind < 2 else differing(request)


@pytest.mark.parametrize("reply", [differing, broken])
def test_stopped_after_any_question_and_resumed(tmp_path: Path, reply: Reply) -> None:
    chosen = EvolutionSettings(population=6, mutations=3, crossovers=2, iterations=2, top_k=2, seed=3)
    check_stops_anywhere(tmp_path, lambda: raced(evolution(chosen)), reply)
    log = (tmp_path / "whole").read_bytes()
    lines = log.count(b"\n") - 1
    assert lines > 6 * SAMPLES
    assert reply is broken or lines < chosen.evaluations * SAMPLES  # some were dropped
    assert (b'"nan"' in log) == (reply is broken)
