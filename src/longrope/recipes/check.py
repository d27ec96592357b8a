"""Checks of a recipe's texts, memory and packages, all before its first stage begins."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from longrope.data.documents import Document
from longrope.data.packing import SpecialTokens, pack
from longrope.data.samples import require_disjoint
from longrope.data.sources import TextSource, as_sources, read_all
from longrope.data.tokens import tokenize
from longrope.errors import LongRopeError
from longrope.evaluation.base import EvalContext
from longrope.evaluation.held_out import seen_documents
from longrope.evaluation.run import SUITES
from longrope.models.checkpoint_files import gguf_path
from longrope.models.devices import device_of, require_one_kind
from longrope.models.gguf.container import read_gguf
from longrope.models.gguf.rope import check_architecture, rope_of
from longrope.models.loading import LoadedModel
from longrope.models.targets import as_if_trained
from longrope.models.texts import sources_or_books
from longrope.models.weightless import weightless
from longrope.recipes.graph import Step
from longrope.recipes.schema import EvaluateStage, ExportStage, FinetuneStage, Recipe, RecoverStage, SearchStage, Stage
from longrope.rope.baselines import check_baseline
from longrope.rope.scaling import RopeScaling
from longrope.search.search_data import prepare_texts
from longrope.train.memory import require_room

MOST_ROUNDS = 4.0
"""Rounds over the same texts that a fine-tuning makes without a warning: beyond about four, repeated texts teach less
and less (Muennighoff et al. 2023, 2305.16264)."""


@dataclass(frozen=True, slots=True)
class TextRounds:
    """The rounds of a fine-tuning over its texts, by part of its mix; at most, since padding counts as text."""

    title: str
    rounds: Mapping[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {rounds:.2g}" for part, rounds in self.rounds.items())
        return f"{self.title}: rounds over its texts: {parts}"

    @property
    def warning(self) -> str | None:
        """One sentence where texts come too often."""
        part, rounds = max(self.rounds.items(), key=lambda item: item[1])
        if rounds <= MOST_ROUNDS:
            return None
        return (
            f"{self.title} goes {rounds:.3g} times through its texts of the part {part}, above {MOST_ROUNDS:g}: give "
            "more texts, fewer steps or a smaller batch"
        )


def stage_sources(name: str, recipe: Recipe, stage: Stage) -> list[TextSource]:
    """The texts of a stage with the field of their rows. Raises LongRopeError as `stage_texts` does."""
    texts = stage_texts(name, recipe, stage)
    return as_sources(texts, stage_field(recipe, stage) if texts else None)


def stage_field(recipe: Recipe, stage: Stage) -> tuple[str, ...] | None:
    """The field of a stage's rows: its own, or the recipe's."""
    return None if isinstance(stage, ExportStage) else stage.field or recipe.field


def stage_texts(name: str, recipe: Recipe, stage: Stage) -> list[str]:
    """The texts of a stage for the model `name`: its own data, or the recipe's, or the shipped books for an embedded
    model; none for a stage that reads none. Raises LongRopeError (`missing-data`) where there are none.
    """
    if isinstance(stage, ExportStage):
        return []
    evaluates = isinstance(stage, EvaluateStage)
    given = stage.data if stage.data is not None else recipe.eval_data if evaluates else recipe.data
    if isinstance(stage, EvaluateStage) and not given and not stage.needs_text:
        return []
    try:
        return sources_or_books(name, list(given), "evaluation" if evaluates else "search")
    except LongRopeError as error:
        raise LongRopeError(
            f"the recipe names no texts to {stage.stage} {name} on",
            code="missing-data",
            hint=f"give `{'eval_data' if evaluates else 'data'}`",
        ) from error


def check_recipe(
    loaded: LoadedModel, recipe: Recipe, steps: Sequence[Step], finished: Collection[str] = ()
) -> list[TextRounds]:
    """The rounds over its texts of every fine-tuning to be done.

    Raises LongRopeError, with the stage, for a stage that cannot run: too little text, texts that would be measured on
    after they were seen, a training step that does not fit or is impossible, and packages that are missing. `loaded` is
    the model the recipe begins with; steps whose folders are `finished` are left alone.
    """
    seen = set(seen_documents(loaded.recorded))
    rounds: list[TextRounds] = []
    short = (
        loaded.geometry.original_length
        if loaded.checkpoint_scaling is None
        else loaded.checkpoint_scaling.windows[0].max_length
    )
    for place, step in enumerate(steps, start=1):
        stage = step.stage
        try:
            if step.folder not in finished:
                if isinstance(stage, FinetuneStage):
                    _require_beyond(_kept_window(loaded, step, steps), stage.settings.reach)
                rounds += _check(loaded, recipe, step, short, seen)
        except LongRopeError as error:
            raise error.within(f"stage {place} ({stage.stage})") from error
        if isinstance(stage, FinetuneStage) and not stage.settings.mixed:
            short = stage.target  # one window is all that it leaves
    return rounds


def _check(loaded: LoadedModel, recipe: Recipe, step: Step, short: int, seen: set[str]) -> list[TextRounds]:
    stage, sources = step.stage, stage_sources(loaded.name, recipe, step.stage)
    if isinstance(stage, ExportStage):
        if stage.to == "gguf":
            _require("gguf", "gguf")
            if (path := gguf_path(loaded.name)) is not None and step.weights is None:
                check_architecture(rope_of(read_gguf(path)).architecture)
        return []
    if isinstance(stage, EvaluateStage):
        _check_evaluation(loaded, stage, step, sources, seen)
        return []
    documents = read_all(sources, tokenizer=loaded.tokenizer)
    seen |= {document.sha256 for document in documents}
    if isinstance(stage, FinetuneStage):
        return [TextRounds(step.title, _check_training(loaded, stage, documents, short))]
    if stage.workers is not None:
        _require("ray", "ray")
    if isinstance(stage, SearchStage):
        prepare_texts(as_if_trained(loaded, step.starts_at), documents, stage.target, stage.settings)
    elif isinstance(stage, RecoverStage):
        for length in stage.lengths:
            prepare_texts(loaded, documents, length, stage.settings)
    return []


def _kept_window(loaded: LoadedModel, step: Step, steps: Sequence[Step]) -> int:
    """The longest window beside the target's own in the scaling that a fine-tuning is given; 0 for the original one."""
    search = next((earlier for earlier in steps if earlier.folder == step.factors), None)
    own = loaded.checkpoint_scaling
    if search is None:
        return 0 if own is None or len(own.windows) == 1 else own.windows[-2].max_length
    return 0 if search.weights is None and own is None else search.trained_length


