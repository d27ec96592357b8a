"""Context parallelism: P processes share every row of N tokens, on a CPU with gloo as on GPUs with NCCL.

A row of N tokens is cut into 2P pieces of c = N / 2P tokens; process p holds pieces p and 2P − 1 − p. Under a causal
mask the late pieces cost most, so every process computes the same number of pairs (the head-tail balance of Llama 3's
context parallelism, arXiv:2407.21783 §3.3.2, which gathers keys and values as done here).

Hidden states, activations and logits are O(N/P) on each process, and so is the time of everything but attention. O(N)
on every process: token ids, positions, and the gathered keys and values of one layer (2·N·heads·head size; of all
layers without activation checkpointing). Masks that are more than causal exist for 1,024 queries at a time, but on a
GPU are kept for a layer's backward pass: N²/P bytes. A CPU, where a causal mask is a tensor too, makes them again.

Positions stay those of the row, so RoPE is right; the mask is the family's own function of positions. Fine-tuning
shares its rows by this file (gradients of weights add up over all processes as in data parallelism, whose averaging
`train/trainer.py` undoes), scoring and searching their texts (`shared_texts.py`). torch 2.13's own `context_parallel`
has no CPU kernels and takes no packed documents; accelerate's, with FSDP2 on GPUs, is reached through the trainer's
arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from longrope.errors import LongRopeError, one_line
from longrope.models.apply import kept_modes
from longrope.models.chunked import checkpointed
from longrope.models.devices import device_of

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
        """The mask of queries `first` to `last` over keys from `first_key`: (B, 1, Q, K); of a plain one torch's causal
        mask, which kernels on GPUs make by themselves, or (Q, K) on a CPU."""
        positions, documents = self.row.positions, self.row.documents
        if self.plain:
            if positions.is_cuda:
                return causal_lower_right(last - first, last)
            return torch.ones(last - first, last, dtype=torch.bool, device=positions.device).tril(first)
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
    row, plain = attention_mask.row, attention_mask.plain
    both = gather_row(torch.cat((key, value), dim=-1), row)
    keys, values = torch.split(both, [key.shape[-1], value.shape[-1]], dim=-1)
    # Flash attention, and a CPU's, take keys that query heads share; the other kernels do not.
    shared_heads = not query.is_cuda or (plain and query.dtype in (torch.bfloat16, torch.float16))
    groups = query.shape[1] // keys.shape[1]

    def attended(queries: Tensor, keys: Tensor, values: Tensor, first: int, last: int) -> Tensor:
        first_key = 0 if plain else attention_mask.first_key(first)
        near = (keys[:, :, first_key:last], values[:, :, first_key:last])
        if groups > 1 and not shared_heads:
            near = (near[0].repeat_interleave(groups, dim=1), near[1].repeat_interleave(groups, dim=1))
        return F.scaled_dot_product_attention(
            queries,
            *near,
            attn_mask=attention_mask.block(first, last, first_key),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=groups > 1 and shared_heads,
        )

    block = attended if query.is_cuda or not torch.is_grad_enabled() else checkpointed(attended)
    pieces, at = [], 0
    for first, last in _blocks(row, whole=plain and query.is_cuda):
        pieces.append(block(query[:, :, at : at + last - first], keys, values, first, last))
        at += last - first
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _blocks(row: RowLayout, *, whole: bool) -> Iterator[tuple[int, int]]:
    """The places of this process's queries, in blocks; `whole`: a piece at a time."""
    for first, last in segments(row.positions.shape[1], row.processes, row.index):
        size = last - first if whole else QUERY_BLOCK
        yield from ((at, min(at + size, last)) for at in range(first, last, size))


def gather_row(local: Tensor, row: RowLayout) -> Tensor:
    """(B, H, N/P, D) of this process -> (B, H, N, D) of all, in the row's order."""
    gathered: Tensor = _Gather.apply(local.permute(2, 0, 1, 3), row)  # type: ignore[no-untyped-call]
    return gathered.permute(1, 2, 0, 3)


