"""What the rotary embedding of a model is, and how far it can be stretched: from its config and scaling, no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longrope.models.loading import find_checkpoint_scaling, load_config
from longrope.rope.geometry import RopeGeometry, rope_layer_types, rope_parameters_of, text_config


@dataclass(frozen=True, slots=True)
class Inspection:
    """Geometry, critical dimensions and the scaling present. Lengths and periods in tokens.

    `critical_dim` is the theoretical one (LongRoPE2 Eq. 7); `critical_dim_10` the first pair with fewer than ten
    periods, where LongRoPE2 starts looking for the real one. `slowest_period` is that of the last pair.
    `context_window` is what the config states, or the reach of the scaling present where that is longer.
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


def inspect(name: str, *, original_length: int | None = None, trust_remote_code: bool = False) -> Inspection:
    """Look at a model's rotary embedding. Raises LongRopeError when the model is unknown or has none."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    geometry = RopeGeometry.from_config(config, original_length=original_length)
    text = text_config(config)
    checkpoint_scaling = find_checkpoint_scaling(name, config, geometry)
    stated = text.max_position_embeddings
    windows = (
        []
        if checkpoint_scaling is None
        else [
            {
                "max_length": window.max_length,
                "first_factor": window.factors[0],
                "last_factor": window.factors[-1],
                "attention_factor": window.attention_factor,
            }
            for window in checkpoint_scaling.windows
        ]
    )
    uses_sliding = getattr(text, "use_sliding_window", True)
    return Inspection(
        model=name,
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