def _require_beyond(kept: int, reach: int) -> None:
    """Raise LongRopeError where a fine-tuning's rows would be computed under an earlier window than the target's."""
    if reach <= kept:
        raise LongRopeError(
            f"expected rows that reach beyond {kept} tokens, for which the scaling keeps the window of before; found "
            f"{reach}",
            code="not-longer",
            hint="give a larger `length`, or `skip_to`",
        )


def _require(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise LongRopeError(
            f"it needs {package}, which is not installed",
            code="missing-dependency",
            hint=f'pip install "longrope[{extra}]"',
        )


def _check_training(
    loaded: LoadedModel, stage: FinetuneStage, documents: Sequence[Document], short: int
) -> dict[str, float]:
    """Check a fine-tuning; returns how often it reads its documents, by part of the mix."""
    _require("accelerate", "train")
    from longrope.train.finetune import refuse_combinations
    from longrope.train.lora import require_low_rank
    from longrope.train.trainer import training_arguments

    settings, device = stage.settings, device_of(loaded.model)
    require_one_kind(loaded.options.device)
    packed = settings.packed
    if stage.processes == 1:
        arguments = training_arguments(settings, Path("trainer"), cpu=device.type == "cpu")
        refuse_combinations(settings, arguments, packed=packed)
    elif device.type == "cpu" and "fsdp" in settings.trainer:
        raise LongRopeError("FSDP shards over several GPUs, found a CPU", code="invalid-setting", hint="leave fsdp out")
    model = weightless(loaded.name, trust_remote_code=loaded.options.trust_remote_code)
    model.config._attn_implementation = loaded.model.config._attn_implementation
    model = model.to(loaded.model.dtype if stage.dtype == "auto" else getattr(torch, stage.dtype))
    if settings.lora is not None:
        model.requires_grad_(False)  # LoRA trains few weights
    sharded = bool(settings.trainer.keys() & {"fsdp", "deepspeed"})
    settings.require_longer(loaded.geometry.original_length)
    settings.require_rows()
    if settings.lora is not None:
        require_low_rank(loaded.model, settings.lora)
    require_room(model, settings, device, shards=stage.processes if sharded else 1, packed=packed)
    rows = pack(
        tokenize(documents, loaded.tokenizer),
        settings.shares,
        length=settings.length,
        short_length=short if settings.mixed else loaded.geometry.original_length,
        # Enough rows to meet every part of the mix.
        count=settings.micro_batch * 8 * len(settings.shares),
        group=settings.micro_batch,
        special_tokens=SpecialTokens.of(loaded.tokenizer),
        seed=settings.seed,
        long_from=settings.long_from,
        long_to=settings.long_to,
    )
    return rows.rounds(settings.shares, settings.steps * settings.rows_per_step)


def _check_evaluation(
    loaded: LoadedModel, stage: EvaluateStage, step: Step, sources: Sequence[TextSource], seen: set[str]
) -> None:
    for name in stage.against:
        check_baseline(name)
        if name.endswith(".json"):
            RopeScaling.load(name).check_fits(loaded.geometry)
    documents = read_all(sources, tokenizer=loaded.tokenizer) if stage.needs_text else []
    require_disjoint(seen, documents)
    lengths = stage.lengths_for(loaded.geometry.original_length, step.context_length)
    context = EvalContext.of(loaded, lengths, documents, stage.seed, stage.settings)
    for name in stage.suites:
        SUITES[name](context).check()
