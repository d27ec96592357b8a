"""`longrope report RUN… -o report.html`: one self-contained page of what was done and how well it works."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import Json, output, print_json
from longrope.storage import check_output_file


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of search or extend runs, and evaluation files; an evaluation joins the run it measured.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="The new HTML file.")] = Path("report.html"),
    figures: Annotated[
        Path | None,
        typer.Option("--figures", help="A new folder for the figures as PNG and SVG; default: NAME_figures/ beside."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a report on one run, or on several side by side: a single HTML file, and its figures as PNG and SVG."""
    check_output_file(out)
    from longrope.report.run import report

    written = report(runs, out, figures)
    if as_json:
        print_json({"report": str(written.html), "figures": [str(path) for path in written.figures]})
        return
    output.print(f"report:  {written.html}")
    if written.figures:
        output.print(f"figures: {written.figures[0].parent} ({len(written.figures) // 2}, each as PNG and SVG)")
