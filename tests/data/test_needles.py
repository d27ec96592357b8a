"""Needle samples are exact in tokens: length, BOS, the needle's own tokens, the answer that is scored."""

from __future__ import annotations

import numpy as np
import pytest

from longrope.data.documents import Document
from longrope.data.needles import ANSWER, INSTRUCTION, NEEDLE, QUESTION, draw_needles
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
    for row, key, number, origin in zip(samples.ids.tolist(), samples.keys, samples.numbers, samples.rows, strict=True):
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
    assert len({row.document for row in samples.rows[:3]}) == 3
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


def test_text_of_other_samples_is_left_out(documents, bos_tokenizer):
    """Whatever their length; the books are short enough that another seed's draw would overlap."""
    searched = [draw(documents, bos_tokenizer, length=length, count=3) for length in (300, 700)]

    def overlaps(samples):
        key, number = samples.keys[0], samples.numbers[0]
        parts = (INSTRUCTION, *(part.format(key=key, number=number) for part in (NEEDLE, QUESTION, ANSWER)))
        text = samples.length - 1 - sum(len(encode(bos_tokenizer, part)) for part in parts) - 9  # of any other key
        return any(
            row.document_sha256 == other.document_sha256
            and row.offset < other.offset + seen.length
            and other.offset < row.offset + text
            for row in samples.rows
            for seen in searched
            for other in seen.rows
        )

    assert any(overlaps(draw(documents, bos_tokenizer, seed=seed)) for seed in range(10))
    assert not any(overlaps(draw(documents, bos_tokenizer, seed=seed, apart_from=searched)) for seed in range(10))
    with pytest.raises(LongRopeError, match="need 2000 samples"):
        draw(documents, bos_tokenizer, count=2000, apart_from=searched)


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
