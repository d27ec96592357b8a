"""The texts of a search: which splits and lengths, how many, where from, and that none is searched and validated on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope.data.needles import Haystacks, NeedleSamples, draw_haystacks, draw_needles
from longrope.data.samples import SampleOrigin, Samples
from longrope.data.sources import read_all
from longrope.data.tokens import tokenize
from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.rope.scaling import RopeScaling
from longrope.search import search_data as module
from longrope.search.config import METHODS, OBJECTIVES, SearchConfig
from longrope.search.search_data import FAR, data_provenance, prepare_texts, stage_lengths
from tests.search.lengths import NEEDLE_LENGTH


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
    return [(row.document_sha256, range(row.offset, row.offset + samples.length - 1)) for row in samples.origins]


@pytest.mark.parametrize("seed", range(5))
def test_validation_texts_overlap_no_search_text_of_any_stage(loaded: LoadedModel, texts: Path, seed: int) -> None:
    sources = [str(texts / "search.txt"), str(texts / "other.txt")]
    found = prepare_texts(loaded, sources, NEEDLE_LENGTH, SearchConfig(method="gradient", samples=4, seed=seed))
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


def test_rows_are_the_text_at_their_places(loaded: LoadedModel, source: list[str]) -> None:
    (document,) = tokenize(read_all(source), loaded.tokenizer)
    found = prepare_texts(loaded, source, 256, SearchConfig(method="gradient", samples=2))
    for samples in found.values():
        for ids, row in zip(samples.ids, samples.origins, strict=True):
            assert isinstance(row, SampleOrigin)
            assert ids[1:].tolist() == document.ids[row.offset : row.offset + samples.length - 1].tolist()
        for (_, first), (_, second) in combinations(spans(samples), 2):
            assert first.stop <= second.start or second.stop <= first.start


@pytest.mark.parametrize("depth", ["spread", "start", "0.25"])
def test_needle_texts_are_those_of_draw_needles(loaded: LoadedModel, source: list[str], depth: str) -> None:
    options = SearchConfig(
        method="gradient", objective="needle", needle_depth=depth, samples=4, continuation=False, seed=5
    )
    found = prepare_texts(loaded, source, NEEDLE_LENGTH, options)
    documents = tokenize(read_all(source), loaded.tokenizer)
    size = {"length": NEEDLE_LENGTH, "count": 4, "seed": 5}
    haystacks = draw_haystacks(documents, loaded.tokenizer, **size, more=3)
    splits = (("search", 4, 5, None), ("validation", 3, 6, Haystacks(haystacks.origins[4:], haystacks.tokens)))
    for split, count, seed, given in splits:
        samples = found[split, NEEDLE_LENGTH]
        expected = draw_needles(
            documents, loaded.tokenizer, length=NEEDLE_LENGTH, count=count, seed=seed, depth=depth, haystacks=given
        )
        assert isinstance(samples, NeedleSamples)
        assert torch.equal(samples.ids, expected.ids)
        assert (samples.answer_tokens, samples.depths) == (expected.answer_tokens, expected.depths)
    keys = [set(zip(samples.keys, samples.numbers, strict=True)) for samples in found.values()]  # type: ignore[union-attr]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize("seed", range(5))
def test_no_stage_searches_needles_in_text_that_validates(loaded: LoadedModel, source: list[str], seed: int) -> None:
    """All stages have the beginnings of the same places, which the longest decides."""
    own = loaded.geometry
    reaching = replace(loaded, checkpoint_scaling=RopeScaling.extended(own, 256, (1.0,) * own.pairs, 0, 1.0))
    found = prepare_texts(
        reaching, source, 1024, SearchConfig(method="gradient", objective="needle", seed=seed, samples=3)
    )
    assert [length for split, length in found if split == "search"] == [512, 1024]
    for split in ("search", "validation"):
        assert found[split, 512].origins == found[split, 1024].origins
    documents = tokenize(read_all(source), loaded.tokenizer)
    haystacks = draw_haystacks(documents, loaded.tokenizer, length=1024, count=3, seed=seed, more=3)
    assert found["search", 1024].origins + found["validation", 1024].origins == haystacks.origins
    for one, other in combinations(haystacks.origins, 2):  # test_needles.py: no text is longer than the span
        assert abs(one.offset - other.offset) >= haystacks.tokens


def test_a_wrong_depth_is_not_blamed_on_a_stage(loaded: LoadedModel, source: list[str]) -> None:
    options = SearchConfig(method="gradient", objective="needle", needle_depth="2", samples=2)
    with pytest.raises(LongRopeError, match=r"expected a needle depth of .* found '2'$"):
        prepare_texts(loaded, source, 1024, options)


def jump(method: str) -> dict[str, Any]:
    """The options of a method that goes to its target at once."""
    return {"method": method} | ({"continuation": False} if method in ("gradient", "hybrid") else {})


SPLITS = {
    "longrope": {"search"},
    "longrope2": {"search", "other"},
    "gradient": {"search", "validation"},
    "hybrid": {"search", "validation"},
    "cma": {"search"},
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_the_splits_that_it_asks(loaded: LoadedModel, source: list[str], method: str) -> None:
    found = prepare_texts(loaded, source, NEEDLE_LENGTH, SearchConfig(samples=2, **jump(method)))
    assert set(found) == {(split, NEEDLE_LENGTH) for split in SPLITS[method]}


def test_the_search_texts_of_a_seed_are_the_same_for_every_method(loaded: LoadedModel, source: list[str]) -> None:
    """Or their losses would not compare."""
    for objective in OBJECTIVES:
        found = {
            prepare_texts(
                loaded, source, NEEDLE_LENGTH, SearchConfig(objective=objective, samples=2, seed=3, **jump(method))
            )["search", NEEDLE_LENGTH].sha256
            for method in METHODS
        }
        assert len(found) == 1


@pytest.mark.parametrize("objective", [None, "needle", "perplexity"])
def test_longrope2_also_has_texts_of_the_other_objective(
    loaded: LoadedModel, source: list[str], objective: str | None
) -> None:
    """Those that a search of that objective with the same options would have."""
    options = SearchConfig(method="longrope2", objective=objective, samples=3, needle_depth="0.5", seed=4)
    found = prepare_texts(loaded, source, NEEDLE_LENGTH, options)
    turned = options.replace(objective=options.other_objective)
    assert isinstance(found["search", NEEDLE_LENGTH], NeedleSamples) == (objective != "perplexity")
    assert isinstance(found["other", NEEDLE_LENGTH], NeedleSamples) == (objective == "perplexity")
    again = prepare_texts(loaded, source, NEEDLE_LENGTH, turned)
    assert found["other", NEEDLE_LENGTH].sha256 == again["search", NEEDLE_LENGTH].sha256
    assert found["search", NEEDLE_LENGTH].sha256 == again["other", NEEDLE_LENGTH].sha256


def test_needles_do_not_fit_everywhere(loaded: LoadedModel, source: list[str]) -> None:
    """A stage too short for the needle's parts is an error that says how long they are."""
    says = r"needle samples longer than .* found a length of 128, the first of the stages of 128, 256, 512 tokens"
    with pytest.raises(LongRopeError, match=says) as error:
        prepare_texts(loaded, source, NEEDLE_LENGTH, SearchConfig(method="gradient", objective="needle"))
    assert "continuation=False" in error.value.hint


