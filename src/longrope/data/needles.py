"""Needle samples: a fact hidden in a long real text, and a question about it at the end (LongRoPE2, §3.2 and App. C).

A sample is built from token ids, never from characters: it is exactly L' tokens, the needle has the same tokens at
every depth, and the answer's tokens are the ones that an objective scores (search/objective.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from longrope.data.samples import SampleOrigin, Samples, check_no_bos, draw_origins
from longrope.data.tokens import TokenizedDocument, bos_of, bos_prefix, encode, encode_continuation
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
class NeedleSamples(Samples):
    """N samples of one length: BOS, instruction, text, needle, question and answer.

    answer_tokens: N counts; the last `answer_tokens[j]` tokens of sample j are its answer.
    depths: N numbers in [0, 1]: 0 puts the needle directly behind the instruction, 1 directly before the question.
    keys, numbers: the key of each needle, which its question names, and the number to recall.
    origins: where the surrounding text of each sample comes from.
    """

    answer_tokens: tuple[int, ...]
    depths: tuple[float, ...]
    keys: tuple[str, ...]
    numbers: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the ids and the answers' token counts."""
        head = f"{tuple(self.ids.shape)} {self.answer_tokens} ".encode()
        return sha256_bytes(head + self.ids.cpu().numpy().astype("<i8").tobytes())


@dataclass(frozen=True, slots=True)
class Haystacks:
    """The texts to hide needles in: `tokens` consecutive tokens from each of `origins`; no two overlap."""

    origins: tuple[SampleOrigin, ...]
    tokens: int


def draw_needles(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    depth: str | float = "spread",
    digits: int = 7,
    haystacks: Haystacks | None = None,
) -> NeedleSamples:
    """Draw `count` needle samples of exactly `length` tokens; `seed` decides texts, keys and numbers.

    `depth`: `spread` spaces the needles evenly from 0 to 1, `start` puts all directly behind the instruction (the
    sample of App. C), a number in [0, 1] puts all at that depth. Sample j takes the first tokens of haystack j; the
    default haystacks are those of `draw_haystacks`, one per document first.

    Raises LongRopeError: `too-short-text` when instruction, needle, question and answer alone fill `length`, or the
    documents are too few or too short; `invalid-setting` for another `depth`; `bos-in-text` when a text holds BOS.
    """
    depths = _depths(depth, count)
    if haystacks is None:
        haystacks = draw_haystacks(documents, tokenizer, length=length, count=count, seed=seed, digits=digits)
    bos, begin = bos_of(tokenizer), prompt_start(tokenizer)
    facts = _facts(tokenizer, np.random.default_rng(seed), count, digits, least=length - len(begin) - haystacks.tokens)
    _check_room(begin, facts, length)
    by_hash = {document.sha256: document for document in documents}
    ids = np.empty((count, length), dtype=np.int64)
    origins = haystacks.origins[:count]
    for sample, origin, fact, depth_of_sample in zip(ids, origins, facts, depths, strict=True):
        room = length - len(begin) - fact.size
        document = by_hash[origin.document_sha256]
        text = document.ids[origin.offset : origin.offset + room]
        check_no_bos(text, bos, document)
        at = round(depth_of_sample * room)
        sample[:] = np.concatenate([begin, text[:at], fact.needle, text[at:], fact.question, fact.answer])
    answers = tuple(len(fact.answer) for fact in facts)
    keys, numbers = tuple(fact.key for fact in facts), tuple(fact.number for fact in facts)
    return NeedleSamples(torch.from_numpy(ids), origins, bos is not None, answers, depths, keys, numbers)


def draw_haystacks(
    documents: Sequence[TokenizedDocument],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    digits: int = 7,
    more: int = 0,
) -> Haystacks:
    """Draw the haystacks that `draw_needles` uses for the same arguments, and `more` behind them for other samples.

    All have the tokens of the longest text that any sample needs, so that they do not depend on how keys are split into
    tokens. Raises LongRopeError as `draw_needles` does.
    """
    begin, facts = prompt_start(tokenizer), _facts(tokenizer, np.random.default_rng(seed), count, digits)
    _check_room(begin, facts, length)
    tokens = length - len(begin) - min(fact.size for fact in facts)
    return Haystacks(draw_origins(documents, span=tokens, count=count + more, seed=seed), tokens)


@dataclass(frozen=True, slots=True)
class _Fact:
    """One key with its number, and the tokens of the sentences that hide it, ask for it and answer."""

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
    """Draw `count` facts of at least `least` tokens: one of fewer would need more text than there is."""

    def fact(key: str, number: str) -> _Fact:
        texts = (template.format(key=key, number=number) for template in (NEEDLE, QUESTION, ANSWER))
        return _Fact(key, number, *(encode_continuation(tokenizer, text) for text in texts))

    keys = [draw_key(rng) for _ in range(count)]
    facts = [fact(key, draw_number(rng, digits)) for key in keys]
    for index in range(count):
        while facts[index].size < least:
            facts[index] = fact(draw_key(rng), draw_number(rng, digits))
    return facts


def prompt_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that every needle sample begins with: BOS where the tokenizer puts one, and the instruction."""
    return bos_prefix(tokenizer) + encode(tokenizer, INSTRUCTION)


def _check_room(begin: Sequence[int], facts: Sequence[_Fact], length: int) -> None:
    longest = len(begin) + max(fact.size for fact in facts)
    if longest >= length:
        raise LongRopeError(
            f"expected needle samples longer than instruction, needle, question and answer, which take {longest} "
            f"tokens of this tokenizer; found a length of {length}",
            code="too-short-text",
        )


def draw_key(rng: np.random.Generator) -> str:
    """Draw the key of a needle, such as `numerous-kite`."""
    return f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"


def draw_number(rng: np.random.Generator, digits: int) -> str:
    """Draw a number of `digits` digits; the first is not 0."""
    return "".join(map(str, [rng.integers(1, 10), *rng.integers(0, 10, digits - 1)]))


def _depths(depth: str | float, count: int) -> tuple[float, ...]:
    if depth == "spread":
        return tuple(np.linspace(0.0, 1.0, count).tolist()) if count > 1 else (0.5,)
    try:
        value = 0.0 if depth == "start" else float(depth)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise LongRopeError(
            f"expected a needle depth of 'spread', 'start' or a number from 0 to 1; found {depth!r}",
            code="invalid-setting",
        )
    return (value,) * count
