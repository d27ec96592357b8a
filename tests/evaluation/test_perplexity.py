"""Perplexity: the sum first and one division, the window of each length, sliding windows, and loss by position."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.evaluation import perplexity as module
from longrope.evaluation.perplexity import loss_by_position, measure_perplexity, sliding_nll
from longrope.evaluation.results import EvalRow, values_by_length
from longrope.rope.baselines import Method
from longrope.rope.scaling import RopeScaling, Window
from tests.evaluation.tiny import (
    BOS,
    GEOMETRY,
    Steps,
    nll_by_hand,
    plain,
    ramp,
    random_samples,
    refused,
    scaled_by_hand,
    tiny_scaled,
)

SAMPLES = random_samples(3, 48)
RAMP = Method("ramp", ramp)


def test_rows_are_exponentials_of_sums_over_tokens() -> None:
    rows = measure_perplexity(tiny_scaled(), SAMPLES, [48, 16, 2], RAMP)
    assert [(row.suite, row.scaling, row.length, row.metric, row.trials) for row in rows] == [
        ("perplexity", "ramp", length, "perplexity", 3) for length in (48, 16, 2)
    ]
    for row in rows:
        model = scaled_by_hand(ramp(row.length))
        sums = [sum(nll_by_hand(model, ids[: row.length])) for ids in SAMPLES.ids.tolist()]
        assert row.value == pytest.approx(math.exp(sum(sums) / (3 * (row.length - 1))), rel=1e-4)


def test_window_of_each_length_is_used() -> None:
    """A scaling of two windows: the short one up to L, the long one beyond."""
    scaling = RopeScaling.extended(GEOMETRY, 48, ramp(48).factors)
    short, long = measure_perplexity(tiny_scaled(), SAMPLES, [32, 48], Method("found", scaling.window_for))
    assert short.value == pytest.approx(
        math.exp(sum(sum(nll_by_hand(plain(), ids[:32])) for ids in SAMPLES.ids.tolist()) / (3 * 31)), rel=1e-4
    )
    model = scaled_by_hand(ramp(48, attention_factor=1.0))
    assert long.value == pytest.approx(
        math.exp(sum(sum(nll_by_hand(model, ids)) for ids in SAMPLES.ids.tolist()) / (3 * 47)), rel=1e-4
    )
    assert tiny_scaled().rotaries[0].pinned is None


@pytest.fixture
def fixed_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Replaces the model: a sample whose last token is k costs `losses[k]` nats per token."""

    def use(losses: dict[int, float]) -> None:
        def token_nll(model: object, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
            return torch.full((1, ids.shape[1] - 1 - start), losses[int(ids[0, -1])])

        monkeypatch.setattr(module, "token_nll", token_nll)

    return use


def test_not_a_mean_of_means(fixed_losses: Callable[[dict[int, float]], None]) -> None:
    """Two samples of 1 and 2 nats per token: exp(1.5) = 4.48, where the mean of their perplexities is 5.05."""
    samples = random_samples(2, 9)
    samples.ids[:, -1] = torch.tensor([1, 2])
    fixed_losses({1: 1.0, 2: 2.0})
    (row,) = measure_perplexity(tiny_scaled(), samples, [9], RAMP)
    assert row.value == pytest.approx(math.exp(1.5))
    # Delta method: exp(m)·s/√n with s² the sample variance of the samples' means, here 0.5.
    assert row.stderr == pytest.approx(math.exp(1.5) * math.sqrt(0.5) / math.sqrt(2))


def test_sliding_windows_count_by_their_tokens(fixed_losses: Callable[[dict[int, float]], None]) -> None:
    """9 text tokens in windows of 6 with stride 2 score 6, 2 and 1 tokens; a mean of window means would be 2.67."""
    samples = random_samples(1, 10)
    samples.ids[0] = torch.tensor([0, 11, 12, 13, 14, 15, 16, 17, 18, 19])
    fixed_losses({16: 1.0, 18: 2.0, 19: 5.0})
    (row,) = measure_perplexity(tiny_scaled(), samples, [7], RAMP, stride=2)
    assert row.value == pytest.approx(math.exp((6 * 1.0 + 2 * 2.0 + 5.0) / 9))
    assert row.stderr is None


def test_standard_error_over_several_samples(fixed_losses: Callable[[dict[int, float]], None]) -> None:
    samples = random_samples(4, 5)
    samples.ids[:, -1] = torch.tensor([1, 2, 3, 4])
    fixed_losses({1: 2.0, 2: 2.5, 3: 3.0, 4: 4.5})
    (row,) = measure_perplexity(tiny_scaled(), samples, [5], RAMP)
    deviation = math.sqrt((1 + 0.25 + 0 + 2.25) / 3)
    assert row.value == pytest.approx(math.exp(3.0))
    assert row.stderr == pytest.approx(math.exp(3.0) * deviation / 2)


def test_one_sample_has_no_standard_error() -> None:
    (row,) = measure_perplexity(tiny_scaled(), random_samples(1, 16), [16], RAMP)
    assert row.stderr is None
    assert row.trials == 1


def test_losses_beyond_float64_and_nan_are_no_result(fixed_losses: Callable[[dict[int, float]], None]) -> None:
    samples = random_samples(1, 4)
    samples.ids[0, -1] = 1
    fixed_losses({1: 705.0})
    assert measure_perplexity(tiny_scaled(), samples, [4], RAMP)[0].value == pytest.approx(math.exp(705.0))
    for loss in (800.0, math.inf, math.nan):
        fixed_losses({1: loss})
        with pytest.raises(LongRopeError, match=r"not finite .* at 4 tokens in float\d\d; try") as caught:
            measure_perplexity(tiny_scaled(), samples, [4], RAMP)
        assert caught.value.code == "not-finite"


@pytest.mark.parametrize("stride", [None, 4])
def test_factors_that_break_the_model_are_no_result(stride: int | None) -> None:
    broken = Method("broken", lambda length: Window(length, (1.0,) * GEOMETRY.pairs, attention_factor=1e300))
    with pytest.raises(LongRopeError, match=r"the loss is not finite .* at 16 tokens in float"):
        measure_perplexity(tiny_scaled(), SAMPLES, [16], broken, stride=stride)


def test_model_in_training_mode_is_scored_in_eval_mode() -> None:
    (expected,) = measure_perplexity(tiny_scaled(), SAMPLES, [48], RAMP)
    model = tiny_scaled().model
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.train()
    try:
        assert measure_perplexity(tiny_scaled(), SAMPLES, [48], RAMP) == [expected]
    finally:
        model.eval()
        model.model.layers[0].self_attn.attention_dropout = 0.0


@pytest.mark.parametrize("stride", [None, 4])
def test_every_sample_of_every_length_is_reported(stride: int | None) -> None:
    steps = Steps()
    measure_perplexity(tiny_scaled(), SAMPLES, [16, 32], RAMP, stride=stride, callbacks=steps)
    assert steps.taken == 2 * 3


@pytest.mark.parametrize("lengths", [[], [49], [16, 64], [1], [0, 16], [-4]])
def test_lengths_the_samples_cannot_give_are_refused(lengths: list[int]) -> None:
    with refused("invalid-setting", "`lengths` from 2 to the samples' 48 tokens"):
        measure_perplexity(tiny_scaled(), SAMPLES, lengths, RAMP)


@pytest.mark.parametrize("stride", [0, -1, 16, 17])
@pytest.mark.parametrize("bos", [True, False])
def test_strides_out_of_range_are_refused_before_anything_is_scored(stride: int, bos: bool) -> None:
    steps = Steps()
    with refused("invalid-setting", f"below the shortest length 16, found {stride}"):
        measure_perplexity(
            tiny_scaled(), random_samples(1, 48, bos=bos), [32, 16], RAMP, stride=stride, callbacks=steps
        )
    assert steps.taken == 0


def test_sliding_form_equals_the_prefix_form_where_the_sample_is_one_window() -> None:
    prefix, sliding = (measure_perplexity(tiny_scaled(), SAMPLES, [48], RAMP, stride=stride) for stride in (None, 7))
    assert prefix == sliding


def test_the_loss_of_every_text_is_kept_by_the_hash_of_its_tokens() -> None:
    short, long = (row.losses or {} for row in measure_perplexity(tiny_scaled(), SAMPLES, [16, 48], RAMP))
    assert len(short) == len(long) == len(SAMPLES.ids)
    assert not short.keys() & long.keys()
    (row,) = measure_perplexity(tiny_scaled(), SAMPLES, [48], RAMP)
    assert math.log(row.value) == pytest.approx(statistics.fmean(long.values()), rel=1e-12)
    (other,) = measure_perplexity(tiny_scaled(), SAMPLES, [48], Method("flat", lambda length: ramp(length, 2.0)))
    assert (other.losses or {}).keys() == long.keys()
    assert other.losses != long


def test_rows_as_json_and_by_length() -> None:
    rows = [
        EvalRow("perplexity", "pi", 512, "perplexity", 9.0, 0.5, 3),
        EvalRow("perplexity", "found", 512, "perplexity", 8.0, None, 1),
        EvalRow("perplexity", "pi", 256, "perplexity", 7.0, 0.25, 3),
        EvalRow("passkey", "pi", 256, "accuracy", 1.0, 0.0, 10),
    ]
    assert values_by_length(rows, "pi") == {512: 9.0, 256: 7.0}
    assert list(values_by_length(rows, "pi")) == [512, 256]
    assert values_by_length(rows, "pi", "accuracy") == {256: 1.0}
    assert values_by_length(rows, "none") == {}
    assert rows[1].to_json() == {
        "suite": "perplexity",
        "scaling": "found",
        "length": 512,
        "metric": "perplexity",
        "value": 8.0,
        "stderr": None,
        "trials": 1,
        "detail": {},
    }


# Sliding windows: every token scored exactly once, with the context it should have, against a naive loop.


def contexts(ids: list[int], window: int, stride: int, bos: bool) -> list[list[int]]:
    """For every token but the first, the context it is scored with, by the definition and one token at a time.

    Windows hold `window` tokens, BOS first where there is one; the first ends where it is full, each further one
    `stride` tokens later or at the end of the text. A token counts in the first window that holds it.
    """
    front, text = (ids[:1], ids[1:]) if bos else ([], ids)
    room = window - len(front)
    ends = [room]
    while ends[-1] < len(text):
        ends.append(ends[-1] + stride)
    result = []
    for index in range(len(text)):
        end = min(next(end for end in ends if end > index), len(text))
        context = front + text[max(0, end - room) : index]
        if context:
            result.append(context)
    return result


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [
        (40, 16, 1),
        (40, 16, 7),  # the last window is partial
        (40, 16, 14),  # window − 2
        (40, 16, 15),  # the largest: with BOS, windows do not overlap
        (44, 16, 14),
        (10, 16, 7),  # shorter than the window
        (16, 16, 7),  # exactly the window
        (17, 16, 7),  # one token more
        (5, 2, 1),  # the smallest window
        (2, 16, 3),  # the smallest text
    ],
)
def test_against_one_forward_per_token(length: int, window: int, stride: int, bos: bool) -> None:
    scaled = ramp(window)
    model = scaled_by_hand(scaled)
    ids = random_samples(1, length, bos=bos).ids[0]
    expected = [
        nll_by_hand(model, [*context, token])[-1]
        for context, token in zip(contexts(ids.tolist(), window, stride, bos), ids[1:].tolist(), strict=True)
    ]
    with tiny_scaled().using(scaled), torch.inference_mode():
        found = sliding_nll(tiny_scaled(), ids, window, stride, bos)
    assert found.shape == (length - 1,)
    assert found.tolist() == pytest.approx(expected, abs=2e-4)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_every_token_once_in_order_with_its_context(data: st.DataObject) -> None:
    """No model: the scores are the tokens and their contexts themselves."""
    window = data.draw(st.integers(2, 40), "window")
    stride = data.draw(st.integers(1, window - 1), "stride")
    bos = data.draw(st.booleans(), "bos")
    ids = torch.arange(data.draw(st.integers(2, 150), "length"))
    assert ids[0] == BOS
    pieces: list[list[int]] = []
    scored: list[list[int]] = []

    def token_nll(_: object, piece: torch.Tensor, start: int = 0) -> torch.Tensor:
        tokens = piece[0].tolist()
        assert 0 <= start < len(tokens) - 1
        pieces.append(tokens)
        scored.extend(tokens[:at] for at in range(start + 1, len(tokens)))
        return piece[:, start + 1 :]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "token_nll", token_nll)
        found = sliding_nll(tiny_scaled(), ids, window, stride, bos)
    assert found.tolist() == ids.tolist()[1:]
    assert scored == contexts(ids.tolist(), window, stride, bos)
    assert all(len(piece) <= window for piece in pieces)
    assert all(len(context) < window for context in scored)
    assert all(len(piece) == min(window, len(ids)) for piece in pieces)  # none is shorter than it need be
    if bos:
        assert all(piece[0] == BOS and BOS not in piece[1:] for piece in pieces)


