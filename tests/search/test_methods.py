"""From options to a search: which method, which seeds, which settings, and what identifies it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.loading import LoadedModel, open_model
from longrope.models.scaled import ScaledModel
from longrope.rope.closed_forms import CLOSED_FORMS, su_attention_factor, yarn
from longrope.rope.geometry import RopeGeometry
from longrope.rope.progressive import continued_attention_factor
from longrope.rope.scaling import RopeScaling
from longrope.search.cma import CMASearch, HybridSearch
from longrope.search.config import METHODS, OBJECTIVES, SearchConfig
from longrope.search.evaluator import Answer, CandidateSearch, Question, SerialEvaluator
from longrope.search.evolution import Evolution, EvolutionSettings
from longrope.search.gradient import GradientSearch
from longrope.search.methods import Plan, plan, raced_seeds
from longrope.search.objective import NeedleObjective, PerplexityObjective
from longrope.search.racing import RacedSearch
from longrope.search.search_data import prepare_texts
from longrope.search.spaces import CriticalCandidate, CriticalSpace, SearchSpace
from tests.checkpoints import WINDOW, save_checkpoint
from tests.search.lengths import NEEDLE_LENGTH

SEEDS = ["yarn", "ntk-critical", "ntk", "pi", *(f"yarn, β_fast {beta}" for beta in (16, 8, 4, 2)), "yarn, late"]


def falling(search: Any) -> list[Question]:
    """Run `search` to its end; every answer is better than all before. Everything it asked."""
    asked: list[Question] = []
    while not search.done:
        questions = search.ask()
        gradient = (1.0,) * 17
        search.tell(
            [Answer(-float(len(asked) + n), gradient if one.gradient else None) for n, one in enumerate(questions)]
        )
        asked += questions
    return asked


def test_each_method_plans_its_search(planned: Callable[..., Plan]) -> None:
    longrope = planned(population=8, iterations=2, samples=1)
    assert type(longrope.search) is CandidateSearch
    assert (longrope.questions, longrope.identity["objective"]) == (8 + 2 * 4, "perplexity")
    assert all(isinstance(objective, PerplexityObjective) for objective in longrope.objectives.values())
    longrope2 = planned(method="longrope2", population=32, iterations=2, samples=1)
    assert type(longrope2.search) is CandidateSearch
    assert (longrope2.questions, longrope2.identity["objective"]) == (32 + 2 * 16, "needle")
    kinds = {split: type(objective) for (split, _), objective in longrope2.objectives.items()}
    assert kinds == {"search": NeedleObjective, "other": PerplexityObjective}
    candidates = longrope2.search.optimiser.ask()
    assert all(isinstance(candidate, CriticalCandidate) for candidate in candidates)
    # d_tcd(10) to d_tcd of d = 32, base 1e4, L = 64: ⌈16·log₁₀₀₀₀(64/62.8)⌉ = 1 to ⌈16·log₁₀₀₀₀(64/6.28)⌉ = 5.
    assert {candidate.critical_dim for candidate in candidates} == {1, 2, 3, 4, 5}
    assert all(window.factors[-1] == pytest.approx(12, abs=4) for window in (q.window for q in longrope2.search.ask()))
    for method, kind in (("gradient", GradientSearch), ("hybrid", HybridSearch)):
        made = planned(method=method, samples=1)
        assert type(made.search) is kind
        assert [stage.length for stage in made.search.stages] == [128, 256, 512]
        assert [list(stage.seeds) for stage in made.search.stages] == [SEEDS] * 3
        assert made.search.knots == 16
    assert (made.search.polish.evaluations, made.search.polish.sigma, made.search.polish.patience) == (66, 0.1, None)
    cma = planned(method="cma", samples=1, patience=7)
    assert type(cma.search) is CMASearch
    assert (cma.search.stage.length, list(cma.search.stage.seeds)) == (NEEDLE_LENGTH, SEEDS)
    assert (cma.search.settings.evaluations, cma.search.settings.patience, cma.search.knots) == (256, 7, 12)


@pytest.mark.parametrize(("knots", "gradient", "cma"), [(None, 16, 12), (5, 5, 5), (0, 16, 16)])
def test_knots(planned: Callable[..., Plan], knots: int | None, gradient: int, cma: int) -> None:
    made = {
        method: planned(method=method, samples=1, knots=knots, evaluations=None if method == "gradient" else 30).search
        for method in ("gradient", "hybrid", "cma")
    }
    assert made["gradient"].knots == made["hybrid"].knots == gradient  # type: ignore[attr-defined]
    assert made["hybrid"].polish_knots == made["cma"].knots == cma  # type: ignore[attr-defined]


def test_a_small_head_has_a_knot_for_every_pair(source: list[str], tmp_path: Path) -> None:
    loaded = open_model(str(save_checkpoint(tmp_path / "small", head_dim=16)))
    options = SearchConfig(method="hybrid", samples=1)
    texts = prepare_texts(loaded, source, 128, options)
    try:
        made = plan(loaded, apply_scaling(loaded.model, RopeScaling.original(loaded.geometry)), texts, 128, options)
    finally:
        remove_scaling(loaded.model)
    assert made.search.polish_knots == 8  # type: ignore[attr-defined]


def test_the_raced_seeds(loaded: LoadedModel) -> None:
    """At the dimensions of real models every one is another."""
    real = replace(loaded, geometry=RopeGeometry(rotary_dim=128, base=500_000.0, original_length=8192))
    for length in (16_384, 131_072):
        seeds = raced_seeds(real, length)
        assert list(seeds) == SEEDS
        for name in SEEDS[:4]:
            assert seeds[name].tolist() == CLOSED_FORMS[name](real.geometry, length)[0].tolist()
        for beta in (16, 8, 4, 2):
            assert seeds[f"yarn, β_fast {beta}"].tolist() == yarn(real.geometry, length, beta_fast=beta).tolist()
        late = yarn(real.geometry, length, 16.0, 0.6, truncate=False)
        assert seeds["yarn, late"].tolist() == late.tolist()
        assert len({tuple(factors.tolist()) for factors in seeds.values()}) == len(SEEDS)


def cheap(question: Question) -> Answer:
    """A loss of the window alone, with its minimum inside the space."""
    return Answer(sum((math.log(factor) - 0.1 * pair) ** 2 for pair, factor in enumerate(question.window.factors)))


@pytest.mark.parametrize("options", [{}, {"racing": False}])
@pytest.mark.parametrize("method", ["longrope", "longrope2"])
def test_without_racing_it_asks_what_algorithm_1_asks(
    planned: Callable[..., Plan], loaded: LoadedModel, method: str, options: dict[str, Any]
) -> None:
    """Question by question, over the whole search, as an evolution that is put together here."""
    geometry = loaded.geometry
    chosen = EvolutionSettings(population=8, mutations=2, crossovers=2, iterations=5, top_k=4, seed=7)
    optimiser: Evolution[Any]
    if method == "longrope":
        space = SearchSpace(pairs=16, upper=1.25 * 8)
        seeds = [space.snap(CLOSED_FORMS[name](geometry, NEEDLE_LENGTH)[0]) for name in ("pi", "ntk", "yarn")]
        optimiser = Evolution(space, seeds, chosen)
    else:
        critical = CriticalSpace(pairs=16, ratio=8.0, first=1, last=5)
        optimiser = Evolution(critical, critical.initial(8, np.random.default_rng(7)), chosen)
    attention_factor = su_attention_factor(geometry, NEEDLE_LENGTH)
    made = planned(method=method, population=8, iterations=5, samples=2, seed=7, **options)
    assert type(made.search) is CandidateSearch
    assert made.questions == 8 + 5 * 4
    while not optimiser.done:
        expected = [
            Question(candidate.window(NEEDLE_LENGTH, attention_factor), candidate.to_row())
            for candidate in optimiser.ask()
        ]
        assert made.search.ask() == expected
        assert all((one.split, one.samples, one.gradient) == ("search", None, False) for one in expected)
        made.search.tell([cheap(question) for question in expected])
        optimiser.tell([cheap(question).loss for question in expected])
    assert made.search.done


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_racing_weighs_texts_by_their_scored_tokens(
    loaded: LoadedModel, scaled: ScaledModel, source: list[str], objective: str
) -> None:
    """Scored text by text by the model, the first generation is told the losses over all texts."""
    options = SearchConfig(objective=objective, population=3, iterations=0, samples=4)
    texts = prepare_texts(loaded, source, NEEDLE_LENGTH, options)
    key = ("search", NEEDLE_LENGTH)
    if objective == "needle":  # answers of other lengths, as of a tokenizer that splits numbers elsewhere
        texts[key] = replace(texts[key], answer_tokens=(3, 9, 4, 7))  # type: ignore[call-arg]
    plain, raced = (
        plan(loaded, scaled, texts, NEEDLE_LENGTH, options.replace(racing=racing)) for racing in (False, True)
    )
    assert type(raced.search) is RacedSearch
    assert raced.questions == 4 * plain.questions
    assert raced.identity["settings"] == plain.identity["settings"] | {"racing": True}
    for made in (plain, raced):
        evaluator = SerialEvaluator(made.objectives)
        while not made.search.done:
            made.search.tell(list(evaluator.evaluate(made.search.ask())))
    expected, found = (dict(made.search.optimiser.ranked) for made in (plain, raced))  # type: ignore[attr-defined]
    assert found == {candidate: pytest.approx(loss, rel=1e-12) for candidate, loss in expected.items()}
    assert len(found) == 3


def test_a_given_critical_dimension_is_the_only_one(planned: Callable[..., Plan]) -> None:
    """Outside [d_tcd(10), d_tcd] too: it was asked for."""
    for dim in (3, 9, 15):
        made = planned(method="longrope2", critical_dim=dim, population=8, iterations=3, samples=1)
        rows = [question.row for question in falling(made.search)]
        assert {row["critical_dim"] for row in rows} == {dim}
        assert len(rows) > 8


@pytest.mark.parametrize(("far", "expected"), [(False, (64, 16, 32)), (True, (32, 8, 32))])
def test_the_papers_budget(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, far: bool, expected: tuple[int, ...]
) -> None:
    from longrope.search import methods as module

    if far:
        monkeypatch.setattr(module, "FAR", 256)
    for method in ("longrope", "longrope2"):
        settings = planned(method=method, samples=1).search.optimiser.settings  # type: ignore[attr-defined]
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
    planned: Callable[..., Plan], method: str, options: dict[str, Any]
) -> None:
    """Where every answer is better than the last, so that nothing ends early or is dropped."""
    made = planned(method=method, samples=2, **options)
    asked = falling(made.search)
    for question in asked:
        assert (question.split, question.window.max_length) in made.objectives
        assert max(question.samples or [0]) < made.objectives[question.split, question.window.max_length].count
    assert len(asked) == made.questions


@pytest.mark.parametrize("method", ["gradient", "hybrid", "cma"])
def test_no_more_is_asked_where_nothing_gets_better(planned: Callable[..., Plan], method: str) -> None:
    made, count = planned(method=method, samples=2), 0
    while not made.search.done:
        questions = made.search.ask()
        made.search.tell([Answer(1.0, (1.0,) * 17 if question.gradient else None) for question in questions])
        count += len(questions)
    assert count <= made.questions


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
        try:
            made = plan(loaded, apply_scaling(loaded.model, RopeScaling.original(loaded.geometry)), texts, 512, options)
        finally:
            remove_scaling(loaded.model)
        return [question.window for question in made.search.ask()]

    assert {one.attention_factor for one in window(yarn)} == {0.1 * math.log(4) + 1}
    continued = continued_attention_factor(0.1 * math.log(4) + 1, 4 * WINDOW, 512)
    assert {one.attention_factor for one in window(yarn, attention_factor="continued")} == {continued}
    assert {one.attention_factor for one in window(yarn, attention_factor="1.25")} == {1.25}
    assert {one.attention_factor for one in window(yarn, attention_factor="yarn")} == {0.1 * math.log(8) + 1}
    plain = open_model(str(checkpoint))
    assert {one.attention_factor for one in window(plain)} == {su_attention_factor(plain.geometry, 512)}
    assert {one.attention_factor for one in window(plain, attention_factor="1")} == {1.0}
    with pytest.raises(LongRopeError, match="carries no scaling whose attention factor could be continued"):
        window(plain, attention_factor="continued")


def test_a_scaling_that_the_checkpoint_carries_is_a_seed(source: list[str], tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    folder = save_checkpoint(tmp_path / "linear", rope_parameters=rope, max_position_embeddings=WINDOW)
    loaded = open_model(str(folder))
    assert loaded.checkpoint_scaling is not None
    assert loaded.context_length == 128
    options = SearchConfig(method="gradient", samples=1)
    texts = prepare_texts(loaded, source, 512, options)
    assert {length for _, length in texts} == {256, 512}
    try:
        made = plan(loaded, apply_scaling(loaded.model, RopeScaling.original(loaded.geometry)), texts, 512, options)
    finally:
        remove_scaling(loaded.model)
    assert isinstance(made.search, GradientSearch)
    assert made.search.stages[0].seeds["checkpoint"].tolist() == [2.0] * 16


# --- what is refused


@pytest.mark.parametrize(("knots", "says"), [(1, "found 1"), (17, "2 to 16 knots"), (-1, "found -1")])
def test_knots_out_of_range_are_refused(planned: Callable[..., Plan], knots: int, says: str) -> None:
    for method in ("gradient", "hybrid", "cma"):
        with pytest.raises(LongRopeError, match=says):
            planned(method=method, samples=1, knots=knots)


@pytest.mark.parametrize(("evaluations", "says"), [(0, "at least 1; found 0"), (10, "at least 11 .* found 10")])
@pytest.mark.parametrize("method", ["hybrid", "cma"])
def test_evaluations_that_are_no_generation_are_refused(
    planned: Callable[..., Plan], method: str, evaluations: int, says: str
) -> None:
    with pytest.raises(LongRopeError, match=says):
        planned(method=method, samples=1, evaluations=evaluations)
