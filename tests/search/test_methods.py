"""From a configuration to a prepared search: its method, seeds, settings and the most evaluations that it makes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope.errors import LongRopeError
from longrope.models.apply import scaled as scaled_model
from longrope.models.loading import LoadedModel, open_model
from longrope.models.scaled import ScaledModel
from longrope.rope.closed_forms import CLOSED_FORMS, su_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.progressive import continued_attention_factor
from longrope.rope.scaling import RopeScaling
from longrope.search.cma import cma_search, hybrid_search
from longrope.search.config import METHODS, OBJECTIVES, SearchConfig
from longrope.search.evaluator import EvalRequest, EvalResult, SerialEvaluator
from longrope.search.evolution import Evolution, EvolutionSettings, evolution_search
from longrope.search.gradient import gradient_search
from longrope.search.initial import knot_seeds
from longrope.search.objective import NeedleObjective, PerplexityObjective
from longrope.search.search_data import prepare_texts
from longrope.search.spaces import CriticalCandidate, CriticalSpace, SearchSpace
from tests.checkpoints import WINDOW, save_checkpoint
from tests.search.conftest import Planned, planned_over
from tests.search.lengths import NEEDLE_LENGTH
from tests.search.slopes import Reply, complete

SEEDS = ["yarn", "ntk-critical"]


def falling() -> Reply:
    """Every loss is better than all before."""
    losses = itertools.count(0.0, -1.0)
    return lambda request: EvalResult(next(losses), (1.0,) * 17 if request.gradient else None)


def test_each_method_plans_its_search(planned: Callable[..., Planned]) -> None:
    longrope = planned(method="longrope", population=8, iterations=2, samples=1)
    assert longrope.method is evolution_search
    assert "racing" not in longrope.arguments
    assert (longrope.prepared.max_requests, longrope.identity["objective"]) == (8 + 2 * 4, "perplexity")
    assert all(isinstance(objective, PerplexityObjective) for objective in longrope.objectives.values())
    longrope2 = planned(method="longrope2", population=32, iterations=2, samples=1)
    assert longrope2.method is evolution_search
    assert (longrope2.prepared.max_requests, longrope2.identity["objective"]) == (32 + 2 * 16, "needle")
    kinds = {split: type(objective) for (split, _), objective in longrope2.objectives.items()}
    assert kinds == {"search": NeedleObjective, "other": PerplexityObjective}
    candidates = longrope2.arguments["optimizer"].ask()
    assert all(isinstance(candidate, CriticalCandidate) for candidate in candidates)
    # d_tcd(10) to d_tcd of d = 32, base 1e4, L = 64: ⌈16·log₁₀₀₀₀(64/62.8)⌉ = 1 to ⌈16·log₁₀₀₀₀(64/6.28)⌉ = 5.
    assert {candidate.critical_dim for candidate in candidates} == {1, 2, 3, 4, 5}
    windows = [longrope2.arguments["to_window"](candidate) for candidate in candidates]
    assert all(window.factors[-1] == pytest.approx(12, abs=4) for window in windows)
    for method, function in (("gradient", gradient_search), ("hybrid", hybrid_search)):
        made = planned(method=method, samples=1)
        assert made.method is function
        assert [stage.length for stage in made.arguments["stages"]] == [128, 256, 512]
        for stage in made.arguments["stages"]:
            assert (list(stage.seeds), stage.base) == (SEEDS, None)
        assert made.arguments["settings"].knots_of(16) == 16
    polish = made.arguments["polish"]
    assert (polish.evaluations, polish.sigma, polish.patience) == (66, 0.1, None)
    cma = planned(method="cma", samples=1, patience=7)
    assert cma.method is cma_search
    stage, settings = cma.arguments["stage"], cma.arguments["settings"]
    assert (stage.length, list(stage.seeds)) == (NEEDLE_LENGTH, SEEDS)
    assert (settings.evaluations, settings.patience, settings.knots_of(16)) == (256, 7, 12)


@pytest.mark.parametrize(("knots", "gradient", "cma"), [(None, 16, 12), (5, 5, 5), (0, 16, 16)])
def test_knots(planned: Callable[..., Planned], knots: int | None, gradient: int, cma: int) -> None:
    made = {
        method: planned(
            method=method, samples=1, knots=knots, evaluations=None if method == "gradient" else 30
        ).arguments
        for method in ("gradient", "hybrid", "cma")
    }
    assert {made[method]["settings"].knots_of(16) for method in ("gradient", "hybrid")} == {gradient}
    assert made["hybrid"]["polish"].knots_of(16) == made["cma"]["settings"].knots_of(16) == cma


def test_a_small_head_has_a_knot_for_every_pair(source: list[str], tmp_path: Path) -> None:
    loaded = open_model(str(save_checkpoint(tmp_path / "small", head_dim=16)))
    options = SearchConfig(method="hybrid", samples=1)
    texts = prepare_texts(loaded, source, 128, options)
    with scaled_model(loaded.model, RopeScaling.original(loaded.geometry)) as handle:
        made = planned_over(loaded, handle, texts, 128, options)
    assert made.arguments["polish"].knots_of(8) == 8


def test_the_closed_forms_among_the_starts(loaded: LoadedModel) -> None:
    real = replace(loaded, geometry=RopeGeometry(rotary_dim=128, base=500_000.0, original_length=8192))
    for length in (16_384, 131_072):
        seeds = knot_seeds(real, length)
        assert list(seeds) == SEEDS
        for name, factors in seeds.items():
            assert factors.tolist() == CLOSED_FORMS[name](real.geometry, length)[0].tolist()


def cheap(request: EvalRequest) -> EvalResult:
    """A loss of the window alone, with its minimum inside the space."""
    return EvalResult(sum((math.log(factor) - 0.1 * pair) ** 2 for pair, factor in enumerate(request.window.factors)))


@pytest.mark.parametrize("options", [{}, {"racing": False}])
@pytest.mark.parametrize("method", ["longrope", "longrope2"])
def test_without_racing_it_asks_what_algorithm_1_asks(
    planned: Callable[..., Planned], loaded: LoadedModel, method: str, options: dict[str, Any]
) -> None:
    """EvalRequest by request, over the whole search, as an evolution that is put together here."""
    geometry = loaded.geometry
    chosen = EvolutionSettings(population=8, mutations=2, crossovers=2, iterations=5, top_k=4, seed=7)
    optimizer: Evolution[Any]
    if method == "longrope":
        space = SearchSpace(pairs=16, upper=1.25 * 8)
        seeds = [space.snap(CLOSED_FORMS[name](geometry, NEEDLE_LENGTH)[0]) for name in ("pi", "ntk", "yarn")]
        optimizer = Evolution(space, seeds, chosen)
    else:
        critical = CriticalSpace(pairs=16, ratio=8.0, first=1, last=5)
        optimizer = Evolution(critical, critical.initial(8, 0.3, np.random.default_rng(7)), chosen)
    attention_factor = su_attention_factor(geometry, NEEDLE_LENGTH)
    made = planned(method=method, population=8, iterations=5, samples=2, seed=7, **options)
    assert made.prepared.max_requests == 8 + 5 * 4
    expected: list[EvalRequest] = []
    while not optimizer.done:
        generation = [
            EvalRequest(candidate.window(NEEDLE_LENGTH, attention_factor), candidate.to_row())
            for candidate in optimizer.ask()
        ]
        expected += generation
        optimizer.tell([cheap(request).loss for request in generation])
    assert all((one.split, one.samples, one.gradient) == ("search", None, False) for one in expected)
    assert [request for request, _ in complete(made.prepared.run, cheap).said] == expected


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_racing_weighs_texts_by_their_scored_tokens(
    loaded: LoadedModel, scaled: ScaledModel, source: list[str], objective: str
) -> None:
    """Scored text by text by the model, the first generation gets the losses over all texts."""
    options = SearchConfig(method="longrope", objective=objective, population=3, iterations=0, samples=4)
    texts = prepare_texts(loaded, source, NEEDLE_LENGTH, options)
    key = ("search", NEEDLE_LENGTH)
    if objective == "needle":  # results of other lengths, as of a tokenizer that splits numbers elsewhere
        texts[key] = replace(texts[key], answer_tokens=(3, 9, 4, 7))  # type: ignore[call-arg]
    plain, raced = (
        planned_over(loaded, scaled, texts, NEEDLE_LENGTH, options.replace(racing=racing)) for racing in (False, True)
    )
    assert raced.prepared.max_requests == 4 * plain.prepared.max_requests
    assert raced.identity["settings"] == plain.identity["settings"] | {"racing": True}
    rans = [complete(made.prepared.run, SerialEvaluator(made.objectives).result) for made in (plain, raced)]
    assert [ran.batches for ran in rans] == [[3], [3] * 4]
    expected, found = (dict(ran.outcome.ranked) for ran in rans if ran.outcome)
    assert found == {candidate: pytest.approx(loss, rel=1e-12) for candidate, loss in expected.items()}
    assert len(found) == 3


def test_a_given_critical_dimension_is_the_only_one(planned: Callable[..., Planned]) -> None:
    """Outside [d_tcd(10), d_tcd] too: it was asked for."""
    for dim in (3, 9, 15):
        made = planned(method="longrope2", critical_dim=dim, population=8, iterations=3, samples=1)
        rows = [request.row for request, _ in complete(made.prepared.run, falling()).said]
        assert {row["critical_dim"] for row in rows} == {dim}
        assert len(rows) > 8


@pytest.mark.parametrize(("far", "expected"), [(False, (64, 16, 32)), (True, (32, 8, 32))])
def test_the_papers_budget(
    planned: Callable[..., Planned], monkeypatch: pytest.MonkeyPatch, far: bool, expected: tuple[int, ...]
) -> None:
    from longrope.search import methods as module

    if far:
        monkeypatch.setattr(module, "FAR", 256)
    for method in ("longrope", "longrope2"):
        settings = planned(method=method, samples=1).arguments["optimizer"].settings
        assert (settings.population, settings.mutations, settings.top_k) == expected
        assert (settings.crossovers, settings.iterations) == (settings.mutations, 40)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("longrope", {"population": 6, "iterations": 3}),
        ("longrope", {"population": 6, "iterations": 3, "racing": True}),
        ("gradient", {}),
        ("gradient", {"continuation": False}),
        ("gradient", {"steps": 13, "knots": 0}),
        ("gradient", {"steps": 5}),
        ("hybrid", {}),
        ("hybrid", {"continuation": False, "evaluations": 33, "steps": 7}),
        ("cma", {"evaluations": 44}),
    ],
)
def test_the_count_of_questions_is_what_is_asked(
    planned: Callable[..., Planned], method: str, options: dict[str, Any]
) -> None:
    """Every result is better than the last, so that nothing ends early or is dropped."""
    made = planned(method=method, samples=2, **options)
    asked = complete(made.prepared.run, falling()).said
    for request, _ in asked:
        assert (request.split, request.window.max_length) in made.objectives
        assert max(request.samples or [0]) < made.objectives[request.split, request.window.max_length].count
    assert len(asked) == made.prepared.max_requests


@pytest.mark.parametrize("method", ["gradient", "hybrid", "cma"])
def test_no_more_is_asked_where_nothing_gets_better(planned: Callable[..., Planned], method: str) -> None:
    made = planned(method=method, samples=2)
    ran = complete(made.prepared.run, lambda request: EvalResult(1.0, (1.0,) * 17 if request.gradient else None))
    assert 0 < len(ran.said) <= made.prepared.max_requests


@pytest.mark.parametrize("method", METHODS)
def test_the_attention_factor_is_the_checkpoints_unless_given(
    method: str, source: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW}
    folder = save_checkpoint(tmp_path / "yarn", rope_parameters=rope, max_position_embeddings=4 * WINDOW)
    yarn = open_model(str(folder))

    def window(loaded: LoadedModel, **more: Any) -> list[Any]:
        options = SearchConfig(method=method, samples=1, objective="perplexity", **more)
        texts = prepare_texts(loaded, source, NEEDLE_LENGTH, options)
        with scaled_model(loaded.model, RopeScaling.original(loaded.geometry)) as handle:
            made = planned_over(loaded, handle, texts, 512, options)
        first: list[Any] = []

        def evaluate(requests: Sequence[EvalRequest]) -> list[EvalResult]:
            first.extend(request.window for request in requests)
            raise KeyboardInterrupt  # the first batch is enough

        with pytest.raises(KeyboardInterrupt):
            made.prepared.run(evaluate)
        return first

    assert {one.attention_factor for one in window(yarn)} == {0.1 * math.log(4) + 1}
    continued = continued_attention_factor(0.1 * math.log(4) + 1, 4 * WINDOW, 512)
    assert {one.attention_factor for one in window(yarn, attention_factor="continued")} == {continued}
    assert {one.attention_factor for one in window(yarn, attention_factor="1.25")} == {1.25}
    assert {one.attention_factor for one in window(yarn, attention_factor="yarn")} == {0.1 * math.log(8) + 1}
    plain = open_model(str(checkpoint))
    assert {one.attention_factor for one in window(plain)} == {su_attention_factor(plain.geometry, 512)}
    assert {one.attention_factor for one in window(plain, attention_factor="1")} == {1.0}
    with pytest.raises(LongRopeError, match="has no scaling whose attention factor could be continued"):
        window(plain, attention_factor="continued")


def test_a_scaling_that_the_checkpoint_carries_is_a_seed(source: list[str], tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    folder = save_checkpoint(tmp_path / "linear", rope_parameters=rope, max_position_embeddings=2 * WINDOW)
    loaded = open_model(str(folder))
    assert loaded.checkpoint_scaling is not None
    assert loaded.context_length == 128
    for space, base, own in ((None, [2.0] * 16, 1.0), ("relative", [2.0] * 16, 1.0), ("absolute", None, 2.0)):
        options = SearchConfig(method="gradient", samples=1, space=space)
        texts = prepare_texts(loaded, source, 512, options)
        assert {length for _, length in texts} == {256, 512}
        with scaled_model(loaded.model, RopeScaling.original(loaded.geometry)) as handle:
            made = planned_over(loaded, handle, texts, 512, options)
        stage = made.arguments["stages"][0]
        assert stage.seeds["checkpoint"].tolist() == [own] * 16
        assert (None if stage.base is None else stage.base.tolist()) == base
        assert made.identity["settings"].get("relative_to") == base


# --- what is refused


@pytest.mark.parametrize(("knots", "says"), [(1, "found 1"), (17, "2 to 16 knots"), (-1, "found -1")])
def test_knots_out_of_range_are_refused(planned: Callable[..., Planned], knots: int, says: str) -> None:
    for method in ("gradient", "hybrid", "cma"):
        with pytest.raises(LongRopeError, match=says):
            planned(method=method, samples=1, knots=knots)


@pytest.mark.parametrize("method", ["hybrid", "cma"])
def test_evaluations_that_are_no_generation_are_refused(planned: Callable[..., Planned], method: str) -> None:
    with pytest.raises(LongRopeError, match=r"at least 11 .* found 10") as error:
        planned(method=method, samples=1, evaluations=10)
    assert error.value.code == "invalid-setting"
