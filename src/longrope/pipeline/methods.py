"""From options to a search that is ready to run: its optimiser, its objectives, and what identifies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope.models.install import Installed
from longrope.objectives.sampled import SampledObjective
from longrope.pipeline.options import SearchOptions, attention_factor_of, start_tokens_of
from longrope.pipeline.subject import Subject
from longrope.pipeline.texts import FAR, Texts, objectives_over
from longrope.rope.factors import CLOSED_FORMS, yarn
from longrope.rope.scaling import Window
from longrope.search.cma import CMASearch, CMASettings, HybridSearch
from longrope.search.critical import CriticalCandidate, CriticalSpace
from longrope.search.dialogue import Stage
from longrope.search.evaluators import SEARCH, CandidateSearch
from longrope.search.evolution import Evolution, EvolutionSettings
from longrope.search.gradient import GradientSearch, GradientSettings
from longrope.search.racing import RacedSearch
from longrope.search.run import Search
from longrope.search.space import Candidate, SearchSpace

SEED_FORMS = ("pi", "ntk", "yarn")  # P₀ of Algorithm 1
RACED_FORMS = ("yarn", "ntk-critical", "ntk", "pi")
RACED_BETAS = (16, 8, 4, 2)
"""β_fast of further YaRNs, 32 by itself: a pair with more rotations in L keeps its frequency. The best depends on L."""
KNOTS = 12


@dataclass(frozen=True)
class Plan:
    """A search that is ready to run. `identity` is what makes it this search: a log of another one is refused.

    `questions` is how many it asks at most; `objectives` are by (split, length).
    """

    search: Search
    questions: int
    identity: dict[str, Any]
    objectives: dict[tuple[str, int], SampledObjective]


@dataclass(frozen=True)
class _Task:
    """What the builders of all methods need."""

    subject: Subject
    objectives: Mapping[tuple[str, int], SampledObjective]
    target_length: int
    options: SearchOptions
    attention_factor: float

    @property
    def ratio(self) -> float:
        return self.target_length / self.subject.geometry.original_length

    @property
    def scored(self) -> SampledObjective:
        """What a candidate of the target length is scored on."""
        return self.objectives[SEARCH, self.target_length]


_Built = tuple[Search, int, dict[str, Any]]


def plan(subject: Subject, installed: Installed, texts: Texts, target_length: int, options: SearchOptions) -> Plan:
    """The search that `options` describe, over `texts`. Raises LongRopeError for settings that make none."""
    objectives = objectives_over(installed, texts)
    search, questions, settings, attention_factor = build(subject, objectives, target_length, options)
    identity = {
        "method": options.method,
        "target_length": target_length,
        "geometry": asdict(subject.geometry),
        "objective": options.chosen_objective,
        "samples_sha256": {f"{split} {length}": samples.sha256 for (split, length), samples in texts.items()},
        "attention_factor": attention_factor,
        "critical_dim": options.critical_dim,
        "settings": settings,
    }
    return Plan(search, questions, identity, objectives)


def build(
    subject: Subject,
    objectives: Mapping[tuple[str, int], SampledObjective],
    target_length: int,
    options: SearchOptions,
) -> tuple[Search, int, dict[str, Any], float]:
    """The search itself, its questions at most, its settings and attention factor. Asks the model of `subject` nothing,
    and of the objectives only how many samples of what length they have.
    """
    if options.attention_factor is None and subject.existing is not None:
        attention_factor = subject.existing.windows[-1].attention_factor  # what the model was trained with
    else:
        attention_factor = attention_factor_of(options.attention_factor or "su", subject.geometry, target_length)
    task = _Task(subject, objectives, target_length, options, attention_factor)
    return *_BUILDERS[options.method](task), attention_factor


def _longrope(task: _Task) -> _Built:
    """Algorithm 1 of LongRoPE from PI, NTK, YaRN and the scaling that the checkpoint carries."""
    geometry, existing = task.subject.geometry, task.subject.existing
    space = SearchSpace.for_ratio(geometry.pairs, task.ratio, start_tokens_of(task.options.start_tokens))
    seeds = [space.snap(CLOSED_FORMS[name](geometry, task.target_length)[0]) for name in SEED_FORMS]
    if existing is not None:
        seeds.append(space.snap(existing.windows[-1].factors))
    settings = _evolution_settings(task)
    described = {"space": asdict(space), "seeds": [seed.to_row() for seed in seeds]}
    return _evolution(task, Evolution(space, seeds, settings), settings, described)


def _longrope2(task: _Task) -> _Built:
    """Algorithms 1 and 2 of LongRoPE2: d_rcd from d_tcd(10) to d_tcd, or the one given."""
    geometry, given = task.subject.geometry, task.options.critical_dim
    space = CriticalSpace(
        pairs=geometry.pairs,
        ratio=task.ratio,
        first=geometry.critical_dim(10) if given is None else given,
        last=min(geometry.critical_dim(), geometry.pairs - 1) if given is None else given,
    )
    settings = _evolution_settings(task)
    seeds = space.initial(settings.population, np.random.default_rng(task.options.seed))
    return _evolution(task, Evolution(space, seeds, settings), settings, {"space": asdict(space)})


def _evolution_settings(task: _Task) -> EvolutionSettings:
    options, far = task.options, task.target_length > FAR
    return EvolutionSettings.for_population(
        (32 if far else 64) if options.population is None else options.population,
        top_k=32 if far and options.population is None else None,  # the paper halves P, N₁ and N₂, not k
        iterations=options.iterations,
        patience=options.patience,
        seed=options.seed,
    )


def _evolution(
    task: _Task, optimiser: Evolution[Any], settings: EvolutionSettings, described: dict[str, Any]
) -> _Built:
    described = {"evolution": asdict(settings), **described}

    def to_window(candidate: Candidate | CriticalCandidate) -> Window:
        return candidate.window(task.target_length, task.attention_factor)

    if not task.options.racing:
        return CandidateSearch(optimiser, to_window), settings.evaluations, described
    tokens = [task.scored.scored(row) for row in range(task.scored.count)]
    search = RacedSearch(optimiser, to_window, tokens, keep=settings.top_k)
    return search, settings.evaluations * task.scored.count, described | {"racing": True}


def _gradient(task: _Task) -> _Built:
    """Adam on knots of log λ, from raced closed forms, over doubling windows."""
    settings, stages = _gradient_settings(task), _stages(task)
    search = GradientSearch(stages, task.subject.geometry.original_length, settings, task.attention_factor)
    return search, _gradient_questions(stages, settings), _described(stages, gradient=settings)


def _hybrid(task: _Task) -> _Built:
    """The gradient search, then a short CMA-ES around its result."""
    settings, stages = _gradient_settings(task), _stages(task)
    polish = _cma_settings(task, evaluations=66, sigma=0.2)
    search = HybridSearch(stages, task.subject.geometry.original_length, settings, polish, task.attention_factor)
    questions = _gradient_questions(stages, settings) + polish.evaluations + 3
    return search, questions, _described(stages, gradient=settings, polish=polish)


def _cma(task: _Task) -> _Built:
    """CMA-ES on knots of log λ, from raced closed forms."""
    (stage,) = _stages(task)
    settings = _cma_settings(task, evaluations=256, sigma=0.5)
    search = CMASearch(stage, settings, task.attention_factor)
    return search, len(stage.seeds) + 1 + settings.evaluations, _described([stage], cma=settings)


def _gradient_settings(task: _Task) -> GradientSettings:
    options = task.options
    return GradientSettings(
        steps=options.steps,
        learning_rate=options.learning_rate,
        knots=_knots(task),
        patience=3 if options.patience is None else options.patience,
        learn_attention_factor=options.learn_attention_factor,
        seed=options.seed,
    )


def _cma_settings(task: _Task, *, evaluations: int, sigma: float) -> CMASettings:
    return CMASettings(
        evaluations=evaluations if task.options.evaluations is None else task.options.evaluations,
        sigma=sigma,
        knots=_knots(task),
        patience=task.options.patience if task.options.method == "cma" else None,
        seed=task.options.seed,
    )


def _knots(task: _Task) -> int | None:
    """None is every pair."""
    if task.options.knots is None:
        return min(KNOTS, task.subject.geometry.pairs)
    return task.options.knots or None


def _stages(task: _Task) -> list[Stage]:
    """One stage per length that there are search texts of."""
    return [
        Stage(length=length, seeds=raced_seeds(task.subject, length), samples=objective.count)
        for (split, length), objective in task.objectives.items()
        if split == SEARCH
    ]


def raced_seeds(subject: Subject, length: int) -> dict[str, npt.NDArray[np.float64]]:
    """Where a search on the knots may start, by name: (D,) factors each.

    Closed forms, YaRN with other β_fast, and the scaling that the checkpoint carries.
    """
    geometry = subject.geometry
    seeds = {name: CLOSED_FORMS[name](geometry, length)[0] for name in RACED_FORMS}
    seeds |= {f"yarn, β_fast {beta}": yarn(geometry, length, beta_fast=beta) for beta in RACED_BETAS}
    if subject.existing is not None:
        seeds["checkpoint"] = np.asarray(subject.existing.windows[-1].factors)
    return seeds


def _gradient_questions(stages: list[Stage], settings: GradientSettings) -> int:
    return 1 + sum(
        len(stage.seeds) + (index > 0) + 2 + settings.steps + -(-settings.steps // settings.validate_every)
        for index, stage in enumerate(stages)
    )


def _described(stages: list[Stage], **settings: GradientSettings | CMASettings) -> dict[str, Any]:
    return {
        **{name: asdict(value) for name, value in settings.items()},
        "stages": [{"length": stage.length, "seeds": list(stage.seeds)} for stage in stages],
    }


_BUILDERS: dict[str, Callable[[_Task], _Built]] = {
    "longrope": _longrope,
    "longrope2": _longrope2,
    "gradient": _gradient,
    "hybrid": _hybrid,
    "cma": _cma,
}
