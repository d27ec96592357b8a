"""From options to a search: which texts, which objective, which settings, and what identifies it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope.data.needles import NeedleSamples, draw_needles
from longrope.data.samples import SampleOrigin, Samples
from longrope.data.sources import read_all
from longrope.data.tokens import tokenize
from longrope.errors import LongRopeError
from longrope.models.install import Installed, install, uninstall
from longrope.objectives.needle import NeedleObjective
from longrope.objectives.perplexity import PerplexityObjective
from longrope.pipeline.methods import FAR, Plan, plan, prepare_texts, stage_lengths
from longrope.pipeline.options import METHODS, SearchOptions, attention_factor_of, start_tokens_of
from longrope.pipeline.subject import Subject, open_model
from longrope.rope.factors import su_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from longrope.search.critical import CriticalCandidate
from longrope.search.evaluators import Answer, CandidateSearch
from longrope.search.gradient import GradientSearch
from tests.checkpoints import WINDOW, save_checkpoint

NEEDLE_LENGTH = 8 * WINDOW  # instruction, needle, question and answer alone take some 300 tokens of the tiny tokenizer


@pytest.fixture(scope="module")
def subject(checkpoint: Path) -> Subject:
    return open_model(str(checkpoint))


@pytest.fixture(scope="module")
def installed(subject: Subject) -> Iterator[Installed]:
    yield install(subject.model, RopeScaling.original(subject.geometry))
    uninstall(subject.model)


@pytest.fixture(scope="module")
def source(texts: Path) -> list[str]:
    return [str(texts / "search.txt")]


@pytest.fixture
def planned(subject: Subject, installed: Installed, source: list[str]) -> Callable[..., Plan]:
    """`planned(method=…)`: the plan of these options for 512 tokens."""

    def make(target_length: int = NEEDLE_LENGTH, **options: Any) -> Plan:
        chosen = SearchOptions(**options)
        texts = prepare_texts(subject, source, target_length, chosen)
        return plan(subject, installed, texts, target_length, chosen)

    return make


# --- stages and texts


@pytest.mark.parametrize(
    ("reach", "target", "lengths"),
    [
        (64, 65, [65]),
        (64, 128, [128]),
        (64, 129, [128, 129]),
        (64, 300, [128, 256, 300]),
        (64, 512, [128, 256, 512]),
        (256, 1200, [512, 1024, 1200]),
        (4096, 32768, [8192, 16384, 32768]),
    ],
)
def test_stages_double_what_the_model_reaches(reach: int, target: int, lengths: list[int]) -> None:
    assert stage_lengths(reach, target, True) == lengths
    assert stage_lengths(reach, target, False) == [target]


def spans(samples: Samples | NeedleSamples) -> list[tuple[str, range]]:
    """The places of the rows in their documents; the BOS in front is not of them."""
    return [(row.document_sha256, range(row.offset, row.offset + samples.length - 1)) for row in samples.rows]


@pytest.mark.parametrize("seed", range(5))
def test_validation_texts_overlap_no_search_text_of_any_stage(subject: Subject, texts: Path, seed: int) -> None:
    sources = [str(texts / "search.txt"), str(texts / "other.txt")]
    found = prepare_texts(subject, sources, NEEDLE_LENGTH, SearchOptions(method="gradient", samples=4, seed=seed))
    assert list(found) == [(split, length) for length in (128, 256, 512) for split in ("search", "validation")]
    for (split, length), samples in found.items():
        assert samples.ids.shape == (4 if split == "search" else 3, length)
        assert (samples.ids[:, 0] == 0).all()
        assert not (samples.ids[:, 1:] == 0).any()
    searched = [span for (split, _), samples in found.items() if split == "search" for span in spans(samples)]
    validated = [span for (split, _), samples in found.items() if split == "validation" for span in spans(samples)]
    for document, place in searched:
        for other, elsewhere in validated:
            assert document != other or place.stop <= elsewhere.start or elsewhere.stop <= place.start


def test_rows_are_the_text_at_their_places(subject: Subject, source: list[str]) -> None:
    (document,) = tokenize(read_all(source), subject.tokenizer)
    found = prepare_texts(subject, source, 256, SearchOptions(method="gradient", samples=2))
    for samples in found.values():
        for ids, row in zip(samples.ids, samples.rows, strict=True):
            assert isinstance(row, SampleOrigin)
            assert ids[1:].tolist() == document.ids[row.offset : row.offset + samples.length - 1].tolist()
        for (_, first), (_, second) in combinations(spans(samples), 2):
            assert first.stop <= second.start or second.stop <= first.start


@pytest.mark.parametrize("depth", ["spread", "start", "0.25"])
def test_needle_texts_are_those_of_draw_needles(subject: Subject, source: list[str], depth: str) -> None:
    options = SearchOptions(
        method="gradient", objective="needle", needle_depth=depth, samples=4, continuation=False, seed=5
    )
    found = prepare_texts(subject, source, NEEDLE_LENGTH, options)
    documents = tokenize(read_all(source), subject.tokenizer)
    for split, count, seed in (("search", 4, 5), ("validation", 3, 6)):
        samples = found[split, NEEDLE_LENGTH]
        expected = draw_needles(documents, subject.tokenizer, length=NEEDLE_LENGTH, count=count, seed=seed, depth=depth)
        assert isinstance(samples, NeedleSamples)
        assert torch.equal(samples.ids, expected.ids)
        assert (samples.answer_tokens, samples.depths) == (expected.answer_tokens, expected.depths)
    keys = [set(zip(samples.keys, samples.numbers, strict=True)) for samples in found.values()]  # type: ignore[union-attr]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize("method", METHODS)
def test_evolution_needs_search_texts_only(subject: Subject, source: list[str], method: str) -> None:
    found = prepare_texts(subject, source, NEEDLE_LENGTH, SearchOptions(method=method, samples=2, continuation=False))
    splits = {"search", "validation"} if method == "gradient" else {"search"}
    assert set(found) == {(split, NEEDLE_LENGTH) for split in splits}


def test_needles_do_not_fit_everywhere(subject: Subject, source: list[str]) -> None:
    """A stage too short for the needle's parts is an error that says how long they are."""
    with pytest.raises(LongRopeError, match=r"needle samples longer than .* found a length of 128"):
        prepare_texts(subject, source, NEEDLE_LENGTH, SearchOptions(method="gradient", objective="needle"))


