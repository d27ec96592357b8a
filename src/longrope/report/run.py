"""Writes the report on runs: an HTML page or Markdown, its figures as PNG and SVG, and its tables as CSV."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from longrope import __version__
from longrope.errors import LongRopeError
from longrope.report.collect import collect
from longrope.report.markdown import render_markdown
from longrope.report.page import Report, build, render
from longrope.storage import check_output_file, check_output_folder, write_text_atomic
from longrope.written import note, sha256_file, sweep, temporary

Format = Literal["html", "md"]


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    html: Path
    """The page, or the Markdown file."""
    figures: list[Path]
    """Each figure as PNG and as SVG."""
    tables: list[Path] = field(default_factory=list)
    """Every table as CSV, beside the figures."""


def report(
    runs: Sequence[Path | str], output: Path, figures: Path | None = None, *, format: Format | None = None
) -> Written:
    """Write the report on `runs` (run folders and evaluation files) to the new file `output`.

    `format`: html, one self-contained page; or md, Markdown that shows the figures of the folder beside it, for a pull
    request or a model card. By default md for a file that ends in .md, else html. Every table is a CSV file beside the
    figures too.

    Figures go to the new folder `figures`, by default beside the page: `report.html` has `report_figures/`. The same
    runs give the same bytes, so that figures which a report that was stopped has left are kept where they are the same.

    Raises LongRopeError for runs that cannot be read and for outputs that exist; nothing is overwritten.
    """
    folder = figures or figures_folder(output)
    check_output_file(output)
    sweep(output.parent, output.name)
    sweep(folder.parent, folder.name)
    made = build(collect([Path(run) for run in runs]))
    markdown = (format or ("md" if output.suffix == ".md" else "html")) == "md"
    shown = Path(os.path.relpath(folder, output.parent))
    page = render_markdown(made, __version__, shown) if markdown else render(made, __version__)
    figure_files, tables = _save_figures(made, folder)
    write_text_atomic(output, page, new=True)
    return Written(output, figure_files, tables)


def figures_folder(output: Path) -> Path:
    """The default folder for the figures of the page `output`."""
    return output.with_name(f"{output.stem}_figures")


def _save_figures(made: Report, folder: Path) -> tuple[list[Path], list[Path]]:
    """All figures, and all tables as CSV, in a folder that appears when it is whole."""
    names: list[str] = []
    tables: list[str] = []
    whole = temporary(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        whole.mkdir()
        try:
            for exhibit in made.exhibits:
                if exhibit.drawing is not None:
                    names += [path.name for path in exhibit.drawing.save(whole, exhibit.name)]
                for name, text in exhibit.csv_files.items():
                    (whole / name).write_text(text, "utf-8", newline="")
                    tables.append(name)
            hashes = {name: sha256_file(whole / name) for name in (*names, *tables)}
            if folder.is_dir() and hashes == _hashes(folder):
                return [folder / name for name in names], [folder / name for name in tables]
            check_output_folder(folder)
            note(folder.parent, {f"{folder.name}/{name}": digest for name, digest in hashes.items()})
            os.replace(whole, folder)  # takes the place of an empty folder
        finally:
            shutil.rmtree(whole, ignore_errors=True)
    except OSError as error:
        raise LongRopeError(
            f"cannot write the figures to {folder}: {error.strerror}",
            code="output-not-writable",
            hint="choose another `figures`",
        ) from error
    return [folder / name for name in names], [folder / name for name in tables]


def _hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of all that is in `folder`."""
    return {path.name: sha256_file(path) if path.is_file() else "" for path in folder.iterdir()}
