"""Memory-bounded scoring: the loss of every token, with logits and MLP activations of a piece of the text at a time.

Peak memory is O(T·hidden) for the hidden states and the attention's keys and values, not O(T·vocabulary): with
131,072 tokens and a vocabulary of 128,256 the logits alone would be 67 GB in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from longrope.errors import LongRopeError

MLP_CHUNK = 2048
_LOGITS_BUDGET = 2**25  # numbers in one piece of logits: 128 MiB in float32
_POSITION_WISE = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe")


def token_nll(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    position_ids: Tensor | None = None,
    start: int = 0,
    chunk_size: int | None = None,
) -> Tensor:
    """Negative log-likelihood, in nats, of every next token.

    `input_ids` (B, T) -> float32 (B, T − 1 − start): entry j is −log p(token start+j+1 | tokens 0 … start+j).
    `chunk_size` is the number of positions whose logits exist at once (by default what fits 128 MiB). The family's own
    code makes the logits, so tied heads, biases, soft-capping and logit scaling are right by construction. The model
    should be in eval mode; gradients flow if they are enabled.

    Raises LongRopeError when there is no next token to score.
    """
    batch, length = input_ids.shape
    if start < 0:
        raise LongRopeError(f"expected a start of 0 or more, found {start}")
    if start >= length - 1:
        raise LongRopeError(f"expected at least {start + 2} tokens to score, found {length}")
    base = _base_model(model)
    with ExitStack() as stack:
        for module in _position_wise_modules(base):
            stack.enter_context(_replaced_forward(module, lambda forward: _in_chunks(forward, MLP_CHUNK)))
        output = base(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    hidden_BTH = output.last_hidden_state[:, start:-1]
    targets = input_ids[:, start + 1 :]
    if chunk_size is None:
        chunk_size = max(1, _LOGITS_BUDGET // (batch * model.config.get_text_config().vocab_size))
    pieces = []
    for at in range(0, targets.shape[1], chunk_size):
        logits = _head(model, base, output, hidden_BTH[:, at : at + chunk_size])
        target = targets[:, at : at + chunk_size]
        nll = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
        pieces.append(nll.view_as(target))
    return torch.cat(pieces, dim=1)


def _base_model(model: PreTrainedModel) -> nn.Module:
    base: nn.Module = model.base_model
    if base is model:
        raise LongRopeError(f"expected a causal language model with a head, found {type(model).__name__} without one")
    return base


def _head(model: PreTrainedModel, base: nn.Module, output: Any, hidden: Tensor) -> Tensor:
    """Hidden states (B, C, H) -> logits (B, C, V), by the model's own forward around a base model that returns them."""
    given = type(output)(last_hidden_state=hidden)
    with _replaced_forward(base, lambda _: lambda *args, **kwargs: given):
        logits: Tensor = model(inputs_embeds=hidden, use_cache=False).logits
    return logits


def _position_wise_modules(base: nn.Module) -> list[nn.Module]:
    """The MLPs of all layers and the final norm: modules that treat every position alone."""
    mlps = [module for name, module in base.named_modules() if name.rpartition(".")[2] in _POSITION_WISE]
    final_norms = [module for module in base.children() if type(module).__name__.endswith("Norm")]
    return mlps + final_norms


def _in_chunks(forward: Callable[..., Any], size: int) -> Callable[..., Any]:
    """`forward` applied to pieces of `size` positions of its only argument (B, T, H); called otherwise, as it is."""

    def chunked(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or args[0].dim() != 3 or args[0].shape[1] <= size:
            return forward(*args, **kwargs)
        hidden: Tensor = args[0]
        first = forward(hidden[:, :size])
        if not isinstance(first, Tensor):  # a router that returns more than its output: not for chunks
            return forward(hidden)
        if torch.is_grad_enabled():
            rest = [forward(hidden[:, at : at + size]) for at in range(size, hidden.shape[1], size)]
            return torch.cat([first, *rest], dim=1)
        out = first.new_empty(*hidden.shape[:2], first.shape[-1])
        out[:, :size] = first
        for at in range(size, hidden.shape[1], size):
            out[:, at : at + size] = forward(hidden[:, at : at + size])
        return out

    return chunked


@contextmanager
def _replaced_forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace `module.forward` on the instance for the length of the block; hooks keep working."""
    own = vars(module).get("forward")
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
