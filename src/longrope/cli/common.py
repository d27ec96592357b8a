"""What the verbs share: option types, quiet libraries, progress bars, tables, and the one JSON object of `--json`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from longrope.errors import LongRopeError
from longrope.storage import json_ready
from longrope.units import parse_length

if TYPE_CHECKING:
    from longrope.models.config import LoadOptions

# Tables are never cut: piped output is wide, a narrow terminal wraps.
output = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)
messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model folder, the folder of a run, a hub name (owner/model), 'tiny' or 'tiny-512x'."
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="Text: .txt(.gz|.xz), a folder, .jsonl, .parquet, book:NAME or hf:NAME. May be repeated."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, …")]
Attention = Annotated[str | None, typer.Option("--attn-implementation", help="sdpa, flash_attention_2, eager, …")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
OriginalLength = Annotated[
    str | None,
    typer.Option("--original-length", help="The window the model was trained with, where its config is wrong."),
]


def model_options(
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str | None = None,
    original_length: str | None = None,
    trust_remote_code: bool = False,
) -> LoadOptions:
    """The options of loading a model, from those of the command line."""
    from longrope.models.config import LoadOptions

    return LoadOptions(
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        original_length=parse_length(original_length) if original_length else None,
    )


def on_or_off(option: str, value: str) -> bool:
    """True for `on`, False for `off`. Raises LongRopeError for anything else."""
    if value not in ("on", "off"):
        raise LongRopeError(f"expected {option} on or off, found {value!r}")
    return value == "on"


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and remarks out of our output; their errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_json(value: dict[str, Any]) -> None:
    """One object on standard output. NaN and infinity, which JSON has not, become null."""
    typer.echo(json.dumps(json_ready(value), indent=1, ensure_ascii=False))


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on standard error; none where that is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        yield progress


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
