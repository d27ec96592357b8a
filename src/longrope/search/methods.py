"""From options to a search that is ready to run: its optimiser, its objectives, and what identifies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.models.scaled import ScaledModel
from longrope.rope.closed_forms import CLOSED_FORMS, yarn
from longrope.rope.progressive import continued_attention_factor
from longrope.rope.scaling import Window
from longrope.search.cma import CMASearch, CMASettings, HybridSearch
from longrope.search.config import CONTINUED, SearchConfig, attention_factor_of, start_tokens_of
from longrope.search.dialogue import Bounds, Stage
from longrope.search.evaluator import SEARCH, CandidateSearch
from longrope.search.evolution import Evolution, EvolutionSettings
from longrope.search.gradient import GradientSearch, GradientSettings
from longrope.search.initial import checkpoint_seeds, evolution_seeds
from longrope.search.knots import admissible
from longrope.search.loop import Search
from longrope.search.objective import SampledObjective
from longrope.search.racing import RacedSearch
from longrope.search.search_data import FAR, Texts, objectives_over
from longrope.search.spaces import Candidate, CriticalCandidate, CriticalSpace, SearchSpace

RACED_FORMS = ("yarn", "ntk-critical", "ntk", "pi")
RACED_BETAS = (16, 8, 4, 2)
"""β_fast of further YaRNs, 32 by itself: a pair with more rotations in L keeps its frequency. The best depends on L."""
LATE_BETAS = (16.0, 0.6)
"""β_fast and β_slow of a YaRN whose ramp ends beyond the theoretical critical dimension, where searches end it too."""
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

    loaded: LoadedModel
    objectives: Mapping[tuple[str, int], SampledObjective]
    target_length: int
    options: SearchConfig
    attention_factor: float

    @property
    def ratio(self) -> float:
        return self.target_length / self.loaded.geometry.original_length

    @property
    def scored(self) -> SampledObjective:
        """What a candidate of the target length is scored on."""
        return self.objectives[SEARCH, self.target_length]


_Built = tuple[Search, int, dict[str, Any]]


def plan(loaded: LoadedModel, scaled: ScaledModel, texts: Texts, target_length: int, options: SearchConfig) -> Plan:
    """The search that `options` describe, over `texts`. Raises LongRopeError for settings that make none."""
    objectives = objectives_over(scaled, texts)
    search, questions, settings, attention_factor = build(loaded, objectives, target_length, options)
    identity = {
        "method": options.method,
        "target_length": target_length,
        "geometry": asdict(loaded.geometry),
        "objective": options.chosen_objective,
        "samples_sha256": {f"{split} {length}": samples.sha256 for (split, length), samples in texts.items()},
        "attention_factor": attention_factor,
        "critical_dim": options.critical_dim,
        "settings": settings,
    }
    return Plan(search, questions, identity, objectives)


def build(
    loaded: LoadedModel,
    objectives: Mapping[tuple[str, int], SampledObjective],
    target_length: int,
    options: SearchConfig,
) -> tuple[Search, int, dict[str, Any], float]:
    """The search itself, its questions at most, its settings and attention factor. Asks the model of `loaded` nothing,
    and of the objectives only how many samples of what length they have.
    """
    carried, wanted = loaded.checkpoint_window(target_length), options.attention_factor
    if wanted == CONTINUED:
        if carried is None:
            raise LongRopeError(f"{loaded.name} carries no scaling whose attention factor could be continued")
        attention_factor = continued_attention_factor(carried.attention_factor, loaded.context_length, target_length)
    elif wanted is None and carried is not None:
        attention_factor = carried.attention_factor  # what the model was trained with
    else:
        attention_factor = attention_factor_of(wanted or "su", loaded.geometry, target_length)
    task = _Task(loaded, objectives, target_length, options, attention_factor)
    return *_BUILDERS[options.method](task), attention_factor


def _longrope(task: _Task) -> _Built:
    """Algorithm 1 of LongRoPE, from closed forms and what the checkpoint carries."""
    pairs, upper = task.loaded.geometry.pairs, task.options.max_factor
    choices = start_tokens_of(task.options.start_tokens)
    space = SearchSpace.for_ratio(pairs, task.ratio, choices)
    if upper is not None:
        space = replace(space, upper=upper)
    seeds = [space.snap(factors) for factors in evolution_seeds(task.loaded, task.target_length)]
    settings = _evolution_settings(task)
    described = {"space": asdict(space), "seeds": [seed.to_row() for seed in seeds]}
    return _evolution(task, Evolution(space, seeds, settings), settings, described)


def _longrope2(task: _Task) -> _Built:
    """Algorithms 1 and 2 of LongRoPE2: d_rcd from d_tcd(10) to d_tcd, or the one given."""
    geometry, given = task.loaded.geometry, task.options.critical_dim
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
    """Adam around raced closed forms, over doubling windows."""
    settings, stages = _gradient_settings(task), _stages(task)
    bounds = _bounds(task)
    search = GradientSearch(stages, task.loaded.geometry, settings, task.attention_factor, bounds)
    return search, _gradient_questions(stages, settings, bounds), _described(stages, bounds, gradient=settings)


def _hybrid(task: _Task) -> _Built:
    """The gradient search, then a short CMA-ES around its result."""
    settings, stages = _gradient_settings(task), _stages(task)
    polish, bounds = _cma_settings(task, evaluations=66, sigma=0.1), _bounds(task)
    search = HybridSearch(stages, task.loaded.geometry, settings, polish, task.attention_factor, bounds)
    questions = _gradient_questions(stages, settings, bounds) + polish.evaluations + 5
    return search, questions, _described(stages, bounds, gradient=settings, polish=polish)


def _cma(task: _Task) -> _Built:
    """CMA-ES around the best of raced closed forms."""
    (stage,) = _stages(task)
    settings, bounds = _cma_settings(task, evaluations=256, sigma=0.15), _bounds(task)
    search = CMASearch(stage, task.loaded.geometry, settings, task.attention_factor, bounds)
    questions = len(stage.seeds) + 1 + settings.evaluations + _choices(bounds)
    return search, questions, _described([stage], bounds, cma=settings)


def _bounds(task: _Task) -> Bounds:
    """What the user bounds λ by, and n̂."""
    largest = task.options.max_factor
    choices = start_tokens_of(task.options.start_tokens)
    return Bounds(start_tokens=choices) if largest is None else Bounds(largest, choices)


def _choices(bounds: Bounds) -> int:
    """How many n̂ a result is tried with: none where there is no choice."""
    return len(bounds.start_tokens) if len(bounds.start_tokens) > 1 else 0


def _gradient_settings(task: _Task) -> GradientSettings:
    options = task.options
    return GradientSettings(
        steps=options.steps,
        learning_rate=options.learning_rate,
        knots=options.knots or None,  # by itself every pair: gradients of more numbers cost no more
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
    """Of CMA-ES; None is every pair."""
    if task.options.knots is None:
        return min(KNOTS, task.loaded.geometry.pairs)
    return task.options.knots or None


def _stages(task: _Task) -> list[Stage]:
    """One stage per length that there are search texts of."""
    return [
        Stage(length=length, seeds=raced_seeds(task.loaded, length), samples=objective.count)
        for (split, length), objective in task.objectives.items()
        if split == SEARCH
    ]


def raced_seeds(loaded: LoadedModel, length: int) -> dict[str, npt.NDArray[np.float64]]:
    """Where a search on the knots may start, by name: (D,) factors each.

    Closed forms, YaRN with other β_fast, and the scaling that the checkpoint carries, as it is and stretched.
    """
    geometry = loaded.geometry
    seeds = {name: CLOSED_FORMS[name](geometry, length)[0] for name in RACED_FORMS}
    seeds |= {f"yarn, β_fast {beta}": yarn(geometry, length, beta_fast=beta) for beta in RACED_BETAS}
    seeds["yarn, late"] = yarn(geometry, length, *LATE_BETAS, truncate=False)
    return seeds | checkpoint_seeds(loaded, length)


def _gradient_questions(stages: list[Stage], settings: GradientSettings, bounds: Bounds) -> int:
    checks = 1 + -(-settings.steps // settings.validate_every)  # the start, and on the way; each on both splits
    return (
        1
        + 2 * _choices(bounds)
        + sum(
            len(stage.seeds) + (index > 0) + settings.steps + 2 * (checks + _out_of_order(stage))
            for index, stage in enumerate(stages)
        )
    )


def _out_of_order(stage: Stage) -> bool:
    """Whether a seed may have to be asked about as it is, too: one that no search could return."""
    return any(not np.array_equal(admissible(factors), factors) for factors in stage.seeds.values())


def _described(stages: list[Stage], bounds: Bounds, **settings: GradientSettings | CMASettings) -> dict[str, Any]:
    return {
        **({} if bounds == Bounds() else {"bounds": asdict(bounds)}),
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
