"""`longrope extend [MODEL]`: the whole way to a proven checkpoint and a report. Without MODEL, the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.types import PositiveInt

from longrope.cli import recipe as recipe_verb
from longrope.cli.common import output as console
from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.options import Data, Json, Load, LogDir, Options, Resume, output, verb
from longrope.cli.progress import progress, scalars_in
from longrope.cli.tables.model import show_inspection
from longrope.cli.tables.runs import show_extension
from longrope.errors import LongRopeError
from longrope.search.config import EVOLUTION, SearchConfig
from longrope.storage import check_output_folder
from longrope.units import parse_length, parse_lengths

RECIPES, COMPARISON = Group("A recipe", sort_key=1), Group("Comparison", sort_key=2)
SMALL = {"population": 32, "iterations": 20}
"""The budget of a demonstration, of the methods that have one."""
RECIPE = (
    "longrope, longrope2, quick, or a YAML file: its stages in place of a search alone. The same command goes on with "
    "a run that was stopped."
)


@verb
def command(
    model: Annotated[
        str | None, Parameter(help="A model folder, a hub name, or 'tiny'. Default: tiny, or the recipe's own.")
    ] = None,
    /,
    *,
    recipe: Annotated[str | None, Parameter(group=RECIPES, help=RECIPE)] = None,
    dry_run: Annotated[bool, Parameter(group=RECIPES, help="Check the recipe, print its plan, stop.")] = False,
    output_dir: Annotated[Path, output("A new folder for everything the run makes.")] = Path("run"),
    target_length: Annotated[str | None, Parameter(metavar="TOKENS", help="L'. Default: 8 L.")] = None,
    data: Data = None,
    allow_lossy: Annotated[bool, Parameter(help="Export even what the runtime cannot express.")] = False,
    eval_data: Annotated[
        list[str] | None, Parameter(group=COMPARISON, metavar="TEXT", help="Other text to compare on.")
    ] = None,
    lengths: Annotated[
        str | None, Parameter(group=COMPARISON, metavar="N,N,…", help="Context lengths. Default: L, 2L, … L'.")
    ] = None,
    eval_samples: Annotated[
        PositiveInt | None, Parameter(group=COMPARISON, help="Held-out texts per length. Default: 10.")
    ] = None,
    search: Annotated[
        dict[str, Any],
        Options("Search", of=SearchConfig, switches=("racing",), defaults=SMALL | {"samples": 3}),
    ],
    load: Load,
    resume: Resume = False,
    log_dir: LogDir = None,
    as_json: Json = False,
) -> None:
    """Extend a model's window and prove it, by a search alone or by a recipe.

    Without a recipe, the budget of the search is that of a demonstration.
    """
    if recipe is not None:
        own = {"target_length": target_length, "lengths": lengths, "eval_samples": eval_samples, "log_dir": log_dir}
        given = [name for name, value in own.items() if value is not None] + ["allow_lossy"] * allow_lossy
        given += [name for name in load.model_fields_set if name == "dtype"] + list(search)
        if given:
            options = ", ".join(f"`{name}`" for name in given)
            raise LongRopeError(f"with `recipe` every stage has its own settings: write {options} into the recipe")
        recipe_verb.run(
            model, recipe, output_dir, load, data=data, eval_data=eval_data, dry_run=dry_run, as_json=as_json
        )
        return
    if dry_run:
        raise LongRopeError("--dry-run prints the plan of a --recipe; without one, longrope plan says what things cost")
    length = parse_length(target_length) if target_length else None
    if not resume:
        check_output_folder(output_dir)
    from longrope.models.checkpoint_files import EMBEDDED
    from longrope.models.inspect import inspect_model
    from longrope.models.loading import open_model
    from longrope.recipes.extend import Listener, extend, summary

    quiet_libraries()
    model = model or EMBEDDED
    small = SMALL if search.get("method", "longrope") in EVOLUTION else {}
    config = SearchConfig(**{"samples": 3} | small | search)
    found = inspect_model(model, original_length=load.original_length, trust_remote_code=load.trust_remote_code)
    if not as_json:
        show_inspection(found)
        console.print()
    loaded = open_model(model, options=load)
    with scalars_in(log_dir) as scalars, progress(lambda shown: shown.after_search(output_dir), scalars) as shown:
        extension = extend(
            loaded,
            length or 8 * loaded.geometry.original_length,
            output_dir,
            search_data=data or [],
            evaluation_data=eval_data or [],
            lengths=parse_lengths(lengths) if lengths else None,
            evaluation_samples=10 if eval_samples is None else eval_samples,
            options=config,
            allow_lossy=allow_lossy,
            resume=resume,
            listener=Listener(
                on_stage=shown.on_stage,
                on_search_start=shown.on_search_start,
                on_search_progress=shown.on_search_progress,
                on_evaluation_start=shown.on_eval_start,
                on_evaluation_sample=shown.on_eval_step,
            ),
        )
        scalars.measured(extension.evaluation.rows)
    if as_json:
        print_json(summary(extension))
    else:
        show_extension(extension, output_dir)
