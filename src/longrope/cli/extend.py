"""`longrope extend [MODEL]`: the whole way to a proven checkpoint and a report. Without MODEL, the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longrope.cli import evaluate_tables
from longrope.cli import inspect as inspect_verb
from longrope.cli import recipe as recipe_verb
from longrope.cli import search as search_verb
from longrope.cli.common import (
    Attention,
    Device,
    Dtype,
    Json,
    OriginalLength,
    RemoteCode,
    Seed,
    model_options,
    on_or_off,
    output,
    print_json,
    progress_bar,
    quiet_libraries,
)
from longrope.cli.tensorboard import LogDir, scalars
from longrope.cli.watch import SearchWatch
from longrope.errors import LongRopeError
from longrope.storage import check_output_folder
from longrope.units import parse_length, parse_lengths

if TYPE_CHECKING:
    from longrope.recipes.extend import Extension


Population = Annotated[
    int | None, typer.Option("--population", min=1, help="Evolution: P, as in longrope search. Default: 32.")
]
Iterations = Annotated[int | None, typer.Option("--iterations", min=0, help="Evolution: iterations. Default: 20.")]


def command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model folder, a hub name, or 'tiny' (default; or the recipe's own)."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="longrope, longrope2, quick, or a YAML file: its stages in place of a search alone. The same command "
            "goes on with a run that was stopped.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --recipe: check it, print its plan, stop.")] = False,
    out: Annotated[Path, typer.Option("-o", "--output", help="A new folder for everything the run makes.")] = Path(
        "run"
    ),
    target_length: Annotated[str | None, typer.Option("--target-length", help="L' in tokens; default: 8 L.")] = None,
    search_data: Annotated[list[str] | None, typer.Option("--data", help="Text to search on. May be repeated.")] = None,
    eval_data: Annotated[list[str] | None, typer.Option("--eval-data", help="Other text to compare on.")] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Lengths of the comparison; default: L, 2L, … L'.")
    ] = None,
    eval_samples: Annotated[int, typer.Option("--eval-samples", min=1, help="Held-out texts per length.")] = 10,
    method: search_verb.Method = "longrope",
    objective: search_verb.ObjectiveName = None,
    needle_depth: search_verb.NeedleDepth = "spread",
    samples: search_verb.Samples = 3,
    attention_factor: search_verb.AttentionFactor = None,
    seed: Seed = 0,
    population: Population = None,
    iterations: Iterations = None,
    patience: search_verb.Patience = None,
    start_tokens: search_verb.StartTokens = "0",
    racing: search_verb.Racing = "off",
    critical_dim: search_verb.CriticalDim = None,
    steps: search_verb.Steps = 30,
    knots: search_verb.Knots = None,
    learning_rate: search_verb.LearningRate = 0.1,
    continuation: search_verb.Continuation = True,
    learn_attention_factor: search_verb.LearnAttention = False,
    evaluations: search_verb.Evaluations = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Export even what the runtime cannot express.")
    ] = False,
    resume: search_verb.Resume = False,
    log_dir: LogDir = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    attn_implementation: Attention = None,
    original_length: OriginalLength = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Extend a model's window and prove it: by a search alone (the budget is a demonstration's), or by a recipe."""
    if recipe is not None:
        _only_with_recipe(context)
        loading = model_options(dtype, device, attn_implementation, original_length, trust_remote_code)
        recipe_verb.run(
            model, recipe, out, loading, data=search_data, eval_data=eval_data, dry_run=dry_run, as_json=as_json
        )
        return
    if dry_run:
        raise LongRopeError("--dry-run prints the plan of a --recipe; without one, longrope plan says what things cost")
    from longrope.models.checkpoint_files import EMBEDDED

    model = model or EMBEDDED
    length = parse_length(target_length) if target_length else None
    compared = parse_lengths(lengths) if lengths else None
    if not resume:
        check_output_folder(out)
    from longrope.models.inspect import inspect_model
    from longrope.models.loading import open_model
    from longrope.recipes.extend import Listener, extend, summary
    from longrope.search.config import SearchConfig

    quiet_libraries()
    loading = model_options(dtype, device, attn_implementation, original_length, trust_remote_code)
    options = SearchConfig(
        method=method,
        objective=objective,
        needle_depth=needle_depth,
        samples=samples,
        attention_factor=attention_factor,
        seed=seed,
        **_budget(method, population, iterations),
        patience=patience,
        start_tokens=start_tokens,
        racing=on_or_off("--racing", racing),
        critical_dim=critical_dim,
        steps=steps,
        knots=knots,
        learning_rate=learning_rate,
        continuation=continuation,
        learn_attention_factor=learn_attention_factor,
        evaluations=evaluations,
    )
    found = inspect_model(model, original_length=loading.original_length, trust_remote_code=trust_remote_code)
    if not as_json:
        inspect_verb.show(found)
        output.print()
    loaded = open_model(model, options=loading)
    with progress_bar() as progress, scalars(log_dir) as written:
        watch = SearchWatch(progress, written)
        comparing = progress.add_task("compare", total=None, visible=False, note="")
        stage = progress.add_task("", total=None, visible=False, note="")

        def start_comparison(total: int) -> None:
            progress.update(comparing, total=total, visible=True)

        def show_stage(name: str) -> None:  # search and compare have bars of their own
            progress.update(stage, description=name, visible=name not in ("search", "compare"))

        listener = Listener(
            on_stage=show_stage,
            on_search_start=watch.start,
            on_search_progress=watch.update,
            on_evaluation_start=start_comparison,
            on_evaluation_sample=lambda: progress.advance(comparing),
        )
        with watch.interruptible(out):
            extension = extend(
                loaded,
                length or 8 * loaded.geometry.original_length,
                out,
                search_data=search_data or [],
                evaluation_data=eval_data or [],
                lengths=compared,
                evaluation_samples=eval_samples,
                options=options,
                allow_lossy=allow_lossy,
                resume=resume,
                listener=listener,
            )
        written.measured(extension.evaluation.rows)
    if as_json:
        print_json(summary(extension))
    else:
        show(extension, out)


