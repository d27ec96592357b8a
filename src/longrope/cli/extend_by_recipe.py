"""`longrope extend MODEL --recipe NAME|file.yaml`: the plan first, then stage after stage."""

from __future__ import annotations

from pathlib import Path

from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.progress import progress
from longrope.cli.tables.costs import show_recipe_costs
from longrope.cli.tables.runs import show_recipe
from longrope.models.config import LoadOptions

INTERRUPTED = "interrupted; finished stages are kept, and the same command goes on from there"


def run(
    model: str | None,
    name: str,
    output_dir: Path,
    load: LoadOptions,
    data: list[str],
    eval_data: list[str],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Print the costs of the recipe; without `dry_run`, run it too, or go on with it."""
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
