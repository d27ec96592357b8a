"""The perplexity objective against plain transformers forwards with the same factors."""

from __future__ import annotations

import math

import pytest
import torch

from longrope.rope.scaling import Window
from longrope.search.evaluator import EvalRequest, EvalResult, SerialEvaluator
from longrope.search.objective import PerplexityObjective
from tests.evaluation.tiny import GEOMETRY, nll_by_hand, plain, ramp, random_samples, scaled_by_hand, tiny_scaled


def sums_of(objective: PerplexityObjective, window: Window) -> list[float]:
    return [float(nll.sum(dtype=torch.float64)) for nll in objective.nlls(window)]


SAMPLES = random_samples(3, 64)
IDENTITY = Window(64, (1.0,) * GEOMETRY.pairs)
OBJECTIVE = PerplexityObjective(tiny_scaled(), SAMPLES)


@pytest.mark.parametrize("window", [IDENTITY, ramp(64), ramp(64, 8.0, 1.0)])
def test_loss_is_the_sum_over_tokens_of_plain_forwards(window: Window) -> None:
    model = scaled_by_hand(window)
    sums = [sum(nll_by_hand(model, row)) for row in SAMPLES.ids.tolist()]
    assert sums_of(OBJECTIVE, window) == pytest.approx(sums, rel=1e-5)
    assert OBJECTIVE.loss(window) == pytest.approx(sum(sums) / (3 * 63), rel=1e-5)


def test_sums_are_in_the_order_of_the_samples() -> None:
    sums = sums_of(OBJECTIVE, ramp(64))
    assert len({round(value, 3) for value in sums}) == 3
    flipped = PerplexityObjective(tiny_scaled(), type(SAMPLES)(SAMPLES.ids.flip(0), SAMPLES.origins[::-1], True))
    assert sums_of(flipped, ramp(64)) == sums[::-1]


def test_window_is_applied_and_taken_out_again() -> None:
    before = OBJECTIVE.loss(IDENTITY)
    losses = {OBJECTIVE.loss(ramp(64, ratio)) for ratio in (1.5, 2.0, 4.0, 8.0)}
    assert len(losses | {before}) == 5
    assert min(abs(loss - before) for loss in losses) > 1e-4
    assert OBJECTIVE.loss(IDENTITY) == before
    assert tiny_scaled().rotaries[0].pinned is None


def test_start_tokens_and_attention_factor_are_applied() -> None:
    factors = ramp(64).factors
    losses = [
        OBJECTIVE.loss(Window(64, factors, start_tokens, attention_factor))
        for start_tokens, attention_factor in ((0, 1.0), (8, 1.0), (0, 1.2), (64, 1.0))
    ]
    assert len(set(losses)) == 4
    # Every position is a start token: the original model.
    assert losses[3] == pytest.approx(
        sum(sum(nll_by_hand(plain(), row)) for row in SAMPLES.ids.tolist()) / (3 * 63), rel=1e-5
    )


def test_same_window_same_bits() -> None:
    assert OBJECTIVE.loss(ramp(64)) == OBJECTIVE.loss(ramp(64))


def test_model_in_training_mode_is_scored_in_eval_mode() -> None:
    expected = OBJECTIVE.loss(ramp(64))
    model = tiny_scaled().model
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    try:
        assert OBJECTIVE.loss(ramp(64)) == expected
    finally:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0


def test_numbers_that_break_the_model_give_nan() -> None:
    broken = Window(64, IDENTITY.factors, attention_factor=1e300)
    assert math.isnan(OBJECTIVE.loss(broken))
    assert all(math.isnan(value) for value in sums_of(OBJECTIVE, broken))
    assert math.isfinite(OBJECTIVE.loss(IDENTITY))


def test_serial_evaluator_answers_in_order_as_soon_as_it_knows() -> None:
    windows = [IDENTITY, ramp(64), ramp(64, 2.0)]
    evaluator = SerialEvaluator({("search", 64): OBJECTIVE})
    requests = [EvalRequest(window, {}) for window in windows]
    results = evaluator(requests)
    assert next(results) == EvalResult(OBJECTIVE.loss(IDENTITY))
    assert [evaluator.token_passes(request) for request in requests] == [3 * 64] * 3
    assert [result.loss for result in results] == [OBJECTIVE.loss(window) for window in windows[1:]]


def test_serial_evaluator_chooses_samples_and_gradients() -> None:
    evaluator = SerialEvaluator({("search", 64): OBJECTIVE})
    request = EvalRequest(ramp(64), {}, samples=(2,), gradient=True)
    (result,) = evaluator([request])
    assert result.loss == pytest.approx(OBJECTIVE.loss(ramp(64), [2]), rel=1e-6)
    assert result.gradient is not None
    assert len(result.gradient) == GEOMETRY.pairs + 1
    assert evaluator.token_passes(request) == 3 * 64  # one sample: a forward and a backward that counts 2