@pytest.mark.parametrize(
    ("method", "objective", "target", "draws"),
    [
        ("longrope", None, NEEDLE_LENGTH, [("perplexity", 5)]),
        ("cma", None, NEEDLE_LENGTH, [("perplexity", 5)]),
        ("gradient", None, NEEDLE_LENGTH, [("perplexity", 5 + 3)]),
        ("hybrid", None, NEEDLE_LENGTH, [("perplexity", 5 + 3)]),
        ("gradient", "needle", NEEDLE_LENGTH, [("needle", 10), ("needle", 3)]),
        ("longrope2", None, NEEDLE_LENGTH, [("needle", 10), ("perplexity", 5)]),
        ("longrope", "needle", NEEDLE_LENGTH, [("needle", 10)]),
        ("longrope2", "perplexity", NEEDLE_LENGTH, [("perplexity", 5), ("needle", 10)]),
        ("longrope", None, FAR, [("perplexity", 5)]),
        ("longrope", None, FAR + 1, [("perplexity", 3)]),
        ("gradient", None, FAR + 1, [("perplexity", 3 + 3)]),
        ("longrope2", None, FAR + 1, [("needle", 10), ("perplexity", 3)]),
    ],
)
def test_defaults_of_objective_and_samples(
    loaded: LoadedModel,
    source: list[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    objective: str | None,
    target: int,
    draws: list[tuple[str, int]],
) -> None:
    asked: list[tuple[str, int]] = []

    def draw(name: str) -> Callable[..., Samples]:
        def record(*_: object, length: int, count: int, **__: object) -> Samples:
            assert length == target
            asked.append((name, count))
            return Samples(torch.zeros((count, 2), dtype=torch.int64), (SampleOrigin("", "", 0),) * count, False)

        return record

    monkeypatch.setattr(module, "draw_samples", draw("perplexity"))
    monkeypatch.setattr(module, "draw_needles", draw("needle"))
    options = SearchConfig(objective=objective, **jump(method))
    prepare_texts(loaded, source, target, options)
    assert options.chosen_objective == draws[0][0] != options.other_objective
    assert asked == draws


def test_provenance_names_documents_and_places(loaded: LoadedModel, source: list[str]) -> None:
    (document,) = tokenize(read_all(source), loaded.tokenizer)
    found = prepare_texts(loaded, source, NEEDLE_LENGTH, SearchConfig(method="longrope2", samples=2))
    said = data_provenance(found)
    assert said["document_sha256"] == [document.sha256]
    assert [(row["split"], row["length"]) for row in said["samples"]] == [
        (split, NEEDLE_LENGTH) for split in ("search", "search", "other", "other")
    ]
    offsets = [row.offset for samples in found.values() for row in samples.origins]
    assert [row["offset"] for row in said["samples"]] == offsets
    assert len(json.dumps(said)) > 100
