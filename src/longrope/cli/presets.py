"""`longrope presets`: the published factor tables, and one of them as a `scaling.json`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.common import Json, output, print_json, table
from longrope.errors import LongRopeError
from longrope.files import check_output_file
from longrope.lengths import format_length


def command(
    name: Annotated[str | None, typer.Argument(help="A preset, to write or show alone.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the preset as a new scaling.json here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the published factor tables, or show or write one of them."""
    from longrope.rope.presets import preset, preset_table

    if name is None:
        if out is not None:
            raise LongRopeError("expected the name of a preset to write to -o; found none")
        rows = preset_table()
        if as_json:
            print_json({"presets": [asdict(row) for row in rows]})
            return
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
        return
    scaling = preset(name)
    if out is None:
        typer.echo(scaling.to_json(), nl=False)
        return
    check_output_file(out)
    scaling.save(out)
    if as_json:
        print_json({"scaling": str(out)})
    else:
        output.print(f"wrote {out}")
