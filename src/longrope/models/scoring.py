"""Memory-bounded scoring: the loss of every token, with logits, MLPs and norms of a piece of the text at a time.

Peak memory is O(T·hidden) for the hidden states and the attention's keys and values, not O(T·vocabulary): with
131,072 tokens and a vocabulary of 128,256 the logits alone would be 67 GB in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from longrope.errors import LongRopeError

MLP_CHUNK = 2048  # positions that an MLP or a norm takes at once
_LOGITS_BUDGET = 2**25  # numbers in one piece of logits: 128 MiB in float32
_Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
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

    `input_ids` (B, T) -> (B, T − 1 − start), float32, or float64 for a float64 model: entry j is
    −log p(token start+j+1 | tokens 0 … start+j). `chunk_size` is the number of positions whose logits exist at once (by
    default what fits 128 MiB). The family's own code makes the logits, so tied heads, biases, soft-capping and logit
    scaling are right by construction. The model should be in eval mode; gradients flow if they are enabled.

    Raises LongRopeError when there is no next token to score.
    """
    batch, length = input_ids.shape
    if start < 0:
        raise LongRopeError(f"expected a start of 0 or more, found {start}")
    if start >= length - 1:
        raise LongRopeError(f"expected at least {start + 2} tokens to score, found {length}")
    output = run_base(model, input_ids, position_ids)
    hidden_BTH = output.last_hidden_state[:, start:-1]
    targets = input_ids[:, start + 1 :]
    if chunk_size is None:
        chunk_size = _chunk_size(model, batch)

    def piece(hidden: Tensor, target: Tensor) -> Tensor:
        logits = _head(model, output, hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        return nll.view_as(target)

    # With gradients, a piece's logits are made again in the backward pass instead of being kept.
    scored = _checkpointed(piece) if torch.is_grad_enabled() else piece
    starts = range(0, targets.shape[1], chunk_size)
    return torch.cat(
        [scored(hidden_BTH[:, at : at + chunk_size], targets[:, at : at + chunk_size]) for at in starts], dim=1
    )


def top_tokens(model: PreTrainedModel, input_ids: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """The most likely next token after every position: `input_ids` (B, T) -> int64 (B, T).

    `chunk_size` is the number of positions whose logits exist at once (by default what fits 128 MiB).
    """
    output = run_base(model, input_ids)
    if chunk_size is None:
        chunk_size = _chunk_size(model, input_ids.shape[0])
    pieces = torch.split(output.last_hidden_state, chunk_size, dim=1)
    return torch.cat([_head(model, output, piece).argmax(-1) for piece in pieces], dim=1)


def last_logits(model: PreTrainedModel, input_ids: Tensor, count: int) -> Tensor:
    """Logits (B, count, V) of the last `count` positions of `input_ids` (B, T), made from the whole text."""
    output = run_base(model, input_ids)
    return _head(model, output, output.last_hidden_state[:, -count:])


@contextmanager
def checkpointed_layers(model: PreTrainedModel) -> Iterator[None]:
    """Every decoder layer keeps only its input for the backward pass and computes the rest again, its MLP and norms in
    chunks.

    transformers' own gradient checkpointing works in training mode only, where dropout would be on.
    """
    base = _base_model(model)
    with ExitStack() as stack:
        # A layer that is computed again must take the same steps, so it works in chunks until the block ends. It would
        # keep what MLP and norms make of all chunks for its backward pass: that is made again, too, chunk by chunk.
        stack.enter_context(_chunked_modules(base, _checkpointed))
        for layer in _layers(base):
            stack.enter_context(_replaced_forward(layer, _checkpointed))
        yield


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost module lists: a layer's own lists (of experts, say) are inside it."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _base_model(model: PreTrainedModel) -> nn.Module:
    base: nn.Module = model.base_model
    if base is model:
        raise LongRopeError(f"expected a causal language model with a head, found {type(model).__name__} without one")
    return base


def run_base(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None, cache: Cache | None = None
) -> Any:
    """What the model below the head returns for `input_ids` (B, T), its MLPs and norms run in chunks.

    With a `cache`, the keys and values of the text join it.
    """
    base = _base_model(model)
    with _chunked_modules(base):
        return base(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=cache is not None)


def _chunk_size(model: PreTrainedModel, batch: int) -> int:
    """Positions of `batch` texts whose logits fit the budget."""
    return int(max(1, _LOGITS_BUDGET // (batch * model.config.get_text_config().vocab_size)))


def _head(model: PreTrainedModel, output: Any, hidden: Tensor) -> Tensor:
    """Hidden states (B, C, H) -> logits (B, C, V), by the model's own forward around a base model that returns them."""
    given = type(output)(last_hidden_state=hidden)
    with _replaced_forward(_base_model(model), lambda _: lambda *args, **kwargs: given):
        logits: Tensor = model(inputs_embeds=hidden, use_cache=False).logits
    return logits


@contextmanager
def _chunked_modules(base: nn.Module, wrap: _Wrap = lambda forward: forward) -> Iterator[None]:
    """Every position-wise module runs on pieces of the sequence in the block, each piece by `wrap` of its forward."""
    with ExitStack() as stack:
        for module in _position_wise_modules(base):
            if not isinstance(module.forward, _InChunks):  # a block around this one may have done it
                stack.enter_context(_replaced_forward(module, lambda forward: _InChunks(forward, MLP_CHUNK, wrap)))
        yield


def _position_wise_modules(base: nn.Module) -> list[nn.Module]:
    """The MLPs and norms: modules that treat every position alone."""

    def alone(name: str, module: nn.Module) -> bool:
        norm = type(module).__name__.endswith("Norm") and not isinstance(module, nn.GroupNorm)
        return norm or name.rpartition(".")[2] in _POSITION_WISE

    return [module for name, module in base.named_modules() if alone(name, module)]


@dataclass(frozen=True)
class _InChunks:
    """`forward`, wrapped, applied to pieces of `size` positions of its only argument (B, T, H); called otherwise, as it
    is."""

    forward: Callable[..., Any]
    size: int
    wrap: _Wrap

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or args[0].dim() != 3 or args[0].shape[1] <= self.size:
            return self.forward(*args, **kwargs)
        hidden: Tensor = args[0]
        # Contiguous: with more than one row in the batch a piece is not, and some families call view() on it.
        pieces = (piece.contiguous() for piece in torch.split(hidden, self.size, dim=1))
        forward = self.wrap(self.forward)
        first = forward(next(pieces))
        if not isinstance(first, Tensor):  # a router that returns more than its output: not for chunks
            return self.forward(hidden)
        if torch.is_grad_enabled():
            return torch.cat([first, *(forward(piece) for piece in pieces)], dim=1)
        out = first.new_empty(*hidden.shape[:2], first.shape[-1])
        out[:, : self.size] = first
        for at, piece in enumerate(pieces, start=1):
            out[:, at * self.size : (at + 1) * self.size] = forward(piece)
        return out


@contextmanager
def _replaced_forward(module: nn.Module, wrap: _Wrap) -> Iterator[None]:
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
