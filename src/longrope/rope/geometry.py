"""The rotary embedding of a model before any scaling: rotary dimension, base and original context window.

`RopeGeometry` is the mathematics; the rest of the file reads it from the attributes of a transformers configuration,
without importing transformers. The scaling that a configuration states is read in
`hf_config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope.checks import positive_number, shown, whole_number
from longrope.errors import LongRopeError
from longrope.units import LONGEST

FloatArray = npt.NDArray[np.float64]

FULL_ATTENTION = "full_attention"
"""The layer type that is scaled in a model with one rotary embedding per layer type."""


@dataclass(frozen=True, slots=True)
class RopeGeometry:
    """The RoPE of one model: rotary dimension d, base and original window L; it has D = d/2 pairs.

    Raises LongRopeError, naming the field, when a value cannot be that of a rotary embedding.
    """

    rotary_dim: int
    """d: dimensions of one head that rotate, head_dim times the partial rotary factor; even."""
    base: float
    """rope theta, above 1."""
    original_length: int
    """L: tokens of the context window that the model was trained with."""

    def __post_init__(self) -> None:
        """Check every field and store plain Python numbers, whatever came in (NumPy, a base written as an integer)."""
        rotary_dim = whole_number("rotary_dim", self.rotary_dim, 2)
        if rotary_dim % 2:
            raise LongRopeError(
                f"rotary_dim must be even, one rotary pair is two dimensions; found {rotary_dim}",
                code="invalid-geometry",
            )
        base = positive_number("base", self.base)
        if base <= 1:
            raise LongRopeError(f"base must be above 1; found {base:g}", code="invalid-geometry")
        length = whole_number("original_length", self.original_length, 2)
        if length > LONGEST:
            raise LongRopeError(
                f"original_length must be at most {LONGEST} tokens; found {shown(length)}", code="invalid-geometry"
            )
        object.__setattr__(self, "rotary_dim", rotary_dim)
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "original_length", length)

    @property
    def pairs(self) -> int:
        """D, the number of rotary pairs."""
        return self.rotary_dim // 2

    @property
    def inv_freq(self) -> FloatArray:
        """θ_i = base^(-2i/d), radians per token, float64 (D,), highest frequency first."""
        return np.asarray(self.base ** (-np.arange(0, self.rotary_dim, 2) / self.rotary_dim), dtype=np.float64)

    @property
    def periods(self) -> FloatArray:
        """T_i = 2π/θ_i, tokens per turn, float64 (D,), shortest first."""
        return 2 * math.pi / self.inv_freq

    def critical_dim(self, periods: float = 1.0) -> int:
        """Index of the first pair that turns fewer than `periods` times inside L: ⌈D·log_base(L/(2π·periods))⌉.

        With `periods` = 1 this is the theoretical critical dimension d_tcd of LongRoPE2, Eq. 7. The result lies in
        [0, D]: D when every pair turns that often, 0 when none does.
        """
        turns = positive_number("periods", periods)
        index = math.ceil(self.pairs * math.log(self.original_length / (2 * math.pi * turns), self.base))
        return min(max(index, 0), self.pairs)

    @classmethod
    def from_config(
        cls, config: Any, layer_type: str | None = None, original_length: int | None = None
    ) -> RopeGeometry:
        """The geometry of any transformers configuration object, as version 5 or version 4 writes it.

        The rotary dimension is `qk_rope_head_dim` (multi-head latent attention) or head_dim times the partial rotary
        factor. L is `original_length` when given, else `original_max_position_embeddings` (top level before the RoPE
        dict, in the order of `rope_parameters_of`), else the window that `stated_window` finds, divided by the factor
        of a `linear` scaling, which is part of it. `original_length_guess` says where that is a guess. A multimodal
        configuration gives the geometry of its text model, one with a RoPE per layer type that of `layer_type`
        (`full_attention` when not given).

        Raises LongRopeError when the model has no RoPE, or one whose frequencies are not base^(-2i/d).
        """
        config = text_config(config)
        parameters = rope_parameters_of(config, layer_type)
        if parameters["rope_type"] in _OTHER_FREQUENCIES:
            raise LongRopeError(
                f"expected rotary frequencies base^(-2i/d), found rope_type {parameters['rope_type']!r} in"
                f" {_described(config)}, which has others; this model cannot be scaled",
                code="not-rope",
            )
        if original_length is None:
            original_length = _original_length(config, parameters)
        return cls(
            rotary_dim=_rotary_dim(config, parameters), base=parameters["rope_theta"], original_length=original_length
        )


_OTHER_FREQUENCIES = ("proportional", "axial")
RENAMED_TYPES = {"su": "longrope", "mrope": "default"}
"""Old names of RoPE types, which transformers renames on loading in some families and does not know in the others."""


def text_config(config: Any) -> Any:
    """The configuration of the text model inside a multimodal one; any other configuration unchanged.

    Raises LongRopeError (`not-rope`) where there are several, as in a model that reads text and makes sound (musicgen).
    """
    inner = getattr(config, "get_text_config", None)
    try:
        return inner() if callable(inner) else config
    except ValueError as error:
        raise LongRopeError(
            f"expected one text model in {_described(config)}, found several; this model cannot be scaled",
            code="not-rope",
        ) from error


def head_dim_of(config: Any) -> int:
    """The dimension of one attention head: `head_dim`, else the hidden size divided among the heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_layer_types(config: Any) -> list[str]:
    """The layer types that have a RoPE of their own (gemma3, olmo3), or [] where all layers share one or have none."""
    return [name for name, value in _raw_parameters(text_config(config)).items() if isinstance(value, Mapping)]


