"""The windows that the scaling of a search will have: those of the checkpoint that stay, and the one that is searched.

transformers and all other runtimes know two windows, short and long, with one attention factor, and leave the first
where the original length says. Before it begins, a search names the parts of its scaling that no checkpoint can state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.models.rope_readers import keys_read_by_attention
from longrope.models.scaled import ScaledModel
from longrope.models.twin import can_be_tried, logit_error
from longrope.rope.closed_forms import CLOSED_FORMS
from longrope.rope.geometry import rope_parameters_of
from longrope.rope.hf_config import scaling_of_config, switch_is_read, unsupported_by_transformers
from longrope.rope.scaling import RopeScaling, Window


def kept_windows(loaded: LoadedModel) -> RopeScaling | None:
    """The part of the checkpoint's scaling that stays beside a window found for longer texts; None without a scaling.

    It is the whole scaling where longrope recorded it beside the checkpoint. Of a scaling that only config.json states
    it is the first window, because a checkpoint can state two. It ends at the original length where the family's
    attention reads that length.
    """
    carried = loaded.checkpoint_scaling
    if carried is None:
        return None
    config = loaded.model.config
    stated = scaling_of_config(config, original_length=loaded.geometry.original_length)
    if stated is None or stated.windows != carried.windows:
        return carried
    first = carried.windows[0]
    original = rope_parameters_of(config).get("original_max_position_embeddings")
    if original is not None and original < first.max_length and switch_is_read(keys_read_by_attention(config)):
        first = replace(first, max_length=int(original))
    return replace(carried, windows=(first,))


def extended_by(loaded: LoadedModel, kept: RopeScaling | None, best: Window) -> RopeScaling:
    """`best` beside the windows that are kept; without any, beside the original RoPE up to L."""
    if kept is None or loaded.checkpoint_scaling is None:
        return RopeScaling.extended(
            loaded.geometry, best.max_length, best.factors, best.start_tokens, best.attention_factor
        )
    return replace(kept, provenance={"carried": loaded.checkpoint_scaling.provenance}).with_window(best)


def notes_before(
    scaled_model: ScaledModel, loaded: LoadedModel, kept: RopeScaling | None, target_length: int, start: Any, m: float
) -> list[str]:
    """Notes for the user before the search, one sentence each; none where an export will state the whole scaling.

    `start`: the start tokens that are searched; `m`: the attention factor. Raises LongRopeError (`not-expressible`)
    where no checkpoint of this family can state a scaling.
    """
    notes = []
    carried = loaded.checkpoint_scaling
    if kept is not None and carried is not None and kept.windows != carried.windows:
        first = kept.windows[0].max_length
        notes.append(
            f"texts of {first + 1} to {carried.target_length} tokens get the factors that are found, in place of the"
            f" checkpoint's: a checkpoint can state two windows, and this one's first ends at {first}"
        )
    factors, _ = CLOSED_FORMS["yarn"](loaded.geometry, target_length)
    preview = extended_by(loaded, kept, Window(target_length, tuple(factors.tolist()), 0, m))
    unsupported = unsupported_by_transformers(preview)
    if str(start) not in ("0", "(0,)"):
        unsupported.append("start tokens, if the search finds any")
    if unsupported:
        notes.append(
            f"an export to transformers will lose {', and '.join(unsupported)} (its --allow-lossy leaves them out)"
        )
    if can_be_tried(scaled_model.model):
        notes += _refused_forms(scaled_model, preview)
    return notes


def _refused_forms(scaled_model: ScaledModel, preview: RopeScaling) -> list[str]:
    """A note where only the form hf-unified can be exported; LongRopeError where none can."""
    model = type(scaled_model.model).__name__
    try:
        error = logit_error(scaled_model, preview)
    except LongRopeError as refused:
        if refused.code != "not-expressible":
            raise
        error, reason = float("inf"), refused.message
    else:
        reason = f"{model} computes other logits from its config, by {error:.2g} of the largest"
    if error == 0.0:
        return []
    short, long = preview.windows[0], preview.windows[-1]
    unified = replace(preview, windows=(replace(long, max_length=short.max_length), long))
    if logit_error(scaled_model, unified) == 0.0:
        return [f"the scaling can be exported to hf-unified only, with the long factors at every length: {reason}"]
    raise LongRopeError(f"no checkpoint of this family can state a scaling: {reason}", code="not-expressible")
