"""Liger's fused head and cross-entropy in place of the chunked loss, where it is installed and gives the same loss.

Its kernel makes logits in pieces, and their gradients with them in the forward pass, so that nothing is computed again
(Liger-Kernel, arXiv:2410.10989 §3.2; liger-kernel 0.8). It needs CUDA and a head that is one matrix; not for LoRA,
DeepSpeed, or float64. Not run here: no GPU with it has been at hand; the choice and the call are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longrope.data.packing import IGNORED
from longrope.errors import LongRopeError, one_line

FusedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The head's weight (V, H), hidden states (T, H), targets (T,) -> Σ −log p(target) over targets that count."""


def fused_loss(model: PreTrainedModel, device: torch.device) -> FusedLoss | None:
    """Liger's loss for `model` trained on `device`; None where it is not installed, or not the model's own loss.

    Raises LongRopeError where the one that is installed cannot be used.
    """
    if device.type != "cuda" or find_spec("liger_kernel") is None or not plain_head(model):
        return None
    try:
        made: FusedLoss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
            ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise LongRopeError(
            f"the liger_kernel here cannot be used ({one_line(error)}): use --fused-loss off"
        ) from error
    return made


def plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are hidden states times one matrix: no bias, soft cap or scale. Found by comparing the two."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or model.dtype == torch.float64:
        return False
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        # transformers' last hidden state of these is the one after the final norm, which the head is given.
        return torch.equal(output.logits, head(output.hidden_states[-1]))
