"""Recipes: an ordered list of stages with their targets, texts, settings and budgets. Their YAML is in `yaml.py`.

A stage's own keys are those of its class below; all others are settings of its job, by the names that `SearchConfig`,
`FinetuneConfig` and `EvalConfig` give them. Lengths are tokens (`8192`, `128k`) or ratios to the original window of
the model (`32x`), so a recipe becomes whole only for a model: `Recipe.model_validate(raw, context={"original_length":
4096})`. Everything is checked where it is made; `graph.py` checks the order of the stages, `check.py` what depends on
texts and memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from longrope.data.readers import DatasetName
from longrope.data.sources import as_fields
from longrope.errors import LongRopeError
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.run import SUITES
from longrope.export.config import Target
from longrope.search.config import SearchConfig
from longrope.settings import LARGEST_SEED, MOST, Settings, suggestion
from longrope.train.config import FinetuneConfig
from longrope.units import doubling_lengths, parse_length


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
            f"expected a ratio such as 32x that makes whole tokens of a window of {original_length}, found {value!r}",
            code="invalid-setting",
        )
    return int(tokens)


Length = Annotated[int, BeforeValidator(_to_tokens)]
HUB = "hf:"
"""The prefix of a source of texts over the network."""
RowField = Annotated[tuple[str, ...] | None, BeforeValidator(as_fields)]


class _Stage(Settings):
    @model_validator(mode="before")
    @classmethod
    def _gather(cls, raw: Any) -> Any:
        """Keys that are not the stage's own are settings of its job."""
        if not isinstance(raw, Mapping):
            return raw
        known = cls.keys()
        if unknown := [str(key) for key in raw if key not in known]:
            raise LongRopeError(f"unknown key {unknown[0]!r}; {suggestion(unknown[0], known)}", code="invalid-setting")
        if cls.job() is None:
            return raw
        own = {key: value for key, value in raw.items() if key in cls.model_fields}
        return own | {"settings": {key: value for key, value in raw.items() if key not in own}}

    @classmethod
    def keys(cls) -> list[str]:
        """The keys that a stage of this kind can have: its own, then its job's settings."""
        job = cls.job()
        return [name for name in cls.model_fields if name != "settings"] + list(job.model_fields if job else ())

    @classmethod
    def job(cls) -> type[Settings] | None:
        """The configuration that the stage's further keys belong to; None where it has none."""
        field: Any = cls.model_fields.get("settings")
        return None if field is None else field.annotation


