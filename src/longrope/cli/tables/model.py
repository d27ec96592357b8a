"""A model's rotary geometry, and the published factor tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longrope.cli.common import output, table
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.models.inspect import Inspection
    from longrope.rope.presets import PresetRow


def show_inspection(found: Inspection) -> None:
    """Print an inspection as a table."""
    shown = table(f"{found.model} ({found.model_type})", ["", ""])
    shown.show_header = False
    for row in found.rows():
        shown.add_row(*row)
    output.print(shown)


def show_presets(rows: Sequence[PresetRow]) -> None:
    """Print the published factor tables, a row each."""
    shown = table("", ["name", "model", "L", "L'", "s", "d", "base", "monotone", "role"])
    for row in rows:
        shown.add_row(
            row.name,
            row.model,
            format_length(row.original_length),
            format_length(row.target_length),
            f"{row.ratio:g}",
            str(row.rotary_dim),
            f"{row.base:g}",
            "yes" if row.monotone else "no",
            row.role,
        )
    output.print(shown)
