"""The scaling that a checkpoint should apply: a given one, its scaling.json, or the one that its own files state.

The statement of a config.json is read leniently, from every place where a key may stand: the runtimes are compared with
the intention of its author, not with the reading of one of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from longrope.checks import whole_number
from longrope.doctor.checkpoint_config import DICTIONARIES, ORIGINAL, CheckpointConfig
from longrope.doctor.readings import LONGROPE, PHI3_KEYS
from longrope.errors import LongRopeError
from longrope.export.config import UNIFIED
from longrope.models.gguf.rope import GgufRope
from longrope.models.gguf.rope_parameters import stated_scaling
from longrope.rope.geometry import FULL_ATTENTION, RopeGeometry
from longrope.rope.hf_config import scaling_of_config
from longrope.rope.scaling import RopeScaling, Window
from longrope.run_files import SCALING


@dataclass(frozen=True, slots=True)
class Expected:
    """The scaling that every runtime is compared with, and where it comes from."""

    scaling: RopeScaling
    source: str
    stated: bool = False
    """True if it is the statement of the checkpoint's own config.json or GGUF keys."""

    @property
    def switch(self) -> int:
        """L: the first window's length, or the original one where all lengths share a window."""
        windows = self.scaling.windows
        return windows[0].max_length if len(windows) > 1 else self.scaling.geometry.original_length

    @property
    def lengths(self) -> list[int]:
        """The lengths to compare at: 64, both sides of every switch, and L'."""
        target = self.scaling.target_length
        switches = {self.switch} | {window.max_length for window in self.scaling.windows[:-1]}
        around = {switch + step for switch in switches for step in (-1, 0, 1)}
        return sorted(length for length in {64, target} | around if 1 <= length <= target)

    def to_json(self) -> dict[str, Any]:
        """The entry `expected` of `longrope doctor --json`."""
        geometry = self.scaling.geometry
        return {
            "source": self.source,
            "rotary_dim": geometry.rotary_dim,
            "base": geometry.base,
            "original_length": geometry.original_length,
            "switch": self.switch,
            "lengths": self.lengths,
            "windows": [asdict(window) for window in self.scaling.windows],
        }


def expected_of_config(config: CheckpointConfig, given: RopeScaling | Path | None) -> Expected:
    """The scaling that the checkpoint of `config` should apply.

    It is `given`, else the folder's scaling.json, else the scaling that config.json states. Raises LongRopeError when
    the scaling cannot be read or computed, or is for another rotary dimension (`wrong-geometry`).
    """
    if given is None and not (config.path / SCALING).is_file():
        return Expected(_stated(config), "config.json (there is no scaling.json)", stated=True)
    scaling, source = _read(config.path / SCALING if given is None else given)
    _require_rotary_dim(scaling, source, RopeGeometry.from_config(_merged(config)).rotary_dim, "this checkpoint")
    if config.record.get("form") == UNIFIED:  # the export gave all lengths the long window, and recorded it
        scaling = replace(scaling, windows=(scaling.windows[-1],))
    return Expected(scaling, source)


def expected_of_gguf(rope: GgufRope, given: RopeScaling | Path | None) -> Expected | None:
    """The scaling that a GGUF file should apply; None where it states the type longrope and holds no factors.

    It is `given`, else the scaling that longrope wrote into the file, else the scaling.json beside it, else the one
    that its own keys and tensors state. Raises LongRopeError when the scaling cannot be read or computed, or is for
    another rotary dimension (`wrong-geometry`).
    """
    beside = rope.path.parent / SCALING
    if given is None and rope.scaling is not None:
        scaling, source = rope.scaling, f"the scaling that longrope wrote into {rope.path.name}"
    elif given is not None or beside.is_file():
        scaling, source = _read(beside if given is None else given)
    else:
        return _stated_in_gguf(rope)
    if rope.rotary_dim is not None:
        _require_rotary_dim(scaling, source, rope.rotary_dim, str(rope.path))
    return Expected(scaling, source)


