"""`longrope search MODEL --target-length N --data book.txt -o run/`: rescale factors as one `scaling.json`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longrope.cli.common import (
    Attention,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    OriginalLength,
    RemoteCode,
    Seed,
    number,
    output,
    print_json,
    progress_bar,
    quiet_libraries,
    table,
)
from longrope.cli.watch import SearchWatch
from longrope.files import check_output_folder
from longrope.lengths import parse_length

if TYPE_CHECKING:
    from longrope.pipeline.search import SearchResult

TargetLength = Annotated[str, typer.Option("--target-length", help="The new window L' in tokens: 4096, 128k, 2M.")]
Method = Annotated[str, typer.Option("--method", help="longrope: the paper's evolutionary search.")]
ObjectiveName = Annotated[
    str,
    typer.Option("--objective", help="perplexity, or needle: only the answer about a hidden fact counts."),
]
NeedleDepth = Annotated[str, typer.Option("--needle-depth", help="spread, start, or a number from 0 to 1.")]
Population = Annotated[
    int | None,
    typer.Option("--population", min=1, help="P; mutations and crossovers are P/4, top-k P/2. Default: 64."),
]
Iterations = Annotated[int, typer.Option("--iterations", min=0, help="Iterations of mutation and crossover.")]
Patience = Annotated[
    int | None, typer.Option("--patience", min=1, help="Stop after this many iterations without improvement.")
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Texts of exactly L' tokens that are scored. Default: 5, needle 10."),
]
StartTokens = Annotated[
    str, typer.Option("--start-tokens", help="0 (every runtime can express it), a number, or 'search'.")
]
AttentionFactor = Annotated[
    str, typer.Option("--attention-factor", help="1 keeps short texts exactly as they were; su, yarn or a number.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted search in the output folder.")]


def command(
    model: Model,
    target_length: TargetLength,
    out: Annotated[
        Path, typer.Option("-o", "--output", help="A new folder for scaling.json, the log and the summary.")
    ],
    data: Data = None,
    method: Method = "longrope",
    objective: ObjectiveName = "perplexity",
    needle_depth: NeedleDepth = "spread",
    population: Population = None,
    iterations: Iterations = 40,
    patience: Patience = None,
    samples: Samples = None,
    start_tokens: StartTokens = "0",
    attention_factor: AttentionFactor = "1",
    seed: Seed = 0,
    resume: Resume = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    attn_implementation: Attention = None,
    original_length: OriginalLength = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Search rescale factors for a longer window, without training."""
    length = parse_length(target_length)
    from longrope.pipeline.options import SearchOptions
    from longrope.pipeline.search import search
    from longrope.pipeline.subject import ModelOptions, open_model

    if not resume:
        check_output_folder(out)
    quiet_libraries()
    options = SearchOptions(
        method=method,
        objective=objective,
        needle_depth=needle_depth,
        population=population,
        iterations=iterations,
        patience=patience,
        samples=samples,
        seed=seed,
        start_tokens=start_tokens,
        attention_factor=attention_factor,
    )
    loading = ModelOptions(
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        original_length=parse_length(original_length) if original_length else None,
    )
    subject = open_model(model, loading)
    with progress_bar() as progress:
        watch = SearchWatch(progress)
        try:
            result = search(
                subject,
                length,
                data or [],
                out,
                options,
                resume=resume,
                on_start=watch.start,
                on_progress=watch.update,
            )
        except KeyboardInterrupt:
            progress.stop()
            watch.say_interrupted(resume_command())
            raise
    if as_json:
        print_json(result.to_json())
    else:
        show(result)


def resume_command() -> str:
    """The command that continues this run."""
    import shlex

    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return shlex.join(["longrope", *arguments, "--resume"])


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def show(result: SearchResult) -> None:
    """Print what a search found against the baselines."""
    rows = table("Loss on the search samples (nats per token) and perplexity", ["method", "loss", "perplexity"])
    for name, loss in sorted(result.baselines.items(), key=lambda item: -item[1]):
        rows.add_row(name, number(loss, 4), number(_perplexity(loss)))
    rows.add_row(f"[bold]{result.method}[/bold]", number(result.best_loss, 4), number(_perplexity(result.best_loss)))
    output.print(rows)
    output.print(f"{result.evaluations} evaluations, {result.token_passes:,} token passes")
    output.print(f"scaling: {result.path}")
