"""The settings of a search: which are refused, and the numbers that named values stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from longrope.errors import LongRopeError
from longrope.rope.geometry import RopeGeometry
from longrope.search.config import SearchConfig, attention_factor_of, start_tokens_of

OTHER_METHOD = "setting-of-another-method"


@pytest.mark.parametrize(
    ("wrong", "code", "says"),
    [
        ({"method": "annealing"}, "invalid-setting", "`method` to be 'longrope', .* or 'cma'; found 'annealing'"),
        ({"objective": "accuracy"}, "invalid-setting", "`objective` to be 'perplexity' or 'needle'; found 'accuracy'"),
        ({"method": "longrope2", "start_tokens": "search"}, OTHER_METHOD, "gradient, hybrid, cma; found search"),
        ({"method": "gradient", "start_tokens": "four"}, "invalid-setting", "'search' or a number of tokens"),
        ({"method": "hybrid", "racing": True}, OTHER_METHOD, "`racing` .*; found True with 'hybrid'"),
        ({"method": "gradient", "population": 4}, OTHER_METHOD, "`population` .*; found 4 with 'gradient'"),
        ({"method": "cma", "iterations": 3}, OTHER_METHOD, "found 3 with 'cma'"),
        ({"method": "longrope2", "max_factor": 4.0}, OTHER_METHOD, "`max_factor`"),
        ({"method": "longrope", "knots": 5}, OTHER_METHOD, "`knots`"),
        ({"method": "longrope", "steps": 5}, OTHER_METHOD, "`steps`"),
        ({"method": "cma", "learning_rate": 1.0}, OTHER_METHOD, "`learning_rate`"),
        ({"method": "cma", "continuation": False}, OTHER_METHOD, "`continuation`"),
        ({"method": "longrope", "learn_attention_factor": True}, OTHER_METHOD, "`learn_attention_factor`"),
        ({"method": "gradient", "evaluations": 5}, OTHER_METHOD, "`evaluations`"),
        ({"needle_depth": "start"}, OTHER_METHOD, "`needle_depth` is for the objective needle; found 'perplexity'"),
        ({"samples": 0}, "invalid-setting", "`samples` of at least 1, found 0"),
        ({"seed": -1}, "invalid-setting", "`seed` of at least 0, found -1"),
        ({"max_factor": 0.5}, "invalid-setting", "`max_factor` of at least 1, found 0.5"),
        ({"method": "gradient", "max_factor": 1e10}, "invalid-setting", r"`max_factor` of at most 1000000000"),
        ({"max_factor": math.nan}, "invalid-setting", "found nan"),
        ({"critical_dim": 0}, "invalid-setting", "`critical_dim` of at least 1, found 0"),
        ({"method": "hybrid", "evaluations": 0}, "invalid-setting", "`evaluations` of at least 1, found 0"),
        ({"method": "gradient", "beta_fast": 128}, OTHER_METHOD, "`beta_fast` is a setting of the methods longrope"),
        ({"method": "longrope2", "yarn_ramp": "authors"}, OTHER_METHOD, "`yarn_ramp`"),
        ({"method": "longrope", "beta_fast": 1, "beta_slow": 2}, "invalid-setting", "at least `beta_slow`"),
        ({"critical_dim": 5, "baselines": False}, "invalid-setting", "expected `baselines` with a `critical_dim`"),
        ({"tempo": 1}, "invalid-setting", "`tempo`"),
    ],
)
def test_settings_that_make_no_search_are_refused(wrong: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(LongRopeError, match=says) as error:
        SearchConfig(**wrong)
    assert error.value.code == code
    assert "\n" not in str(error.value)


def test_the_default_is_the_gradient_search() -> None:
    assert SearchConfig().method == "gradient"
    assert SearchConfig(method="longrope2").below == "ntk"  # the paper's


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
