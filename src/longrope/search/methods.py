"""Builds a search method from a configuration: ready to run, with its settings, seeds and bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.rope.closed_forms import pair_that_turns, yarn
from longrope.rope.progressive import continued_attention_factor, second_yarn, trained_pair
from longrope.rope.scaling import Window
from longrope.search.cma import CMASettings, cma_search, hybrid_search
from longrope.search.config import CONTINUED, LARGEST, SearchConfig, attention_factor_of, start_tokens_of
from longrope.search.evaluator import SEARCH, Evaluate, OnBest, SearchOutcome
from longrope.search.evolution import Evolution, EvolutionSettings, evolution_search
from longrope.search.gradient import GradientSettings, gradient_search
from longrope.search.initial import checkpoint_seeds, evolution_seeds, knot_seeds, relative_seeds, trained_factors
from longrope.search.knots import Vector, over, project
from longrope.search.objective import SampledObjective
from longrope.search.racing import Racing
from longrope.search.search_data import FAR, Texts
from longrope.search.spaces import Candidate, CriticalCandidate, CriticalSpace, SearchSpace
from longrope.search.start import FINALISTS, MOST_RAMPS, Bounds, WindowStage

KNOTS = 12  # of CMA-ES


class RunMethod(Protocol):
    """A search method with all but its first argument given. It runs once."""

    def __call__(self, evaluate: Evaluate, *, on_best: OnBest = ...) -> SearchOutcome: ...


@dataclass(frozen=True)
class PreparedSearch:
    """A search that is ready to run, its settings, and `max_requests`, the most evaluations that it makes."""

    run: RunMethod
    max_requests: int
    settings: dict[str, Any]
    attention_factor: float


@dataclass(frozen=True)
class _Task:
    """The inputs of every method."""

    loaded: LoadedModel
    objectives: Mapping[tuple[str, int], SampledObjective]
    target_length: int
    config: SearchConfig
    attention_factor: float

    @property
    def ratio(self) -> float:
        """s = L'/L; of a search for multiples s₂ = L'/L_ft."""
        loaded = self.loaded
        before = loaded.geometry.original_length if self.trained is None else loaded.context_length
        return self.target_length / before

    @property
    def trained(self) -> Vector | None:
        """λ_trained (D,) of a search for multiples of it; None in an absolute space."""
        return trained_factors(self.loaded, self.target_length, self.config)

    @property
    def objective(self) -> SampledObjective:
        """The objective over the search texts of the target length."""
        return self.objectives[SEARCH, self.target_length]


def build(
    loaded: LoadedModel,
    objectives: Mapping[tuple[str, int], SampledObjective],
    target_length: int,
    config: SearchConfig,
) -> PreparedSearch:
    """The search of `config` over `objectives`, by (split, length). Runs no model.

    Raises LongRopeError for settings that make no search.
    """
    attention_factor = _attention_factor(loaded, target_length, config)
    run, max_requests, settings = _BUILDERS[config.method](
        _Task(loaded, objectives, target_length, config, attention_factor)
    )
    return PreparedSearch(run, max_requests, settings, attention_factor)


def identity(
    prepared: PreparedSearch, loaded: LoadedModel, texts: Texts, target_length: int, config: SearchConfig
) -> dict[str, Any]:
    """The header of the search's log: a log of another search is refused."""
    return {
        "method": config.method,
        "target_length": target_length,
        "geometry": asdict(loaded.geometry),
        "objective": config.chosen_objective,
        "samples_sha256": {f"{split} {length}": samples.sha256 for (split, length), samples in texts.items()},
        "attention_factor": prepared.attention_factor,
        "critical_dim": config.critical_dim,
        "settings": prepared.settings,
        **({} if config.baselines else {"baselines": False}),
    }


def _attention_factor(loaded: LoadedModel, target_length: int, config: SearchConfig) -> float:
    """m of the search: the given one, else that of the checkpoint's scaling, else su's."""
    window, wanted = loaded.checkpoint_window(target_length), config.attention_factor
    if wanted == CONTINUED:
        if window is None:
            raise LongRopeError(
                f"the checkpoint of {loaded.name} has no scaling whose attention factor could be continued",
                code="invalid-setting",
            )
        return continued_attention_factor(window.attention_factor, loaded.context_length, target_length)
    if wanted is None and window is not None:
        return window.attention_factor  # the model was trained with it
    return attention_factor_of("su" if wanted is None else wanted, loaded.geometry, target_length)


_Built = tuple[RunMethod, int, dict[str, Any]]


