"""Racing: which candidates are dropped after which text, the losses that Algorithm 1 gets, and that the best stay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.rope.scaling import Window
from longrope.search.evaluator import EvalRequest, EvalResult
from longrope.search.racing import Racing


def raced(
    losses: Sequence[Sequence[float]], *sizes: int, keep: int, tokens: Sequence[int] | None = None
) -> tuple[list[list[float]], list[list[int]]]:
    """The losses of generations of so many `sizes`, and the samples that each candidate was scored on.

    `losses` (candidates, samples), in the order of asking.
    """
    racing = Racing(tokens or (1,) * len(losses[0]), keep)
    asked: list[list[int]] = [[] for _ in losses]

    def evaluate(requests: Sequence[EvalRequest]) -> list[EvalResult]:
        results = []
        for request in requests:
            (sample,) = request.samples or ()
            assert request.row == {"number": request.row["number"], "samples": [sample]}
            asked[request.row["number"]].append(sample)
            results.append(EvalResult(losses[request.row["number"]][sample]))
        return results

    numbers = iter(range(sum(sizes)))
    scored = []
    for size in sizes:
        generation = [EvalRequest(Window(8, (1.0,)), {"number": next(numbers)}) for _ in range(size)]
        scored.append(racing.losses(evaluate, generation))
    return scored, asked


# --- candidates that are dropped

ELITE = [[1.0, 2.0, 3.0, 2.0], [1.1, 2.0, 2.9, 2.1], [0.9, 2.2, 3.0, 2.0], [1.2, 2.1, 3.1, 1.9]]


def test_who_is_clearly_worse_is_asked_about_one_sample_only() -> None:
    better, hopeless, near = [0.8, 1.8, 2.8, 1.8], [9.0, 9.0, 9.0, 9.0], [1.1, 2.1, 3.0, 2.0]
    scored, asked = raced([*ELITE, better, hopeless, near], 4, 3, keep=4)
    assert asked == [[0, 1, 2, 3]] * 5 + [[0], [0, 1, 2, 3]]
    assert scored[0] == [pytest.approx(np.mean(losses)) for losses in ELITE]
    assert scored[1] == [pytest.approx(1.8), math.inf, pytest.approx(2.05)]


def test_candidates_compare_on_the_samples_that_both_were_scored_on() -> None:
    """Sample 0 is ten times as hard as the rest: its loss is above everyone's mean, and nobody is dropped for it."""
    elite = [[10.0, 1.0, 1.0], [10.1, 1.1, 0.9], [10.2, 1.0, 1.1]]
    scored, asked = raced([*elite, [10.05, 1.0, 1.0]], 3, 1, keep=3)
    assert asked[3] == [0, 1, 2]
    assert scored[1] == [pytest.approx(12.05 / 3)]
    # And on an easy one, a loss far below everyone's mean is far behind.
    _, asked = raced([*(losses[::-1] for losses in elite), [2.0, 1.0, 10.0]], 3, 1, keep=3)
    assert asked[3] == [0]


def test_the_spread_decides_how_far_behind_is_too_far() -> None:
    """0.5 behind on the first sample: hopeless where samples agree, nothing where they do not."""
    agree = [[1.0, 2.0, 3.0], [1.1, 2.11, 3.09], [1.2, 2.19, 3.21]]
    differ = [[1.0, 2.0, 3.0], [2.1, 2.1, 2.1], [0.2, 3.2, 3.2]]
    for elite, expected in ((agree, [0]), (differ, [0, 1, 2])):
        last = max(elite, key=sum)
        _, asked = raced([*elite, [loss + 0.5 for loss in last]], 3, 1, keep=3)
        assert asked[3] == expected


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_one_equal_in_44_is_dropped_by_chance(samples: int) -> None:
    """Candidates exactly as good as the k-th over all samples, with a known spread, drawn anew for each sample.

    After one sample of N the limit is 2·σ·√(1 − 1/N): what the mean of N draws takes off the spread of one.
    """
    rng = np.random.default_rng(samples)
    level = 5.0 + rng.standard_normal(samples)
    elite, equal = rng.standard_normal((400, samples)), rng.standard_normal((4000, samples))
    elite[-1] = 0.0
    elite, equal = (deviations - deviations.mean(axis=1, keepdims=True) for deviations in (elite, equal))
    elite[:-1] -= 1.0  # all better than the last, which is the k-th
    _, asked = raced((level + np.concatenate([elite, equal])).tolist(), 400, 4000, keep=400)
    dropped = sum(places == [0] for places in asked[400:]) / 4000
    assert dropped == pytest.approx(1 / 44, abs=0.008)


