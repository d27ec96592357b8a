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


@verb
def command(
    name: Annotated[
        str | None, option("A preset to write or show, or a model (name or folder): the presets for it.")
    ] = None,
    /,
    *,
    from_file: Annotated[Path | None, option("Instead of a preset: a factor file (.csv) of the authors' code.")] = None,
    model: Annotated[str | None, option("With --from-file: the model the factors are for.")] = None,
    target_length: Annotated[str | None, option("With --from-file: L' in tokens.", metavar="TOKENS")] = None,
    output: Annotated[Path | None, out("Write it as a new scaling.json here.")] = None,
    as_json: Json = False,
) -> None:
    """List, show or write the published factor tables, or a factor file of the authors' code."""
    from longrope.models.presets import presets_of_model, scaling_of_file
    from longrope.rope.presets import preset, preset_table

    common.quiet_libraries()
    if from_file is not None:
        if name is not None or model is None or target_length is None:
            raise LongRopeError("`from_file` needs `model` and `target_length`, and no preset's name")
        scaling = scaling_of_file(from_file, model, target_length)
    elif model is not None or target_length is not None:
        raise LongRopeError("`model` and `target_length` are for a file of factors", hint="add `from_file`")
    elif (rows := preset_table() if name is None else presets_of_model(name)) and output is not None:
        raise LongRopeError(f"expected the name of a preset to write to `output`; found {name or 'none'}")
    elif rows:
        common.print_json({"presets": [asdict(row) for row in rows]}) if as_json else show_presets(rows, name)
        return
    else:
        scaling = preset(name or "")
    if output is None:
        print(scaling.to_json(), end="")
        return
    check_output_file(output)
    scaling.save(output)
    common.print_json({"scaling": str(output)}) if as_json else common.output.print(f"wrote {output}")
