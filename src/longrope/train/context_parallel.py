"""Context parallelism: P processes share every row of N tokens, on a CPU with gloo as on GPUs with NCCL.

A row of N tokens is cut into 2P pieces of c = N / 2P tokens; process p holds pieces p and 2P − 1 − p. Under a causal
mask the late pieces cost most, so every process computes the same number of pairs (the head-tail balance of Llama 3's
context parallelism, arXiv:2407.21783 §3.3.2, which gathers keys and values as done here).

Hidden states, activations and logits are O(N/P) on each process, and so is the time of everything but attention. O(N)
on every process: token ids, positions, and the gathered keys and values of one layer (2·N·heads·head size; of all
layers without activation checkpointing). Masks that are more than causal exist for 1,024 queries at a time, but are
kept for a layer's backward pass: N²/P bytes.

Positions stay those of the row, so RoPE is right; the mask is the family's own function of positions. Gradients of
weights add up over all processes as in data parallelism, whose averaging `trainer.py` undoes. torch 2.13's own
`context_parallel` has no CPU kernels and takes no packed documents; accelerate's, with FSDP2 on GPUs, is reached
through the trainer's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from longrope.errors import LongRopeError, one_line
from longrope.models.devices import device_of
from longrope.train.loss import hidden_states

NAME = "longrope_context_parallel"
QUERY_BLOCK = 1024  # queries whose mask exists at once
_PROBE_PIECE = 4  # tokens of a piece when attention is proved
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # additions of some families to attention, which sdpa has not


def segments(length: int, processes: int, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two pieces of process `index` in a row of `length` tokens, which 2P divides: first place, last place + 1."""
    piece, back = length // (2 * processes), 2 * processes - 1 - index
    return (index * piece, (index + 1) * piece), (back * piece, (back + 1) * piece)


def share(whole: Tensor, processes: int, index: int, dim: int = -1) -> Tensor:
    """The share of process `index` in `whole` along `dim`: N -> N / P."""
    parts = segments(whole.shape[dim], processes, index)
    return torch.cat([whole.narrow(dim, first, last - first) for first, last in parts], dim=dim)


@dataclass(frozen=True, eq=False)
class RowLayout:
    """The rows (B, N) of a micro-batch that the P processes of `group` share; this process has number `index`.

    `positions` begin at 0 with every document, as packing makes them. `documents` (B, N) numbers them; None where each
    row is a single document.
    """

    group: Any
    processes: int
    index: int
    positions: Tensor
    documents: Tensor | None
    starts: Tensor  # (N,) on the CPU: where the document of that place begins, the earliest of all rows

    @classmethod
    def of(cls, positions: Tensor, group: Any, processes: int, index: int) -> RowLayout:
        """The layout of rows with these `positions` (B, N)."""
        begins = positions == 0
        documents = None if int(begins.sum()) == positions.shape[0] else begins.cumsum(-1)
        starts = (torch.arange(positions.shape[1]) - positions.cpu()).amin(0)
        return cls(group, processes, index, positions, documents, starts)


@dataclass(frozen=True, eq=False)
class RowMask:
    """The mask of a layer, evaluated block by block: `allowed(b, h, q, k)` is transformers' function of positions.

    `local_size`: how many tokens back a query attends; None: to the beginning of its document.
    """

    row: RowLayout
    allowed: Callable[..., Tensor]
    local_size: int | None

    @property
    def plain(self) -> bool:
        """True if every query attends to all tokens before it."""
        return self.row.documents is None and self.allowed is causal_mask_function

    def first_key(self, query: int) -> int:
        """The first key that `query` or one after it attends to."""
        document = int(self.row.starts[query])
        return document if self.local_size is None else max(document, query - self.local_size + 1)

    def block(self, first: int, last: int, first_key: int) -> Any:
        """The mask of queries `first` to `last` over keys from `first_key`: (B, 1, Q, K), or torch's causal one."""
        if self.plain:
            return causal_lower_right(last - first, last)
        positions, documents = self.row.positions, self.row.documents
        queries, keys = positions[:, None, first:last, None], positions[:, None, None, first_key:last]
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None, None, None]
        mask = self.allowed(rows, torch.zeros_like(rows), queries, keys)
        if documents is not None:
            mask = mask & (documents[:, None, first:last, None] == documents[:, None, None, first_key:last])
        return mask.expand(positions.shape[0], 1, last - first, last - first_key)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of this process's queries over the keys and values of the whole row, gathered from all processes.

    transformers' attention interface: query, key, value (B, H or fewer, N/P, D) -> (B, N/P, H, D). Raises LongRopeError
    for an attention that is more than a mask.
    """
    if not isinstance(attention_mask, RowMask) or any(more.get(name) is not None for name in _UNSUPPORTED):
        raise LongRopeError(
            f"{type(module).__name__} has an attention that context parallelism cannot share out",
            code="not-shareable",
            hint="leave `context_parallel` out",
        )
    row = attention_mask.row
    both = gather_row(torch.cat((key, value), dim=-1), row)
    keys, values = torch.split(both, [key.shape[-1], value.shape[-1]], dim=-1)
    shared_heads = attention_mask.plain and query.dtype in (torch.bfloat16, torch.float16)  # by flash attention
    groups = query.shape[1] // keys.shape[1]
    if groups > 1 and not shared_heads:
        keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
    pieces, at = [], 0
    for first, last in _blocks(row, whole=attention_mask.plain and query.is_cuda):
        first_key = 0 if attention_mask.plain else attention_mask.first_key(first)
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, at : at + last - first],
                keys[:, :, first_key:last],
                values[:, :, first_key:last],
                attn_mask=attention_mask.block(first, last, first_key),
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=groups > 1 and shared_heads,
            )
        )
        at += last - first
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _blocks(row: RowLayout, *, whole: bool) -> Iterator[tuple[int, int]]:
    """The places of this process's queries, in blocks; `whole`: a piece at a time."""
    for first, last in segments(row.positions.shape[1], row.processes, row.index):
        size = last - first if whole else QUERY_BLOCK
        yield from ((at, min(at + size, last)) for at in range(first, last, size))


