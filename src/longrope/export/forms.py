"""What a form of checkpoint says of a scaling: its two regimes, the attention factor it states, and what is folded.

`hf` keeps the short and the long factors. `hf-unified` has the long factors in both places: one regime, which every
runtime applies alike, at the price of the short window. `phi3` is `hf` relabelled as Phi-3 (`phi3.py`).

What a runtime cannot express of a scaling. Nothing is lost in silence: an export stops, or names the loss.

What a form means for its user beyond what it loses: the price of one regime, of folding, or of not folding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from longrope.errors import LongRopeError
from longrope.export.config import FORMS, UNIFIED
from longrope.models.checkpoint_files import export_record
from longrope.rope.hf_config import forced_attention_factor, is_forced, transformers_scaling
from longrope.rope.scaling import RopeScaling, Window


@dataclass(frozen=True, slots=True)
class Expression:
    """A scaling as one form expresses it.

    `effective` is what the checkpoint computes of the `given` scaling; `stated` what its config says, which has another
    attention factor where the difference is folded into the queries; both have two windows.
    """

    form: str
    given: RopeScaling
    effective: RopeScaling
    stated: RopeScaling

    @property
    def query_scale(self) -> float:
        """What the queries' weights are multiplied by, (m/m_stated)²: logits are q·k·m_stated², and shall be q·k·m²."""
        wanted, stated = (scaling.windows[-1].attention_factor for scaling in (self.effective, self.stated))
        return (wanted / stated) ** 2

    @property
    def switch(self) -> int:
        """Tokens up to which runtimes with two regimes use the short factors: `original_max_position_embeddings`."""
        return self.stated.windows[0].max_length

    @property
    def one_regime(self) -> bool:
        """Whether short and long factors are the same."""
        short, long = self.stated.windows
        return short.factors == long.factors

    def record(self) -> dict[str, Any]:
        """What config.json keeps, so that `longrope fix-config` can write it again."""
        return export_record(self.given, self.form, self.query_scale)


def express(scaling: RopeScaling, form: str, fold_attention_factor: bool = False) -> Expression:
    """`scaling` as `form` expresses it.

    With `fold_attention_factor` the config states the factor that runtimes compute from the lengths whatever it says
    (`forced_attention_factor`), and the weights carry the rest, so that all runtimes agree. Nothing is folded where
    the two are the same.

    Raises LongRopeError for an unknown form, or a scaling that does not reach beyond the original window.
    """
    if form not in FORMS:
        raise LongRopeError(f"expected a form of {', '.join(FORMS)}; found {form!r}")
    effective = transformers_scaling(scaling)
    if form == UNIFIED:
        short, long = effective.windows
        effective = replace(effective, windows=(replace(short, factors=long.factors), long))
    stated = effective
    if fold_attention_factor and not is_forced(effective):
        stated = _with_attention_factor(effective, forced_attention_factor(effective))
    return Expression(form, scaling, effective, stated)


def _with_attention_factor(scaling: RopeScaling, attention_factor: float) -> RopeScaling:
    windows = tuple(
        Window(window.max_length, window.factors, window.start_tokens, attention_factor) for window in scaling.windows
    )
    return replace(scaling, windows=windows)


def require_lossless(losses: list[str], target: str, allow_lossy: bool) -> None:
    """Raise LongRopeError when something would be lost and the user has not said that it may be."""
    if losses and not allow_lossy:
        raise LongRopeError(
            f"{target} cannot express this scaling; it would lose {'; '.join(losses)}. "
            "Add --allow-lossy to export all the same"
        )


def notes_on(expression: Expression) -> list[str]:
    """One line each, for the model card and the terminal."""
    switch = expression.switch
    wanted, stated = (scaling.windows[-1].attention_factor for scaling in (expression.effective, expression.stated))
    notes = []
    if expression.form == UNIFIED:
        notes.append(
            f"One set of factors at every length: texts of up to {switch} tokens get the long factors too and are not "
            "read as by the source model. That is the price of computing the same in every runtime; `longrope eval` "
            f"on this folder at {switch} tokens measures it."
        )
    if expression.query_scale != 1.0:
        notes.append(
            f"The attention factor {wanted:.6g} is folded into the queries: their weights are multiplied by "
            f"{expression.query_scale:.6g} and rounded to their dtype once, and the config states {stated:.6g}, which "
            "runtimes compute from the lengths whatever it says. Logits are those of the unfolded scaling at every "
            "length up to that rounding. Inside the original window they are close to what they would be unfolded, "
            "not equal bit for bit, and a runtime that drops the scaling computes wrong attention there too."
        )
    elif not is_forced(expression.stated):
        notes.append(
            "MLX and ExLlamaV3 compute an attention factor of "
            f"{forced_attention_factor(expression.stated):.6g} from the lengths whatever the config says; this scaling "
            f"has {stated:.6g}. With --fold-attention-factor all agree."
        )
    return notes
