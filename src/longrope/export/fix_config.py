"""Repair of an export's config.json after another tool has saved it.

    longrope fix-config extended/

`save_pretrained` of transformers 5 keeps `rope_parameters` alone, which transformers 4 and others read as plain RoPE;
merging an adapter, quantising and fine-tuning all end with that call. The weights are not looked at.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longrope.checks import shown
from longrope.errors import LongRopeError
from longrope.export.config import FORMS, PHI3
from longrope.export.forms import ExpressedScaling, express
from longrope.models.adapters import adapter_config_of, adapter_error
from longrope.models.checkpoint_files import RECORD, check_files
from longrope.models.loading import load_config
from longrope.models.rope_readers import keys_read_by_attention
from longrope.rope.geometry import RopeGeometry, text_config
from longrope.rope.hf_config import superset_config
from longrope.rope.scaling import RopeScaling, numbers_sha256
from longrope.run_files import SCALING
from longrope.storage import read_json, write_json_atomic


@dataclass(frozen=True, slots=True)
class FixResult:
    """A repaired config.json: one line for every key that changed; nothing was written where there is none."""

    path: Path
    target: str
    """The target that the checkpoint was exported for."""
    changes: list[str]


def fix_config(
    checkpoint: str | Path,
    scaling: RopeScaling | str | Path | None = None,
    *,
    target: str | None = None,
    fold_attention_factor: bool | None = None,
) -> FixResult:
    """Write config.json of the exported folder `checkpoint` again, with every key that some runtime reads.

    `scaling` is the one that was exported (default: the folder's scaling.json). config.json records the `target` and
    `fold_attention_factor` of the export under its key `longrope`; give them where that key is gone. The file is
    replaced in one step, and only when something changes.

    Raises LongRopeError when the folder is no checkpoint, when the scaling is missing or not the one that was exported,
    or when the record contradicts `target`, `fold_attention_factor` or the model.
    """
    folder = Path(checkpoint)
    path = folder / "config.json"
    if not os.path.lexists(path):
        if (adapter := adapter_config_of(path.parent)) is not None:
            raise adapter_error(adapter, str(adapter.parent))
        raise LongRopeError(
            f"expected a checkpoint folder with a config.json; found none in {folder}", code="no-such-model"
        )
    check_files(folder)
    if not isinstance(scaling, RopeScaling):
        place = Path(scaling or folder / SCALING)
        if not place.is_file():
            raise LongRopeError(
                f"there is no scaling at {place}", code="missing-scaling", hint="give the exported one as `scaling`"
            )
        scaling = RopeScaling.load(place)
    raw = read_json(path)
    config = load_config(str(folder))
    expressed = _expressed(raw, scaling, target, fold_attention_factor)
    family = text_config(config).model_type
    if expressed.form == PHI3 and family != "phi3":
        raise LongRopeError(
            f"expected the Phi-3 model that was exported in {folder}; found {family}", code="other-export"
        )
    geometry = RopeGeometry.from_config(config, original_length=scaling.geometry.original_length)
    # A recorded scaling is this model's: another base is then the loss of another tool, not a sign of another model.
    scaling.check_fits(replace(geometry, base=scaling.geometry.base) if RECORD in raw else geometry)
    record = raw.get(RECORD) or {}
    read = keys_read_by_attention(config)
    fixed = superset_config(raw, config, expressed.stated, read) | {RECORD: record | expressed.record()}
    changes = _changes(raw, fixed)
    if changes:
        write_json_atomic(path, fixed)
    return FixResult(path, expressed.form, changes)


def _expressed(
    raw: dict[str, Any], scaling: RopeScaling, target: str | None, fold_attention_factor: bool | None
) -> ExpressedScaling:
    """`scaling` as it was exported, by the record in config.json, or by the arguments where there is none."""
    record = raw.get(RECORD)
    if record is None:
        if target is None:
            raise LongRopeError(
                f"config.json does not say how it was exported (its key {RECORD!r} is gone)",
                code="missing-record",
                hint=f"give the `target` ({', '.join(FORMS)}), and `fold_attention_factor` if it was folded",
            )
        return express(scaling, target, bool(fold_attention_factor))
    if not isinstance(record, dict) or record.get("form") not in FORMS or "query_scale" not in record:
        raise LongRopeError(
            f"expected the record of an export under {RECORD!r} in config.json; found {shown(record)}",
            code="damaged-file",
        )
    was_folded = record["query_scale"] != 1.0
    given = {"target": (target, record["form"]), "fold_attention_factor": (fold_attention_factor, was_folded)}
    for name, (value, recorded) in given.items():
        if value not in (None, recorded):
            raise LongRopeError(
                f"config.json says that the export had the `{name}` {recorded}; found {value}", code="other-export"
            )
    if record.get("scaling_sha256") != numbers_sha256(scaling):
        raise LongRopeError(
            "this checkpoint was exported with another scaling", code="other-export", hint="give that one as `scaling`"
        )
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