def gather_row(local: Tensor, row: RowLayout) -> Tensor:
    """(B, H, N/P, D) of this process -> (B, H, N, D) of all, in the row's order."""
    gathered: Tensor = _Gather.apply(local, row.group, row.processes)  # type: ignore[no-untyped-call]
    pieces = gathered.reshape(*gathered.shape[:-2], 2, -1, gathered.shape[-1])  # (P, B, H, 2, c, D)
    ordered = torch.cat((pieces[..., 0, :, :], pieces[..., 1, :, :].flip(0)))  # (2P, B, H, c, D)
    return ordered.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Gather(torch.autograd.Function):
    """All-gather, (…) -> (P, …); its gradient is the reduce-scatter: a sum over what all processes did with it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any, processes: int) -> Tensor:
        ctx.group = group
        gathered = local.new_empty((processes, *local.shape))
        dist.all_gather(list(gathered), local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        own = torch.empty_like(gradient[0])
        dist.reduce_scatter(own, list(gradient.contiguous()), group=ctx.group)
        return own, None, None


@dataclass
class SharedRows:
    """This process, number `index` of the P that share its rows. `row` is the layout of the micro-batch in work."""

    group: Any
    processes: int
    index: int
    row: RowLayout | None = field(default=None, init=False)

    def begin(self, positions: Tensor) -> None:
        """Announce a forward, and its backward pass, over a share of rows with these `positions` (B, N)."""
        self.row = RowLayout.of(positions, self.group, self.processes, self.index)

    def mask(self, *, mask_function: Any, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> RowMask:
        """transformers' mask interface: the family's mask as a function, which `attend` evaluates block by block."""
        if use_vmap or self.row is None:
            raise LongRopeError(
                "context parallelism knows causal masks of positions only",
                code="not-shareable",
                hint="leave `context_parallel` out",
            )
        return RowMask(self.row, mask_function, local_size)

    def whole_row(
        self, _: Any, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook before the base model's forward: add a padding mask without padding, as long as the row.

        transformers then leaves packed documents to the mask interface and expects N keys.
        """
        if self.row is not None and named.get("position_ids") is not None:
            named["attention_mask"] = torch.ones_like(self.row.positions, dtype=torch.bool)
        return given, named


@contextmanager
def context_parallel(model: PreTrainedModel, processes: int, *, packed: bool) -> Iterator[SharedRows | None]:
    """Make `model` compute shares of rows in the block, `processes` for each row; with one, nothing changes.

    Neighbouring ranks share a row; every process of the run enters alike. Raises LongRopeError, on all of them, where
    attention is not sdpa, or where the shares differ from the model's output for a whole row (of several documents, if
    `packed`).
    """
    if processes == 1:
        yield None
        return
    own = model.config._attn_implementation
    if own != "sdpa":
        raise LongRopeError(
            f"context parallelism computes attention by sdpa, found {own}",
            code="not-shareable",
            hint="use `attn_implementation` sdpa where the model has it, or leave `context_parallel` out",
        )
    shared = SharedRows(_group(processes), processes, dist.get_rank() % processes)
    length = 2 * processes * _PROBE_PIECE
    positions = torch.arange(length, device=device_of(model))[None] % (length // 2 if packed else length)
    ids = torch.arange(length, device=device_of(model))[None] % model.config.get_text_config().vocab_size
    whole = hidden_states(model, ids, positions)
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, shared.mask)
    model.set_attn_implementation(NAME)
    hook = model.base_model.register_forward_pre_hook(shared.whole_row, with_kwargs=True)
    try:
        _require_same(model, shared, ids, positions, whole)
        yield shared
    finally:
        hook.remove()
        model.set_attn_implementation(own)


def _group(processes: int) -> Any:
    """The group of this rank and its neighbours, for tensors on the CPU and on GPUs; of its own, so that collectives
    of data parallelism never stand between those of a row."""
    backend = "gloo" if dist.get_backend() == "gloo" else "cpu:gloo,cuda:nccl"
    ranks = range(dist.get_world_size())
    groups = [dist.new_group(list(ranks[at : at + processes]), backend=backend) for at in ranks[::processes]]
    return groups[dist.get_rank() // processes]


def _require_same(model: PreTrainedModel, shared: SharedRows, ids: Tensor, positions: Tensor, whole: Tensor) -> None:
    """Prove on a short row that the shares are the model's output for the whole row."""
    shared.begin(positions)
    found, why = torch.tensor(True), ""
    try:
        own = hidden_states(model, *(share(tensor, shared.processes, shared.index) for tensor in (ids, positions)))
        expected = share(whole, shared.processes, shared.index, dim=1)
        error = (own - expected).double().norm() / expected.double().norm()
        found = (error < torch.finfo(whole.dtype).eps ** 0.5).cpu()
        why = f"hidden states differ by {float(error):.1g}"
    except (LongRopeError, RuntimeError, TypeError, AttributeError, IndexError) as failure:  # a family's own code
        found, why = torch.tensor(False), one_line(failure)
    finally:
        shared.row = None
    agreed = found.to(torch.int32)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=shared.group)
    if not agreed:
        raise LongRopeError(
            f"{type(model).__name__} cannot be computed in shares of a row: {why}",
            code="not-shareable",
            hint="leave `context_parallel` out",
        )
