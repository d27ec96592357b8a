"""`longrope doctor MODEL|FILE.gguf`: what each runtime computes from a checkpoint, and whether that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from longrope.cli.common import print_json
from longrope.cli.doctor_server import compare_server
from longrope.cli.options import LOADING, Json, option
from longrope.cli.tables.doctor import show_diagnosis
from longrope.cli.verb import Options, split_names, verb
from longrope.errors import LongRopeError
from longrope.evaluation.server.config import ServerOptions
from longrope.models.config import LoadOptions

SERVED = Options("A server", of=ServerOptions, only=("served_model", "timeout", "retries"), place=4)
LOADED = Options(f"{LOADING}, with --server", of=LoadOptions, place=5)


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
    server: Annotated[
        str | None, option("Compare this running server, http://…/v1, with what CHECKPOINT computes here.")
    ] = None,
    lengths: Annotated[
        str | None, option("Lengths of --server's texts. Default: L/2, L, L+1 and the target.", metavar="N,N,…")
    ] = None,
    served: Annotated[dict[str, Any], SERVED],
    load: Annotated[dict[str, Any], LOADED],
    as_json: Json = False,
) -> int:
    """Show what each runtime computes from a checkpoint, or what a running server does."""
    given = {"runtime": runtime, "strict": strict or None} if server else served | load | {"lengths": lengths}
    if unused := next((name for name, value in given.items() if value is not None), None):
        raise LongRopeError(
            f"`{unused}` has no effect {'with' if server else 'without'} `server`", code="invalid-setting"
        )
    if server is not None:
        return compare_server(checkpoint, server, expect, lengths=lengths, served=served, load=load, as_json=as_json)
    from longrope.doctor.diagnose import diagnose

    found = diagnose(checkpoint, expect=expect, runtime=split_names(runtime, "runtime"))
    code = 1 if found.failures(strict) else 0
    print_json(found.to_json() | {"exit_code": code}) if as_json else show_diagnosis(found, strict)
    return code
