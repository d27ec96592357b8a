"""Results of the jobs that make something: search, fine-tuning, export, `extend` and recipes."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope.cli.common import is_verbose, number, output, say, show_table
from longrope.cli.tables.evaluation import show_evaluation
from longrope.file_links import ABSENT, LINKED
from longrope.quantities import format_duration

if TYPE_CHECKING:
    from longrope.export.export import ExportResult
    from longrope.recipes.extend import Extension
    from longrope.recipes.run import RecipeResult
    from longrope.search.run import SearchResult
    from longrope.train.output import FinetuneResult


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def show_search(result: SearchResult) -> None:
    """Print the verdict of a search, and the losses of its result and of the baselines, the best first.

    A star marks the best loss, and every loss that the verdict calls as good.
    """
    from longrope.search.verdict import ALIKE

    say(f"{result.method}: {result.verdict}", "  ")
    if result.verdict.formula is not None:
        command = f"longrope export {shlex.quote(str(result.path.parent))} --scaling {result.verdict.formula} -o FOLDER"
        say(f"the checkpoint with {result.verdict.formula} instead: {command}", "  ")
    losses = {**result.baselines, result.method: result.best_loss}
    order = sorted(losses, key=lambda name: (not math.isfinite(losses[name]), losses[name], name != result.method))
    rows = [
        [
            name + (" *" if losses[name] - losses[order[0]] <= ALIKE else ""),
            number(losses[name], 4),
            number(_perplexity(losses[name])),
            "" if place == 0 else f"{losses[name] - losses[order[0]]:+.4f}",
        ]
        for place, name in enumerate(order)
    ]
    best = f"* the best, and those within {ALIKE:g} of it"
    say(f"Loss on the search samples ({result.objective}, nats per token; {best})", "  ")
    show_table(["method", "loss", "exp(loss)", "difference"], rows, best=0)
    if result.critical_dims is not None:
        chosen = ", ".join(f"{name} loss alone {dim}" for name, dim in result.critical_dims.chosen.items())
        say(f"real critical dimension: pair {result.critical_dim} ({chosen})", "  ")
    say(f"{result.evaluations} evaluations, {result.token_passes:,} token passes")
    say(f"scaling: {result.path}")


def show_finetune(result: FinetuneResult) -> None:
    """Print the steps, tokens and losses of a fine-tuning run, and where its files are."""
    summary = result.summary
    losses = result.losses
    parts = ", ".join(f"{part} {tokens:,}" for part, tokens in summary["tokens"].items())
    say(f"{summary['steps']} steps, tokens: {parts}; {summary['identity']['loss']} loss", "  ")
    output.print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} nats per token (exp {math.exp(min(losses[-1], 700)):.2f})")
    for loss in summary["not_in_transformers"]:
        say(f"transformers cannot express: {loss}", "  ")
    output.print(f"checkpoint: {result.checkpoint}")
    output.print(f"scaling:    {result.path}")


_WEIGHTS = {
    ABSENT: ": add these files to the repository that has them",
    LINKED: " to the source's: what is saved here in place changes both; --copy makes files of its own",
}
"""Remarks on how the weight files of an export came there."""


def show_export(done: ExportResult) -> None:
    """Print what was written, its proof, its losses, the most important remark, and the commands that serve it.

    With --verbose, all remarks on the runtimes too; the model card has them as well.
    """
    scaling = "" if done.scaling_path is None else f" and {done.scaling_path}"
    say(f"wrote {done.path} from {done.model}{scaling}, as {done.target}", "  ")
    if check := done.verification:
        say(
            f"proved: reloaded with transformers: frequencies equal to {check.max_frequency_error:.1e}, logits to "
            f"{check.max_logit_error_short:.1e} inside and {check.max_logit_error_long:.1e} beyond the original window"
            + ("" if check.layers is None else f", with the first {check.layers[0]} of {check.layers[1]} layers"),
            "  ",
        )
    elif done.card_has_notes:
        say("not proved: nothing was reloaded, and the model card says so", "  ")
    if done.weights:
        say(f"weights: {done.weights}{_WEIGHTS.get(done.weights, '')}", "  ")
    if done.proof:
        say(f"proved: {done.proof}", "  ")
    for loss in done.unsupported:
        say(f"lost: {loss}", "  ")
    say(f"note: {done.to_know}", "  ")
    for note in done.notes:
        if is_verbose() and not note.startswith("serve: "):
            say(f"note: {note}", "  ")
        elif done.card_has_notes and not note.startswith(done.to_know):
            say(f"note: {note.partition('. ')[0].rstrip('.')}", "  ")  # the rest is in the card
    if done.pushed:
        say(f"pushed: {done.pushed}", "  ")
    output.print("serve:" if done.servings else "serve: the repository that these files are added to")
    for serving in done.servings:
        for line in serving.lines() if is_verbose() else serving.heads():
            output.print(f"  {line}")
    if not is_verbose():
        say("--verbose: what each runtime makes of it" + ("; so does README.md there" if done.card_has_notes else ""))


def show_extension(extension: Extension, out: Path) -> None:
    """Print the search, the comparison, the proof, and where everything lies."""
    show_search(extension.search)
    output.print()
    show_evaluation(extension.evaluation.rows)
    output.print()
    for proof in extension.proofs:
        if proof.divergence is not None:
            say(
                f"{proof.runtime} -c {proof.length}, {proof.positions} prompts: {proof.divergence:.1e} nats from the "
                f"searched model (mean KL divergence; {proof.divergence_without:.1e} without the factors), same most "
                f"likely token at {100 * proof.top1_agreement:.1f} %",
                "  ",
            )
            continue
        say(
            f"reloaded with plain transformers, last {proof.positions} of {proof.length} tokens: logits within "
            f"{proof.max_logit_difference:.1e} of the searched model's, same most likely token at "
            f"{100 * proof.top1_agreement:.2f} % of positions",
            "  ",
        )
    for loss in extension.losses:
        say(f"lost: {loss}", "  ")
    output.print()
    output.print(f"checkpoint: {extension.checkpoint}")
    output.print(f"scaling:    {extension.search.path}")
    output.print(f"all of it:  {out}")
    output.print(f"report:     {extension.report.html}")


def show_recipe(result: RecipeResult) -> None:
    """Print the result of every stage, the last evaluation, and where the files are."""
    from longrope.evaluation.results import EvalResults

    rows = []
    measured: Path | None = None
    for folder, summary in result.stages.items():
        rows.append([folder, format_duration(summary["seconds"]), _outcome(summary)])
        if "evaluation" in summary:
            measured = Path(summary["evaluation"])
    show_table(["stage", "time", "result"], rows, texts=(2,))
    if measured is not None:
        output.print()
        show_evaluation(EvalResults.load(measured).rows)
    output.print()
    output.print(f"model:   {result.model}")
    output.print(f"scaling: {result.path}")
    if result.report is not None:
        output.print(f"report:  {result.report}")


def _outcome(summary: dict[str, Any]) -> str:
    """The summary of one stage as one line."""
    if "best_loss" in summary:
        held = {name: loss for name, loss in summary["baselines"].items() if loss is not None}
        best = min(held, key=held.__getitem__, default="none")
        baseline = f"{best} {number(held.get(best), 4)}"
        return f"loss {number(summary['best_loss'], 4)} ({baseline}), {summary['evaluations']} evaluations"
    if "final_loss" in summary:
        return f"loss {summary['first_loss']:.4f} -> {summary['final_loss']:.4f}, {summary['steps']} steps"
    if "lengths" in summary:
        return ", ".join(
            f"{row['length']}: {number(row['before'], 4)} -> {number(row['after'], 4)}" for row in summary["lengths"]
        )
    return str(summary.get("checkpoint") or summary.get("evaluation"))
