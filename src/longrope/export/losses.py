"""What a runtime cannot express of a scaling. Nothing is lost in silence: an export stops, or names the loss."""

from __future__ import annotations

from longrope.errors import LongRopeError
from longrope.rope.scaling import RopeScaling, Window


def transformers_losses(scaling: RopeScaling) -> list[str]:
    """What transformers' `longrope` cannot express of `scaling`, one phrase each; empty when it can express all.

    It has two regimes, short up to one length and long beyond, one list of factors each, one attention factor for both,
    and no start tokens.
    """
    losses = []
    windows = scaling.windows
    if len(windows) > 2:
        dropped = ", ".join(str(window.max_length) for window in windows[1:-1])
        losses.append(f"the windows to {dropped} tokens: transformers has two regimes and one switch")
    start_tokens = {window.max_length: window.start_tokens for window in windows if window.start_tokens}
    if start_tokens:
        found = ", ".join(f"{n_hat} (window to {length})" for length, n_hat in start_tokens.items())
        losses.append(f"the start tokens {found}: every position is rescaled")
    factors = {window.attention_factor for window in (windows[0], windows[-1])}
    if len(factors) > 1:
        losses.append(
            f"the attention factor {windows[0].attention_factor:g} of the short window: "
            f"{windows[-1].attention_factor:g} is used in both"
        )
    return losses


def transformers_scaling(scaling: RopeScaling) -> RopeScaling:
    """The part of `scaling` that transformers expresses: two windows, one attention factor, no start tokens.

    Raises LongRopeError when the scaling does not reach beyond the original window.
    """
    short, long = scaling.windows[0], scaling.windows[-1]
    original = scaling.geometry.original_length
    if long.max_length <= original:
        raise LongRopeError(
            f"expected a scaling that reaches beyond the original window of {original} tokens; this one ends at "
            f"{long.max_length}"
        )
    switch = short.max_length if len(scaling.windows) > 1 else original
    m = long.attention_factor
    windows = (Window(switch, short.factors, 0, m), Window(long.max_length, long.factors, 0, m))
    return RopeScaling(scaling.geometry, windows, scaling.provenance)


def require_lossless(losses: list[str], target: str, allow_lossy: bool) -> None:
    """Raise LongRopeError when something would be lost and the user has not said that it may be."""
    if losses and not allow_lossy:
        raise LongRopeError(
            f"{target} cannot express this scaling; it would lose {'; '.join(losses)}. "
            "Add --allow-lossy to export all the same"
        )
