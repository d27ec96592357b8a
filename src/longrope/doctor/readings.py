"""Readings of config.json: the RoPE type, base, original length and rotary dimension that each runtime takes from it.

There are three ways: transformers 5 (and all that is built on its config classes: vLLM, SGLang, converters),
transformers 4.57, and runtimes that parse the file themselves, by the places named in the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope.checks import positive_number, shown, whole_number
from longrope.doctor.checkpoint_config import DICTIONARIES, ORIGINAL, CheckpointConfig
from longrope.doctor.table import FilesRule, Runtime, known_families, types_4
from longrope.rope.geometry import FULL_ATTENTION

LONGROPE = "longrope"
_WITH_ORIGINAL_LENGTH = (LONGROPE, "yarn", "llama3")  # types for which transformers 5 looks for it
_DEFAULT_BASE = 10_000.0
_REQUIRED = {
    LONGROPE: ("short_factor", "long_factor"),
    "yarn": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
"""Keys of a RoPE dictionary without which transformers stops (KeyError); it fills in YaRN's original length."""
PHI3_KEYS = 3
"""Phi-3's classes of 4.57 insist on three keys; they know `su` and take `yarn` for longrope."""


class RefusedError(Exception):
    """The runtime stops with an error of its own; the message is the reason."""


class UnknownRuleError(Exception):
    """The table has no rule for this case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeReading:
    """The RoPE settings that a runtime takes from a config.json."""

    rope_type: str
    parameters: Mapping[str, Any]
    """The RoPE dictionary that it reads."""
    base: float
    original_length: int
    """L, where it switches; max_position_embeddings where it finds none."""
    rotary_dim: int
    remarks: tuple[str, ...] = ()
    """Facts that a reader of the file would not expect."""


def read(config: CheckpointConfig, runtime: Runtime) -> RopeReading:
    """Read `config` as `runtime` does. Raises RefusedError where the runtime stops."""
    if runtime.reads == "transformers-5":
        return _read_transformers_5(config, renames_su=runtime.renames_su, nested_elsewhere=runtime.nested_elsewhere)
    if runtime.reads == "transformers-4":
        return _read_transformers_4(config)
    if runtime.files is None:
        raise ValueError(f"the table says nothing about where {runtime.name} looks in config.json")
    return _read_files(config, runtime.files)


def _read_transformers_5(
    config: CheckpointConfig, *, renames_su: bool = False, nested_elsewhere: str = "error"
) -> RopeReading:
    """Read `config` by the rules of transformers 5 (`convert_rope_params_to_dict` and `standardize_rope_params`).

    One dictionary counts, rope_scaling before rope_parameters; a top-level original length goes before the one inside.
    """
    if config.model_class.layers == "nested":
        return _read_nested_5(config)
    name = next((name for name in DICTIONARIES if config.dictionary(name)), None)
    given = config.dictionary(name) if name else {}
    remarks = []
    if any(isinstance(value, Mapping) for value in given.values()):
        if config.model_class.layers == "declared" and nested_elsewhere != "default":
            raise RefusedError(f"{config.family} has one RoPE for all layers; {name} has one per layer type (KeyError)")
        if nested_elsewhere == "refused":
            raise RefusedError(f"{name} has one RoPE per layer type and so no rope_type")
        remarks.append(f"{config.family} has one RoPE for all layers: the dictionaries inside {name} are passed over")
        given = {}
    rope_type = str(given.get("rope_type", given.get("type", "default")))
    base = given.get("rope_theta", config.base)
    if base is None:
        base = config.model_class.base
        if "rope_theta" in config.dictionary("rope_parameters"):
            remarks.append(f"rope_scaling goes before rope_parameters and has no rope_theta: the base is {base:g}")
    if config.model_class.keys_4 == PHI3_KEYS and rope_type in ("su", "yarn"):
        if rope_type == "su" and ORIGINAL not in given:
            raise RefusedError(f"'su' becomes longrope, and {ORIGINAL} is then missed inside the dictionary (KeyError)")
        rope_type = LONGROPE
    if config.model_class.keys_4 == PHI3_KEYS and rope_type not in ("default", LONGROPE):
        raise RefusedError(
            f"its {config.family} config knows the RoPE type longrope alone, not {rope_type!r} (ValueError)"
        )
    if rope_type == "su" and renames_su:
        rope_type = LONGROPE
    original = None
    if rope_type in _WITH_ORIGINAL_LENGTH:
        original, remark = _original_length_5(config, given)
        remarks += remark
    return _checked(config, rope_type, given, base, original, remarks)


def _original_length_5(config: CheckpointConfig, given: Mapping[str, Any]) -> tuple[int, list[str]]:
    inside = given.get(ORIGINAL)
    if config.original_length is not None:
        return config.original_length, []
    default = config.model_class.original_length
    if default is not None:
        says = (
            f"the class {config.family} fills in a top-level {ORIGINAL} of {default}, which goes before the one inside"
        )
        return default, [says] * (inside is not None and inside != default)
    if inside is not None:
        return whole_number(ORIGINAL, inside, 2), []
    return config.length, [f"without {ORIGINAL}, max_position_embeddings {config.length} is taken: no long window"]


def _read_nested_5(config: CheckpointConfig) -> RopeReading:
    """Gemma 3 and OLMo 3: one dictionary per layer type; rope_scaling is merged into that of full attention."""
    parameters, scaling = config.dictionary("rope_parameters"), config.dictionary("rope_scaling")
    remarks = []
    full = dict(parameters.get(FULL_ATTENTION) or {"rope_type": "default"})
    if scaling:
        if parameters and FULL_ATTENTION not in parameters:
            raise RefusedError(f"{config.family} merges rope_scaling into rope_parameters.{FULL_ATTENTION}: KeyError")
        full |= scaling
    elif parameters and FULL_ATTENTION not in parameters:
        remarks.append(f"{config.family} has one RoPE per layer type: a flat rope_parameters is passed over")
    rope_type = str(full.get("rope_type", full.get("type", "default")))
    if rope_type == "default" and full.get("type", "default") != "default":
        remarks.append(f"its own rope_type 'default' goes before the type {full['type']!r}")
    base = full.get("rope_theta", config.base)
    original = full.get(ORIGINAL)
    if rope_type in _WITH_ORIGINAL_LENGTH and original is None:
        original = config.length
        remarks.append(f"without {ORIGINAL} inside, max_position_embeddings {original} is taken: no long window")
    return _checked(config, rope_type, full, config.model_class.base if base is None else base, original, remarks)


def _checked(
    config: CheckpointConfig, rope_type: str, given: Mapping[str, Any], base: Any, original: Any, remarks: list[str]
) -> RopeReading:
    """The reading, after the checks that transformers 5 makes when it builds the config and the rotary module."""
    if rope_type == "mrope" and config.family not in known_families():
        raise UnknownRuleError(f"the table has no rule for the class {config.family}, which may have axes of its own")
    if rope_type in ("su", "mrope"):
        raise RefusedError(f"{rope_type!r} is no rope_type of {config.family} (KeyError)")
    require(given, _REQUIRED.get(rope_type, ()))
    _require_head_dim(config, rope_type, config.model_class.head_dim)
    return RopeReading(
        rope_type=rope_type,
        parameters=given,
        base=positive_number("rope_theta", base),
        original_length=config.length if original is None else whole_number(ORIGINAL, original, 2),
        rotary_dim=config.rotary_dim(given),
        remarks=tuple(remarks),
    )


def _require_head_dim(config: CheckpointConfig, rope_type: str, default: int | str | None) -> None:
    """Raise RefusedError for the types whose functions in transformers need a head_dim that the config lacks."""
    if rope_type in (LONGROPE, "yarn") and default == "none" and config.values.get("head_dim") is None:
        raise RefusedError(f"the class {config.family} leaves head_dim None where config.json has none (TypeError)")


def _read_transformers_4(config: CheckpointConfig) -> RopeReading:
    """Read `config` as transformers 4.57: rope_scaling, with rope_theta and the original length at the top level."""
    scaling, facts = config.dictionary("rope_scaling"), config.model_class
    if config.family not in types_4():
        if "auto_map" in config.values:
            raise UnknownRuleError(f"the class of {config.family} comes with the checkpoint's own code")
        raise RefusedError(f"has no class {config.family}")
    remarks = []
    if not scaling and config.dictionary("rope_parameters"):
        remarks.append("rope_parameters is not read: plain RoPE")
    if scaling and facts.keys_4 is not None and len(scaling) != facts.keys_4:
        raise RefusedError(
            f"its {config.family} config insists on exactly {facts.keys_4} keys in rope_scaling, found {len(scaling)}"
            " (ValueError)"
        )
    rope_type = scaling.get("rope_type", scaling.get("type", None if scaling else "default"))
    if facts.keys_4 == PHI3_KEYS and rope_type in ("su", "yarn"):
        rope_type = LONGROPE
    if facts.keys_4 == PHI3_KEYS and scaling and rope_type != LONGROPE:
        raise RefusedError(f"its {config.family} config knows the RoPE type longrope alone (ValueError)")
    if rope_type in (None, "su", "mrope"):
        raise RefusedError(f"{shown(rope_type)} is no rope_type of {config.family} (KeyError)")
    base = config.base
    if base is None:
        base = facts.base if facts.base_4 is None else facts.base_4
        if any("rope_theta" in config.dictionary(name) for name in DICTIONARIES):
            remarks.append(f"rope_theta is read at the top level only: the base is {base:g}")
    require(scaling, _REQUIRED.get(str(rope_type), ()))
    _require_head_dim(config, rope_type, facts.head_dim_4)
    original = scaling.get(ORIGINAL)
    if rope_type == LONGROPE and not facts.mscale:  # phimoe alone reads it inside
        top = config.original_length
        if top is None and facts.original_length is None:
            remarks.append(
                f"{ORIGINAL} is read at the top level only: max_position_embeddings {config.length} is taken, and the"
                " long window never comes"
            )
        original = top if top is not None else facts.original_length
    return RopeReading(
        rope_type=str(rope_type),
        parameters=scaling,
        base=base,
        original_length=config.length if original is None else whole_number(ORIGINAL, original, 2),
        rotary_dim=config.rotary_dim({}),
        remarks=tuple(remarks),
    )


def _read_files(config: CheckpointConfig, rule: FilesRule) -> RopeReading:
    """Read `config` as a runtime that parses config.json itself, in the places that `rule` names."""
    remarks = []
    name = next((name for name in rule.dict if config.dictionary(name)), None)
    given = config.dictionary(name) if name else {}
    if name is None and any(config.dictionary(other) for other in DICTIONARIES):
        remarks.append(f"only {' and '.join(rule.dict)} is read: plain RoPE")
    if any(isinstance(value, Mapping) for value in given.values()):
        remarks.append(f"the dictionaries inside {name} are not read")
        given = {}
    rope_type = str(next((given[key] for key in rule.type if given.get(key)), "default"))
    if rope_type == "su":
        if not rule.su:
            raise RefusedError("'su', the old name of longrope, is not known")
        rope_type = LONGROPE
    base = next((value for place in rule.base if (value := _base_at(config, place)) is not None), None)
    if base is None and rule.base_required:
        raise RefusedError("expects rope_theta at the top level")
    lengths = {"top": config.original_length, "dict": given.get(ORIGINAL)}
    original = next((lengths[place] for place in rule.original_length if lengths[place] is not None), None)
    if original is None and rule.default_original_length is not None and rope_type != "default":
        original = rule.default_original_length
        remarks.append(f"finds no {ORIGINAL} where it looks and takes {original}")
    if original is None and rope_type == LONGROPE:
        raise RefusedError(f"finds no {ORIGINAL} where it looks ({', '.join(rule.original_length)})")
    return RopeReading(
        rope_type=rope_type,
        parameters=given,
        base=_default_base(config, rule) if base is None else base,
        original_length=config.length if original is None else whole_number(ORIGINAL, original, 2),
        rotary_dim=config.rotary_dim(given),
        remarks=tuple(remarks),
    )


def _default_base(config: CheckpointConfig, rule: FilesRule) -> float:
    """The base that a runtime takes where it finds none. Raises UnknownRuleError where that is not known."""
    own = config.model_class.base
    nowhere = not any("rope_theta" in config.dictionary(name) for name in DICTIONARIES)
    if rule.default_base is None and nowhere and own != _DEFAULT_BASE:
        raise UnknownRuleError(
            f"config.json leaves the base to the class, {own:g} in transformers: its own is not known"
        )
    return _DEFAULT_BASE if rule.default_base is None else rule.default_base


def _base_at(config: CheckpointConfig, place: str) -> float | None:
    value = config.base if place == "top" else config.dictionary(place).get("rope_theta")
    return None if value is None else positive_number("rope_theta", value)


def require(given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise RefusedError when one of the keys `names` is not in the RoPE dictionary `given`."""
    missing = [name for name in names if name not in given]
    if missing:
        raise RefusedError(f"the RoPE dictionary lacks {', '.join(missing)}")