class _WorkingStage(_Stage):
    data: tuple[str, ...] | None = None
    """Texts of this stage alone."""
    field: RowField = None
    """The field of their rows that holds the text or chat messages, or several. Default: the recipe's."""
    dtype: str = "auto"
    """The dtype that the model is loaded in."""

    @field_validator("data")
    @classmethod
    def _read_by_their_form(cls, sources: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if sources is None else _checked_sources(sources)


class _SearchingStage(_WorkingStage):
    workers: int | None = Field(None, ge=1, le=MOST)
    """Search with this many Ray workers, one model replica each."""
    context_parallel: int = Field(1, ge=1, le=MOST)
    """Processes of each worker, which share every text."""
    settings: SearchConfig

    @model_validator(mode="after")
    def _shared_in_workers(self) -> Self:
        if self.context_parallel > 1 and self.workers is None:
            raise _wrong(f"context_parallel {self.context_parallel} shares texts in Ray workers: give `workers`, too")
        return self


class SearchStage(_SearchingStage):
    """Search factors for a target length on the weights that the stages before have left."""

    stage: Literal["search"]
    target: Length
    """The target length L'."""


class FinetuneStage(_WorkingStage):
    """Fine-tune for a target length with the factors that the last search for this length has found.

    Rows have `target` tokens unless the setting `length` is smaller; the window is that of the target all the same (as
    LongRoPE trains Mistral). With `skip_to` their positions go further than their tokens. A second one of the same
    target trains on from the weights of the first, and one of the window that the model has already from its own.
    """

    stage: Literal["finetune"]
    target: Length
    """The target length L'."""
    processes: int = Field(1, ge=1, le=MOST)
    """Processes to start, one for each GPU."""
    settings: FinetuneConfig

    @model_validator(mode="before")
    @classmethod
    def _rows_of_target(cls, raw: Any, info: ValidationInfo) -> Any:
        """Lengths among the settings may be ratios, too; that of the rows is the target's by default."""
        if not isinstance(raw, Mapping) or "target" not in raw:
            return raw
        given = {"length": raw["target"]} | dict(raw)
        lengths = ("length", "skip_to", "long_from", "long_to")
        return given | {name: _to_tokens(given[name], info) for name in lengths if given.get(name) is not None}

    @model_validator(mode="after")
    def _possible(self) -> FinetuneStage:
        settings = self.settings
        if settings.length > self.target:
            raise _wrong(f"expected a length of at most its target of {self.target}, found {settings.length}")
        if settings.reach > self.target:
            raise _wrong(f"expected a skip_to of at most its target of {self.target}, found {settings.skip_to}")
        if self.processes % settings.context_parallel:
            raise _wrong(
                f"context_parallel {settings.context_parallel} shares a row among so many processes: expected a "
                f"multiple of it, found processes {self.processes}"
            )
        at_once = settings.micro_batch * self.processes // settings.context_parallel
        if settings.rows_per_step % at_once:
            raise _wrong(
                f"expected a batch that {at_once} rows at once divide (micro_batch × processes / context_parallel), "
                f"found {settings.rows_per_step}"
            )
        if settings.lora is not None and not settings.lora.merge:
            raise _wrong("the stages after it work on merged weights: leave merge: false out of lora")
        return self


class RecoverStage(_SearchingStage):
    """Search short windows again with a smaller largest λ, and keep each result that is better (LongRoPE, §3.3)."""

    stage: Literal["recover"]
    lengths: tuple[Length, ...] = Field(("1x", "2x"), validate_default=True, min_length=1)
    """The windows to recover."""

    @model_validator(mode="before")
    @classmethod
    def _by_evolution(cls, raw: Any) -> Any:
        """A recovery has one method, which is not the default of a search."""
        return {"method": "longrope", **raw} if isinstance(raw, Mapping) and "settings" not in raw else raw

    @model_validator(mode="after")
    def _bounded(self) -> RecoverStage:
        if self.settings.method != "longrope":
            raise _wrong(f"a recovery searches by the method longrope only; found {self.settings.method!r}")
        return self


class EvaluateStage(_WorkingStage):
    """Measure the model that the stages before have left, on texts that no stage has seen."""

    stage: Literal["evaluate"]
    suites: tuple[str, ...] = Field(("perplexity",), min_length=1)
    """The suites to run."""
    lengths: tuple[Length, ...] = ()
    """Context lengths. Default: L, 2L, 4L … up to the longest that the model reaches."""
    against: tuple[str, ...] = ()
    """Methods to compare with."""
    settings: EvalConfig
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """The random seed."""

    @model_validator(mode="after")
    def _possible(self) -> EvaluateStage:
        if unknown := [name for name in self.suites if name not in SUITES]:
            raise _wrong(f"expected suites of {', '.join(SUITES)}; found {', '.join(unknown)}")
        if self.lengths and not self.by_length:
            raise _wrong(f"{', '.join(self.suites)} measure inside the original window; leave the lengths out")
        if self.settings.tasks and "retention" not in self.suites:
            raise _wrong("lm-eval's tasks belong to the suite retention; add it, or leave them out")
        self.settings.refuse_unused(self.suites)
        return self

    @property
    def by_length(self) -> bool:
        """True if a suite measures at lengths."""
        return any(SUITES[name].by_length for name in self.suites)

    @property
    def needs_text(self) -> bool:
        """True if a suite measures on texts."""
        return any(SUITES[name].needs_text(self.settings) for name in self.suites)

    def lengths_for(self, original_length: int, context_length: int) -> list[int]:
        """The lengths to measure for a model of these windows; none where no suite measures at lengths."""
        if not self.by_length:
            return []
        return list(dict.fromkeys(self.lengths)) or doubling_lengths(original_length, context_length)


class ExportStage(_Stage):
    """Write a checkpoint that runtimes apply."""

    stage: Literal["export"]
    to: Target = "hf"
    """The kind of checkpoint."""
    fold_attention_factor: bool = False
    """Fold the attention factor into the queries."""
    allow_lossy: bool = False
    """Export without the parts that the runtime cannot express."""


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


def _wrong(message: str) -> LongRopeError:
    return LongRopeError(message, code="invalid-setting")


class Recipe(Settings):
    """A recipe for a model with a known original window."""

    about: str = ""
    """The purpose of the recipe."""
    model: str | None = None
    """The model that it is for unless another is given."""
    original_length: int | str | None = None
    """That model's original window, where its config states another."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Seed of every stage that has none."""
    data: tuple[str, ...] = ()
    """Texts of the stages that name none."""
    eval_data: tuple[str, ...] = ()
    """Texts to measure on, of the stages that name none."""
    field: RowField = None
    """The field of rows that holds their text or chat messages, or several: the first that a row has."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """The stages in their order."""

    @field_validator("data", "eval_data")
    @classmethod
    def _read_by_their_form(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_sources(sources)

    @field_validator("stages", mode="before")
    @classmethod
    def _each(cls, stages: Any, info: ValidationInfo) -> Any:
        """The stages one by one, so that an error names its stage."""
        if not isinstance(stages, list):
            return stages
        return tuple(
            _stage(place, raw, info.data.get("seed", 0), info.context) for place, raw in enumerate(stages, start=1)
        )

    def with_data(
        self, data: tuple[str, ...], eval_data: tuple[str, ...], field: tuple[str, ...] | None = None
    ) -> Recipe:
        """The recipe with these texts, and this field of their rows, for the stages that name none; without any, with
        its own.

        Raises LongRopeError for texts that no stage would read.
        """
        for given, name, evaluates in ((data, "data", False), (eval_data, "eval_data", True)):
            if given and not any(_reads(stage, evaluates) for stage in self.stages):
                raise LongRopeError(
                    f"no stage of the recipe would read `{name}`", code="invalid-setting", hint="leave it out"
                )
        texts = {"data": data or self.data, "eval_data": eval_data or self.eval_data, "field": field or self.field}
        return self.model_copy(update=texts)

    def with_target_length(self, target_length: int) -> Recipe:
        """The recipe with its longest target moved to `target_length` tokens, in every stage that has it.

        Other targets stay as they are. Lengths to measure beyond `target_length` are left out, and it takes the place
        of the longest target among them. Raises LongRopeError (`invalid-setting`) where another target is not below it.
        """
        targets = {stage.target for stage in self.stages if isinstance(stage, SearchStage | FinetuneStage)}
        longest = max(targets, default=target_length)
        if others := [target for target in targets if target != longest and target >= target_length]:
            raise LongRopeError(
                f"expected a `target_length` above the recipe's other targets ({', '.join(map(str, sorted(targets)))} "
                f"tokens in all), found {target_length} and {max(others)}",
                code="invalid-setting",
                hint="give a longer one, or write a recipe with other targets",
            )
        stages = tuple(_with_target(stage, longest, target_length) for stage in self.stages)
        return self.model_copy(update={"stages": stages})


def _with_target(stage: Stage, old: int, new: int) -> Stage:
    """`stage` with the target `new` where it has `old`, and no length to measure beyond `new`."""
    if isinstance(stage, EvaluateStage):
        lengths = tuple(new if length == old else length for length in stage.lengths if length == old or length <= new)
        return stage.model_copy(update={"lengths": tuple(dict.fromkeys(lengths))})
    if not isinstance(stage, SearchStage | FinetuneStage) or stage.target != old:
        return stage
    changes: dict[str, Any] = {"target": new}
    if isinstance(stage, FinetuneStage):
        settings = stage.settings
        length, reach = (new if own == old else min(own, new) for own in (settings.length, settings.reach))
        changes["settings"] = settings.replace(length=length, skip_to=None if reach == length else reach)
    return stage.model_copy(update=changes)


def _stage(place: int, raw: Any, seed: int, context: dict[str, int] | None) -> _Stage:
    """Stage number `place`. Raises LongRopeError, with its number and kind, where it is wrong."""
    kind = raw.get("stage") if isinstance(raw, Mapping) else None
    if not isinstance(kind, str) or kind not in STAGES:
        raise _wrong(f"stage {place}: expected 'stage' to be one of {', '.join(STAGES)}")
    try:
        return STAGES[kind].model_validate(raw if kind == "export" else {"seed": seed} | raw, context=context)
    except LongRopeError as error:
        raise error.within(f"stage {place} ({kind})") from error


def _checked_sources(sources: tuple[str, ...]) -> tuple[str, ...]:
    """`sources`. Raises LongRopeError (`missing-data`) for a dataset whose name has another form."""
    for source in sources:
        if source.startswith(HUB):
            DatasetName.parse(source.removeprefix(HUB))
    return sources


def _reads(stage: Stage, evaluates: bool) -> bool:
    """True if a stage reads the recipe's texts: those to be measured on, or the others."""
    if isinstance(stage, ExportStage) or stage.data is not None:
        return False
    return isinstance(stage, EvaluateStage) == evaluates and (not isinstance(stage, EvaluateStage) or stage.needs_text)
