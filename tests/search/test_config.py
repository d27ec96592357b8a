"""What a search can be told: what is refused, and what named values mean."""

from __future__ import annotations

import math
from typing import Any

import pytest

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry
from longrope.search.config import SearchConfig, attention_factor_of, start_tokens_of


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"method": "annealing"}, "method of longrope, longrope2, gradient, hybrid, cma; found 'annealing'"),
        ({"objective": "accuracy"}, "objective of perplexity, needle; found 'accuracy'"),
        (
            {"method": "longrope2", "start_tokens": "search"},
            "start tokens is an option of the methods longrope, gradient, hybrid, cma; found search with 'longrope2'",
        ),
        ({"method": "gradient", "start_tokens": "four"}, "'search' or a number of tokens, found 'four'"),
        (
            {"method": "hybrid", "racing": True},
            "racing is an option of .*; found True with 'hybrid'",
        ),
        ({"method": "gradient", "population": 4}, "population is an option of .*; found 4 with 'gradient'"),
        ({"method": "cma", "iterations": 3}, "found 3 with 'cma'"),
        ({"method": "longrope2", "max_factor": 4.0}, "max factor is an option of"),
        ({"knots": 5}, "knots is an option of"),
        ({"steps": 5}, "steps is an option of"),
        ({"method": "cma", "learning_rate": 1.0}, "learning rate is an option of"),
        ({"method": "cma", "continuation": False}, "continuation is an option of"),
        ({"learn_attention_factor": True}, "learn attention factor is an option of"),
        ({"method": "gradient", "evaluations": 5}, "evaluations is an option of"),
        ({"needle_depth": "start"}, "a needle depth is for the objective needle; found 'perplexity'"),
        ({"samples": 0}, "samples of at least 1, found 0"),
        ({"seed": -1}, "seed of at least 0, found -1"),
        ({"max_factor": 0.5}, r"a largest λ from 1 to 1e\+09, found 0.5"),
        ({"method": "gradient", "max_factor": 1e10}, r"from 1 to 1e\+09, found 10000000000.0"),
        ({"max_factor": math.nan}, "found nan"),
        ({"critical_dim": 0}, "a critical dimension of at least 1, found 0"),
        ({"critical_dim": -3}, "found -3"),
    ],
)
def test_options_that_make_no_search_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(LongRopeError, match=says) as error:
        SearchConfig(**wrong)
    assert "\n" not in str(error.value)


def test_named_values() -> None:
    geometry = RopeGeometry(rotary_dim=64, base=10_000.0, original_length=4096)
    assert attention_factor_of("su", geometry, 131_072) == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert attention_factor_of("yarn", geometry, 131_072) == pytest.approx(1 + 0.1 * math.log(32))
    assert attention_factor_of("1.19", geometry, 131_072) == 1.19
    for wrong in ("0", "-1", "nan", "inf", "SU", "", "1,2"):
        with pytest.raises(LongRopeError, match="su, yarn or a positive number"):
            attention_factor_of(wrong, geometry, 131_072)
    assert start_tokens_of("0") == (0,)
    assert start_tokens_of("256") == (256,)
    assert start_tokens_of("search")[:3] == (0, 1, 2)
    for wrong in ("-1", "1.5", "", "all", "9999999999"):
        with pytest.raises(LongRopeError, match="'search' or a number"):
            start_tokens_of(wrong)
