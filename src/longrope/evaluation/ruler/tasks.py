"""RULER's table of tasks (scripts/synthetic.yaml), and the samples of a task: as much haystack as fits a length."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from longrope.data.samples import draw_origins
from longrope.data.tokens import Ids, TokenizedDocument, bos_prefix, encode, encode_continuation
from longrope.errors import LongRopeError
from longrope.evaluation.retrieval import ids_sha256, joined
from longrope.evaluation.ruler import generators
from longrope.evaluation.ruler.generators import Needles, Questions, Sample

NIAH = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value="uuids"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(haystack="needle"),
    "niah_multikey_3": Needles(haystack="needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
}
SHORTEST = 4096
"""RULER's shortest published length."""
TOO_SHORT = "too-short-length"
"""The code of the error where a task does not fit a length."""
_ROOM = dict.fromkeys(NIAH, 128) | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32}  # tokens RULER leaves for the reply
_SPARE = 8  # tokens beyond the reference answer that a reply may take below SHORTEST
_FULL = 0.9  # the least share of a length that a haystack of words of a document fills; or all but one long word:
_WORD = 64  # tokens
_PIECES = re.compile(r"\s+|(?<=[。！？])(?![」』”’])")
"""The places to cut at: blanks between two words, and the ends of sentences in a script without blanks."""


@dataclass(frozen=True, slots=True, eq=False)
class FittedSample:
    """A sample as token ids, and how many tokens are left for the reply: together at most the length asked for."""

    ids: Ids
    room: int
    answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class RulerSamples:
    """The samples of one task at one length. `sources`: SHA-256 of the documents they were made from -> name."""

    task: str
    length: int
    samples: tuple[FittedSample, ...]
    sources: dict[str, str]

    @property
    def sha256(self) -> str:
        return ids_sha256(sample.ids for sample in self.samples)


def needs_text(task: str) -> bool:
    """True if a task hides its needles in the text given as data."""
    return task in NIAH and NIAH[task].haystack == "essay"


def draw_task(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    documents: Sequence[TokenizedDocument] = (),
    questions: Questions | None = None,
) -> RulerSamples:
    """`count` samples of `task` with the largest haystack whose prompt and room for a reply take `length` tokens.

    Raises LongRopeError, naming the task, when its shortest form does not fit `length`, the documents or questions are
    too few, or a document has too few blanks to be cut to `length`.
    """
    makers, sources = _makers(task, tokenizer, length, count, seed, documents, questions)
    begin = bos_prefix(tokenizer)

    def room(sample: Sample) -> int:
        if length >= SHORTEST:
            return _ROOM[task]
        reply = generators.numbered(sample.answers) if task == "cwe" else ", ".join(sample.answers)
        return min(_ROOM[task], len(encode_continuation(tokenizer, f" {reply}")) + _SPARE)

    samples = []
    for trial, maker in enumerate(makers):

        def make(size: int, maker: _Maker = maker, trial: int = trial) -> Sample:
            # A random generator of its own for every size: the sample does not depend on how its size was found.
            return maker.make(size, random.Random(f"{seed} {task} {length} {trial}"))

        def tokens(sample: Sample) -> int:
            return len(begin) + len(encode(tokenizer, sample.prompt)) + room(sample)

        try:
            sample = fit(make, tokens, length, maker.smallest, maker.largest)
        except LongRopeError as error:
            raise LongRopeError(f"RULER's {task} {error}", code=error.code) from error
        if maker.document and (filled := tokens(sample)) < min(_FULL * length, length - _WORD):
            raise LongRopeError(
                f"RULER's {task} cuts texts between words: expected {maker.document} to have enough of them to fill "
                f"{length} tokens, found {filled} tokens in {maker.largest} words",
                code="too-short-text",
                hint="give texts with blanks between words, or `ruler_tasks` that need no text, such as niah_single_1",
            )
        samples.append(FittedSample(joined(begin, encode(tokenizer, sample.prompt)), room(sample), sample.answers))
    return RulerSamples(task, length, tuple(samples), sources)


