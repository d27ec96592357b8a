"""`longrope export` as a function: a model or a run in, a checkpoint for one kind of runtime out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.export.forms import FORMS, HF, RECORD, refuse_folded
from longrope.export.hf import export_hf
from longrope.export.serve import Serving
from longrope.export.source import find_source
from longrope.export.verify import Verification
from longrope.files import check_output_file, check_output_folder
from longrope.models.load import load_config

GGUF = "gguf"
TARGETS = (*FORMS, GGUF)


@dataclass(frozen=True)
class Exported:
    """What was written from which model and scaling. A GGUF file has notes in place of a verification and servings."""

    target: str
    path: Path
    model: str
    scaling_path: Path
    losses: list[str]
    notes: list[str]
    verification: Verification | None = None
    servings: list[Serving] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What `longrope export --json` prints; `checkpoint` is the path."""
        found = asdict(self)
        return {"checkpoint": str(found.pop("path")), **found, "scaling_path": str(self.scaling_path)}


def export(
    run_or_model: str,
    out: Path,
    *,
    to: str = HF,
    scaling_path: Path | None = None,
    gguf: Path | None = None,
    fold_attention_factor: bool = False,
    allow_lossy: bool = False,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write the target `to` (one of TARGETS) of a run, or of a model with the scaling at `scaling_path`, to `out`.

    `gguf` is an existing GGUF file of the model, to which the scaling is added.

    Raises LongRopeError for whatever cannot be done exactly; nothing that exists is overwritten.
    """
    if to not in TARGETS:
        raise LongRopeError(f"expected --to {', '.join(TARGETS[:-1])} or {TARGETS[-1]}; found {to!r}")
    if to == GGUF and fold_attention_factor:
        raise LongRopeError(
            "a GGUF file states the attention factor, and llama.cpp applies it: there is nothing to fold"
        )
    if to != GGUF and gguf is not None:
        raise LongRopeError(f"--gguf goes with --to {GGUF}; found --to {to}")
    (check_output_file if to == GGUF else check_output_folder)(out)
    source = find_source(run_or_model, scaling_path, original_length)
    if to == GGUF:
        from longrope.export.gguf import export_gguf  # needs the gguf package

        refuse_folded(getattr(load_config(source.model), RECORD, None), source.model)
        written = export_gguf(source.model, source.scaling, out, existing=gguf, allow_lossy=allow_lossy)
        return Exported(to, written.path, source.model, source.scaling_path, written.losses, written.notes)
    done = export_hf(
        source.model,
        source.scaling,
        out,
        form=to,
        fold_attention_factor=fold_attention_factor,
        allow_lossy=allow_lossy,
        evidence=source.evidence,
        original_length=source.original_length,
        trust_remote_code=trust_remote_code,
    )
    return Exported(
        to,
        done.path,
        source.model,
        source.scaling_path,
        done.losses,
        [*source.notes, *done.notes],
        done.verification,
        done.servings,
    )
