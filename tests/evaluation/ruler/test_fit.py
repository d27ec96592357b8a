"""The largest haystack that fits, found in few steps, whatever the units weigh."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longrope.evaluation.ruler.generators import Sample
from longrope.evaluation.ruler.tasks import fit
from tests.evaluation.tiny import refused


def sized(size: int) -> Sample:
    return Sample("x" * size, ())


@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 200), st.integers(0, 5000))
def test_the_largest_that_fits(smallest: int, weight: int, frame: int, spare: int) -> None:
    length = frame + weight * smallest + spare
    calls: list[int] = []

    def tokens(sample: Sample) -> int:
        calls.append(len(sample.prompt))
        return frame + weight * len(sample.prompt)

    size = len(fit(sized, tokens, length, smallest).prompt)
    assert frame + weight * size <= length < frame + weight * (size + 1)
    assert len(calls) <= 30


@given(st.lists(st.integers(1, 12), min_size=30, max_size=200), st.integers(0, 1000))
def test_uneven_units_never_go_beyond(weights: list[int], spare: int) -> None:
    def tokens(sample: Sample) -> int:
        return sum(weights[: len(sample.prompt)])

    length = sum(weights[:3]) + spare
    size = len(fit(sized, tokens, length, 3, len(weights)).prompt)
    assert sum(weights[:size]) <= length
    assert size == len(weights) or sum(weights[: size + 1]) > length


def test_too_small() -> None:
    with refused("too-short-length", "needs at least 40 tokens", "found a length of 39"):
        fit(sized, lambda sample: 10 * len(sample.prompt), 39, 4)