@pytest.mark.parametrize("stride", [-1, 0, 16, 100])
@pytest.mark.parametrize("bos", [True, False])
def test_strides_out_of_range_are_refused(stride: int, bos: bool) -> None:
    ids = random_samples(1, 40, bos=bos).ids[0]
    with refused("invalid-setting", f"below the window of 16 tokens, found {stride}"):
        sliding_nll(tiny_scaled(), ids, 16, stride, bos)


# Loss by position: every scored token in exactly one bucket, buckets that double, standard errors over samples.


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
    whole, *rows = measure_perplexity(tiny_scaled(), samples, [48], method, positions=True)
    losses = [nll_by_hand(scaled_by_hand(ramp(48)), ids) for ids in samples.ids.tolist()]
    assert [row.value for row in rows] == pytest.approx(
        [sum(sum(own[:31]) / 31 for own in losses) / 2, sum(sum(own[31:]) / 16 for own in losses) / 2], abs=2e-4
    )
    tokens = [row.detail["to"] - row.detail["from"] for row in rows]
    mean = sum(row.value * count for row, count in zip(rows, tokens, strict=True)) / sum(tokens)
    assert math.exp(mean) == pytest.approx(whole.value)


def test_the_sliding_form_has_no_positions() -> None:
    rows = measure_perplexity(
        tiny_scaled(), random_samples(1, 48), [16], Method("ramp", ramp), stride=4, positions=True
    )
    assert [row.metric for row in rows] == ["perplexity"]
