"""What an export starts from: a model and a scaling, or the folder of a run, which says both by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longrope.errors import LongRopeError, one_line
from longrope.evaluation.results import EvalRow, load_evaluation
from longrope.models.load import resolve
from longrope.rope.scaling import RopeScaling

SCALING, EVALUATION, LOG = "scaling.json", "eval.json", "search.jsonl"


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
        if (folder / LOG).is_file():
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
