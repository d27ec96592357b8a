"""Memory-bounded scoring: the loss of every token, with logits, MLPs and norms of a piece of the text at a time.

Peak memory is O(T·hidden) for the hidden states and the attention's keys and values, not O(T·vocabulary): with
131,072 tokens and a vocabulary of 128,256 the logits alone would be 67 GB in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.cache_argument import with_cache
from longrope.models.chunked import base_of, checkpointed, chunked_modules, head_logits, logits_chunk


def token_nll(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    position_ids: Tensor | None = None,
    start: int = 0,
    chunk_size: int | None = None,
) -> Tensor:
    """Negative log-likelihood, in nats, of every next token.

    `input_ids` (B, T) -> (B, T − 1 − start), float32, or float64 for a float64 model: entry j is
    −log p(token start+j+1 | tokens 0 … start+j). `chunk_size` is the number of positions whose logits exist at once (by
    default what fits 128 MiB). The family's own code makes the logits, so tied heads, biases, soft-capping and logit
    scaling are right by construction. The model should be in eval mode; gradients flow if they are enabled.

    Raises LongRopeError when there is no next token to score.
    """
    batch, length = input_ids.shape
    if start < 0:
        raise LongRopeError(f"expected a `start` of 0 or more, found {start}", code="invalid-setting")
    if start >= length - 1:
        raise LongRopeError(f"expected at least {start + 2} tokens to score, found {length}", code="too-short-text")
    base, output = base_of(model), run_base(model, input_ids, position_ids)
    hidden_BTH = output.last_hidden_state[:, start:-1]
    targets = input_ids[:, start + 1 :]
    if chunk_size is None:
        chunk_size = logits_chunk(model.config.get_text_config().vocab_size, batch)

    def piece(hidden: Tensor, target: Tensor) -> Tensor:
        logits = head_logits(model, base, output, hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nll = F.cross_entropy(logits.flatten(0, 1), target.flatten().to(logits.device), reduction="none")
        return nll.view_as(target)

    # With gradients, a piece's logits are made again in the backward pass instead of being kept.
    scored = checkpointed(piece) if torch.is_grad_enabled() else piece
    starts = range(0, targets.shape[1], chunk_size)
    return torch.cat(
        [scored(hidden_BTH[:, at : at + chunk_size], targets[:, at : at + chunk_size]) for at in starts], dim=1
    )


def top_tokens(model: PreTrainedModel, input_ids: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """The most likely next token after every position: `input_ids` (B, T) -> int64 (B, T).

    `chunk_size` is the number of positions whose logits exist at once (by default what fits 128 MiB).
    """
    base, output = base_of(model), run_base(model, input_ids)
    if chunk_size is None:
        chunk_size = logits_chunk(model.config.get_text_config().vocab_size, input_ids.shape[0])
    pieces = torch.split(output.last_hidden_state, chunk_size, dim=1)
    return torch.cat([head_logits(model, base, output, piece).argmax(-1) for piece in pieces], dim=1)


def last_logits(model: PreTrainedModel, input_ids: Tensor, count: int) -> Tensor:
    """Logits (B, count, V) of the last `count` positions of `input_ids` (B, T), made from the whole text."""
    base, output = base_of(model), run_base(model, input_ids)
    return head_logits(model, base, output, output.last_hidden_state[:, -count:])


def run_base(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None, cache: Cache | None = None
) -> Any:
    """Run the model below its head on `input_ids` (B, T), its MLPs and norms in chunks; returns its output object.

    With a `cache`, the keys and values of the text join it.
    """
    base = base_of(model)
    with chunked_modules(base):
        return base(input_ids=input_ids, position_ids=position_ids, **with_cache(base, cache))
