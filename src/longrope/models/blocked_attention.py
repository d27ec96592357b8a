"""Causal attention as plain matrix products of a block of queries at a time: `attn_implementation="blocked"`.

PyTorch's fused attention multiplies in float32 on a CPU without AMX, whatever the dtype is. Its matrix products do not:
on a processor with AVX512-BF16 they are four times as fast in bfloat16, and attention made of them is twice as fast
(`benchmarks/attention.py`). Scores are rounded to the model's dtype before the softmax, as in transformers' `eager`
attention, but only those of one block exist: `rows` × T numbers, twice (four times in the backward pass).

Anything but a whole causal text (a mask, cached keys, sliding windows, dropout, additions to the scores) is computed by
transformers' `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from longrope.errors import LongRopeError

NAME = "blocked"
_ROWS = 768  # queries of a block, all heads of a group together: the fastest of 96 to 1,536 at 16,384 tokens


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v with a causal mask: `q` (B, H, T, D), `k` and `v` (B, K, T, D) -> (B, H, T, D).

    H is a multiple of K: query heads in groups that share a key head, as in transformers' grouped-query attention.
    Under autocast it computes in the dtype of that, as PyTorch's own does.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        with torch.autocast(device, enabled=False):
            return _Blocked.apply(q, k, v, scale)  # type: ignore[no-any-return,no-untyped-call]
    return _Blocked.apply(q, k, v, scale)  # type: ignore[no-any-return,no-untyped-call]


class _Block:
    """One block of the queries of a group of heads, and its attention's probabilities over the keys up to its end."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, buffers: tuple[Tensor, Tensor]) -> None:
        """`q` (G, t, D) are the last t of the positions of `k` and `v` (T, D)."""
        group, count, dim = q.shape
        self.shape, self.k, self.v, self.scale = (group, count, dim), k, v, scale
        self.q = q.reshape(-1, dim) * scale
        rows, keys = group * count, len(k)
        scores, self.p = (buffer[: rows * keys].view(rows, keys) for buffer in buffers)
        torch.mm(self.q, k.T, out=scores)
        later = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
        scores.view(group, count, keys)[:, :, keys - count :].masked_fill_(later, float("-inf"))
        torch.softmax(scores, -1, out=self.p)
        self.free = scores

    def output(self) -> Tensor:
        """The block's attention (G, t, D)."""
        return torch.mm(self.p, self.v).view(self.shape)

    def gradients(self, out: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients by the block's q (G, t, D), and by its k and v (T, D), from `out` and its gradient."""
        out, grad_out = out.reshape(self.q.shape), grad_out.reshape(self.q.shape)
        sums = torch.promote_types(out.dtype, torch.float32)
        delta = (out.to(sums) * grad_out).sum(-1, keepdim=True).to(out.dtype)
        by_v = torch.mm(self.p.T, grad_out)
        by_scores = torch.mm(grad_out, self.v.T, out=self.free)
        by_scores.sub_(delta).mul_(self.p)
        by_q = torch.mm(by_scores, self.k).mul_(self.scale)
        return by_q.view(self.shape), torch.mm(by_scores.T, self.q), by_v


def _blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
    """Every block with (row of the batch, slice of query heads, key head, slice of positions)."""
    group = q.shape[1] // k.shape[1]
    length, count = q.shape[2], max(1, _ROWS // group)
    buffers = (q.new_empty(group * min(count, length) * length), q.new_empty(group * min(count, length) * length))
    for row in range(q.shape[0]):
        for head in range(k.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            for start in range(0, length, count):
                end = min(start + count, length)
                block = _Block(q[row, heads, start:end], k[row, head, :end], v[row, head, :end], scale, buffers)
                yield block, row, heads, head, slice(start, end)


class _Blocked(torch.autograd.Function):
    """The backward pass makes the probabilities of a block again instead of keeping them."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(q)
        for block, row, heads, _, at in _blocks(q, k, v, scale):
            out[row, heads, at] = block.output()
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        by_q = torch.empty_like(q)
        # Sums over many blocks, so in float32 at least.
        sums = torch.promote_types(k.dtype, torch.float32)
        by_k, by_v = torch.zeros_like(k, dtype=sums), torch.zeros_like(v, dtype=sums)
        for block, row, heads, head, at in _blocks(q, k, v, ctx.scale):
            by_q[row, heads, at], block_k, block_v = block.gradients(out[row, heads, at], grad_out[row, heads, at])
            by_k[row, head, : at.stop] += block_k
            by_v[row, head, : at.stop] += block_v
        return by_q, by_k.to(k.dtype), by_v.to(v.dtype), None


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of transformers' modules: (B, H, T, D) -> (B, T, H, D) and no weights."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:  # `sdpa` has neither, and passes over the second
            raise LongRopeError(
                f"{type(module).__name__} adds `{name}` to its attention, which {NAME} has not",
                code="not-supported",
                hint="use `attn_implementation=eager`",
            )
    added = any(kwargs.get(name) is not None for name in ("position_bias", "cache"))
    whole = query.shape[2] == key.shape[2] > 1 and query.shape[3] == key.shape[3] == value.shape[3]
    if attention_mask is not None or not causal or dropout or added or not whole:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return out, None
    out = blocked_attention(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `attn_implementation="blocked"` known to transformers, with the masks of `sdpa`."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
