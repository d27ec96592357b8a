"""`longrope inspect MODEL`: rotary geometry, critical dimensions, the scaling present."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longrope.cli.common import Json, Model, OriginalLength, RemoteCode, output, print_json, quiet_libraries, table
from longrope.units import format_length, parse_length

if TYPE_CHECKING:
    from longrope.models.inspect import Inspection


def command(
    model: Model,
    original_length: OriginalLength = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show a model's rotary geometry: periods, critical dimensions, the scaling already present."""
    from longrope.models.inspect import inspect_model

    quiet_libraries()
    length = parse_length(original_length) if original_length else None
    found = inspect_model(model, original_length=length, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(found.to_json())
    else:
        show(found)


def _tokens(length: int) -> str:
    """`8192 tokens (8k)`; the short form only where it is one."""
    short = format_length(length)
    return f"{length} tokens" + ("" if short == str(length) else f" ({short})")


def show(found: Inspection) -> None:
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
