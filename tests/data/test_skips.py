"""Positions that skip ahead: rising, inside the window, whole in pieces, drawn by the seed."""

from __future__ import annotations

import numpy as np
import pytest

from longrope.data.skips import SKIPS, TO_THE_END, skipping_positions


@pytest.mark.parametrize(("length", "skip_to"), [(2, 3), (64, 65), (256, 4096), (4096, 131_072)])
def test_positions_rise_from_0_inside_the_window(length: int, skip_to: int) -> None:
    for row in range(20):
        positions = skipping_positions(length, skip_to, [0, row])
        steps = np.diff(positions)
        assert (positions.dtype, positions.shape) == (np.int64, (length,))
        assert positions[0] == 0
        assert positions[-1] < skip_to
        assert steps.min() >= 1
        assert (steps > 1).sum() <= SKIPS


def test_most_rows_end_at_the_last_position_and_the_others_anywhere() -> None:
    ends = np.array([skipping_positions(128, 10_000, [7, row])[-1] for row in range(2000)])
    assert (ends == 9_999).mean() == pytest.approx(TO_THE_END, abs=0.04)
    others = ends[ends < 9_999]
    assert others.mean() == pytest.approx((127 + 9_999) / 2, rel=0.05)
    assert others.min() < 700


def test_skips_are_anywhere_and_of_every_size() -> None:
    """Sizes are a flat Dirichlet share: their mean is 1/16 of the whole, and so is their standard deviation, nearly."""
    rows = [skipping_positions(4096, 4096 + 160_000, [3, row]) for row in range(500)]
    whole = [np.diff(row) - 1 for row in rows if row[-1] == 4096 + 160_000 - 1]
    places = np.concatenate([np.flatnonzero(skips) for skips in whole])
    sizes = np.concatenate([skips[skips > 0] for skips in whole])
    assert places.mean() == pytest.approx(4095 / 2, rel=0.05)
    assert sizes.mean() == pytest.approx(10_000, rel=0.05)
    assert sizes.std() == pytest.approx(10_000 * np.sqrt(15 / 17), rel=0.1)


def test_the_seed_decides() -> None:
    first = skipping_positions(64, 1000, [0, 1])
    assert np.array_equal(first, skipping_positions(64, 1000, [0, 1]))
    assert not np.array_equal(first, skipping_positions(64, 1000, [0, 2]))
    assert not np.array_equal(first, skipping_positions(64, 1000, [1, 1]))