def _read(given: RopeScaling | Path) -> tuple[RopeScaling, str]:
    """A scaling and its source, for the table."""
    return (given, "the given scaling") if isinstance(given, RopeScaling) else (RopeScaling.load(given), str(given))


def _require_rotary_dim(scaling: RopeScaling, source: str, rotary_dim: int, checkpoint: str) -> None:
    if scaling.geometry.rotary_dim != rotary_dim:
        raise LongRopeError(
            f"{source} is for rotary_dim {scaling.geometry.rotary_dim}, {checkpoint} has {rotary_dim}",
            code="wrong-geometry",
            hint="give a scaling of this model as `expect`",
        )


def _stated_in_gguf(rope: GgufRope) -> Expected | None:
    if rope.rotary_dim is None or rope.context_length is None:
        raise LongRopeError(
            f"{rope.path} states no rotary dimension or no context length",
            code="unsupported-gguf",
            hint="give its scaling as `expect`",
        )
    original = rope.original_context_length or rope.context_length
    geometry = RopeGeometry(rope.rotary_dim, rope.freq_base, original)
    short, long = rope.short_factors or rope.rope_freqs, rope.long_factors or rope.rope_freqs
    m = 1.0 if rope.attention_factor is None else rope.attention_factor
    if short is not None and long is not None:
        windows = [Window(original, short, attention_factor=m), Window(rope.context_length, long, attention_factor=m)]
        scaling = RopeScaling(geometry, tuple(windows[short == long or original >= rope.context_length :]))
    elif rope.scaling_type == "longrope":
        return None
    elif short is None and long is None:
        scaling = stated_scaling(rope) or RopeScaling.original(geometry)
    else:  # one of two sets, which nothing uses
        scaling = RopeScaling.original(geometry)
    return Expected(scaling, f"the keys and tensors of {rope.path.name} itself", stated=True)


def _stated(config: CheckpointConfig) -> RopeScaling:
    merged = _merged(config)
    scaling = scaling_of_config(merged) or RopeScaling.original(RopeGeometry.from_config(merged))
    # A factor that is folded into the weights is no longer in the config, and all runtimes compute with it.
    folded = config.query_scale**0.5
    windows = tuple(
        Window(window.max_length, window.factors, window.start_tokens, window.attention_factor * folded)
        for window in scaling.windows
    )
    return replace(scaling, windows=windows)


def _merged(config: CheckpointConfig) -> SimpleNamespace:
    """The config with one RoPE dictionary, merged from all of the file's, and the defaults of transformers' class."""
    given: dict[str, object] = {}
    for name in reversed(DICTIONARIES):  # rope_scaling last: it goes before the other
        value = config.dictionary(name)
        inner = value.get(FULL_ATTENTION)
        value = dict(inner) if isinstance(inner, dict) else value
        rope_type = value.pop("rope_type", value.pop("type", "default"))
        if rope_type == "yarn" and config.model_class.keys_4 == PHI3_KEYS:
            rope_type = LONGROPE
        given |= value | ({} if rope_type == "default" else {"rope_type": rope_type})
    given.pop("type", None)
    given.setdefault("rope_theta", config.base if config.base is not None else config.model_class.base)
    values = {key: value for key, value in config.values.items() if key not in DICTIONARIES}
    if given.get(ORIGINAL) is not None:
        given[ORIGINAL] = whole_number(ORIGINAL, given[ORIGINAL], 2)
    if config.original_length is None:
        values.pop(ORIGINAL, None)
        if given.get(ORIGINAL) is None and config.model_class.original_length is not None:
            given[ORIGINAL] = config.model_class.original_length
    values |= {"head_dim": config.rotary_dim(given), "partial_rotary_factor": None, "qk_rope_head_dim": None}
    given.pop("partial_rotary_factor", None)  # the head dimension above is the rotary one
    return SimpleNamespace(**values | {"rope_parameters": given, "rotary_pct": None, "rope_pct": None})
