"""Loss by position: every scored token in exactly one bucket, buckets that double, standard errors over samples."""

from __future__ import annotations

import math

import pytest
import torch

from longrope.evaluation.perplexity import loss_by_position, perplexity
from longrope.rope.baselines import Method
from tests.evaluation.tiny import nll_by_hand, ramp, random_samples, scaled_by_hand, tiny_scaled


def buckets(length: int) -> list[tuple[int, int]]:
    rows = loss_by_position("a", [torch.zeros(length - 1)])
    return [(row.detail["from"], row.detail["to"]) for row in rows]


def test_buckets_double() -> None:
    assert buckets(256) == [(1, 32), (32, 64), (64, 128), (128, 256)]
    assert buckets(300)[-1] == (256, 300)
    assert buckets(32) == [(1, 32)]
    assert buckets(2) == [(1, 2)]
    assert buckets(33) == [(1, 32), (32, 33)]


def test_every_token_is_in_the_bucket_of_its_position() -> None:
    # The token at position p (entry p − 1) costs p nats: a bucket [a, b) has the mean (a + b − 1) / 2.
    losses = torch.arange(1, 300, dtype=torch.float32)
    for row in loss_by_position("a", [losses, losses + 2]):
        begin, end = row.detail["from"], row.detail["to"]
        assert row.value == pytest.approx((begin + end - 1) / 2 + 1)
        assert row.stderr == pytest.approx(math.sqrt(2) / math.sqrt(2))
        assert (row.metric, row.length, row.trials, row.suite) == ("nll", 300, 2, "perplexity")


def test_against_plain_transformers_and_the_perplexity() -> None:
    samples = random_samples(2, 48)
    method = Method("ramp", ramp)
    whole, *rows = perplexity(tiny_scaled(), samples, [48], method, positions=True)
    losses = [nll_by_hand(scaled_by_hand(ramp(48)), ids) for ids in samples.ids.tolist()]
    assert [row.value for row in rows] == pytest.approx(
        [sum(sum(own[:31]) / 31 for own in losses) / 2, sum(sum(own[31:]) / 16 for own in losses) / 2], abs=2e-4
    )
    tokens = [row.detail["to"] - row.detail["from"] for row in rows]
    mean = sum(row.value * count for row, count in zip(rows, tokens, strict=True)) / sum(tokens)
    assert math.exp(mean) == pytest.approx(whole.value)


def test_the_sliding_form_has_no_positions() -> None:
    rows = perplexity(tiny_scaled(), random_samples(1, 48), [16], Method("ramp", ramp), stride=4, positions=True)
    assert [row.metric for row in rows] == ["perplexity"]
