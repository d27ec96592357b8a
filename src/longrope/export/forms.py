"""A scaling as a Hugging Face checkpoint expresses it: two windows, one attention factor, no start tokens.

The three forms are `hf`, with the short and the long factors; `hf-unified`, with the long factors in both places, so
that every runtime computes the same at every length, at the price of short texts; and `phi3`, which is `hf` under the
Phi-3 architecture (`phi3.py`). An export stops at the parts of a scaling that its form cannot express, or drops them
where the user allows it and names each one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from longrope.errors import LongRopeError
from longrope.export.config import FORMS, UNIFIED
from longrope.models.checkpoint_files import export_record
from longrope.rope.hf_config import (
    default_attention_factor,
    has_default_attention_factor,
    refuse_unsupported,
    transformers_scaling,
    unsupported_by_transformers,
)
from longrope.rope.scaling import RopeScaling


def unsupported_parts(scaling: RopeScaling, runtime: str, allow_lossy: bool) -> list[str]:
    """The parts of `scaling` that neither transformers nor llama.cpp (`runtime`) can express.

    Raises LongRopeError (`not-expressible`) where there are any, unless the user allows their loss.
    """
    unsupported = unsupported_by_transformers(scaling)
    refuse_unsupported([] if allow_lossy else unsupported, runtime, "pass `allow_lossy=True` to export the rest")
    return unsupported


@dataclass(frozen=True, slots=True)
class ExpressedScaling:
    """A scaling as one form of checkpoint expresses it."""

    form: str
    """hf, hf-unified or phi3."""
    given: RopeScaling
    """The scaling that is exported."""
    effective: RopeScaling
    """The two windows that the checkpoint computes."""
    stated: RopeScaling
    """The two windows in its config: the effective ones, but for an attention factor that is folded into weights."""

    @property
    def query_scale(self) -> float:
        """(m/m_stated)², the factor of the queries' weights: logits are q·k·m_stated², and must be q·k·m²."""
        wanted, stated = (scaling.windows[-1].attention_factor for scaling in (self.effective, self.stated))
        return (wanted / stated) ** 2

    @property
    def switch(self) -> int:
        """`original_max_position_embeddings`: the most tokens for which runtimes use the short factors."""
        return self.stated.windows[0].max_length

    @property
    def one_regime(self) -> bool:
        """True if short and long factors are the same."""
        short, long = self.stated.windows
        return short.factors == long.factors

    def record(self) -> dict[str, Any]:
        """The entry in config.json from which `longrope fix-config` can write the config again."""
        return export_record(self.given, self.form, self.query_scale)


def express(scaling: RopeScaling, form: str, fold_attention_factor: bool = False) -> ExpressedScaling:
    """Express `scaling` in `form`, without the parts that transformers does not support.

    With `fold_attention_factor` the config states the attention factor that runtimes compute by themselves, and the
    weights carry the rest, so that all runtimes agree. Nothing is folded where the two are the same.

    Raises LongRopeError for an unknown form, or a scaling that does not reach beyond the original window.
    """
    if form not in FORMS:
        raise LongRopeError(f"expected a form of {', '.join(FORMS)}; found {form!r}", code="invalid-setting")
    effective = transformers_scaling(scaling)
    if form == UNIFIED:
        short, long = effective.windows
        effective = replace(effective, windows=(replace(short, factors=long.factors), long))
    stated = effective
    if fold_attention_factor and not has_default_attention_factor(effective):
        m = default_attention_factor(effective)
        windows = tuple(replace(window, attention_factor=m) for window in effective.windows)
        stated = replace(effective, windows=windows)
    return ExpressedScaling(form, scaling, effective, stated)


def notes_on(expressed: ExpressedScaling) -> list[str]:
    """The consequences of a form for its user, one line each: the price of one regime, of folding, of not folding."""
    switch = expressed.switch
    wanted, stated = (scaling.windows[-1].attention_factor for scaling in (expressed.effective, expressed.stated))
    notes = []
    if expressed.form == UNIFIED:
        notes.append(
            f"One set of factors at every length: texts of up to {switch} tokens get the long factors too and are not "
            "read as by the source model. That is the price of computing the same in every runtime; `longrope eval` "
            f"on this folder at {switch} tokens measures it."
        )
    if expressed.query_scale != 1.0:
        notes.append(
            f"The attention factor {wanted:.6g} is folded into the queries: their weights are multiplied by "
            f"{expressed.query_scale:.6g} and rounded to their dtype once, and the config states {stated:.6g}, which "
            "runtimes compute from the lengths whatever it says. Logits are those of the unfolded scaling at every "
            "length up to that rounding. Inside the original window they are close to what they would be unfolded, "
            "not equal bit for bit, and a runtime that drops the scaling computes wrong attention there too."
        )
    elif not has_default_attention_factor(expressed.stated):
        notes.append(
            "MLX and ExLlamaV3 compute an attention factor of "
            f"{default_attention_factor(expressed.stated):.6g} from the lengths whatever the config says; this scaling "
            f"has {stated:.6g}. With --fold-attention-factor all agree."
        )
    return notes
