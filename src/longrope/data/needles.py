"""Needle samples: a fact hidden in a long real text, and a question about it at the end (LongRoPE2, §3.2 and App. C).

Everything is put together from token ids, never from characters: a sample is exactly L' tokens, the needle's tokens are
the same wherever it lies, and the answer's tokens are the ones that are scored. Knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from longrope.data.samples import SampleOrigin, check_no_bos, draw_places
from longrope.data.tokens import TokenizedDocument, bos_of, encode, encode_inside, front
from longrope.errors import LongRopeError
from longrope.storage import sha256_bytes

INSTRUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the"
    " number afterwards.\n"
)
NEEDLE = " One of the special magic numbers for {key} is: {number}."
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text?"
    " The special magic number for {key} mentioned in the provided text is"
)
ANSWER = " {number}"

# Keys are adjective-noun pairs, as in RULER: 40·40 of them, enough that a book hardly holds one.
_ADJECTIVES = (
    "abrupt amber ancient bitter brave brisk broken calm careful cheerful clever cold curious distant eager early faint"
    " fierce fragile gentle golden hidden hollow humble idle jolly lonely lucky mellow narrow numerous patient plain"
    " proud quiet rapid rusty silent slender wandering"
).split()
_NOUNS = (
    "anchor arrow badger basket beacon bridge candle canyon castle cradle drum eagle engine falcon feather fiddle"
    " forest garden glacier hammer harbor helmet island kettle kite ladder lantern meadow mirror needle orchard"
    " otter pebble pillow raven saddle shovel sparrow thimble wagon"
).split()


@dataclass(frozen=True, eq=False)
class NeedleSamples:
    """Texts of one length that end in an answer.

    ids: int64 (N, length). answer_tokens: N counts; the last `answer_tokens[j]` tokens of row j are its answer.
    depths: N numbers in [0, 1], where the needle lies in the text: 0 directly behind the instruction, 1 directly before
    the question. rows: the books' places.
    """

    ids: torch.Tensor
    answer_tokens: tuple[int, ...]
    depths: tuple[float, ...]
    keys: tuple[str, ...]
    numbers: tuple[str, ...]
    rows: tuple[SampleOrigin, ...]

    @property
    def length(self) -> int:
        """Tokens of every sample: BOS, instruction, text, needle, question and answer."""
        return self.ids.shape[1]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the ids and which of them are answers."""
        head = f"{tuple(self.ids.shape)} {self.answer_tokens} ".encode()
        return sha256_bytes(head + self.ids.cpu().numpy().astype("<i8").tobytes())

    @property
    def document_hashes(self) -> tuple[str, ...]:
        """The documents that the text was taken from, sorted, each once."""
        return tuple(sorted({row.document_sha256 for row in self.rows}))


@dataclass(frozen=True, slots=True)
class Places:
    """Where texts come from: `span` consecutive tokens at every one of `rows`, none of which overlap."""

    rows: tuple[SampleOrigin, ...]
    span: int


def draw_needles(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    depth: str | float = "spread",
    digits: int = 7,
    places: Places | None = None,
) -> NeedleSamples:
    """`count` needle samples of exactly `length` tokens; text, keys and numbers are drawn by `seed`.

    `depth`: `spread` puts the needles at evenly spaced depths from 0 to 1, `start` all directly behind the instruction
    (the sample of App. C), a number in [0, 1] all there. The text is the beginning of that at `places`, by default
    those of `needle_places`: one per document first.

    Raises LongRopeError when the parts alone are longer than `length`, the documents are too few or too short, or a
    text holds the BOS id itself.
    """
    depths = _depths(depth, count)
    if places is None:
        places = needle_places(documents, tokenizer, length=length, count=count, seed=seed, digits=digits)
    bos, begin = bos_of(tokenizer), opening(tokenizer)
    facts = _facts(tokenizer, np.random.default_rng(seed), count, digits, least=length - len(begin) - places.span)
    _check_room(begin, facts, length)
    by_hash = {document.sha256: document for document in documents}
    ids = np.empty((count, length), dtype=np.int64)
    rows = places.rows[:count]
    for sample, row, fact, place in zip(ids, rows, facts, depths, strict=True):
        room = length - len(begin) - fact.size
        text = by_hash[row.document_sha256].ids[row.offset : row.offset + room]
        check_no_bos(text, bos, row)
        at = round(place * room)
        sample[:] = np.concatenate([begin, text[:at], fact.needle, text[at:], fact.question, fact.answer])
    answers = tuple(len(fact.answer) for fact in facts)
    keys, numbers = tuple(fact.key for fact in facts), tuple(fact.number for fact in facts)
    return NeedleSamples(torch.from_numpy(ids), answers, depths, keys, numbers, rows)


def needle_places(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    digits: int = 7,
    more: int = 0,
) -> Places:
    """The places of the `count` samples that `draw_needles` draws with the same arguments, and `more` for others.

    Raises LongRopeError as `draw_needles` does.
    """
    begin, facts = opening(tokenizer), _facts(tokenizer, np.random.default_rng(seed), count, digits)
    _check_room(begin, facts, length)
    # One span for all, the longest text any sample needs: places then do not depend on how keys are split.
    span = length - len(begin) - min(fact.size for fact in facts)
    return Places(draw_places(documents, span=span, count=count + more, seed=seed), span)


@dataclass(frozen=True, slots=True)
class _Fact:
    """What a sample hides and asks for, and its parts in tokens."""

    key: str
    number: str
    needle: list[int]
    question: list[int]
    answer: list[int]

    @property
    def size(self) -> int:
        return len(self.needle) + len(self.question) + len(self.answer)


def _facts(
    tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, count: int, digits: int, least: int = 0
) -> list[_Fact]:
    """`count` facts; those of fewer than `least` tokens, which would need more text than there is, are drawn again."""

    def fact(key: str, number: str) -> _Fact:
        texts = (template.format(key=key, number=number) for template in (NEEDLE, QUESTION, ANSWER))
        return _Fact(key, number, *(encode_inside(tokenizer, text) for text in texts))

    keys = [draw_key(rng) for _ in range(count)]
    facts = [fact(key, draw_number(rng, digits)) for key in keys]
    for place in range(count):
        while facts[place].size < least:
            facts[place] = fact(draw_key(rng), draw_number(rng, digits))
    return facts


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What every text with needles begins with: BOS where the tokenizer puts one, and the instruction."""
    return front(tokenizer) + encode(tokenizer, INSTRUCTION)


def _check_room(begin: Sequence[int], facts: Sequence[_Fact], length: int) -> None:
    longest = len(begin) + max(fact.size for fact in facts)
    if longest >= length:
        raise LongRopeError(
            f"expected needle samples longer than instruction, needle, question and answer, which take {longest} "
            f"tokens of this tokenizer; found a length of {length}"
        )


def draw_key(rng: np.random.Generator) -> str:
    """What a needle is about: `numerous-kite`."""
    return f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"


def draw_number(rng: np.random.Generator, digits: int) -> str:
    """A number of `digits` digits, the first of them not 0."""
    return "".join(map(str, [rng.integers(1, 10), *rng.integers(0, 10, digits - 1)]))


def _depths(depth: str | float, count: int) -> tuple[float, ...]:
    if depth == "spread":
        return tuple(np.linspace(0.0, 1.0, count).tolist()) if count > 1 else (0.5,)
    try:
        value = 0.0 if depth == "start" else float(depth)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise LongRopeError(f"expected a needle depth of 'spread', 'start' or a number from 0 to 1; found {depth!r}")
    return (value,) * count
