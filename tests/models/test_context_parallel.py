"""Rows that processes share: who holds what, and what each attends to."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from longrope.models.context_parallel import RowLayout, RowMask, context_parallel, segments, share
from tests.models.families import tiny_model


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_shares_are_the_row_and_cost_the_same(processes: int) -> None:
    length = 24
    held = [[range(*part) for part in segments(length, processes, index)] for index in range(processes)]
    assert sorted(place for parts in held for part in parts for place in part) == list(range(length))
    pairs = {sum(place + 1 for part in parts for place in part) for parts in held}
    assert len(pairs) == 1
    row = torch.arange(length)
    for index in range(processes):
        assert share(row, processes, index).tolist() == [place for part in held[index] for place in part]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sizes", [[24], [7, 11, 6]])
def test_a_block_of_the_mask_is_that_of_the_whole_row(window: int | None, sizes: list[int]) -> None:
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    row = RowLayout.of(positions, None, 2, 0)
    assert (row.documents is None) == (len(sizes) == 1)
    allowed = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    mask = RowMask(row, allowed, window)
    whole = torch.ones(24, 24, dtype=torch.bool).tril()
    if window is not None:
        whole = whole.triu(1 - window)
    document = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    whole &= document[:, None] == document
    for first, last in pairwise((0, 5, 6, 12, 24)):
        first_key = mask.first_key(first)
        assert not whole[first:last, :first_key].any()
        assert whole[first, first_key]  # and no further back than need be
        if not mask.plain:
            assert torch.equal(mask.block(first, last, first_key)[0, 0], whole[first:last, first_key:last])
    assert mask.plain == (window is None and len(sizes) == 1)


def test_one_process_computes_as_ever() -> None:
    model = tiny_model("llama")
    with context_parallel(model, 1, packed=True) as shared:
        assert shared is None
        assert model.config._attn_implementation == "sdpa"
