"""The sizes of pieces that a gradient computes again, and the head's loss and gradient at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longrope.models import chunked
from longrope.models.scoring import head_loss, head_nll, run_base
from tests.models.families import FAMILIES, VOCABULARY, tiny_model, tokens


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_numbers_inside_an_mlp_and_a_norm(family: str) -> None:
    model = tiny_model(family)
    hidden, layer = model.config.hidden_size, model.model.layers[0]
    assert chunked._numbers_inside(layer.mlp) == 3 * model.config.intermediate_size
    assert chunked._numbers_inside(layer.post_attention_layernorm) == chunked.NORM_NUMBERS * hidden


def test_packed_weights_hide_no_width() -> None:
    """Of eight 4-bit numbers in one int32 the outputs still tell the size of a piece."""
    packed = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 64))
    for layer in packed:
        layer.weight = nn.Parameter(torch.zeros(layer.out_features, layer.in_features // 8, dtype=torch.int32), False)
    assert chunked._numbers_inside(packed) >= 512
    assert chunked.backward_piece(512) == 2**16
    assert chunked.backward_piece(10**6) == chunked.MLP_CHUNK


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_loss_and_gradient_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that autograd has of the losses of every token."""
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", 7 * VOCABULARY)
    model, ids = tiny_model(family), tokens(50)
    model.requires_grad_(False)
    output = run_base(model, ids)
    found = []
    for loss_of in (
        lambda hidden: head_loss(model, output, hidden, ids[:, 1:], 7.0),
        lambda hidden: head_nll(model, output, hidden, ids[:, 1:]).sum(dtype=torch.float64) / 7.0,
    ):
        hidden = output.last_hidden_state[:, :-1].detach().requires_grad_()
        loss = loss_of(hidden)
        (4.0 * loss).backward()  # by which no bit is rounded
        found.append((loss.detach(), hidden.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
