"""Memory-bounded scoring: the loss of every token, with logits, MLPs and norms of a piece of the text at a time.

Peak memory is O(T·hidden) for the hidden states and the attention's keys and values, not O(T·vocabulary): with
131,072 tokens and a vocabulary of 128,256 the logits alone would be 67 GB in float32. A text that several processes
share (`shared_texts.py`) is scored by all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.cache_argument import with_cache
from longrope.models.chunked import (
    base_of,
    checkpointed,
    checkpointed_layers,
    chunked_modules,
    head_logits,
    logits_chunk,
)
from longrope.models.config import LayerInputs
from longrope.models.devices import device_of
from longrope.models.scaled import ScaledModel
from longrope.rope.scaling import Window

SHARED = "_longrope_shared_texts"
"""The attribute of a model whose texts several processes share."""


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
    length = input_ids.shape[1]
    if start < 0:
        raise LongRopeError(f"expected a `start` of 0 or more, found {start}", code="invalid-setting")
    if start >= length - 1:
        raise LongRopeError(f"expected at least {start + 2} tokens to score, found {length}", code="too-short-text")
    if (shared := shared_texts(model)) is not None:
        losses: Tensor = shared.losses(input_ids, start, chunk_size)
        return losses
    output = run_base(model, input_ids, position_ids)
    return head_nll(model, output, output.last_hidden_state[:, start:-1], input_ids[:, start + 1 :], chunk_size)


def head_nll(
    model: PreTrainedModel, output: Any, hidden_BTH: Tensor, targets: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Negative log-likelihood of `targets` (B, T) after hidden states (B, T, H), which `run_base` gave in `output`."""
    piece = partial(_nll, model, output)
    # With gradients, a piece's logits are made again in the backward pass instead of being kept.
    scored = checkpointed(piece) if torch.is_grad_enabled() else piece
    return torch.cat([scored(*given) for given in _pieces(model, hidden_BTH, targets, chunk_size)], dim=1)


def head_loss(model: PreTrainedModel, output: Any, hidden: Tensor, targets: Tensor, divisor: float) -> Tensor:
    """Σ `head_nll` / `divisor` (float64), whose gradient by the hidden states is taken while a piece's logits are
    there: they are made once. No weight may take a gradient."""
    loss: Tensor = _HeadLoss.apply(hidden, targets, model, output, divisor)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, model: PreTrainedModel, output: Any, divisor: float
    ) -> Tensor:
        losses, gradients = [], []
        for piece, target in _pieces(model, hidden, targets):
            with torch.enable_grad():
                variable = piece.detach().requires_grad_()
                nll = _nll(model, output, variable, target)
                (nll.sum(dtype=torch.float64) / divisor).backward()  # type: ignore[no-untyped-call]
            assert variable.grad is not None
            losses.append(nll.detach())
            gradients.append(variable.grad)
        ctx.save_for_backward(torch.cat(gradients, dim=1))
        return torch.cat(losses, dim=1).sum(dtype=torch.float64) / divisor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient), None, None, None, None


