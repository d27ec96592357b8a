"""`longrope export` as a function: a model or a run in, a checkpoint for one kind of runtime out.

What an export starts from: a model and a scaling, or the folder of a run, which says both by itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError, one_line
from longrope.evaluation.results import EvalRow, load_evaluation
from longrope.export.card import Serving
from longrope.export.config import GGUF, HF, TARGETS
from longrope.export.hf import export_hf
from longrope.export.verify import Verification
from longrope.models.checkpoint_files import RECORD, refuse_folded, resolve
from longrope.models.loading import load_config
from longrope.rope.scaling import RopeScaling
from longrope.run_files import EVALUATION, SCALING, SEARCH_LOG
from longrope.storage import check_output_file, check_output_folder


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
        from longrope.export.gguf.export import export_gguf  # needs the gguf package

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


@dataclass(frozen=True)
class Source:
    """A model, its scaling, and what a run measured with it; `notes` say what of the run could not be used."""

    model: str
    scaling: RopeScaling
    scaling_path: Path
    original_length: int | None
    """The original window where it is not the one that the model's config states."""
    evidence: list[EvalRow]
    notes: list[str]


def find_source(run_or_model: str, scaling_path: Path | None = None, original_length: int | None = None) -> Source:
    """The model and the scaling of a run folder (`longrope search` or `extend`), or of a model and a scaling file.

    A model folder that holds a `scaling.json`, as every export does, brings its own; `scaling_path` goes before either.

    Raises LongRopeError when the model or the scaling is not found, and says where it was looked for.
    """
    folder = Path(run_or_model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        return _run(folder, scaling_path, original_length)
    if scaling_path is None:
        place = Path(resolve(run_or_model))
        scaling_path = place / SCALING
        if not scaling_path.is_file():
            raise LongRopeError(
                f"expected --scaling FILE for the model {run_or_model}; only the folder of a run brings its own"
            )
    return Source(run_or_model, RopeScaling.load(scaling_path), scaling_path, original_length, [], [])


def _run(folder: Path, scaling_path: Path | None, original_length: int | None) -> Source:
    own = folder / SCALING
    if not own.is_file():
        if (folder / SEARCH_LOG).is_file():
            raise LongRopeError(f"the run in {folder} has no {SCALING} yet: go on with it (--resume), then export")
        raise LongRopeError(
            f"expected a model folder with a config.json, or a run folder with a {SCALING}; found neither in {folder}"
        )
    made = RopeScaling.load(own)
    model = made.provenance.get("model")
    if not isinstance(model, str):
        raise LongRopeError(f"{own} does not say which model it is for; give it: longrope export MODEL --scaling {own}")
    try:
        resolve(model)
    except LongRopeError as error:
        raise LongRopeError(
            f"{own} is for the model {model}, which is not found from here ({error}); give it: longrope export MODEL "
            f"--scaling {own}"
        ) from error
    scaling = made if scaling_path is None else RopeScaling.load(scaling_path)
    evidence: list[EvalRow] = []
    notes = []
    if scaling_path is None and (folder / EVALUATION).is_file():
        try:
            evidence = load_evaluation(folder / EVALUATION).rows
        except LongRopeError as error:
            notes.append(f"the run's measurements are left out of the model card: {one_line(error)}")
    # The run was made with this original length, stated or given.
    return Source(
        model, scaling, scaling_path or own, original_length or made.geometry.original_length, evidence, notes
    )
