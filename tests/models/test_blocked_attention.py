"""Attention in blocks against PyTorch's own: outputs, gradients, whole models, and what it leaves to sdpa."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longrope.errors import LongRopeError
from longrope.models import blocked_attention as blocked
from longrope.models.loading import load_model
from longrope.models.scoring import token_nll
from tests.models.families import tiny_model, tokens


def _inputs(heads: int, key_heads: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, h, length, 16, dtype=torch.float64, generator=generator).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (6, 6), (9, 3), (8, 1)])
@pytest.mark.parametrize("length", [2, 300, 1000])
def test_outputs_and_gradients_are_those_of_the_fused_kernel(heads: int, key_heads: int, length: int) -> None:
    inputs = _inputs(heads, key_heads, length)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)
    found = blocked.blocked_attention(*inputs, 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    by_output = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, inputs, by_output)
    for by_input, wanted in zip(torch.autograd.grad(found, inputs, by_output), expected_gradients, strict=True):
        torch.testing.assert_close(by_input, wanted, rtol=0, atol=1e-13)


def test_under_autocast_it_computes_in_the_dtype_of_that() -> None:
    inputs = [x.detach().float().requires_grad_() for x in _inputs(4, 2, 300)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = blocked.blocked_attention(*inputs, 0.3)
    assert torch.equal(found, blocked.blocked_attention(*(x.bfloat16() for x in inputs), 0.3))
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox", "gemma3_text"])
def test_a_model_computes_what_it_computes_with_sdpa(family: str) -> None:
    """Sliding layers included, whose masks go to sdpa."""
    blocked.register()
    model, texts = tiny_model(family).double(), tokens(40, batch=2)
    model.set_attn_implementation("sdpa")
    expected = token_nll(model, texts)
    model.set_attn_implementation(blocked.NAME)
    torch.testing.assert_close(token_nll(model, texts), expected, rtol=0, atol=1e-12)


def test_loading_takes_it_by_name_and_generation_goes_on_with_cached_keys() -> None:
    own, other = (load_model("tiny", dtype="float64", attn_implementation=name) for name in (blocked.NAME, "sdpa"))
    text = torch.arange(2, 42).view(1, -1)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert own.config._attn_implementation == blocked.NAME
    assert torch.equal(own.generate(text, **options), other.generate(text, **options))


def test_a_family_that_adds_to_its_attention_is_refused() -> None:
    """Attention sinks, which sdpa would leave out without a word."""
    blocked.register()
    model = tiny_model("gpt_oss")
    model.set_attn_implementation(blocked.NAME)
    with pytest.raises(LongRopeError, match="adds `s_aux` to its attention, which blocked has not"):
        token_nll(model, tokens(40))


def test_whole_texts_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would compare sdpa with itself."""
    computed: list[int] = []
    original = blocked.blocked_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        computed.append(q.shape[2])
        return original(q, k, v, scale)

    monkeypatch.setattr(blocked, "blocked_attention", counted)
    model = load_model("tiny", attn_implementation=blocked.NAME)
    token_nll(model, torch.arange(2, 42).view(1, -1))
    assert computed == [40] * model.config.num_hidden_layers
