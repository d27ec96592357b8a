"""`longrope eval MODEL --suite perplexity,needle --lengths 256,512 --scaling run/scaling.json`: measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from longrope.cli.common import messages, print_json, quiet_libraries
from longrope.cli.options import Data, Json, Load, Model, Options, Seed, output, split_names, verb
from longrope.cli.progress import progress
from longrope.cli.tables.evaluation import show_evaluation
from longrope.evaluation.config import EvalConfig

LENGTHS = "Context lengths in tokens: 256,512,1k. None for retention and open-llm, which measure in L."
SUITES = "Any of perplexity, passkey, needle, ruler, retention, open-llm: with commas."
BASELINES = (
    "What to compare with: any of none, pi, ntk, ntk-critical, dynamic-ntk, yarn, checkpoint (the scaling it carries), "
    "second-pi, second-ntk, second-ntk-critical, second-yarn (that one stretched further), original (the model before "
    "it was extended), other-scaling.json."
)
ORIGINAL = "The model before it was trained, for 'original' and retention. Default: MODEL."
ALLOW_SEEN = "Measure on documents that the search or training has seen; the results say so."


@verb
def command(
    model: Model,
    /,
    *,
    lengths: Annotated[str, Parameter(metavar="N,N,…", help=LENGTHS)] = "",
    suites: Annotated[str, Parameter(name="--suite", metavar="A,B,…", help=SUITES)] = "perplexity",
    data: Data = None,
    scaling: Annotated[Path | None, Parameter(help="A scaling.json; without it, the model as it is.")] = None,
    baselines: Annotated[str, Parameter(name="--against", metavar="A,B,…", help=BASELINES)] = "",
    target_length: Annotated[
        str | None, Parameter(metavar="TOKENS", help="L' of the closed forms. Default: the scaling's.")
    ] = None,
    original: Annotated[str | None, Parameter(help=ORIGINAL)] = None,
    allow_seen: Annotated[bool, Parameter(help=ALLOW_SEEN)] = False,
    seed: Seed = 0,
    config: Annotated[EvalConfig, Options("Suites")],
    load: Load,
    output: Annotated[Path | None, output("Write the results as a new JSON file here.")] = None,
    resume: Annotated[
        bool, Parameter(help="Go on with a run that was stopped: its -o NAME.json left NAME.cells.jsonl.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a model with and without a scaling: perplexity, retrieval, RULER, short texts."""
    from longrope.evaluation.run import evaluate, log_path

    quiet_libraries()
    log = None if output is None else log_path(output)
    with progress(lambda shown: shown.after_evaluation(log)) as shown:
        result = evaluate(
            model,
            data=data or [],
            lengths=split_names(lengths),
            suites=split_names(suites),
            scaling=scaling,
            baselines=split_names(baselines),
            config=config,
            target_length=target_length,
            original=original,
            seed=seed,
            allow_seen=allow_seen,
            output=output,
            resume=resume,
            load=load,
            callbacks=shown,
        )
    for warning in result.settings.get("warnings", []):
        messages.print(f"longrope: warning: {warning}")
    if as_json:
        print_json(result.to_json())
    else:
        show_evaluation(result.rows)