def _longrope(task: _Task) -> _Built:
    """Algorithm 1 of LongRoPE, from closed forms and the scaling of the checkpoint."""
    pairs, upper = task.loaded.geometry.pairs, task.config.max_factor
    choices = start_tokens_of(task.config.start_tokens)
    space = SearchSpace.for_ratio(pairs, task.ratio, choices)
    space = replace(space, upper=min(space.upper if upper is None else upper, _largest(task.trained)))
    seeds_of = evolution_seeds if task.trained is None else relative_seeds
    seeds = [
        space.snap(factors, start_tokens if start_tokens in choices else None)
        for factors, start_tokens in seeds_of(task.loaded, task.target_length, task.config)
    ]
    settings = _evolution_settings(task)
    described = {"space": asdict(space), "seeds": [seed.to_row() for seed in seeds]}
    return _evolution(task, Evolution(space, seeds, settings), settings, described)


def _longrope2(task: _Task) -> _Built:
    """Algorithms 1 and 2 of LongRoPE2: d_rcd from d_tcd(10) to d_tcd, or the one given."""
    geometry, given = task.loaded.geometry, task.config.critical_dim
    first, last = _critical_dim(task, 10), min(_critical_dim(task, 1), geometry.pairs - 1)
    space = CriticalSpace(
        pairs=geometry.pairs,
        ratio=task.ratio,
        first=min(first, last) if given is None else given,
        last=last if given is None else given,
        below=task.config.below,
        low=max(math.floor(_pair_that_turns(task, 32.0)), 0),
    )
    settings = _evolution_settings(task)
    seeds = space.initial(settings.population, settings.probability, np.random.default_rng(task.config.seed))
    return _evolution(task, Evolution(space, seeds, settings), settings, {"space": asdict(space)})


def _pair_that_turns(task: _Task, turns: float) -> float:
    """The pair, as a real number, that turns `turns` times in the window that the model was trained with."""
    geometry, trained = task.loaded.geometry, task.trained
    if trained is None:
        return pair_that_turns(geometry, turns, geometry.original_length)
    return trained_pair(geometry, trained, task.loaded.context_length, turns)


def _critical_dim(task: _Task, turns: int) -> int:
    """d_tcd(turns): the first pair with fewer turns in the window that the model was trained with."""
    if task.trained is None:
        return task.loaded.geometry.critical_dim(turns)
    return max(math.ceil(_pair_that_turns(task, turns)), 0)


def _evolution_settings(task: _Task) -> EvolutionSettings:
    config, far = task.config, task.target_length > FAR
    return EvolutionSettings.for_population(
        (32 if far else 64) if config.population is None else config.population,
        top_k=32 if far and config.population is None else None,  # the paper halves P, N₁ and N₂, not k
        iterations=config.iterations,
        patience=config.patience,
        seed=config.seed,
    )


def _evolution(
    task: _Task, optimizer: Evolution[Any], settings: EvolutionSettings, described: dict[str, Any]
) -> _Built:
    trained = task.trained
    described = {"evolution": settings.model_dump(), **described, **_relative(trained)}

    def to_window(candidate: Candidate | CriticalCandidate) -> Window:
        window = candidate.window(task.target_length, task.attention_factor)
        if trained is None:
            return window
        return replace(window, factors=tuple(over(trained, np.asarray(window.factors)).tolist()))

    if not task.config.racing:
        run = partial(evolution_search, optimizer=optimizer, to_window=to_window)
        return run, settings.evaluations, described
    racing = Racing([task.objective.scored(row) for row in range(task.objective.count)], keep=settings.top_k)
    run = partial(evolution_search, optimizer=optimizer, to_window=to_window, racing=racing)
    return run, settings.evaluations * task.objective.count, described | {"racing": True}


def _gradient(task: _Task) -> _Built:
    """Adam around the best start, over doubling windows."""
    settings, stages, bounds = _gradient_settings(task), _stages(task), _bounds(task)
    run = partial(gradient_search, stages=stages, settings=settings, bounds=bounds, **_model(task))
    return run, _gradient_requests(stages, settings, bounds), _described(stages, bounds, gradient=settings)


def _hybrid(task: _Task) -> _Built:
    """The gradient search, then a short CMA-ES around its result."""
    polish = _cma_settings(task, evaluations=66, sigma=0.1)
    settings, stages, bounds = _gradient_settings(task), _stages(task), _bounds(task)
    run = partial(hybrid_search, stages=stages, settings=settings, polish=polish, bounds=bounds, **_model(task))
    requests = _gradient_requests(stages, settings, bounds) + polish.evaluations + 5
    return run, requests, _described(stages, bounds, gradient=settings, polish=polish)


def _cma(task: _Task) -> _Built:
    """CMA-ES around the best start."""
    (stage,) = _stages(task)
    settings, bounds = _cma_settings(task, evaluations=256, sigma=0.15), _bounds(task)
    run = partial(cma_search, stage=stage, settings=settings, bounds=bounds, **_model(task))
    requests = _starts(stage, settings.race_samples, False) + 1 + settings.evaluations + _choices(bounds)
    return run, requests, _described([stage], bounds, cma=settings)


