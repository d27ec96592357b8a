"""`longrope search MODEL --target-length N --data book.txt -o run/`: rescale factors as one `scaling.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.options import Data, Json, Load, LogDir, Model, RayAddress, Resume, TargetLength, Workers, out
from longrope.cli.progress import progress, scalars_in
from longrope.cli.tables.runs import show_search
from longrope.cli.verb import Options, verb
from longrope.search.config import SearchConfig
from longrope.storage import check_output_folder
from longrope.units import parse_length


@verb
def command(
    model: Model,
    /,
    *,
    target_length: TargetLength,
    output_dir: Annotated[Path, out("A new folder for scaling.json, the log and the summary.")],
    data: Data = None,
    config: Annotated[SearchConfig, Options("Search", switches=("racing",))],
    load: Load,
    workers: Workers = None,
    ray_address: RayAddress = None,
    resume: Resume = False,
    log_dir: LogDir = None,
    as_json: Json = False,
) -> None:
    """Search rescale factors for a longer window, without training."""
    length = parse_length(target_length)
    if not resume:
        check_output_folder(output_dir)
    from longrope.models.loading import open_model
    from longrope.search.run import search

    quiet_libraries()
    loaded = open_model(model, options=load)
    with scalars_in(log_dir) as scalars, progress(lambda shown: shown.after_search(output_dir), scalars) as shown:
        result = search(
            loaded,
            length,
            data or [],
            output_dir,
            config,
            resume=resume,
            workers=workers,
            ray_address=ray_address,
            callbacks=shown,
        )
    print_json(result.to_json()) if as_json else show_search(result)
