"""`longrope fix-config DIR`: the superset config of an export again, after another tool's `save_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from longrope.cli.common import output, print_json, quiet_libraries
from longrope.cli.options import Json, option
from longrope.cli.verb import verb


@verb
def command(
    folder: Annotated[Path, option("The folder of an exported checkpoint.")],
    /,
    *,
    scaling: Annotated[Path | None, option("The scaling that was exported, where FOLDER has no scaling.json.")] = None,
    to: Annotated[str | None, option("The form of the export, where config.json does not say it any more.")] = None,
    fold_attention_factor: Annotated[bool, option("It was exported with --fold-attention-factor.")] = False,
    as_json: Json = False,
) -> None:
    """Write every key that some runtime reads into config.json again; weights are not touched."""
    from longrope.export.fix_config import fix_config

    quiet_libraries()
    fixed = fix_config(folder, scaling, target=to, fold_attention_factor=fold_attention_factor or None)
    if as_json:
        print_json({"config": str(fixed.path), "form": fixed.target, "changes": fixed.changes})
        return
    for change in fixed.changes:
        output.print(change)
    verdict = f"wrote {fixed.path}" if fixed.changes else f"nothing to change in {fixed.path}"
    output.print(f"{verdict} (exported --to {fixed.target})")