def _model(task: _Task) -> dict[str, Any]:
    """The arguments that the methods on the knots take of the model."""
    return {"geometry": task.loaded.geometry, "attention_factor": task.attention_factor}


def _bounds(task: _Task) -> Bounds:
    """The largest factor, or multiple, and the start tokens of the configuration."""
    largest = min(task.config.max_factor or LARGEST, _largest(task.trained))
    return Bounds(largest, start_tokens_of(task.config.start_tokens))


def _largest(trained: Vector | None) -> float:
    """The largest factor of a window; of a search for multiples of λ_trained (D,), the largest with no factor above."""
    if trained is None:
        return LARGEST
    return min(LARGEST, max(1.0, float(np.nextafter(LARGEST / trained.max(), 0.0))))  # rounded down


def _choices(bounds: Bounds) -> int:
    """The number of n̂ that a result is tried with: 0 where there is no choice."""
    return len(bounds.start_tokens) if len(bounds.start_tokens) > 1 else 0


def _gradient_settings(task: _Task) -> GradientSettings:
    config = task.config
    settings = GradientSettings(
        steps=config.steps,
        learning_rate=config.learning_rate,
        knots=config.knots or None,  # by itself every pair: gradients of more numbers cost no more
        patience=3 if config.patience is None else config.patience,
        learn_attention_factor=config.learn_attention_factor,
        seed=config.seed,
    )
    settings.knots_of(task.loaded.geometry.pairs)  # raises where they are not for this model
    return settings


def _cma_settings(task: _Task, *, evaluations: int, sigma: float) -> CMASettings:
    config = task.config
    knots = min(KNOTS, task.loaded.geometry.pairs) if config.knots is None else config.knots
    settings = CMASettings(
        evaluations=evaluations if config.evaluations is None else config.evaluations,
        sigma=sigma,
        knots=knots or None,
        patience=config.patience if config.method == "cma" else None,
        seed=config.seed,
    )
    settings.knots_of(task.loaded.geometry.pairs)  # raises where they are not for this model
    return settings


def _stages(task: _Task) -> list[WindowStage]:
    """One stage for each length that has search texts."""
    base, base_length = task.trained, None if task.trained is None else task.loaded.context_length

    def seeds(length: int) -> Mapping[str, Vector]:
        if base is None:
            return knot_seeds(task.loaded, length)
        return {name: factors / base for name, factors in checkpoint_seeds(task.loaded, length).items()}

    def ramp(length: int) -> Callable[[float, float], Vector]:
        geometry = task.loaded.geometry
        if base is None:
            return partial(yarn, geometry, length, truncate=False)
        before = task.loaded.context_length
        return lambda fast, slow: second_yarn(geometry, base, before, length, fast, slow, truncate=False) / base

    return [
        WindowStage(
            length=length,
            seeds=seeds(length),
            samples=objective.count,
            base=base,
            base_length=base_length,
            ramp=ramp(length),
        )
        for (split, length), objective in task.objectives.items()
        if split == SEARCH
    ]


def _relative(trained: Vector | None) -> dict[str, Any]:
    """λ_trained for the settings of a search for multiples of it; nothing for another."""
    return {} if trained is None else {"relative_to": trained.tolist()}


def _gradient_requests(stages: list[WindowStage], settings: GradientSettings, bounds: Bounds) -> int:
    checks = 1 + -(-settings.steps // settings.validate_every)  # the start, and on the way; each on both splits
    return (
        1
        + 2 * _choices(bounds)
        + sum(
            _starts(stage, settings.race_samples, index > 0) + settings.steps + 2 * (checks + _out_of_order(stage))
            for index, stage in enumerate(stages)
        )
    )


def _starts(stage: WindowStage, samples: int, continues: bool) -> int:
    """The most requests that choose the start of a stage."""
    starts = len(stage.seeds) + continues + (0 if stage.ramp is None else MOST_RAMPS)
    twice = min(samples, stage.samples) > 1
    return starts + (FINALISTS if twice and starts > FINALISTS else 0)


def _out_of_order(stage: WindowStage) -> bool:
    """True if a seed is not monotone, so that it may be evaluated as it is too: the search itself cannot return it."""
    return any(not np.array_equal(project(factors), factors) for factors in stage.seeds.values())


def _described(stages: list[WindowStage], bounds: Bounds, **settings: GradientSettings | CMASettings) -> dict[str, Any]:
    return {
        **({} if bounds == Bounds(_largest(stages[0].base)) else {"bounds": asdict(bounds)}),
        **{name: value.model_dump() for name, value in settings.items()},
        "stages": [{"length": one.length, "seeds": list(one.seeds), "ramps": one.ramp is not None} for one in stages],
        **_relative(stages[0].base),
    }


_BUILDERS: dict[str, Callable[[_Task], _Built]] = {
    "longrope": _longrope,
    "longrope2": _longrope2,
    "gradient": _gradient,
    "hybrid": _hybrid,
    "cma": _cma,
}
