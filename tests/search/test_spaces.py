"""The search space: every operator stays inside it, and reaches what it says it reaches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.rope.presets import preset, preset_table
from longrope.search.config import START_TOKENS
from longrope.search.spaces import STEPS, Candidate, SearchSpace

PAPER_SPACE = SearchSpace.for_ratio(64, 32.0, START_TOKENS)


def inside(space: SearchSpace, candidate: Candidate) -> bool:
    """True if a candidate is a point of the space: length, bounds, order, n̂, and plain integers for JSON."""
    steps = candidate.steps
    return (
        len(steps) == space.pairs
        and all(type(step) is int for step in (*steps, candidate.start_tokens))
        and steps[0] >= STEPS
        and steps[-1] <= space.upper * STEPS + 1e-6
        and all(left <= right for left, right in pairwise(steps))
        and candidate.start_tokens in space.start_tokens
    )


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    return SearchSpace.for_ratio(
        draw(st.sampled_from([1, 2, 3, 16, 48, 64])),
        draw(st.one_of(st.sampled_from([1.0, 2.0, 8.0, 32.0, 512.0]), st.floats(0.8, 600.0))),
        draw(st.sampled_from([(0,), (4,), START_TOKENS])),
    )


def any_candidate(space: SearchSpace, rng: np.random.Generator) -> Candidate:
    """A point anywhere in the space, with plateaus and bounds likelier than chance."""
    kind = rng.integers(4)
    if kind == 0:
        steps = np.full(space.pairs, rng.integers(STEPS, space.upper_steps + 1))
    elif kind == 1:
        steps = np.where(np.arange(space.pairs) < rng.integers(space.pairs + 1), STEPS, space.upper_steps)
    else:
        steps = np.sort(rng.integers(STEPS, space.upper_steps + 1, space.pairs))
    return Candidate(tuple(steps.tolist()), int(rng.choice(space.start_tokens)))


@given(space=spaces(), seed=st.integers(0, 2**32 - 1), probability=st.floats(0.01, 1.0))
@settings(max_examples=300, deadline=None)
def test_operators_stay_inside(space: SearchSpace, seed: int, probability: float) -> None:
    rng = np.random.default_rng(seed)
    first, second = any_candidate(space, rng), any_candidate(space, rng)
    assert inside(space, first)
    mutant, child = space.mutate(first, probability, rng), space.cross(first, second, rng)
    assert inside(space, mutant)
    assert inside(space, child)
    # A child lies between its parents in every gene, and its values are theirs.
    assert set(child.steps) <= {*first.steps, *second.steps}
    assert all(min(a, b) <= c <= max(a, b) for a, b, c in zip(first.steps, second.steps, child.steps, strict=True))
    assert child.start_tokens in (first.start_tokens, second.start_tokens)
    assert space.cross(first, first, rng).steps == first.steps


@given(space=spaces(), seed=st.integers(0, 2**32 - 1), wild=st.booleans())
@settings(max_examples=200, deadline=None)
def test_snap_is_inside_and_idempotent(space: SearchSpace, seed: int, wild: bool) -> None:
    rng = np.random.default_rng(seed)
    factors = np.exp(rng.normal(1.0, 3.0, space.pairs))
    if not wild:
        factors = np.sort(factors).clip(1.0, space.upper)
    snapped = space.snap(factors)
    assert inside(space, snapped)
    assert space.snap(snapped.factors) == snapped
    if not wild:  # nothing in the space is nearer; the grid may end below the bound
        assert np.abs(np.array(snapped.factors) - factors).max() <= (0.5 if factors.max() < space.upper else 1) / STEPS


def test_snap_takes_the_start_tokens_given_or_the_first() -> None:
    assert PAPER_SPACE.snap([1.0] * 64).start_tokens == 0
    assert PAPER_SPACE.snap([1.0] * 64, 28).start_tokens == 28
    assert SearchSpace(pairs=2, upper=4.0, start_tokens=(4,)).snap([1.0, 2.0]) == Candidate((100, 200), 4)


def test_snap_repairs_what_is_out_of_order_or_bounds() -> None:
    space = SearchSpace(pairs=5, upper=2.5)
    assert space.snap([0.3, 1.004, 1.6, 1.2, 9.0]).steps == (100, 100, 160, 160, 250)


def test_snap_reproduces_published_factors() -> None:
    """The authors' monotone tables that lie on the grid of 0.01 come back as they are (some were kept as float32)."""
    reproduced = []
    for row in preset_table():
        factors = np.array(preset(row.name).windows[-1].factors)
        off_grid = np.abs(factors * STEPS - np.rint(factors * STEPS)).max()
        if row.monotone and off_grid < 1e-3:
            # A few go beyond 1.25·s: they are relative to a model already extended.
            space = SearchSpace(pairs=len(factors), upper=float(factors[-1]) + 0.01)
            assert space.snap(factors).factors == pytest.approx(factors, abs=1e-5)
            reproduced.append(row.name)
    assert len(reproduced) >= 10
    assert {"ft_la2_128k", "ft_la2_256k", "8k_la2_128k"} <= set(reproduced)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 8.0, 16.0, 32.0, 64.0, 512.0])
def test_upper_bound_is_on_the_grid(ratio: float) -> None:
    assert SearchSpace.for_ratio(4, ratio).upper_steps == round(125 * ratio)


