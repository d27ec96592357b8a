"""The verdict of a search against its best baseline."""

from __future__ import annotations

import math

import pytest

from longrope.search.verdict import search_verdict

BASELINES = {"none": 5.4, "yarn": 4.19, "pi": 4.8, "broken": math.nan}


@pytest.mark.parametrize(
    ("loss", "says", "winner"),
    [
        (4.178, "0.012 nats per token better than YaRN, which is the best baseline", None),
        (4.1857, "0.0043 nats per token better than YaRN, which is the best baseline", None),
        (4.1902, "nothing gained: YaRN is as good within 0.0005 nats per token", None),
        (4.61, "0.420 nats per token worse than YaRN: take YaRN, or search with wider settings", "yarn"),
        (math.inf, "the search found no finite loss: YaRN is better", "yarn"),
    ],
)
def test_verdict(loss: float, says: str, winner: str | None) -> None:
    verdict = search_verdict(loss, BASELINES)
    assert str(verdict) == says
    assert verdict.winner == winner
    assert verdict.worse is (winner is not None)


def test_the_model_without_scaling_is_named_as_one() -> None:
    """ "No scaling is as good" would say the opposite."""
    says = str(search_verdict(5.4, {"none": 5.4, "pi": 6.0}))
    assert says == "nothing gained: the model without scaling is as good within 0.0005 nats per token"
    assert "take the model without scaling" in str(search_verdict(5.5, {"none": 5.4}))


def test_without_a_finite_baseline() -> None:
    verdict = search_verdict(4.0, {"none": math.inf})
    assert str(verdict) == "no baseline has a finite loss to compare with"
    assert not verdict.worse
