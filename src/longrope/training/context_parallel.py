"""Context parallelism: P processes share every row of N tokens, on a CPU with gloo as on GPUs with NCCL.

Each holds N/P tokens of a row: their hidden states, activations and logits are O(N/P), and so is the time of all but
attention, whose pairs are shared out evenly. O(N) on every process: token ids, positions, and the keys and values of
one layer, gathered (2·N·heads·head size; of all layers without activation checkpointing). Masks that are more than
causal exist for 1,024 queries at a time, but are kept for a layer's backward pass: N²/P bytes.

Positions stay those of the row, so RoPE is right; the mask is the family's own function of positions. Gradients of
weights add up over all processes as in data parallelism, whose averaging `trainer.py` undoes. torch 2.13's own
`context_parallel` has no CPU kernels and takes no packed documents; accelerate's, with FSDP2 on GPUs, is reached
through the trainer's arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from longrope.errors import LongRopeError, one_line
from longrope.training.shared_attention import Row, RowMask, attend, share

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
