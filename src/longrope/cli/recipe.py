"""`longrope extend MODEL --recipe NAME|file.yaml`: the plan first, then stage after stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress as Bar

from longrope.cli import evaluate_tables
from longrope.cli.common import messages, number, output, print_json, progress_bar, quiet_libraries, table
from longrope.cli.finetune import TrainingWatch
from longrope.cli.watch import SearchWatch
from longrope.errors import LongRopeError
from longrope.units import format_length

if TYPE_CHECKING:
    from longrope.models.config import LoadOptions
    from longrope.recipes.costs import StepCost
    from longrope.recipes.graph import Step
    from longrope.recipes.run import RecipeResult
    from longrope.recipes.stages import Listener


def run(
    model: str | None,
    name: str,
    out: Path,
    loading: LoadOptions,
    *,
    data: list[str] | None,
    eval_data: list[str] | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Print what the recipe will cost; unless that is all that was asked for, run it, or go on with it."""
    from longrope.models.loading import open_model
    from longrope.recipes.check import check_recipe
    from longrope.recipes.costs import measure_rates, recipe_costs
    from longrope.recipes.folder import RunFolder
    from longrope.recipes.graph import steps
    from longrope.recipes.run import run_recipe
    from longrope.recipes.yaml import load_recipe, recipe_model

    quiet_libraries()
    own, original_length = recipe_model(name)
    model = model or own
    if model is None:
        raise LongRopeError(
            f"the recipe {name} is for any model: give one, as in longrope extend MODEL --recipe {name}"
        )
    if loading.original_length is None:
        loading = loading.replace(original_length=original_length)
    loaded = open_model(model, options=loading)
    recipe = load_recipe(name, loaded.geometry.original_length)
    recipe = recipe.with_data(tuple(data or ()), tuple(eval_data or ()))
    planned = steps(recipe, loaded.geometry.original_length, loaded.context_length)
    folder = RunFolder.of(out, loaded, recipe, planned)
    folder.check()
    finished = [step.folder in folder.finished() for step in planned]
    costs = recipe_costs(loaded, planned, measure_rates(loaded))
    if not as_json:
        title = f"{name} on {model}, {format_length(loaded.geometry.original_length)} tokens"
        show_plan(costs, finished, title)
    if dry_run:
        check_recipe(loaded, recipe, planned, folder.finished())
        if as_json:
            rows = zip(costs, finished, strict=True)
            print_json({"steps": [cost.to_json() | {"finished": done} for cost, done in rows]})
        return
    with progress_bar() as progress:
        watch = _Watch(progress, len(planned), quiet=as_json)
        try:
            result = run_recipe(loaded, recipe, out, watch.listener())
        except KeyboardInterrupt:
            progress.stop()
            messages.print("interrupted; what is finished is kept, and the same command goes on from there")
            raise
    if as_json:
        print_json(result.to_json())
    else:
        show(result)


def show_plan(costs: list[StepCost], finished: list[bool], title: str) -> None:
    """The steps with tokens, FLOPs and time, before any is begun; those that are finished cost nothing any more."""
    rows = table(title, ["stage", "tokens", "FLOPs", "time", "what"])
    rows.columns[-1].justify = "left"
    for cost, done in zip(costs, finished, strict=True):
        time = "finished" if done else _duration(cost.seconds)
        rows.add_row(cost.title, f"{cost.tokens:,}", f"{cost.flops:.2g}", time, cost.detail)
    left = [cost for cost, done in zip(costs, finished, strict=True) if not done]
    flops, seconds = sum(cost.flops for cost in left), sum(cost.seconds for cost in left)
    rows.add_row("to do", f"{sum(cost.tokens for cost in left):,}", f"{flops:.2g}", _duration(seconds))
    output.print(rows)
    output.print(
        "at most, on one device at the rate that short texts were scored with just now; tokens count a backward pass "
        "twice"
    )
    output.print()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


class _Watch:
    """A line for every stage, and its progress bar while it works."""

    def __init__(self, bar: Bar, count: int, *, quiet: bool) -> None:
        self._bar, self._count, self._quiet = bar, count, quiet
        self._search: SearchWatch | None = None
        self._training: TrainingWatch | None = None
        self._task = bar.add_task("", total=None, visible=False, note="")

    def listener(self) -> Listener:
        from longrope.recipes.stages import Listener

        return Listener(
            on_step=self._step,
            on_search_start=lambda *told: self._of_search().start(*told),
            on_search_progress=lambda told: self._of_search().update(told),
            on_training_start=lambda *told: self._of_training().on_train_start(*told),
            on_training_progress=lambda told: self._of_training().on_train_progress(told),
            on_evaluation_start=lambda total: self._bar.update(
                self._task, description="evaluate", total=total, completed=0, visible=True
            ),
            on_evaluation_sample=lambda: self._bar.advance(self._task),
        )

    def _step(self, place: int, step: Step, finished: bool) -> None:
        for task in self._bar.task_ids:
            self._bar.update(task, visible=False)
        self._search = self._training = None
        if not self._quiet:
            messages.print(f"{place}/{self._count} {step.title}{': finished before' if finished else ''}")

    def _of_search(self) -> SearchWatch:
        if self._search is None:
            self._search = SearchWatch(self._bar)
        return self._search

    def _of_training(self) -> TrainingWatch:
        if self._training is None:
            self._training = TrainingWatch(self._bar)
        return self._training


def show(result: RecipeResult) -> None:
    """What every stage came to, what was measured last, and where things lie."""
    from longrope.evaluation.results import EvalResults

    rows = table("", ["stage", "result", "seconds"])
    rows.columns[1].justify = "left"
    measured: Path | None = None
    for folder, said in result.stages.items():
        rows.add_row(folder, _outcome(said), f"{said['seconds']:,.0f}")
        if "evaluation" in said:
            measured = Path(said["evaluation"])
    output.print(rows)
    if measured is not None:
        output.print()
        evaluate_tables.show(EvalResults.load(measured).rows)
    output.print()
    output.print(f"model:   {result.model}")
    output.print(f"scaling: {result.path}")
    if result.report is not None:
        output.print(f"report:  {result.report}")


def _outcome(said: dict[str, Any]) -> str:
    """One stage's own words as one line."""
    if "best_loss" in said:
        held = {name: loss for name, loss in said["baselines"].items() if loss is not None}
        best = min(held, key=held.__getitem__, default="none")
        return (
            f"loss {number(said['best_loss'], 4)} ({best} {number(held.get(best), 4)}), {said['evaluations']} questions"
        )
    if "final_loss" in said:
        return f"loss {said['first_loss']:.4f} -> {said['final_loss']:.4f}, {said['steps']} steps"
    if "lengths" in said:
        return ", ".join(
            f"{row['length']}: {number(row['before'], 4)} -> {number(row['after'], 4)}" for row in said["lengths"]
        )
    return str(said.get("checkpoint") or said.get("evaluation"))