@pytest.mark.parametrize(
    ("method", "objective", "target", "count"),
    [
        ("longrope", None, NEEDLE_LENGTH, 5),
        ("gradient", None, NEEDLE_LENGTH, 5),
        ("longrope2", None, NEEDLE_LENGTH, 10),
        ("longrope", "needle", NEEDLE_LENGTH, 10),
        ("longrope2", "perplexity", NEEDLE_LENGTH, 5),
        ("longrope", None, FAR, 5),
        ("longrope", None, FAR + 1, 3),
        ("longrope2", None, FAR + 1, 10),
    ],
)
def test_defaults_of_objective_and_samples(
    subject: Subject,
    source: list[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    objective: str | None,
    target: int,
    count: int,
) -> None:
    asked: list[tuple[str, int]] = []
    options = SearchOptions(method=method, objective=objective, continuation=False)
    from longrope.pipeline import methods as module

    def draw(name: str) -> Callable[..., Any]:
        def record(*_: object, length: int, count: int, **__: object) -> Any:
            asked.append((name, count))
            raise LongRopeError("asked")

        return record

    monkeypatch.setattr(module, "draw_samples", draw("perplexity"))
    monkeypatch.setattr(module, "draw_needles", draw("needle"))
    with pytest.raises(LongRopeError, match="asked"):
        prepare_texts(subject, source, target, options)
    expected = objective or ("needle" if method == "longrope2" else "perplexity")
    assert options.chosen_objective == expected
    validation = 3 if method == "gradient" and expected == "perplexity" else 0
    assert asked == [(expected, count + validation)]


# --- plans


def test_each_method_plans_its_search(planned: Callable[..., Plan]) -> None:
    longrope = planned(population=8, iterations=2, samples=1)
    assert isinstance(longrope.search, CandidateSearch)
    assert (longrope.questions, longrope.identity["objective"]) == (8 + 2 * 4, "perplexity")
    assert all(isinstance(objective, PerplexityObjective) for objective in longrope.objectives.values())
    longrope2 = planned(method="longrope2", population=32, iterations=2, samples=1)
    assert isinstance(longrope2.search, CandidateSearch)
    assert (longrope2.questions, longrope2.identity["objective"]) == (32 + 2 * 16, "needle")
    assert all(isinstance(objective, NeedleObjective) for objective in longrope2.objectives.values())
    candidates = longrope2.search.optimiser.ask()
    assert all(isinstance(candidate, CriticalCandidate) for candidate in candidates)
    # d_tcd(10) to d_tcd of d = 32, base 1e4, L = 64: ⌈16·log₁₀₀₀₀(64/62.8)⌉ = 1 to ⌈16·log₁₀₀₀₀(64/6.28)⌉ = 5.
    assert {candidate.critical_dim for candidate in candidates} == {1, 2, 3, 4, 5}
    assert all(window.factors[-1] == pytest.approx(12, abs=4) for window in (q.window for q in longrope2.search.ask()))
    gradient = planned(method="gradient", samples=1)
    assert isinstance(gradient.search, GradientSearch)
    assert [stage.length for stage in gradient.search.stages] == [128, 256, 512]
    assert list(gradient.search.stages[0].seeds) == ["yarn", "ntk-critical", "ntk", "pi"]


@pytest.mark.parametrize(("far", "expected"), [(False, (64, 16, 32)), (True, (32, 8, 32))])
def test_the_papers_budget(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, far: bool, expected: tuple[int, ...]
) -> None:
    from longrope.pipeline import methods as module

    if far:
        monkeypatch.setattr(module, "FAR", 256)
    for method in ("longrope", "longrope2"):
        settings = planned(method=method, samples=1).search.optimiser.settings  # type: ignore[attr-defined]
        assert (settings.population, settings.mutations, settings.top_k) == expected
        assert (settings.crossovers, settings.iterations) == (settings.mutations, 40)


@pytest.mark.parametrize("options", [{}, {"continuation": False}, {"steps": 13, "knots": 0}, {"steps": 5}])
def test_the_count_of_questions_is_what_is_asked(planned: Callable[..., Plan], options: dict[str, Any]) -> None:
    made = planned(method="gradient", patience=99, samples=2, **options)
    count = 0
    while not made.search.done:
        (question,) = made.search.ask()
        assert (question.split, question.window.max_length) in made.objectives
        assert max(question.samples or [0]) < made.objectives[question.split, question.window.max_length].count
        made.search.tell([Answer(1.0, (1.0,) * 17 if question.gradient else None)])
        count += 1
    assert count == made.questions


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("longrope", {"method": "longrope2", "objective": "perplexity"}),
    ("longrope", {"objective": "needle"}),
    ("longrope", {"samples": 3}),
    ("longrope", {"seed": 1}),
    ("longrope", {"attention_factor": "1"}),
    ("longrope", {"attention_factor": "1.5"}),
    ("longrope", {"population": 16}),
    ("longrope", {"iterations": 3}),
    ("longrope", {"patience": 2}),
    ("longrope", {"start_tokens": "4"}),
    ("longrope", {"start_tokens": "search"}),
    ("longrope2", {"seed": 1}),
    ("longrope2", {"objective": "perplexity"}),
    ("longrope2", {"needle_depth": "start"}),
    ("longrope2", {"population": 16}),
    ("longrope2", {"iterations": 3}),
    ("gradient", {"seed": 1}),
    ("gradient", {"samples": 3}),
    ("gradient", {"steps": 5}),
    ("gradient", {"knots": 5}),
    ("gradient", {"knots": 0}),
    ("gradient", {"learning_rate": 0.1}),
    ("gradient", {"continuation": False}),
    ("gradient", {"learn_attention_factor": True}),
    ("gradient", {"attention_factor": "yarn"}),
    ("gradient", {"patience": 2}),
]


