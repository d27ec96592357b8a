"""Export to a Hugging Face folder: weights, config.json, tokenizer, model card and scaling.json.

The forms `hf` and `hf-unified` keep the weights byte for byte, `phi3` stacks them; an attention factor may be folded
into them. Files of weights that do not change share their bytes on disk with the source's. The files appear in the
output folder only after the checkpoint was reloaded and compared.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Phi3Config

from longrope.errors import LongRopeError, one_line
from longrope.evaluation.results import EvalRow
from longrope.export.card import Serving, model_card, serving, thing_to_know
from longrope.export.config import NONE, PHI3, ROTARY, ExportConfig
from longrope.export.forms import ExpressedScaling, express, notes_on, unsupported_parts
from longrope.export.origin import CARD, origin_of, public_name
from longrope.export.phi3 import phi3_config, phi3_parts, require_eligible
from longrope.export.verify import Verification, verify_hf, verify_tokenizer
from longrope.export.weights import WeightPlan, fold_changes, rewrite, stored_tensors
from longrope.file_links import ABSENT
from longrope.models.checkpoint_files import (
    EMBEDDED_MODELS,
    RECORD,
    copy_companions,
    gguf_path,
    place_weights,
    raise_limits,
    refuse_folded,
    weight_files,
)
from longrope.models.dequantised import model_folder
from longrope.models.loading import load_config
from longrope.models.rope_readers import keys_read_by_attention
from longrope.models.scalable import require_scalable_config
from longrope.rope.geometry import RopeGeometry, text_config
from longrope.rope.hf_config import superset_config
from longrope.rope.scaling import RopeScaling
from longrope.run_files import SCALING
from longrope.storage import NewOutput, new_output_folder, read_json, write_json_atomic, write_text_atomic
from longrope.written import move_up, temporary_folder


@dataclass(frozen=True, slots=True)
class HfExport:
    """The result of an export to a folder; the fields are those of `ExportResult`."""

    verification: Verification | None
    unsupported: list[str]
    notes: list[str]
    servings: list[Serving]
    to_know: str
    weights: str


def export_hf(
    model_name: str,
    scaling: RopeScaling,
    output: Path,
    config: ExportConfig | None = None,
    *,
    evidence: Sequence[EvalRow] = (),
    original_length: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> HfExport:
    """Write the checkpoint of `model_name` extended by `scaling` to the new folder `output`.

    `evidence` goes into the model card. `original_length` goes before the window that the model's config states. The
    proof runs on `device`.

    Raises LongRopeError when the scaling is for another rotary embedding, when `output` is not empty or cannot be
    written, when transformers cannot express the scaling (and `config.allow_lossy` is not set), when the model has no
    such form or its attention factor cannot be folded, or when the reloaded checkpoint differs. `output` is then as it
    was.
    """
    config = config or ExportConfig()
    unsupported = unsupported_parts(scaling, "transformers", config.allow_lossy)
    expressed = express(scaling, config.target, config.fold_attention_factor)
    model_config = load_config(model_name, trust_remote_code=trust_remote_code)
    scaling.check_fits(RopeGeometry.from_config(model_config, original_length=original_length))
    require_scalable_config(model_config, trust_remote_code=trust_remote_code)
    code = ("*.py",) if trust_remote_code else ()
    from_gguf = gguf_path(model_name) is not None
    if config.config_only and from_gguf:
        raise LongRopeError(
            "`config_only` is for a model folder or a hub name, whose weights stay where they are; found a GGUF file",
            code="setting-of-another-target",
        )
    with model_folder(model_name, code, weights=not config.config_only) as source:
        raw = read_json(source / "config.json")
        refuse_folded(raw.get(RECORD), model_name)
        plan = None if config.config_only else _weight_plan(source, model_config, expressed)
        family = text_config(model_config).model_type
        read = keys_read_by_attention(model_config, trust_remote_code=trust_remote_code)
        to_know = thing_to_know(family, expressed)
        written = _exported_config(raw, model_config, expressed, read) | {RECORD: expressed.record()}
        begun = NewOutput(output)
        new_output_folder(output)
        try:
            # Everything is made and proved in a folder inside `output`, then moved up: the config last, because a
            # folder without it is no checkpoint.
            with temporary_folder(output / "checkpoint") as folder:
                copy_companions(source, folder, code)
                # The installed package is never linked to: a tool that writes in place would change it.
                copy = config.copy_weights or model_name in EMBEDDED_MODELS
                if config.config_only:
                    weights = ABSENT
                elif plan is None:
                    weights = place_weights(source, folder, copy=copy)
                else:
                    weights = rewrite(source, folder, plan, copy=copy)
                write_json_atomic(folder / "config.json", written)
                raise_limits(folder, scaling.target_length)
                scaling.save(folder / SCALING)
                if expressed.form == PHI3:
                    verify_tokenizer(folder, model_name)
                verification = None
                if config.proof != NONE:
                    verification = verify_hf(
                        folder,
                        expressed,
                        str(source) if from_gguf and config.proof == ROTARY else model_name,  # whole, or not at all
                        changes=None if plan is None else plan.changes,
                        device=device,
                        first_layers_only=config.proof == ROTARY,
                        trust_remote_code=trust_remote_code,
                    )
                if config.config_only:
                    _remove_unchanged(source, folder)
                record = expressed.record() | {
                    "proof": NONE if verification is None else verification.says(expressed.switch)
                }
                write_json_atomic(folder / "config.json", written | {RECORD: record})
                card = model_card(
                    model_name,
                    type(model_config).__name__,
                    scaling,
                    expressed,
                    verification,
                    unsupported,
                    evidence,
                    serving("PATH", public_name(model_name), family, expressed),
                    origin_of(model_name, source, scaling),
                    to_know,
                )
                write_text_atomic(folder / CARD, card)
                move_up(folder, last="config.json")
            begun.keep()
        except OSError as error:
            raise LongRopeError(
                f"cannot write the checkpoint to {output}: {one_line(error)}; nothing was left there",
                code="output-not-writable",
            ) from error
        finally:
            begun.remove()
        servings = [] if config.config_only else serving(str(output), model_name, family, expressed)
        return HfExport(verification, unsupported, notes_on(expressed), servings, to_know, weights)


def _remove_unchanged(source: Path, folder: Path) -> None:
    """Remove the files of `folder` that `source` has, too, with the same bytes."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        same = source / path.relative_to(folder)
        if same.is_file() and same.read_bytes() == path.read_bytes():
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _exported_config(
    raw: dict[str, Any], config: Any, expressed: ExpressedScaling, read: Collection[str]
) -> dict[str, Any]:
    """config.json of the exported model, without its record; `raw`, `config` and `read` are the source's."""
    if expressed.form == PHI3:
        raw = phi3_config(raw, config)
        config = Phi3Config(**raw)
    return superset_config(raw, config, expressed.stated, read)


def _weight_plan(source: Path, config: Any, expressed: ExpressedScaling) -> WeightPlan | None:
    """The tensors that change, or None where all are copied. Raises LongRopeError where they cannot be changed."""
    weight_files(source)
    geometry, scale = expressed.stated.geometry, expressed.query_scale
    if expressed.form == PHI3:
        require_eligible(config, geometry)
    elif scale == 1.0:
        return None
    tensors = stored_tensors(source)
    parts = phi3_parts(config, tensors) if expressed.form == PHI3 else {name: (name,) for name in tensors}
    return WeightPlan(parts, {} if scale == 1.0 else fold_changes(config, geometry, tensors, scale))
