"""RULER's samples are what its definitions say: parts, counts, order, room for the reply, and as long as fits."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from longrope.data.tokens import TokenizedDocument, encode
from longrope.errors import LongRopeError
from longrope.evaluation.config import RULER_TASKS as TASKS
from longrope.evaluation.ruler.generators import NOISE, Questions, numbered, variable_chain
from longrope.evaluation.ruler.tasks import NIAH, RulerSamples, draw_task, needs_text
from longrope.evaluation.ruler.words import all_words, draw_words
from tests.evaluation.embedded import book, tiny_tokenizer, tokenized

LENGTH = 1100
ROOMS = dict.fromkeys(NIAH, 128) | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Questions:
    """Two articles of three paragraphs in SQuAD 2.0's format, one question impossible."""

    def paragraph(article: int, at: int) -> dict:
        entry = {"question": f"What is {article}.{at}?", "answers": [{"text": f"answer {article}.{at}"}, {"text": "x"}]}
        impossible = {"question": "Why?", "answers": [], "is_impossible": True}
        text = f"Paragraph {at} of article {article} says answer {article}.{at}. " + "More of it follows. " * 4
        return {"context": text, "qas": [entry | {"is_impossible": False}, impossible]}

    articles = [{"paragraphs": [paragraph(article, at) for at in range(3)]} for article in range(2)]
    path = tmp_path_factory.mktemp("squad") / "dev.json"
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return Questions.read(path)


def draw(task: str, length: int = LENGTH, count: int = 2, seed: int = 0, **more) -> RulerSamples:
    tokenizer = tiny_tokenizer()
    return draw_task(task, tokenizer, length=length, count=count, seed=seed, documents=tokenized(tokenizer), **more)


def texts(samples: RulerSamples) -> list[str]:
    return [tiny_tokenizer().decode(sample.ids, skip_special_tokens=True) for sample in samples.samples]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_fills_its_length_and_repeats_by_seed(task: str, questions: Questions) -> None:
    more = {"questions": questions} if task == "qa_1" else {}
    samples = draw(task, **more)
    for sample in samples.samples:
        taken = len(sample.ids) + sample.room
        # A line of two UUIDs takes 84 tokens, of noise 31; the longest word has far fewer.
        assert LENGTH - (12 if needs_text(task) else 90) < taken <= LENGTH
        assert sample.ids[0] == 0
        assert sample.ids.tolist().count(0) == 1
        assert sample.room <= ROOMS[task]
        reply = numbered(sample.answers) if task == "cwe" else " ".join(sample.answers)
        assert len(encode(tiny_tokenizer(), reply)) <= sample.room or task == "qa_1"
    assert samples.sha256 == draw(task, **more).sha256 != draw(task, seed=1, **more).sha256
    first = draw(task, count=1, **more).samples[0] if task != "qa_1" else samples.samples[0]
    assert first.ids.tolist() == samples.samples[0].ids.tolist()  # more samples do not change the first
    assert samples.samples[0].ids.tolist() != samples.samples[1].ids.tolist()


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multiquery", "vt", "fwe"])
def test_the_room_for_replies_is_rulers_from_4096_tokens(task: str) -> None:
    (sample,) = draw(task, length=4096, count=1).samples
    assert sample.room == ROOMS[task]
    assert 4096 - 40 < len(sample.ids) + sample.room <= 4096


