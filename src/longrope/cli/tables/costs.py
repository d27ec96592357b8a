"""The costs of jobs before they are done: the table of `longrope plan`, and that of a recipe's stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longrope.cli.common import output, table
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.costs.plan import CostPlan
    from longrope.recipes.run import PreparedRecipe


def show_costs(planned: CostPlan) -> None:
    """Print a plan: a table, what does not fit, and the assumptions."""
    from longrope.costs.advice import gigabytes

    shape, devices = planned.shape, planned.devices
    active = shape.active_weights + shape.head_weights
    output.print(
        f"{planned.model}: {shape.parameters:,} weights, {active:,} multiplied with a token; "
        f"{format_length(planned.original_length)} -> {format_length(planned.target_length)} tokens"
    )
    rows = table(
        f"on {devices.count} × {devices.gpu}, {devices.dtype}",
        ["", "tokens", "FLOPs", "matrices", "attention", "GB a device", "fits", "hours", "devices", ""],
    )
    rows.columns[-1].justify = "left"
    for row in planned.rows:
        flops = row.matrix_flops + row.attention_flops
        rows.add_row(
            f"{row.stage} {row.name}",
            f"{row.tokens:.3g}",
            f"{flops:.3g}",
            f"{row.matrix_flops / flops:.0%}",
            f"{row.attention_flops / flops:.0%}",
            gigabytes(row.peak_bytes),
            "yes" if row.fits else "NO",
            hours(row.hours),
            str(row.devices),
            row.detail,
        )
    output.print(rows)
    misfits: dict[str, list[str]] = {}
    for row in planned.rows:
        if not row.fits:
            misfits.setdefault(row.advice, []).append(f"{row.stage} {row.name}")
    for advice, names in misfits.items():
        output.print(f"does not fit: {', '.join(names)}: {advice}")
    output.print("assumed:")
    for line in planned.assumptions:
        output.print(f"- {line}")


def hours(value: float) -> str:
    """`0.02`, `3.1`, `1,240`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def show_recipe_costs(name: str, prepared: PreparedRecipe) -> None:
    """The steps with tokens, FLOPs and time, before any is begun; those that are finished cost nothing any more."""
    costs, finished = prepared.costs, prepared.finished
    title = f"{name} on {prepared.loaded.name}, {format_length(prepared.loaded.geometry.original_length)} tokens"
    rows = table(title, ["stage", "tokens", "FLOPs", "time", "what"])
    rows.columns[-1].justify = "left"
    for cost, done in zip(costs, finished, strict=True):
        time = "finished" if done else _duration(cost.seconds)
        rows.add_row(cost.title, f"{cost.tokens:,}", f"{cost.flops:.2g}", time, cost.detail)
    left = [cost for cost, done in zip(costs, finished, strict=True) if not done]
    flops, seconds = sum(cost.flops for cost in left), sum(cost.seconds for cost in left)
    rows.add_row("to do", f"{sum(cost.tokens for cost in left):,}", f"{flops:.2g}", _duration(seconds))
    output.print(rows)
    output.print(
        "at most, on one device at the rate that short texts were scored with just now; tokens count a backward pass "
        "twice"
    )
    output.print()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