def test_later_samples_drop_too_and_less_is_enough_then() -> None:
    """The limit after 1, 2 and 3 of 4 samples falls as √(1/n − 1/4), and what counts is the mean so far."""
    elite = [[1.0, 2.0, 3.0, 4.0], [1.1, 1.9, 3.1, 3.9], [1.0, 2.0, 3.2, 4.2]]  # the last is the k-th
    differences = np.array(elite[:2]) - np.array(elite[2])
    deviation = math.sqrt(sum(np.var(row, ddof=1) for row in differences) / 2)
    limits = [2 * deviation * math.sqrt(1 / n - 1 / 4) for n in (1, 2, 3)]
    assert limits[0] > 1.5 * limits[1] > 1.5 * limits[2] > 0
    last = np.array(elite[2])
    for n in (1, 2, 3):
        for factor, expected in ((0.99, False), (1.01, True)):
            behind = factor * limits[n - 1]
            candidate = last + behind
            if not expected:
                candidate[n:] = last[n:] - 9.0
            else:
                candidate[: n - 1] = last[: n - 1] - 9.0
                candidate[n - 1] += 9.0 * (n - 1) + (n - 1) * behind
            _, asked = raced([*elite, candidate.tolist()], 3, 1, keep=3)
            assert len(asked[3]) == (n if expected else 4), (n, factor)


def test_none_is_dropped_until_k_are_known() -> None:
    worse = [[float(place)] * 3 for place in range(1, 9)]
    scored, asked = raced(worse, 2, 2, 4, keep=4)
    assert asked[:4] == [[0, 1, 2]] * 4  # four known after the second generation
    assert asked[4:] == [[0]] * 4
    assert scored == [[1.0, 2.0], [3.0, 4.0], [math.inf] * 4]


def test_the_elite_follows_what_is_found() -> None:
    """A loss that was good enough at first is not when better ones are known."""
    good, bad = [[1.0, 1.1, 1.0], [1.1, 1.1, 1.2]], [[5.0, 5.1, 5.0], [5.2, 5.1, 5.3]]
    same = [5.1, 5.1, 5.1]
    _, asked = raced([*bad, same, *good, same], 2, 1, 2, 1, keep=2)
    assert asked[2] == [0, 1, 2]
    assert asked[5] == [0]


def test_the_best_one_alone_is_raced_by_the_spread_against_the_second() -> None:
    """k = 1 needs two known for a spread; behind by less than it is not dropped."""
    known = [[1.0, 2.0, 3.0], [1.5, 2.0, 3.1]]
    _, asked = raced([*known, [1.2, 1.9, 2.9], [3.0, 4.0, 5.0]], 2, 2, keep=1)
    assert asked[2:] == [[0, 1, 2], [0]]
    _, asked = raced([[1.0, 2.0], [9.0, 9.0], [9.0, 9.0]], 1, 1, 1, keep=1)
    assert asked == [[0, 1], [0, 1], [0]]


def test_one_sample_drops_nobody() -> None:
    scored, asked = raced([[1.0], [2.0], [9.0]], 2, 1, keep=1)
    assert asked == [[0]] * 3
    assert scored == [[1.0, 2.0], [9.0]]


# --- weights


@pytest.mark.parametrize("tokens", [(1, 1, 1, 1), (7, 7, 8, 6), (100, 1, 1, 1), (1, 5, 300, 2)])
def test_samples_weigh_by_their_tokens(tokens: tuple[int, ...]) -> None:
    """Σ NLL / Σ tokens, never a mean of means."""
    scored, _ = raced(ELITE, 4, keep=4, tokens=tokens)
    expected = [sum(t * loss for t, loss in zip(tokens, row, strict=True)) / sum(tokens) for row in ELITE]
    np.testing.assert_allclose(scored[0], expected, rtol=1e-14)