def test_single_needles() -> None:
    for task, kind in (("niah_single_1", "number"), ("niah_single_2", "number"), ("niah_single_3", "uuid")):
        for text, sample in zip(texts(draw(task)), draw(task).samples, strict=True):
            (answer,) = sample.answers
            (key,) = re.findall(rf"One of the special magic {kind}s for (\S+(?: \S+)*) is: {answer}\.", text)
            assert text.startswith(f"A special magic {kind} is hidden within the following text. Make sure to memorize")
            assert f"I will quiz you about the {kind} afterwards.\n" in text
            asked = f"the special magic {kind} for {key} mentioned in the provided text"
            assert text.endswith(f"\nWhat is {asked}? The{asked[3:]} is")
            assert re.fullmatch(r"\d{7}" if kind == "number" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", answer)
    assert texts(draw("niah_single_1"))[0].count(f"\n{NOISE}") > 20


def test_needles_in_a_text_lie_between_sentences_of_the_book() -> None:
    words = set(book().text.split())
    for text in texts(draw("niah_single_2", count=6)):
        before, needle, after = re.split(r" ?(One of the special magic numbers for .+? is: \d+\.) ?", text)
        before, after = before.partition("\n")[2], after.partition("\n")[0]
        assert re.search(r"[.!?][\"”’']?$", before) or before == ""
        assert needle.endswith(".")
        assert set(before.split()) | set(after.split()) <= words


@pytest.mark.parametrize(
    ("task", "needles", "keys", "answers"),
    [("niah_multikey_1", 4, 4, 1), ("niah_multivalue", 4, 1, 4), ("niah_multiquery", 4, 4, 4)],
)
def test_several_needles(task: str, needles: int, keys: int, answers: int) -> None:
    for text, sample in zip(texts(draw(task)), draw(task).samples, strict=True):
        found = re.findall(r"One of the special magic numbers for (.+?) is: (\d{7})\.", text)
        assert len(found) == needles
        assert len({key for key, _ in found}) == keys
        assert len(set(sample.answers)) == answers
        assert set(sample.answers) <= {value for _, value in found}
        question = text.rpartition("\n")[2]
        asked = {key for key, value in found if value in sample.answers}
        assert all(key in question for key in asked)
        if answers > 1:
            assert text.startswith("Some special magic numbers are hidden")
            assert question.startswith("What are all the special magic numbers for ")
            assert question.endswith(" mentioned in the provided text are")
        if task == "niah_multiquery":
            assert re.search(r"for .+, .+, .+, and .+ mentioned in the provided text\?", question)


@pytest.mark.parametrize(("task", "kind"), [("niah_multikey_2", "number"), ("niah_multikey_3", "uuid")])
def test_a_haystack_of_needles(task: str, kind: str) -> None:
    for text, sample in zip(texts(draw(task)), draw(task).samples, strict=True):
        lines = text.split("\n")[1:-1]
        assert len(lines) > 8
        assert all(line.startswith(f"One of the special magic {kind}s for ") for line in lines)
        (line,) = [line for line in lines if sample.answers[0] in line]
        key = line.split(" for ")[1].split(" is: ")[0]
        assert f"for {key} mentioned" in text.rpartition("\n")[2]


def test_variable_tracking() -> None:
    for text, sample in zip(texts(draw("vt", length=1600)), draw("vt", length=1600).samples, strict=True):
        solved, asked = text.split("Memorize and track the chain(s) of variable assignment hidden in")[1:]
        assert len(encode(tiny_tokenizer(), solved)) <= 500
        for part, letters in ((solved, 3), (asked, 5)):
            value = re.search(r"assigned the value (\d{5}) in the text", part)[1]
            (first,) = re.findall(rf"VAR ([A-Z]{{{letters}}}) = {value}\n", part)
            chain = [first]
            for name, before in re.findall(rf"VAR ([A-Z]{{{letters}}}) = VAR ([A-Z]{{{letters}}}) \n", part):
                assert before == chain[-1]  # in order, one after the other
                chain.append(name)
            assert len(set(chain)) == 5
            assert f", 5 variables are assigned the value {value}, they are: " in part
            if letters == 5:
                assert tuple(chain) == sample.answers
            else:
                assert part.rstrip().endswith(" ".join(chain))
        assert asked.endswith("they are: ")
        assert set(asked.split("\n\n")[1].split("\nQuestion")[0].split("\n")) - {NOISE} == {
            line for line in asked.split("\n") if line.startswith("VAR ")
        }


@pytest.mark.parametrize(("length", "common", "uncommon", "solved"), [(1100, 6, 1, (3, 1)), (4500, 30, 3, (10, 3))])
def test_common_words(length: int, common: int, uncommon: int, solved: tuple[int, int]) -> None:
    samples = draw("cwe", length=length, count=1)
    (sample,) = samples.samples
    first, last = texts(samples)[0].split("Below is a numbered list of words.")[1:]
    for part, often, seldom in ((last, common, uncommon), (first, *solved)):
        listed = part.split("\n")[1]
        words = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", listed)
        assert listed == numbered(words)
        counts = Counter(words)
        assert sorted(set(counts.values())) in ([often], [seldom, often])
        most = {word for word, count in counts.items() if count == often}
        assert len(most) == 10
        if part is last:
            assert most == set(sample.answers)
            assert part.endswith("Answer: The top 10 words that appear most often in the list are:")
        else:
            assert set(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", part.split("are:")[1].strip())) == most


def test_frequent_words() -> None:
    for text, sample in zip(texts(draw("fwe")), draw("fwe").samples, strict=True):
        context = text.split("Find the three most frequently appeared coded words. ")[1].split("\nQuestion:")[0]
        counts = Counter(context.split(" "))
        total = counts.total()
        ranked = [word for word, _ in counts.most_common()]
        assert ranked[0] == "..."
        assert set(ranked[1:4]) == set(sample.answers)
        assert all(re.fullmatch(r"[a-z]{6}", word) for word in ranked[1:])
        # Zipf with exponent 2: the second is a quarter of the first, the third a ninth.
        assert counts["..."] / counts[sample.answers[0]] == pytest.approx(4, rel=0.1)
        assert counts["..."] / counts[sample.answers[1]] == pytest.approx(9, rel=0.2)
        assert counts["..."] / total == pytest.approx(0.61, abs=0.06)


def test_questions(questions: Questions) -> None:
    assert len(questions.questions) == 6  # the impossible ones are left out
    samples = draw("qa_1", length=600, count=6, questions=questions)
    assert samples.sources == {questions.sha256: "dev.json"}
    assert len({sample.answers for sample in samples.samples}) == 6
    for text, sample in zip(texts(samples), samples.samples, strict=True):
        documents = re.findall(r"Document (\d+):\n(.+?)\n\n", text)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        assert any(sample.answers[0] in document for _, document in documents)
        article = sample.answers[0].split()[1].split(".")[0]
        assert text.endswith(f"Question: What is {article}.{sample.answers[0][-1]}? Answer:")
        assert text.count("Only give me the answer and do not output any other words.") == 2
        assert sample.room <= 32


def test_a_questions_article_comes_first_then_others_then_all_again(questions: Questions) -> None:
    question = questions.questions[0]
    for size, expected in ((1, 1), (3, 3), (4, 6), (6, 6), (9, 6)):
        prompt = questions.make(size, random.Random(0), question).prompt
        assert prompt.count("Document ") == size
        different = {line for line in prompt.split("\n") if line.startswith("Paragraph ")}
        assert len(different) <= expected
        assert any(question.answers[0] in line for line in different)
        if size <= 3:
            assert all("of article 0" in line for line in different)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"data": [{"paragraphs": [{"context": "a"}]}]}', '{"data": 1}', '{"data": []}']
)
def test_files_that_are_no_questions_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "qa.json").write_text(content)
    with pytest.raises(LongRopeError, match=r"qa\.json (is not in SQuAD's format|holds no answerable question)"):
        Questions.read(tmp_path / "qa.json")


