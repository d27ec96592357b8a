"""What a form of checkpoint says of a scaling: its two regimes, the attention factor it states, and what is folded.

`hf` keeps the short and the long factors. `hf-unified` has the long factors in both places: one regime, which every
runtime applies alike, at the price of the short window. `phi3` is `hf` relabelled as Phi-3 (`phi3.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from longrope.errors import LongRopeError
from longrope.export.losses import transformers_scaling
from longrope.files import sha256_text
from longrope.rope.factors import su_attention_factor
from longrope.rope.scaling import RopeScaling, Window

HF, UNIFIED, PHI3 = "hf", "hf-unified", "phi3"
FORMS = (HF, UNIFIED, PHI3)
RECORD = "longrope"
"""The key of config.json that says how the checkpoint was exported; `save_pretrained` of other tools keeps it."""


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
        return {"form": self.form, "query_scale": self.query_scale, "scaling_sha256": numbers_sha256(self.given)}


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


def forced_attention_factor(expressed: RopeScaling) -> float:
    """`su` of the two lengths in config.json: what vLLM, SGLang, MLX and ExLlamaV3 compute where nothing else is said.

    √(1 + ln(L'/L0)/ln L0), where L0 is the first window's length, at which runtimes switch.
    """
    short, long = expressed.windows
    return su_attention_factor(replace(expressed.geometry, original_length=short.max_length), long.max_length)


def is_forced(expressed: RopeScaling) -> bool:
    """Whether the attention factor is the one that every runtime computes by itself."""
    return abs(expressed.windows[-1].attention_factor / forced_attention_factor(expressed) - 1.0) < 1e-9


def numbers_sha256(scaling: RopeScaling) -> str:
    """SHA-256 of a scaling's numbers, whatever its provenance."""
    return sha256_text(replace(scaling, provenance={}).to_json())


def refuse_folded(record: Any, model_name: str) -> None:
    """Raise LongRopeError when `record`, what config.json has under RECORD, says that a factor is in the weights."""
    if isinstance(record, dict) and record.get("query_scale", 1.0) != 1.0:
        raise LongRopeError(
            f"{model_name} is an export with an attention factor folded into its weights; "
            "export from the model that it was made from"
        )


def _with_attention_factor(scaling: RopeScaling, attention_factor: float) -> RopeScaling:
    windows = tuple(
        Window(window.max_length, window.factors, window.start_tokens, attention_factor) for window in scaling.windows
    )
    return replace(scaling, windows=windows)
