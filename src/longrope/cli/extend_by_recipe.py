"""`longrope extend MODEL --recipe NAME|file.yaml`: the plan first, then stage after stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longrope.cli.common import messages, output, print_json, quiet_libraries
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
    field: list[str] | None,
    target_length: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Print the costs of the recipe and how often it reads its texts; without `dry_run`, run it too, or go on."""
    from longrope.recipes.run import prepare_recipe

    quiet_libraries()
    texts: dict[str, Any] = {"data": data, "eval_data": eval_data, "field": field}
    prepared = prepare_recipe(name, model, output_dir, **texts, target_length=target_length, load=load)
    rounds = prepared.check()  # before its costs: a plan above an error would look as if it had begun
    if not as_json:
        show_recipe_costs(name, prepared)
    for found in rounds:
        if not as_json:
            output.print(str(found))
        if found.warning is not None:
            messages.print(f"longrope: warning: {found.warning}")
    if dry_run:
        if as_json:
            print_json(prepared.to_json() | {"rounds": {found.title: found.rounds for found in rounds}})
        return
    with progress(lambda _: INTERRUPTED, stage_lines=not as_json) as shown:
        result = prepared.run(shown, checked=True)
    print_json(result.to_json()) if as_json else show_recipe(result)
