"""The steps of a recipe for a model: what each reads of the ones before it. Refuses an order that cannot be.

Nothing is opened here: a step knows folders by name, and what they will hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from longrope.errors import LongRopeError
from longrope.recipes.schema import (
    EvaluateStage,
    ExportStage,
    FinetuneStage,
    Recipe,
    RecoverStage,
    SearchStage,
    Stage,
)
from longrope.units import format_length


@dataclass(frozen=True, slots=True)
class Step:
    """One stage with its place in a run.

    `folder`: its name in the run folder. `weights`: the folder of the last fine-tuning before it, None for the model as
    it came; they reach `trained` tokens. `scaling`: the folder with the scaling that holds when it begins, None for
    none yet, which reaches `reach` tokens. `factors`: of a fine-tuning, the search it takes them from. `onward`: of a
    search after the last fine-tuning, that it goes on from `scaling`, and leaves that one's windows and its own; one
    before is for a fine-tuning and knows nothing of the others.
    """

    stage: Stage
    folder: str
    weights: str | None
    trained: int
    scaling: str | None
    reach: int
    factors: str | None = None
    onward: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """The folders that its result depends on."""
        alone = isinstance(self.stage, SearchStage | FinetuneStage) and not self.onward
        scaling = None if alone else self.scaling
        return tuple(dict.fromkeys(name for name in (self.weights, scaling, self.factors) if name is not None))

    @property
    def carried(self) -> int:
        """How far the scaling reaches that a search goes on from."""
        return self.reach if self.onward else self.trained

    @property
    def title(self) -> str:
        """`search 32k`: for people."""
        stage = self.stage
        if isinstance(stage, SearchStage | FinetuneStage):
            return f"{stage.stage} {format_length(stage.target)}"
        if isinstance(stage, RecoverStage):
            return f"recover {', '.join(map(format_length, stage.lengths))}"
        return f"export {stage.to}" if isinstance(stage, ExportStage) else stage.stage


def steps(recipe: Recipe, original_length: int, reach: int) -> list[Step]:
    """The steps of `recipe` for a model with a window of `original_length` tokens that now reaches `reach`.

    Raises LongRopeError where a stage needs what no stage before it makes.
    """
    made: list[Step] = []
    weights = scaling = None
    trained, reaches = reach, reach
    searches: dict[int, str] = {}
    recovered: str | None = None
    trainings = [place for place, stage in enumerate(recipe.stages, start=1) if isinstance(stage, FinetuneStage)]
    for place, stage in enumerate(recipe.stages, start=1):
        where = f"stage {place} ({stage.stage})"
        name = f"{place:02d}-{stage.stage}"
        factors = None
        onward = isinstance(stage, SearchStage) and bool(trainings) and place > trainings[-1]
        if isinstance(stage, SearchStage | FinetuneStage):
            if recovered is not None:
                raise LongRopeError(
                    f"{where}: the windows that {recovered} recovers would be lost: put it after all searches and "
                    "fine-tunings"
                )
            name += f"-{format_length(stage.target)}"
            if stage.target <= trained:
                raise LongRopeError(
                    f"{where}: expected a target above the {trained} tokens that the model is trained for by then, "
                    f"found {stage.target}: put the stages in order of their targets"
                )
            if onward and stage.target <= reaches:
                raise LongRopeError(
                    f"{where}: expected a target above the {reaches} tokens that the search before it reaches, found "
                    f"{stage.target}: put the searches after the last fine-tuning in order of their targets"
                )
        if isinstance(stage, FinetuneStage):
            factors = searches.get(stage.target)
            if factors is None:
                raise LongRopeError(
                    f"{where}: there is no search for {format_length(stage.target)} before it, whose factors it would "
                    "train: put one there"
                )
        elif not isinstance(stage, SearchStage):
            if scaling is None:
                raise LongRopeError(f"{where}: there is no search before it: put one there")
            _check_lengths(where, stage, original_length, reaches)
        made.append(Step(stage, name, weights, trained, scaling, reaches, factors, onward))
        if isinstance(stage, SearchStage):
            searches[stage.target] = scaling = name
            reaches = stage.target
        elif isinstance(stage, FinetuneStage):
            weights = scaling = name
            trained = reaches = stage.target
        elif isinstance(stage, RecoverStage):
            scaling, recovered = name, f"stage {place}"
    return made


def _check_lengths(where: str, stage: Stage, original_length: int, reach: int) -> None:
    if isinstance(stage, RecoverStage) and not original_length <= min(stage.lengths) <= max(stage.lengths) < reach:
        raise LongRopeError(
            f"{where}: expected lengths from the original window of {original_length} tokens, below the {reach} that "
            f"the model reaches by then; found {', '.join(map(str, stage.lengths))}"
        )
    if isinstance(stage, EvaluateStage) and max(stage.lengths_for(original_length, reach), default=0) > reach:
        raise LongRopeError(
            f"{where}: expected lengths up to the {reach} tokens that the model reaches by then, found "
            f"{max(stage.lengths)}"
        )
