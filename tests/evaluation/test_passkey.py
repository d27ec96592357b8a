"""Passkey prompts are exact in tokens whatever the tokenizer does with digits, and scored by what is said."""

from __future__ import annotations

import pytest

from longrope.data.tokens import encode
from longrope.evaluation import passkey as module
from longrope.evaluation.passkey import Passkeys, draw_passkeys, measure_passkeys
from longrope.evaluation.retrieval import leading_number
from tests.evaluation.embedded import TOKENIZERS, WINDOW, key, none, tiny, tiny_tokenizer
from tests.evaluation.tiny import Steps, refused

LENGTHS = (200, 256, 1031)


def draw(tokenizer=None, length=WINDOW, count=12, seed=0) -> Passkeys:
    return draw_passkeys(tokenizer or tiny_tokenizer(), length=length, count=count, seed=seed)


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_and_room_are_exactly_the_length(make, length: int) -> None:
    tokenizer = make()
    samples = draw(tokenizer, length)
    for ids, number in zip(samples.prompts, samples.keys, strict=True):
        assert len(ids) + samples.room == length
        assert len(encode(tokenizer, f" {number}")) <= samples.room
        assert samples.room >= 6  # a space and five digits, should the model say them one by one
        text = tokenizer.decode(ids)
        assert text.count(number) == 2
        assert text.endswith("What is the pass key? The pass key is")
        assert "hidden inside a lot of irrelevant text" in text


def test_the_key_is_a_piece_of_its_own_at_its_depth_among_whole_repetitions() -> None:
    samples = draw(length=2048, count=40)
    begin, noise = (encode(tiny_tokenizer(), text) for text in (module.INSTRUCTION, module.NOISE))
    for ids, number, depth in zip(samples.prompts, samples.keys, samples.depths, strict=True):
        sentence = encode(tiny_tokenizer(), module.PASSKEY.format(key=number))
        places = [at for at in range(len(ids)) if ids[at : at + len(sentence)].tolist() == sentence]
        assert len(places) == 1
        before = ids[1 + len(begin) : places[0]].tolist()
        assert before == noise * (len(before) // len(noise))
        text = len(ids) - 1 - len(begin) - len(sentence) - len(encode(tiny_tokenizer(), module.QUESTION))
        assert len(before) / text == pytest.approx(depth, abs=0.6 * len(noise) / text + 0.02)
    assert max(samples.depths) > 0.9
    assert min(samples.depths) < 0.1


def test_the_tokenizers_differ_in_digits_and_blanks() -> None:
    one_by_one, in_groups, with_blank = (encode(make(), " 12345") for make in TOKENIZERS)
    assert len(one_by_one) == 6
    assert len(in_groups) < 5
    assert TOKENIZERS[2]().decode(with_blank) == " 12345"


def test_keys_are_five_digits_and_drawn_by_seed() -> None:
    samples = draw(count=200)
    assert all(len(number) == 5 and number[0] != "0" for number in samples.keys)
    assert len(set(samples.keys)) > 190
    assert samples.sha256 == draw(count=200).sha256 != draw(count=200, seed=1).sha256


def test_too_short() -> None:
    with refused("too-short-length", "found a length of 60"):
        draw(length=60)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_right_answers_count_and_others_do_not(make, oracle) -> None:
    tokenizer = make()
    samples = draw(tokenizer, count=6)
    first = samples.keys[0]
    said = [f" {first}. And", *(f" {number}" for number in samples.keys[1:3]), " 123456", " I do not know", ""]
    replies = {key(ids): text for ids, text in zip(samples.prompts, said, strict=True)}
    stand_in = oracle(module, tokenizer, replies)
    (row,) = measure_passkeys(tiny(), tokenizer, samples, none())
    assert row.value == pytest.approx(3 / 6)
    assert (row.suite, row.metric, row.length, row.trials, row.detail) == ("passkey", "accuracy", WINDOW, 6, {})
    assert row.stderr == pytest.approx((0.25 * 6 / 5 / 6) ** 0.5)
    # The last token said is never fed, so nothing is read beyond the length.
    assert set(stand_in.lengths) == {WINDOW + 1}


def test_a_number_that_goes_on_is_another_number(oracle) -> None:
    samples = draw(count=2)
    replies = {key(ids): f" {number}7" for ids, number in zip(samples.prompts, samples.keys, strict=True)}
    oracle(module, tiny_tokenizer(), replies)
    assert measure_passkeys(tiny(), tiny_tokenizer(), samples, none())[0].value == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [(" 12345", "12345"), ("12345.", "12345"), ("\n 1 2", "1"), ("a 12345", None), ("", None), (" -5", None),
     (" １２", None), ("12 345", "12")],
)  # fmt: skip
def test_leading_number(text: str, number: str | None) -> None:
    assert leading_number(text) == number


def test_the_embedded_model_finds_keys_inside_its_window_and_not_far_beyond() -> None:
    steps = Steps()
    samples = draw(length=192, count=20)
    (row,) = measure_passkeys(tiny(), tiny_tokenizer(), samples, none(), callbacks=steps)
    assert row.value >= 0.7  # 85 to 92 % of 100, whatever the seed
    assert steps.taken == 20
    (far,) = measure_passkeys(tiny(), tiny_tokenizer(), draw(length=1024, count=2), none())
    assert far.value == 0.0


def test_noise_is_the_papers_sentence_over_and_over() -> None:
    ids = draw(length=600, count=1).prompts[0]
    assert tiny_tokenizer().decode(ids).count("The grass is green. The sky is blue.") >= 10
