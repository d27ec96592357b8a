"""A recipe made ready for a model: its stages in order, their costs, and what an earlier run of it has finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.callbacks import Callbacks
from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.models.loading import LoadedModel, open_model
from longrope.recipes.check import check_recipe
from longrope.recipes.costs import StepCost, measure_rates, recipe_costs
from longrope.recipes.folder import RunFolder
from longrope.recipes.graph import Step, steps
from longrope.recipes.run import RecipeResult, run_recipe
from longrope.recipes.schema import Recipe
from longrope.recipes.yaml import load_recipe, recipe_model


@dataclass(frozen=True)
class PreparedRecipe:
    """A recipe that can run on a model. `finished`: for each step, whether an earlier run in `folder` has done it."""

    loaded: LoadedModel
    recipe: Recipe
    steps: list[Step]
    costs: list[StepCost]
    finished: list[bool]
    folder: RunFolder

    def check(self) -> None:
        """Raise LongRopeError for texts, lengths and memory that some step could not work with."""
        check_recipe(self.loaded, self.recipe, self.steps, self.folder.finished())

    def run(self, callbacks: Callbacks | None = None) -> RecipeResult:
        """Run the steps that are not finished."""
        return run_recipe(self.loaded, self.recipe, self.folder.path, callbacks)

    def to_json(self) -> dict[str, Any]:
        """The steps with their costs."""
        rows = zip(self.costs, self.finished, strict=True)
        return {"steps": [cost.to_json() | {"finished": done} for cost, done in rows]}


def prepare_recipe(
    name: str,
    model: str | None,
    output_dir: Path,
    *,
    data: Sequence[str] = (),
    eval_data: Sequence[str] = (),
    load: LoadOptions | None = None,
) -> PreparedRecipe:
    """Read the recipe `name` (or a YAML file), open the model and time a short text for the costs.

    `data` and `eval_data` replace the recipe's texts. Raises LongRopeError for a recipe that cannot be, for a missing
    model, and for a folder of another run.
    """
    load = load or LoadOptions()
    own, original_length = recipe_model(name)
    model = model or own
    if model is None:
        raise LongRopeError(f"the recipe {name} is for any model", code="no-such-model", hint="give a `model`")
    if load.original_length is None:
        load = load.replace(original_length=original_length)
    loaded = open_model(model, options=load)
    original = loaded.geometry.original_length
    recipe = load_recipe(name, original).with_data(tuple(data), tuple(eval_data))
    planned = steps(recipe, original, loaded.context_length)
    folder = RunFolder.of(output_dir, loaded, recipe, planned)
    folder.check()
    finished = [step.folder in folder.finished() for step in planned]
    return PreparedRecipe(
        loaded, recipe, planned, recipe_costs(loaded, planned, measure_rates(loaded)), finished, folder
    )
