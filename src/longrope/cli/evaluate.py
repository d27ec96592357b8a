"""`longrope eval MODEL --suite perplexity --lengths 256,512 --scaling run/scaling.json`: measurements by length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longrope.cli.common import (
    Attention,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    OriginalLength,
    RemoteCode,
    Seed,
    model_options,
    number,
    output,
    print_json,
    progress_bar,
    quiet_libraries,
    table,
)
from longrope.files import check_output_file, write_json_atomic
from longrope.lengths import parse_length, parse_lengths

if TYPE_CHECKING:
    from longrope.evaluation.results import EvalRow


def command(
    model: Model,
    lengths: Annotated[str, typer.Option("--lengths", help="Context lengths in tokens: 256,512,1k.")],
    suite: Annotated[str, typer.Option("--suite", help="perplexity.")] = "perplexity",
    data: Data = None,
    scaling: Annotated[
        Path | None, typer.Option("--scaling", help="A scaling.json; without it, the model as it is.")
    ] = None,
    against: Annotated[str, typer.Option("--against", help="Closed forms to compare with: none,pi,ntk,yarn,…")] = "",
    target_length: Annotated[
        str | None, typer.Option("--target-length", help="L' of the closed forms; default: the scaling's.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Texts per length, one per document first.")] = 10,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="Sliding window with this stride (the paper's is 256).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the results as a new JSON file here.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    attn_implementation: Attention = None,
    original_length: OriginalLength = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity by context length, with and without a scaling."""
    parsed = parse_lengths(lengths)
    target = parse_length(target_length) if target_length else None
    if out is not None:
        check_output_file(out)
    from longrope.pipeline.evaluate import evaluate
    from longrope.pipeline.subject import open_model
    from longrope.rope.scaling import RopeScaling

    quiet_libraries()
    loaded = RopeScaling.load(scaling) if scaling is not None else None
    subject = open_model(model, model_options(dtype, device, attn_implementation, original_length, trust_remote_code))
    with progress_bar() as progress:
        task = progress.add_task("preparing", total=None, note="")
        result = evaluate(
            subject,
            parsed,
            data or [],
            suites=[name.strip() for name in suite.split(",")],
            scaling=loaded,
            scaling_name=str(scaling) if scaling is not None else "checkpoint",
            against=[name.strip() for name in against.split(",") if name.strip()],
            target_length=target,
            samples=samples,
            seed=seed,
            stride=stride,
            on_start=lambda total: progress.update(task, description="eval", total=total),
            on_sample=lambda: progress.advance(task),
        )
    if as_json:
        print_json(result.to_json())
    else:
        show(result.rows)
    if out is not None:
        write_json_atomic(out, result.to_json())


def show(rows: Sequence[EvalRow]) -> None:
    """Print perplexities as a table: one row per scaling, one column per length."""
    lengths = list(dict.fromkeys(row.length for row in rows))
    trials = max(row.trials for row in rows)
    shown = table(
        f"Perplexity by context length, {trials} held-out samples (± standard error)", ["scaling", *map(str, lengths)]
    )
    cells = {(row.scaling, row.length): row for row in rows}
    for name in dict.fromkeys(row.scaling for row in rows):
        values = [cells[name, length] for length in lengths]
        shown.add_row(name, *(_cell(row) for row in values))
    output.print(shown)


def _cell(row: EvalRow) -> str:
    """The value, and its standard error where several texts give one."""
    return number(row.value) if row.stderr is None else f"{number(row.value)} ± {number(row.stderr)}"