def _only_with_recipe(context: typer.Context) -> None:
    """Raise LongRopeError for options that a recipe's stages say for themselves."""
    shared = {"model", "recipe", "dry_run", "out", "search_data", "eval_data", "resume", "device"}
    shared |= {"attn_implementation", "original_length", "trust_remote_code", "as_json"}
    given = [
        name
        for name in context.params
        if name not in shared and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise LongRopeError(f"with --recipe every stage has its own settings: write {options} into the recipe")


def show(extension: Extension, out: Path) -> None:
    """Print the search, the comparison, the proof, and where everything lies."""
    search_verb.show(extension.search)
    output.print()
    evaluate_tables.show(extension.evaluation.rows)
    output.print()
    for proof in extension.proofs:
        output.print(
            f"reloaded with plain transformers, last {proof.positions} of {proof.length} tokens: logits within "
            f"{proof.max_logit_difference:.1e} of the searched model's, same most likely token at "
            f"{100 * proof.top1_agreement:.2f} % of positions"
        )
    for loss in extension.losses:
        output.print(f"lost: {loss}")
    output.print()
    output.print(f"checkpoint: {extension.checkpoint}")
    output.print(f"scaling:    {extension.search.path}")
    output.print(f"all of it:  {out}")
    output.print(f"report:     {extension.report.html}")


def _budget(method: str, population: int | None, iterations: int | None) -> dict[str, Any]:
    """An evolution's population and iterations, a demonstration's where none are given; to the others only what is."""
    from longrope.search.config import EVOLUTION

    small: dict[str, int | None] = {"population": 32, "iterations": 20} if method in EVOLUTION else {}
    given = {"population": population, "iterations": iterations}
    return small | {name: value for name, value in given.items() if value is not None}