@pytest.mark.parametrize(("method", "change"), CHANGES)
def test_identity_changes_with_whatever_changes_the_search(
    planned: Callable[..., Plan], method: str, change: dict[str, Any]
) -> None:
    options = {"method": method, "samples": 2, "population": 8, "iterations": 2}
    before, again, after = (planned(**given).identity for given in (options, options, options | change))
    assert json.dumps(before) == json.dumps(again)
    assert json.dumps(before) != json.dumps(after)


def test_identity_changes_with_length_texts_and_model(
    planned: Callable[..., Plan], subject: Subject, installed: Installed, texts: Path
) -> None:
    options = SearchOptions(samples=2)
    before = planned(256, samples=2).identity
    assert planned(512, samples=2).identity != before
    other = prepare_texts(subject, [str(texts / "other.txt")], 256, options)
    assert plan(subject, installed, other, 256, options).identity != before
    # Another base leaves texts, settings and stages of a gradient search as they are.
    chosen = SearchOptions(method="gradient", samples=1)
    found = prepare_texts(subject, [str(texts / "search.txt")], 256, chosen)
    rebased = replace(subject, geometry=replace(subject.geometry, base=20_000.0))
    identities = [plan(one, installed, found, 256, chosen).identity for one in (subject, rebased)]
    assert identities[0] != identities[1]


