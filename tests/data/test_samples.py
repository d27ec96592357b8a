"""Drawing samples: exact, seeded, one per document first, never overlapping, whatever the documents' order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from longrope.data.documents import Document
from longrope.data.samples import SampleOrigin, Samples, draw_origins, draw_samples, require_disjoint
from longrope.data.tokens import TokenizedDocument, bos_of, tokenize
from longrope.errors import LongRopeError
from longrope.storage import sha256_text

BOS = 0


def corpus(*sizes: int) -> list[TokenizedDocument]:
    """Documents of these sizes; the token at offset i of document k is 1 + 100_000·k + i."""
    return [
        TokenizedDocument(f"doc{k}", sha256_text(f"doc{k}"), np.arange(1, n + 1, dtype=np.int32) + 100_000 * k)
        for k, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("bos", [BOS, None])
def test_rows_are_bos_once_then_consecutive_tokens_of_their_origin(bos: int | None) -> None:
    documents = corpus(100, 57, 33)
    by_hash = {document.sha256: document for document in documents}
    samples = draw_samples(documents, length=17, count=9, seed=3, bos_token_id=bos)
    assert samples.ids.shape == (9, 17)
    assert samples.ids.dtype == torch.int64
    assert (samples.length, samples.has_bos) == (17, bos is not None)
    for row, origin in zip(samples.ids.tolist(), samples.origins, strict=True):
        text = row[1:] if bos is not None else row
        document = by_hash[origin.document_sha256]
        assert text == document.ids[origin.offset : origin.offset + len(text)].tolist()
        assert origin.document == document.name
        assert row.count(BOS) == (bos is not None)


def test_from_text_to_samples(tmp_path: Path, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document.of(name, f"<s> The {name} swam past the ship. " * 20) for name in ("whale", "shark", "seal")]
    tokenized = tokenize(documents, bos_tokenizer, cache_dir=tmp_path)
    samples = draw_samples(tokenized, length=64, count=3, seed=0, bos_token_id=bos_of(bos_tokenizer))
    assert (samples.ids[:, 0] == 0).all()
    assert not (samples.ids[:, 1:] == 0).any()
    assert samples.document_hashes == tuple(sorted(document.sha256 for document in documents))


def test_same_arguments_same_samples_and_another_seed_others() -> None:
    documents = corpus(1000, 2000, 3000)

    def digest(seed: int, count: int = 4) -> str:
        return draw_samples(documents, length=50, count=count, seed=seed, bos_token_id=BOS).sha256

    assert digest(1) == digest(1)
    assert len({digest(seed) for seed in range(10)}) == 10
    assert digest(1, 4) != digest(1, 5)


def test_the_draw_is_pinned() -> None:
    """A change of the drawing changes every published number: it must be meant."""
    places = draw_origins(corpus(1000, 2000), span=100, count=4, seed=7)
    assert [(place.document, place.offset) for place in places] == [
        ("doc0", 800),
        ("doc1", 1700),
        ("doc0", 0),
        ("doc1", 400),
    ]


def test_documents_with_the_same_text_count_once() -> None:
    (first, second) = corpus(40, 30)
    copy = TokenizedDocument("a copy", first.sha256, first.ids)
    for documents in ([first, second, copy], [copy, first, second]):
        places = draw_origins(documents, span=10, count=7, seed=0)
        assert len({(place.document_sha256, place.offset) for place in places}) == 7
        with pytest.raises(LongRopeError, match="found 7: 70 tokens in 2 documents"):
            draw_origins(documents, span=10, count=8, seed=0)
    assert draw_origins([first, copy], span=10, count=4, seed=0) == draw_origins(
        [copy, first], span=10, count=4, seed=0
    )


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    span=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_places_property(sizes: list[int], span: int, seed: int, data: st.DataObject) -> None:
    documents = corpus(*sizes)
    possible = sum(size // span for size in sizes)
    if not possible:
        with pytest.raises(LongRopeError):
            draw_origins(documents, span=span, count=1, seed=seed)
        return
    count = data.draw(st.integers(1, possible))
    places = draw_origins(documents, span=span, count=count, seed=seed)
    assert len(places) == count
    size_of = {document.sha256: len(document.ids) for document in documents}
    used: set[tuple[str, int]] = set()
    for place in places:
        assert 0 <= place.offset <= size_of[place.document_sha256] - span
        tokens = {(place.document_sha256, place.offset + i) for i in range(span)}
        assert not used & tokens, "samples overlap"
        used |= tokens
    # In rounds: when a document gives its n-th place, every document that can give n-1 has given them.
    given_by: Counter[str] = Counter()
    for place in places:
        turn = given_by[place.document_sha256]
        assert all(given_by[digest] >= min(turn, size // span) for digest, size in size_of.items())
        given_by[place.document_sha256] += 1
    # Whatever the listing's order, and the first of a larger draw are the smaller one.
    assert draw_origins(data.draw(st.permutations(documents)), span=span, count=count, seed=seed) == places
    assert draw_origins(documents, span=span, count=possible, seed=seed)[:count] == places


def test_too_little_text_says_what_was_found_and_needed() -> None:
    with pytest.raises(LongRopeError) as caught:
        draw_samples(corpus(30, 70, 5), length=33, count=4, seed=0, bos_token_id=BOS)
    assert "need 4 samples of 32 consecutive tokens" in str(caught.value)
    assert "found 2: 105 tokens in 3 documents, the longest doc1 with 70" in str(caught.value)
    with pytest.raises(LongRopeError, match="found 0: 105 tokens in 3 documents, the longest doc1 with 70"):
        draw_samples(corpus(30, 70, 5), length=128, count=1, seed=0, bos_token_id=BOS)
    with pytest.raises(LongRopeError, match="found none"):
        draw_samples([], length=128, count=1, seed=0, bos_token_id=BOS)


def test_every_token_can_be_used() -> None:
    """Documents of exactly the needed size are enough: with a BOS one token less is needed."""
    assert draw_samples(corpus(31), length=32, count=1, seed=0, bos_token_id=BOS).ids[0, -1] == 31
    with pytest.raises(LongRopeError):
        draw_samples(corpus(31), length=32, count=1, seed=0, bos_token_id=None)


@pytest.mark.parametrize(("length", "count", "seed"), [(1, 1, 0), (8, 0, 0), (8, 1, -1)])
def test_bad_arguments(length: int, count: int, seed: int) -> None:
    with pytest.raises(LongRopeError, match="expected"):
        draw_samples(corpus(50), length=length, count=count, seed=seed, bos_token_id=None)


def test_a_second_bos_is_refused() -> None:
    with pytest.raises(LongRopeError, match=r"doc0 holds the BOS token \(5\)"):
        draw_samples(corpus(20), length=21, count=1, seed=0, bos_token_id=5)


def test_hash_covers_ids_and_shape() -> None:
    rows = (SampleOrigin("a", "1", 0), SampleOrigin("b", "2", 0))
    ids = torch.arange(8).reshape(2, 4)
    changed = ids.clone()
    changed[1, 3] += 1
    digests = {
        Samples(ids, rows, has_bos=True).sha256,
        Samples(changed, rows, has_bos=True).sha256,
        Samples(ids.reshape(1, 8), rows[:1], has_bos=True).sha256,
    }
    assert len(digests) == 3
    with pytest.raises(ValueError, match="2 origins"):
        Samples(ids.reshape(1, 8), rows, has_bos=True)


def test_disjoint_by_hash() -> None:
    searched, held_out = corpus(40, 40, 40)[:2], corpus(40, 40, 40)[2:]
    hashes = draw_samples(searched, length=10, count=2, seed=0, bos_token_id=None).document_hashes
    require_disjoint(hashes, held_out)
    renamed = TokenizedDocument("new name", searched[1].sha256, searched[1].ids)
    with pytest.raises(LongRopeError, match="found 1 it has: new name;"):
        require_disjoint(hashes, [*held_out, renamed])
    document = Document.of("text", "doc0")
    with pytest.raises(LongRopeError, match="text") as error:
        require_disjoint(hashes, iter([document]))
    assert error.value.code == "seen-texts"
