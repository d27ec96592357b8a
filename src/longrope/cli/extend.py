"""`longrope extend [MODEL]`: the whole way to a proven checkpoint and a report. Without MODEL, the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from longrope.cli import options as given
from longrope.cli.common import output, print_json, quiet_libraries
from longrope.cli.progress import progress, scalars_in
from longrope.cli.tables.costs import show_recipe_costs
from longrope.cli.tables.model import show_inspection
from longrope.cli.tables.runs import show_extension, show_recipe
from longrope.cli.verb import Options, verb
from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.search.config import EVOLUTION, SearchConfig
from longrope.storage import check_output_folder

DEMONSTRATION = {"samples": 3, "population": 32, "iterations": 20}
"""The budget of the search; the last two are evolution's."""
INTERRUPTED = "interrupted; finished stages are kept, and the same command goes on from there"
SEARCH = Options("Search", of=SearchConfig, switches=("racing",), defaults=DEMONSTRATION)


@verb
def command(
    model: given.OptionalModel = None,
    /,
    *,
    recipe: given.Recipe = None,
    dry_run: given.DryRun = False,
    output_dir: Annotated[Path, given.out("A new folder for everything the run makes.")] = Path("run"),
    target_length: given.OptionalLength = None,
    data: given.Data = None,
    allow_lossy: given.AllowLossy = False,
    eval_data: given.EvalData = None,
    lengths: given.EvalLengths = None,
    eval_samples: given.EvalSamples = None,
    search: Annotated[dict[str, Any], SEARCH],
    load: given.Load,
    resume: given.Resume = False,
    log_dir: given.LogDir = None,
    as_json: given.Json = False,
) -> None:
    """Extend a model's window and prove it, by a search alone or by a recipe."""
    of_search = {"target_length": target_length, "lengths": lengths, "eval_samples": eval_samples, "log_dir": log_dir}
    if recipe is None:
        if dry_run:
            raise LongRopeError(
                "`dry_run` prints the plan of a `recipe`", hint="without one, longrope plan says what things cost"
            )
        job = {"search_data": data or [], "evaluation_data": eval_data or [], "evaluation_samples": eval_samples or 10}
        job |= {"target_length": target_length, "lengths": lengths, "allow_lossy": allow_lossy, "resume": resume}
        _by_search(model, output_dir, search, load, log_dir, as_json, **job)
        return
    unused = [name for name, value in of_search.items() if value is not None] + ["allow_lossy"] * allow_lossy
    unused += ["dtype"] * ("dtype" in load.model_fields_set) + list(search)
    if unused:
        options = ", ".join(f"`{name}`" for name in unused)
        raise LongRopeError(f"with `recipe` every stage has its own settings: write {options} into the recipe")
    _by_recipe(model, recipe, output_dir, load, data or [], eval_data or [], dry_run, as_json)


def _by_search(
    model: str | None,
    output_dir: Path,
    search: dict[str, Any],
    load: LoadOptions,
    log_dir: Path | None,
    as_json: bool,
    **job: Any,
) -> None:
    """Extend by a search alone. `search`: the given settings of it. `job`: arguments of `longrope.recipes.extend`."""
    if not job["resume"]:
        check_output_folder(output_dir)
    from longrope.models.checkpoint_files import EMBEDDED
    from longrope.models.inspect import inspect_model
    from longrope.models.loading import open_model
    from longrope.recipes.extend import extend, summary

    quiet_libraries()
    evolves = search.get("method", "longrope") in EVOLUTION
    budget = DEMONSTRATION if evolves else {"samples": DEMONSTRATION["samples"]}
    config = SearchConfig(**budget | search)
    model = model or EMBEDDED
    found = inspect_model(model, original_length=load.original_length, trust_remote_code=load.trust_remote_code)
    if not as_json:
        show_inspection(found)
        output.print()
    loaded = open_model(model, options=load)
    with scalars_in(log_dir) as scalars, progress(lambda shown: shown.after_search(output_dir), scalars) as shown:
        extension = extend(loaded, output_dir=output_dir, config=config, callbacks=shown, **job)
        scalars.measured(extension.evaluation.rows)
    print_json(summary(extension)) if as_json else show_extension(extension, output_dir)


def _by_recipe(
    model: str | None,
    name: str,
    output_dir: Path,
    load: LoadOptions,
    data: list[str],
    eval_data: list[str],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Print the costs of the recipe `name`; without `dry_run`, run it too, or go on with it."""
    from longrope.recipes.run import prepare_recipe

    quiet_libraries()
    prepared = prepare_recipe(name, model, output_dir, data=data, eval_data=eval_data, load=load)
    if not as_json:
        show_recipe_costs(name, prepared)
    if dry_run:
        prepared.check()
        if as_json:
            print_json(prepared.to_json())
        return
    with progress(lambda _: INTERRUPTED, stage_lines=not as_json) as shown:
        result = prepared.run(shown)
    print_json(result.to_json()) if as_json else show_recipe(result)
