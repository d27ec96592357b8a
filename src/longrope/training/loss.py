"""The loss of a row that is too long for its logits: head and cross-entropy in pieces, forward and backward.

`models/scoring.py` scores a model that stays as it is; here gradients go to the weights, and the loss takes the place
of the model's `forward`, so that what wraps the model (DDP, FSDP, autocast, PEFT) sees one ordinary forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from longrope.data.packing import IGNORED
from longrope.errors import LongRopeError
from longrope.training.fused_loss import FusedLoss

_LOGITS_BUDGET = 2**25  # numbers in one piece of logits: 128 MiB in float32


class ChunkedLoss:
    """In the place of a causal language model's `forward`: the summed loss of given targets.

    The base model runs once. Its last hidden states go through the family's own head (tied or not, soft-capping and
    logit scaling as they are) in pieces of `chunk_size` positions, whose logits are made again in the backward pass
    instead of being kept: O(T/n·V) instead of O(T·V). `fused` does both in its place, see `fused_loss.py`.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int | None = None, fused: FusedLoss | None = None) -> None:
        self.own = model.forward
        self.fused = fused
        self.head = model.get_output_embeddings()
        self.base: nn.Module = model.base_model
        if self.base is model:
            raise LongRopeError(
                f"expected a causal language model with a head, found {type(model).__name__} without one"
            )
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.chunk_size = chunk_size

    def __call__(self, input_ids: Tensor, position_ids: Tensor, shift_labels: Tensor, **others: None) -> CausalLMOutput:
        """`input_ids`, `position_ids` and `shift_labels` (B, T): the target of each position, IGNORED where it has
        none. `loss` is Σ −log p(target), in nats: who calls divides once, by the targets of the whole step. `others`:
        what wrappers name without giving it.
        """
        if given := sorted(name for name, value in others.items() if value is not None):
            raise TypeError(f"the chunked loss takes ids, positions and targets; found {given[0]} too")
        if self.fused is not None:
            hidden = self._base_output(input_ids, position_ids).last_hidden_state
            return CausalLMOutput(loss=self.fused(self.head.weight, hidden.flatten(0, 1), shift_labels.flatten()))
        return CausalLMOutput(
            loss=torch.stack([nll.sum() for nll in self.pieces(input_ids, position_ids, shift_labels)]).sum()
        )

    def pieces(self, input_ids: Tensor, position_ids: Tensor, shift_labels: Tensor) -> Iterator[Tensor]:
        """The loss of every target, (B, C) a piece, 0 where it is IGNORED."""
        output = self._base_output(input_ids, position_ids)
        size = self.chunk_size or max(1, _LOGITS_BUDGET // (input_ids.shape[0] * self.vocabulary))

        def nll(hidden: Tensor, targets: Tensor) -> Tensor:
            logits = self._head(output, hidden)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
            return losses.view_as(targets)

        pieces = zip(
            torch.split(output.last_hidden_state, size, dim=1), torch.split(shift_labels, size, dim=1), strict=True
        )
        for hidden, targets in pieces:
            yield checkpoint(nll, hidden, targets, use_reentrant=False)

    def _base_output(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        return self.base(input_ids=input_ids, position_ids=position_ids, use_cache=False)

    def _head(self, output: Any, hidden: Tensor) -> Tensor:
        """Hidden states (B, C, H) -> logits (B, C, V), by the model's own forward around a base that returns them."""
        given = type(output)(last_hidden_state=hidden)
        with _replaced(self.base, lambda *_, **__: given):
            logits: Tensor = self.own(inputs_embeds=hidden, use_cache=False).logits
        return logits


@contextmanager
def chunked_loss(
    model: PreTrainedModel, chunk_size: int | None = None, fused: FusedLoss | None = None
) -> Iterator[ChunkedLoss]:
    """`model(...)` is the summed loss of `ChunkedLoss` in the block. Raises LongRopeError where there is no head."""
    loss = ChunkedLoss(model, chunk_size, fused)
    with _replaced(model, loss):
        yield loss


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace `module.forward` on the instance for the length of the block; hooks keep working."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own


def require_documents_apart(model: PreTrainedModel, batch: int) -> None:
    """Prove that documents packed into one row do not see each other in `model`, `batch` rows at once.

    transformers finds them by their positions, which restart, and masks between them; a family that does not pass its
    positions on, a recurrent layer, or flash attention with several rows would mix them without a word. Raises
    LongRopeError then.
    """
    size, vocabulary = 8, model.config.get_text_config().vocab_size
    positions = torch.arange(size, device=model.device).repeat(2)[None].expand(batch, -1)
    ids = (torch.arange(2 * size, device=model.device)[None] % vocabulary).expand(batch, -1)
    other = ids.clone()
    other[:, :size] = (other[:, :size] + size) % vocabulary
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            first, second = (
                model.base_model(input_ids=row, position_ids=positions, use_cache=False).last_hidden_state
                for row in (ids, other)
            )
    finally:
        for module in training:
            module.training = True
    if not torch.equal(first[:, size:], second[:, size:]):
        raise LongRopeError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets packed documents see each "
            f"other in batches of {batch}: use --micro-batch 1, another --attn-implementation, or --mix long"
        )
    if torch.equal(first[:, :size], second[:, :size]):
        raise LongRopeError(
            f"{type(model).__name__} gives the same hidden states for other tokens: it cannot be trained"
        )
