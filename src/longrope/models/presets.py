"""The published factor tables for a model, and the authors' factor files as scalings of a model."""

from __future__ import annotations

from pathlib import Path

from longrope.errors import LongRopeError
from longrope.models.checkpoint_files import EMBEDDED_MODELS
from longrope.models.loading import load_config
from longrope.rope.authors_files import read_authors_factors
from longrope.rope.closed_forms import su_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.presets import PresetRow, preset_names, preset_table, presets_for
from longrope.rope.scaling import RopeScaling
from longrope.units import parse_length


def presets_of_model(name: str) -> list[PresetRow]:
    """The presets for the model `name`: by its name, else by the rotary geometry in its config.

    Empty where `name` is a preset or no model. Raises LongRopeError (`unknown-preset`) for a model that none fits, and
    where its config cannot be loaded.
    """
    if name in preset_names():
        return []
    if named := presets_for(name):
        return named
    if name not in EMBEDDED_MODELS and "/" not in name and not Path(name).expanduser().is_dir():
        return []
    found = presets_for(name, RopeGeometry.from_config(load_config(name)))
    if not found:
        models = sorted({row.model for row in preset_table()})
        raise LongRopeError(
            f"no published factors fit {name}: they are for {', '.join(models)}",
            code="unknown-preset",
            hint="longrope search finds its own",
        )
    return found


def scaling_of_file(path: Path, model: str, target_length: str) -> RopeScaling:
    """The factors in a file of the authors' code, for `model` and a window of `target_length` tokens.

    The authors' code applies the su attention factor beside the factors and writes it to no file. Raises LongRopeError
    for a file or a model that cannot be read.
    """
    geometry, length = RopeGeometry.from_config(load_config(model)), parse_length(target_length)
    return read_authors_factors(path, geometry, length, attention_factor=su_attention_factor(geometry, length))
