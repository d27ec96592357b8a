"""`longrope doctor MODEL|FILE.gguf`: what each runtime computes from a checkpoint, and whether that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from longrope.cli.common import print_json
from longrope.cli.options import Json, option
from longrope.cli.tables.doctor import show_diagnosis
from longrope.cli.verb import split_names, verb


@verb
def command(
    checkpoint: Annotated[
        str, option("A model folder, the folder of a run, a GGUF file, a hub name (owner/model) or 'tiny'.")
    ],
    /,
    *,
    expect: Annotated[
        Path | None,
        option("The scaling.json that runtimes should apply. Default: that of CHECKPOINT, else what its files state."),
    ] = None,
    runtime: Annotated[str | None, option("Show and count only these runtimes, or 'all'.", metavar="A,B,…")] = None,
    strict: Annotated[
        bool, option("Exit code 1 also when a runtime applies a window at the lengths of another.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Show what each runtime computes from a checkpoint."""
    from longrope.doctor.diagnose import diagnose

    found = diagnose(checkpoint, expect=expect, runtime=split_names(runtime, "runtime"))
    code = 1 if found.failures(strict) else 0
    if as_json:
        print_json(found.to_json() | {"exit_code": code})
    else:
        show_diagnosis(found, strict)
    return code
