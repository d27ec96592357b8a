"""`longrope export MODEL --scaling run/scaling.json --to hf -o folder/`: a checkpoint that runtimes really apply."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import Json, Model, OriginalLength, RemoteCode, output, print_json, quiet_libraries
from longrope.errors import LongRopeError
from longrope.files import check_output_folder
from longrope.lengths import parse_length

TARGETS = ("hf",)


def command(
    model: Model,
    scaling: Annotated[Path, typer.Option("--scaling", help="The scaling.json to apply.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="A new folder for the checkpoint.")],
    to: Annotated[str, typer.Option("--to", help="hf: a plain transformers folder.")] = "hf",
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Export what the runtime cannot express, and name the loss.")
    ] = False,
    original_length: OriginalLength = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint with the longer window, reload it and prove that it is applied."""
    if to not in TARGETS:
        raise LongRopeError(f"expected --to {' or '.join(TARGETS)}; found {to!r}")
    from longrope.export.hf import export_hf
    from longrope.rope.scaling import RopeScaling

    check_output_folder(out)
    quiet_libraries()
    done = export_hf(
        model,
        RopeScaling.load(scaling),
        out,
        allow_lossy=allow_lossy,
        original_length=parse_length(original_length) if original_length else None,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json({"checkpoint": str(done.path), "verification": asdict(done.verification), "losses": done.losses})
        return
    check = done.verification
    output.print(f"wrote {done.path}")
    output.print(
        f"reloaded with transformers: frequencies equal to {check.max_frequency_error:.1e}, "
        f"logits to {check.max_logit_error_short:.1e} inside and {check.max_logit_error_long:.1e} beyond "
        "the original window"
    )
    for loss in done.losses:
        output.print(f"lost: {loss}")
