"""`longrope extend [MODEL]`: the whole way to a proven checkpoint and a report. Without MODEL, the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from longrope.cli import extend_by_recipe, extend_by_search
from longrope.cli import options as given
from longrope.cli.verb import Options, verb
from longrope.errors import LongRopeError
from longrope.search.config import SearchConfig

SEARCH = Options("Search", of=SearchConfig, switches=("racing",), defaults=extend_by_search.DEMONSTRATION)


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
    field: given.Field = None,
    allow_lossy: given.AllowLossy = False,
    eval_data: given.EvalData = None,
    lengths: given.EvalLengths = None,
    eval_samples: given.EvalSamples = None,
    search: Annotated[dict[str, Any], SEARCH],
    ray: given.Ray,
    load: given.Load,
    resume: given.Resume = False,
    log_dir: given.LogDir = None,
    report_to: given.ReportTo = "",
    as_json: given.Json = False,
) -> None:
    """Extend a model's window and prove it, by a search alone or by a recipe."""
    of_search = {"lengths": lengths, "eval_samples": eval_samples, "log_dir": log_dir} | ray.model_dump()
    if recipe is None:
        if dry_run:
            raise LongRopeError(
                "`dry_run` prints the plan of a `recipe`", hint="without one, longrope plan says what things cost"
            )
        job = {"search_data": data or [], "evaluation_data": eval_data or [], "evaluation_samples": eval_samples or 10}
        job |= {"target_length": target_length, "lengths": lengths, "allow_lossy": allow_lossy}
        job |= {"field": field, "resume": resume, "ray": ray}
        extend_by_search.run(model, output_dir, search, load, log_dir, report_to, as_json, **job)
        return
    unused = [name for name, value in of_search.items() if value is not None] + ["allow_lossy"] * allow_lossy
    unused += ["report_to"] * bool(report_to) + ["dtype"] * ("dtype" in load.model_fields_set) + list(search)
    if unused:
        options = ", ".join(f"`{name}`" for name in unused)
        raise LongRopeError(f"with `recipe` every stage has its own settings: write {options} into the recipe")
    extend_by_recipe.run(
        model, recipe, output_dir, load, data or [], eval_data or [], field, target_length, dry_run, as_json
    )
