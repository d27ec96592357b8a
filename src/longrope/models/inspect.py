"""The rotary embedding of a model: geometry, periods, critical dimensions and present scaling. No weights are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from longrope.models.loading import config_and_scaling, name_of
from longrope.rope.geometry import rope_layer_types, rope_parameters_of, text_config
from longrope.units import parse_length


@dataclass(frozen=True, slots=True)
class Inspection:
    """Geometry, critical dimensions and the scaling present. Lengths and periods in tokens.

    `critical_dim` is the theoretical one (LongRoPE2 Eq. 7); `critical_dim_10` the first pair with fewer than ten
    periods, where LongRoPE2 starts looking for the real one. `slowest_period` is that of the last pair.
    `context_window` is the window that the config states, or the end of the present scaling where that is longer.
    """

    model: str
    model_type: str
    rotary_dim: int
    pairs: int
    base: float
    original_length: int
    context_window: int
    rope_type: str
    layer_types: list[str]
    sliding_window: int | None
    critical_dim: int
    critical_dim_10: int
    fastest_period: float
    slowest_period: float
    existing_windows: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
    text = text_config(config)
    stated = text.max_position_embeddings
    windows = [
        {
            "max_length": window.max_length,
            "first_factor": window.factors[0],
            "last_factor": window.factors[-1],
            "attention_factor": window.attention_factor,
        }
        for window in (checkpoint_scaling.windows if checkpoint_scaling else ())
    ]
    uses_sliding = getattr(text, "use_sliding_window", True)
    return Inspection(
        model=name_of(model) if isinstance(model, PreTrainedModel) else str(model),
        model_type=text.model_type,
        rotary_dim=geometry.rotary_dim,
        pairs=geometry.pairs,
        base=geometry.base,
        original_length=geometry.original_length,
        context_window=stated if checkpoint_scaling is None else max(stated, checkpoint_scaling.target_length),
        rope_type=rope_parameters_of(config)["rope_type"],
        layer_types=rope_layer_types(config),
        sliding_window=getattr(text, "sliding_window", None) if uses_sliding else None,
        critical_dim=geometry.critical_dim(),
        critical_dim_10=geometry.critical_dim(10),
        fastest_period=float(geometry.periods[0]),
        slowest_period=float(geometry.periods[-1]),
        existing_windows=windows,
    )
