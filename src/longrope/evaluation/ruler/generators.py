"""The texts of RULER's tasks: needles, variable tracking, common and frequent words, questions and answers.

Each generator makes a `Sample` of any size, in units of its haystack (words, lines, documents); tasks.py chooses the
largest that fits a length. Templates are those of RULER's scripts/data/synthetic.
"""

from __future__ import annotations

import json
import math
import random
import re
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.evaluation.ruler.words import draw_pair, draw_words
from longrope.input_files import LARGEST_JSON, refuse_special
from longrope.storage import sha256_bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt up to where the model answers, and the strings that a right answer holds."""

    prompt: str
    answers: tuple[str, ...]


# Needles in a haystack: single, multi-key, multi-value and multi-query (niah.py).

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text? The "
    "special magic {kind} for {query} mentioned in the provided text is"
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""The depths in per cent at which needles lie between the sentences of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needles:
    """One row of RULER's table of needle tasks.

    `haystack` is `essay`, `noise` or `needle`; `key` and `value` are `words`, `numbers` or `uuids`; `keys`, `values`
    and `queries` count keys, values of a key, and keys that are asked for.
    """

    haystack: str = "essay"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def smallest(self) -> int:
        """The fewest lines of haystack: places for all needles."""
        return self.keys * self.values

    def make(self, size: int, rng: random.Random, words: Sequence[str]) -> Sample:
        """A sample with `size` words of `words`, or `size` lines of noise or of other needles."""
        keys = [_draw(self.key, rng) for _ in range(self.keys)]
        values = [[_draw(self.value, rng) for _ in range(self.values)] for _ in keys]
        needles = [self._sentence(key, value) for key, own in zip(keys, values, strict=True) for value in own]
        rng.shuffle(needles)
        if self.haystack == "essay":
            context = _between_sentences(" ".join(words[:size]), needles, rng)
        else:
            noise = self.haystack == "noise"
            lines = [NOISE] * size if noise else [self._sentence(*self._drawn(rng)) for _ in range(size)]
            for place, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
                lines.insert(place, needle)
            context = "\n".join(lines)
        asked = rng.sample(range(self.keys), self.queries)
        names = [keys[index] for index in asked]
        query = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
        answers = tuple(value for index in asked for value in values[index])
        template, kind = (ONE, self.value.removesuffix("s")) if len(answers) == 1 else (SEVERAL, self.value)
        return Sample(template.format(kind=kind, context=context, query=query), answers)

    def _drawn(self, rng: random.Random) -> tuple[str, str]:
        return _draw(self.key, rng), _draw(self.value, rng)

    def _sentence(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)


def _draw(kind: str, rng: random.Random) -> str:
    if kind == "words":
        return draw_pair(rng)
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _between_sentences(text: str, needles: Sequence[str], rng: random.Random) -> str:
    """The text with a needle at as many of the DEPTHS, between two sentences each; of one without sentences, words."""
    sentences = re.split(r"(?<=[.!?。！？])\s+|(?<=[.!?。！？][\"”’'」』])\s+", text)
    if len(sentences) == 1:
        sentences = text.split(" ")
    places = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(DEPTHS, len(needles)))
    pieces: list[str] = []
    begin = 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [*sentences[begin:place], needle]
        begin = place
    return " ".join([*pieces, *sentences[begin:]])


# Variable tracking: which variables got a value through a chain (variable_tracking.py). One chain of four hops in
# repeated sentences, behind one solved example of at most 500 tokens.

HOPS = 4
EXAMPLE_TOKENS = 500
SMALLEST_CHAIN = 5  # lines of noise: places for the chain
TRACKING_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find"
    " all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of"
    " variable assignment in the text above, {count} variables are assigned the value {value}, they are: "
)


def solved_chain(size: int, rng: random.Random) -> Sample:
    """A solved sample with `size` lines of noise; its variables have three letters, the asked-for chain's five."""
    sample = _chain(size, 3, rng)
    return Sample(f"{sample.prompt} {' '.join(sample.answers)}\n\n", sample.answers)


def variable_chain(size: int, rng: random.Random, solved: str) -> Sample:
    """A sample with `size` lines of noise behind the example `solved`."""
    sample = _chain(size, 5, rng)
    return Sample(solved + sample.prompt, sample.answers)


def _chain(size: int, letters: int, rng: random.Random) -> Sample:
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    first, *others = names
    value = str(rng.randint(10_000, 99_998))
    steps = [f"VAR {first} = {value}"]
    steps += [f"VAR {name} = VAR {before} " for name, before in zip(others, names, strict=False)]
    lines = [NOISE] * size
    for already, (place, step) in enumerate(zip(sorted(rng.sample(range(size), len(steps))), steps, strict=True)):
        lines.insert(place + already, step)
    prompt = TRACKING_PROMPT.format(context="\n".join(lines), value=value, count=len(names))
    return Sample(prompt, tuple(names))


# The words of a list that are most common, the coded words of a text that are most frequent
# (common_words_extraction.py, freq_words_extraction.py).

