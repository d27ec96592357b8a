"""Recipes: an ordered list of stages with their targets, data, settings and budgets. Files of them: `recipe_file.py`.

A stage's own keys are those of its class below; all others are settings of its verb, by the names that `SearchConfig`,
`FinetuneConfig` and `EvalConfig` give them. Lengths are tokens (`8192`, `128k`) or ratios to the original window of
the model (`32x`), so a recipe becomes whole only for a model: `Recipe.model_validate(raw, context={"original_length":
4096})`. Everything is checked where it is made; what depends on texts, memory and order is checked in `recipe_check.py`
and `recipe_steps.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from longrope.errors import LongRopeError
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.retention import SUITE as RETENTION
from longrope.evaluation.suites import SUITES
from longrope.export.config import TARGETS
from longrope.search.config import SearchConfig
from longrope.train.config import FinetuneConfig
from longrope.units import doubling_lengths, parse_length

SETTINGS: Mapping[str, type[SearchConfig | FinetuneConfig | EvalConfig]] = {
    "search": SearchConfig,
    "finetune": FinetuneConfig,
    "recover": SearchConfig,
    "evaluate": EvalConfig,
}
"""What a stage of each kind can be told besides its own keys."""


def _to_tokens(value: Any, info: ValidationInfo) -> int:
    """Tokens of `8192`, `128k` or `32x`, the last of the original window in the validation's context."""
    text = str(value).strip().lower()
    if not text.endswith(("x", "×")):
        return parse_length(text)
    original_length = int((info.context or {})["original_length"])
    try:
        tokens = float(text[:-1]) * original_length
    except ValueError:
        tokens = 0.0
    if not 1 <= tokens < 2**31 or tokens != int(tokens):
        raise LongRopeError(
            f"expected a ratio such as 32x that makes whole tokens of a window of {original_length}, found {value!r}"
        )
    return int(tokens)


Length = Annotated[int, BeforeValidator(_to_tokens)]


class _Stage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, raw: Any) -> Any:
        """Keys that are not the stage's own are settings of its verb."""
        if not isinstance(raw, Mapping) or "settings" not in cls.model_fields:
            return raw
        own = {key: value for key, value in raw.items() if key in cls.model_fields and key != "settings"}
        settings = {key: value for key, value in raw.items() if key not in own}
        return own | {"settings": settings}


class _WorkingStage(_Stage):
    """A stage that computes. `data`: texts of this stage alone; `dtype`: what the model is loaded in."""

    data: tuple[str, ...] | None = None
    dtype: str = "auto"


class SearchStage(_WorkingStage):
    """Search factors for `target` on the weights that the stages before have left, in `workers` Ray processes."""

    stage: Literal["search"]
    target: Length
    workers: int | None = Field(None, ge=1)
    settings: SearchConfig


class FinetuneStage(_WorkingStage):
    """Fine-tune for `target` with the factors that the last search for this length has found.

    `processes`: how many to start for it, one for each GPU. Rows have `target` tokens unless the setting `length` is
    smaller; the window is that of the target all the same (as LongRoPE trains Mistral).
    """

    stage: Literal["finetune"]
    target: Length
    processes: int = Field(1, ge=1)
    settings: FinetuneConfig

    @model_validator(mode="before")
    @classmethod
    def _rows_of_target(cls, raw: Any, info: ValidationInfo) -> Any:
        if isinstance(raw, Mapping) and "target" in raw:
            return dict(raw) | {"length": _to_tokens(raw.get("length", raw["target"]), info)}
        return raw

    @model_validator(mode="after")
    def _possible(self) -> FinetuneStage:
        settings = self.settings
        if settings.length > self.target:
            raise LongRopeError(f"expected a length of at most its target of {self.target}, found {settings.length}")
        if self.processes % settings.context_parallel:
            raise LongRopeError(
                f"context_parallel {settings.context_parallel} shares a row among so many processes: expected a "
                f"multiple of it, found processes {self.processes}"
            )
        at_once = settings.micro_batch * self.processes // settings.context_parallel
        if settings.rows_per_step % at_once:
            raise LongRopeError(
                f"expected a batch that {at_once} rows at once divide (micro_batch × processes / context_parallel), "
                f"found {settings.rows_per_step}"
            )
        if settings.lora is not None and not settings.lora.merge:
            raise LongRopeError("the stages after it work on merged weights: leave merge: false out of lora")
        return self