def test_what_does_not_fit_says_how_many_tokens_it_needs(questions: Questions) -> None:
    with pytest.raises(LongRopeError, match=r"RULER's vt needs at least \d+ tokens with this tokenizer"):
        draw("vt", length=300)
    with pytest.raises(LongRopeError, match=r"expected 7 answerable questions in dev\.json, found 6"):
        draw("qa_1", length=600, count=7, questions=questions)
    with pytest.raises(LongRopeError, match="needs a file of questions"):
        draw("qa_1")
    with pytest.raises(LongRopeError, match="need 1000 samples"):
        draw("niah_single_2", count=1000)


def test_more_words_than_there_are() -> None:
    assert len(all_words()) > 5000
    drawn = draw_words(random.Random(0), len(all_words()) + 1)
    assert len(set(drawn)) == len(drawn)
    assert all("-" in word for word in drawn)
    assert len(set(draw_words(random.Random(0), 500))) == 500


def test_the_steps_of_a_chain_lie_between_lines_of_noise() -> None:
    context = variable_chain(5, random.Random(0), "").prompt.split("\n\n")[1].split("\nQuestion")[0]
    assert [line == NOISE for line in context.split("\n")] == [False, True] * 5


def test_behind_a_books_end_comes_its_beginning() -> None:
    """A book of exactly the length fills it, though its line ends become blanks."""
    ids = encode(tiny_tokenizer(), book().text[:9000].replace(". ", ".\n\n\n\n").replace(", ", ",\n\n"))[:LENGTH]
    short = TokenizedDocument("short", "ab" * 32, np.asarray(ids, dtype=np.int32))
    samples = draw_task("niah_single_2", tiny_tokenizer(), length=LENGTH, count=1, seed=0, documents=[short])
    assert LENGTH - 12 < len(samples.samples[0].ids) + samples.samples[0].room <= LENGTH
    words = set(tiny_tokenizer().decode(short.ids.tolist()).split())
    context = texts(samples)[0].partition("\n")[2].rpartition("\n")[0]
    strange = [word for word in re.sub(r"One of the special .+? is: \d+\.", "", context).split() if word not in words]
    assert len(strange) <= 2  # where the end meets the beginning


def in_script(text: str) -> RulerSamples:
    """One sample of niah_single_2 in a long document of repeated `text`."""
    ids = encode(tiny_tokenizer(), text * (4 * LENGTH // len(text) + 1))
    document = TokenizedDocument("道", "ab" * 32, np.asarray(ids, dtype=np.int32))
    return draw_task("niah_single_2", tiny_tokenizer(), length=LENGTH, count=1, seed=0, documents=[document])


@pytest.mark.parametrize("text", ["道可道，非常道。名可名，非常名！", "ความรู้คู่คุณธรรม นำชีวิต "])
def test_scripts_with_few_blanks(text: str) -> None:
    """Chinese is cut behind its sentences, Thai at its blanks between phrases; the needle stands in the text."""
    samples = in_script(text)
    assert len(samples.samples[0].ids) + samples.samples[0].room >= 0.9 * LENGTH
    before, _, after = texts(samples)[0].partition("One of the special magic")
    assert all(part.count(text[:3]) > 1 for part in (before, after))


def test_a_text_without_any_blank_is_refused_by_name() -> None:
    with pytest.raises(LongRopeError, match=r"RULER's niah_single_2 .* expected 道 to have enough .* 1100") as caught:
        in_script("道可道非常道")
    assert caught.value.code == "too-short-text"


def test_samples_name_their_documents() -> None:
    assert draw("niah_single_2").sources == {book().sha256: "book"}
    assert draw("niah_single_1").sources == draw("vt").sources == {}