def test_the_mean_so_far_weighs_by_tokens_too() -> None:
    """1 behind on a short sample and hardly on a long one: in tokens that is less than the limit, in samples more."""
    shape = np.array([0.0, 0.625, -0.625])  # its spread is 0.625: limits of 1.02 and 0.51 after one sample and two
    last = np.array([2.0, 2.0, 2.0])
    elite = [(last - 1.0 + shape).tolist(), (last - 1.0 - shape).tolist(), last.tolist()]
    candidate = [3.0, 2.06, 1.0]
    for tokens, expected in (((1, 10, 1), [0, 1, 2]), ((1, 1, 1), [0, 1])):
        _, asked = raced([*elite, candidate], 3, 1, keep=3, tokens=tokens)
        assert asked[3] == expected


# --- no numbers


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_dropped_at_once_and_never_known(bad: float) -> None:
    scored, asked = raced(
        [[bad, 1.0, 1.0], *ELITE_OF_3, [bad, 0.0, 0.0], [1.0, bad, 0.0], [1.0, 1.0, bad]], 4, 3, keep=3
    )
    assert asked == [[0, 1, 2]] * 4 + [[0], [0, 1], [0, 1, 2]]
    assert not math.isfinite(scored[0][0])
    assert scored[1][:2] == [math.inf, math.inf]
    assert not math.isfinite(scored[1][2])  # its last sample: what the optimiser makes of it is its own


ELITE_OF_3 = [[1.0, 1.0, 1.1], [1.0, 1.2, 1.0], [1.2, 1.0, 1.0]]


def test_nothing_finite_drops_nobody_and_ends() -> None:
    scored, asked = raced([[math.nan] * 2] * 6, 3, 3, keep=2)
    assert asked == [[0, 1]] * 6
    assert all(math.isnan(loss) for generation in scored for loss in generation)


def test_a_generation_that_is_dropped_wholly_goes_on_with_the_next() -> None:
    scored, asked = raced([*ELITE, [9.0] * 4, [8.0] * 4, [1.0, 2.0, 2.0, 2.0]], 4, 2, 1, keep=4)
    assert scored[1] == [math.inf, math.inf]
    assert asked[4:] == [[0], [0], [0, 1, 2, 3]]
    assert scored[2] == [1.75]


MATRICES = st.integers(1, 5).flatmap(
    lambda samples: st.lists(
        st.lists(st.one_of(st.floats(0.0, 10.0), st.sampled_from([math.nan, math.inf])), min_size=samples,
                 max_size=samples),
        min_size=4, max_size=20,
    )
)  # fmt: skip


@given(losses=MATRICES, data=st.data(), keep=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_whatever_the_losses_are(losses: list[list[float]], data: st.DataObject, keep: int) -> None:
    """Samples in order, each once; the loss is the exact mean or infinity; a candidate in the top k so far stays."""
    samples = len(losses[0])
    tokens = data.draw(st.lists(st.integers(1, 500), min_size=samples, max_size=samples))
    first = data.draw(st.integers(1, len(losses) - 1))
    scored, asked = raced(losses, first, len(losses) - first, keep=keep, tokens=tokens)
    weights = np.array(tokens) / sum(tokens)
    for row, places, loss in zip(losses, asked, scored[0] + scored[1], strict=True):
        assert places == list(range(len(places)))
        assert len(places) >= 1
        if len(places) == samples and loss != math.inf:
            np.testing.assert_allclose(loss, np.array(row) @ weights, rtol=1e-12)
        else:
            assert loss == math.inf
    assert asked[:first] == [list(range(samples))] * first
    known = sorted(loss for loss in scored[0] if math.isfinite(loss))
    for row, places in zip(losses[first:], asked[first:], strict=True):
        if len(known) < max(2, keep):
            assert len(places) == samples
        elif np.isfinite(row).all() and all(
            row[sample] <= min(other[sample] for other in losses[:first] if np.isfinite(other).all())
            for sample in range(samples)
        ):
            assert len(places) == samples  # nobody was better on any sample


def test_a_generation_of_nobody_is_one_batch() -> None:
    """An evolution whose space is exhausted ends with one: the log counts its batches."""
    batches = []
    assert Racing((1, 1, 1), 2).losses(lambda requests: batches.append(list(requests)) or [], []) == []
    assert batches == [[]]
