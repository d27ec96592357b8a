"""From options to a search that is ready to run: its texts, its objectives, its optimiser, and what identifies it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from longrope.data.needles import NeedleSamples, draw_needles
from longrope.data.samples import Samples, draw_samples
from longrope.data.sources import read_all
from longrope.data.tokens import bos_of, tokenize
from longrope.lengths import doubling_lengths
from longrope.models.install import Installed
from longrope.objectives.needle import NeedleObjective
from longrope.objectives.perplexity import PerplexityObjective
from longrope.objectives.sampled import SampledObjective
from longrope.pipeline.options import SearchOptions, attention_factor_of, start_tokens_of
from longrope.pipeline.subject import Subject, check_vocabulary
from longrope.rope.factors import CLOSED_FORMS
from longrope.search.critical import CriticalSpace
from longrope.search.evaluators import CandidateSearch
from longrope.search.evolution import Evolution, EvolutionSettings
from longrope.search.gradient import SEARCH, VALIDATION, GradientSearch, GradientSettings, Stage
from longrope.search.run import Search
from longrope.search.space import SearchSpace

FAR = 512 * 1024  # tokens; the paper halves its budget beyond
SEED_FORMS = ("pi", "ntk", "yarn")  # P₀ of Algorithm 1
GRADIENT_SEEDS = ("yarn", "ntk-critical", "ntk", "pi")
VALIDATION_SAMPLES = 3

AnySamples = Samples | NeedleSamples
Texts = dict[tuple[str, int], AnySamples]


@dataclass(frozen=True)
class Plan:
    """A search that is ready to run. `identity` is what makes it this search: a log of another one is refused.

    `questions` is how many it asks at most; `objectives` are by (split, length).
    """

    search: Search
    questions: int
    identity: dict[str, Any]
    objectives: dict[tuple[str, int], SampledObjective]


def prepare_texts(subject: Subject, sources: Sequence[str], target_length: int, options: SearchOptions) -> Texts:
    """The texts of every split and length that a search needs, drawn by seed.

    Raises LongRopeError when the sources do not hold enough text.
    """
    documents = tokenize(read_all(sources), subject.tokenizer)
    far = target_length > FAR
    needle = options.chosen_objective == "needle"
    count = (10 if needle else 3 if far else 5) if options.samples is None else options.samples

    def draw(length: int, count: int, seed: int) -> AnySamples:
        samples: AnySamples
        if needle:
            samples = draw_needles(
                documents, subject.tokenizer, length=length, count=count, seed=seed, depth=options.needle_depth
            )
        else:
            bos = bos_of(subject.tokenizer)
            samples = draw_samples(documents, length=length, count=count, seed=seed, bos_token_id=bos)
        check_vocabulary(subject, samples.ids)
        return samples

    if options.method != "gradient":
        return {(SEARCH, target_length): draw(target_length, count, options.seed)}
    texts: Texts = {}
    lengths = stage_lengths(subject.reach, target_length, options.continuation)
    if needle:  # other keys, numbers and places; the needle's depth is spread over each split
        for length in lengths:
            texts[SEARCH, length] = draw(length, count, options.seed)
            texts[VALIDATION, length] = draw(length, VALIDATION_SAMPLES, options.seed + 1)
        return texts
    # One draw, cut for the shorter stages: a validation text overlaps no search text of any stage.
    both = draw(target_length, count + VALIDATION_SAMPLES, options.seed)
    assert isinstance(both, Samples)
    for length in lengths:
        texts[SEARCH, length] = Samples(both.ids[:count, :length], both.rows[:count], both.has_bos)
        texts[VALIDATION, length] = Samples(both.ids[count:, :length], both.rows[count:], both.has_bos)
    return texts


def stage_lengths(reach: int, target_length: int, continuation: bool) -> list[int]:
    """The windows a gradient search goes through: 2, 4, … times what the model reaches, up to L'; or L' alone."""
    return doubling_lengths(reach, target_length)[1:] if continuation else [target_length]


def plan(subject: Subject, installed: Installed, texts: Texts, target_length: int, options: SearchOptions) -> Plan:
    """The search that `options` describe, over `texts`. Raises LongRopeError for settings that make none."""
    objectives = {key: _objective(installed, samples) for key, samples in texts.items()}
    if options.attention_factor is None and subject.existing is not None:
        attention_factor = subject.existing.windows[-1].attention_factor  # what the model was trained with
    else:
        attention_factor = attention_factor_of(options.attention_factor or "su", subject.geometry, target_length)
    build = {"longrope": _longrope, "longrope2": _longrope2, "gradient": _gradient}[options.method]
    search, questions, settings = build(subject, texts, target_length, options, attention_factor)
    identity = {
        "method": options.method,
        "target_length": target_length,
        "geometry": asdict(subject.geometry),
        "objective": options.chosen_objective,
        "samples_sha256": {f"{split} {length}": samples.sha256 for (split, length), samples in texts.items()},
        "attention_factor": attention_factor,
        "settings": settings,
    }
    return Plan(search, questions, identity, objectives)


def _objective(installed: Installed, samples: AnySamples) -> SampledObjective:
    if isinstance(samples, NeedleSamples):
        return NeedleObjective(installed, samples)
    return PerplexityObjective(installed, samples)


_Built = tuple[Search, int, dict[str, Any]]


def _evolution_settings(target_length: int, options: SearchOptions) -> EvolutionSettings:
    far = target_length > FAR
    return EvolutionSettings.for_population(
        (32 if far else 64) if options.population is None else options.population,
        top_k=32 if far and options.population is None else None,  # the paper halves P, N₁ and N₂, not k
        iterations=options.iterations,
        patience=options.patience,
        seed=options.seed,
    )


def _longrope(
    subject: Subject, texts: Texts, target_length: int, options: SearchOptions, attention_factor: float
) -> _Built:
    """Algorithm 1 of LongRoPE from PI, NTK, YaRN and the scaling that the checkpoint carries."""
    geometry = subject.geometry
    ratio = target_length / geometry.original_length
    space = SearchSpace.for_ratio(geometry.pairs, ratio, start_tokens_of(options.start_tokens))
    seeds = [space.snap(CLOSED_FORMS[name](geometry, target_length)[0]) for name in SEED_FORMS]
    if subject.existing is not None:
        seeds.append(space.snap(subject.existing.windows[-1].factors))
    settings = _evolution_settings(target_length, options)
    search = CandidateSearch(
        Evolution(space, seeds, settings), lambda candidate: candidate.window(target_length, attention_factor)
    )
    described = {"evolution": asdict(settings), "space": asdict(space), "seeds": [seed.to_row() for seed in seeds]}
    return search, settings.evaluations, described


def _longrope2(
    subject: Subject, texts: Texts, target_length: int, options: SearchOptions, attention_factor: float
) -> _Built:
    """Algorithms 1 and 2 of LongRoPE2: d_rcd from d_tcd(10) to d_tcd."""
    geometry = subject.geometry
    space = CriticalSpace(
        pairs=geometry.pairs,
        ratio=target_length / geometry.original_length,
        first=geometry.critical_dim(10),
        last=min(geometry.critical_dim(), geometry.pairs - 1),
    )
    settings = _evolution_settings(target_length, options)
    seeds = space.initial(settings.population, np.random.default_rng(options.seed))
    search = CandidateSearch(
        Evolution(space, seeds, settings), lambda candidate: candidate.window(target_length, attention_factor)
    )
    return search, settings.evaluations, {"evolution": asdict(settings), "space": asdict(space)}


def _gradient(
    subject: Subject, texts: Texts, target_length: int, options: SearchOptions, attention_factor: float
) -> _Built:
    """Adam on knots of log λ, from raced closed forms, over doubling windows."""
    geometry = subject.geometry
    settings = GradientSettings(
        steps=options.steps,
        learning_rate=options.learning_rate,
        knots=options.knots or None,
        patience=3 if options.patience is None else options.patience,
        learn_attention_factor=options.learn_attention_factor,
        seed=options.seed,
    )
    stages = []
    for (split, length), samples in texts.items():
        if split != SEARCH:
            continue
        seeds = {name: CLOSED_FORMS[name](geometry, length)[0] for name in GRADIENT_SEEDS}
        if subject.existing is not None:
            seeds["checkpoint"] = np.asarray(subject.existing.windows[-1].factors)
        stages.append(Stage(length=length, seeds=seeds, samples=len(samples.rows)))
    search = GradientSearch(stages, geometry.original_length, settings, attention_factor)
    questions = 1 + sum(
        len(stage.seeds) + (index > 0) + 2 + settings.steps + -(-settings.steps // settings.validate_every)
        for index, stage in enumerate(stages)
    )
    return search, questions, {"gradient": asdict(settings), "stages": [stage.length for stage in stages]}
