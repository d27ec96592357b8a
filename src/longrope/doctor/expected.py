"""What a checkpoint should compute: its scaling.json, a scaling given by hand, or what its config.json states.

A statement is read leniently, from wherever a file says something: the runtimes are measured against what its author
meant, not against what one of them makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from longrope.checks import whole_number
from longrope.doctor.config import DICTIONARIES, ORIGINAL, Config
from longrope.errors import LongRopeError
from longrope.export.config import UNIFIED
from longrope.export.gguf.keys import GgufRope
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
    """Whether it is only what config.json itself states."""

    @property
    def switch(self) -> int:
        """L: the first window's length, or the original one where all lengths share a window."""
        windows = self.scaling.windows
        return windows[0].max_length if len(windows) > 1 else self.scaling.geometry.original_length

    @property
    def lengths(self) -> list[int]:
        """The lengths to look at: 64, both sides of every switch, and L'."""
        target = self.scaling.target_length
        switches = {self.switch} | {window.max_length for window in self.scaling.windows[:-1]}
        around = {switch + step for switch in switches for step in (-1, 0, 1)}
        return sorted(length for length in {64, target} | around if 1 <= length <= target)


def expected_of_config(config: Config, given: Path | None) -> Expected:
    """What the checkpoint of `config` should compute; `given` is a scaling.json that goes before the folder's own.

    Raises LongRopeError when that file is no scaling, or one of another model, or when config.json states a scaling
    that cannot be computed.
    """
    path = given or config.path / SCALING
    if given is None and not path.is_file():
        return Expected(_stated(config), "config.json (there is no scaling.json)", stated=True)
    scaling = RopeScaling.load(path)
    geometry = _geometry(config)
    if scaling.geometry.rotary_dim != geometry.rotary_dim:
        raise LongRopeError(
            f"{path} is for rotary_dim {scaling.geometry.rotary_dim}, this checkpoint has {geometry.rotary_dim}: give"
            " a scaling of this model with --expect"
        )
    if config.record.get("form") == UNIFIED:  # the export gave all lengths the long window, and said so
        scaling = replace(scaling, windows=(scaling.windows[-1],))
    return Expected(scaling, str(path))


def expected_of_gguf(rope: GgufRope, given: Path | None) -> Expected | None:
    """What a GGUF file should compute: `given`, the scaling that we wrote into it, a scaling.json beside it, or what
    its own keys and tensors state. None where these state the type longrope and hold no factors.

    Raises LongRopeError when the scaling is one of another model, or the file states one that cannot be computed.
    """
    beside = rope.path.parent / SCALING
    if given is not None:
        expected = Expected(RopeScaling.load(given), str(given))
    elif rope.scaling is not None:
        expected = Expected(rope.scaling, f"the scaling that longrope wrote into {rope.path.name}")
    elif beside.is_file():
        expected = Expected(RopeScaling.load(beside), str(beside))
    else:
        return _stated_in_gguf(rope)
    if rope.rotary_dim is not None and expected.scaling.geometry.rotary_dim != rope.rotary_dim:
        raise LongRopeError(
            f"{expected.source} is for rotary_dim {expected.scaling.geometry.rotary_dim}, {rope.path} has"
            f" {rope.rotary_dim}: give a scaling of this model with --expect"
        )
    return expected


def _stated_in_gguf(rope: GgufRope) -> Expected | None:
    if rope.rotary_dim is None or rope.context_length is None:
        raise LongRopeError(
            f"{rope.path} states no rotary dimension or no context length; give its scaling.json with --expect"
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
    else:
        scaling = RopeScaling.original(geometry)
    return Expected(scaling, f"what {rope.path.name} itself states", stated=True)


def _stated(config: Config) -> RopeScaling:
    merged = _merged(config)
    scaling = scaling_of_config(merged) or RopeScaling.original(RopeGeometry.from_config(merged))
    # What is folded into the weights is no longer in the config, and the runtimes compute with it all the same.
    folded = config.query_scale**0.5
    windows = tuple(
        Window(window.max_length, window.factors, window.start_tokens, window.attention_factor * folded)
        for window in scaling.windows
    )
    return replace(scaling, windows=windows)


def _geometry(config: Config) -> RopeGeometry:
    return RopeGeometry.from_config(_merged(config))


def _merged(config: Config) -> SimpleNamespace:
    """One RoPE dictionary from all that the file says, with what transformers' class fills in."""
    given: dict[str, object] = {}
    for name in reversed(DICTIONARIES):  # rope_scaling last: it goes before the other
        value = config.dictionary(name)
        inner = value.get(FULL_ATTENTION)
        value = dict(inner) if isinstance(inner, dict) else value
        rope_type = value.pop("rope_type", value.pop("type", "default"))
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
