"""`longrope presets`: published factor tables, and one of them, or a file of the authors' code, as a `scaling.json`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from longrope.cli import common
from longrope.cli.options import Json, option, out
from longrope.cli.tables.model import show_presets
from longrope.cli.verb import verb
from longrope.errors import LongRopeError
from longrope.storage import check_output_file
from longrope.units import parse_length


@verb
def command(
    name: Annotated[str | None, option("A preset, to write or show alone.")] = None,
    /,
    *,
    from_file: Annotated[Path | None, option("Instead of a preset: a factor file (.csv) of the authors' code.")] = None,
    model: Annotated[str | None, option("With --from-file: the model the factors are for.")] = None,
    target_length: Annotated[str | None, option("With --from-file: L' in tokens.", metavar="TOKENS")] = None,
    output: Annotated[Path | None, out("Write it as a new scaling.json here.")] = None,
    as_json: Json = False,
) -> None:
    """List, show or write the published factor tables, or a factor file of the authors' code."""
    from longrope.rope.authors_files import read_authors_factors
    from longrope.rope.closed_forms import su_attention_factor
    from longrope.rope.geometry import RopeGeometry
    from longrope.rope.presets import preset, preset_table

    if from_file is not None:
        if name is not None or model is None or target_length is None:
            raise LongRopeError("`from_file` needs `model` and `target_length`, and no preset's name")
        from longrope.models.loading import load_config

        common.quiet_libraries()
        geometry, length = RopeGeometry.from_config(load_config(model)), parse_length(target_length)
        # The authors' code applies the su attention factor beside the factors and writes it to no file.
        m = su_attention_factor(geometry, length)
        scaling = read_authors_factors(from_file, geometry, length, attention_factor=m)
    elif name is not None:
        scaling = preset(name)
    elif output is not None:
        raise LongRopeError("expected the name of a preset to write to `output`; found none")
    else:
        rows = preset_table()
        common.print_json({"presets": [asdict(row) for row in rows]}) if as_json else show_presets(rows)
        return
    if output is None:
        print(scaling.to_json(), end="")
        return
    check_output_file(output)
    scaling.save(output)
    common.print_json({"scaling": str(output)}) if as_json else common.output.print(f"wrote {output}")
