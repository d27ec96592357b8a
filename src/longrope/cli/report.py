"""`longrope report RUN… -o report.html`: one self-contained page of runs and their measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from longrope.cli.common import output as console
from longrope.cli.common import print_json
from longrope.cli.options import Json, option, out
from longrope.cli.verb import verb
from longrope.storage import check_output_file

RUNS = "Folders of search or extend runs, and evaluation files; an evaluation joins the run it measured."
FIGURES = "A new folder for the figures as PNG and SVG. Default: NAME_figures/ beside."


@verb
def command(
    runs: Annotated[list[Path], option(RUNS)],
    /,
    *,
    output: Annotated[Path, out("The new HTML file.")] = Path("report.html"),
    figures: Annotated[Path | None, option(FIGURES)] = None,
    as_json: Json = False,
) -> None:
    """Write a report on one run, or on several side by side: one HTML file, and its figures as PNG and SVG."""
    check_output_file(output)
    from longrope.report.run import report

    written = report(runs, output, figures)
    if as_json:
        print_json({"report": str(written.html), "figures": [str(path) for path in written.figures]})
        return
    console.print(f"report:  {written.html}")
    if written.figures:
        console.print(f"figures: {written.figures[0].parent} ({len(written.figures) // 2}, each as PNG and SVG)")
