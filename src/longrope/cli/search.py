"""`longrope search MODEL --target-length N --data book.txt -o run/`: rescale factors as one `scaling.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from longrope.cli import options as given
from longrope.cli.common import print_json, quiet_libraries, warn
from longrope.cli.progress import Stoppable, progress
from longrope.cli.tables.runs import show_search
from longrope.cli.verb import Options, verb
from longrope.search.config import RayOptions, SearchConfig
from longrope.storage import check_output_folder
from longrope.units import parse_length


@verb
def command(
    model: given.Model,
    /,
    *,
    target_length: given.TargetLength,
    output_dir: Annotated[Path, given.out("A new folder for scaling.json, the log and the summary.")],
    data: given.Data = None,
    field: given.Field = None,
    config: Annotated[SearchConfig, Options("Search", switches=("racing",))],
    load: given.Load,
    ray: given.Ray,
    context_parallel: given.ShareSearchTexts = 1,
    resume: given.Resume = False,
    log_dir: given.LogDir = None,
    report_to: given.ReportTo = "",
    as_json: given.Json = False,
) -> None:
    """Search rescale factors for a longer window, without training."""
    length = parse_length(target_length)
    by_ray = ray != RayOptions()
    if not resume and (context_parallel == 1 or by_ray):  # of torchrun's processes, the first one makes it
        check_output_folder(output_dir)
    from longrope.models.loading import open_model
    from longrope.models.processes import sharing
    from longrope.models.texts import require_texts
    from longrope.search.replicas import processes_here
    from longrope.search.run import search

    quiet_libraries()
    spread: Any = {**ray.model_dump(), "context_parallel": context_parallel}
    with sharing(processes_here(**spread), load.device) as processes:
        if not processes.leads:
            processes.help(lambda: open_model(model, options=load), Stoppable())
            return
        require_texts(model, texts := given.sources(data, field), "search", load)
        loaded = processes.open(lambda: open_model(model, options=load))
        with progress(lambda shown: shown.after_search(output_dir), log_dir, report_to) as shown:
            result = search(loaded, length, texts, output_dir, config, callbacks=shown, resume=resume, **spread)
    warn([f"{result.method}: {result.verdict}"] if result.verdict.worse else [])
    print_json(result.to_json() | result.verdict.to_json()) if as_json else show_search(result)