def fit(
    make: Callable[[int], Sample],
    tokens: Callable[[Sample], int],
    length: int,
    smallest: int,
    largest: int | None = None,
) -> Sample:
    """The sample of the largest size that takes at most `length` tokens.

    `make(size)` is the sample with `size` units of haystack (words, sentences, lines, documents), `smallest` to
    `largest`; `tokens` counts its tokens, the room for its reply included. The tokens grow nearly evenly with the
    size, so interpolation finds it in a few steps; every second step halves the interval, as words are not all alike.

    Raises LongRopeError when the smallest does not fit, with the number of tokens that it takes.
    """
    best = make(smallest)
    low, low_tokens = smallest, tokens(best)
    if low_tokens > length:
        raise LongRopeError(
            f"needs at least {low_tokens} tokens with this tokenizer; found a length of {length}", code=TOO_SHORT
        )
    while True:
        high = 2 * low if largest is None else min(2 * low, largest)
        sample = make(high)
        high_tokens = tokens(sample)
        if high_tokens > length:
            break
        if high == low:
            return sample
        best, low, low_tokens = sample, high, high_tokens
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (length - low_tokens) / (high_tokens - low_tokens)
        size = min(max(low + int(share * (high - low)), low + 1), high - 1)
        sample = make(size)
        taken = tokens(sample)
        if taken <= length:
            best, low, low_tokens = sample, size, taken
        else:
            high, high_tokens = size, taken
        halve = not halve
    return best


@dataclass(frozen=True)
class _Maker:
    """A function that makes one sample of any size from `smallest` to `largest`, of words of `document` if any."""

    make: Callable[[int, random.Random], Sample]
    smallest: int
    largest: int | None = None
    document: str = ""


def _makers(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int,
    documents: Sequence[TokenizedDocument],
    questions: Questions | None,
) -> tuple[list[_Maker], dict[str, str]]:
    """A maker for each of `count` samples, and the documents they take text from: SHA-256 -> name."""
    if task in NIAH and not needs_text(task):
        return [_Maker(partial(NIAH[task].make, words=()), NIAH[task].smallest)] * count, {}
    if task in NIAH:
        places = draw_origins(documents, span=length, count=count, seed=seed)
        by_hash = {document.sha256: document for document in documents}
        makers = []
        for place in places:
            # Line ends become blanks, so `length` tokens would be too few; behind a book's end comes its beginning.
            reach = range(place.offset, place.offset + 2 * length)
            ids = by_hash[place.document_sha256].ids.take(reach, mode="wrap")
            words = [word for word in _PIECES.split(tokenizer.decode(ids.tolist())) if word][1:-1]  # outer ones are cut
            makers.append(_Maker(partial(NIAH[task].make, words=words), 1, len(words), place.document))
        return makers, {place.document_sha256: place.document for place in places}
    if task == "vt":
        solved = [_solved(tokenizer, seed, trial) for trial in range(count)]
        return [
            _Maker(partial(generators.variable_chain, solved=example), generators.SMALLEST_CHAIN) for example in solved
        ], {}
    if task == "cwe":
        return [_Maker(partial(generators.common_words, length=length), generators.SMALLEST_LIST)] * count, {}
    if task == "fwe":
        vocabulary = generators.coded_vocabulary(length - _ROOM[task])
        return [_Maker(partial(generators.frequent_words, vocabulary=vocabulary), generators.SMALLEST_TEXT)] * count, {}
    if questions is None:
        raise LongRopeError(
            "RULER's qa_1 needs a file of questions in SQuAD's format", code="missing-file", hint="give it as `qa_file`"
        )
    asked = questions.draw(count, random.Random(f"{seed} {task}"))
    makers = [_Maker(partial(questions.make, question=question), 1) for question in asked]
    return makers, {questions.sha256: questions.name}


def _solved(tokenizer: PreTrainedTokenizerBase, seed: int, trial: int) -> str:
    """The example in front of a sample of variable tracking, as long as its tokens allow."""

    def make(size: int) -> Sample:
        return generators.solved_chain(size, random.Random(f"{seed} example {trial}"))

    def tokens(sample: Sample) -> int:
        return len(encode(tokenizer, sample.prompt))

    return fit(make, tokens, generators.EXAMPLE_TOKENS, generators.SMALLEST_CHAIN).prompt