COMMON = 10
SMALLEST_LIST = 10
SMALLEST_TEXT = 64  # words: in a shorter text the fourth and the fifth most frequent may tie
SHORT_LIST = 4096
"""Below this length the list repeats its words less often."""
LIST_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that"
    " appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10"
    " words that appear most often in the list are:"
)
CODED_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared"
    " coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the"
    " three most frequently appeared words in the above coded text? Answer: According to the coded text above, the"
    " three most frequently appeared words are:"
)
LETTERS = 6
ZETA_2 = math.pi**2 / 6  # ζ(α) of the frequencies k^−α / ζ(α), for RULER's α = 2


def common_words(size: int, rng: random.Random, length: int) -> Sample:
    """`size` different words, ten of them common, behind one solved example."""
    short = length < SHORT_LIST
    solved = _list(*((20, 3, 1) if short else (40, 10, 3)), rng)
    asked = _list(size, *((6, 1) if short else (30, 3)), rng)
    return Sample(f"{solved.prompt} {numbered(solved.answers)}\n{asked.prompt}", asked.answers)


def _list(different: int, common: int, uncommon: int, rng: random.Random) -> Sample:
    drawn = draw_words(rng, different)
    words = drawn[:COMMON] * common + drawn[COMMON:] * uncommon
    rng.shuffle(words)
    return Sample(LIST_PROMPT.format(context=numbered(words)), tuple(drawn[:COMMON]))


def numbered(words: Sequence[str]) -> str:
    """The words as `1. word 2. word …`."""
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, start=1))


def coded_vocabulary(room: int) -> int:
    """The number of coded words where `room` tokens are left for the prompt: at least the dots and three words."""
    return max(room // 50, 4)


def frequent_words(size: int, rng: random.Random, vocabulary: int) -> Sample:
    """About `size` words from `vocabulary` coded ones, with Zipf's frequencies; the most frequent are dots."""
    coded: dict[str, None] = {}
    while len(coded) < vocabulary:
        coded["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
    ranked = ["...", *list(coded)[1:]]
    words = [word for rank, word in enumerate(ranked, start=1) for _ in range(int(size * rank**-2.0 / ZETA_2))]
    rng.shuffle(words)
    return Sample(CODED_PROMPT.format(context=" ".join(words)), tuple(ranked[1:4]))


# Question answering: one SQuAD question, its paragraph among others (qa.py).

QA_PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me"
    " the answer and do not output any other words.\n\nQuestion: {query} Answer:"
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its accepted answers; `paragraph` and `related` are places in the file's list of paragraphs.

    `paragraph` holds the answer, `related` are the other paragraphs of the same article.
    """

    text: str
    answers: tuple[str, ...]
    paragraph: int
    related: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """A file in SQuAD's format (1.1 or 2.0): its different paragraphs, sorted, and its answerable questions."""

    name: str
    sha256: str
    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]

    @classmethod
    def read(cls, path: Path) -> Questions:
        """Read a file. Raises LongRopeError, with the path, where it is not in SQuAD's format or has no question."""
        try:
            refuse_special(path, LARGEST_JSON)
            content = path.read_bytes()
            articles = json.loads(content)["data"]
            paragraphs = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
            place = {text: index for index, text in enumerate(paragraphs)}
            questions = [question for article in articles for question in _questions(article, place)]
        except OSError as error:
            raise LongRopeError(f"cannot read the questions {path}: {error.strerror}", code="missing-file") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LongRopeError(
                f"{path} is not in SQuAD's format: expected JSON with data, paragraphs, context, qas, question and "
                "answers",
                code="damaged-file",
            ) from error
        if not questions:
            raise LongRopeError(f"{path} holds no answerable question", code="damaged-file")
        return cls(path.name, sha256_bytes(content), tuple(paragraphs), tuple(questions))

    def draw(self, count: int, rng: random.Random) -> list[Question]:
        """`count` different questions. Raises LongRopeError when there are fewer."""
        if count > len(self.questions):
            raise LongRopeError(
                f"expected {count} answerable questions in {self.name}, found {len(self.questions)}",
                code="too-short-text",
            )
        return rng.sample(self.questions, count)

    def make(self, size: int, rng: random.Random, question: Question) -> Sample:
        """The question behind `size` paragraphs: its own, its article's others, then any; repeated where too few."""
        count = len(self.paragraphs)
        if size >= count:
            chosen = [index % count for index in range(size)]
        elif size - 1 <= len(question.related):
            chosen = [question.paragraph, *rng.sample(question.related, size - 1)]
        else:
            near = {question.paragraph, *question.related}
            far = [index for index in range(count) if index not in near]
            chosen = [question.paragraph, *question.related, *rng.sample(far, size - 1 - len(question.related))]
        rng.shuffle(chosen)
        documents = [f"Document {at}:\n{self.paragraphs[index]}" for at, index in enumerate(chosen, start=1)]
        return Sample(QA_PROMPT.format(context="\n\n".join(documents), query=question.text), question.answers)


def _questions(article: dict[str, Any], place: dict[str, int]) -> list[Question]:
    own = sorted({place[paragraph["context"]] for paragraph in article["paragraphs"]})
    return [
        Question(
            entry["question"],
            tuple(str(answer["text"]) for answer in entry["answers"]),
            place[paragraph["context"]],
            tuple(index for index in own if index != place[paragraph["context"]]),
        )
        for paragraph in article["paragraphs"]
        for entry in paragraph["qas"]
        if not entry.get("is_impossible", False) and entry["answers"]
    ]
