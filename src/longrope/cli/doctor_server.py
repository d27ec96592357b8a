"""`longrope doctor MODEL --server http://…/v1`: what a running server computes, against the model computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.progress import progress
from longrope.cli.tables.doctor import show_served
from longrope.evaluation.server.config import ServerOptions
from longrope.models.config import LoadOptions
from longrope.units import parse_lengths


def compare_server(
    checkpoint: str,
    server: str,
    expect: Path | None,
    *,
    lengths: str | None,
    served: dict[str, Any],
    load: dict[str, Any],
    as_json: bool,
) -> int:
    """Print the comparison; the exit code is 1 where the server computes something else."""
    from longrope.doctor.server import diagnose_server

    quiet_libraries()
    with progress(lambda _: "") as shown:
        found = diagnose_server(
            checkpoint,
            server,
            expect=expect,
            lengths=parse_lengths(lengths) if lengths else (),
            options=ServerOptions(**served),
            load=LoadOptions(**load),
            callbacks=shown,
        )
    print_json(found.to_json()) if as_json else show_served(found)
    return 0 if found.right else 1
