"""The needle grid: exact in tokens for every question, each needle at its depth, asked from shared keys and values."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from longrope.data.needles import INSTRUCTION, NEEDLE
from longrope.data.tokens import bos_prefix, encode
from longrope.errors import LongRopeError
from longrope.evaluation import needle as module
from longrope.evaluation.needle import NeedleGrid, draw_grid, grid_depths, measure_needles, needles_that_fit
from longrope.models.scoring import token_nll
from tests.evaluation.embedded import TOKENIZERS, WINDOW, book, key, none, tiny, tiny_tokenizer, tokenized
from tests.evaluation.tiny import Steps, refused

DEPTHS = grid_depths(5)


@cache
def grid(make=tiny_tokenizer, length=500, trials=3, per_document=3, seed=0, depths=DEPTHS) -> NeedleGrid:
    return draw_grid(
        tokenized(make()), make(), length=length, depths=depths, trials=trials, per_document=per_document, seed=seed
    )


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize(("length", "per_document"), [(500, 3), (1024, 5), (777, 1)])
def test_document_question_and_room_are_exactly_the_length(make, length: int, per_document: int) -> None:
    made = grid(make, length, per_document=per_document)
    tokenizer = make()
    for document in made.documents:
        for asked in document.needles:
            assert len(document.context) + len(asked.question) + made.room == length
            assert len(asked.answer) <= made.room
            assert tokenizer.decode(asked.answer).strip() == asked.number


@pytest.mark.parametrize("make", TOKENIZERS)
def test_every_needle_lies_at_its_depth_in_text_of_the_book(make) -> None:
    made = grid(make, 800, trials=2, per_document=5)
    tokenizer = make()
    (source,) = tokenized(tokenizer)
    begin = len(bos_prefix(tokenizer)) + len(encode(tokenizer, INSTRUCTION))
    for document in made.documents:
        context = document.context.tolist()
        assert context[:begin] == bos_prefix(tokenizer) + encode(tokenizer, INSTRUCTION)
        text, depths = [], []
        rest = context[begin:]
        for asked in document.needles:  # in the order of their depths
            size = len(asked.sentence)
            at = next(at for at in range(len(rest)) if rest[at : at + size] == asked.sentence)
            text += rest[:at]
            depths.append((len(text), asked.depth))
            rest = rest[at + size :]
        text += rest
        assert [place for place, _ in depths] == [round(depth * len(text)) for _, depth in depths]
        whole = source.ids.tolist()
        assert any(whole[at : at + len(text)] == text for at in range(len(whole)) if whole[at] == text[0])
    assert made.sources == {book().sha256: "book"}


def test_all_depths_in_every_trial_neighbours_in_different_documents() -> None:
    made = grid(per_document=2, trials=2)
    depths = [tuple(asked.depth for asked in document.needles) for document in made.documents]
    assert depths == [(0.0, 0.75), (0.25, 1.0), (0.5,)] * 2
    assert [asked.depth for asked in grid(per_document=5, trials=1).documents[0].needles] == list(DEPTHS)


def test_keys_of_a_document_differ_and_are_asked_in_equally_many_tokens() -> None:
    for document in grid(per_document=5, trials=8, length=700).documents:
        questions = {tuple(asked.question) for asked in document.needles}
        assert len(questions) == 5
        assert len({len(asked.question) for asked in document.needles}) == 1
        assert len({asked.number for asked in document.needles}) == 5
        assert all(len(asked.number) == 7 for asked in document.needles)


def test_by_seed() -> None:
    assert grid().sha256 == grid.__wrapped__().sha256 != grid(seed=1).sha256
    assert grid_depths(1) == (0.5,)
    assert grid_depths(3) == (0.0, 0.5, 1.0)


def test_needles_that_fit_leave_half_of_the_text() -> None:
    tokenizer = tiny_tokenizer()
    assert needles_that_fit(tokenizer, 256, 10, 0) == 2
    assert needles_that_fit(tokenizer, 2048, 10, 0) == 10
    assert needles_that_fit(tokenizer, 60, 10, 0) == 1  # whether that fits is draw_grid's to say
    sentence = len(encode(tokenizer, NEEDLE.format(key="numerous-kite", number="1234567")))
    assert needles_that_fit(tokenizer, 512, 10, 0) * sentence <= 256


def test_too_short() -> None:
    with refused("too-short-length", "found a length of 200"):
        grid(length=200)
    with refused("invalid-setting", "1 to 100 needle depths, found 101"):
        grid(depths=grid_depths(101), per_document=101, length=9000)
    assert len(grid(depths=grid_depths(100), per_document=100, length=6000, trials=1).documents[0].needles) == 100
    with pytest.raises(LongRopeError, match="need 300 samples"):
        grid(length=20_000, trials=100, per_document=2)


def test_shared_keys_and_values_give_what_whole_texts_give() -> None:
    """The log-probability of every answer, against one plain forward per question; the replies against argmax."""
    made, tokenizer = grid(length=WINDOW, trials=1, per_document=2), tiny_tokenizer()
    rows = measure_needles(tiny(), tokenizer, made, none())
    with tiny().using(none().window(WINDOW)) as model, torch.no_grad():
        for document in made.documents:
            for asked in document.needles:
                ids = torch.tensor([[*document.context.tolist(), *asked.question, *asked.answer]])
                expected = -token_nll(model, ids)[0, -len(asked.answer) :].mean()
                said = model(ids).logits[0, -len(asked.answer) - 1 : -1].argmax(-1)
                (found,) = [r for r in rows if r.metric == "answer_logprob" and r.detail["depth"] == asked.depth]
                (hit,) = [r for r in rows if r.metric == "accuracy" and r.detail["depth"] == asked.depth]
                assert found.value == pytest.approx(float(expected), abs=1e-4)
                assert hit.value == float(said.tolist() == asked.answer)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_right_numbers_count_and_others_do_not(make, oracle) -> None:
    tokenizer, made = make(), grid(make, 500, trials=2, per_document=3)
    replies = {}
    for trial, document in enumerate(made.documents):
        for asked in document.needles:
            right = trial < 2  # the two documents of the first trial
            text = f" {asked.number}." if right else f" {asked.number[:-1]}"
            replies[key([*document.context, *asked.question])] = text
    stand_in = oracle(module, tokenizer, replies)
    rows = [row for row in measure_needles(tiny(), tokenizer, made, none()) if row.metric == "accuracy"]
    assert [row.detail["depth"] for row in rows] == list(DEPTHS)
    assert all((row.value, row.trials) == (0.5, 2) for row in rows)
    assert all(row.stderr == pytest.approx(0.5) for row in rows)
    assert set(stand_in.lengths) == {501}


def test_the_embedded_model_retrieves_inside_its_window() -> None:
    steps = Steps()
    made = grid(length=WINDOW, trials=2, per_document=1)
    rows = measure_needles(tiny(), tiny_tokenizer(), made, none(), callbacks=steps)
    accuracy = [row.value for row in rows if row.metric == "accuracy"]
    assert np.mean(accuracy) >= 0.9
    assert all(row.value > -0.5 for row in rows if row.metric == "answer_logprob")
    assert steps.taken == len(made.documents) == 10