class RecoverStage(_WorkingStage):
    """Search the windows `lengths` again with a smaller largest λ, and keep what is better (`recover.py`)."""

    stage: Literal["recover"]
    lengths: tuple[Length, ...] = Field(("1x", "2x"), validate_default=True, min_length=1)
    workers: int | None = Field(None, ge=1)
    settings: SearchConfig

    @model_validator(mode="after")
    def _bounded(self) -> RecoverStage:
        if self.settings.method != "longrope":
            raise LongRopeError(f"a recovery searches by the method longrope only; found {self.settings.method!r}")
        return self


class EvaluateStage(_WorkingStage):
    """Measure the model as it is now on texts that no stage has seen; by default at L, 2L, 4L … of its reach."""

    stage: Literal["evaluate"]
    suites: tuple[str, ...] = Field(("perplexity",), min_length=1)
    lengths: tuple[Length, ...] = ()
    against: tuple[str, ...] = ()
    settings: EvalConfig
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> EvaluateStage:
        if unknown := [name for name in self.suites if name not in SUITES]:
            raise LongRopeError(f"expected suites of {', '.join(SUITES)}; found {', '.join(unknown)}")
        if self.lengths and not self.by_length:
            raise LongRopeError(f"{', '.join(self.suites)} measure inside the original window; leave the lengths out")
        if self.settings.tasks and RETENTION not in self.suites:
            raise LongRopeError(f"lm-eval's tasks belong to the suite {RETENTION}; add it, or leave them out")
        return self

    @property
    def by_length(self) -> bool:
        """Whether any suite measures at lengths."""
        return any(SUITES[name].by_length for name in self.suites)

    @property
    def needs_text(self) -> bool:
        return any(SUITES[name].needs_text(self.settings) for name in self.suites)

    def at(self, original_length: int, reach: int) -> list[int]:
        """The lengths that are measured; none where no suite measures at lengths."""
        if not self.by_length:
            return []
        return list(dict.fromkeys(self.lengths)) or doubling_lengths(original_length, reach)


class ExportStage(_Stage):
    """Write a checkpoint that runtimes apply."""

    stage: Literal["export"]
    to: str = "hf"
    fold_attention_factor: bool = False
    allow_lossy: bool = False

    @model_validator(mode="after")
    def _known(self) -> ExportStage:
        if self.to not in TARGETS:
            raise LongRopeError(f"expected to export to {', '.join(TARGETS)}; found {self.to!r}")
        return self


Stage = Annotated[
    SearchStage | FinetuneStage | RecoverStage | EvaluateStage | ExportStage, Field(discriminator="stage")
]
STAGES: Mapping[str, type[_Stage]] = {
    "search": SearchStage,
    "finetune": FinetuneStage,
    "recover": RecoverStage,
    "evaluate": EvaluateStage,
    "export": ExportStage,
}
"""The kinds of stages."""


class Recipe(BaseModel):
    """A recipe for a model with a known original window. `data` and `eval_data` are for stages that name none.

    `model` is the one it is for unless another is given, and `original_length` its window where its config states
    another. `seed` is that of every stage that has none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = ""
    model: str | None = None
    original_length: int | str | None = None
    seed: int = Field(0, ge=0)
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _seed_for_all(cls, raw: Any) -> Any:
        """The recipe's seed for the stages that have none."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("stages"), list):
            return raw
        seeded = [
            {"seed": raw.get("seed", 0)} | stage
            if isinstance(stage, dict) and stage.get("stage") != "export"
            else stage
            for stage in raw["stages"]
        ]
        return dict(raw) | {"stages": seeded}

    def with_data(self, data: tuple[str, ...], eval_data: tuple[str, ...]) -> Recipe:
        """The recipe with these texts for the stages that name none; without any, with its own.

        Raises LongRopeError for texts that no stage would read.
        """
        for given, name, evaluates in ((data, "data", False), (eval_data, "eval-data", True)):
            if given and not any(_reads(stage, evaluates) for stage in self.stages):
                raise LongRopeError(f"no stage of the recipe would read --{name}: leave it out")
        return self.model_copy(update={"data": data or self.data, "eval_data": eval_data or self.eval_data})


def _reads(stage: Stage, evaluates: bool) -> bool:
    """Whether a stage reads the recipe's texts: those to be measured on, or the others."""
    if isinstance(stage, ExportStage) or stage.data is not None:
        return False
    return isinstance(stage, EvaluateStage) == evaluates and (not isinstance(stage, EvaluateStage) or stage.needs_text)


__all__ = [
    "SETTINGS",
    "STAGES",
    "EvaluateStage",
    "ExportStage",
    "FinetuneStage",
    "Recipe",
    "RecoverStage",
    "SearchStage",
    "Stage",
]
