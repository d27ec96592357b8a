"""Numbers as text: rounding to the error, intervals of shares, and what marks few trials."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.report.numbers import MARK, amount, fixed, listed, per_cent, share, wilson, with_error


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (343.34, 44.71, "343 ± 45"),
        (59.4977, 2.7915, "59.5 ± 2.8"),
        (0.94217, 0.0123, "0.942 ± 0.012"),
        (12345.6, 1234.0, "12,300 ± 1,200"),
        (-1.2345, 0.05, "−1.234 ± 0.050"),
        (4.131330933, None, "4.131"),
        (59.5, 0.0, "59.50"),
        (0.0, None, "0"),
        (0.0, 0.0, "0"),
        (math.nan, 1.0, "not finite"),
        (math.inf, None, "not finite"),
    ],
)
def test_a_value_is_rounded_to_two_digits_of_its_error(value, stderr, text):
    assert str(with_error(value, stderr)) == text


def test_few_trials_are_marked():
    assert str(with_error(59.5, 2.8, 29)) == f"59.5{MARK} ± 2.8"
    assert MARK not in str(with_error(59.5, 2.8, 30))
    assert MARK in str(share(0.5, 29))
    assert MARK not in str(share(0.5, 30))


# Wilson's score interval as Brown, Cai and DasGupta (2001) give it, computed by hand for these three.
@pytest.mark.parametrize(
    ("value", "trials", "low", "high"), [(0.0, 10, 0.0, 0.27753), (0.5, 10, 0.23659, 0.76341), (1.0, 100, 0.96301, 1.0)]
)
def test_wilsons_interval(value, trials, low, high):
    assert wilson(value, trials) == pytest.approx((low, high), abs=2e-5)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_an_interval_holds_its_value_and_narrows(trials, part):
    value = round(part * trials) / trials
    low, high = wilson(value, trials)
    assert 0.0 <= low <= value + 1e-9
    assert value - 1e-9 <= high <= 1.0
    wide = wilson(value, trials), wilson(value, 4 * trials)
    assert wide[1][1] - wide[1][0] <= wide[0][1] - wide[0][0] + 1e-12


def test_a_perfect_share_is_not_certain():
    assert str(share(1.0, 40)) == "100 % (91–100)"
    assert str(share(0.0, 10)) == f"0 %{MARK} (0–28)"


def test_words():
    assert amount(2162688) == "2.16 million"
    assert amount(188928) == "188,928"
    assert per_cent(58.1, 55.1) == "+5.4 %"
    assert per_cent(50.0, 55.0) == "−9.1 %"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert fixed(-0.00001, 2) == "0.00"