def test_identity_keeps_where_an_option_of_another_method_changes(planned: Callable[..., Plan]) -> None:
    assert planned(samples=2, steps=5, knots=3).identity == planned(samples=2).identity
    assert (
        planned(method="gradient", samples=2, iterations=5).identity == planned(method="gradient", samples=2).identity
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_attention_factor_is_the_checkpoints_unless_given(
    method: str, source: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW}
    folder = save_checkpoint(tmp_path / "yarn", rope_parameters=rope, max_position_embeddings=4 * WINDOW)
    yarn = open_model(str(folder))

    def window(subject: Subject, **more: Any) -> list[Any]:
        options = SearchOptions(method=method, samples=1, objective="perplexity", population=4, **more)
        texts = prepare_texts(subject, source, NEEDLE_LENGTH, options)
        try:
            made = plan(subject, install(subject.model, RopeScaling.original(subject.geometry)), texts, 512, options)
        finally:
            uninstall(subject.model)
        return [question.window for question in made.search.ask()]

    assert {one.attention_factor for one in window(yarn)} == {0.1 * math.log(4) + 1}
    assert {one.attention_factor for one in window(yarn, attention_factor="1.25")} == {1.25}
    assert {one.attention_factor for one in window(yarn, attention_factor="yarn")} == {0.1 * math.log(8) + 1}
    plain = open_model(str(checkpoint))
    assert {one.attention_factor for one in window(plain)} == {su_attention_factor(plain.geometry, 512)}
    assert {one.attention_factor for one in window(plain, attention_factor="1")} == {1.0}


def test_a_scaling_that_the_checkpoint_carries_is_a_seed(source: list[str], tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    folder = save_checkpoint(tmp_path / "linear", rope_parameters=rope, max_position_embeddings=WINDOW)
    subject = open_model(str(folder))
    assert subject.existing is not None
    assert subject.reach == 128
    options = SearchOptions(method="gradient", samples=1)
    texts = prepare_texts(subject, source, 512, options)
    assert {length for _, length in texts} == {256, 512}
    try:
        made = plan(subject, install(subject.model, RopeScaling.original(subject.geometry)), texts, 512, options)
    finally:
        uninstall(subject.model)
    assert isinstance(made.search, GradientSearch)
    assert made.search.stages[0].seeds["checkpoint"].tolist() == [2.0] * 16


# --- options


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"method": "annealing"}, "method of longrope, longrope2, gradient; found 'annealing'"),
        ({"objective": "accuracy"}, "objective of perplexity, needle; found 'accuracy'"),
        (
            {"method": "gradient", "start_tokens": "4"},
            "start tokens are searched by the method longrope only; found 'gradient'",
        ),
        ({"method": "longrope2", "start_tokens": "search"}, "found 'longrope2'"),
        ({"method": "gradient", "start_tokens": "four"}, "'search' or a number of tokens, found 'four'"),
    ],
)
def test_options_that_make_no_search_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(LongRopeError, match=says) as error:
        SearchOptions(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("knots", "says"), [(1, "found 1"), (17, "2 to 16 knots"), (-1, "found -1")])
def test_knots_out_of_range_are_refused(planned: Callable[..., Plan], knots: int, says: str) -> None:
    with pytest.raises(LongRopeError, match=says):
        planned(method="gradient", samples=1, knots=knots)


def test_named_values() -> None:
    geometry = RopeGeometry(rotary_dim=64, base=10_000.0, original_length=4096)
    assert attention_factor_of("su", geometry, 131_072) == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert attention_factor_of("yarn", geometry, 131_072) == pytest.approx(1 + 0.1 * math.log(32))
    assert attention_factor_of("1.19", geometry, 131_072) == 1.19
    for wrong in ("0", "-1", "nan", "inf", "SU", "", "1,2"):
        with pytest.raises(LongRopeError, match="su, yarn or a positive number"):
            attention_factor_of(wrong, geometry, 131_072)
    assert start_tokens_of("0") == (0,)
    assert start_tokens_of("256") == (256,)
    assert start_tokens_of("search")[:3] == (0, 1, 2)
    for wrong in ("-1", "1.5", "", "all", "9999999999"):
        with pytest.raises(LongRopeError, match="'search' or a number"):
            start_tokens_of(wrong)
