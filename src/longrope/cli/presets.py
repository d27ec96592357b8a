"""`longrope presets`: published factor tables, and one of them, or a file of the authors' code, as a `scaling.json`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longrope.cli.common import Json, output, print_json, quiet_libraries, table
from longrope.errors import LongRopeError
from longrope.storage import check_output_file
from longrope.units import format_length, parse_length

if TYPE_CHECKING:
    from longrope.rope.scaling import RopeScaling


def command(
    name: Annotated[str | None, typer.Argument(help="A preset, to write or show alone.")] = None,
    factors_file: Annotated[
        Path | None, typer.Option("--from-file", help="Instead of a preset: a factor file (.csv) of the authors' code.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="With --from-file: the model the factors are for.")
    ] = None,
    target_length: Annotated[
        str | None, typer.Option("--target-length", help="With --from-file: L' in tokens.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--output", help="Write it as a new scaling.json here.")] = None,
    as_json: Json = False,
) -> None:
    """List the published factor tables, or show or write one of them, or a factor file of the authors' code."""
    if factors_file is not None:
        if name is not None or model is None or target_length is None:
            raise LongRopeError("--from-file needs --model and --target-length, and no preset's name")
        _show(_from_file(factors_file, model, parse_length(target_length)), out, as_json)
        return
    if name is None:
        if out is not None:
            raise LongRopeError("expected the name of a preset to write to -o; found none")
        _list(as_json)
        return
    from longrope.rope.presets import preset

    _show(preset(name), out, as_json)


def _from_file(path: Path, model: str, target_length: int) -> RopeScaling:
    from longrope.models.loading import load_config
    from longrope.rope.authors_files import read_authors_factors
    from longrope.rope.closed_forms import su_attention_factor
    from longrope.rope.geometry import RopeGeometry

    quiet_libraries()
    geometry = RopeGeometry.from_config(load_config(model))
    # The authors' code applies the su attention factor beside the factors and writes it to no file.
    m = su_attention_factor(geometry, target_length)
    return read_authors_factors(path, geometry, target_length, attention_factor=m)


def _show(scaling: RopeScaling, out: Path | None, as_json: bool) -> None:
    if out is None:
        typer.echo(scaling.to_json(), nl=False)
        return
    check_output_file(out)
    scaling.save(out)
    if as_json:
        print_json({"scaling": str(out)})
    else:
        output.print(f"wrote {out}")


def _list(as_json: bool) -> None:
    from longrope.rope.presets import preset_table

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
