"""`longrope extend MODEL --recipe NAME|file.yaml`: the plan first, then stage after stage."""

from __future__ import annotations

from pathlib import Path

from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.progress import progress
from longrope.cli.tables.costs import show_recipe_costs
from longrope.cli.tables.runs import show_recipe
from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.units import format_length


def run(
    model: str | None,
    name: str,
    output_dir: Path,
    loading: LoadOptions,
    data: list[str],
    eval_data: list[str],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Print what the recipe will cost; unless that is all that was asked for, run it, or go on with it."""
    from longrope.models.loading import open_model
    from longrope.recipes.check import check_recipe
    from longrope.recipes.costs import measure_rates, recipe_costs
    from longrope.recipes.folder import RunFolder
    from longrope.recipes.graph import steps
    from longrope.recipes.run import run_recipe
    from longrope.recipes.stages import Listener
    from longrope.recipes.yaml import load_recipe, recipe_model

    quiet_libraries()
    own, original_length = recipe_model(name)
    model = model or own
    if model is None:
        raise LongRopeError(
            f"the recipe {name} is for any model: give one, as in longrope extend MODEL --recipe {name}"
        )
    if loading.original_length is None:
        loading = loading.replace(original_length=original_length)
    loaded = open_model(model, options=loading)
    recipe = load_recipe(name, loaded.geometry.original_length)
    recipe = recipe.with_data(tuple(data), tuple(eval_data))
    planned = steps(recipe, loaded.geometry.original_length, loaded.context_length)
    folder = RunFolder.of(output_dir, loaded, recipe, planned)
    folder.check()
    finished = [step.folder in folder.finished() for step in planned]
    costs = recipe_costs(loaded, planned, measure_rates(loaded))
    if not as_json:
        title = f"{name} on {model}, {format_length(loaded.geometry.original_length)} tokens"
        show_recipe_costs(costs, finished, title)
    if dry_run:
        check_recipe(loaded, recipe, planned, folder.finished())
        if as_json:
            rows = zip(costs, finished, strict=True)
            print_json({"steps": [cost.to_json() | {"finished": done} for cost, done in rows]})
        return
    note = "interrupted; what is finished is kept, and the same command goes on from there"
    with progress(lambda _: note, stage_lines=not as_json) as shown:
        listener = Listener(
            on_step=lambda place, step, finished: shown.on_stage(step.title, place, len(planned), finished),
            on_search_start=shown.on_search_start,
            on_search_progress=shown.on_search_progress,
            on_training_start=shown.on_train_start,
            on_training_progress=shown.on_train_progress,
            on_evaluation_start=shown.on_eval_start,
            on_evaluation_sample=shown.on_eval_step,
        )
        result = run_recipe(loaded, recipe, output_dir, listener)
    if as_json:
        print_json(result.to_json())
    else:
        show_recipe(result)
