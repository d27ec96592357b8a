"""Retention: perplexity of the original window's texts, and the share of positions with the same most likely token."""

from __future__ import annotations

import pytest
import torch

from longrope.evaluation.retention import measure_retention, most_likely_tokens
from longrope.models.scoring import top_tokens
from longrope.rope.baselines import Method
from tests.evaluation.tiny import GEOMETRY, Steps, plain, ramp, random_samples, scaled_by_hand, tiny_scaled

SAMPLES = random_samples(3, GEOMETRY.original_length)
RAMP = Method("ramp", ramp)


def by_hand(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=SAMPLES.ids).logits.argmax(-1)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 32])
def test_most_likely_tokens_are_those_of_plain_transformers(chunk_size: int | None) -> None:
    with torch.no_grad():
        assert torch.equal(top_tokens(plain(), SAMPLES.ids, chunk_size=chunk_size), by_hand(plain()))
    assert torch.equal(torch.stack(most_likely_tokens(tiny_scaled(), SAMPLES, RAMP)), by_hand(scaled_by_hand(ramp(32))))


def test_agreement_is_the_share_of_equal_positions() -> None:
    steps = Steps()
    original = list(by_hand(plain()))
    perplexity, agreement = measure_retention(tiny_scaled(), SAMPLES, RAMP, original, callbacks=steps)
    shares = (by_hand(scaled_by_hand(ramp(32))) == by_hand(plain())).double().mean(1)
    assert agreement.value == pytest.approx(float(shares.mean()))
    assert agreement.stderr == pytest.approx(float(shares.std() / 3**0.5))
    assert 0 < agreement.value < 1
    assert (perplexity.suite, perplexity.metric, perplexity.length) == ("retention", "perplexity", 32)
    assert (agreement.metric, agreement.trials, agreement.scaling) == ("top1_agreement", 3, "ramp")
    assert steps.taken == 2 * 3


def test_a_model_agrees_with_itself() -> None:
    own = most_likely_tokens(tiny_scaled(), SAMPLES, RAMP)
    assert measure_retention(tiny_scaled(), SAMPLES, RAMP, own)[1].value == 1.0