def scaled_layer_type(config: Any) -> str | None:
    """The layer type whose RoPE is scaled, that of the layers which see the whole text; None where all share one RoPE.

    It is `full_attention`, or the only one that does not slide where a family has other names (zaya).

    Raises LongRopeError where no layer type, or more than one, can be meant.
    """
    types = rope_layer_types(config)
    if not types:
        return None
    whole = [FULL_ATTENTION] if FULL_ATTENTION in types else [name for name in types if "sliding" not in name]
    if len(whole) != 1:
        raise LongRopeError(
            f"{_described(text_config(config))} has one RoPE per layer type ({', '.join(types)}), "
            f"{'several' if whole else 'none'} for layers that see the whole text; only full-attention layers can be"
            " scaled",
            code="not-rope",
        )
    return whole[0]


def rope_parameters_of(config: Any, layer_type: str | None = None) -> dict[str, Any]:
    """A copy of the RoPE dict of `config`, in one form whatever version of transformers wrote it.

    Always has `rope_type` (`su` reads as `longrope`; `default` where nothing is said) and `rope_theta`; has
    `partial_rotary_factor` and `original_max_position_embeddings` where the dict or the configuration states them
    (as in transformers the top-level original length goes first, but the dict where there is one per layer type).
    `layer_type` chooses among `rope_layer_types`, `full_attention` when not given; it is ignored where all layers
    share one RoPE.

    Raises LongRopeError when the model has no RoPE, or none for `layer_type`.
    """
    config = text_config(config)
    raw = _raw_parameters(config)
    if nested := rope_layer_types(config):
        chosen = layer_type or scaled_layer_type(config)
        if chosen not in nested:
            raise LongRopeError(
                f"expected a layer type with a RoPE, one of {', '.join(nested)}; found {chosen!r} in"
                f" {_described(config)}",
                code="not-rope",
            )
        raw = raw[chosen]
    parameters = {str(key): value for key, value in raw.items() if value is not None}
    rope_type = _stated_type(parameters) or "default"
    for name in ("type", "rope_type"):
        parameters.pop(name, None)
    theta = _first(parameters.get("rope_theta"), _stated(config, "rope_theta"), _stated(config, "rotary_emb_base"))
    if theta is None or _stated(config, "alibi"):
        raise LongRopeError(
            f"expected a model with rotary position embeddings (RoPE), found {_described(config)} without; it cannot"
            " be extended by rescaling",
            code="not-rope",
        )
    parameters |= {"rope_type": RENAMED_TYPES.get(rope_type, rope_type), "rope_theta": theta}
    names = ("partial_rotary_factor", "rotary_pct", "rope_pct")
    partial = _first(parameters.get(names[0]), *(_stated(config, name) for name in names))
    lengths = _stated(config, "original_max_position_embeddings"), parameters.get("original_max_position_embeddings")
    length = _first(*(reversed(lengths) if nested else lengths))
    stated = {"partial_rotary_factor": partial, "original_max_position_embeddings": length}
    return parameters | {key: value for key, value in stated.items() if value is not None}


def stated_types(config: Any) -> set[str]:
    """The RoPE types in `config` as they stand there, old names among them; none where nothing is said."""
    raw = _raw_parameters(text_config(config))
    entries = [value for value in raw.values() if isinstance(value, Mapping)] or [raw]
    return {found for entry in entries if (found := _stated_type(entry)) is not None}


def _stated_type(entry: Mapping[str, Any]) -> str | None:
    """The RoPE type that a dictionary of parameters states, under its new key or its old one."""
    found = entry.get("rope_type", entry.get("type"))
    return None if found is None else str(found)