def test_mutation_of_every_gene_reaches_the_whole_range() -> None:
    space = SearchSpace.for_ratio(3, 1.2, START_TOKENS)  # λ from 1 to 1.5: 51 values
    rng = np.random.default_rng(0)
    parent = space.snap([1.2, 1.2, 1.2])
    drawn = [space.mutate(parent, 1.0, rng) for _ in range(8000)]
    for gene in range(3):
        assert {candidate.steps[gene] for candidate in drawn} >= set(range(105, 146))
    assert {candidate.steps[0] for candidate in drawn} >= set(range(100, 140))
    assert {candidate.steps[2] for candidate in drawn} >= set(range(111, 151))
    assert {candidate.start_tokens for candidate in drawn} == set(START_TOKENS)


def test_redrawn_run_is_uniform_between_its_anchors() -> None:
    """Genes 1 to 3 of 5 redrawn: order statistics of three uniform draws on [anchor, anchor]."""
    space = SearchSpace.for_ratio(5, 8.0)
    parent = Candidate((150, 300, 310, 320, 750))

    class Chosen:
        """A generator whose `random` redraws genes 1 to 3."""

        def __init__(self) -> None:
            self.integers = np.random.default_rng(1).integers

        def random(self, count: int) -> np.ndarray:
            return np.array([1.0, 0.0, 0.0, 0.0, 1.0])[:count]

    rng = Chosen()
    drawn = np.array([space.mutate(parent, 0.5, rng).steps for _ in range(4000)])  # type: ignore[arg-type]
    assert (drawn[:, 0] == 150).all()
    assert (drawn[:, 4] == 750).all()
    inner = drawn[:, 1:4]
    assert inner.min() == 150  # both anchors can be reached
    assert inner.max() == 750
    # Means of the order statistics: 150 + 600·k/4. Their standard errors over 4,000 draws are below 2.5.
    assert inner.mean(axis=0) == pytest.approx([300, 450, 600], abs=10)
    # All three pooled are uniform: every tenth of the range holds a tenth of them.
    tenths = np.histogram(inner, bins=10, range=(150, 750))[0] / inner.size
    assert tenths == pytest.approx([0.1] * 10, abs=0.012)


def test_mutation_probability_is_per_gene() -> None:
    """With λ spread wide, the genes that differ from the parent are a share p of all, n̂'s among them."""
    rng = np.random.default_rng(2)
    space = SearchSpace.for_ratio(64, 512.0, START_TOKENS)
    parent = space.snap(np.linspace(1, 640, 64), 8)
    mutants = [space.mutate(parent, 0.3, rng) for _ in range(400)]
    changed = np.mean([np.not_equal(mutant.steps, parent.steps).mean() for mutant in mutants])
    assert changed == pytest.approx(0.3, abs=0.02)
    # A redrawn n̂ is its old value once in 14 times.
    moved = np.mean([mutant.start_tokens != 8 for mutant in mutants])
    assert moved == pytest.approx(0.3 * 13 / 14, abs=0.07)


def test_start_tokens_stay_where_there_is_no_choice() -> None:
    rng = np.random.default_rng(0)
    space = SearchSpace.for_ratio(4, 8.0, (4,))
    parent = space.snap([1, 2, 3, 4])
    assert {space.mutate(parent, 1.0, rng).start_tokens for _ in range(50)} == {4}


def test_crossover_changes_about_half_of_the_differing_genes() -> None:
    """The released code's crossover changes a median of one gene; uniform crossover takes half of them over."""
    rng = np.random.default_rng(3)
    levels = np.linspace(100, 3000, 64).astype(int)
    # Parents whose genes differ by less than the steps between neighbours: no order to repair, so counts are exact.
    first = Candidate(tuple(levels.tolist()))
    second = Candidate(tuple((levels + 10).tolist()))
    taken = [
        sum(a != c for a, c in zip(first.steps, PAPER_SPACE.cross(first, second, rng).steps, strict=True))
        for _ in range(400)
    ]
    assert np.mean(taken) == pytest.approx(32, abs=1)
    assert 14 < min(taken) < 28 < 36 < max(taken) < 50  # binomial of 64 genes: σ = 4
    # Parents that cross everywhere: children are still unlike both.
    low, high = PAPER_SPACE.snap(np.linspace(1, 40, 64)), PAPER_SPACE.snap(np.linspace(1, 40, 64)[::-1])
    child = PAPER_SPACE.cross(low, high, rng)
    assert sum(a != c for a, c in zip(low.steps, child.steps, strict=True)) > 16
    assert sum(a != c for a, c in zip(high.steps, child.steps, strict=True)) > 16


def test_crossover_takes_start_tokens_from_either_parent() -> None:
    rng = np.random.default_rng(4)
    first, second = PAPER_SPACE.snap([1.0] * 64, 4), PAPER_SPACE.snap([2.0] * 64, 256)
    taken = [PAPER_SPACE.cross(first, second, rng).start_tokens for _ in range(400)]
    assert set(taken) == {4, 256}
    assert 150 < taken.count(4) < 250


def test_candidate_is_its_window() -> None:
    window = Candidate((100, 107, 250), 16).window(2048, 1.1)
    assert (window.max_length, window.factors, window.start_tokens) == (2048, (1.0, 1.07, 2.5), 16)
    assert window.attention_factor == 1.1
    assert Candidate((100, 107, 250), 16) == Candidate((100, 107, 250), 16)
    assert len({Candidate((100,), 0), Candidate((100,), 0), Candidate((100,), 1)}) == 2


@pytest.mark.parametrize(
    "wrong", [{"pairs": 0}, {"upper": 0.99}, {"upper": float("nan")}, {"upper": float("inf")}, {"start_tokens": ()}]
)
def test_empty_spaces_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(LongRopeError, match="at least one pair"):
        SearchSpace(**{"pairs": 4, "upper": 2.0, "start_tokens": (0,)} | wrong)  # type: ignore[arg-type]