def _pieces(
    model: PreTrainedModel, hidden: Tensor, targets: Tensor, chunk_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of hidden states (B, T, H) and their targets whose logits exist at once."""
    if chunk_size is None:
        chunk_size = logits_chunk(model.config.get_text_config().vocab_size, hidden.shape[0])
    return zip(*(torch.split(whole, chunk_size, dim=1) for whole in (hidden, targets)), strict=True)


def _nll(model: PreTrainedModel, output: Any, hidden: Tensor, target: Tensor) -> Tensor:
    """`head_nll` of one piece."""
    logits = head_logits(model, base_of(model), output, hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten().to(logits.device), reduction="none")
    return nll.view_as(target)


def loss_and_gradient(
    scaled: ScaledModel,
    window: Window,
    input_ids: Tensor,
    *,
    start: int = 0,
    divisor: float = 1.0,
    layer_inputs: LayerInputs = "keep",
) -> tuple[float, Tensor]:
    """Σ NLL / `divisor` of the tokens of `input_ids` (1, T) after `start`, and its derivatives by λ_0 … λ_{D−1} and the
    attention factor, float64 (D + 1,).

    Weights get no gradients; the activations of a layer are computed again in the backward pass, so memory stays near
    that of scoring, beside the inputs of layers that `layer_inputs` has on the device.
    """
    if (shared := shared_texts(scaled.model)) is not None:
        found: tuple[float, Tensor] = shared.loss_and_gradient(window, input_ids, start, divisor, layer_inputs)
        return found
    with differentiable(scaled, window, layer_inputs) as variables:
        loss = _text_loss(scaled.model, input_ids, start, divisor)
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), gradient_of(variables)


def _text_loss(model: PreTrainedModel, input_ids: Tensor, start: int, divisor: float) -> Tensor:
    output = run_base(model, input_ids)  # which the backward pass need not hold
    return head_loss(model, output, output.last_hidden_state[:, start:-1], input_ids[:, start + 1 :], divisor)


@contextmanager
def differentiable(
    scaled: ScaledModel, window: Window, layer_inputs: LayerInputs = "keep"
) -> Iterator[tuple[Tensor, Tensor]]:
    """In the block, losses under `window` have gradients in its factors (D,) and its attention factor, which it yields;
    a backward pass belongs into the block, where layers are computed again."""
    model = scaled.model
    model.eval()
    device = device_of(model)
    factors = torch.tensor(window.factors, dtype=torch.float64, device=device, requires_grad=True)
    attention_factor = torch.tensor(window.attention_factor, dtype=torch.float64, device=device, requires_grad=True)
    with (
        _frozen(model),
        checkpointed_layers(model, layer_inputs),
        torch.enable_grad(),
        scaled.using(window, factors, attention_factor),
    ):
        yield factors, attention_factor


def gradient_of(variables: tuple[Tensor, Tensor]) -> Tensor:
    """The gradients that a backward pass left in factors and attention factor, as (D + 1,)."""
    factors, attention_factor = variables
    assert factors.grad is not None
    assert attention_factor.grad is not None
    return torch.cat((factors.grad, attention_factor.grad[None]))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` takes a gradient in the block."""
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in before:
            parameter.requires_grad_(True)


def shared_texts(model: PreTrainedModel) -> Any:
    """What shares the texts of `model` among several processes (`shared_texts.LeadingShare`); None where nothing
    does."""
    return vars(model).get(SHARED)


def top_tokens(model: PreTrainedModel, input_ids: Tensor, *, start: int = 0, chunk_size: int | None = None) -> Tensor:
    """The most likely next token after every position from `start` on: `input_ids` (B, T) -> int64 (B, T − start).

    `chunk_size` is the number of positions whose logits exist at once (by default what fits 128 MiB).
    """
    if (shared := shared_texts(model)) is not None:
        tops: Tensor = shared.top_tokens(input_ids, start, chunk_size)
        return tops
    output = run_base(model, input_ids)
    return head_top(model, output, output.last_hidden_state[:, start:], chunk_size)


def answer_scores(model: PreTrainedModel, input_ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """`token_nll` (B, T − 1 − start) and `top_tokens` (B, T − start) from one forward of `input_ids` (B, T)."""
    if (shared := shared_texts(model)) is not None:
        both: tuple[Tensor, Tensor] = shared.answer_scores(input_ids, start)
        return both
    output = run_base(model, input_ids)
    hidden_BTH = output.last_hidden_state[:, start:]
    nll = head_nll(model, output, hidden_BTH[:, :-1], input_ids[:, start + 1 :])
    return nll, head_top(model, output, hidden_BTH)


def head_top(model: PreTrainedModel, output: Any, hidden_BTH: Tensor, chunk_size: int | None = None) -> Tensor:
    """The most likely token after hidden states (B, T, H), which `run_base` gave in `output`: int64 (B, T)."""
    base = base_of(model)
    if chunk_size is None:
        chunk_size = logits_chunk(model.config.get_text_config().vocab_size, hidden_BTH.shape[0])
    pieces = torch.split(hidden_BTH, chunk_size, dim=1)
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
