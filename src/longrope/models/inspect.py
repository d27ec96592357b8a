"""The rotary embedding of a model: geometry, periods, critical dimensions and present scaling. No weights are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from longrope.models.checkpoint_files import states_original_length
from longrope.models.loading import config_and_scaling, name_of
from longrope.models.weightless import weightless
from longrope.rope.geometry import (
    original_length_guess,
    rope_layer_types,
    rope_parameters_of,
    scaled_layer_type,
    stated_window,
    text_config,
)
from longrope.units import format_length, parse_length


@dataclass(frozen=True, slots=True)
class Inspection:
    """Geometry, critical dimensions and the scaling present. Lengths and periods in tokens.

    `critical_dim` is the theoretical one (LongRoPE2 Eq. 7); `critical_dim_10` the first pair with fewer than ten
    periods, where LongRoPE2 starts looking for the real one. `slowest_period` is that of the last pair.
    `context_window` is the window that the config states, or the end of the present scaling where that is longer.
    `original_length_guess` says how L was guessed; empty where the config states it, or it was given.
    """

    model: str
    model_type: str
    rotary_dim: int
    pairs: int
    base: float
    original_length: int
    original_length_guess: str
    context_window: int
    rope_type: str
    layer_types: list[str]
    scaled_layers: str | None
    sliding_window: int | None
    critical_dim: int
    critical_dim_10: int
    fastest_period: float
    slowest_period: float
    existing_windows: list[dict[str, Any]]

    def rows(self) -> list[tuple[str, str]]:
        """The inspection as a person reads it: a name and its value each."""
        rows = [("original window L", _tokens(self.original_length))]
        if self.original_length_guess:
            rows.append(("  a guess", self.original_length_guess))
        if self.context_window != self.original_length:
            rows.append(("window of the checkpoint", _tokens(self.context_window)))
        rows += [
            ("rotary dimension", f"{self.rotary_dim} ({self.pairs} pairs), base {self.base:g}"),
            ("periods", f"{self.fastest_period:.2f} … {self.slowest_period:,.0f} tokens"),
            (
                "critical dimension",
                f"pair {self.critical_dim} (fewer than 10 periods from pair {self.critical_dim_10})",
            ),
            ("rope type", self.rope_type),
        ]
        if self.layer_types:
            rows.append(("one RoPE per layer type", f"{', '.join(self.layer_types)}; {self.scaled_layers} is scaled"))
        if self.sliding_window:
            rows.append(("sliding window", f"{self.sliding_window} tokens: layers that slide never look further"))
        for window in self.existing_windows:
            factors = f"λ {window['first_factor']:g} … {window['last_factor']:g}"
            name = f"scaling present, ≤ {window['max_length']}"
            rows.append((name, f"{factors}, attention factor {window['attention_factor']:g}"))
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"{self.model} ({self.model_type})", *(f"{name:{width}}  {value}" for name, value in rows)])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _tokens(length: int) -> str:
    """`8192 tokens (8k)`; the short form only where it is one."""
    short = format_length(length)
    return f"{length} tokens" + ("" if short == str(length) else f" ({short})")


def inspect_model(
    model: PreTrainedModel | Path | str, *, original_length: int | str | None = None, trust_remote_code: bool = False
) -> Inspection:
    """Describe a model's rotary embedding.

    `model` is a transformers model, a folder, a hub name or the name of an embedded model; `original_length` is the
    window that it was trained with, where its config is wrong. Raises LongRopeError when there is no such model, or it
    has no RoPE.
    """
    length = None if original_length is None else parse_length(original_length)
    config, geometry, checkpoint_scaling = config_and_scaling(model, length, trust_remote_code=trust_remote_code)
    if not isinstance(model, PreTrainedModel):
        weightless(str(model), trust_remote_code=trust_remote_code)  # refuses what a search would refuse
    text = text_config(config)
    stated = stated_window(config) or geometry.original_length
    windows = [
        {
            "max_length": window.max_length,
            "first_factor": window.factors[0],
            "last_factor": window.factors[-1],
            "attention_factor": window.attention_factor,
        }
        for window in (checkpoint_scaling.windows if checkpoint_scaling else ())
    ]
    guess = original_length_guess(config) if length is None else ""
    if guess and not isinstance(model, PreTrainedModel) and states_original_length(str(model)):
        guess = ""
    uses_sliding = getattr(text, "use_sliding_window", True)
    return Inspection(
        model=name_of(model) if isinstance(model, PreTrainedModel) else str(model),
        model_type=text.model_type,
        rotary_dim=geometry.rotary_dim,
        pairs=geometry.pairs,
        base=geometry.base,
        original_length=geometry.original_length,
        original_length_guess=guess,
        context_window=stated if checkpoint_scaling is None else max(stated, checkpoint_scaling.target_length),
        rope_type=rope_parameters_of(config)["rope_type"],
        layer_types=rope_layer_types(config),
        scaled_layers=scaled_layer_type(config),
        sliding_window=getattr(text, "sliding_window", None) if uses_sliding else None,
        critical_dim=geometry.critical_dim(),
        critical_dim_10=geometry.critical_dim(10),
        fastest_period=float(geometry.periods[0]),
        slowest_period=float(geometry.periods[-1]),
        existing_windows=windows,
    )
