"""`longrope extend MODEL` without a recipe: inspect, search, compare, export, prove, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longrope.cli.common import output, print_json, quiet_libraries
from longrope.cli.progress import progress
from longrope.cli.tables.costs import show_extension_costs
from longrope.cli.tables.model import show_inspection
from longrope.cli.tables.runs import show_extension
from longrope.models.config import LoadOptions
from longrope.search.config import EVOLUTION, SearchConfig
from longrope.storage import check_output_folder

DEMONSTRATION = {"samples": 3, "population": 32, "iterations": 20}
"""The budget of the search; the last two are evolution's."""


def run(
    model: str | None,
    output_dir: Path,
    search: dict[str, Any],
    load: LoadOptions,
    log_dir: Path | None,
    report_to: str,
    as_json: bool,
    **job: Any,
) -> None:
    """`search`: the settings of the search that were given. `job`: arguments of `prepare_extension`."""
    if not job["resume"]:
        check_output_folder(output_dir)
    from longrope.models.checkpoint_files import EMBEDDED
    from longrope.models.inspect import inspect_model
    from longrope.models.loading import open_model
    from longrope.recipes.extend import check_data, prepare_extension, summary

    quiet_libraries()
    evolves = search.get("method", SearchConfig().method) in EVOLUTION
    budget = DEMONSTRATION if evolves else {"samples": DEMONSTRATION["samples"]}
    config = SearchConfig(**budget | search)
    model = model or EMBEDDED
    check_data(model, job["search_data"], job["evaluation_data"], job["field"], load)
    found = inspect_model(model, original_length=load.original_length, trust_remote_code=load.trust_remote_code)
    if not as_json:
        show_inspection(found)
        output.print()
    prepared = prepare_extension(open_model(model, options=load), output_dir=output_dir, config=config, **job)
    if not as_json:
        show_extension_costs(prepared.costs())
    with progress(lambda shown: shown.after_search(output_dir), log_dir, report_to) as shown:
        extension = prepared.run(shown)
        shown.measured(extension.evaluation.rows)
    print_json(summary(extension)) if as_json else show_extension(extension, output_dir)
