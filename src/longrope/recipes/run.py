"""Prepare and run a recipe: stage after stage, each in its own folder, with the results of the stages before it.

`run/recipe.json` identifies the run, `run/NN-stage/` holds the results of a stage and, written last, its `stage.json`;
`run/scaling.json` and `run/result.json` come at the end, with `run/report.html` where anything was evaluated. The same
command goes on with a run that was stopped anywhere: a finished stage is never run again, one in the middle resumes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longrope.callbacks import Callbacks
from longrope.data.sources import Field, as_fields
from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.models.devices import moved_to_cpu
from longrope.models.loading import LoadedModel, config_and_scaling, open_model
from longrope.provenance import record
from longrope.recipes.check import TextRounds, check_recipe, stage_texts
from longrope.recipes.costs import StepCost, measure_rates, recipe_costs
from longrope.recipes.folder import RunFolder, read_object
from longrope.recipes.graph import Step, steps
from longrope.recipes.schema import EvaluateStage, ExportStage, FinetuneStage, Recipe
from longrope.recipes.stages import Stages
from longrope.recipes.yaml import load_recipe, recipe_model
from longrope.report.run import report
from longrope.rope.scaling import RopeScaling
from longrope.run_files import CHECKPOINT, EVALUATION, REPORT, RESULT, SCALING, STAGE
from longrope.storage import json_ready, keep_or_write_json, write_json_atomic
from longrope.units import parse_length
from longrope.written import recorded, sha256_file


@dataclass(frozen=True)
class RecipeResult:
    """The result of a run. `stages`: each stage's own summary, by folder; `scaling`, its `path` and the `model` it is
    for."""

    stages: dict[str, dict[str, Any]]
    scaling: RopeScaling
    path: Path
    model: str
    report: Path | None

    def to_json(self) -> dict[str, Any]:
        written = None if self.report is None else str(self.report)
        return {"model": self.model, "scaling": str(self.path), "report": written, "stages": self.stages}


def run_recipe(
    loaded: LoadedModel, recipe: Recipe, out: Path, callbacks: Callbacks | None = None, *, checked: bool = False
) -> RecipeResult:
    """Run `recipe` on `loaded`, the model it begins with, into the folder `out`, or go on with the same run there.

    The model is opened again for every stage, in its `dtype` and otherwise as `loaded` was; `loaded` itself leaves a
    GPU to them. `checked`: `check_recipe` has passed just now. Raises LongRopeError, before any work is done, for an
    order of stages that cannot be, for texts, memory and the folder.
    """
    planned = _steps(recipe, loaded)
    folder = RunFolder.of(out, loaded, recipe, planned)
    folder.check()
    if not checked:
        check_recipe(loaded, recipe, planned, folder.finished())
    with moved_to_cpu(loaded.model), folder.claimed():
        run = _Run(Stages(loaded, recipe, out, callbacks or Callbacks()), len(planned))
        summaries = {step.folder: run.finish(place, step) for place, step in enumerate(planned, start=1)}
        assert run.scaling is not None  # `steps` has refused a recipe that makes none
        path = out / SCALING
        keep_or_write_json(path, json.loads(run.scaling.to_json()))
        evaluated = [out / step.folder for step in planned if isinstance(step.stage, EvaluateStage)]
        page = out / REPORT if evaluated else None
        if page is not None and not page.exists():
            report(evaluated, page)
        result = RecipeResult(summaries, run.scaling, path, run.model, page)
        if not (out / RESULT).exists():
            write_json_atomic(out / RESULT, json_ready(result.to_json()) | record(), new=True)
    return result


def _steps(recipe: Recipe, loaded: LoadedModel) -> list[Step]:
    scaled = loaded.checkpoint_scaling is not None
    return steps(recipe, loaded.geometry.original_length, loaded.context_length, scaled=scaled)


class _Run:
    """The state of a run: the model and the scaling that the finished stages have left."""

    def __init__(self, stages: Stages, count: int) -> None:
        self.stages, self.out, self.count = stages, stages.out, count
        self.model = stages.base.name
        own = stages.base.checkpoint_scaling
        self.scaling = None if own is None else own.with_provenance(model=self.model)
        self.provenance: dict[str, Any] = {}
        self.hashes: dict[str, dict[str, str]] = {}

    def finish(self, place: int, step: Step) -> dict[str, Any]:
        """Run a step, or the rest of it, unless it is finished. Returns its summary."""
        folder = self.out / step.folder
        finished = (folder / STAGE).is_file()
        self.stages.callbacks.on_stage(step.title, place, self.count, finished)
        read = {name: self.hashes[name] for name in step.reads}
        if finished:
            summary = _finished(folder, read)
        else:
            began = time.monotonic()
            summary = self.stages.run(step, self.scaling)
            hashed = recorded(folder)  # big files are read once
            files = {name: _only(hashed.get(name)) or sha256_file(folder / name) for name in _results(step, folder)}
            summary = json_ready(summary | {"seconds": time.monotonic() - began, "sha256": files, "read": read})
            write_json_atomic(folder / STAGE, summary)
        self.hashes[step.folder] = summary["sha256"]
        if not isinstance(step.stage, EvaluateStage | ExportStage):
            made = RopeScaling.load(folder / SCALING)
            self.provenance[step.folder] = made.provenance
            if isinstance(step.stage, FinetuneStage):
                self.model = str(folder)
            self.scaling = replace(made, provenance={"model": self.model, "stages": dict(self.provenance)})
        return summary


def _finished(folder: Path, read: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The summary of a finished stage. Raises LongRopeError where its results, or those it read, have changed since."""
    summary = read_object(folder / STAGE)
    again = f"remove {folder} and the folders after it to run those stages again"
    for name, digest in summary["sha256"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise LongRopeError(
                f"{folder / name} is not what this run wrote there",
                code="damaged-file",
                hint=f"put it back, or {again}",
            )
    for name, digests in summary.get("read", {}).items():
        if read.get(name) != digests:
            raise LongRopeError(
                f"{folder} was made from another {name} than there is now",
                code="damaged-file",
                hint=f"put that back, or {again}",
            )
    return summary


def _only(hashes: set[str] | None) -> str | None:
    """The one hash that a file was written with."""
    return next(iter(hashes)) if hashes is not None and len(hashes) == 1 else None


def _results(step: Step, folder: Path) -> list[str]:
    """The files that later stages and the report read."""
    names = [name for name in (SCALING, EVALUATION) if (folder / name).is_file()]
    weights = (folder / CHECKPOINT).glob("*.safetensors") if isinstance(step.stage, FinetuneStage) else ()
    return [*names, *sorted(path.relative_to(folder).as_posix() for path in weights)]


@dataclass(frozen=True)
class PreparedRecipe:
    """A recipe that can run on a model. `finished`: for each step, whether an earlier run in `folder` has done it."""

    loaded: LoadedModel
    recipe: Recipe
    steps: list[Step]
    costs: list[StepCost]
    finished: list[bool]
    folder: RunFolder

    def check(self) -> list[TextRounds]:
        """The rounds over its texts of every fine-tuning to be done.

        Raises LongRopeError for texts, lengths and memory that some step could not work with.
        """
        return check_recipe(self.loaded, self.recipe, self.steps, self.folder.finished())

    def run(self, callbacks: Callbacks | None = None, *, checked: bool = False) -> RecipeResult:
        """Run the steps that are not finished; `checked` after `check`, which need not be done twice."""
        return run_recipe(self.loaded, self.recipe, self.folder.path, callbacks, checked=checked)

    def to_json(self) -> dict[str, Any]:
        """The steps with their costs."""
        rows = zip(self.costs, self.finished, strict=True)
        return {"steps": [cost.to_json() | {"finished": done} for cost, done in rows]}


def prepare_recipe(
    name: str,
    model: str | None,
    output_dir: Path,
    *,
    data: Sequence[str] = (),
    eval_data: Sequence[str] = (),
    field: Field | None = None,
    target_length: int | str | None = None,
    load: LoadOptions | None = None,
) -> PreparedRecipe:
    """Read the recipe `name` (or a YAML file), open the model and time a short text for the costs.

    `data`, `eval_data` and `field` replace the recipe's texts and the field of their rows, `target_length` its longest
    target. Raises LongRopeError for a recipe that cannot be, for a missing model, and for a folder of another run.
    """
    load = load or LoadOptions()
    own, original_length = recipe_model(name)
    model = model or own
    if model is None:
        raise LongRopeError(f"the recipe {name} is for any model", code="no-such-model", hint="give a `model`")
    if load.original_length is None:
        load = load.replace(original_length=original_length)
    trusted = load.trust_remote_code
    original = config_and_scaling(model, load.original_length, trust_remote_code=trusted)[1].original_length
    recipe = load_recipe(name, original).with_data(tuple(data), tuple(eval_data), as_fields(field))
    for stage in recipe.stages:  # before a model of gigabytes is read
        stage_texts(model, recipe, stage)
    loaded = open_model(model, options=load)
    if target_length is not None:
        recipe = recipe.with_target_length(parse_length(target_length))
    planned = _steps(recipe, loaded)
    folder = RunFolder.of(output_dir, loaded, recipe, planned)
    folder.check()
    finished = [step.folder in folder.finished() for step in planned]
    return PreparedRecipe(
        loaded, recipe, planned, recipe_costs(loaded, planned, measure_rates(loaded)), finished, folder
    )