class _Gather(torch.autograd.Function):
    """All-gather of a share, (N/P, …) -> (N, …) in the row's order; its gradient is the reduce-scatter: a sum over
    what all processes did with it.

    Every piece is received at its place, so that no second copy of the row exists.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, row: RowLayout) -> Tensor:
        ctx.row = row
        early, late = local.contiguous().chunk(2)
        whole = local.new_empty((2 * row.processes, *early.shape))
        for own, places in zip((early, late), _places(whole, row), strict=True):
            dist.all_gather(places, own, group=row.group)
        return whole.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        row: RowLayout = ctx.row
        pieces = 2 * row.processes
        whole = gradients[0].contiguous().view(pieces, -1, *gradients[0].shape[1:])
        own = whole.new_empty(2, *whole.shape[1:])
        for piece, places in zip(own, _places(whole, row), strict=True):
            dist.reduce_scatter(piece, places, group=row.group)
        return own.flatten(0, 1), None


def _places(whole: Tensor, row: RowLayout) -> tuple[list[Tensor], list[Tensor]]:
    """The early and the late piece of every process in `whole` (2P, c, …)."""
    return list(whole[: row.processes]), [whole[2 * row.processes - 1 - index] for index in range(row.processes)]


@dataclass
class SharedRows:
    """This process, number `index` of the P that share its rows. `row` is the layout of the micro-batch in work."""

    group: Any
    processes: int
    index: int
    row: RowLayout | None = field(default=None, init=False)

    @contextmanager
    def in_shares(self, model: PreTrainedModel) -> Iterator[None]:
        """Make `model` compute shares of the announced rows in the block."""
        own = model.config._attn_implementation
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, self.mask)
        model.set_attn_implementation(NAME)
        hook = model.base_model.register_forward_pre_hook(self.whole_row, with_kwargs=True)
        try:
            yield
        finally:
            self.row = None
            hook.remove()
            model.set_attn_implementation(own)

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

    Neighbouring ranks share a row; every process of the run enters alike. Raises LongRopeError as `shared_rows` does.
    """
    if processes == 1:
        yield None
        return
    shared = shared_rows(model, processes, packed=packed)
    with shared.in_shares(model):
        yield shared


def shared_rows(
    model: PreTrainedModel, processes: int, *, packed: bool, timeout: timedelta | None = None
) -> SharedRows:
    """This process's part of the rows that `processes` neighbouring ranks share, each with a whole `model`.

    Every process of the run calls this alike. `timeout`: how long a process waits for the others in one exchange (None:
    torch's default). Raises LongRopeError, on all of them, where attention is not sdpa, or where the shares differ from
    the model's output for a whole row (of several documents, if `packed`).
    """
    own = model.config._attn_implementation
    if own != "sdpa":
        raise LongRopeError(
            f"context parallelism computes attention by sdpa, found {own}",
            code="not-shareable",
            hint="use `attn_implementation` sdpa where the model has it, or leave `context_parallel` out",
        )
    shared = SharedRows(_group(processes, timeout), processes, dist.get_rank() % processes)
    length = 2 * processes * _PROBE_PIECE
    positions = torch.arange(length, device=device_of(model))[None] % (length // 2 if packed else length)
    ids = torch.arange(length, device=device_of(model))[None] % model.config.get_text_config().vocab_size
    whole = hidden_states(model, ids, positions)
    with shared.in_shares(model):
        _require_same(model, shared, ids, positions, whole)
    return shared


def hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """Last hidden states (B, T, H) in eval mode without gradients; the modules' modes are put back."""
    with kept_modes(model), torch.no_grad():
        model.eval()
        hidden: Tensor = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return hidden


def _group(processes: int, timeout: timedelta | None) -> Any:
    """The group of this rank and its neighbours, for tensors on the CPU and on GPUs; of its own, so that collectives
    of data parallelism never stand between those of a row."""
    backend = "gloo" if dist.get_backend() == "gloo" else "cpu:gloo,cuda:nccl"
    ranks = range(dist.get_world_size())
    groups = [dist.new_group(list(ranks[at : at + processes]), timeout, backend=backend) for at in ranks[::processes]]
    return groups[dist.get_rank() // processes]


def _require_same(model: PreTrainedModel, shared: SharedRows, ids: Tensor, positions: Tensor, whole: Tensor) -> None:
    """Prove on a short row that the shares are the model's output for the whole row."""
    shared.begin(positions)
    error, why = math.inf, ""
    try:
        own = hidden_states(model, *(share(tensor, shared.processes, shared.index) for tensor in (ids, positions)))
        expected = share(whole, shared.processes, shared.index, dim=1)
        error = float((own - expected).double().norm() / expected.double().norm())
    except (LongRopeError, RuntimeError, TypeError, AttributeError, IndexError) as failure:  # a family's own code
        why = one_line(failure)
    worst = torch.tensor(error if math.isfinite(error) else math.inf, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=shared.group)
    if not float(worst) < torch.finfo(whole.dtype).eps ** 0.5:
        raise LongRopeError(
            f"{type(model).__name__} cannot be computed in shares of a row: "
            f"{why or f'hidden states differ by {float(worst):.1g}'}",
            code="not-shareable",
            hint="leave `context_parallel` out",
        )
