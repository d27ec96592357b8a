"""`longrope search MODEL --target-length N --data book.txt -o run/`: rescale factors as one `scaling.json`."""

from __future__ import annotations

import math
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
    model_options,
    number,
    on_or_off,
    output,
    print_json,
    progress_bar,
    quiet_libraries,
    table,
)
from longrope.cli.tensorboard import LogDir, scalars
from longrope.cli.watch import SearchWatch
from longrope.storage import check_output_folder
from longrope.units import parse_length

if TYPE_CHECKING:
    from longrope.search.run import SearchResult

TargetLength = Annotated[str, typer.Option("--target-length", help="The new window L' in tokens: 4096, 128k, 2M.")]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="longrope, longrope2 (evolution, as in the papers), gradient (many times cheaper), hybrid or cma.",
    ),
]
ObjectiveName = Annotated[
    str | None,
    typer.Option("--objective", help="perplexity, or needle: only the answer about a hidden fact counts (longrope2)."),
]
NeedleDepth = Annotated[str, typer.Option("--needle-depth", help="spread, start, or a number from 0 to 1.")]
Samples = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Texts of exactly L' tokens that are scored. Default: 5, needle 10."),
]
AttentionFactor = Annotated[
    str | None,
    typer.Option(
        "--attention-factor",
        help="su (default; every runtime's own), yarn, continued, or a number; 1 keeps short texts exact.",
    ),
]
Population = Annotated[
    int | None,
    typer.Option("--population", min=1, help="Evolution: P; mutations and crossovers are P/4, top-k P/2. Default: 64."),
]
Iterations = Annotated[int, typer.Option("--iterations", min=0, help="Evolution: iterations.")]
Patience = Annotated[
    int | None,
    typer.Option(
        "--patience",
        min=1,
        help="Stop after this many iterations (gradient: validations, 2 in 30 steps) without improvement.",
    ),
]
StartTokens = Annotated[
    str, typer.Option("--start-tokens", help="0 (every runtime can express it), a number, or 'search'; not longrope2.")
]
MaxFactor = Annotated[
    float | None, typer.Option("--max-factor", help="The largest λ; not longrope2. Default of longrope: 1.25·s.")
]
Racing = Annotated[
    str,
    typer.Option("--racing", help="Evolution: on drops candidates that fall behind after each text; off: the papers'."),
]
CriticalDim = Annotated[
    int | None,
    typer.Option("--critical-dim", help="d_rcd: the one longrope2 searches with; YaRN-rcd and NTK-rcd are reported."),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Gradient: steps per stage.")]
Knots = Annotated[
    int | None,
    typer.Option(
        "--knots", min=0, help="Gradient, CMA-ES: knots of log λ, 0: every pair. Default: every pair; CMA-ES 12."
    ),
]
Evaluations = Annotated[
    int | None, typer.Option("--evaluations", min=1, help="CMA-ES: candidates. Default: 256, hybrid 66.")
]
LearningRate = Annotated[float, typer.Option("--learning-rate", help="Gradient: step size in log λ's parameters.")]
Continuation = Annotated[
    bool, typer.Option("--continuation/--no-continuation", help="Gradient: reach L' over 2L, 4L, … or in one jump.")
]
LearnAttention = Annotated[
    bool, typer.Option("--learn-attention-factor", help="Gradient: make the attention factor a parameter too.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Search in this many Ray processes, one model replica each.")
]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", help="The Ray cluster to search on: auto, or HOST:PORT.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in the output folder.")]


def command(
    model: Model,
    target_length: TargetLength,
    out: Annotated[
        Path, typer.Option("-o", "--output", help="A new folder for scaling.json, the log and the summary.")
    ],
    data: Data = None,
    method: Method = "longrope",
    objective: ObjectiveName = None,
    needle_depth: NeedleDepth = "spread",
    samples: Samples = None,
    attention_factor: AttentionFactor = None,
    seed: Seed = 0,
    population: Population = None,
    iterations: Iterations = 40,
    patience: Patience = None,
    start_tokens: StartTokens = "0",
    max_factor: MaxFactor = None,
    racing: Racing = "off",
    critical_dim: CriticalDim = None,
    steps: Steps = 30,
    knots: Knots = None,
    learning_rate: LearningRate = 0.1,
    continuation: Continuation = True,
    learn_attention_factor: LearnAttention = False,
    evaluations: Evaluations = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    resume: Resume = False,
    log_dir: LogDir = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    attn_implementation: Attention = None,
    original_length: OriginalLength = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Search rescale factors for a longer window, without training."""
    length = parse_length(target_length)
    if not resume:
        check_output_folder(out)
    from longrope.models.loading import open_model
    from longrope.search.config import SearchConfig
    from longrope.search.run import search

    quiet_libraries()
    options = SearchConfig(
        method=method,
        objective=objective,
        needle_depth=needle_depth,
        samples=samples,
        attention_factor=attention_factor,
        seed=seed,
        population=population,
        iterations=iterations,
        patience=patience,
        start_tokens=start_tokens,
        max_factor=max_factor,
        racing=on_or_off("--racing", racing),
        critical_dim=critical_dim,
        steps=steps,
        knots=knots,
        learning_rate=learning_rate,
        continuation=continuation,
        learn_attention_factor=learn_attention_factor,
        evaluations=evaluations,
    )
    loaded = open_model(
        model, options=model_options(dtype, device, attn_implementation, original_length, trust_remote_code)
    )
    with progress_bar() as progress, scalars(log_dir) as written:
        watch = SearchWatch(progress, written)
        with watch.interruptible(out):
            result = search(
                loaded,
                length,
                data or [],
                out,
                options,
                resume=resume,
                workers=workers,
                ray_address=ray_address,
                on_start=watch.start,
                on_progress=watch.update,
            )
    if as_json:
        print_json(result.to_json())
    else:
        show(result)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def show(result: SearchResult) -> None:
    """Print what a search found against the baselines."""
    rows = table(f"Loss on the search samples ({result.objective}, nats per token)", ["method", "loss", "exp(loss)"])
    for name, loss in sorted(result.baselines.items(), key=lambda item: -item[1]):
        rows.add_row(name, number(loss, 4), number(_perplexity(loss)))
    rows.add_row(result.method, number(result.best_loss, 4), number(_perplexity(result.best_loss)), style="bold")
    output.print(rows)
    if result.choices is not None:
        chosen = ", ".join(f"{name} loss alone {dim}" for name, dim in result.choices.chosen.items())
        output.print(f"real critical dimension: pair {result.critical_dim} ({chosen})")
    output.print(f"{result.evaluations} evaluations, {result.token_passes:,} token passes")
    output.print(f"scaling: {result.path}")
