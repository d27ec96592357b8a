"""Export to a plain Hugging Face folder: weights, a superset config, tokenizer, a card and `scaling.json`.

`hf` and `hf-unified` copy the weights byte for byte, `phi3` stacks them; an attention factor may be folded into them.
The folder appears under its name only after it was reloaded and proved equal to the installed scaling.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Phi3Config

from longrope.errors import LongRopeError, one_line
from longrope.evaluation.results import EvalRow
from longrope.export.card import Serving, model_card, public_name, serving
from longrope.export.config import HF, PHI3
from longrope.export.forms import Expression, express, notes_on, require_lossless
from longrope.export.phi3 import phi3_config, phi3_parts, require_eligible
from longrope.export.verify import Verification, verify_hf, verify_tokenizer
from longrope.export.weights import Rewrite, fold_changes, rewrite, stored_tensors
from longrope.models.checkpoint_files import (
    RECORD,
    copy_companions,
    copy_weights,
    raise_limits,
    refuse_folded,
    source_folder,
    weight_files,
)
from longrope.models.loading import load_config
from longrope.rope.geometry import RopeGeometry, text_config
from longrope.rope.hf_config import superset_config, unsupported_by_transformers
from longrope.rope.scaling import RopeScaling
from longrope.storage import new_output_folder, read_json, write_json_atomic, write_text_atomic


@dataclass(frozen=True, slots=True)
class Export:
    """Where an export lies, what proved it, what it lost (empty: nothing), what it means, and how to serve it."""

    path: Path
    verification: Verification
    losses: list[str]
    notes: list[str]
    servings: list[Serving]


def export_hf(
    model_name: str,
    scaling: RopeScaling,
    out: Path,
    *,
    form: str = HF,
    fold_attention_factor: bool = False,
    allow_lossy: bool = False,
    evidence: list[EvalRow] | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> Export:
    """Write the checkpoint of `model_name` extended by `scaling` to the new folder `out`.

    `form` is one of `forms.FORMS`. `original_length` overrides the window that the source's config states.

    Raises LongRopeError when the scaling is for another rotary embedding, when `out` is not empty or cannot be
    written, when transformers cannot express the scaling (and `allow_lossy` is not set), when the model has no such
    form or its attention factor cannot be folded, or when the reloaded checkpoint differs. `out` is then as it was.
    """
    losses = unsupported_by_transformers(scaling)
    require_lossless(losses, "transformers", allow_lossy)
    expression = express(scaling, form, fold_attention_factor)
    config = load_config(model_name, trust_remote_code=trust_remote_code)
    scaling.check_fits(RopeGeometry.from_config(config, original_length=original_length))
    code = ("*.py",) if trust_remote_code else ()
    source = source_folder(model_name, code)
    raw = read_json(source / "config.json")
    refuse_folded(raw.get(RECORD), model_name)
    plan = _rewrite_plan(source, config, expression)
    family = text_config(config).model_type
    existed = out.is_dir()
    new_output_folder(out)
    try:
        # Everything is made and proved in a folder inside `out`, then moved up: the config last, because a folder
        # without it is no checkpoint.
        with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as temporary:
            folder = Path(temporary)
            copy_companions(source, folder, code)
            if plan is None:
                copy_weights(source, folder)
            else:
                rewrite(source, folder, plan)
            settings = exported_config(raw, config, expression) | {RECORD: expression.record()}
            write_json_atomic(folder / "config.json", settings)
            raise_limits(folder, scaling.target_length)
            scaling.save(folder / "scaling.json")
            if form == PHI3:
                verify_tokenizer(folder, model_name)
            verification = verify_hf(
                folder,
                expression,
                source=None if plan is None else model_name,
                changes=None if plan is None else plan.changes,
                trust_remote_code=trust_remote_code,
            )
            card = model_card(
                model_name,
                type(config).__name__,
                scaling,
                expression,
                verification,
                losses,
                evidence or [],
                serving("PATH", public_name(model_name), family, expression),
            )
            write_text_atomic(folder / "README.md", card)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(out / path.name)
    except OSError as error:
        raise LongRopeError(
            f"cannot write the checkpoint to {out}: {one_line(error)}; nothing was left there"
        ) from error
    finally:
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    return Export(out, verification, losses, notes_on(expression), serving(str(out), model_name, family, expression))


def exported_config(raw: dict[str, Any], config: Any, expression: Expression) -> dict[str, Any]:
    """config.json of the exported model, without its record; `raw` and `config` are the source's."""
    if expression.form == PHI3:
        raw = phi3_config(raw, config)
        config = Phi3Config(**raw)
    return superset_config(raw, config, expression.stated)


def _rewrite_plan(source: Path, config: Any, expression: Expression) -> Rewrite | None:
    """How the tensors change, or None where they are copied. Refuses what cannot be done before anything is written."""
    weight_files(source)
    geometry = expression.stated.geometry
    if expression.form == PHI3:
        require_eligible(config, geometry)
    if expression.form != PHI3 and expression.query_scale == 1.0:
        return None
    tensors = stored_tensors(source)
    parts = phi3_parts(config, tensors) if expression.form == PHI3 else {name: (name,) for name in tensors}
    scale = expression.query_scale
    return Rewrite(parts, {} if scale == 1.0 else fold_changes(config, geometry, tensors, scale))
