"""Needle samples are exact in tokens: length, BOS, the needle's own tokens, the answer that is scored."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from longrope.data.documents import Document
from longrope.data.needles import ANSWER, INSTRUCTION, NEEDLE, QUESTION, Haystacks, draw_haystacks, draw_needles
from longrope.data.tokens import TokenizedDocument, tokenize
from longrope.errors import LongRopeError
from tests.evaluation.embedded import TOKENIZERS, tokenized

LENGTH = 400


@pytest.fixture
def documents(bos_tokenizer, tmp_path):
    texts = [Document.of(f"book {n}", f"The ship sailed {n} miles and saw a whale. " * 400) for n in range(3)]
    return tokenize(texts, bos_tokenizer, cache_dir=tmp_path)


def draw(documents, tokenizer, **changes):
    return draw_needles(documents, tokenizer, **({"length": LENGTH, "count": 5, "seed": 0} | changes))


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_part_keeps_its_own_tokens(documents, bos_tokenizer):
    samples = draw(documents, bos_tokenizer)
    assert samples.ids.shape == (5, LENGTH)
    for row, key, number, answer_tokens in zip(
        samples.ids.tolist(), samples.keys, samples.numbers, samples.answer_tokens, strict=True
    ):
        answer = encode(bos_tokenizer, ANSWER.format(number=number))
        question = encode(bos_tokenizer, QUESTION.format(key=key))
        needle = encode(bos_tokenizer, NEEDLE.format(key=key, number=number))
        assert answer_tokens == len(answer)
        assert row[-len(answer) :] == answer
        assert row[-len(answer) - len(question) : -len(answer)] == question
        assert row[0] == 0
        assert row.count(0) == 1
        front = encode(bos_tokenizer, INSTRUCTION)
        assert row[1 : 1 + len(front)] == front
        places = [at for at in range(LENGTH) if row[at : at + len(needle)] == needle]
        assert len(places) == 1
        assert len(number) == 7


def test_the_rest_is_consecutive_text_of_one_book(documents, bos_tokenizer):
    samples = draw(documents, bos_tokenizer, depth=0.5, count=3)
    by_hash = {document.sha256: document for document in documents}
    for row, key, number, origin in zip(
        samples.ids.tolist(), samples.keys, samples.numbers, samples.origins, strict=True
    ):
        needle = encode(bos_tokenizer, NEEDLE.format(key=key, number=number))
        tail = len(encode(bos_tokenizer, QUESTION.format(key=key))) + 8
        body = row[1 + len(encode(bos_tokenizer, INSTRUCTION)) : LENGTH - tail]
        at = next(place for place in range(len(body)) if body[place : place + len(needle)] == needle)
        text = body[:at] + body[at + len(needle) :]
        book = by_hash[origin.document_sha256].ids
        assert abs(at - len(text) / 2) <= 1
        assert text == book[origin.offset : origin.offset + len(text)].tolist()


def test_depths(documents, bos_tokenizer):
    assert draw(documents, bos_tokenizer).depths == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert draw(documents, bos_tokenizer, depth="start").depths == (0.0,) * 5
    assert draw(documents, bos_tokenizer, depth=0.3).depths == (0.3,) * 5
    for depth in ("end", 1.5, "-0.1"):
        with pytest.raises(LongRopeError, match="needle depth"):
            draw(documents, bos_tokenizer, depth=depth)


def test_one_book_each_first_and_by_seed(documents, bos_tokenizer):
    samples = draw(documents, bos_tokenizer)
    assert len({row.document for row in samples.origins[:3]}) == 3
    assert samples.sha256 == draw(documents, bos_tokenizer).sha256 != draw(documents, bos_tokenizer, seed=1).sha256
    assert len(set(samples.keys)) > 1
    assert len(set(samples.numbers)) == 5


def test_without_bos(documents, plain_tokenizer, tmp_path):
    texts = [Document.of("book", "The ship sailed on. " * 500)]
    samples = draw(tokenize(texts, plain_tokenizer, cache_dir=tmp_path), plain_tokenizer, count=1)
    front = encode(plain_tokenizer, INSTRUCTION)
    assert samples.ids[0, : len(front)].tolist() == front


def test_too_short(documents, bos_tokenizer):
    with pytest.raises(LongRopeError, match="found a length of 100"):
        draw(documents, bos_tokenizer, length=100)
    with pytest.raises(LongRopeError, match="tokens in 3 documents"):
        draw(documents, bos_tokenizer, length=1_000_000)


def test_numbers_have_no_leading_zero(documents, bos_tokenizer):
    numbers = draw(documents, bos_tokenizer, count=20, digits=2).numbers
    assert min(map(int, numbers)) >= 10
    assert np.ptp(list(map(int, numbers))) > 0


def text_of(samples, place, tokenizer):
    """The haystack of a sample: its text without instruction, needle, question and answer."""
    parts = {"key": samples.keys[place], "number": samples.numbers[place]}
    row = samples.ids[place].tolist()
    needle = encode(tokenizer, NEEDLE.format(**parts))
    tail = len(encode(tokenizer, QUESTION.format(**parts))) + samples.answer_tokens[place]
    body = row[1 + len(encode(tokenizer, INSTRUCTION)) : len(row) - tail]
    at = next(start for start in range(len(body)) if body[start : start + len(needle)] == needle)
    return body[:at] + body[at + len(needle) :]


@pytest.mark.parametrize("seed", range(12))
def test_places_for_more_samples_hold_other_text(documents, bos_tokenizer, seed):
    """Of no length and no split the same, whatever the keys that the others draw; the first are those drawn alone."""
    count, more = 4, 3
    haystacks = draw_haystacks(documents, bos_tokenizer, length=LENGTH, count=count, seed=seed, more=more)
    others = Haystacks(haystacks.origins[count:], haystacks.tokens)
    searched = draw(documents, bos_tokenizer, count=count, seed=seed, haystacks=haystacks)
    assert searched.sha256 == draw(documents, bos_tokenizer, count=count, seed=seed).sha256
    for length in (300, LENGTH):
        short = draw(documents, bos_tokenizer, length=length, count=count, seed=seed, haystacks=haystacks)
        apart = draw(documents, bos_tokenizer, length=length, count=more, seed=seed + 1, haystacks=others)
        assert (short.origins, apart.origins) == (haystacks.origins[:count], haystacks.origins[count:])
        by_hash = {document.sha256: document for document in documents}
        for samples in (short, apart):
            for place, row in enumerate(samples.origins):
                text = text_of(samples, place, bos_tokenizer)
                assert len(text) <= haystacks.tokens
                assert text == by_hash[row.document_sha256].ids[row.offset :][: len(text)].tolist()
    spans = sorted((row.document_sha256, row.offset) for row in haystacks.origins)
    for (one, start), (other, following) in pairwise(spans):
        assert one != other or start + haystacks.tokens <= following


def test_facts_that_need_more_text_than_there_is_are_drawn_again(documents, bos_tokenizer):
    haystacks = draw_haystacks(documents, bos_tokenizer, length=LENGTH, count=1, seed=0)
    tight = Haystacks(haystacks.origins * 9, haystacks.tokens - 3)
    free, drawn = (draw(documents, bos_tokenizer, count=9, seed=1, haystacks=one) for one in (None, tight))
    assert all(len(text_of(drawn, place, bos_tokenizer)) <= tight.tokens for place in range(9))
    assert any(len(text_of(free, place, bos_tokenizer)) > tight.tokens for place in range(9))
    kept = [place for place in range(9) if len(text_of(free, place, bos_tokenizer)) <= tight.tokens]
    assert [drawn.keys[place] for place in kept] == [free.keys[place] for place in kept] != []


def test_a_second_bos_is_refused(documents, bos_tokenizer):
    ids = documents[0].ids.copy()
    ids[::50] = 0
    with pytest.raises(LongRopeError, match="holds the BOS token"):
        draw([TokenizedDocument("b", documents[0].sha256, ids)], bos_tokenizer, count=1)


@pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)
def test_parts_have_the_tokens_of_running_text(make):
    """A tokenizer that puts a blank in front of what it is given must not put one into every answer."""
    tokenizer = make()
    samples = draw(tokenized(tokenizer), tokenizer, count=3)
    for row, number, key, count in zip(
        samples.ids.tolist(), samples.numbers, samples.keys, samples.answer_tokens, strict=True
    ):
        running = encode(tokenizer, "It is." + NEEDLE.format(key=key, number=number))
        alone = encode(tokenizer, "It is.")
        assert running[: len(alone)] == alone
        needle = running[len(alone) :]
        assert any(row[at : at + len(needle)] == needle for at in range(LENGTH))
        said = encode(tokenizer, f"It is {number}")
        assert row[-count:] == said[len(encode(tokenizer, "It is")) :]
        assert tokenizer.decode(row[-count:]).strip() == number
