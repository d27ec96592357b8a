"""The sliding window: every token scored exactly once, with the context it should have, against a naive loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.evaluation import perplexity as module
from longrope.evaluation.perplexity import sliding_nll
from tests.evaluation.tiny import BOS, nll_by_hand, ramp, random_samples, scaled_by_hand, tiny_scaled


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
@settings(max_examples=300, deadline=None)
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
    with pytest.raises(LongRopeError, match=f"stride from 1 to below the window of 16 tokens, found {stride}"):
        sliding_nll(tiny_scaled(), ids, 16, stride, bos)