def yarn_truncates(config: Any) -> bool:
    """The `truncate` option of YaRN as transformers looks it up: beside the layer types, not inside one of them."""
    return bool(_raw_parameters(text_config(config)).get("truncate", True))


def _raw_parameters(config: Any) -> Mapping[str, Any]:
    # rope_scaling first: transformers takes it where both are present. On its own objects one is an alias of the other.
    raw = _stated(config, "rope_scaling") or _stated(config, "rope_parameters") or {}
    if not isinstance(raw, Mapping):
        raise LongRopeError(
            f"expected the RoPE parameters of {_described(config)} as a dict, found {shown(raw)}", code="invalid-config"
        )
    return raw


def _rotary_dim(config: Any, parameters: Mapping[str, Any]) -> int:
    latent = _stated(config, "qk_rope_head_dim")
    if latent:
        return whole_number("qk_rope_head_dim", latent, 2)
    head_dim = _stated(config, "head_dim")
    if head_dim is None:
        hidden, heads = _stated(config, "hidden_size"), _stated(config, "num_attention_heads")
        if hidden is None or heads is None:
            raise LongRopeError(
                f"expected head_dim, or hidden_size and num_attention_heads, in {_described(config)}; found neither",
                code="invalid-config",
            )
        head_dim = whole_number("hidden_size", hidden, 2) // whole_number("num_attention_heads", heads, 1)
    factor = positive_number("partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0))
    return int(whole_number("head_dim", head_dim, 2) * factor)


def _original_length(config: Any, parameters: Mapping[str, Any]) -> int:
    window = stated_window(config)
    original = parameters.get("original_max_position_embeddings")
    if original is None and window is None:
        raise LongRopeError(
            f"expected max_position_embeddings in {_described(config)}, found none",
            code="invalid-config",
            hint="give `original_length`",
        )
    # Phi3Config fills in 4096 where nothing was said: without a scaling, an original length above the window is no
    # statement about this model.
    unscaled = parameters["rope_type"] == "default"
    if window is not None and (original is None or (unscaled and original > window)):
        factor = _linear_factor(parameters) if original is None else 1.0
        return whole_number("max_position_embeddings", max(int(window / factor), 2), 2)
    return whole_number("original_max_position_embeddings", original, 2)


def _linear_factor(parameters: Mapping[str, Any]) -> float:
    """The factor of a `linear` scaling; 1 for another type, and for a factor that `scaling_of_config` refuses."""
    factor = parameters.get("factor")
    linear = parameters["rope_type"] == "linear"
    return float(factor) if linear and isinstance(factor, int | float) and factor >= 1 else 1.0


WINDOW_NAMES = ("max_position_embeddings", "max_seq_len", "model_max_length", "n_positions", "n_ctx", "seq_length")
"""The names of configs for the context window, the usual one first."""


def stated_window(config: Any) -> int | None:
    """The context window that `config` states, tokens; None where it states none.

    It is `max_position_embeddings`, or the name that the family has in its place; `max_sequence_length` of older
    checkpoints that were extended (Vicuna, LongChat), where that is longer.
    """
    config = text_config(config)
    stated = _first(*(_stated(config, name) for name in WINDOW_NAMES))
    window = None if stated is None else whole_number("max_position_embeddings", stated, 1)
    extended = _stated(config, "max_sequence_length")
    if isinstance(extended, int) and not isinstance(extended, bool) and extended > (window or 1):
        return extended
    return window


def original_length_guess(config: Any, layer_type: str | None = None) -> str:
    """The reason why L is a guess for the configuration `config`; empty where the configuration states it.

    Raises LongRopeError as `RopeGeometry.from_config` does.
    """
    parameters = rope_parameters_of(config, layer_type)
    original, window = parameters.get("original_max_position_embeddings"), stated_window(config)
    if original is None and _linear_factor(parameters) > 1:
        return (
            f"the window of {window} divided by the linear factor {_linear_factor(parameters):g}, because the config"
            " states no original length"
        )
    if parameters["rope_type"] == "yarn" and original in (None, window):
        return (
            f"the window of {window}, which transformers takes for the original length of YaRN where the config states"
            " none"
        )
    return ""


def _stated(config: Any, name: str) -> Any:
    """The attribute `name`, None where it is absent. Raises LongRopeError where it differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError as error:  # AmbiguousGlobalPerLayerAttributeError of transformers (gemma4)
        raise LongRopeError(
            f"expected one {name} for all layers, found one per layer in {_described(config)}; this model cannot be"
            " scaled",
            code="not-rope",
        ) from error


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _described(config: Any) -> str:
    return str(_stated(config, "model_type") or type(config).__name__)
