"""The verdict of a search against its best baseline."""

from __future__ import annotations

import math

import pytest

from longrope.search.verdict import search_verdict

BASELINES = {"none": 5.4, "yarn": 4.19, "pi": 4.8, "broken": math.nan}


@pytest.mark.parametrize(
    ("loss", "says", "worse"),
    [
        (4.178, "0.012 nats per token better than YaRN, which is the best baseline", False),
        (4.1857, "0.0043 nats per token better than YaRN, which is the best baseline", False),
        (4.1902, "nothing gained: YaRN is as good within 0.0005 nats per token", False),
        (4.61, "0.420 nats per token worse than YaRN: take YaRN, or search with wider settings", True),
        (math.inf, "the search found no finite loss: YaRN is better", True),
    ],
)
def test_verdict(loss: float, says: str, worse: bool) -> None:
    verdict = search_verdict(loss, BASELINES)
    assert str(verdict) == says
    assert verdict.baseline == "yarn"
    assert verdict.worse is worse


def test_the_model_without_scaling_is_named_as_one() -> None:
    """ "No scaling is as good" would say the opposite."""
    says = str(search_verdict(5.4, {"none": 5.4, "pi": 6.0}))
    assert says == "nothing gained: the model without scaling is as good within 0.0005 nats per token"
    assert "take the model without scaling" in str(search_verdict(5.5, {"none": 5.4}))


def test_without_a_finite_baseline() -> None:
    verdict = search_verdict(4.0, {"none": math.inf})
    assert str(verdict) == "no baseline has a finite loss to compare with"
    assert not verdict.worse
