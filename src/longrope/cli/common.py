"""Consoles, tables, numbers and JSON for what verbs print, and how much they say."""

from __future__ import annotations

import json
import logging
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from longrope.storage import json_ready

# The width is the terminal's; without one, that of COLUMNS, else 80. Tables that are wider are printed in parts.
output = Console(highlight=False, markup=False, soft_wrap=True)
messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
log = logging.getLogger("longrope")


class _Lines(logging.Handler):
    """Log records as lines of `messages`."""

    def emit(self, record: logging.LogRecord) -> None:
        messages.print(self.format(record))


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """`verbose`: log lines on standard error, and details in what is printed. `quiet`: no progress and no remarks."""
    messages.quiet = quiet and not verbose
    log.handlers.clear()
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        handler = _Lines()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)


def is_verbose() -> bool:
    """True under --verbose."""
    return log.level == logging.INFO


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and remarks out of our output; their errors still come through."""
    from transformers.utils import logging as transformers_logging

    if log.level != logging.INFO:
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def speaks() -> bool:
    """True unless this is one of several processes that share a job, and not the first, which alone prints."""
    processes: Any = sys.modules.get("longrope.models.processes")  # imported by jobs that know several
    return processes is None or not processes.is_silent()


def warn(warnings: Iterable[str]) -> None:
    """Warnings of a result on standard error, a line each."""
    for warning in warnings:
        messages.print(f"longrope: warning: {warning}")


def print_json(value: dict[str, Any]) -> None:
    """One object on standard output. NaN and infinity, which JSON has not, become null."""
    print(json.dumps(json_ready(value), indent=1, ensure_ascii=False))


def say(text: str, indent: str = "", style: str | None = None) -> None:
    """Print a sentence, wrapped between words at the width of the output; later lines are indented by `indent`."""
    lines = textwrap.wrap(text, output.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    output.print("\n".join(lines), style=style)


def show_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", texts: Sequence[int] = (), best: int = -1
) -> None:
    """Print a table. Where it is wider than the output, its columns come in several parts below one another.

    The first column and those of the indices `texts` are words, set to the left; a last column of words wraps. The
    others are numbers. The row of index `best` is bold. Every part repeats the first column.
    """
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    wraps = len(columns) - 1 if len(columns) - 1 in texts else None
    if wraps is not None:
        widths[wraps] = min(widths[wraps], max(24, cell_len(columns[wraps])))
    parts: list[list[int]] = [[]]
    for index in range(1, len(columns)):
        width = sum(widths[shown] + 2 for shown in (0, *parts[-1], index)) - 2
        if parts[-1] and width > output.width:
            parts.append([])
        parts[-1].append(index)
    for number, part in enumerate(parts):
        shown = Table(
            title=title if number == 0 and title else None,
            title_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
            header_style="bold",
        )
        for index in (0, *part):
            words = index == 0 or index in texts
            shown.add_column(
                columns[index], justify="left" if words else "right", overflow="fold", no_wrap=index not in (0, wraps)
            )
        for place, row in enumerate(rows):
            shown.add_row(*(row[index] for index in (0, *part)), style="bold" if place == best else None)
        output.print(shown, soft_wrap=False)


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table; large ones without decimals."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}f}"
