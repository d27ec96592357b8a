"""Checks for NaN and infinity, which are never a result: the error names dtype and length, and a remedy."""

from __future__ import annotations

from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from longrope.errors import LongRopeError


def require_finite(model: PreTrainedModel, values: Tensor, what: str, length: int) -> None:
    """Raise LongRopeError (`not-finite`) where `values`, computed by `model` on `length` tokens, hold NaN or infinity.

    `what` names them, with its verb: "the loss is".
    """
    if not bool(values.isfinite().all()):
        raise not_finite(model, what, length)


def require_finite_logits(model: PreTrainedModel, logits: Tensor, length: int) -> None:
    """Raise LongRopeError where logits (…, V) are not finite: one token may be ruled out by −infinity, but not all of
    them.

    Raises LongRopeError (`not-finite`).
    """
    require_finite(model, logits.amax(-1), "the logits are", length)


def not_finite(model: PreTrainedModel, what: str, length: int) -> LongRopeError:
    """The error for `what` ("the loss is") that is not finite on `length` tokens.

    The weights are looked through: where they are to blame, it says so.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    message = f"{what} not finite (NaN or infinity) at {length} tokens in {dtype}"
    try:
        require_sound_weights(model)
    except LongRopeError as error:
        return LongRopeError(f"{message}: {error.message}", code=error.code, hint=error.hint)
    return LongRopeError(message, code="not-finite", hint=remedy(dtype))


def require_sound_weights(model: PreTrainedModel) -> None:
    """Raise LongRopeError (`not-finite`) where a weight of `model` is NaN or infinite."""
    broken = _broken_weight(model)
    if broken is None:
        return
    dtype = str(model.dtype).removeprefix("torch.")
    hint = "the checkpoint is damaged: give a sound one"
    if dtype == "float16":
        hint = "try `dtype=float32`: numbers beyond 65,504 overflow in float16; if that fails too, the file is damaged"
    raise LongRopeError(f"the weight {broken} holds NaN or infinity itself in {dtype}", code="not-finite", hint=hint)


def remedy(dtype: str) -> str:
    """The remedy where a model of sound weights computes NaN or infinity in `dtype`, in words."""
    if dtype == "float16":
        return "try `dtype=bfloat16` or `dtype=float32`: numbers beyond 65,504 overflow in float16"
    if dtype == "bfloat16":
        return "try `dtype=float32`, `attn_implementation=eager`, or a shorter length"
    return "try `attn_implementation=eager`, other factors, or a shorter length"


def _broken_weight(model: nn.Module) -> str | None:
    """The first weight that holds NaN or infinity; None where all are sound."""
    for place, module in model.named_modules():
        with align_module_device(module):  # loads weights that a device_map has moved away
            for name, weight in module.named_parameters(recurse=False):
                if weight.device.type != "meta" and not bool(weight.isfinite().all()):
                    return f"{place}.{name}".lstrip(".")
    return None
