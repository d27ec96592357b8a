"""`longrope presets`: published factor tables, and one of them, or a file of the authors' code, as a `scaling.json`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from longrope.cli.common import output as console
from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.options import Json, option, out
from longrope.cli.tables.model import show_presets
from longrope.cli.verb import verb
from longrope.errors import LongRopeError
from longrope.storage import check_output_file
from longrope.units import parse_length

if TYPE_CHECKING:
    from longrope.rope.scaling import RopeScaling


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
    from longrope.rope.presets import preset, preset_table

    if from_file is not None:
        if name is not None or model is None or target_length is None:
            raise LongRopeError("`from_file` needs `model` and `target_length`, and no preset's name")
        scaling = _from_file(from_file, model, parse_length(target_length))
    elif name is not None:
        scaling = preset(name)
    elif output is not None:
        raise LongRopeError("expected the name of a preset to write to `output`; found none")
    else:
        rows = preset_table()
        print_json({"presets": [asdict(row) for row in rows]}) if as_json else show_presets(rows)
        return
    if output is None:
        print(scaling.to_json(), end="")
        return
    check_output_file(output)
    scaling.save(output)
    print_json({"scaling": str(output)}) if as_json else console.print(f"wrote {output}")


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
