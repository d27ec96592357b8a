"""A model's rotary geometry, and the published factor tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longrope.cli.common import is_verbose, say, show_table
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.models.inspect import Inspection
    from longrope.rope.presets import PresetRow


def show_inspection(found: Inspection) -> None:
    """Print an inspection: a line for each fact."""
    rows = found.rows()
    width = max(len(name) for name, _ in rows) + 2
    say(f"{found.model} ({found.model_type})", "  ")
    for name, value in rows:
        say(f"{name:{width}}{value}", " " * width)


def show_presets(rows: Sequence[PresetRow], model: str | None = None) -> None:
    """Print the published factor tables, a row each; with --verbose the rotary dimension and the base too.

    `model`: the model that the rows are for, where they are not all there are.
    """
    if model is not None:
        say(
            f"Published factors of the rotary geometry of {model}; they are right for the model that they were "
            "searched for alone. longrope presets NAME -o scaling.json writes them",
            "  ",
        )
    lines = []
    for row in rows:
        window = f"{format_length(row.original_length)} -> {format_length(row.target_length)}"
        details = [str(row.rotary_dim), f"{row.base:g}", "yes" if row.monotone else "no"] if is_verbose() else []
        lines.append([row.name, row.model, window, *details, row.role])
    columns = ["name", "model", "window", *(["d", "base", "monotone"] if is_verbose() else []), "role"]
    show_table(columns, lines, texts=(1, 2, len(columns) - 1))
