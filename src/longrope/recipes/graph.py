"""The order of a recipe's stages, as steps for one model, and the results that each reads.

An order that cannot be is refused. Nothing is opened here: a step knows folders by their names.
"""

from __future__ import annotations

from dataclasses import dataclass

from longrope.errors import LongRopeError
from longrope.recipes.schema import EvaluateStage, ExportStage, FinetuneStage, Recipe, RecoverStage, SearchStage, Stage
from longrope.units import format_length


@dataclass(frozen=True, slots=True)
class Step:
    """A stage with its place in a run."""

    stage: Stage
    folder: str
    """The name of its folder in the run folder."""
    weights: str | None
    """The folder of the last fine-tuning before it; None for the model as it came."""
    trained_length: int
    """Tokens that those weights were trained for."""
    scaling: str | None
    """The folder with the scaling that holds when the step begins; None for the model's own, if it has one."""
    context_length: int
    """The context length under this scaling, in tokens."""
    factors: str | None = None
    """Of a fine-tuning: the folder of the search whose factors it trains; None for those of the model's own scaling."""
    continues: bool = False
    """Of a search after the last fine-tuning: it starts from `scaling` and keeps that one's windows beside its own. A
    search before a fine-tuning knows nothing of the others."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The folders that its result depends on."""
        alone = isinstance(self.stage, SearchStage | FinetuneStage) and not self.continues
        scaling = None if alone else self.scaling
        return tuple(dict.fromkeys(name for name in (self.weights, scaling, self.factors) if name is not None))

    @property
    def starts_at(self) -> int:
        """Of a search: the context length that it extends."""
        return self.context_length if self.continues else self.trained_length

    @property
    def title(self) -> str:
        """The step as people read it: `search 32k`."""
        stage = self.stage
        if isinstance(stage, SearchStage | FinetuneStage):
            return f"{stage.stage} {format_length(stage.target)}"
        if isinstance(stage, RecoverStage):
            return f"recover {', '.join(map(format_length, stage.lengths))}"
        return f"export {stage.to}" if isinstance(stage, ExportStage) else stage.stage


def steps(recipe: Recipe, original_length: int, context_length: int, *, scaled: bool = False) -> list[Step]:
    """The steps of `recipe` for a model with an original window of `original_length` tokens, extended to
    `context_length` so far. `scaled`: its checkpoint states the scaling, which can be trained on and exported.

    Raises LongRopeError (`wrong-order`) where a stage needs what no stage before it makes.
    """
    made: list[Step] = []
    weights = scaling = None
    trained = context_length
    own = context_length if scaled else None
    searches: dict[int, str] = {}
    recovered: str | None = None
    trainings = [place for place, stage in enumerate(recipe.stages, start=1) if isinstance(stage, FinetuneStage)]
    for place, stage in enumerate(recipe.stages, start=1):
        where = f"stage {place} ({stage.stage})"
        name = f"{place:02d}-{stage.stage}"
        factors = None
        continues = isinstance(stage, SearchStage) and bool(trainings) and place > trainings[-1]
        if isinstance(stage, SearchStage | FinetuneStage):
            if recovered is not None:
                raise _wrong_order(
                    f"{where}: the windows that {recovered} recovers would be lost: put it after all searches and "
                    "fine-tunings"
                )
            name += f"-{format_length(stage.target)}"
            factors_known = trained in searches or trained == own
            trains_on = isinstance(stage, FinetuneStage) and stage.target == trained and factors_known
            if stage.target <= trained and not trains_on:
                raise _wrong_order(
                    f"{where}: expected a target above the {trained} tokens that the model is trained for by then, "
                    f"found {stage.target}: put the stages in order of their targets"
                )
            if continues and stage.target <= context_length:
                raise _wrong_order(
                    f"{where}: expected a target above the {context_length} tokens that the search before it reaches, "
                    f"found {stage.target}: put the searches after the last fine-tuning in order of their targets"
                )
        if isinstance(stage, FinetuneStage):
            factors = searches.get(stage.target)
            if factors is None and stage.target != own:
                raise _wrong_order(
                    f"{where}: there is no search for {format_length(stage.target)} before it, whose factors it would "
                    "train: put one there"
                )
        elif not isinstance(stage, SearchStage):
            if scaling is None and own is None:
                raise _wrong_order(f"{where}: there is no search before it: put one there")
            _check_lengths(where, stage, original_length, context_length)
        made.append(Step(stage, name, weights, trained, scaling, context_length, factors, continues))
        if isinstance(stage, SearchStage):
            searches[stage.target] = scaling = name
            context_length = stage.target
        elif isinstance(stage, FinetuneStage):
            weights = scaling = name
            trained = context_length = stage.target
        elif isinstance(stage, RecoverStage):
            scaling, recovered = name, f"stage {place}"
    return made


def _check_lengths(where: str, stage: Stage, original_length: int, context_length: int) -> None:
    """Raise LongRopeError for lengths that a recovery or an evaluation cannot have by then."""
    if isinstance(stage, RecoverStage) and (
        min(stage.lengths) < original_length or max(stage.lengths) >= context_length
    ):
        raise _wrong_order(
            f"{where}: expected lengths from the original window of {original_length} tokens, below the "
            f"{context_length} that the model reaches by then; found {', '.join(map(str, stage.lengths))}"
        )
    if isinstance(stage, EvaluateStage) and max(stage.lengths, default=0) > context_length:
        raise _wrong_order(
            f"{where}: expected lengths up to the {context_length} tokens that the model reaches by then, found "
            f"{max(stage.lengths)}"
        )


def _wrong_order(message: str) -> LongRopeError:
    return LongRopeError(message, code="wrong-order")
