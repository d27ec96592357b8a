"""The model and the scaling of an export: from a run, a file, or a formula that needs no search."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from longrope.errors import LongRopeError, one_line
from longrope.evaluation.results import EvalResults, EvalRow
from longrope.models.adapters import adapter_config_of, adapter_error
from longrope.models.checkpoint_files import resolve
from longrope.models.loading import config_and_scaling, load_config
from longrope.rope.closed_form_scalings import FORMULAS
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, numbers_sha256
from longrope.run_files import CHECKPOINT, EVALUATION, FINETUNE_SUMMARY, RECIPE, SCALING, SEARCH_LOG, STAGE


@dataclass(frozen=True)
class ExportSource:
    """The model and the scaling to export, and the measurements of the run that they come from."""

    model: str
    scaling: RopeScaling
    scaling_path: Path | None
    original_length: int | None = None
    """The original window where it is not the one that the model's config states."""
    evidence: list[EvalRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """The parts of the run that cannot be used."""


def find_source(
    model: str | Path,
    scaling: RopeScaling | str | Path | None = None,
    original_length: int | None = None,
    target_length: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> ExportSource:
    """Find the model and the scaling to export; the arguments are those of `export_checkpoint`.

    Raises LongRopeError, with the place, when the model or the scaling is not found.
    """
    if target_length is not None and not is_formula(scaling):
        raise LongRopeError(
            "`target_length` goes with a `scaling` that is a formula: every other scaling has its own",
            code="invalid-setting",
            hint=f"the formulas are {', '.join(FORMULAS)}",
        )
    folder = Path(model).expanduser()
    if folder.is_dir() and not os.path.lexists(folder / "config.json"):
        return _source_of_run(folder, scaling, original_length, target_length)
    if scaling is None:
        scaling = Path(resolve(str(model))) / SCALING
        if not scaling.is_file():
            stated = config_and_scaling(model, original_length, trust_remote_code=trust_remote_code)[2]
            if stated is None:
                raise LongRopeError(
                    f"expected a `scaling` for the model {model}, whose config states none",
                    code="missing-scaling",
                    hint="give the file of a search, or a formula (`scaling` yarn and the `target_length`)",
                )
            return ExportSource(str(model), stated, None, original_length)
    elif is_formula(scaling):
        if target_length is None:
            raise LongRopeError(
                f"expected a `target_length` with the formula {scaling}, found none", code="missing-scaling"
            )
        config = load_config(str(model), trust_remote_code=trust_remote_code)
        geometry = RopeGeometry.from_config(config, original_length=original_length)
        return ExportSource(str(model), FORMULAS[str(scaling)](geometry, target_length), None, original_length)
    return ExportSource(str(model), *_read(scaling), original_length)


def is_formula(scaling: object) -> bool:
    """True if `scaling` is the name of a formula, and no file has that name."""
    return isinstance(scaling, str | Path) and str(scaling) in FORMULAS and not Path(scaling).exists()


def _source_of_run(
    folder: Path, given: RopeScaling | str | Path | None, original_length: int | None, target_length: int | None
) -> ExportSource:
    """The model, scaling and evaluation of the run in `folder`; a `given` scaling goes before the run's own."""
    path = folder / SCALING
    if (adapter := adapter_config_of(folder)) is not None:  # its training is in no weights yet
        raise adapter_error(adapter, str(adapter.parent))
    if not path.is_file():
        if (folder / SEARCH_LOG).is_file():
            raise LongRopeError(
                f"the run in {folder} has no {SCALING} yet", code="unfinished-run", hint="resume it, then export"
            )
        raise LongRopeError(
            f"expected a model folder with a config.json, or a run folder with a {SCALING}; found neither in {folder}",
            code="no-such-model",
        )
    own = RopeScaling.load(path)
    model = _model_of_run(folder, own.provenance.get("model"))
    hint = f"give the model itself, and {path} as `scaling`"
    if not isinstance(model, str):
        raise LongRopeError(f"{path} does not say which model it is for", code="no-such-model", hint=hint)
    try:
        resolve(model)
    except LongRopeError as error:
        raise LongRopeError(
            f"{path} is for the model {model}, which is not found from here ({error.message})",
            code="no-such-model",
            hint=hint,
        ) from error
    if is_formula(given):
        given = FORMULAS[str(given)](own.geometry, target_length or own.target_length)
    scaling, scaling_path = _read(path if given is None else given)
    evidence: list[EvalRow] = []
    notes = []
    if given is None:
        try:
            if (folder / EVALUATION).is_file():
                evidence = list(EvalResults.load(folder / EVALUATION).rows)
            evidence += measured_stages(folder, own, Path(str(model)).name)
        except LongRopeError as error:
            notes.append(f"the run's measurements are left out of the model card: {one_line(error)}")
    # The run was made with this original length, stated or given.
    original_length = original_length or own.geometry.original_length
    return ExportSource(model, scaling, scaling_path, original_length, evidence, notes)


def measured_stages(run: Path, scaling: RopeScaling, weights: str = "", end: str | None = None) -> list[EvalRow]:
    """The rows of a recipe's evaluate stages about `scaling`: those behind the stage `weights`, which made the weights,
    and before the stage `end`. Raises LongRopeError for a result that cannot be read.
    """
    rows: list[EvalRow] = []
    wanted = numbers_sha256(scaling)
    for folder in sorted(run.glob("[0-9]*-evaluate")):
        after = not (run / weights).is_dir() or folder.name > weights
        finished = after and (end is None or folder.name < end) and (folder / STAGE).is_file()
        if finished and numbers_sha256(RopeScaling.load(folder / SCALING)) == wanted:
            rows += EvalResults.load(folder / EVALUATION).rows
    return rows


def _model_of_run(folder: Path, recorded: object) -> object:
    """The model of a run: its own checkpoint, wherever the run lies now, else the one that its scaling names."""
    if (folder / FINETUNE_SUMMARY).is_file() and (folder / CHECKPOINT / "config.json").is_file():
        return str(folder / CHECKPOINT)
    if isinstance(recorded, str) and (folder / RECIPE).is_file():
        stage = folder / Path(recorded).name
        return str(stage) if (stage / FINETUNE_SUMMARY).is_file() else recorded
    return recorded


def _read(scaling: RopeScaling | str | Path) -> tuple[RopeScaling, Path | None]:
    """A scaling and the path that it was read from; None for one that was given as an object."""
    if isinstance(scaling, RopeScaling):
        return scaling, None
    return RopeScaling.load(scaling), Path(scaling)
