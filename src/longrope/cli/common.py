"""Consoles, tables, numbers and JSON for what verbs print, and how much they say."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from longrope.storage import json_ready

# Tables are never cut: piped output is wide, a narrow terminal wraps.
output = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)
messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
log = logging.getLogger("longrope")


class _Lines(logging.Handler):
    """Log records as lines of `messages`."""

    def emit(self, record: logging.LogRecord) -> None:
        messages.print(self.format(record))


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """`verbose`: log lines on standard error. `quiet`: neither progress nor remarks there."""
    messages.quiet = quiet and not verbose
    log.handlers.clear()
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        handler = _Lines()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and remarks out of our output; their errors still come through."""
    from transformers.utils import logging as transformers_logging

    if log.level != logging.INFO:
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def warn(warnings: Iterable[str]) -> None:
    """Warnings of a result on standard error, a line each."""
    for warning in warnings:
        messages.print(f"longrope: warning: {warning}")


def print_json(value: dict[str, Any]) -> None:
    """One object on standard output. NaN and infinity, which JSON has not, become null."""
    print(json.dumps(json_ready(value), indent=1, ensure_ascii=False))


def table(title: str, columns: list[str]) -> Table:
    """An empty table; the first column is text, the others numbers."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return result


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table; large ones without decimals."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.{digits}f}"
