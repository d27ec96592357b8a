"""`longrope fix-config` as a function: write the superset config of an export again, after another tool's save.

`save_pretrained` of transformers 5 keeps `rope_parameters` alone, which transformers 4 and others read as plain RoPE;
merging an adapter, quantising and fine-tuning all end with it. Weights are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longrope.checks import shown
from longrope.errors import LongRopeError
from longrope.export.config import FORMS, PHI3
from longrope.export.forms import Expression, express
from longrope.models.checkpoint_files import RECORD
from longrope.models.loading import load_config
from longrope.rope.geometry import RopeGeometry, text_config
from longrope.rope.hf_config import superset_config
from longrope.rope.scaling import RopeScaling, numbers_sha256
from longrope.run_files import SCALING
from longrope.storage import read_json, write_json_atomic


@dataclass(frozen=True, slots=True)
class Fixed:
    """What was written again: one line for every key that changed; nothing was written where there is none."""

    path: Path
    form: str
    changes: list[str]


def fix_config(
    folder: Path, scaling_path: Path | None = None, *, form: str | None = None, folded: bool | None = None
) -> Fixed:
    """Write `config.json` of the exported checkpoint in `folder` again, from its scaling.json or `scaling_path`.

    How it was exported stands in the config under `longrope`; where that is gone, `form` and `folded` say it. The file
    is replaced in one step, and only when something changes.

    Raises LongRopeError when the folder is no checkpoint, the scaling is not found or another one than was exported, or
    what the config says of the export contradicts `form` or `folded`, or the model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise LongRopeError(f"expected a checkpoint folder with a config.json; found none in {folder}")
    scaling_path = scaling_path or folder / SCALING
    if not scaling_path.is_file():
        raise LongRopeError(f"there is no scaling at {scaling_path}; give the one that was exported: --scaling FILE")
    scaling = RopeScaling.load(scaling_path)
    raw = read_json(path)
    config = load_config(str(folder))
    expression = _expression(raw, scaling, form, folded)
    family = text_config(config).model_type
    if expression.form == PHI3 and family != "phi3":
        raise LongRopeError(f"expected the Phi-3 model that was exported in {folder}; found {family}")
    geometry = RopeGeometry.from_config(config, original_length=scaling.geometry.original_length)
    # A recorded scaling is this model's: a base that another tool has lost is then no sign of another model.
    scaling.check_fits(replace(geometry, base=scaling.geometry.base) if RECORD in raw else geometry)
    fixed = superset_config(raw, config, expression.stated) | {RECORD: expression.record()}
    changes = _changes(raw, fixed)
    if changes:
        write_json_atomic(path, fixed)
    return Fixed(path, expression.form, changes)


def _expression(raw: dict[str, Any], scaling: RopeScaling, form: str | None, folded: bool | None) -> Expression:
    record = raw.get(RECORD)
    if record is None:
        if form is None:
            raise LongRopeError(
                f"config.json does not say how it was exported (its key {RECORD!r} is gone); add --to as it was "
                f"({', '.join(FORMS)}), and --fold-attention-factor if that was given"
            )
        return express(scaling, form, bool(folded))
    if not isinstance(record, dict) or record.get("form") not in FORMS or "query_scale" not in record:
        raise LongRopeError(f"expected the record of an export under {RECORD!r} in config.json; found {shown(record)}")
    was_folded = record["query_scale"] != 1.0
    given = {"--to": (form, record["form"]), "--fold-attention-factor": (folded, was_folded)}
    for option, (value, recorded) in given.items():
        if value not in (None, recorded):
            raise LongRopeError(f"config.json says that the export had {option} {recorded}; found {option} {value}")
    if record.get("scaling_sha256") != numbers_sha256(scaling):
        raise LongRopeError("this checkpoint was exported with another scaling; give that one with --scaling FILE")
    return express(scaling, record["form"], was_folded)


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for every key that differs, dictionaries entered."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        name = f"{prefix}{key}"
        if key not in before:
            lines.append(f"{name}: added, {_short(after[key])}")
        elif key not in after:
            lines.append(f"{name}: removed, was {_short(before[key])}")
        elif isinstance(before[key], dict) and isinstance(after[key], dict):
            lines += _changes(before[key], after[key], f"{name}.")
        elif before[key] != after[key]:
            lines.append(f"{name}: {_short(before[key])} -> {_short(after[key])}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(map(str, value))}}}"
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} numbers from {value[0]} to {value[-1]}"
    return str(value)
