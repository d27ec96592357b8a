"""`longrope report RUN… -o report.html`: one self-contained page of runs and their measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from longrope.cli.common import output as console
from longrope.cli.common import print_json
from longrope.cli.options import Json, option, out
from longrope.cli.verb import verb
from longrope.storage import check_output_file

RUNS = "Folders of search or extend runs, and evaluation files; an evaluation joins the run it measured."
FORMAT = "html, or md: Markdown for a pull request or a model card. Default: by the name of the file."
FIGURES = "A new folder for the figures as PNG and SVG and the tables as CSV. Default: NAME_figures/ beside."


@verb
def command(
    runs: Annotated[list[Path], option(RUNS)],
    /,
    *,
    output: Annotated[Path, out("The new file.")] = Path("report.html"),
    figures: Annotated[Path | None, option(FIGURES)] = None,
    format: Annotated[Literal["html", "md"] | None, option(FORMAT)] = None,
    as_json: Json = False,
) -> None:
    """Write a report on one run, or on several side by side: an HTML or Markdown file, figures and tables."""
    check_output_file(output)
    from longrope.report.run import report

    written = report(runs, output, figures, format=format)
    if as_json:
        made = {"figures": written.figures, "tables": written.tables}
        print_json({"report": str(written.html)} | {name: list(map(str, files)) for name, files in made.items()})
        return
    console.print(f"report:  {written.html}")
    for name, files, kinds in (("figures", written.figures[::2], "PNG and SVG"), ("tables", written.tables, "CSV")):
        if files:
            console.print(f"{name + ':':8} {files[0].parent} ({len(files)}, each as {kinds})")
