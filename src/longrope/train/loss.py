"""The training loss of a row that is too long for its logits, in place of the model's `forward`.

The chunked loss computes head and cross-entropy in pieces, forward and backward. Where liger_kernel is installed and
computes the same loss, its fused kernel takes over: it makes pieces of logits together with their gradients in the
forward pass, so that nothing is computed again (Liger-Kernel, arXiv:2410.10989 §3.2; liger-kernel 0.8). Standing in
for `forward`, the loss is one ordinary forward to whatever wraps the model: DDP, FSDP, autocast, PEFT.

`models/scoring.py` scores a model whose weights stay as they are; here the weights get gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from longrope.data.packing import IGNORED
from longrope.errors import LongRopeError, one_line
from longrope.models.chunked import base_of, checkpointed, head_logits, logits_chunk, replaced_forward
from longrope.models.context_parallel import hidden_states
from longrope.models.devices import device_of


class ChunkedLoss:
    """Stands in for the `forward` of a causal language model and returns the summed loss of given targets.

    The base model runs once. Its last hidden states go through the family's own head (tied or not, soft-capping and
    logit scaling as they are) in pieces of `chunk_size` positions, whose logits are made again in the backward pass
    instead of being kept: O(T/n·V) instead of O(T·V). With `fused`, that kernel computes head and loss.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int | None = None, fused: FusedLoss | None = None) -> None:
        self.own = model.forward
        self.fused = fused
        self.head = model.get_output_embeddings()
        self.base = base_of(model)
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.chunk_size = chunk_size

    def __call__(self, input_ids: Tensor, position_ids: Tensor, shift_labels: Tensor, **others: None) -> CausalLMOutput:
        """Token ids, positions and targets, (B, T) each, to an output whose `loss` is Σ −log p(target) in nats.

        `shift_labels` holds the target of each position, IGNORED where it has none. The caller divides the sum once, by
        the targets of the whole step. `others`: arguments that wrappers pass as None.
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
        """Yields the loss of every target, (B, C) a piece, 0 where it is IGNORED."""
        output = self._base_output(input_ids, position_ids)
        size = self.chunk_size or logits_chunk(self.vocabulary, input_ids.shape[0])

        def nll(hidden: Tensor, targets: Tensor) -> Tensor:
            logits = head_logits(self.own, self.base, output, hidden)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
            return losses.view_as(targets)

        pieces = zip(
            torch.split(output.last_hidden_state, size, dim=1), torch.split(shift_labels, size, dim=1), strict=True
        )
        for hidden, targets in pieces:
            yield checkpointed(nll)(hidden, targets)

    def _base_output(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        return self.base(input_ids=input_ids, position_ids=position_ids, use_cache=False)


@contextmanager
def chunked_loss(
    model: PreTrainedModel, chunk_size: int | None = None, fused: FusedLoss | None = None
) -> Iterator[ChunkedLoss]:
    """Make `model(...)` the summed loss of `ChunkedLoss` in the block. Raises LongRopeError where there is no head."""
    loss = ChunkedLoss(model, chunk_size, fused)
    with replaced_forward(model, loss):
        yield loss


def require_documents_apart(model: PreTrainedModel, batch: int) -> None:
    """Prove that documents packed into one row do not attend to each other in `model`, with `batch` rows at once.

    transformers finds documents by their positions, which restart, and masks between them; a family that does not pass
    its positions on, a recurrent layer, or flash attention with several rows would mix documents in silence. Raises
    LongRopeError then.
    """
    size, vocabulary = 8, model.config.get_text_config().vocab_size
    positions = torch.arange(size, device=device_of(model)).repeat(2)[None].expand(batch, -1)
    ids = (torch.arange(2 * size, device=device_of(model))[None] % vocabulary).expand(batch, -1)
    other = ids.clone()
    other[:, :size] = (other[:, :size] + size) % vocabulary
    first, second = (hidden_states(model, row, positions) for row in (ids, other))
    if not torch.equal(first[:, size:], second[:, size:]):
        raise LongRopeError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets packed documents see each "
            f"other in batches of {batch}",
            code="documents-mixed",
            hint="use a `micro_batch` of 1, another `attn_implementation`, or the mix long",
        )
    if torch.equal(first[:, :size], second[:, :size]):
        raise LongRopeError(
            f"{type(model).__name__} gives the same hidden states for other tokens: it cannot be trained",
            code="ignores-tokens",
        )


FusedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The head's weight (V, H), hidden states (T, H), targets (T,) -> Σ −log p(target) over targets that count."""


def fused_loss(model: PreTrainedModel, device: torch.device) -> FusedLoss | None:
    """Liger's loss for `model` trained on `device`; None where it is not installed or is not the model's own loss.

    It needs CUDA and a head that is one matrix, and is not for LoRA, DeepSpeed or float64. Raises LongRopeError where
    the installed version cannot be used.
    """
    if device.type != "cuda" or find_spec("liger_kernel") is None or not plain_head(model):
        return None
    try:
        made: FusedLoss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
            ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise LongRopeError(
            f"the installed liger_kernel cannot be used ({one_line(error)})",
            code="missing-dependency",
            hint="use a `fused_loss` of off",
        ) from error
    return made


def plain_head(model: PreTrainedModel) -> bool:
    """True if logits are hidden states times one matrix, without bias, soft cap or scale; computed and compared."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or model.dtype == torch.float64:
        return False
    ids = torch.arange(8, device=device_of(model))[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        # The last of transformers' hidden states is the one after the final norm, the head's input.
        return torch.equal(output.logits, head(output.hidden_states[-1]))
