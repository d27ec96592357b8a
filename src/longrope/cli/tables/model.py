"""A model's rotary geometry, and the published factor tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longrope.cli.common import output, table
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.models.inspect import Inspection
    from longrope.rope.presets import PresetRow


def _tokens(length: int) -> str:
    """`8192 tokens (8k)`; the short form only where it is one."""
    short = format_length(length)
    return f"{length} tokens" + ("" if short == str(length) else f" ({short})")


def show_inspection(found: Inspection) -> None:
    """Print an inspection as a table."""
    rows = table(f"{found.model} ({found.model_type})", ["", ""])
    rows.show_header = False
    rows.add_row("original window L", _tokens(found.original_length))
    if found.context_window != found.original_length:
        rows.add_row("window of the checkpoint", _tokens(found.context_window))
    rows.add_row("rotary dimension", f"{found.rotary_dim} ({found.pairs} pairs), base {found.base:g}")
    rows.add_row("periods", f"{found.fastest_period:.2f} … {found.slowest_period:,.0f} tokens")
    rows.add_row(
        "critical dimension", f"pair {found.critical_dim} (fewer than 10 periods from pair {found.critical_dim_10})"
    )
    rows.add_row("rope type", found.rope_type)
    if found.layer_types:
        rows.add_row("one RoPE per layer type", f"{', '.join(found.layer_types)}; full_attention is scaled")
    if found.sliding_window:
        rows.add_row("sliding window", f"{found.sliding_window} tokens: layers that slide never look further")
    for window in found.existing_windows:
        rows.add_row(
            f"scaling present, ≤ {window['max_length']}",
            f"λ {window['first_factor']:g} … {window['last_factor']:g}, "
            f"attention factor {window['attention_factor']:g}",
        )
    output.print(rows)


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
