"""`longrope eval MODEL --suite perplexity,needle --lengths 256,512 --scaling run/scaling.json`: measurements."""

from __future__ import annotations

from typing import Any

from longrope.cli import options as given
from longrope.cli.common import print_json, quiet_libraries, speaks, warn
from longrope.cli.progress import progress
from longrope.cli.tables.evaluation import show_evaluation
from longrope.cli.verb import split_names, verb


@verb
def command(
    model: given.Measured,
    /,
    *,
    lengths: given.Lengths = None,
    suites: given.Suites = "perplexity",
    data: given.Data = None,
    field: given.Field = None,
    scaling: given.OwnScaling = None,
    baselines: given.Baselines = None,
    target_length: given.ClosedFormLength = None,
    original: given.Original = None,
    allow_seen: given.AllowSeen = False,
    seed: given.Seed = 0,
    config: given.SuiteSettings,
    server: given.Server,
    load: given.Load,
    output: given.Results = None,
    resume: given.ResumeCells = False,
    context_parallel: given.ShareTexts = 1,
    as_json: given.Json = False,
) -> None:
    """Measure a model, or the model of a server: perplexity, retrieval, RULER, short texts."""
    from longrope.evaluation.run import evaluate, log_path

    chosen = given.chosen_suites(suites, config, data=data, field=field, allow_seen=allow_seen)
    quiet_libraries()
    job: Any = {"seed": seed, "output": output, "resume": resume, "load": load, "server": server}
    job |= {"original": original, "allow_seen": allow_seen, "context_parallel": context_parallel}
    with progress(lambda shown: shown.after_evaluation(output and log_path(output))) as shown:
        result = evaluate(
            model,
            data=given.sources(data, field),
            lengths=split_names(lengths, "lengths"),
            suites=chosen,
            scaling=scaling,
            baselines=split_names(baselines, "baselines"),
            config=config,
            target_length=target_length,
            callbacks=shown,
            **job,
        )
    if speaks():
        warn(result.settings.get("warnings", []))
        print_json(result.to_json()) if as_json else show_evaluation(result.rows)
