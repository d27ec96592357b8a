"""The costs of jobs before they are done: the table of `longrope plan`, and that of a recipe's stages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from longrope.cli.common import is_verbose, output, say, show_table
from longrope.quantities import format_bytes, format_count, format_duration, format_gpu_hours
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.costs.plan import CostPlan, CostRow
    from longrope.recipes.costs import StepCost
    from longrope.recipes.run import PreparedRecipe


_MEASURED = "estimated from short texts scored on this machine just now; a backward pass counts as two tokens"


def show_costs(planned: CostPlan) -> None:
    """Print a plan: the recommended search, a table, what does not fit, and the assumptions.

    With --verbose: FLOPs and their shares, the details of each row, and all assumptions.
    """
    devices = planned.devices
    say(
        f"{planned.model}: {format_length(planned.original_length)} -> {format_length(planned.target_length)} tokens "
        f"on {_with_options(devices.label)}",
        "  ",
    )
    say(planned.recommendation, "  ")
    output.print()
    columns = ["", "tokens", "memory", "fits", "time", f"{devices.noun}-hours"]
    best = next((place for place, row in enumerate(planned.rows) if row is planned.recommended), -1)
    show_table(columns, [_cells(row) for row in planned.rows], best=best)
    _show_exchange(planned)
    _show_misfits(planned)
    if is_verbose():
        _show_details(planned)
    output.print()
    if not is_verbose():
        say(
            f"Memory is that of one device. Assumed, not measured: {devices.mfu:.0%} of the peak rate "
            f"({devices.peak_tflops:g} TFLOP/s) for matrices, {devices.chosen_attention_mfu:.0%} for attention. "
            "--verbose: FLOPs, details, all assumptions.",
        )
        return
    output.print("assumed:")
    for line in planned.assumptions:
        say(f"- {line}", "  ")


def _cells(row: CostRow) -> list[str]:
    return [
        f"{row.stage} {row.name}",
        format_count(row.tokens),
        format_bytes(row.peak_bytes),
        "yes" if row.fits else "NO",
        format_duration(3600 * row.hours),
        format_gpu_hours(row.gpu_hours),
    ]


def _show_exchange(planned: CostPlan) -> None:
    """Print which share of the time devices that share texts wait for one another."""
    shares = {f"{row.stage} {row.name}": row.exchange_hours / row.hours for row in planned.rows if row.exchange_hours}
    if shares:
        low, high = (f"{100 * share:.1f}" for share in (min(shares.values()), max(shares.values())))
        which = f"{low}%" if low == high else f"{low} to {high}%"
        noun = planned.devices.noun
        say(f"Every text is shared: {which} of the time of searches and evaluations, {noun}s exchange keys and values.")


def _show_misfits(planned: CostPlan) -> None:
    """Print once what is missing for the rows that do not fit."""
    misfits: dict[str, list[str]] = {}
    for row in planned.rows:
        if not row.fits:
            misfits.setdefault(row.advice, []).append(f"{row.stage} {row.name}")
    for advice, names in misfits.items():
        say(f"does not fit: {', '.join(names)}: {_with_options(advice)}", "  ")


def _with_options(text: str) -> str:
    """`text` with the options of the command line in the place of Python arguments."""
    return re.sub(r"`(\w+)`", lambda match: f"--{match[1].replace('_', '-')}", text)


def _show_details(planned: CostPlan) -> None:
    """Print the weights of the model, and for every row FLOPs and the work that they are for."""
    shape = planned.shape
    active = shape.active_weights + shape.head_weights
    output.print()
    say(f"{shape.parameters:,} weights, {active:,} multiplied with a token")
    lines = []
    for row in planned.rows:
        flops = row.matrix_flops + row.attention_flops
        shares = f"{row.matrix_flops / flops:.0%}", f"{row.attention_flops / flops:.0%}"
        lines.append([f"{row.stage} {row.name}", f"{flops:.2g}", *shares, str(row.devices), row.detail])
    show_table(["", "FLOPs", "matrices", "attention", "devices", "what"], lines, texts=(5,))


def show_extension_costs(costs: list[StepCost]) -> None:
    """The stages of `longrope extend` that take long, before they begin."""
    lines = [[cost.title, format_count(cost.tokens), format_duration(cost.seconds), cost.detail] for cost in costs]
    show_table(["stage", "tokens", "time", "what"], lines, texts=(3,))
    say(f"about {format_duration(sum(cost.seconds for cost in costs))} here: {_MEASURED}")
    output.print()


def show_recipe_costs(name: str, prepared: PreparedRecipe) -> None:
    """The steps with tokens and time, before any is begun; those that are finished cost nothing any more."""
    costs, finished = prepared.costs, prepared.finished
    left = [cost for cost, done in zip(costs, finished, strict=True) if not done]
    lines = [
        [
            cost.title,
            format_count(cost.tokens),
            *([f"{cost.flops:.2g}"] if is_verbose() else []),
            "finished" if done else format_duration(cost.seconds),
            cost.detail,
        ]
        for cost, done in zip(costs, finished, strict=True)
    ]
    tokens, flops = sum(cost.tokens for cost in left), sum(cost.flops for cost in left)
    time = format_duration(sum(cost.seconds for cost in left)) if left else "–"
    lines.append(["to do", format_count(tokens), *([f"{flops:.2g}"] if is_verbose() else []), time, ""])
    columns = ["stage", "tokens", *(["FLOPs"] if is_verbose() else []), "time", "what"]
    say(f"{name} on {prepared.loaded.name}, {format_length(prepared.loaded.geometry.original_length)} tokens")
    show_table(columns, lines, texts=(len(columns) - 1,))
    say(f"at most, {_MEASURED}")
    output.print()
