"""Context parallelism: P processes share every row of N tokens, on a CPU with gloo as on GPUs with NCCL.

Each holds N/P tokens of a row: their hidden states, activations and logits are O(N/P), and so is the time of all but
attention, whose pairs are shared out evenly. O(N) on every process: token ids, positions, and the keys and values of
one layer, gathered (2·N·heads·head size; of all layers without activation checkpointing). Masks that are more than
causal exist for 1,024 queries at a time, but are kept for a layer's backward pass: N²/P bytes.

Positions stay those of the row, so RoPE is right; the mask is the family's own function of positions. Gradients of
weights add up over all processes as in data parallelism, whose averaging `trainer.py` undoes. torch 2.13's own
`context_parallel` has no CPU kernels and takes no packed documents; accelerate's, with FSDP2 on GPUs, is reached
through the trainer's arguments.

Attention of one process's share of a row over the keys and values of the whole row, gathered from all shares.

A row of N tokens is cut into 2P pieces of c = N / 2P; process p holds pieces p and 2P − 1 − p. Under a causal mask the
late pieces cost most, and so every process computes the same number of pairs (the head-tail balance of Llama 3's
context parallelism, arXiv:2407.21783 §3.3.2, which gathers keys and values as done here). Which process holds what, and
which windows and losses there are, is not known here.
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

NAME = "longrope_context_parallel"
_PROBE_PIECE = 4  # tokens of a piece when attention is proved


@dataclass
class Shared:
    """This process among the P that share its rows: number `index`. `row` is the micro-batch in work."""

    group: Any
    processes: int
    index: int
    row: Row | None = field(default=None, init=False)

    def begin(self, positions: Tensor) -> None:
        """A forward over a share of rows with these `positions` (B, N) is to come; they last for its backward pass."""
        self.row = Row.of(positions, self.group, self.processes, self.index)

    def mask(self, *, mask_function: Any, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> RowMask:
        """transformers' mask interface: the family's mask as a function, which attention asks block by block."""
        if use_vmap or self.row is None:
            raise LongRopeError("context parallelism knows causal masks of positions only; train without it")
        return RowMask(self.row, mask_function, local_size)

    def whole_row(
        self, _: Any, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the base model's forward: a padding mask of nothing, as long as the row, not the share.

        With one, transformers leaves packed documents to the mask interface and takes N keys to be there.
        """
        if self.row is not None and named.get("position_ids") is not None:
            named["attention_mask"] = torch.ones_like(self.row.positions, dtype=torch.bool)
        return given, named


@contextmanager
def context_parallel(model: PreTrainedModel, processes: int, *, packed: bool) -> Iterator[Shared | None]:
    """In the block `model` computes shares of rows, `processes` for each row; None, and as ever, for one.

    Neighbouring ranks share a row; every process of the run enters alike. Raises LongRopeError, on all of them, where
    attention is not sdpa, or where the shares are not what the model gives for a whole row (of documents, if `packed`).
    """
    if processes == 1:
        yield None
        return
    own = model.config._attn_implementation
    if own != "sdpa":
        raise LongRopeError(
            f"context parallelism computes attention by sdpa, found {own}: use --attn-implementation sdpa where the "
            "model has it, or train without --context-parallel"
        )
    shared = Shared(_group(processes), processes, dist.get_rank() % processes)
    length = 2 * processes * _PROBE_PIECE
    positions = torch.arange(length, device=model.device)[None] % (length // 2 if packed else length)
    ids = torch.arange(length, device=model.device)[None] % model.config.get_text_config().vocab_size
    whole = _hidden(model, ids, positions)
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


def _hidden(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            hidden: Tensor = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    finally:
        for module in training:
            module.training = True
    return hidden


def _require_same(model: PreTrainedModel, shared: Shared, ids: Tensor, positions: Tensor, whole: Tensor) -> None:
    """Prove that shares of a short row are what the model gives for the row as a whole."""
    shared.begin(positions)
    found, why = torch.tensor(True), ""
    try:
        own = _hidden(model, *(share(tensor, shared.processes, shared.index) for tensor in (ids, positions)))
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
            f"{type(model).__name__} cannot be computed in shares of a row: {why}; leave --context-parallel out"
        )


QUERY_BLOCK = 1024  # queries whose mask exists at once
_UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some families add to attention, and sdpa has not


def segments(length: int, processes: int, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last + 1 place of the two pieces of process `index` in a row of `length` tokens, which 2P divides."""
    piece, back = length // (2 * processes), 2 * processes - 1 - index
    return (index * piece, (index + 1) * piece), (back * piece, (back + 1) * piece)


def share(whole: Tensor, processes: int, index: int, dim: int = -1) -> Tensor:
    """What process `index` holds of `whole` along `dim`: N -> N / P."""
    parts = segments(whole.shape[dim], processes, index)
    return torch.cat([whole.narrow(dim, first, last - first) for first, last in parts], dim=dim)


@dataclass(frozen=True, eq=False)
class Row:
    """The rows (B, N) of a micro-batch that the processes of `group` share; this one is number `index` of P.

    `positions` begin at 0 with every document, as packing makes them. `documents` numbers them; None where each row is
    a single one.
    """

    group: Any
    processes: int
    index: int
    positions: Tensor
    documents: Tensor | None
    starts: Tensor  # (N,) on the CPU: the first token of the document that place belongs to, the earliest of all rows

    @classmethod
    def of(cls, positions: Tensor, group: Any, processes: int, index: int) -> Row:
        """The rows with these `positions` (B, N)."""
        begins = positions == 0
        documents = None if int(begins.sum()) == positions.shape[0] else begins.cumsum(-1)
        starts = (torch.arange(positions.shape[1]) - positions.cpu()).amin(0)
        return cls(group, processes, index, positions, documents, starts)


@dataclass(frozen=True, eq=False)
class RowMask:
    """What the queries of a layer attend to: `allowed(b, h, q, k)`, transformers' function of positions in a document.

    `reach`: keys further back than so many are not allowed; None: all are.
    """

    row: Row
    allowed: Callable[..., Tensor]
    reach: int | None

    @property
    def plain(self) -> bool:
        """Whether every query attends to all that comes before it."""
        return self.row.documents is None and self.allowed is causal_mask_function

    def first_key(self, query: int) -> int:
        """The first key that `query` or one after it attends to."""
        document = int(self.row.starts[query])
        return document if self.reach is None else max(document, query - self.reach + 1)

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
    """transformers' attention interface: query, key, value (B, H or fewer, N/P, D) -> (B, N/P, H, D).

    The keys and values of the row are gathered: O(N), of one layer at a time where layers are computed again. Raises
    LongRopeError for an attention that is more than a mask.
    """
    if not isinstance(attention_mask, RowMask) or any(more.get(name) is not None for name in _UNKNOWN):
        raise LongRopeError(f"{type(module).__name__} has an attention that context parallelism cannot share out")
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


def _blocks(row: Row, *, whole: bool) -> Iterator[tuple[int, int]]:
    """The places of this process's queries, in blocks; `whole`: a piece at a time."""
    for first, last in segments(row.positions.shape[1], row.processes, row.index):
        size = last - first if whole else QUERY_BLOCK
        yield from ((at, min(at + size, last)) for at in range(first, last, size))


def gather_row(local: Tensor, row: Row) -> Tensor:
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
