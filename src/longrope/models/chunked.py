"""Computes head, MLPs and norms of a long text some positions at a time, so that memory stays O(T·hidden).

Scoring, the training loss and the standalone model all compute through this file. Each of these layers treats every
position alone, so the pieces together are the whole. Attention is not here: its kernels are O(T) already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longrope.errors import LongRopeError
from longrope.models.config import LayerInputs
from longrope.models.layer_inputs import computed_again, store_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_BUDGET = 2**25  # numbers in one piece of logits: 128 MiB in float32
MLP_CHUNK = 2048  # positions that an MLP takes at once
NORM_CHUNKS = 4  # times as many does a norm take: fewer would save nothing beside attention's inputs
BACKWARD_BUDGET = 2**25  # numbers inside an MLP or a norm in one piece, where the backward pass computes it again
NORM_NUMBERS = 4  # times the hidden size are the numbers inside a norm, in float32
_POSITION_WISE = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe")
_Forward = Callable[..., Any]


def logits_chunk(vocabulary: int, batch: int = 1) -> int:
    """Positions of `batch` texts whose logits fit the budget; at least 1."""
    return max(1, LOGITS_BUDGET // (batch * vocabulary))


def in_pieces(function: Callable[..., Tensor], size: int, *wholes: Tensor) -> Tensor:
    """`function` of pieces of `size` positions of each of `wholes` (·, T, …), its results put together along T."""
    pieces = zip(*(torch.split(whole, size, dim=1) for whole in wholes), strict=True)
    return join(function(*next(pieces)), (function(*piece) for piece in pieces), wholes[0].shape[1])


def join(first: Tensor, rest: Iterable[Tensor], length: int) -> Tensor:
    """Pieces along T, the `first` of them as long as all but the last, as one tensor of `length` positions.

    Without a gradient to carry, every piece is written to its place as it comes: no second copy of the result exists.
    """
    size = first.shape[1]
    if size == length:
        return first
    if first.requires_grad:
        return torch.cat([first, *rest], dim=1)
    out = first.new_empty(first.shape[0], length, *first.shape[2:])
    out[:, :size] = first
    for at, piece in enumerate(rest, start=1):
        out[:, at * size : (at + 1) * size] = piece
    return out


# A transformers model below its head, and the head alone.


def base_of(model: PreTrainedModel) -> nn.Module:
    """The model below the head. Raises LongRopeError when `model` has no head."""
    base: nn.Module = model.base_model
    if base is model:  # its prefix is another model's (the text models of Llama 4 and Mllama)
        base = getattr(model, "model", model)
    if base is model:
        raise LongRopeError(
            f"expected a causal language model with a head, found {type(model).__name__} without one", code="no-head"
        )
    return base


def head_logits(forward: _Forward, base: nn.Module, output: Any, hidden: Tensor) -> Tensor:
    """Hidden states (B, C, H) -> logits (B, C, V) by the family's own code: heads tied or not, soft caps, scales.

    `forward` is the model's, which runs around a `base` that returns `hidden`; `output` is what the base returned.
    """
    given = type(output)(last_hidden_state=hidden)
    with replaced_forward(base, lambda *_, **__: given):
        logits: Tensor = forward(inputs_embeds=hidden, use_cache=False).logits
    return logits


@contextmanager
def replaced_forward(module: nn.Module, forward: _Forward) -> Iterator[None]:
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


# MLPs and norms in chunks; layers that are computed again for the backward pass.


@contextmanager
def chunked_modules(base: nn.Module, wrap: Callable[[_Forward], _Forward] | None = None) -> Iterator[None]:
    """Every MLP and norm runs on pieces of the sequence in the block, each piece by `wrap` of its forward.

    With a `wrap`, which computes a piece again, pieces are as large as BACKWARD_BUDGET allows.
    """
    with ExitStack() as stack:
        for module in _position_wise_modules(base):
            if not isinstance(module.forward, _InChunks):  # a block around this one may have done it
                size = MLP_CHUNK * (NORM_CHUNKS if wrap is None and _is_norm(module) else 1)
                if wrap is not None:
                    size = backward_piece(_numbers_inside(module))
                chunks = _InChunks(module.forward, size, wrap or (lambda forward: forward))
                stack.enter_context(replaced_forward(module, chunks))
        yield


def backward_piece(numbers: int) -> int:
    """Positions in a piece of an MLP or a norm that is computed again in the backward pass, which holds `numbers`
    numbers of each. A text of one piece is computed again with its layer, at no cost of its own."""
    return max(MLP_CHUNK, BACKWARD_BUDGET // max(1, numbers))


def _numbers_inside(module: nn.Module) -> int:
    """Numbers of one position inside an MLP, by its weights or the outputs of its layers (packed weights are few); of a
    norm a few times its own width."""
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    if not weights:
        return NORM_NUMBERS * max((parameter.numel() for parameter in module.parameters()), default=BACKWARD_BUDGET)
    hidden = min(size for weight in weights for size in weight.shape)
    outputs = sum(getattr(part, "out_features", 0) for part in module.modules())
    return max(outputs, sum(weight.numel() for weight in weights) // hidden)


@contextmanager
def checkpointed_layers(model: PreTrainedModel, layer_inputs: LayerInputs = "keep") -> Iterator[None]:
    """Every decoder layer keeps only its input for the backward pass and computes the rest again, its MLP and norms in
    chunks. `layer_inputs`: where the inputs are kept until then, or whether they are made again too.

    transformers' own gradient checkpointing works in training mode only, where dropout would be on.
    """
    base = base_of(model)
    with ExitStack() as stack:
        # A layer that is computed again must take the same steps, so it works in chunks until the block ends. It would
        # keep the outputs of MLP and norms for all chunks in its backward pass: they are made again, too, chunk by
        # chunk.
        stack.enter_context(chunked_modules(base, checkpointed))
        layers = list(_layers(base))
        store = store_for(layer_inputs, len(layers))
        for layer in layers:
            again = checkpointed(layer.forward) if store is None else computed_again(layer.forward, store)
            stack.enter_context(replaced_forward(layer, again))
        yield


def checkpointed(forward: _Forward) -> _Forward:
    """`forward`, keeping its inputs only and computed again in the backward pass."""
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost module lists: a layer's own lists (of experts, say) are inside it."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _position_wise_modules(base: nn.Module) -> list[nn.Module]:
    def alone(name: str, module: nn.Module) -> bool:
        return _is_norm(module) or name.rpartition(".")[2] in _POSITION_WISE

    return [module for name, module in base.named_modules() if alone(name, module)]


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and not isinstance(module, nn.GroupNorm)


@dataclass(frozen=True)
class _InChunks:
    """`forward`, wrapped, on pieces of `size` positions of its only argument (B, T, H); other arguments stay whole."""

    forward: _Forward
    size: int
    wrap: Callable[[_Forward], _Forward]

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
        return join(first, (forward(piece) for piece in pieces), hidden.shape[1])
